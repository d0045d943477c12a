"""Every public name says what it is, and every public class with fields what they mean."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from typing import Any

import pytest

import foveate
from foveate.catalogue import read


def modules() -> list[str]:
    """The public modules of the package."""
    found = [m.name for m in pkgutil.walk_packages(foveate.__path__, "foveate.")]
    return ["foveate", *(name for name in found if not any(part.startswith("_") for part in name.split(".")))]


def undocumented(name: str, thing: Any) -> list[str]:
    """What is missing from the docstring of a class or function."""
    doc = inspect.getdoc(thing) if not inspect.isclass(thing) else thing.__dict__.get("__doc__")
    # dataclasses without a docstring get their signature as one
    if not doc or not doc.strip() or doc.startswith(f"{getattr(thing, '__name__', '')}("):
        return [f"{name} has no docstring"]
    if not dataclasses.is_dataclass(thing) or not inspect.isclass(thing):
        return []
    told = {part.strip() for names in read(thing).args for part in names.split(",")}
    own = {f.name for f in dataclasses.fields(thing) if f.init and not f.name.startswith("_")}
    inherited = {f.name for c in thing.__bases__ if dataclasses.is_dataclass(c) for f in dataclasses.fields(c)}
    missing = [f"{name}: `{field}` is not in its section `Args:`" for field in sorted(own - inherited - told)]
    return missing + [f"{name}: its section `Args:` tells of {field}, which it has not" for field in sorted(told - own)]


@pytest.mark.parametrize("module", modules())
def test_public_names_are_documented(module: str) -> None:
    found = importlib.import_module(module)
    assert (found.__doc__ or "").strip()
    names = [n for n in getattr(found, "__all__", ()) if not n.startswith("_")]
    things = {n: getattr(found, n) for n in names}
    ours = {n: t for n, t in things.items() if (inspect.isclass(t) or inspect.isfunction(t))}
    assert [line for n, t in ours.items() for line in undocumented(n, t)] == []


def test_what_is_missing_is_seen() -> None:
    @dataclasses.dataclass
    class Silent:
        width: int

    @dataclasses.dataclass
    class Half:
        """Says something.

        Args:
            width: How wide.
            length: Was there once.
        """

        width: int
        height: int

    def nothing() -> None: ...

    assert undocumented("Silent", Silent) == ["Silent has no docstring"]
    assert undocumented("nothing", nothing) == ["nothing has no docstring"]
    assert undocumented("Half", Half) == [
        "Half: `height` is not in its section `Args:`",
        "Half: its section `Args:` tells of length, which it has not",
    ]
