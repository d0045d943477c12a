"""Looking for the set of policies that serves a goal best, and proving it on what was not looked at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from foveate.core.budget import in_bytes
from foveate.core.errors import BadInput
from foveate.core.mechanism import Policy
from foveate.planning.examining import Exam, Standing, Tell
from foveate.planning.goals import PERPLEXITY, Goal
from foveate.planning.proposals import Family
from foveate.probe.trials import FULL

__all__ = ["GRID", "Candidate", "Searched", "Verdict", "prove", "search"]

GRID = (0.05, 0.1, 0.15, 0.25, 0.35, 0.5, 0.7)
"""Shares of the cache that are tried when quality decides; those between are tried afterwards."""
BETWEEN = 3
CONTENDERS = 3
REASONS = 2
"""So many reasons are told where nothing can be proposed."""
ATTEMPTS = 4
"""Candidates that are put to the proof, each larger than the one before."""


@dataclass(frozen=True)
class Candidate:
    """One set of policies, and what it is worth on the prompts and texts of the search.

    Args:
        family: What kind it is.
        asked: The share of the cache that it was made for.
        policies: The policies.
        standing: What it is worth.
    """

    family: str
    asked: float
    policies: tuple[Policy, ...]
    standing: Standing

    @property
    def name(self) -> str:
        return f"{self.family} @ {self.asked:.3g}"

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {
            "name": self.name,
            "policies": [repr(p) for p in self.policies],
            "standing": self.standing.to_json(),
        }


@dataclass(frozen=True)
class Searched:
    """What a search came to.

    Args:
        candidates: All that were tried, in the order in which they serve the goal: the best one first.
        impossible: Kinds of policies that cannot hold the share that was asked for, with the reason.
        full: The full cache on the same prompts and texts.
    """

    candidates: tuple[Candidate, ...]
    impossible: tuple[tuple[str, str], ...]
    full: Standing


@dataclass(frozen=True)
class Verdict:
    """A candidate on prompts and texts that the search has not seen.

    Args:
        candidate: The candidate.
        standing: What it is worth there.
        full: The full cache there.
        missed: The targets that it does not meet, in words; none: it meets the goal.
        attempts: Names of the candidates that were put to the proof before it and failed.
    """

    candidate: Candidate
    standing: Standing
    full: Standing
    missed: tuple[str, ...]
    attempts: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {
            "candidate": self.candidate.to_json(),
            "standing": self.standing.to_json(),
            "full": self.full.to_json(),
            "missed": list(self.missed),
            "attempts": list(self.attempts),
        }


def search(
    model: Any,
    tokenizer: Any,
    exam: Exam,
    goal: Goal,
    families: Sequence[Family],
    share: float | None,
    file: Path | None = None,
    tell: Tell | None = None,
) -> Searched:
    """Tries sets of policies; each prompt is read once for all of them.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        exam: Prompts and texts.
        goal: What is to be reached.
        families: What can be tried.
        share: The share of the cache that a plan may take; None: the smallest that meets the quality is looked for.
        file: Where results are kept as they come.
        tell: Called with what is done, how much of it, and how much there is.

    Raises:
        BadInput: none of the families can hold the share, or the full cache fails a probe that quality is asked of.
    """
    called = [family.name for family in families]
    if twice := next((name for name in called if called.count(name) > 1), None):
        # what is tried goes by the name: one of them would be lost
        raise RuntimeError(f"two families of policies are called {twice}")
    tried: dict[tuple[str, float], tuple[Policy, ...]] = {}
    impossible: dict[str, str] = {}

    def propose(family: Family, at: float) -> None:
        try:
            policies = family.at(at)
        except BadInput as e:
            impossible.setdefault(family.name, str(e))
            return
        if policies not in tried.values():
            tried[family.name, at] = policies

    for family in families:
        for at in GRID if share is None else (share,):
            propose(family, at)
    if not tried:
        raise BadInput(f"nothing can be proposed: {reasons(impossible)}. {way_out(families, goal, share)}")
    judged = candidates(model, tokenizer, exam, tried, file, tell)
    for what, _ in goal.quality:
        if what != PERPLEXITY and not judged[FULL].standing.full[what]:
            raise BadInput(
                f"--quality {what}: the full cache itself recalls none of {exam.count}, so no target can be a share of "
                "that; ask for another probe, or plan for shorter texts with --tokens"
            )
    if share is None:
        by_name = {family.name: family for family in families}
        for name in contenders(judged, goal):
            for at in between(name, judged, goal):
                propose(by_name[name], at)
        judged = candidates(model, tokenizer, exam, tried, file, tell)
    full = judged.pop(FULL).standing
    possible = {family for family, _ in tried}
    left = tuple((name, why) for name, why in impossible.items() if name not in possible)
    return Searched(tuple(ordered(judged.values(), goal, share)), left, full)


def reasons(impossible: Mapping[str, str]) -> str:
    """Why kinds of policies are impossible, in a few words: equal reasons once, and no more than the first ones."""
    same: dict[str, list[str]] = {}
    for name, why in impossible.items():
        same.setdefault(why, []).append(name)
    told = []
    for why, (first, *others) in same.items():
        who = f"{first} and {len(others)} more: " if others else f"{first}: "
        told.append(why if why.startswith(first) else f"{who}{why}")
    left = sum(len(names) for names in list(same.values())[REASONS:])
    return "; ".join([*told[:REASONS], *([f"and {left} more like these"] if left else [])])


def way_out(families: Sequence[Family], goal: Goal, share: float | None) -> str:
    """What to do where nothing can be proposed."""
    if share is None:
        return "Plan for longer texts with --tokens, or name another --policy"
    known = {family.name: family.least for family in families if family.least is not None and family.least < 1}
    if not known:
        return "Allow a larger cache, or name another --policy"
    name = min(known, key=lambda one: known[one])
    # rounded up, so that it fits
    if goal.bytes is None:
        least = f"--keep {math.ceil(1000 * known[name]) / 1000:g}"
    else:
        least = f"--bytes {math.ceil(known[name] / share * in_bytes(goal.bytes) / 1000)}kB"
    return f"The least that is known to hold is {name}: give {least} or more, or name another --policy"


def candidates(
    model: Any,
    tokenizer: Any,
    exam: Exam,
    tried: dict[tuple[str, float], tuple[Policy, ...]],
    file: Path | None,
    tell: Tell | None,
) -> dict[str, Candidate]:
    """All that are tried with what they are worth, by name; the full cache as `FULL`."""
    names = {f"{family} @ {at:.3g}": (family, at) for family, at in tried}
    settings = {name: tried[key] for name, key in names.items()}
    standings = exam.judge(model, tokenizer, settings, file, tell)
    found = {name: Candidate(*names[name], settings[name], standings[name]) for name in names}
    return found | {FULL: Candidate(FULL, 1.0, (), standings[FULL])}


def ordered(found: Any, goal: Goal, share: float | None) -> list[Candidate]:
    """The best first: those that meet a quality by size, the others by what they miss; under a size by quality."""
    if share is not None:
        return sorted(found, key=lambda c: (c.standing.share > share, c.standing.distance, c.standing.share))

    def key(c: Candidate) -> tuple[bool, float, float]:
        missed = bool(c.standing.missed(goal))
        return missed, c.standing.distance if missed else 0.0, c.standing.share

    return sorted(found, key=key)


def contenders(judged: dict[str, Candidate], goal: Goal) -> list[str]:
    """The families whose smallest passing candidates are smallest."""
    smallest: dict[str, float] = {}
    for c in judged.values():
        if c.policies and not c.standing.missed(goal):
            smallest[c.family] = min(smallest.get(c.family, 1.0), c.standing.share)
    return sorted(smallest, key=lambda name: smallest[name])[:CONTENDERS]


def between(family: str, judged: dict[str, Candidate], goal: Goal) -> list[float]:
    """Shares between the smallest one that passes and the next smaller one, which does not."""
    mine = sorted((c.asked, bool(c.standing.missed(goal))) for c in judged.values() if c.family == family)
    high = next(asked for asked, missed in mine if not missed)
    low = max((asked for asked, _ in mine if asked < high), default=0.0)
    step = (high - low) / (BETWEEN + 1)
    return [round(low + step * n, 4) for n in range(1, BETWEEN + 1)]


def prove(
    model: Any,
    tokenizer: Any,
    exam: Exam,
    goal: Goal,
    found: Searched,
    file: Path | None = None,
    tell: Tell | None = None,
) -> Verdict:
    """Puts the best candidate to prompts and texts that the search has not seen; where it fails, the next larger one.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        exam: Prompts and texts that were not searched on.
        goal: What is to be reached.
        found: What the search came to.
        file: Where results are kept as they come.
        tell: Called with what is done, how much of it, and how much there is.

    Returns:
        The first that meets the goal, or else the one that comes nearest.
    """
    failed: list[Verdict] = []
    for candidate in line_up(found, goal):
        judged = exam.judge(model, tokenizer, {candidate.name: candidate.policies}, file, tell)
        standing = judged[candidate.name]
        missed = tuple(standing.missed(goal))
        names = tuple(v.candidate.name for v in failed)
        verdict = Verdict(candidate, standing, judged[FULL], missed, names)
        if not missed:
            return verdict
        failed.append(verdict)
    nearest = min(failed, key=lambda v: v.standing.distance)
    return replace(nearest, attempts=tuple(v.candidate.name for v in failed))


def line_up(found: Searched, goal: Goal) -> list[Candidate]:
    """The candidates that are proved, in this order."""
    best = found.candidates[0]
    if not goal.quality or best.standing.missed(goal):
        return [best]
    passing = [c for c in found.candidates if not c.standing.missed(goal)]
    # each next one is a good deal larger: those of nearly the same size fail together
    row = [best]
    for c in passing:
        if c.standing.share > row[-1].standing.share * 1.1 and len(row) < ATTEMPTS:
            row.append(c)
    return row
