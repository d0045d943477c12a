"""Induction: a token that stands out is followed by the same token every time; what follows it this time?

    ... s x ... s x ... s ?

The other tokens are random. A model solves it with a head that looks for the token before, and one that looks for
what stood behind the same token earlier, at any length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from foveate.core.errors import BadParameter
from foveate.core.params import bounded, check_bounds
from foveate.training.model import Decoder
from foveate.training.run import Optimisation, Size, Usual
from foveate.training.task import NOT_ASKED, Batch, Column, Measure, Plot, TrainingTask, doubled

__all__ = ["Induction"]


@dataclass(frozen=True)
class Induction(TrainingTask):
    """One token that stands out, and what follows it.

    Args:
        length: Tokens of a sequence; the last is the one that stands out.
        tokens: Ordinary tokens; the one that stands out comes on top.
        times: How often it stands in a sequence: first to be seen, then to be asked about.
        longer: The model is judged on sequences up to so many times as long, too.

    Source: the induction-head task of H3 and Hyena (safari), with the vocabulary of Mamba's; there it stands out
    twice, which gives one answer to learn from in a sequence.
    """

    length: int = bounded(64, 8, 1 << 16)
    tokens: int = bounded(16, 2, 1 << 20)
    times: int = bounded(4, 2, 1 << 12)
    longer: int = bounded(8, 1, 1 << 10)

    title: ClassVar[str] = "induction"
    columns: ClassVar[tuple[Column, ...]] = (Column("right", "right", share=True),)
    plots: ClassVar[tuple[Plot, ...]] = (
        Plot(("right",), "length", "share of the answers that are right, against the length of a sequence", share=True),
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if 2 * self.times > self.length:
            raise BadParameter(
                f"Induction(length={self.length}, times={self.times}): each time takes two tokens; give "
                f"length={2 * self.times} or more"
            )

    @property
    def vocabulary(self) -> int:
        return self.tokens + 1

    @property
    def longest(self) -> int:
        return self.length

    def batch(self, draw: torch.Generator, count: int) -> Batch:
        inputs = torch.randint(self.tokens, (count, self.length), generator=draw)
        follows = torch.randint(self.tokens, (count, 1), generator=draw)
        # pairs of places, so that no two of them overlap, the last token left over
        slots = torch.rand(count, (self.length - 1) // 2, generator=draw).topk(self.times - 1, dim=1).indices
        at = torch.cat([2 * slots.sort(dim=1).values, torch.full((count, 1), self.length - 1)], 1)
        inputs.scatter_(1, at, self.tokens)
        inputs.scatter_(1, at[:, :-1] + 1, follows.expand(-1, self.times - 1))
        targets = torch.full_like(inputs, NOT_ASKED).scatter_(1, at[:, 1:], follows.expand(-1, self.times - 1))
        return Batch(inputs, targets)

    def judge(self, model: Decoder, draw: torch.Generator, count: int) -> list[Measure]:
        found = []
        for length in doubled(self.length, self.longer):
            _, right = model.answers(replace(self, length=length).batch(draw, count))
            found.append(Measure("right", right.double().mean().item(), at=length))
        return found

    @classmethod
    def usual(cls, quick: bool) -> Usual:
        if quick:
            return Usual(cls(length=32), (Size(width=32, taps=3),), Optimisation(steps=200, rate=0.01), judged=64)
        return Usual(cls(), (Size(width=64, taps=3),), Optimisation(steps=600, rate=0.01), judged=128)
