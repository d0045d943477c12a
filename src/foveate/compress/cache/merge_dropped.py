r"""Merge dropped: an entry that goes is averaged into the kept entry whose key is most like its own.

    u_i = max_j cos(k_i, k_j)        over the kept j; j(i) is the one
    k_j \leftarrow ( e m_j k_j + \sum_i e^{u_i} m_i k_i ) / ( e m_j + \sum_i e^{u_i} m_i )
    m_j \leftarrow m_j + \sum_i m_i        sums over the dropped i with j(i) = j and u_i >= least

Values are averaged with the same weights. m_j is how many tokens an entry stands for, at first 1; a row gives it the
weight of so many copies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core.card import Card, Needs
from foveate.core.mechanism import Policy
from foveate.core.params import bounded, choice
from foveate.core.policy import Held, Merged

__all__ = ["MergeDropped"]

# bytes of similarities that are held at once
AT_ONCE = 16 << 20


@dataclass(frozen=True)
class MergeDropped(Policy):
    """Average each dropped entry into the most similar kept one; attach it beside a policy that says what stays.

    Args:
        least: Cosine of two keys below which the dropped entry leaves nothing behind.
        mass: Whether a merged entry counts for as many tokens as it took in; False: for one, as in the paper.

    Example:
        The head that looks for copies of a letter has one key per letter: of those that go, each is counted by a copy
        that stays.

        >>> import foveate
        >>> from foveate.compress import MergeDropped, Streaming
        >>> from foveate.testing import handmade
        >>> text = "aaabaaaacabab"
        >>> budget = foveate.Budget(4, sinks=1, recent=3, every=0)
        >>> policies = Streaming(budget), MergeDropped(mass=True)
        >>> with foveate.attach(handmade.model(), *policies) as attached:
        ...     cache = attached.model(handmade.ids(text)).past_key_values
        >>> handmade.kept(cache, text, layer=1)["same"]
        '··········bab'
        >>> store = cache.layers[1].store
        >>> [round(m) for m in store.spread(store.mass)[0, 1].tolist()]
        [1, 2, 9, 1]
    """

    least: float = bounded(0.9, -1.0, 1.0)
    mass: bool = choice(True, True, False)

    card: ClassVar = Card(
        title="D2O: Dynamic Discriminative Operations for Efficient Long-Context Inference of Large Language Models",
        year=2024,
        family="kv cache",
        needs=Needs.KEYS | Needs.VALUES,
        equation="k_j = (e m_j k_j + sum of e^u_i m_i k_i) / (e m_j + sum of e^u_i m_i), u_i = max_j cos(k_i, k_j); "
        "likewise v_j; m_j = m_j + sum of m_i",
        differs="which entries stay, and how many in each layer, is left to the policy beside it; the threshold is a "
        "fixed cosine, the paper's follows the mean of the best similarities; each head merges by its own similarities "
        "and threshold, the authors' code takes one decision for all heads; weights are those of the paper's equation, "
        "the authors' code divides sums weighted with u by the number of entries; masses m are from KeepKV's counted "
        "votes, mass=False is the paper. KVMerger merges neighbours only, with a Gaussian kernel on the distance of "
        "keys; CaM merges values only, into the entries that follow, at random",
        use="with a budget so small that what goes would be missed in sum, not one by one",
        misleads="keys carry their positions already: the mean of two rotary keys stands at neither place and is "
        "shorter than both, so that a low threshold does more harm than dropping. An entry that was merged is no token "
        "of the text any more, though it keeps one token's position",
    )
    test_params: ClassVar = ({"least": -1.0}, {"mass": False})

    def merge(self, held: Held, keep: Bool[Tensor, "batch kv_heads key"]) -> Merged:
        there = held.there
        # what is no entry may be anything, NaN too
        k, v = (torch.where(there[..., None], t.float(), 0.0) for t in (held.k, held.v))
        mass = torch.ones_like(held.before)
        if self.mass and held.mass is not None:
            mass = torch.where(there, held.mass, mass)

        gone, kept = numbered(there & ~keep), numbered(keep)
        into, u = nearest(torch.nn.functional.normalize(k, dim=-1), gone, kept, self.least)
        merged, gone = (gone >= 0) & (u >= self.least), gone.clamp_min(0)
        count = torch.where(merged, mass.gather(2, gone), 0.0)
        weight, own = torch.where(merged, u.exp() * count, 0.0), math.e * mass
        total = own.scatter_add(2, into, weight)[..., None]

        def averaged(rows: Float[Tensor, "batch kv_heads key width"]) -> Float[Tensor, "batch kv_heads key width"]:
            sums = own[..., None] * rows
            sums.scatter_add_(2, across(into, rows), weight[..., None] * rows.gather(2, across(gone, rows)))
            return sums / total

        return Merged(averaged(k), averaged(v), mass.scatter_add(2, into, count) if self.mass else mass)


def numbered(which: Bool[Tensor, "batch kv_heads key"]) -> Int[Tensor, "batch kv_heads most"]:
    """The numbers of the entries that are marked, -1 behind the last of a head."""
    count = which.sum(-1, keepdim=True)
    order = (~which).to(torch.uint8).argsort(dim=-1, stable=True)[..., : int(count.max())]
    return order.masked_fill(torch.arange(order.shape[-1], device=order.device) >= count, -1)


def across(index: Int[Tensor, "batch kv_heads some"], rows: Tensor) -> Int[Tensor, "batch kv_heads some width"]:
    """Numbers of entries, for each channel of rows."""
    return index[..., None].expand(*index.shape, rows.shape[-1])


def nearest(
    direction: Float[Tensor, "batch kv_heads key dim"],
    gone: Int[Tensor, "batch kv_heads gone"],
    kept: Int[Tensor, "batch kv_heads kept"],
    least: float,
) -> tuple[Int[Tensor, "batch kv_heads gone"], Float[Tensor, "batch kv_heads gone"]]:
    """The kept entry that each dropped one is most like, and the cosine; any one where that is below the least."""
    others = direction.gather(2, across(kept.clamp_min(0), direction)).transpose(-1, -2)
    none = kept[:, :, None] < 0
    holes, into, cosine = bool(none.any()), [], []
    # some dropped ones at a time
    for some in gone.split(max(1, AT_ONCE // (4 * kept.numel())), -1):
        u = direction.gather(2, across(some.clamp_min(0), direction)) @ others
        u = u.masked_fill_(none, -torch.inf) if holes else u
        # looking for where it is takes far longer than for how much
        best = u.amax(-1)
        near, at = best >= least, torch.zeros_like(some)
        at[near] = u[near].argmax(-1)
        into.append(at)
        cosine.append(best)
    return kept.clamp_min(0).gather(2, torch.cat(into, -1)), torch.cat(cosine, -1)
