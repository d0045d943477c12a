"""Attention patterns made by hand, as a call that the row engine runs: the fixed input that mechanisms are drawn on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core.mask import Mask
from foveate.core.reductions import Reduction
from foveate.core.rows import Layer, RowBlock, View

__all__ = ["LATER", "TOKENS", "Weights", "patterns", "view"]

TOKENS = 32
HALF = TOKENS // 2
NEAR = 3
LATER = 10
# as wide as the heads of the tiny models, for edits that bring vectors along
DIM = 8


@dataclass(frozen=True)
class Weights(Reduction):
    """The weights themselves; a picture is small enough to keep them."""

    def of_block(self, block: RowBlock) -> Tensor:
        return torch.nn.functional.pad(block.weights, (block.first, block.view.mask.keys - block.last))


def patterns() -> dict[str, Tensor]:
    """Seven heads by name, [TOKENS, TOKENS] each; every row sums to 1.

    The text says the same 16 tokens twice, so that rows of its second half have an earlier copy to look at.
    """
    at = torch.arange(TOKENS)
    row, key = at[:, None], at[None]
    seen = key <= row
    uniform = seen / seen.sum(1, keepdim=True)

    def onto(targets: Tensor, share: float) -> Tensor:
        """`share` of each row on one key, the rest spread over all that it sees."""
        return share * torch.nn.functional.one_hot(targets, TOKENS) + (1 - share) * uniform

    local = (seen & (row - key <= NEAR)).float()
    later = torch.where(at >= LATER, LATER, at)
    return {
        "previous token": onto((at - 1).clamp_min(0), 0.9),
        "first token": onto(torch.zeros_like(at), 0.8),
        f"key {LATER}": onto(later, 0.6),
        "local": local / local.sum(1, keepdim=True),
        "uniform": uniform,
        "same token": onto(torch.where(at >= HALF, at - HALF, at), 0.9),
        "induction": onto(torch.where(at >= HALF, at - HALF + 1, torch.zeros_like(at)), 0.9),
    }


def view(layer: int = 0) -> View:
    """The patterns as one attention call: no scores but their logarithms, as an additive bias.

    The value of the first token is short, as sinks have it in trained models.
    """
    weights = torch.stack(list(patterns().values()))[None]
    heads = weights.shape[1]
    rng = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, heads, TOKENS, DIM, generator=rng) for _ in range(2))
    v[:, :, 0] *= 0.1
    return View(
        torch.zeros(1, heads, TOKENS, DIM),
        k,
        v,
        Mask.causal_of(TOKENS),
        bias=weights.log(),
        tokens=torch.arange(TOKENS)[None] % HALF,
        projection=torch.randn(heads * DIM, heads * DIM, generator=rng),
        layer=Layer(layer, f"layers.{layer}"),
    )
