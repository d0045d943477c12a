"""Copying: a random string, a bar, and the string again.

    $ a b c | a b c .

Judged on strings longer than those of the training, too: by character, and by the whole string.
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

__all__ = ["Copying"]


@dataclass(frozen=True)
class Copying(TrainingTask):
    """A string, and the string again.

    Args:
        shortest: Characters of the shortest string.
        most: Characters of the longest string; lengths in between are equally likely.
        letters: Letters that strings are made of; begin, bar, end and padding come on top.
        longer: The model is judged on strings up to so many times as long, too.

    Source: Repeat After Me: Transformers are Better than State Space Models at Copying, where several strings are
    packed into a sequence; here each stands alone.
    """

    shortest: int = bounded(4, 1, 1 << 16)
    most: int = bounded(24, 1, 1 << 16)
    letters: int = bounded(26, 2, 1 << 20)
    longer: int = bounded(4, 1, 1 << 10)

    title: ClassVar[str] = "copying"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("right", "characters", share=True),
        Column("whole", "whole strings", share=True),
    )
    plots: ClassVar[tuple[Plot, ...]] = (
        Plot(
            ("right",), "length", "share of the characters that are right, against the length of a string", share=True
        ),
        Plot(("whole",), "length", "share of the strings that are right in full", share=True),
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.shortest > self.most:
            raise BadParameter(f"Copying(shortest={self.shortest}, most={self.most}): shortest must be at most most")

    @property
    def vocabulary(self) -> int:
        return self.letters + 4

    @property
    def longest(self) -> int:
        return 2 * self.most + 2

    def batch(self, draw: torch.Generator, count: int) -> Batch:
        begin, bar, end, padding = (self.letters + n for n in range(4))
        size = torch.randint(self.shortest, self.most + 1, (count, 1), generator=draw)
        string = torch.randint(self.letters, (count, self.most), generator=draw)
        place = torch.arange(2 * self.most + 3)[None]
        second = place - size - 2
        # the string at places 1 .. n and n + 2 .. 2n + 1, for the length n of each row
        source = torch.where(second >= 0, second, place - 1).clamp(0, self.most - 1)
        whole = string.gather(1, source)
        whole = torch.where(place == 0, begin, whole)
        whole = torch.where(place == size + 1, bar, whole)
        whole = torch.where(second == size, end, whole)
        whole = torch.where(second > size, padding, whole)
        asked = (second[:, 1:] >= 0) & (second[:, 1:] <= size)
        return Batch(whole[:, :-1], torch.where(asked, whole[:, 1:], NOT_ASKED))

    def judge(self, model: Decoder, draw: torch.Generator, count: int) -> list[Measure]:
        found = []
        for length in doubled(self.most, self.longer):
            _, right = model.answers(replace(self, shortest=length, most=length).batch(draw, count))
            # the end is no character
            letters = right.view(count, length + 1)[:, :-1]
            found.append(Measure("right", letters.double().mean().item(), at=length))
            found.append(Measure("whole", letters.all(1).double().mean().item(), at=length))
        return found

    @classmethod
    def usual(cls, quick: bool) -> Usual:
        if quick:
            return Usual(cls(most=12), (Size(width=32, taps=3),), Optimisation(steps=200, rate=0.01), judged=64)
        return Usual(cls(), (Size(width=64, taps=3),), Optimisation(steps=800, rate=0.01), judged=128)
