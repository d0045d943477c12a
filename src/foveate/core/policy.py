"""What a KV policy sees and what is done with its scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core.budget import Budget, newest
from foveate.core.cache import RaggedLayer
from foveate.core.card import Needs
from foveate.core.errors import BadInput, NotSupported
from foveate.core.mask import Mask
from foveate.core.ragged import EMPTY, Ragged
from foveate.core.reductions import Last
from foveate.core.rows import Rows, View, attend

if TYPE_CHECKING:
    from foveate.core.mechanism import Policy

__all__ = ["Held", "compress", "reads_rows"]


@dataclass(eq=False)
class Held:
    """What a layer's cache holds, and the rows that have just looked at it.

    Args:
        rows: The last queries with the reductions that the policy asked for; its view has the keys and values.
        position: Original position of each entry; `EMPTY` where there is none.
        before: The score that the policy gave an entry the last time; 0 for one that is new.
        room: How many entries may stay; where heads compete, the even share.
    """

    rows: Rows
    position: Int[Tensor, "batch kv_heads key"]
    before: Float[Tensor, "batch kv_heads key"]
    room: Int[Tensor, "batch kv_heads"]

    @property
    def k(self) -> Float[Tensor, "batch kv_heads key dim"]:
        return self.rows.view.k

    @property
    def v(self) -> Float[Tensor, "batch kv_heads key value_dim"]:
        return self.rows.view.v

    def newest(self, count: int | Tensor) -> Bool[Tensor, "batch kv_heads key"]:
        """The last `count` entries of each head; a tensor says it per row and head, as [batch, kv_heads, 1]."""
        return newest(self.there, count)

    @property
    def there(self) -> Bool[Tensor, "batch kv_heads key"]:
        """Where there is an entry."""
        return self.position != EMPTY

    def window(self, count: int) -> Float[Tensor, "batch kv_heads key"]:
        """Mean weight that the last `count` real rows give each entry, over them and the heads that share it.

        The policy must have asked for `Last(count)`.
        """
        last = Last(count)
        sampled = self.rows[last]
        mine = last.members(self.rows.view)[:, sampled.index]
        total = torch.where(mine[:, None, :, None], sampled.weights, 0.0).sum(2)
        return self.by_kv_head(total).mean(2) / mine.sum(-1).clamp_min(1)[:, None, None]

    def by_kv_head(self, per_head: Float[Tensor, "batch heads ..."]) -> Float[Tensor, "batch kv_heads share ..."]:
        """The query heads of each KV head side by side, to take their mean or maximum."""
        return per_head.unflatten(1, (self.rows.view.kv_heads, -1))


def reads_rows(policy: Policy) -> bool:
    """Whether a policy looks at queries or weights, which must then be kept between two rounds of dropping."""
    return bool(policy.needs()) or Needs.QUERIES in policy.card.needs


def compress(policy: Policy, layers: Sequence[RaggedLayer], at: int, view: View, mask: Mask, rows: Rows | None) -> None:
    """Drops what the policy says, and of a first call stores only the rest: in one step, or not at all.

    Args:
        policy: Which keys stay.
        layers: The layers of this cache that are ragged.
        at: Which of them the call was for.
        view: The queries, keys and values of the call itself.
        mask: Which positions its rows see.
        rows: What the engine gave for a first call, the policy's reductions in it; None: the cache held entries.
    """
    layer, budget = layers[at], policy.limits
    if rows is None:
        layer.since += view.queries
        due = view.queries > 1 or (budget.every > 0 and layer.since >= budget.every)
        if reads_rows(policy) and not budget.whole and (due or budget.every > 0):
            layer.watched.add(view.q, mask)
        if not due or budget.whole:
            return
    real = layer.counted(mask.valid) if rows is not None else layer.real
    share = partial(budget.counts, layer=at, layers=len(layers), kv_heads=view.kv_heads, entry_bytes=entry_bytes(view))
    counts = share(real + budget.waiting) - budget.waiting
    held = of_call(layer, rows, counts) if rows is not None else of_store(layer, view, mask, policy, counts)
    score = torch.zeros_like(held.before) if budget.whole else scored(policy, held)
    pinned = budget.pinned(held.there) | policy.pinned(held)
    ranked = score.masked_fill(pinned, torch.finfo(score.dtype).max)
    ranked = ranked.masked_fill(~held.there, -torch.inf)
    if budget.heads == "layer":
        counts = budget.compete(ranked, counts)
    elif budget.heads == "model":
        layer.waiting = ranked, counts
        counts = held.there.sum(-1)
    spare = budget.every or None
    keep = best(ranked, counts)
    if rows is not None:
        assert layer.pending is not None
        k, v = (t.detach() for t in layer.pending)
        layer.store = Ragged.of_call(k, v, keep, score, layer.seen - view.queries, spare)
        layer.pending, layer.real = None, real
    else:
        layer.store = layer.store.scored(score).select(keep, spare)
    layer.since = 0
    if budget.heads == "model" and at == len(layers) - 1:
        among_all(budget, [one for one in layers if one.waiting is not None])


def among_all(budget: Budget, layers: Sequence[RaggedLayer]) -> None:
    """Drops entries of all layers that wait for it, whose heads share one budget."""
    longest = max(one.waiting[0].shape[-1] for one in layers)
    ranked = [
        torch.nn.functional.pad(one.waiting[0], (0, longest - one.waiting[0].shape[-1]), value=-torch.inf)
        for one in layers
    ]
    shares = budget.compete(torch.cat(ranked, 1), torch.cat([one.waiting[1] for one in layers], 1))
    for one, mine in zip(layers, shares.split([r.shape[1] for r in ranked], 1), strict=True):
        one.store = one.store.select(best(one.waiting[0], mine), budget.every or None)
        one.waiting = None


def of_call(layer: RaggedLayer, rows: Rows, counts: Tensor) -> Held:
    """A cache that is about to be filled: the entries are the keys of the call."""
    view = rows.view
    shape = (view.batch, view.kv_heads, view.keys)
    position = torch.arange(view.keys, device=view.k.device).expand(shape)
    if view.mask.valid is not None:
        position = position.masked_fill(~view.mask.valid[:, None], EMPTY)
    return Held(rows, position, torch.zeros(shape, device=view.k.device), counts)


def of_store(layer: RaggedLayer, view: View, mask: Mask, policy: Policy, counts: Tensor) -> Held:
    """A cache that holds entries, as the queries since the last round see them.

    Raises:
        NotSupported: the model adds a bias per position, which is not kept with the queries.
    """
    store = layer.store
    q = view.q
    if reads_rows(policy):
        if view.bias is not None:
            raise NotSupported(
                f"{type(policy).__name__} reads the weights of decoding, and {view.layer.name} adds a bias per "
                "position to them; compress the prompt only, with Budget(…, every=0), or take a policy of keys alone"
            )
        q, mask = layer.watched.take(layer.seen)
    k, v, mask = store.entries(mask, view.grouped)
    seen = replace(view, q=q, k=k, v=v, mask=mask, bias=None, tokens=None)
    rows = attend(seen, policy.needs()) if policy.needs() else Rows(seen, q[:0], {}, "none")
    return Held(rows, store.positions(), store.spread(store.score), counts)


def scored(policy: Policy, held: Held) -> Float[Tensor, "batch kv_heads key"]:
    """The policy's scores, checked.

    Raises:
        BadInput: scores of another shape than the entries.
    """
    score = policy.score(held)
    if score.shape != held.position.shape:
        raise BadInput(
            f"{type(policy).__name__}.score gave {tuple(score.shape)}; the entries are {tuple(held.position.shape)}, "
            "[batch, kv_heads, key]"
        )
    return score.detach().float().masked_fill(~held.there, 0.0)


def best(
    ranked: Float[Tensor, "batch kv_heads key"], counts: Int[Tensor, "batch kv_heads"]
) -> Bool[Tensor, "batch kv_heads key"]:
    """The `counts` entries of highest rank, of those that exist; the later one where two are equal."""
    there = ranked > -torch.inf
    if bool((there.sum(-1) <= counts).all()):
        return there
    order = ranked.flip(-1).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return (rank.flip(-1) < counts[..., None]) & there


def entry_bytes(view: View) -> int:
    """What one entry takes: key, value, position and score."""
    return view.k.shape[3] * view.k.element_size() + view.v.shape[3] * view.v.element_size() + 8
