"""How checks are declared, chosen and run."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import jaxtyping

from foveate.core.errors import unknown
from foveate.core.mechanism import (
    Edit,
    ExpertEdit,
    HeadEdit,
    Mechanism,
    Metric,
    ModelMetric,
    Pattern,
    Policy,
    PromptEdit,
    Pruner,
    ResidualEdit,
    Schedule,
)
from foveate.core.mixer import Mixer
from foveate.core.recurrence import Recurrence
from foveate.core.rule import Rule

__all__ = [
    "ACTING",
    "ALL",
    "ATTACHED",
    "CHECKS",
    "EDITS",
    "INSIDE",
    "ROWS",
    "Broken",
    "Check",
    "CheckFailed",
    "Outcome",
    "Skip",
    "annotations_off",
    "check",
    "check_mechanism",
    "checks_for",
    "chosen",
    "examine",
    "expect",
]

ACTING = (Edit, HeadEdit, Pattern, Schedule)
ATTACHED = (Metric, *ACTING)
# those that the row engine runs: the same, and what stands in the place of softmax
ROWS = (*ATTACHED, Rule)
# those that see no attention call: the residual stream, routers
INSIDE = (ResidualEdit, ExpertEdit)
EDITS = (Edit, HeadEdit, *INSIDE)
ALL = (*ROWS, *INSIDE, PromptEdit, ModelMetric, Policy, Pruner, Recurrence, Mixer)

Verdict = Literal["passed", "skipped", "known failure", "failed"]


class CheckFailed(AssertionError):
    """A mechanism breaks one of the common promises; names the mechanism, the check, and the numbers."""


class Broken(Exception):
    """What a check found, before the mechanism and the check are named."""


class Skip(Exception):
    """A check has nothing to say about a setting; the message says why."""


def expect(holds: bool, message: str) -> None:
    """Raises `Broken` unless it holds."""
    if not holds:
        raise Broken(message)


Run = Callable[[Any], None]


@dataclass(frozen=True)
class Check:
    """One promise, and the kinds of mechanism that make it.

    Args:
        name: Name of the functions that check it.
        ways: Kinds of mechanism, and the function that checks the promise of these; an exception of any kind is a
            failure, `Skip` excepted.
    """

    name: str
    ways: tuple[tuple[tuple[type, ...], Run], ...]

    @property
    def kinds(self) -> tuple[type, ...]:
        """All kinds of mechanism that it fits."""
        return tuple(kind for kinds, _ in self.ways for kind in kinds)

    def way(self, cls: type) -> Run:
        """The function for mechanisms of a class."""
        return next(run for kinds, run in self.ways if issubclass(cls, kinds))

    def run(self, m: Mechanism) -> None:
        """Checks one mechanism."""
        self.way(type(m))(m)

    def promise(self, cls: type) -> str:
        """What a class promises, in a sentence."""
        return (self.way(cls).__doc__ or "").strip().split("\n\n")[0]


CHECKS: dict[str, Check] = {}


def check(*kinds: type) -> Callable[[Run], Run]:
    """Registers a function as the check of its own name; functions of one name are one check for several kinds."""

    def register(run: Run) -> Run:
        name = run.__name__.strip("_")
        before = CHECKS[name].ways if name in CHECKS else ()
        CHECKS[name] = Check(name, (*before, (kinds, run)))
        return run

    return register


def checks_for(kind: type[Mechanism] | Mechanism) -> list[str]:
    """Names of the checks that fit a mechanism, its class, or a kind such as `Metric`."""
    cls = kind if inspect.isclass(kind) else type(kind)
    return [c.name for c in CHECKS.values() if issubclass(cls, c.kinds)]


def check_mechanism(m: type[Mechanism] | Mechanism, only: Sequence[str] | None = None) -> list[str]:
    """Runs the common checks on a mechanism.

    Args:
        m: A class (all its `test_params` are tried) or one instance.
        only: Names of checks; default: all that fit.

    Returns:
        The names of the checks that ran.

    Raises:
        CheckFailed: a promise is broken, or a declared failure is none.
        UnknownName: `only` names no check of this kind of mechanism.
    """
    names = chosen(m, only)
    for name in names:
        found = examine(m, name)
        if found.verdict == "failed":
            raise CheckFailed(f"{found.setting}: check {name!r}: {found.why}") from found.error
    return names


def chosen(m: type[Mechanism] | Mechanism, only: Sequence[str] | None = None) -> list[str]:
    """The names of the checks to run, in order.

    Raises:
        UnknownName: `only` or the mechanism's `known_failures` name no check of this kind of mechanism.
    """
    cls = m if inspect.isclass(m) else type(m)
    fitting = checks_for(cls)
    for name in (*(only or ()), *cls.known_failures):
        if name not in fitting:
            raise unknown(f"check of {cls.__name__}", name, fitting)
    return [name for name in fitting if only is None or name in only]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one check says of a mechanism.

    Args:
        check: Name of the check.
        verdict: What came out over all settings.
        why: What is broken, why it was skipped, or the declared reason of a known failure.
        setting: The mechanism with the parameters at which it failed, or its class.
        seconds: How long it took.
        error: The exception behind a failure.
    """

    check: str
    verdict: Verdict
    why: str = ""
    setting: str = ""
    seconds: float = 0.0
    error: Exception | None = None


def examine(m: type[Mechanism] | Mechanism, name: str) -> Outcome:
    """Runs one check on a mechanism, at all its settings."""
    cls = m if inspect.isclass(m) else type(m)
    began = time.perf_counter()
    found = [outcome(CHECKS[name], cls, params) for params in cls.test_params] if inspect.isclass(m) else []
    if not inspect.isclass(m):
        found = [outcome(CHECKS[name], m, {})]
    failures = [o for o in found if o.verdict == "failed"]
    reason = cls.known_failures.get(name)
    if reason is None:
        best = next(iter(failures), None) or next((o for o in found if o.verdict == "passed"), found[0])
    elif failures:
        best = Outcome(name, "known failure", reason, cls.__name__)
    else:
        best = Outcome(name, "failed", f"passes, but is declared a known failure ({reason!r})", cls.__name__)
    return Outcome(name, best.verdict, best.why, best.setting, time.perf_counter() - began, best.error)


def outcome(one: Check, m: type[Mechanism] | Mechanism, params: dict[str, Any]) -> Outcome:
    """What a check says of one setting; an exception of any kind is a failure."""
    setting = f"{m.__name__} with test_params {params}" if inspect.isclass(m) else repr(m)
    try:
        made = m(**params) if inspect.isclass(m) else m
        setting = repr(made)
        one.run(made)
    except Skip as reason:
        return Outcome(one.name, "skipped", str(reason), setting)
    except Exception as error:
        what = str(error) if isinstance(error, Broken) else f"{type(error).__name__}: {error}"
        return Outcome(one.name, "failed", what, setting, error=error)
    return Outcome(one.name, "passed", setting=setting)


@contextmanager
def annotations_off() -> Iterator[None]:
    """Without the checking of annotations, where a test run has it on: what a user meets."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
