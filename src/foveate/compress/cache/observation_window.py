r"""Observation window: what the last rows of the prompt look at is what the answer will need.

s_j = pool_{|l - j| <= kernel / 2} ( 1/w \sum_{i > N - w} p_il )        mean over the heads that share a key
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.budget import Amount
from foveate.core.card import Card, Needs
from foveate.core.mechanism import Policy
from foveate.core.params import bounded
from foveate.core.policy import Held
from foveate.core.reductions import Last, Reduction

__all__ = ["ObservationWindow"]


@dataclass(frozen=True)
class ObservationWindow(Policy):
    """Score each key by the mean weight that the last rows give it and its neighbours.

    Args:
        budget: How many entries each KV head keeps.
        window: How many last rows vote; they stay themselves as the budget's recent tokens.
        kernel: Neighbours over which weights are averaged, an odd number; 1 for none.

    Example:
        What the last two rows look at stays, with its neighbours on either side.

        >>> import foveate
        >>> from foveate.compress import ObservationWindow
        >>> from foveate.testing import handmade
        >>> text = "To be. Or not to be. Ask."
        >>> budget = foveate.Budget(8, sinks=1, recent=2, every=0)
        >>> policy = ObservationWindow(budget, window=2, kernel=3)
        >>> with foveate.attach(handmade.model(), policy) as attached:
        ...     cache = attached.model(handmade.ids(text)).past_key_values
        >>> handmade.kept(cache, text, layer=1)["stop"]
        '·····. ···········e. ··k.'
        >>> handmade.kept(cache, text, layer=1)["same"]
        '······ ···········e. ·sk.'
    """

    budget: Amount = 0.25
    window: int = bounded(32, 1, 4096)
    kernel: int = bounded(5, 1, 127)

    card: ClassVar = Card(
        title="SnapKV: LLM Knows What You are Looking for Before Generation",
        year=2024,
        family="kv cache",
        needs=Needs.QUERIES | Needs.KEYS | Needs.WEIGHTS,
        equation="s_j = average over |l - j| <= kernel / 2 of the mean over the last w rows of p_il",
        differs="average pooling, as in the widely used code; in decoding the rows since the last round vote, the "
        "paper compresses the prompt only (that is Budget(every=0)); an even kernel counts as the next odd one",
        use="when the prompt ends with the question",
        misleads="a question that comes later finds that what it needs was dropped; of an answer of several tokens the "
        "window looks at the first, and those beyond the kernel are dropped",
    )
    test_params: ClassVar = ({}, {"window": 4, "kernel": 1})

    def needs(self) -> tuple[Reduction, ...]:
        return (Last(self.window),)

    def score(self, held: Held) -> Float[Tensor, "batch kv_heads key"]:
        return pooled(held.window(self.window), held, self.kernel)


def pooled(score: Float[Tensor, "batch kv_heads key"], held: Held, kernel: int) -> Float[Tensor, "batch kv_heads key"]:
    """Each score averaged with its neighbours in the cache; what is no entry takes no part."""
    there = held.there.to(score.dtype)
    sums = torch.stack([score.masked_fill(~held.there, 0.0), there]).flatten(0, 1)
    half = kernel // 2
    near = torch.nn.functional.avg_pool1d(sums, 2 * half + 1, stride=1, padding=half).unflatten(0, (2, -1))
    return near[0] / near[1].clamp_min(torch.finfo(score.dtype).tiny)
