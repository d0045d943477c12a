r"""ReLU attention: no sum over the row stands behind the weights, so no key must take what nobody wants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from foveate.core.card import Card, Needs
from foveate.core.rows import RowBlock
from foveate.core.rule import Rule

__all__ = ["Relu"]


@dataclass(frozen=True)
class Relu(Rule):
    r"""ReLU in the place of softmax, divided by the number of keys that the row may see.

    p_ij = max(0, s_ij) / n_i

    Example:
        A row may give nothing to anybody, and its output is then zero:

        >>> import torch, foveate
        >>> from foveate.replace import Relu
        >>> attention = foveate.nn.Attention(32, heads=4, rule=Relu())
        >>> attention(torch.randn(2, 5, 32)).shape
        torch.Size([2, 5, 32])
    """

    card: ClassVar[Card] = Card(
        title="Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs",
        year=2024,
        family="normalisers",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES,
        equation="p_ij = max(0, s_ij) / n_i",
        differs="nothing known",
        use="Train a small model without attention sinks.",
    )

    def normalise(
        self, block: RowBlock, scores: Float[Tensor, "batch heads rows keys"]
    ) -> Float[Tensor, "batch heads rows keys"]:
        seen = (scores > -float("inf")).sum(-1, keepdim=True).clamp_min(1)
        return scores.clamp_min(0) / seen
