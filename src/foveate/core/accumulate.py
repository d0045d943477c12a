r"""Means over rows with an interval, in constant memory per row bin.

Rows of one text resemble their neighbours, so a plain standard error would be far too small. Rows are summed into
bins of consecutive positions; the bins are merged into K batches, and the batch means m_k with n_k rows give

    mean = \sum n_k m_k / n,    var = K / (K - 1) \sum n_k^2 (m_k - mean)^2 / n^2

with Student's t on K - 1 degrees of freedom (the method of batch means). The interval speaks of other stretches of text
like this one, not of other kinds of text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

__all__ = ["BIN", "Cells", "Estimate", "batch_means"]

BIN = 64
BATCHES = 24


@dataclass(frozen=True)
class Estimate:
    """A number per head with its 95 % interval; NaN bounds where there is too little to tell.

    Args:
        value: The numbers.
        low: Lower ends of the intervals.
        high: Upper ends.
    """

    value: Float[Tensor, " heads"]
    low: Float[Tensor, " heads"]
    high: Float[Tensor, " heads"]

    @classmethod
    def exact(cls, value: Float[Tensor, " heads"]) -> Estimate:
        """A number that is a fact of this input and not a mean over samples: its interval is the number itself."""
        value = value.detach().double().cpu()
        return cls(value, value, value)


@dataclass
class Cells:
    """Sums of per-row values by bin of positions.

    Args:
        sums: Sums of each call, [heads, cells].
        counts: Number of rows behind them.
        places: First position of each bin.
    """

    sums: list[Any] = field(default_factory=list)
    counts: list[Any] = field(default_factory=list)
    places: list[Any] = field(default_factory=list)

    def add(
        self,
        values: Float[Tensor, "batch heads query"],
        counted: Bool[Tensor, "#batch query"],
        position: Int[Tensor, " query"],
    ) -> None:
        """Adds the counted rows; what stands in the others does not matter, NaN included."""
        batch, heads, queries = values.shape
        counted = counted.expand(batch, queries)
        bins, where = torch.unique_consecutive(position // BIN, return_inverse=True)
        kept = torch.where(counted[:, None], values, values.new_zeros(())).double()
        sums = kept.new_zeros(batch, heads, len(bins)).index_add_(2, where, kept)
        counts = kept.new_zeros(batch, len(bins)).index_add_(1, where, counted.double())
        sums, counts = sums.transpose(0, 1).reshape(heads, -1).cpu(), counts.flatten().cpu()
        places = (bins * BIN).repeat(batch).cpu()
        if len(bins) == 1 and self.places and torch.equal(self.places[-1], places):
            # decoded tokens join the bin of the token before
            self.sums[-1] += sums
            self.counts[-1] += counts
            return
        self.sums.append(sums)
        self.counts.append(counts)
        self.places.append(places)

    def table(self) -> tuple[Float[Tensor, "heads cells"], Float[Tensor, " cells"], Int[Tensor, " cells"]]:
        """Sums, numbers of rows and first positions of the non-empty bins, ordered by position."""
        sums, counts, places = torch.cat(self.sums, 1), torch.cat(self.counts), torch.cat(self.places)
        order = torch.argsort(places, stable=True)
        order = order[counts[order] > 0]
        return sums[:, order], counts[order], places[order]

    def mean(self) -> Estimate:
        """Mean over all counted rows with its interval."""
        sums, counts, _ = self.table()
        return batch_means(sums, counts)


def batch_means(
    sums: Float[Tensor, "heads cells"], counts: Float[Tensor, " cells"], batches: int = BATCHES
) -> Estimate:
    """Ratio of sums with the batch-means interval; cells are merged in order into at most `batches` batches."""
    heads, cells = sums.shape
    if not cells:
        nan = torch.full((heads,), torch.nan, dtype=torch.float64)
        return Estimate(nan, nan, nan)
    into = torch.arange(cells) * min(batches, cells) // cells
    k = int(into[-1]) + 1
    s = sums.new_zeros(heads, k).index_add_(1, into, sums)
    n = counts.new_zeros(k).index_add_(0, into, counts)
    mean = s.sum(1) / n.sum()
    if k < 2:
        nan = torch.full_like(mean, torch.nan)
        return Estimate(mean, nan, nan)
    spread = (n * (s / n - mean[:, None])).square().sum(1) * k / (k - 1) / n.sum() ** 2
    half = float(stats.t.ppf(0.975, k - 1)) * spread.sqrt()
    return Estimate(mean, mean - half, mean + half)
