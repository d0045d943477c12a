r"""Universal relative attention: a bias before softmax and a factor behind it, so that rows need not sum to 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.card import Card, Needs
from foveate.core.params import bounded
from foveate.core.rows import RowBlock
from foveate.core.rule import Rule, Sizes
from foveate.replace.positions._relative import distances

__all__ = ["UniversalRelative"]


@dataclass(frozen=True)
class UniversalRelative(Rule):
    r"""Softmax with a bias per distance, times a factor per distance that may be anything, also below 0.

    p_ij = c_{h,j-i} exp(s_ij + b_{h,j-i}) / \sum_k exp(s_ik + b_{h,k-i})

    Rows that sum to 1 give the same output at every place where all values are the same; with c they can tell places
    apart.

    Example:
        Where all tokens are the same, places can still be told apart.

        >>> import torch, foveate
        >>> from foveate.replace import UniversalRelative
        >>> rule = UniversalRelative()
        >>> attention = foveate.nn.Attention(32, heads=4, rule=rule)
        >>> same = torch.ones(1, 5, 32)
        >>> attention.rule.learned.factor.data.normal_().shape
        torch.Size([4, 255])
        >>> bool(attention(same)[0].diff(dim=0).abs().max() > 1e-3)
        True

    Args:
        span: Distances below this have numbers of their own, on either side; farther ones take the farthest.
    """

    span: int = bounded(128, 1, 1 << 20)

    card: ClassVar[Card] = Card(
        title="Your Transformer May Not be as Powerful as You Expect",
        year=2022,
        family="positions",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES,
        equation="p_ij = c_{h,j-i} softmax_j(s_ij + b_{h,j-i})",
        differs=(
            "each layer has its own b and c, in its code all layers share them; b starts at 0, there normal with "
            "deviation 0.02; beyond the span the last number, where its code has no more, or buckets"
        ),
        use="Tasks that need to know where a token is, in models without other positions.",
        misleads="Its weights are no shares: they may be negative, and rows do not sum to 1.",
        claims=("universal_relative",),
    )
    identity: ClassVar[dict[str, Any] | None] = {}
    test_params: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"span": 4})

    def learned(self, sizes: Sizes) -> torch.nn.Module:
        return Toeplitz(sizes.heads, 2 * self.span - 1)

    def score(self, block: RowBlock) -> Float[Tensor, "batch heads rows keys"]:
        own: Any = block.view.learned
        return Rule.score(self, block) + own.bias.to(block.dtype)[:, self.entry(block)]

    def normalise(
        self, block: RowBlock, scores: Float[Tensor, "batch heads rows keys"]
    ) -> Float[Tensor, "batch heads rows keys"]:
        own: Any = block.view.learned
        return Rule.normalise(self, block, scores) * own.factor.to(block.dtype)[:, self.entry(block)]

    def entry(self, block: RowBlock) -> Int[Tensor, "rows keys"]:
        """Where j - i stands in the tables."""
        return (-distances(block)).clamp(1 - self.span, self.span - 1) + self.span - 1


class Toeplitz(torch.nn.Module):
    """b and c of one layer, [heads, distances], from the farthest key in front to the farthest behind."""

    def __init__(self, heads: int, count: int) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(heads, count))
        self.factor = torch.nn.Parameter(torch.ones(heads, count))
