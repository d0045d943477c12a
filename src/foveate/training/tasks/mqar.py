r"""Multi-query associative recall: pairs of a key and a value, then every key again, its value asked for.

    k_1 v_1 k_2 v_2 ... k_n v_n   ... k_i ? ... k_j ? ...,    p(gap g) \propto g^{a - 1}

Behind the pairs come (N - 2n) / 2 slots of two tokens. Key i stands in slot g_i, and its value is what should be said
there. Small gaps are likelier than large ones, by a power law, as they are for what real text repeats.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from foveate.core.errors import BadParameter
from foveate.core.params import bounded, check_bounds
from foveate.training.model import Decoder
from foveate.training.run import Optimisation, Size, Usual
from foveate.training.task import NOT_ASKED, Batch, Column, Measure, Plot, TrainingTask

__all__ = ["Mqar"]


@dataclass(frozen=True)
class Mqar(TrainingTask):
    """Many keys, each asked for once.

    Args:
        length: Tokens of a sequence.
        pairs: Keys, each with its value.
        tokens: Size of the vocabulary: 0 stands where nothing does, the lower half are keys, the upper half values.
        fewest: Keys of the easiest sequences in training; any number up to `pairs` is equally likely.
        power: a of the power law; 1 makes all gaps equally likely.
        noise: Whether random tokens stand where nothing does, in place of 0.

    Source: Zoology: Measuring and Improving Recall in Efficient Language Models. There 100,000 sequences are seen 64
    times, all with as many pairs, and the best of four learning rates counts for each model. Here sequences are new at
    each step, easy ones lead to hard ones, one rate serves all, and the usual models have a short convolution before
    each mixer; that group's later comparisons have a gated one, as a layer. Without it softmax attention had not learnt
    to recall after 400 to 800 steps. One rate for all may wrong a mixer: before saying that one cannot, try others.
    """

    length: int = bounded(64, 4, 1 << 16)
    pairs: int = bounded(4, 1, 1 << 14)
    tokens: int = bounded(8192, 6, 1 << 20)
    fewest: int = bounded(1, 1, 1 << 14)
    power: float = bounded(0.01, 0.0001, 1.0)
    noise: bool = False

    title: ClassVar[str] = "multi-query associative recall"
    columns: ClassVar[tuple[Column, ...]] = (Column("recall", "recall", share=True), Column("loss", "loss"))
    plots: ClassVar[tuple[Plot, ...]] = (
        Plot(("recall",), "bytes", "share of the keys whose value is recalled, against bytes of state", share=True),
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.length % 2 or 4 * self.pairs > self.length:
            raise BadParameter(
                f"Mqar(length={self.length}, pairs={self.pairs}): length must be even, and 4 tokens or more for each "
                f"pair; give length={4 * self.pairs}, or fewer pairs"
            )
        if self.fewest > self.pairs:
            raise BadParameter(f"Mqar(fewest={self.fewest}, pairs={self.pairs}): fewest must be at most pairs")
        if self.pairs >= self.tokens // 2:
            raise BadParameter(
                f"Mqar(pairs={self.pairs}, tokens={self.tokens}): the lower half of the tokens are keys, each used "
                f"once; give tokens={2 * self.pairs + 2} or more"
            )

    @property
    def vocabulary(self) -> int:
        return self.tokens

    @property
    def longest(self) -> int:
        return self.length

    def batch(self, draw: torch.Generator, count: int) -> Batch:
        n, half = self.pairs, self.tokens // 2
        keys = 1 + distinct(draw, count, n, half - 1)
        values = half + distinct(draw, count, n, self.tokens - half)
        slots = (self.length - 2 * n) // 2
        p = torch.arange(1, slots + 1, dtype=torch.float64) ** (self.power - 1)
        at = 2 * n + 2 * torch.multinomial(p.expand(count, -1), n, generator=draw)
        inputs = torch.zeros(count, self.length, dtype=torch.long)
        if self.noise:
            inputs = torch.randint(self.tokens, inputs.shape, generator=draw)
        there = torch.arange(n) < torch.randint(self.fewest, n + 1, (count, 1), generator=draw)
        first = 2 * torch.arange(n).expand(count, -1)
        for places, what in ((first, keys), (first + 1, values), (at, keys)):
            inputs.scatter_(1, places, torch.where(there, what, inputs.gather(1, places)))
        targets = torch.full_like(inputs, NOT_ASKED)
        return Batch(inputs, targets.scatter_(1, at, torch.where(there, values, NOT_ASKED)))

    def judge(self, model: Decoder, draw: torch.Generator, count: int) -> list[Measure]:
        loss, right = model.answers(replace(self, fewest=self.pairs).batch(draw, count))
        return [Measure("recall", right.double().mean().item()), Measure("loss", loss.double().mean().item())]

    @classmethod
    def usual(cls, quick: bool) -> Usual:
        if quick:
            task = cls(length=32, tokens=64)
            return Usual(task, (Size(width=32, taps=3),), Optimisation(steps=200, batch=64, rate=0.01), judged=128)
        sizes = tuple(Size(width=width, taps=3) for width in (16, 32, 64))
        return Usual(cls(pairs=8, tokens=1024), sizes, Optimisation(steps=450, batch=64, rate=0.01), judged=256)


def distinct(draw: torch.Generator, count: int, size: int, below: int) -> Int[Tensor, "count size"]:
    """Rows of numbers below `below`, none twice in a row."""
    if size * size > below:
        return torch.rand(count, below, generator=draw).topk(size, dim=1).indices
    # a row is drawn again until its numbers differ, which it seldom takes
    found = torch.randint(below, (count, size), generator=draw)
    while bool((twice := (found.sort(dim=1).values.diff(dim=1) == 0).any(1)).any()):
        found[twice] = torch.randint(below, (int(twice.sum()), size), generator=draw)
    return found
