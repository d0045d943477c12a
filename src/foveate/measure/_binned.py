"""Sums over bins of the text, for metrics that draw a picture of it; bins are those of `KeyBins`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core.reductions import KeyBins

__all__ = ["Binned", "by_bin", "coarser"]


@dataclass
class Binned:
    """Sums on bins that get wider when the text outgrows them.

    Args:
        bins: How many, and how wide in a text of some length.
        axes: How many of the last axes are bins.
        tokens: Length of the longest text so far.
        sums: The sums so far.
    """

    bins: KeyBins
    axes: int = 1
    tokens: int = 0
    sums: Tensor | None = None

    def add(self, more: Float[Tensor, "*any"], tokens: int) -> None:
        """Adds sums over the bins of a text of so many tokens."""
        own, new = self.bins.width(self.tokens), self.bins.width(tokens)
        self.tokens = max(self.tokens, tokens)
        if self.sums is None:
            self.sums = more
            return
        a, b = coarser(self.sums, self.axes, max(1, new // own)), coarser(more, self.axes, max(1, own // new))
        shape = [max(x, y) for x, y in zip(a.shape, b.shape, strict=True)]
        whole = a.new_zeros(shape)
        for part in (a, b):
            whole[tuple(slice(n) for n in part.shape)] += part
        self.sums = whole


def coarser(x: Float[Tensor, "*any"], axes: int, factor: int) -> Float[Tensor, "*fewer"]:
    """Sums of `factor` neighbours on each of the last axes."""
    for axis in range(x.ndim - axes, x.ndim):
        missing = -x.shape[axis] % factor
        if missing:
            x = torch.cat([x, x.new_zeros(*x.shape[:axis], missing, *x.shape[axis + 1 :])], axis)
        x = x.unflatten(axis, (-1, factor)).sum(axis + 1)
    return x


def by_bin(
    values: Float[Tensor, "batch heads query *more"],
    real: Bool[Tensor, "#batch query"],
    place: Int[Tensor, "#batch query"],
    width: int,
    count: int,
) -> Float[Tensor, "heads bins *more"]:
    """Sums of the real rows of each bin over all texts of the call, in float64."""
    batch, heads, queries = values.shape[:3]
    real, place = real.expand(batch, -1), place.expand(batch, -1)
    if not bool(real.all()):
        # where, not times: what stands in padded rows may be NaN
        values = torch.where(real.view(batch, 1, queries, *(1 for _ in values.shape[3:])), values, 0.0)
    sums = torch.zeros(heads, count, *values.shape[3:], dtype=torch.float64, device=values.device)
    for b in range(batch):
        bins = place[b].div(width, rounding_mode="floor").clamp(0, count - 1)
        at, sizes = (t.tolist() for t in torch.unique_consecutive(bins, return_counts=True))
        # rows of one bin are neighbours: a sum of slices converts to float64 without a copy of the whole
        for one, part in zip(at, values[b].split(sizes, 1), strict=True):
            sums[:, one] += part.sum(1, dtype=torch.float64)
    return sums
