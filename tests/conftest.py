"""Shape annotations are checked while the tests run, and every worker computes on one thread.

Checking a call costs more than most calls do, so each test checks the first calls of every function, and lets the rest
through. CHECKED_CALLS=all checks all of them.
"""

from __future__ import annotations

import functools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

import jaxtyping
import pytest
from beartype import BeartypeConf, beartype

# an int is good where a float is asked for, as for every other type checker
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
CALLS = os.environ.get("CHECKED_CALLS", "20")
MOST = math.inf if CALLS == "all" else int(CALLS)
seen: Counter[CodeType] = Counter()
jaxtyped = jaxtyping.jaxtyped


def first_calls(*, typechecker: Any) -> Callable[[Any], Any]:
    """What the import hook decorates with: `jaxtyped`, for the first calls of a function in each test."""

    def decorate(thing: Any) -> Any:
        if not isinstance(thing, FunctionType):
            return jaxtyped(typechecker=typechecker)(thing)
        whole: list[Any] = []

        @functools.wraps(thing)
        def call(*args: Any, **kwargs: Any) -> Any:
            __tracebackhide__ = True
            if seen[thing.__code__] >= MOST:
                return thing(*args, **kwargs)
            seen[thing.__code__] += 1
            if not whole:
                whole.append(jaxtyped(typechecker=typechecker)(thing))
            return whole[0](*args, **kwargs)

        return call

    return decorate


jaxtyping.jaxtyped = first_calls  # type: ignore[assignment]
# before anything of foveate is imported
jaxtyping.install_import_hook("foveate", f"{__name__}.checked")

import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def checked_anew() -> None:
    """Each test checks the first calls for itself."""
    seen.clear()


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Annotations off: what a user meets who hands over a wrong shape."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
