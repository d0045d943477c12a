r"""Chunk memory: look at summaries of the past, then in detail at the few chunks that matter.

    r_ic = mean_{j in c} s_ij                                   relevance of chunk c: the query on the mean of its keys
    K_i  = {own chunk of i} + top-k of r_i over the others
    R_ic = exp(r_ic) / sum_{c' in K_i} exp(r_ic'),   0 outside of K_i
    p_ij = R_ic exp(s_ij - lse_ic),   lse_ic = ln sum_{j in c} exp(s_ij),   c the chunk of j

Sums run over the keys that the row may see, so a chunk that is not complete is the row's own, up to the row itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.card import Card, Needs
from foveate.core.mask import Mask
from foveate.core.params import bounded
from foveate.core.rows import RowBlock
from foveate.core.rule import Rule

__all__ = ["ChunkMemory"]


@dataclass(frozen=True)
class ChunkMemory(Rule):
    r"""Hierarchical chunk attention (HCAM): softmax inside the most relevant chunks, weighted by their relevance.

    p_ij = R_ic exp(s_ij - lse_ic),    R_i = softmax of mean_{j in c} s_ij over the own chunk and the top-k others

    Departures from the paper, whose code reads complete chunks only and leaves the newest tokens to other parts of the
    agent: here the row's own chunk always takes part, with the tokens so far for its summary. Queries and keys are the
    layer's, at both levels and for each head, where the paper has a second pair of projections and one relevance for
    all heads. Positions are those in the keys, and gradients flow into the memory.

    Example:
        Of the past, a token reads the two chunks of four that its head finds most relevant.

        >>> import torch, foveate
        >>> from foveate.replace import ChunkMemory
        >>> memory = ChunkMemory(chunk=4, top=2)
        >>> attention = foveate.nn.Attention(32, heads=4, kv_heads=2, rule=memory)
        >>> attention(torch.randn(2, 21, 32)).shape
        torch.Size([2, 21, 32])

    Args:
        chunk: Tokens in a chunk, counted from the first token of the text.
        top: Chunks that a row reads besides its own; in cross-attention, where there is no own one, all that it reads.
    """

    chunk: int = bounded(32, 1, 1 << 20, grid=(16, 32, 64, 128))
    top: int = bounded(8, 1, 4096, grid=(2, 4, 8, 16))

    card: ClassVar[Card] = Card(
        title="Towards mental time travel: a hierarchical memory for reinforcement learning agents",
        year=2021,
        family="memory",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES,
        equation="p_ij = R_ic exp(s_ij - lse_ic), R_i = softmax_c(mean_{j in c} s_ij) over own chunk and top-k",
        differs="The row's own chunk is always read, with the tokens so far as its summary; the paper's code reads "
        "complete chunks only. The layer's own queries and keys serve both levels, head by head, in place of a second "
        "pair of projections and one relevance for all heads; positions are those in the keys; gradients flow into the "
        "memory. A model's learned sinks take part in the softmax of each chunk.",
        use="Recall a few whole passages of a long past in detail, without spreading weight over the rest of it.",
        misleads="Which chunks are read has no gradient: one that is never among the top-k is never learned from.",
    )
    identity: ClassVar[dict[str, Any] | None] = {"chunk": 1 << 20}
    test_params: ClassVar[tuple[dict[str, Any], ...]] = ({"chunk": 4, "top": 2}, {"chunk": 3, "top": 1}, {})
    known_failures: ClassVar[dict[str, str]] = {
        "narrow": "queries and keys that are rounded to bfloat16 rank chunks of nearly the same relevance differently",
    }

    def normalise(
        self, block: RowBlock, scores: Float[Tensor, "batch heads rows keys"]
    ) -> Float[Tensor, "batch heads rows keys"]:
        view, size = block.view, self.chunk
        if not scores.numel():
            return scores
        start = beginning(view.mask)[:, block.index, None]
        at = torch.arange(block.first, block.last, device=scores.device)
        place = at - start
        low, high = int(place.min()), int(place.max())
        base, width = low // size * size, min(size, high - low + 1)
        chunks = (high - base) // size + 1
        # keys laid out chunk by chunk; rows of different texts, or with padding in front, have different cuts
        first = (torch.arange(chunks, device=scores.device) * size + base).clamp_min(low)
        laid = first[:, None] + torch.arange(width, device=scores.device)
        beyond = laid >= (first // size * size + size)[:, None]
        key = laid.flatten() + start - block.first
        outside = (key < 0) | (key >= len(at)) | beyond.flatten()
        s = scores.gather(-1, over_heads(key.clamp(0, len(at) - 1), scores))
        s = s.masked_fill(outside[:, None], -torch.inf).unflatten(-1, (chunks, width))

        seen = s > -torch.inf
        count = seen.sum(-1)
        r = torch.where(seen, s, 0.0).sum(-1) / count.clamp_min(1)
        own = (view.mask.position[block.index, None] - start - base).div(size, rounding_mode="floor")
        mine = (own == torch.arange(chunks, device=scores.device))[:, None] & (not view.layer.cross)
        others = r.masked_fill(mine | (count == 0), -torch.inf)
        kept = others.topk(min(self.top, chunks)).indices
        chosen = (torch.zeros_like(count, dtype=torch.bool).scatter(-1, kept, True) | mine) & (count > 0)

        none = ~chosen.any(-1, keepdim=True)
        relevance = torch.softmax(r.masked_fill(~chosen & ~none, -torch.inf), -1) * ~none
        # finite where a chunk is empty, or its gradient would be NaN times zero
        lse = torch.logsumexp(torch.where(count[..., None] > 0, s, 0.0), -1)
        if view.sinks is not None:
            lse = torch.logaddexp(lse, view.sinks.to(lse)[:, None, None])
        p = relevance[..., None] * torch.exp(s - lse[..., None])
        chunk = (place - base) // size
        return p.flatten(-2).gather(-1, over_heads(chunk * width + place - first[chunk], scores))


def beginning(mask: Mask) -> Int[Tensor, "#batch query"]:
    """The key at which the text of each row begins; negative where a sliding cache has dropped it."""
    return torch.where(mask.starts < 0, mask.text_begin[:, None], mask.starts).long()


def over_heads(
    index: Int[Tensor, "#batch rows places"], scores: Float[Tensor, "batch heads rows keys"]
) -> Int[Tensor, "batch heads rows places"]:
    """The same places in each head."""
    return index[:, None].expand(*scores.shape[:2], -1, -1)
