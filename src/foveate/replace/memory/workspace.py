r"""A workspace of a few slots: tokens compete to write into it, and all tokens read what came in.

    u_mj = a_m . v_j / sqrt(value_dim),    T_mi = top-k of u_m over the keys that row i may see
    w_mj = exp(u_mj) / sum_{T_mi} exp(u_m) on T_mi, else 0                      write: k tokens win each slot
    b_im = softmax_m(q_i . sum_j w_mj scale k_j) = softmax_m(sum_j w_mj s_ij)   broadcast: a token reads the slots
    p_ij = sum_m b_im w_mj

The consciousness prior asks for a low-dimensional state of a few elements, chosen by attention and broadcast; the
mechanism is the shared global workspace of Goyal et al., 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core.card import Card, Needs
from foveate.core.params import bounded
from foveate.core.rows import RowBlock
from foveate.core.rule import Rule, Sizes

__all__ = ["Slots", "Workspace"]

# bids that are the same in steps of one part in this are as good as equal
ALIKE = 4096


class Slots(torch.nn.Module):
    """What each slot of the workspace looks for.

    Args:
        sizes: Sizes of the layer.
        count: Slots of each head.
    """

    def __init__(self, sizes: Sizes, count: int) -> None:
        super().__init__()
        self.query = torch.nn.Parameter(torch.randn(sizes.heads, count, sizes.value_dim))


@dataclass(frozen=True)
class Workspace(Rule):
    r"""Attention through a bottleneck: no more than slots x winners keys reach a row, however long the text.

    p_ij = sum_m b_im w_mj,    w_m = softmax of a_m . v_j / sqrt(d) over its top-k,    b_i = softmax_m sum_j w_mj s_ij

    What a slot holds at row i are the winners among the tokens that row i may see. Its query a_m is learned and the
    same for all rows, so the winners of a causal row are a running top-k and depend on no later token. Tokens bid with
    their values, which know no positions: with rotated keys a slot would prefer places, and padding would move them.
    Of bids that are as good as equal the earlier token's wins.

    Departures: the paper gives the idea and c_t = C(h_t, c_{t-1}, z_t), no mechanism. Of the shared workspace, the
    weights of a slot are normalised over its winners alone (its code normalises over all tokens, in the causal variant
    also over later ones, and drops the losers then); the slots have no gates, no feed-forward layer and no content of
    their own, and are not carried from layer to layer; there is no noise z and no state c_{t-1}. Keys and values are
    the layer's, and values stand for the keys of the writing.

    Example:
        Two slots with three winners each let at most six tokens through to any head.

        >>> import torch, foveate
        >>> from foveate.replace import Workspace
        >>> rule = Workspace(slots=2, winners=3)
        >>> attention = foveate.nn.Attention(32, heads=4, rule=rule)
        >>> attention(torch.randn(2, 50, 32)).shape
        torch.Size([2, 50, 32])

    Args:
        slots: Slots of each head.
        winners: Tokens that write into a slot.
    """

    slots: int = bounded(8, 1, 256, grid=(2, 4, 8, 16))
    winners: int = bounded(5, 1, 256, grid=(1, 2, 5, 20))

    card: ClassVar[Card] = Card(
        title="The Consciousness Prior",
        year=2017,
        family="memory",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES | Needs.TRAINING,
        equation="p_ij = sum_m b_im w_mj, w_m = softmax over the top-k of a_m . v_j / sqrt(d), b_i = softmax_m(w s_i)",
        differs="The paper gives the idea, c_t = C(h_t, c_{t-1}, z_t); here noise z and state c_{t-1} are left out, "
        "and the mechanism is the shared workspace of Goyal et al. (2022). A slot's weights are normalised over its "
        "winners alone, which keeps the causal form from seeing later tokens; in its published code it sees them. "
        "Tokens bid with their values, which know no positions, in place of keys of their own; of equal bids the "
        "earlier wins. The slots have no gates, no feed-forward layer and no content of their own, and none is carried "
        "from layer to layer. Learned sinks take no part.",
        use="Train a model in which few tokens at a time condition all others, with a fixed number of keys per row.",
        misleads="It is no approximation of softmax attention: a loaded model must be trained again under it. Which "
        "tokens win has no gradient.",
    )
    test_params: ClassVar[tuple[dict[str, Any], ...]] = ({"slots": 3, "winners": 2}, {"slots": 1, "winners": 1}, {})
    known_failures: ClassVar[dict[str, str]] = {
        "narrow": "values that are rounded to bfloat16 make other winners of tokens whose bids are nearly the same",
    }

    def learned(self, sizes: Sizes) -> Slots:
        return Slots(sizes, self.slots)

    def normalise(
        self, block: RowBlock, scores: Float[Tensor, "batch heads rows keys"]
    ) -> Float[Tensor, "batch heads rows keys"]:
        if not scores.numel():
            return scores
        seen = scores > -torch.inf
        u = self.bids(block, seen)
        rank = ranked(u)
        # what all rows see needs no look at row by row: of that, only the winners can win
        shared = seen.flatten(0, 2).all(0)
        common, rest = shared.nonzero()[:, 0], (~shared).nonzero()[:, 0]
        ahead = common[rank[..., common].topk(min(self.winners, len(common))).indices]
        entrants = torch.cat([ahead, rest.expand(*u.shape[:3], -1)], -1)

        batch, heads, slots, width = entrants.shape
        rows = scores.shape[2]
        flat = entrants.flatten(2)[:, :, None].expand(-1, -1, rows, -1)
        allowed = seen.gather(-1, flat).unflatten(-1, (slots, width))
        best, which = torch.where(allowed, rank.gather(-1, entrants)[:, :, None], -torch.inf).topk(
            min(self.winners, width)
        )
        real = best > -torch.inf
        at = entrants[:, :, None].expand(batch, heads, rows, slots, width).gather(-1, which)
        won = u[:, :, None].expand(-1, -1, rows, -1, -1).gather(-1, at)
        won = won.masked_fill(~real & real.any(-1, keepdim=True), -torch.inf)
        w = torch.softmax(won, -1) * real
        at = at.flatten(-2)
        s = torch.where(real, scores.gather(-1, at).unflatten(-1, (slots, -1)), 0.0)
        b = torch.softmax((w * s).sum(-1), -1)
        return torch.zeros_like(scores).scatter_add(-1, at, (b[..., None] * w).flatten(-2))

    def bids(
        self, block: RowBlock, seen: Bool[Tensor, "batch heads rows keys"]
    ) -> Float[Tensor, "batch heads slots keys"]:
        """u_mj; whatever stands in values that no row sees."""
        view = block.view
        assert view.learned is not None
        a = view.learned.query.to(block.dtype).unflatten(0, (view.kv_heads, -1)).flatten(1, 2)
        v = view.v[:, :, block.first : block.last].to(block.dtype)
        v = torch.where(seen.any(2).unflatten(1, (view.kv_heads, -1)).any(2)[..., None], v, 0.0)
        return (v.shape[-1] ** -0.5 * a @ v.transpose(-1, -2)).unflatten(2, (view.grouped, -1)).flatten(1, 2)


def ranked(u: Float[Tensor, "batch heads slots keys"]) -> Float[Tensor, "batch heads slots keys"]:
    """Numbers in the order of the bids; of bids that are as good as equal, the earlier goes first.

    Equal tokens make equal values in the first layer, up to the rounding of the call that they come in.
    """
    at = torch.arange(u.shape[-1], device=u.device)
    return (u.detach().double() * ALIKE).round() * (1 << 24) - at
