r"""The stages that every row passes: select -> score -> mask -> normalise -> edit -> observe -> mix.

A `Rule` says how scores are made and how they become weights; softmax is the default. Select, mask, observe and mix
belong to the engine (`core/rows.py`), edits to the stack that is attached.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from foveate.core.rows import RowBlock

__all__ = ["Rule", "Softmax"]


@dataclass(frozen=True)
class Rule:
    """Attention by rows: two methods, both on one row block."""

    def score(self, block: RowBlock) -> Float[Tensor, "batch heads rows keys"]:
        r"""s_ij = scale * q_i . k_j, capped by c tanh(s / c) where the model asks for it; not yet masked."""
        view = block.view
        q = block.q * view.scale
        k = view.k[:, :, block.first : block.last].to(q.dtype)
        batch, heads, rows, dim = q.shape
        # The query heads of one key-value head are rows of one product: nothing is repeated
        grouped = q.reshape(batch, view.kv_heads, view.grouped * rows, dim)
        s = (grouped @ k.transpose(-1, -2)).reshape(batch, heads, rows, k.shape[2])
        return s if view.softcap is None else view.softcap * torch.tanh(s / view.softcap)

    def normalise(
        self, block: RowBlock, scores: Float[Tensor, "batch heads rows keys"]
    ) -> Float[Tensor, "batch heads rows keys"]:
        """Masked scores (-inf where a row may not look) to weights; a row that sees nothing gives zeros."""
        raise NotImplementedError


@dataclass(frozen=True)
class Softmax(Rule):
    r"""p_ij = exp(s_ij - lse_i) with lse_i = ln(\sum_j exp s_ij + exp sink_h)."""

    def normalise(
        self, block: RowBlock, scores: Float[Tensor, "batch heads rows keys"]
    ) -> Float[Tensor, "batch heads rows keys"]:
        # the fused form knows no sink and gives NaN for rows that see nothing; float64 is for the reference
        if block.simple and block.view.sinks is None and scores.dtype != torch.float64:
            return torch.softmax(scores, -1)
        return torch.exp(scores - lse_of(block, scores)[..., None].clamp_min(torch.finfo(scores.dtype).min))


def lse_of(block: RowBlock, scores: Float[Tensor, "batch heads rows keys"]) -> Float[Tensor, "batch heads rows"]:
    """Log-sum-exp of masked scores, with the learned sink of the head where there is one."""
    lse = torch.logsumexp(scores, -1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -torch.inf)
    sinks = block.view.sinks
    # a row that sees nothing stays empty: its sink has nothing to weigh against
    return lse if sinks is None else torch.where(lse == -torch.inf, lse, torch.logaddexp(lse, sinks.to(lse)[:, None]))
