"""Shape annotations are checked while the tests run, and every worker computes on one thread.

Checking a call costs more than most calls do, and what it says depends on the kinds, shapes and dtypes of what goes in
and comes out: of shapes only on which sizes are equal, where axes have names. So it is remembered: a function that
comes by again with the same ones is not checked again.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
import transformers.generation
import transformers.modeling_utils  # noqa: F401 - while the hook below imports, what is imported has no cache
from beartype import BeartypeConf, beartype

# an int is good where a float is asked for, as for every other type checker
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
jaxtyped = jaxtyping.jaxtyped
# what came out of calls that were checked, by function and by what went in
known: dict[Any, set[Any]] = {}
# sizes as they are called in one call: by number in the order in which they come by; None: by themselves
Sizes = dict[int, int] | None

# how a kind of value is told, found once for each kind
ways: dict[type, Callable[[Any, Sizes], Any] | None] = {}


def kinds(value: Any, sizes: Sizes) -> Any:
    """What a check of a value depends on."""
    kind = type(value)
    if kind not in ways:
        ways[kind] = way(kind)
    told = ways[kind]
    return kind if told is None else (kind, told(value, sizes))


def way(kind: type) -> Callable[[Any, Sizes], Any] | None:
    """How values of a kind are told apart; None: they are not."""
    if issubclass(kind, torch.Tensor | np.ndarray):
        return shaped
    if issubclass(kind, tuple | list):
        return lambda value, sizes: tuple([kinds(v, sizes) for v in value])
    if issubclass(kind, dict):
        return lambda value, sizes: tuple([(kinds(k, sizes), kinds(v, sizes)) for k, v in value.items()])
    if issubclass(kind, set | frozenset):
        return lambda value, sizes: frozenset([kinds(v, sizes) for v in value])
    # words may be one of a few that are allowed; a class may be asked for by itself
    return (lambda value, sizes: value) if issubclass(kind, str | type) else None


def shaped(value: Any, sizes: Sizes) -> Any:
    """Dtype and shape of an array; which sizes are equal, and which are 1, is all that names of axes ask."""
    if sizes is None:
        return tuple(value.shape), value.dtype
    return tuple([n if n == 1 else -2 - sizes.setdefault(n, len(sizes)) for n in value.shape]), value.dtype


def by_name(thing: FunctionType) -> bool:
    """Whether the axes in a function's annotations have names alone: no numbers, no sums."""
    axes = " ".join(re.findall(r"[\"']([^\"']*)[\"']", " ".join(map(str, thing.__annotations__.values()))))
    return not re.search(r"[0-9+*/{}()-]", axes)


def remembering(*, typechecker: Any) -> Callable[[Any], Any]:
    """What the import hook decorates with: `jaxtyped`, with a memory."""

    def decorate(thing: Any) -> Any:
        if not isinstance(thing, FunctionType):
            return jaxtyped(typechecker=typechecker)(thing)
        made: list[Any] = []
        names = by_name(thing)

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
            sizes: Sizes = {} if names else None
            given = thing.__code__, kinds(args, sizes), kinds(kwargs, sizes)
            if given not in known:
                out = whole()(*args, **kwargs)
                if not jaxtyping.config.jaxtyping_disable:
                    known[given] = {kinds(out, sizes)}
                return out
            out = thing(*args, **kwargs)
            if (form := kinds(out, sizes)) not in known[given]:
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
