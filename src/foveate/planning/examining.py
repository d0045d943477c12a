"""What caches are judged on: prompts with known answers, and stretches of the user's own text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from foveate.core.errors import BadInput
from foveate.planning.goals import PERPLEXITY, Goal
from foveate.probe.sample import Task
from foveate.probe.trials import FULL, Settings, continuations, trials

__all__ = ["FOLLOW", "Exam", "Standing", "Value", "split"]

FOLLOW = 128
SEARCH_STRETCHES, HELD_OUT_STRETCHES = 4, 8
LEAST_STRETCHES = 2

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Value:
    """A number with its 95 % interval.

    Args:
        value: The number.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Standing:
    """What a cache is worth.

    Args:
        share: Bytes that it holds behind the text, as a share of the model's own cache.
        perplexity: As a multiple of the full cache's; the interval is over stretches of text.
        recall: Share of the answers given, by probe, with Wilson intervals.
        full: The full cache's recall, by probe.
    """

    share: float
    perplexity: Value
    recall: Mapping[str, Value]
    full: Mapping[str, float]

    def reached(self, what: str) -> float:
        """The number that a target is about."""
        if what == PERPLEXITY:
            return self.perplexity.value
        full = self.full[what]
        # where the full cache recalls nothing, nothing can be lost; `missed` does not call that a target met
        return self.recall[what].value / full if full else 1.0

    def missed(self, goal: Goal) -> list[str]:
        """The targets of a goal that it does not meet, in words."""
        words = []
        for what, target in goal.quality:
            got = self.reached(what)
            if what == PERPLEXITY and not math.isfinite(got):
                words.append("perplexity is no number: the model's numbers overflow under it")
            elif what == PERPLEXITY and got > target:
                words.append(f"perplexity {got:.4f} x, above {target:g}")
            elif what != PERPLEXITY and not self.full[what]:
                words.append(f"{what}: the full cache itself recalls nothing, which no target can be a share of")
            elif what != PERPLEXITY and got < target:
                words.append(f"{what} {got:.3f} of the full cache's recall, below {target:g}")
        return words

    @property
    def distance(self) -> float:
        """How far it is from the full cache: recall lost, mean over the probes, and perplexity gained."""
        if not math.isfinite(self.perplexity.value):
            return math.inf
        lost = [max(0.0, 1.0 - self.reached(name)) for name in self.recall]
        return sum(lost) / max(len(lost), 1) + max(0.0, self.perplexity.value - 1.0)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Exam:
    """Prompts and stretches of text.

    Args:
        tasks: Probes by name.
        texts: Token ids of stretches, the last `FOLLOW` of each to be predicted.
        count: Prompts of each probe.
        seed: Of the prompts.
        unseen: Whether caches are compressed before a question is read.
    """

    tasks: Mapping[str, Task]
    texts: tuple[tuple[int, ...], ...]
    count: int
    seed: int
    unseen: bool = True

    def judge(
        self, model: Any, tokenizer: Any, settings: Settings, file: Path | None = None, tell: Tell | None = None
    ) -> dict[str, Standing]:
        """What each set of policies is worth, by name; the full cache as `FULL`."""

        def progress(what: str) -> Callable[[int, int], None]:
            return lambda done, of: tell(what, done, of) if tell else None

        tried = {
            name: trials(
                model,
                tokenizer,
                task,
                settings,
                self.count,
                self.seed,
                unseen=self.unseen,
                file=file,
                progress=progress(name),
            )
            for name, task in self.tasks.items()
        }
        continued = continuations(model, self.texts, settings, FOLLOW, file=file, progress=progress("perplexity"))
        full = {name: found[FULL].result.recall for name, found in tried.items()}
        standings = {}
        for setting, c in continued.items():
            results = {name: found[setting].result for name, found in tried.items()}
            recall = {name: Value(r.recall, r.low, r.high) for name, r in results.items()}
            standings[setting] = Standing(c.share, ratio(c.losses, continued[FULL].losses), recall, full)
        return standings


def ratio(losses: tuple[float, ...], full: tuple[float, ...]) -> Value:
    """Perplexity as a multiple of another, with a t-interval over pairs of stretches."""
    from scipy.stats import t

    gaps = [a - b for a, b in zip(losses, full, strict=True)]
    mean = math.fsum(gaps) / len(gaps)
    deviation = math.sqrt(math.fsum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1))
    half = float(t.ppf(0.975, len(gaps) - 1)) * deviation / math.sqrt(len(gaps))
    return Value(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


def split(
    ids: list[int], tokens: int, front: Sequence[int] = ()
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Stretches of a text to search on and stretches to prove on; no token that is predicted is in both.

    Args:
        ids: The text.
        tokens: Tokens before those that are predicted.
        front: What each stretch begins with; these are some of `tokens`.

    Raises:
        BadInput: the text is too short to hold some of it out.
    """
    half = len(ids) // 2
    least = tokens + LEAST_STRETCHES * FOLLOW
    if half < least:
        room = half - LEAST_STRETCHES * FOLLOW
        hint = f"plan for shorter ones with --tokens {room}" if room >= FOLLOW else "give a longer one"
        raise BadInput(
            f"the text has {len(ids):,} tokens, too few to search on one half and prove on the other with "
            f"--tokens {tokens:,}, which takes {2 * least:,}; {hint}"
        )
    halves = (ids[:half], SEARCH_STRETCHES), (ids[half:], HELD_OUT_STRETCHES)
    searched, held_out = (stretches(part, tokens, most, front) for part, most in halves)
    return searched, held_out


def stretches(ids: list[int], tokens: int, most: int, front: Sequence[int] = ()) -> tuple[tuple[int, ...], ...]:
    """So many stretches, evenly spread; what is predicted in them does not overlap."""
    tokens -= len(front)
    last = len(ids) - tokens - FOLLOW
    count = min(most, last // FOLLOW + 1)
    starts = [n * last // max(count - 1, 1) for n in range(count)]
    return tuple((*front, *ids[a : a + tokens + FOLLOW]) for a in starts)
