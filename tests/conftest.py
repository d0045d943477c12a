"""Shape annotations are checked while the tests run, and every worker computes on one thread.

Checking a call costs more than most calls do, and what it says depends on the kinds, shapes and dtypes of what goes in
and comes out: of shapes only on which sizes are equal, where axes have names. So it is remembered: a function that
comes by again with the same ones is not checked again. Where no annotation speaks of shapes, checking costs less than
remembering, and every call is checked.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, is_dataclass
from types import CodeType, FunctionType
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
import transformers.generation
import transformers.modeling_utils  # noqa: F401 - while the hook below imports, what is imported has no cache
from beartype import BeartypeConf, beartype

# an int is good where a float is asked for, as for every other type checker
checked = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError))
jaxtyped = jaxtyping.jaxtyped


@dataclass
class Memory:
    """What was checked of one function: what came out, by what went in, and the same with sizes by name."""

    outs: dict[tuple, set[tuple]] = field(default_factory=dict)
    named: set[tuple] = field(default_factory=set)


# by code, for functions inside of functions come into being at every call; and by name, for functions of two files may
# have one code
known: dict[tuple[CodeType, str, str], Memory] = defaultdict(Memory)
# how a kind of value is told, found once for each kind
MUTE, ARRAY, WORD, SEVERAL, NAMED = range(5)
ways: dict[type, int] = {}
MISSING = object()


def way(kind: type) -> int:
    """How values of a kind are told apart."""
    if issubclass(kind, torch.Tensor | np.ndarray):
        return ARRAY
    if issubclass(kind, tuple | list | set | frozenset):
        return SEVERAL
    if issubclass(kind, dict):
        return NAMED
    # words may be one of a few that are allowed; a class may be asked for by itself
    return WORD if issubclass(kind, str | type) else MUTE


def tell(values: Iterable[Any], said: list[Any]) -> None:
    """Adds what a check of these depends on: kinds, and of arrays shapes and dtypes."""
    for value in values:
        kind = type(value)
        said.append(kind)
        told = ways.get(kind)
        if told is None:
            told = ways[kind] = way(kind)
        if told == MUTE:
            continue
        if told == ARRAY:
            said += (value.shape, value.dtype)
        elif told == WORD:
            said.append(value)
        else:
            said.append(len(value))
            if told == NAMED:
                tell(value, said)
                value = value.values()
            tell(value, said)


def kinds(*values: Any) -> tuple[Any, ...]:
    """What a check of these depends on."""
    said: list[Any] = []
    tell(values, said)
    return tuple(said)


def renamed(said: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same where axes have names: which sizes are equal, and which are 1, is then all that shapes say."""
    sizes: dict[int, int] = {}

    def named(one: Any) -> Any:
        if type(one) is not torch.Size and type(one) is not tuple:
            return one
        return tuple([n if n == 1 else -2 - sizes.setdefault(n, len(sizes)) for n in one])

    return tuple([named(one) for one in said])


def by_name(thing: FunctionType) -> bool:
    """Whether the axes in a function's annotations have names alone: no numbers, no sums."""
    axes = " ".join(re.findall(r"[\"']([^\"']*)[\"']", " ".join(map(str, thing.__annotations__.values()))))
    return not re.search(r"[0-9+*/{}()-]", axes)


def plain(thing: FunctionType) -> bool:
    """Whether the annotations of a function can be looked up and speak of no shapes, under no name.

    To be asked when it is called: all that they name is there then.
    """
    said = set(re.findall(r"[\w.]+", " ".join(map(str, thing.__annotations__.values()))))
    # two words that are no names
    known = vars(builtins) | thing.__globals__ | {"None": None, "": ...}
    roots = {word: known.get(word.partition(".")[0], MISSING) for word in said}
    return not any(root is MISSING or "jaxtyping." in repr(root) for root in roots.values())


def remembering(*, typechecker: Any) -> Callable[[Any], Any]:
    """What the import hook decorates with: `jaxtyped`, with a memory."""

    def decorate(thing: Any) -> Any:
        if is_dataclass(thing) and "__init__" in vars(thing):
            # as `jaxtyped` does, with a memory
            thing.__init__ = decorate(thing.__init__)
            return thing
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

        memory = known[thing.__code__, thing.__module__, thing.__qualname__]
        form = renamed if by_name(thing) else tuple

        @functools.wraps(thing)
        def call(*args: Any, **kwargs: Any) -> Any:
            __tracebackhide__ = True
            given = kinds(args, kwargs)
            outs = memory.outs.get(given)
            if outs is None:
                if form(given) not in memory.named:
                    out = whole()(*args, **kwargs)
                    if not jaxtyping.config.jaxtyping_disable:
                        memory.outs[given] = {told := kinds(out)}
                        memory.named |= {form(given), form(given + told)}
                    return out
                outs = memory.outs[given] = set()
            out = thing(*args, **kwargs)
            if (told := kinds(out)) not in outs:
                if form(given + told) not in memory.named:
                    # the same went in and something else came out, which is looked at without another call
                    made.append(out)
                    try:
                        whole()(*args, **kwargs)
                    finally:
                        made.pop()
                    memory.named.add(form(given + told))
                outs.add(told)
            return out

        said = " ".join(map(str, thing.__annotations__.values()))
        # functions inside of functions come into being at every call, and making a check takes long; what checks a
        # generator holds what went in as long as it runs
        if "<locals>" in thing.__qualname__ or re.search("[\"']", said) or inspect.isgeneratorfunction(thing):
            return call
        # made when it is called
        lasting = functools.cache(lambda: typechecker(thing) if plain(thing) else call)

        @functools.wraps(thing)
        def every_time(*args: Any, **kwargs: Any) -> Any:
            __tracebackhide__ = True
            return (thing if jaxtyping.config.jaxtyping_disable else lasting())(*args, **kwargs)

        return every_time

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
