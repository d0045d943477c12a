r"""Coverage: how many keys a row needs.

    n_i(x) = min { |S| : \sum_{j \in S} p_ij >= x \sum_j p_ij },        share: n_i(x) / n_i

with n_i the number of keys that row i may see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.card import Card, Needs
from foveate.core.params import bounded
from foveate.core.reductions import Sampled
from foveate.core.rows import Rows
from foveate.measure._sampled import SampledMetric

__all__ = ["Coverage"]

SLACK = 1e-6


@dataclass(frozen=True)
class Coverage(SampledMetric):
    """Mean number of keys that hold 90, 95 and 99 % of a row (`coverage_90`, ...).

    Beside it what share of the row's length that is (`coverage_90_share`, ...). Looks at one row of each
    sampled pair.

    Args:
        levels: Shares of a row's mass to cover; up to a millionth of the mass may be missing.
        pairs: Sampled pairs of rows per call.

    Example:
        One key is enough for a head that picks; a head that averages over a text of 20 needs nearly all that its rows
        may see, ten on average.

        >>> import foveate
        >>> from foveate.measure import Coverage
        >>> from foveate.testing import handmade
        >>> model = handmade.model()
        >>> with foveate.attach(model, Coverage(levels=(0.9,))) as attached:
        ...     _ = model(handmade.ids("nineteen characters"))
        >>> handmade.named(attached.results.heads, "coverage_90")
        {'first': 1.0, 'previous': 1.0, 'self': 1.0, 'average': 10.3}
        >>> handmade.named(attached.results.heads, "coverage_90_share")
        {'first': 0.15, 'previous': 0.15, 'self': 0.15, 'average': 0.95}
    """

    levels: tuple[float, ...] = bounded((0.9, 0.95, 0.99), 0.0, 1.0)
    pairs: int = bounded(32, 1, 4096)

    card: ClassVar = Card(
        title="SampleAttention: Near-Lossless Acceleration of Long Context LLM Inference with Adaptive "
        "Structured Sparse Attention",
        year=2024,
        family="concentration",
        needs=Needs.WEIGHTS,
        equation="n_i(x) = the fewest keys with sum p_ij >= x sum_j p_ij; share: n_i(x) / n_i",
        differs="keys needed instead of keys that can go (sparsity degree); a mean over sampled rows, where "
        "the paper demands the level of the worst row; what a learned sink takes is no mass to cover",
        use="to see how small a budget per row could be, and how much it should differ between heads",
        misleads="each row chooses its own keys: a cache must hold the union over rows, which is far larger",
        sampled=True,
    )
    test_params: ClassVar = ({}, {"levels": (0.5, 1.0), "pairs": 3})

    def of_sample(self, rows: Rows, sampled: Sampled) -> dict[str, Float[Tensor, "batch heads sample"]]:
        mask = rows.view.mask
        length = (mask.high - mask.low)[:, None, sampled.index].clamp_min(1)
        tail = ascending(sampled.weights).cumsum(-1)
        found = {}
        for x in self.levels:
            # the smallest keys go first, as long as all of them together are not missed
            spare = (1 - x + SLACK) * tail[..., -1:]
            needed = tail.shape[-1] - torch.searchsorted(tail, spare, right=True)[..., 0]
            found[f"coverage_{100 * x:g}"] = needed.to(tail.dtype)
            found[f"coverage_{100 * x:g}_share"] = needed / length
        return found


def ascending(weights: Float[Tensor, "batch heads sample key"]) -> Float[Tensor, "batch heads sample key"]:
    """Sorted weights; on the CPU numpy sorts values alone, in half the time of a sort with indices."""
    if weights.device.type == "cpu":
        return torch.from_numpy(np.sort(weights.detach().numpy(), -1))
    return weights.sort(-1).values
