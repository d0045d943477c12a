"""From a model and a text to a plan that takes parts out of it, with what that costs at several points on the way."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from foveate.compress.prune.part_removal import Course, PartRemoval
from foveate.core.attach import attach, attention_layers
from foveate.core.errors import BadInput
from foveate.core.plan import Plan
from foveate.core.removing import KINDS
from foveate.finding.reporting import Spread, spread, timed
from foveate.planning.compressing import REPEATS, askable, readable, task
from foveate.planning.examining import FOLLOW, HELD_OUT_STRETCHES, LEAST_STRETCHES, Tell, Value, ratio, stretches
from foveate.planning.goals import PROBES
from foveate.probe.ledger import Ledger, circumstances
from foveate.probe.perplexity import token_losses
from foveate.probe.run import run
from foveate.probe.sample import Task
from foveate.probe.text import tokenised

__all__ = ["Point", "Proof", "Pruned", "at_random", "halves", "in_words", "milestones", "prune"]

SEED = 0
"""Of the prompts, and of the parts that go at random."""
CHUNK = 512


@dataclass(frozen=True)
class Point:
    """The model without the first parts that went, on text and prompts that they were not chosen on.

    Args:
        gone: How many parts are out; 0: the whole model.
        mechanism: What takes them out.
        parameters: How many parameters are left.
        bytes: Their bytes.
        perplexity: Of the text; the interval of this and of the next two is over its pieces.
        times: As a multiple of the whole model's.
        random: The same with as many parts out that were drawn at random; None for the whole model.
        recall: Share of the answers given, by probe, with Wilson intervals.
        read: Seconds per token of a prompt, median and quartiles.
        decoded: Seconds per decoded token.
    """

    gone: int
    mechanism: PartRemoval
    parameters: int
    bytes: int
    perplexity: Value
    times: Value
    random: Value | None
    recall: Mapping[str, Value]
    read: Spread
    decoded: Spread

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON."""
        return asdict(self) | {"mechanism": in_words(self.mechanism)}


@dataclass(frozen=True)
class Reading:
    """How a model reads held-out texts, and how large it is while it does.

    Args:
        losses: Mean loss per token of each text, in nats.
        parameters: How many parameters it has.
        bytes: Their bytes.
    """

    losses: tuple[float, ...]
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Pruned:
    """What came of pruning.

    Args:
        plan: What takes all of the parts out.
        course: What went, step by step.
        points: The whole model, and the model at some points of the course; the last one is the plan.
    """

    plan: Plan
    course: Course
    points: tuple[Point, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {
            "model": self.plan.model,
            "gone": in_words(self.course.mechanism),
            "attention": list(self.course.mechanism.attention),
            "feed_forward": list(self.course.mechanism.feed_forward),
        } | self.plan.evidence


def prune(
    model: Any,
    tokenizer: Any,
    text: str,
    count: int,
    *,
    among: Sequence[str] = KINDS,
    measure: str = "divergence",
    first: int = 0,
    tokens: int = 512,
    pieces: int = 4,
    probes: Sequence[str] = PROBES[:2],
    samples: int = 50,
    file: Path | None = None,
    name: str = "",
    tell: Tell | None = None,
) -> Pruned:
    """Finds parts that a model can do without on one half of a text, and says what that costs on the other half.

    Args:
        model: A causal language model; it comes out as it went in.
        tokenizer: Its tokenizer.
        text: The text: parts are chosen on one half, the other is held out.
        count: How many parts go.
        among: What may go: attention, feed_forward, or both.
        measure: What is compared with the whole model, see `PartRemoval.fit`.
        first: The first layer that may lose a part.
        tokens: Length of the pieces of text, and of the prompts.
        pieces: On how many pieces parts are chosen.
        probes: Probes by name.
        samples: Prompts of each probe.
        file: Where steps and results are kept as they come: an interrupted run goes on from it.
        name: What the user calls the model.
        tell: Called with what is done, how much of it, and how much there is.

    Raises:
        BadInput: a text too short to hold some out, a length that the model cannot read or that has no room for a
            probe, more parts than there are.
        NotSupported: the model's parts cannot be told apart.
    """
    readable(model, tokens)
    ids, front = tokenised(tokenizer, text)
    chosen_on, held_out = halves(ids, tokens, pieces, front)
    tasks = {one: task(one, tokens) for one in dict.fromkeys(probes)}
    # a length that cannot be is told before the search
    askable(model, tokenizer, tasks, tokens, (samples, SEED))

    def progress(done: int, of: int) -> None:
        if tell:
            tell("search", done, of)

    calibration = [torch.tensor([piece], device=model.device) for piece in chosen_on]
    course = PartRemoval.fit(
        model, calibration, count=count, among=among, measure=measure, first=first, progress=progress, file=file
    )
    points = Proof(model, tokenizer, tasks, held_out, samples, file, tell).points(course, milestones(count), tokens)
    evidence = course.evidence() | {
        "among": list(among),
        "first": first,
        "length": tokens,
        "held_out_pieces": len(held_out),
        "samples": samples,
        "points": [p.to_json() for p in points],
    }
    return Pruned(Plan.of(model, course.mechanism, evidence=evidence, name=name), course, points)


def halves(
    ids: list[int], tokens: int, pieces: int, front: Sequence[int] = ()
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Pieces of one half of a text to choose on, and of the other half to prove on; none overlap.

    Args:
        ids: The text.
        tokens: Length of a piece.
        pieces: How many to choose on.
        front: What each piece begins with; these are some of `tokens`.

    Raises:
        BadInput: the text is too short to hold some of it out.
    """
    half, least = len(ids) // 2, max(pieces, LEAST_STRETCHES)
    if half < least * tokens:
        raise BadInput(
            f"the text has {len(ids):,} tokens, too few to choose on one half and prove on the other: {least} pieces "
            f"of {tokens:,} tokens in each take {2 * least * tokens:,}; give a longer text, or smaller --tokens or "
            "--pieces"
        )
    held_out = min(HELD_OUT_STRETCHES, half // tokens)
    # a stretch is so much longer than what is asked for
    parts = (ids[:half], pieces), (ids[half:], held_out)
    chosen_on, proved_on = (stretches(part, tokens - FOLLOW, most, front) for part, most in parts)
    return chosen_on, proved_on


def milestones(count: int) -> tuple[int, ...]:
    """After how many parts the model is looked at: a quarter of them, half of them, all of them."""
    return tuple(sorted({-(-count // 4), -(-count // 2), count}))


def at_random(course: Course, attention: int, seed: int) -> list[tuple[str, int]]:
    """All that could have gone in the first step, in a random order; the model's last attention stays.

    Args:
        course: What went.
        attention: How many attention parts the model has.
        seed: Of the order.
    """
    drawn = [(kind, layer) for kind, layer, _ in course.steps[0].tried]
    random.Random(seed).shuffle(drawn)
    spared = [part for part in drawn if part[0] == "attention"][attention - 1 :]
    return [part for part in drawn if part not in spared]


def removal(parts: Sequence[tuple[str, int]]) -> PartRemoval:
    """What takes these out."""
    attention, feed_forward = (tuple(sorted(layer for k, layer in parts if k == kind)) for kind in KINDS)
    return PartRemoval(attention, feed_forward)


def in_words(mechanism: PartRemoval) -> str:
    """Which parts go: "attention of layers 24, 25; feed-forward of layer 12"."""
    words = []
    for kind in KINDS:
        if layers := getattr(mechanism, kind):
            several = "s" if len(layers) > 1 else ""
            words.append(f"{kind.replace('_', '-')} of layer{several} {', '.join(map(str, layers))}")
    return "; ".join(words) or "nothing"


def without(model: Any, mechanism: PartRemoval) -> AbstractContextManager[Any]:
    """The model without some parts, for the length of a `with` block."""
    return nullcontext() if mechanism == PartRemoval() else attach(model, mechanism)


@dataclass(eq=False)
class Proof:
    """What a model is judged on, and where the results are kept.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        tasks: Probes by name.
        texts: Token ids of pieces of text, all of one length.
        samples: Prompts of each probe.
        file: Where results are kept as they come.
        tell: Called with what is done, how much of it, and how much there is.
    """

    model: Any
    tokenizer: Any
    tasks: Mapping[str, Task]
    texts: tuple[tuple[int, ...], ...]
    samples: int
    file: Path | None = None
    tell: Tell | None = None

    def __post_init__(self) -> None:
        self.ledger, self.of = Ledger(self.file), circumstances(self.model, self.tokenizer)

    def points(self, course: Course, counts: Sequence[int], tokens: int) -> tuple[Point, ...]:
        """The whole model, and the model after so many steps.

        Args:
            course: The steps.
            counts: After how many.
            tokens: Length of the prompts that are timed.
        """
        removals = {gone: course.after(gone) for gone in (0, *counts)}
        drawn = at_random(course, len(attention_layers(self.model)), SEED)
        controls = {gone: removal(drawn[:gone]) for gone in counts}
        wanted = (*removals.values(), *controls.values())
        readings = {m: self.reading(m, n, len(wanted)) for n, m in enumerate(wanted)}
        recalls = [self.recall(m, n, len(removals)) for n, m in enumerate(removals.values())]
        seconds = self.seconds(list(removals.values()), tokens)
        whole = readings[removals[0]].losses
        made = []
        for (gone, mechanism), recall, (read, decoded) in zip(removals.items(), recalls, seconds, strict=True):
            own = readings[mechanism]
            perplexity, times = ratio(own.losses, (0.0,) * len(own.losses)), ratio(own.losses, whole)
            control = ratio(readings[controls[gone]].losses, whole) if gone else None
            made.append(
                Point(gone, mechanism, own.parameters, own.bytes, perplexity, times, control, recall, read, decoded)
            )
        return tuple(made)

    def reading(self, mechanism: PartRemoval, at: int, of: int) -> Reading:
        """How the model reads the texts without some parts; this is model `at` of `of`."""
        key = Ledger.key("pruned text", self.of, self.texts, mechanism)
        if key not in self.ledger:
            losses = []
            with without(self.model, mechanism), torch.no_grad():
                for n, text in enumerate(self.texts):
                    ids = torch.tensor([text], device=self.model.device)
                    losses.append(float(token_losses(self.model, ids, CHUNK).double().mean()))
                    self.progress("perplexity", at, of, n + 1, len(self.texts))
                left = [(p.numel(), p.nbytes) for p in self.model.parameters()]
            parameters, size = (sum(column) for column in zip(*left, strict=True))
            self.ledger.add(key, asdict(Reading(tuple(losses), parameters, size)))
        found = self.ledger[key]
        return Reading(tuple(found["losses"]), found["parameters"], found["bytes"])

    def recall(self, mechanism: PartRemoval, at: int, of: int) -> dict[str, Value]:
        """What is recalled, by probe; this is model `at` of `of`."""
        found = {}
        for name, asked in self.tasks.items():
            key = Ledger.key("pruned probe", self.of, asked, self.samples, SEED, mechanism)
            if key not in self.ledger:
                progress = partial(self.progress, name, at, of)
                with without(self.model, mechanism):
                    result = run(self.model, self.tokenizer, asked, self.samples, SEED, progress)
                self.ledger.add(key, asdict(Value(result.recall, result.low, result.high)))
            found[name] = Value(**self.ledger[key])
        return found

    @torch.no_grad()
    def seconds(self, removals: Sequence[PartRemoval], tokens: int) -> list[tuple[Spread, Spread]]:
        """Seconds per token of a prompt and per decoded token under each, measured in turn."""
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        ids = torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(SEED))
        rounds = []
        for n in range(REPEATS + 1):
            made = [timed(self.model, ids.to(self.model.device), () if m == PartRemoval() else (m,)) for m in removals]
            # the first round warms everything up
            if n:
                rounds.append(made)
            self.progress("time", n, REPEATS + 1, 1, 1)
        return [
            (spread([prompt / tokens for prompt, _ in column]), spread([decoded for _, decoded in column]))
            for column in zip(*rounds, strict=True)
        ]

    def progress(self, what: str, at: int, of: int, done: int, each: int) -> None:
        """How much is done of several models that take alike."""
        if self.tell:
            self.tell(what, at * each + done, of * each)
