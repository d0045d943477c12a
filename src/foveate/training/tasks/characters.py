"""A character model, judged on texts longer than those it was trained on.

    loss(L)      = mean over the first L characters of held-out windows
    late_loss(L) = mean over their last T characters, L - T .. L

T is the length of the training. A causal model says of the first L characters of a window what it would say of a
window of length L, so that one pass over the longest windows gives the loss at every length.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from foveate.core.errors import BadInput
from foveate.core.params import bounded, check_bounds
from foveate.probe.text import default_text
from foveate.training.model import Decoder
from foveate.training.run import Optimisation, Size, Usual
from foveate.training.task import Batch, Column, Measure, Plot, TrainingTask, doubled

__all__ = ["Characters", "encoded"]

MOST = 255
"""Characters that are told apart; rarer ones are one token."""
HELD_OUT = 0.1
TOGETHER = 8


@dataclass(frozen=True)
class Characters(TrainingTask):
    """The next character of a text.

    Args:
        length: Characters of a window in training.
        longer: The model is judged on windows up to so many times as long.
        text: The text, its last tenth held out; None takes `default_text()`.
    """

    length: int = bounded(64, 2, 1 << 16)
    longer: int = bounded(16, 1, 1 << 10)
    text: str | None = None

    title: ClassVar[str] = "characters"
    columns: ClassVar[tuple[Column, ...]] = (Column("loss", "loss"), Column("late_loss", "loss of the last"))
    plots: ClassVar[tuple[Plot, ...]] = (
        Plot(("loss",), "length", "held-out loss, nats per character, against the length of the window"),
        Plot(("late_loss",), "length", "the same, of the last characters of the window only"),
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        window = self.length * self.longer + 1
        if self.text is not None and len(self.text) * HELD_OUT < window + 1:
            raise BadInput(
                f"the text has {len(self.text):,} characters, of which the last tenth is held out; windows of "
                f"{window:,} need a text of {int((window + 1) / HELD_OUT) + 1:,}"
            )

    @property
    def vocabulary(self) -> int:
        return encoded(self.text)[1]

    @property
    def longest(self) -> int:
        return self.length

    def parts(self) -> tuple[Int[Tensor, " trained"], Int[Tensor, " held"]]:
        """The text to train on, and the text to judge by."""
        ids = encoded(self.text)[0]
        at = int(len(ids) * (1 - HELD_OUT))
        return ids[:at], ids[at:]

    def batch(self, draw: torch.Generator, count: int) -> Batch:
        ids = self.parts()[0]
        begin = torch.randint(len(ids) - self.length, (count, 1), generator=draw)
        windows = ids[begin + torch.arange(self.length + 1)]
        return Batch(windows[:, :-1], windows[:, 1:])

    def judge(self, model: Decoder, draw: torch.Generator, count: int) -> list[Measure]:
        ids, size = self.parts()[1], self.length * self.longer
        begin = torch.arange(0, len(ids) - size, size)[:count, None]
        windows = ids[begin + torch.arange(size + 1)]
        parts = [model.answers(Batch(w[:, :-1], w[:, 1:]))[0].view(len(w), size) for w in windows.split(TOGETHER)]
        losses = torch.cat(parts).double().mean(0)
        found = []
        for length in doubled(self.length, self.longer):
            found.append(Measure("loss", losses[:length].mean().item(), at=length))
            found.append(Measure("late_loss", losses[length - self.length : length].mean().item(), at=length))
        return found

    @classmethod
    def usual(cls, quick: bool) -> Usual:
        mixers = ("softmax", "relu")
        if quick:
            size = Size(width=32, heads=2, feed_forward=4)
            return Usual(cls(length=32), (size,), Optimisation(steps=200, batch=32), mixers, judged=8)
        size = Size(width=96, heads=4, feed_forward=4)
        return Usual(cls(), (size,), Optimisation(steps=600, batch=32), mixers, judged=32)


@cache
def encoded(text: str | None, most: int = MOST) -> tuple[Int[Tensor, " characters"], int]:
    """A text as numbers of its characters, and how many numbers there are."""
    text = default_text() if text is None else text
    known = [c for c, _ in Counter(text).most_common(most)]
    number = {c: n for n, c in enumerate(sorted(known))}
    return torch.tensor([number.get(c, len(known)) for c in text]), len(known) + 1
