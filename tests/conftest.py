"""Shape annotations are checked while the tests run, and every worker computes on one thread.

Checking a call costs more than most calls do, and what it says depends on the kinds, shapes and dtypes of what goes in
and comes out. So it is remembered: a function that comes by again with the same ones is not checked again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from beartype import BeartypeConf, beartype

# an int is good where a float is asked for, as for every other type checker
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
jaxtyped = jaxtyping.jaxtyped
# what came out of calls that were checked, by function and by what went in
known: dict[Any, set[Any]] = {}


# how a kind of value is told, found once for each kind
ways: dict[type, Callable[[Any], Any] | None] = {}


def kinds(value: Any) -> Any:
    """What a check of a value depends on."""
    kind = type(value)
    if kind not in ways:
        ways[kind] = way(kind)
    told = ways[kind]
    return kind if told is None else (kind, told(value))


def way(kind: type) -> Callable[[Any], Any] | None:
    """How values of a kind are told apart; None: they are not."""
    if issubclass(kind, torch.Tensor | np.ndarray):
        return lambda value: (tuple(value.shape), value.dtype)
    if issubclass(kind, tuple | list):
        return lambda value: tuple(map(kinds, value))
    if issubclass(kind, dict):
        return lambda value: tuple((kinds(k), kinds(v)) for k, v in value.items())
    if issubclass(kind, set | frozenset):
        return lambda value: frozenset(map(kinds, value))
    # words may be one of a few that are allowed; a class may be asked for by itself
    return (lambda value: value) if issubclass(kind, str | type) else None


def remembering(*, typechecker: Any) -> Callable[[Any], Any]:
    """What the import hook decorates with: `jaxtyped`, with a memory."""

    def decorate(thing: Any) -> Any:
        if not isinstance(thing, FunctionType):
            return jaxtyped(typechecker=typechecker)(thing)
        made: list[Any] = []

        def run(*args: Any, **kwargs: Any) -> Any:
            return made[-1] if made else thing(*args, **kwargs)

        # annotations are looked up where the function stands
        again = FunctionType(run.__code__, thing.__globals__, closure=run.__closure__)
        functools.update_wrapper(again, thing)

        # made when it is needed: functions inside of functions come into being at every call
        whole = functools.cache(lambda: jaxtyped(typechecker=typechecker)(again))

        @functools.wraps(thing)
        def call(*args: Any, **kwargs: Any) -> Any:
            __tracebackhide__ = True
            given = thing.__code__, kinds(args), kinds(kwargs)
            if given not in known:
                out = whole()(*args, **kwargs)
                if not jaxtyping.config.jaxtyping_disable:
                    known[given] = {kinds(out)}
                return out
            out = thing(*args, **kwargs)
            if (form := kinds(out)) not in known[given]:
                # the same went in and something else came out, which is looked at without another call
                made.append(out)
                try:
                    whole()(*args, **kwargs)
                finally:
                    made.pop()
                known[given].add(form)
            return out

        return call

    return decorate


jaxtyping.jaxtyped = remembering  # type: ignore[assignment]
# before anything of foveate is imported
jaxtyping.install_import_hook("foveate", f"{__name__}.checked")

torch.set_num_threads(1)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Annotations off: what a user meets who hands over a wrong shape."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
