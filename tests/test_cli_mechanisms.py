"""`foveate list`, `show`, `new` and `check`, as a person meets them."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import foveate
from foveate import catalogue, cli
from foveate.cli import new
from foveate.core import mechanism, mixer, recurrence, registry, rule
from foveate.core.card import BLANK
from foveate.testing import checks_for

ROOT = Path(foveate.__file__).parents[2]


@dataclass(frozen=True)
class Done:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    def complaint(self) -> str:
        """The one line of an error."""
        assert self.code == 2, self.out + self.err
        assert self.err.count("\n") == 1, self.err
        assert self.err.startswith("foveate: ")
        return self.err


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> Run:
    """Runs the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("COLUMNS", "120")

    def command(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["foveate", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return Done(int(left.value.code or 0), said.out, said.err)

    return command


# ---------------------------------------------------------------- list and show


@pytest.mark.parametrize("arguments", [["list"], ["show", "entropy"], ["list", "--json"], ["--version"]])
def test_listing_imports_nothing_heavy(arguments: Sequence[str]) -> None:
    code = f"""
import sys
from foveate.cli import main
sys.argv = ["foveate", *{arguments!r}]
try:
    main()
finally:
    heavy = ("torch", "transformers", "pandas", "numpy", "pyarrow", "scipy", "jaxtyping", "griffe")
    print([m for m in heavy if m in sys.modules], file=sys.stderr)
"""
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "[]"
    assert done.stdout


def listed(done: Done) -> set[str]:
    assert done.code == 0, done.err
    return {e["name"] for e in json.loads(done.out)}


def test_list_filters(run: Run) -> None:
    every = catalogue.entries()
    assert listed(run("list", "--json")) == {e["name"] for e in every}
    assert listed(run("list", "--kind", "modelmetric", "--json")) == {
        e["name"] for e in every if e["kind"] == "ModelMetric"
    }
    both = listed(run("list", "--needs", "values", "--needs", "keys", "--json"))
    assert both == {e["name"] for e in every if {"values", "keys"} <= set(e["needs"])}
    assert "value_drain" in both
    assert "output_norm" not in both
    assert listed(run("list", "--family", "sinks", "--verb", "measure", "--json")) >= {"sink_rate", "first_token_mass"}
    shown = run("list", "--family", "circuits").out
    assert "previous_token" in shown
    assert "entropy" not in shown


def test_list_suggests(run: Run) -> None:
    assert "did you mean 'sinks'" in run("list", "--family", "sink").complaint()
    assert "did you mean 'ModelMetric'" in run("list", "--kind", "ModelMetrik").complaint()
    assert "did you mean 'values'" in run("list", "--needs", "value").complaint()
    assert "circuits" in run("list", "--family", "zzz").complaint()


def test_show_tells_everything(run: Run) -> None:
    e, said = catalogue.find("sink_rate"), run("show", "sink_rate").out
    flat = " ".join(said.split())
    for key in ("summary", "title", "use", "misleads", "differs"):
        assert " ".join(e[key].split()) in flat, key
    for param in e["params"]:
        assert f"{param['name']} = {param['default']!r}" in said
        assert param["bounds"] in said
        assert param["meaning"] in flat
    for claim in e["claims"]:
        assert f"{claim['verdict']} {claim['claim']}" in flat
        assert claim["command"] in flat
    for line in e["example"].splitlines():
        assert line in said
    assert json.loads(run("show", "sink_rate", "--json").out) == e


def test_show_says_that_a_claim_was_not_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    e = catalogue.find("entropy")
    missing = {"name": "lost_claim", "verdict": "not run", "claim": "", "title": "", "command": ""}
    monkeypatch.setattr(catalogue, "entries", lambda: [e | {"claims": [missing]}])
    assert "not run lost_claim" in " ".join(run("show", "entropy").out.split())
    monkeypatch.setattr(catalogue, "entries", lambda: [e | {"claims": []}])
    assert "none tested" in run("show", "entropy").out


@pytest.mark.parametrize("columns", [80, 140])
@pytest.mark.parametrize("name", registry.names())
def test_show_fits_the_terminal(run: Run, monkeypatch: pytest.MonkeyPatch, name: str, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert max(map(len, run("show", name).out.splitlines())) <= columns


# ---------------------------------------------------------------- new


# the others take longer, and a skeleton is no place where they would break
QUICK = ("form", "bounds", "dtypes", "landing", "detaching", "table", "short", "narrow")
# every kind of mechanism by name
CLASSES = {
    c.__name__: c
    for module in (mechanism, rule, recurrence, mixer)
    for c in vars(module).values()
    if isinstance(c, type) and issubclass(c, mechanism.Mechanism) and c not in (mechanism.Mechanism, rule.Operator)
}
KINDS = [(verb, kind) for verb, kinds in new.templates().items() for kind in kinds]


def test_every_kind_has_a_template() -> None:
    assert {kind for _, kind in KINDS} == set(CLASSES), f"add VERB-ORDER-KIND.txt to {new.TEMPLATES.name}/"
    assert {verb for verb, _ in KINDS} <= set(registry.VERBS)


@pytest.fixture(scope="module")
def skeletons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of each kind, as `foveate new` writes it."""
    folder = tmp_path_factory.mktemp("skeletons")
    shutil.copy(ROOT / "pyproject.toml", folder)
    for verb, kind in KINDS:
        name = f"my_{kind.lower()}"
        (folder / f"{name}.py").write_text(new.written(new.templates()[verb][kind], name, name))
    return folder


def test_skeletons_are_clean(skeletons: Path) -> None:
    # as in a checkout, where imports of foveate are sorted as its own
    own = ["--config", "lint.isort.known-first-party=['foveate']"]
    for arguments in (["format", "--check"], ["check", *own]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *arguments, "."], cwd=skeletons, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("verb", "kind"), KINDS)
def test_a_skeleton_is_checked_and_tells_what_to_fill_in(run: Run, verb: str, kind: str) -> None:
    name = f"my_{kind.lower()}"
    done = run("new", verb, name, "--kind", kind)
    assert done.code == 0
    assert f"foveate check {name}.py" in done.out
    assert BLANK in Path(f"{name}.py").read_text().lower()
    fitting = [c for c in QUICK if c in checks_for(CLASSES[kind])]
    done = run("check", f"{name}.py", "--json", *(f"--only={c}" for c in fitting))
    failed = {c: o["why"] for c, o in outcomes(done).items() if o["verdict"] == "failed"}
    assert set(failed) == {"form"}
    for field in ("card.title (the title of the paper", "card.use", "card.year", "docstring"):
        assert field in failed["form"]


@pytest.mark.parametrize(("verb", "kind"), KINDS)
def test_the_example_of_a_skeleton_runs(skeletons: Path, monkeypatch: pytest.MonkeyPatch, verb: str, kind: str) -> None:
    monkeypatch.syspath_prepend(str(skeletons))
    done = doctest.testmod(importlib.import_module(f"my_{kind.lower()}"))
    assert done.attempted > 3
    assert done.failed == 0


def test_new_takes_the_usual_kind_and_a_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert run("new", "measure", "far_mass", "--dir", "mine").code == 0
    assert "class FarMass(RowMetric):" in (tmp_path / "mine" / "far_mass.py").read_text()


def test_new_in_a_checkout_writes_into_the_package(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "src" / "foveate" / "steer"
    folder.mkdir(parents=True)
    done = run("new", "steer", "far_mass")
    assert "from foveate.steer import FarMass" in (folder / "far_mass.py").read_text()
    assert re.search(r"foveate check far_mass$", done.out, re.MULTILINE)
    assert "python -m foveate.catalogue" in done.out


def test_new_refuses(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "far_mass.py"
    file.write_text("years of work")
    assert "is already there and is not overwritten" in run("new", "measure", "far_mass").complaint()
    assert file.read_text() == "years of work"
    assert "did you mean 'my_metric'" in run("new", "measure", "MyMetric").complaint()
    assert "did you mean 'my_metric'" in run("new", "measure", "my-metric").complaint()
    for bad in ("2nd", "a__b", "é", ""):
        assert "no name for a mechanism" in run("new", "measure", bad).complaint()
    assert "a word of Python" in run("new", "measure", "lambda").complaint()
    assert "a mechanism of 'measure' already" in run("new", "steer", "entropy").complaint()
    assert "a kind of mechanism" in run("new", "steer", "head_edit").complaint()
    assert "did you mean 'measure'" in run("new", "mesure", "far_mass").complaint()
    assert "did you mean 'HeadEdit'" in run("new", "steer", "x", "--kind", "headedits").complaint()
    assert "no folder" in run("new", "steer", "far", "--dir", "nowhere").complaint()
    assert [f.name for f in tmp_path.iterdir()] == ["far_mass.py"]


# ---------------------------------------------------------------- check


SOUND = """
from dataclasses import dataclass
from typing import ClassVar
from foveate.core.card import Card, Needs
from foveate.core.mechanism import HeadEdit

CARD = Card("a test", 2026, "test", Needs.VALUES, "none", "nothing known", "in tests")

@dataclass(frozen=True)
class Doubled(HeadEdit):
    '''Doubles what heads write.'''
    by: float = 2.0
    card: ClassVar = CARD
    test_params: ClassVar = ({}, {"by": 3.0})
    def edit(self, rows, out):
        return out * self.by
"""


def outcomes(done: Done) -> dict[str, dict]:
    return {o["check"]: o for o in json.loads(done.out)}


def test_check_runs_a_registered_mechanism(run: Run) -> None:
    done = run("check", "span_mass", "--only", "form", "--only", "padding")
    assert done.code == 0
    assert "✓ form" in done.out
    assert "~ padding    known failure: spans count tokens" in done.out
    assert "1 passed, 1 known failure in" in done.out
    assert "did you mean 'span_mass'" in run("check", "spanmass").complaint()
    assert "did you mean 'padding'" in run("check", "span_mass", "--only", "paddin").complaint()


def test_check_runs_a_class_of_the_user(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mypkg").mkdir()
    (tmp_path / "mypkg" / "one_module.py").write_text(SOUND)
    for target in ("mypkg.one_module:Doubled", "mypkg/one_module.py:Doubled", "mypkg/one_module.py"):
        done = run("check", target, "--only", "form", "--only", "identity")
        assert done.code == 0
        assert "2 settings" in done.out
        assert "skipped: it declares no `identity`" in done.out


def test_check_says_what_does_not_fit(run: Run) -> None:
    run("new", "measure", "my_table", "--kind", "ModelMetric")
    done = run("check", "my_table.py")
    assert done.code == 1
    said = " ".join(done.out.split())
    assert "✗ form still to write: card.title" in said
    assert "not for a mechanism of this kind: declares, card_needs, reference" in said
    assert "2 passed, 1 failed" in said


def test_check_fails_with_the_message_and_exit_code_1(run: Run, tmp_path: Path) -> None:
    broken = SOUND.replace("out * self.by", "out * self.by + (self.by - 2) * out.mean(2, keepdim=True)")
    (tmp_path / "broken.py").write_text(broken)
    done = run("check", "broken.py", "--only", "causal", "--only", "form", "--only", "landing")
    assert done.code == 1
    said = " ".join(done.out.split())
    assert "✗ causal" in said
    assert "Doubled(by=3.0)" in said
    assert "2 passed, 1 failed" in said
    found = outcomes(run("check", "broken.py", "--json", "--only=form", "--only=causal", "--only=identity"))
    assert found["causal"]["verdict"] == "failed"
    assert "with other rows after them: head outputs is" in found["causal"]["why"]
    assert found["form"]["verdict"] == "passed"
    assert found["identity"]["verdict"] == "skipped"
    assert list(found["form"]) == ["check", "verdict", "why", "setting", "seconds"]


def test_check_tells_a_setting_that_cannot_be_made(run: Run, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(SOUND.replace('{"by": 3.0}', '{"bye": 3.0}'))
    found = outcomes(run("check", "broken.py", "--only", "form", "--json"))
    assert "bye" in found["form"]["why"]


@pytest.mark.parametrize(
    ("target", "source", "words"),
    [
        ("nowhere.py:X", None, "no such file: nowhere.py"),
        ("nowhere.deep:X", None, "no module 'nowhere.deep'"),
        ("mod.py:Dubled", SOUND, "did you mean 'Doubled'"),
        ("mod:CARD", SOUND, "CARD is no mechanism; derive it from one of"),
        ("mod:HeadEdit", SOUND, "HeadEdit is a kind of mechanism and not one"),
        ("mod.py", "x = 1", "mod.py defines 0 mechanisms (none); write mod.py:CLASS"),
        ("mod:Doubled", SOUND.replace("@dataclass(frozen=True)", ""), "put @dataclass(frozen=True) above it"),
        ("mod:Doubled", SOUND.replace("(frozen=True)", ""), "write @dataclass(frozen=True) (line 9 of mod.py"),
        ("mod:Doubled", SOUND.replace("card: ClassVar = CARD", ""), "add `card: ClassVar = Card(...)`"),
        ("mod.py", "import numppy", "No module named 'numppy' (line 1 of mod.py"),
        ("mod:X", "import numppy", "No module named 'numppy' (line 1 of mod.py"),
        ("mod.py", "def (", "SyntaxError"),
        ("mod.py", "1 / 0", "ZeroDivisionError: division by zero (line 1 of mod.py"),
    ],
)
def test_check_complains_in_one_line(run: Run, tmp_path: Path, target: str, source: str | None, words: str) -> None:
    sys.modules.pop("mod", None)
    if source is not None:
        (tmp_path / "mod.py").write_text(source)
    assert words in run("check", target).complaint()


def test_check_in_a_narrow_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    said = run("check", "entropy", "--only", "form", "--only", "bounds").out
    assert max(map(len, said.splitlines())) <= 80
