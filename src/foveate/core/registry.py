"""Finding mechanisms by name. Nothing is listed by hand: a mechanism is a file in a verb folder."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.core.errors import BadInput, unknown

if TYPE_CHECKING:
    from foveate.core.mechanism import Mechanism

__all__ = ["VERBS", "class_names", "find", "lazy", "make", "names", "where"]

VERBS = ("measure", "steer", "compress", "replace", "select")
ROOT = Path(__file__).parent.parent


@cache
def where() -> dict[str, tuple[str, str]]:
    """Verb and module of every mechanism, by name, from the files alone."""
    found: dict[str, tuple[str, str]] = {}
    for verb in VERBS:
        folder = ROOT / verb
        for info in pkgutil.walk_packages([str(folder)], f"foveate.{verb}."):
            short = info.name.rpartition(".")[2]
            if not info.ispkg and not short.startswith("_"):
                if short in found:
                    raise RuntimeError(f"two mechanisms are called {short}: {found[short][1]} and {info.name}")
                found[short] = (verb, info.name)
    return found


def names(verb: str | None = None) -> list[str]:
    """Names of all mechanisms, or of one verb."""
    return sorted(n for n, (v, _) in where().items() if verb in (None, v))


def find(name: str, verb: str | None = None) -> type[Mechanism]:
    """The class of a mechanism.

    Raises:
        UnknownName: no mechanism is called so; the message suggests near names.
    """
    known = {n: m for n, (v, m) in where().items() if verb in (None, v)}
    if name not in known:
        raise unknown({"measure": "metric"}.get(verb or "", "mechanism"), name, known, "See `foveate list`.")
    return only_class(importlib.import_module(known[name]))


def camel(name: str) -> str:
    """Class name of a registry key: `first_token_mass` is `FirstTokenMass`."""
    return "".join(word.capitalize() for word in name.split("_"))


def class_names(verb: str) -> list[str]:
    """Names of the classes of one verb."""
    return [camel(name) for name in names(verb)]


def lazy(verb: str) -> Callable[[str], type[Mechanism]]:
    """A module `__getattr__` that finds the classes of a verb folder when they are asked for."""

    def look_up(attribute: str) -> type[Mechanism]:
        for name in names(verb):
            if camel(name) == attribute:
                return find(name)
        raise AttributeError(f"foveate.{verb} has no {attribute}; it has {', '.join(class_names(verb))}")

    return look_up


def only_class(module: Any) -> type[Mechanism]:
    """The one mechanism that a module defines."""
    from foveate.core.mechanism import Mechanism

    own = [
        c
        for _, c in inspect.getmembers(module, inspect.isclass)
        if issubclass(c, Mechanism) and c.__module__ == module.__name__
    ]
    if len(own) != 1:
        raise RuntimeError(f"{module.__name__} must define one mechanism, it defines {[c.__name__ for c in own]}")
    return own[0]


def make(spec: str, verb: str | None = None, **filled: Any) -> Mechanism:
    """A mechanism from `name` or `name:param=value,param=value`, as the command line writes it.

    Args:
        spec: The name, with parameters.
        verb: Where to look; default: everywhere.
        filled: Parameters for what the spec leaves open.

    Raises:
        UnknownName: no such mechanism or parameter.
        BadInput: a value that is no literal.
        BadParameter: a value outside of its bounds.
    """
    import ast

    from foveate.core.params import bounds_of

    name, _, rest = spec.partition(":")
    cls = find(name, verb)
    given: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, _, text = part.partition("=")
        if key not in bounds_of(cls):
            raise unknown(f"parameter of {name}", key, bounds_of(cls) or {"none"})
        try:
            given[key] = ast.literal_eval(text.replace("+", ","))
        except (ValueError, SyntaxError):
            if not text.isidentifier():
                raise BadInput(f"{spec!r}: {text!r} is no number or word (tuples are written 1+16+64)") from None
            given[key] = text
        if isinstance(bounds_of(cls)[key][0], tuple) and not isinstance(given[key], tuple):
            given[key] = (given[key],)
    return cls(**{k: v for k, v in filled.items() if k not in given} | given)
