"""What may know what: the rules of the tree, checked on the files."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import foveate
from foveate.core import registry

ROOT = Path(foveate.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
IDS = [str(f.relative_to(ROOT)) for f in FILES]


def imported(file: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, at any depth."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file.name}: relative imports hide where a name comes from"
            yield from (f"{node.module}.{a.name}" for a in node.names)


def area(name: str) -> str:
    """`measure` of `foveate.measure.entropy.Entropy`; "" outside of the package."""
    parts = name.split(".")
    return parts[1] if parts[0] == "foveate" and len(parts) > 1 else ""


def fresh(code: str) -> str:
    """What a new interpreter prints."""
    path = os.pathsep.join([str(ROOT.parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.parametrize(
    "work",
    [
        "import foveate",
        "from foveate.core import registry; assert registry.names()",
        "import foveate; foveate.names()",
        "import foveate.core.errors, foveate.core.card, foveate.core.params",
    ],
)
def test_light_work_does_not_import_torch(work: str) -> None:
    heavy = ("torch", "transformers", "pandas", "numpy", "jaxtyping", "scipy")
    assert fresh(f"{work}\nimport sys\nprint([m for m in {heavy!r} if m in sys.modules])") == "[]"


def test_importing_has_no_effects() -> None:
    code = """
from transformers import AttentionInterface, AttentionMaskInterface
import torch
before = [dict(i._global_mapping) for i in (AttentionInterface, AttentionMaskInterface)], torch.get_num_threads()
import foveate.core.attach, foveate.testing
after = [dict(i._global_mapping) for i in (AttentionInterface, AttentionMaskInterface)], torch.get_num_threads()
print(before == after)
"""
    assert fresh(code) == "True"


def test_public_names_are_few_and_lazy() -> None:
    assert len(foveate.__all__) <= 20
    assert sorted(foveate.__all__) == sorted(set(foveate.__all__))
    for name in foveate.__all__:
        assert getattr(foveate, name) is not None
        assert name in dir(foveate)
    with pytest.raises(AttributeError, match="no attribute 'attack'"):
        _ = foveate.attack


def test_public_functions_share_no_name_with_a_folder() -> None:
    folders = {f.name for f in ROOT.iterdir() if f.is_dir()}
    assert not folders & set(foveate.__all__)


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_who_imports_whom(file: Path) -> None:
    own = file.relative_to(ROOT).parts[0]
    areas = {area(name) for name in imported(file)}
    if own == "core":
        assert areas <= {"", "core"}, "core knows nothing but itself"
    if own in registry.VERBS:
        others = set(registry.VERBS) - {own}
        assert not areas & others, "verb folders do not import each other"
        assert not areas & {"cli", "report", "testing"}, "mechanisms know nothing of how they are shown or tested"
    if own != "cli":
        assert "cli" not in areas, "nothing stands on the command line"
    if own not in ("testing", "__init__.py") and file != ROOT / "cli" / "check.py":
        assert "testing" not in areas, "only `foveate check` and the public name run checks"


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_only_the_door_touches_a_model(file: Path) -> None:
    if file in [ROOT / "core" / f"{name}.py" for name in ("attach", "converting", "hooks")]:
        return
    watched = {
        "AttentionInterface",
        "AttentionMaskInterface",
        "ALL_ATTENTION_FUNCTIONS",
        "ALL_MASK_ATTENTION_FUNCTIONS",
    }
    watched |= {"_attn_implementation_internal", "set_attn_implementation"}
    for node in ast.walk(ast.parse(file.read_text())):
        found = {getattr(node, key, None) for key in ("id", "attr", "name")}
        assert not found & watched, f"line {node.lineno}"
        assert not [n for n in found if re.fullmatch("register_.*hook", str(n))], f"line {node.lineno}"


@pytest.mark.parametrize("name", registry.names())
def test_one_mechanism_per_file(name: str) -> None:
    cls = registry.find(name)
    assert registry.camel(name) == cls.__name__, "the file is called as the class is"
    public = [n for n in sys.modules[cls.__module__].__all__ if not n.startswith("_")]
    assert cls.__name__ in public
    assert "__dataclass_params__" in vars(cls)
    assert not [s for s in cls.__subclasses__() if s.__module__.startswith("foveate.")], "mechanisms are final"


def test_verbs_have_no_name_in_common() -> None:
    assert len(registry.names()) == sum(len(registry.names(verb)) for verb in registry.VERBS)


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_files_are_clean(file: Path) -> None:
    text = file.read_text()
    assert not re.search(r"(/home/|/root\b|/Users/|[\"' ]/tmp|/work/|[A-Z]:\\\\)", text), (
        "an absolute path of some machine"
    )
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)
    assert ast.get_docstring(ast.parse(text)), "a module begins with what it is"
