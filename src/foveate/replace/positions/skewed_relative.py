r"""Relative attention as of the Music Transformer: a learned vector per distance, in memory linear in the length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.card import Card, Needs
from foveate.core.params import bounded
from foveate.core.rows import RowBlock
from foveate.core.rule import Rule, Sizes
from foveate.replace.positions._relative import skewed

__all__ = ["SkewedRelative"]


@dataclass(frozen=True)
class SkewedRelative(Rule):
    r"""Scores with a vector for each distance back in the text, per head.

    s_ij = scale (q_i . k_j + q_i . e_{h,i-j}),    e = 0 from `span` tokens on

    The products q E^T of a block of rows are skewed into place, so no copy of e per pair of tokens is made: the memory
    of a layer is `span` x dim for e and rows x keys for a block.

    Example:
        A vector for each of 64 distances, in each head.

        >>> import torch, foveate
        >>> from foveate.replace import SkewedRelative
        >>> rule = SkewedRelative(span=64)
        >>> attention = foveate.nn.Attention(32, heads=4, rule=rule)
        >>> attention(torch.randn(2, 5, 32)).shape
        torch.Size([2, 5, 32])

    Args:
        span: How many distances have a vector, from 0.
        start: Deviation of e where training begins, in units of dim^-0.5; 0: e is 0, a loaded model stays as it was.
    """

    span: int = bounded(512, 1, 1 << 20)
    start: float = bounded(1.0, 0.0, 10.0)

    card: ClassVar[Card] = Card(
        title="Music Transformer",
        year=2018,
        family="positions",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES,
        equation="s_ij = scale (q_i . k_j + q_i . e_{h,i-j})",
        differs="nothing known of its relative global attention; its local form, in blocks, is left out",
        use="Texts with repeats at many distances, such as music, in models without other positions.",
        misleads=(
            "Rotary positions have turned the queries by their places, so give position_ids with padding in front, as "
            "generate does."
        ),
    )
    full: ClassVar[bool] = False
    identity: ClassVar[dict[str, Any] | None] = {"start": 0.0}
    test_params: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"span": 5})

    def learned(self, sizes: Sizes) -> torch.nn.Module:
        return Distances(sizes, self)

    def score(self, block: RowBlock) -> Float[Tensor, "batch heads rows keys"]:
        own: Any = block.view.learned
        return Rule.score(self, block) + block.view.scale * skewed(block, block.q, own.distance.to(block.dtype))


class Distances(torch.nn.Module):
    """e of one layer, [heads, span, dim], from distance 0 on."""

    def __init__(self, sizes: Sizes, rule: SkewedRelative) -> None:
        super().__init__()
        deviation = rule.start * sizes.head_dim**-0.5
        self.distance = torch.nn.Parameter(deviation * torch.randn(sizes.heads, rule.span, sizes.head_dim))
