"""Mechanisms as JSON: their names and parameters, for plans and for models that are saved."""

from __future__ import annotations

import dataclasses
from typing import Any

from foveate.core import registry
from foveate.core.budget import Budget
from foveate.core.errors import BadInput
from foveate.core.mechanism import Mechanism

__all__ = ["read", "written"]


def written(m: Mechanism) -> dict[str, Any]:
    """A mechanism as JSON."""
    cls = type(m)
    if registry.where().get(m.name, ("", ""))[1] != cls.__module__:
        raise BadInput(
            f"{cls.__name__} is no registered mechanism, so it cannot be saved by name; `foveate list` shows those"
        )
    values = {f.name: jsonable(getattr(m, f.name), cls.__name__, f.name) for f in dataclasses.fields(m) if f.init}
    return {"name": m.name, "parameters": values}


def jsonable(value: Any, cls: str, name: str) -> Any:
    """A parameter's value as JSON knows it."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [jsonable(v, cls, name) for v in value]
    if isinstance(value, Budget):
        return {"budget": {f.name: jsonable(getattr(value, f.name), cls, f.name) for f in dataclasses.fields(value)}}
    raise BadInput(f"{cls}({name}=…) holds a {type(value).__name__}, which a plan cannot keep; use it with `attach`")


def read(found: Any) -> Mechanism:
    """A mechanism from JSON, which may be of any form.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: it is not of this one.
        BadInput: a parameter that the mechanism has not.
        UnknownName: no mechanism is called so.
    """
    cls = registry.find(found["name"])
    known = {f.name for f in dataclasses.fields(cls)}
    given = {k: tuples(v) for k, v in found["parameters"].items()}
    if unknown := sorted(set(given) - known):
        raise BadInput(
            f"the plan gives {found['name']} the parameter {unknown[0]!r}; it has {', '.join(sorted(known))}"
        )
    return cls(**given)


def tuples(value: Any) -> Any:
    """Lists of JSON as the tuples that parameters are."""
    if isinstance(value, list):
        return tuple(tuples(v) for v in value)
    if isinstance(value, dict):
        return Budget(**{k: tuples(v) for k, v in value["budget"].items()})
    return value
