"""Tokens laid out in groups of one size, counted from the first token of each text, padding or not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core.mixer import State, Tokens

__all__ = ["Groups", "State"]


@dataclass(frozen=True, eq=False)
class Groups:
    """The tokens of one call in groups, the open group of earlier calls in front.

    Args:
        x: One row per token; zeros where there is none.
        real: Where there is a token.
        first: Number of the first group in its text.
        at: Where in groups * size each token of the call stands.
        whole: Groups of the text that are complete after this call.
    """

    x: Float[Tensor, "batch groups size width"]
    real: Bool[Tensor, "batch groups size"]
    first: Int[Tensor, " batch"]
    at: Int[Tensor, "batch query"]
    whole: Int[Tensor, " batch"]

    @classmethod
    def of(
        cls,
        tokens: Tokens,
        x: Float[Tensor, "batch query width"],
        size: int,
        left: Float[Tensor, "batch size width"] | None,
    ) -> Groups:
        """Rows `x` of these tokens in groups of `size`; `left` stands in the group that earlier calls left open."""
        batch, _, width = x.shape
        before = tokens.place[:, 0].clamp_min(0).long()
        after = before + tokens.real.sum(1)
        first, opened = before // size, before % size
        number = max(1, -(-int((after - first * size).max()) // size))
        total = number * size
        at = tokens.place.long() - (first * size)[:, None]
        # padding goes to a row of its own, which is cut off
        spots = torch.where(tokens.real, at, total)
        laid = x.new_zeros(batch, total + 1, width).scatter(1, spots[..., None].expand(-1, -1, width), x)[:, :total]
        places = torch.arange(total, device=x.device)
        if left is not None:
            old = torch.nn.functional.pad(left.to(x), (0, 0, 0, total - size))
            laid = torch.where((places < opened[:, None])[..., None], old, laid)
        real = places < (after - first * size)[:, None]
        return cls(
            laid.unflatten(1, (number, size)),
            real.unflatten(1, (number, size)),
            first,
            at.clamp(0, total - 1),
            after // size,
        )

    @property
    def number(self) -> Int[Tensor, "batch groups"]:
        """Which group of its text each one is, from 0."""
        return self.first[:, None] + torch.arange(self.x.shape[1], device=self.x.device)

    def back(self, y: Float[Tensor, "batch groups size out"]) -> Float[Tensor, "batch query out"]:
        """Rows of the groups as rows of the call's tokens; anything finite at padding."""
        return y.flatten(1, 2).gather(1, self.at[..., None].expand(-1, -1, y.shape[-1]))

    def left(self) -> Float[Tensor, "batch size width"]:
        """What stands in the group that is open after this call."""
        return picked(self.x, (self.whole - self.first).clamp_max(self.x.shape[1] - 1))

    def latest(self, y: Tensor, before: Tensor) -> Tensor:
        """Of what there is of each group, that of the last complete one; `before` where this call completed none."""
        index = self.whole - 1 - self.first
        return torch.where((index < 0).view(-1, *[1] * (before.ndim - 1)), before.to(y), picked(y, index.clamp_min(0)))

    def joined(self, before: Tensor, new: Tensor) -> Tensor:
        """What there is of each group of the texts, by its number: of earlier calls, then of this one."""
        at = torch.arange(int(self.first.max()) + new.shape[1], device=new.device)
        held, start = before.shape[1], self.first[:, None]
        index = torch.where(at < start, at, held + at - start).clamp_max(held + new.shape[1] - 1)
        return torch.cat([before.to(new), new], 1).take_along_dim(index.view(*index.shape, *[1] * (new.ndim - 2)), 1)

    def kept(self, y: Tensor) -> Tensor:
        """Of what `joined` gave, the part that later calls read."""
        return y[:, : int(self.whole.max())]


def picked(y: Tensor, index: Int[Tensor, " batch"]) -> Tensor:
    """One entry of each text."""
    return y.take_along_dim(index.view(-1, *[1] * (y.ndim - 1)), 1)[:, 0]
