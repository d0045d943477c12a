"""What a KV policy sees, and what is done with its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core.budget import Budget, newest
from foveate.core.cache import RaggedLayer
from foveate.core.card import Needs
from foveate.core.errors import BadInput, NotSupported
from foveate.core.mask import Mask
from foveate.core.mechanism import Tilt
from foveate.core.ragged import EMPTY, ENTRY_BYTES, SIDES, Ragged
from foveate.core.reductions import Last
from foveate.core.rows import Rows, View, attend

if TYPE_CHECKING:
    from foveate.core.mechanism import Policy

__all__ = ["PARTS", "Held", "Merged", "Policies", "Reading", "chosen", "compress", "reads_rows"]

# what policies can do, and how it is told
PARTS = {
    "score": "say which entries stay",
    "merge": "say what the dropped leave behind",
    "store": "say how entries are stored",
    "read": "say which entries are read",
}


@dataclass(frozen=True)
class Policies:
    """The policies of a stack as one: each part by whoever has it.

    Args:
        score: Which entries stay; None: all.
        merge: What those that go leave behind; None: nothing.
        store: In which form entries are kept; None: as the model makes them.
        read: Which entries a decoded token looks at; None: all.
    """

    score: Policy | None = None
    merge: Policy | None = None
    store: Policy | None = None
    read: Policy | None = None

    @classmethod
    def of(cls, policies: Sequence[Policy]) -> Policies:
        """From those that are attached.

        Raises:
            BadInput: two of them do the same.
        """
        found: dict[str, Policy] = {}
        for policy in policies:
            for part in sorted(policy.parts):
                if part in found:
                    raise BadInput(
                        f"{type(found[part]).__name__} and {type(policy).__name__} both {PARTS[part]}; leave one of "
                        "them out"
                    )
                found[part] = policy
        return cls(**found)

    @property
    def limits(self) -> Budget:
        """How much stays."""
        return Budget(1.0) if self.score is None else self.score.limits

    def needs(self) -> tuple[Any, ...]:
        """Reductions that the choice reads."""
        return () if self.score is None or self.limits.whole else self.score.needs()


@dataclass(eq=False)
class Held:
    """What a layer's cache holds, and the rows that have just looked at it.

    Args:
        rows: The last queries with the reductions that the policy asked for; its view has the keys and values.
        position: Original position of each entry; `EMPTY` where there is none.
        before: The score that the policy gave an entry the last time; 0 for one that is new.
        room: How many entries may stay; where heads compete, the even share.
        mass: How many tokens each entry stands for; 1 unless entries were merged.
    """

    rows: Rows
    position: Int[Tensor, "batch kv_heads key"]
    before: Float[Tensor, "batch kv_heads key"]
    room: Int[Tensor, "batch kv_heads"]
    mass: Float[Tensor, "batch kv_heads key"] | None = None

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


@dataclass(frozen=True, eq=False)
class Merged:
    """What entries are to be, now that others go; only those that stay are read from it.

    Args:
        k: Keys.
        v: Values.
        mass: How many tokens each stands for: its weight in a row is that of so many copies.
    """

    k: Float[Tensor, "batch kv_heads key dim"]
    v: Float[Tensor, "batch kv_heads key value_dim"]
    mass: Float[Tensor, "batch kv_heads key"]


@dataclass(eq=False)
class Reading:
    """A decoded token in front of the cache of a layer, its own key among the entries.

    Args:
        view: The call: the query, scale, soft cap, learned sinks and layer. Its keys are those of the token alone.
        mask: Which positions it sees.
        layers: The layers of the cache.
        at: Which of them this is.
        room: How many entries may be read.
        budget: The budget in full; its sinks and recent tokens are always read.
    """

    view: View
    mask: Mask
    layers: Sequence[RaggedLayer]
    at: int
    room: Int[Tensor, "batch kv_heads"]
    budget: Budget

    @property
    def store(self) -> Ragged:
        """The entries as they are stored."""
        store = self.layers[self.at].store
        assert store is not None
        return store

    @property
    def state(self) -> dict[str, Tensor]:
        """What the policy keeps of this layer between two tokens; tensors [batch, ...], forgotten when entries move."""
        return self.layers[self.at].state

    @property
    def q(self) -> Float[Tensor, "batch kv_heads share dim"]:
        """The query heads of each KV head."""
        return self.view.q[:, :, -1].unflatten(1, (self.view.kv_heads, -1))

    @cached_property
    def k(self) -> Float[Tensor, "batch kv_heads entry dim"]:
        """The keys of the entries."""
        return self.store.spread(self.store.keys)

    @cached_property
    def position(self) -> Int[Tensor, "batch kv_heads entry"]:
        """Original position of each entry; `EMPTY` where there is none."""
        return self.store.positions()

    @cached_property
    def there(self) -> Bool[Tensor, "batch kv_heads entry"]:
        """Where there is an entry that the token sees."""
        low, high = self.mask.low[:, None, -1:], self.mask.high[:, None, -1:]
        return (self.position != EMPTY) & (self.position >= low) & (self.position < high)

    def weights(self) -> Float[Tensor, "batch kv_heads share entry"]:
        """The weights of the token's own row over all entries."""
        view = self.view
        s = view.scale * (self.q.float() @ self.k.float().transpose(-1, -2))
        if view.softcap is not None:
            s = view.softcap * torch.tanh(s / view.softcap)
        if self.store.mass is not None:
            s = s + self.store.spread(self.store.mass).log()[:, :, None]
        s = s.masked_fill(~self.there[:, :, None], -torch.inf)
        if view.sinks is None:
            return s.softmax(-1)
        extra = view.sinks.float().unflatten(0, (view.kv_heads, -1))[None, ..., None].expand(len(s), -1, -1, -1)
        return torch.cat([s, extra], -1).softmax(-1)[..., :-1]

    def best(self, score: Float[Tensor, "batch kv_heads entry"]) -> Int[Tensor, "batch kv_heads chosen"]:
        """The entries of highest score that may be read, those that the budget pins first; -1 behind the last."""
        pinned = self.budget.pinned(self.position != EMPTY)
        ranked = score.float().masked_fill(pinned, torch.inf).masked_fill(~self.there, -torch.inf)
        found = ranked.topk(min(int(self.room.max()), ranked.shape[-1]), -1, sorted=True)
        rank = torch.arange(found.indices.shape[-1], device=score.device)
        beyond = (rank >= self.room[..., None]) | (found.values == -torch.inf)
        return found.indices.masked_fill(beyond, -1)


def chosen(
    policies: Policies, layers: Sequence[RaggedLayer], at: int, view: View, mask: Mask
) -> Int[Tensor, "batch kv_heads chosen"] | None:
    """Which entries the token of this call looks at; None: all. Only single tokens choose.

    Raises:
        BadInput: a choice of another shape than [batch, kv_heads, chosen], or of entries that are not there.
    """
    policy = policies.read
    if policy is None or view.queries > 1 or policy.limits.whole:
        return None
    layer = layers[at]
    room = policy.counts(layer.real, at, len(layers), view.kv_heads, entry_bytes(view, policies, at))
    only = policy.read(Reading(view, mask, layers, at, room, policy.limits))
    if only is None:
        return None
    if only.ndim != 3 or only.shape[:2] != room.shape or (only.numel() and int(only.max()) >= layer.store.longest):
        raise BadInput(
            f"{type(policy).__name__}.read gave {tuple(only.shape)}; it must be the numbers of entries, [batch, "
            f"kv_heads, chosen] with {tuple(room.shape)} in front, below {layer.store.longest}"
        )
    return only


def reads_rows(policy: Policy) -> bool:
    """Whether a policy looks at queries or weights, which must then be kept between two rounds of dropping."""
    return bool(policy.needs()) or Needs.QUERIES in policy.card.needs


def compress(
    policies: Policies, layers: Sequence[RaggedLayer], at: int, view: View, mask: Mask, rows: Rows | None
) -> None:
    """Drops what the policies say, and of a first call stores only the rest: in one step, or not at all.

    Args:
        policies: Which keys stay, and what becomes of them.
        layers: The layers of this cache that are ragged.
        at: Which of them the call was for.
        view: The queries, keys and values of the call itself.
        mask: Which positions its rows see.
        rows: What the engine gave for a first call, the policy's reductions in it; None: the cache held entries.
    """
    layer, policy, budget = layers[at], policies.score, policies.limits
    store = None if policies.store is None else partial(policies.store.store, layer=at)
    if policy is None or (budget.whole and rows is None):
        layer.settle(mask.valid, store)
        layer.fade(budget.sinks if policy else 0)
        return
    if rows is None:
        layer.since += view.queries
        due = view.queries > 1 or (budget.every > 0 and layer.since >= budget.every)
        if reads_rows(policy) and (due or budget.every > 0):
            layer.watched.add(view.q, mask)
        if not due:
            if not budget.every:
                layer.fade(budget.sinks)
            return
    real = layer.counted(mask.valid) if rows is not None else layer.real
    share = partial(
        policy.counts,
        layer=at,
        layers=len(layers),
        kv_heads=view.kv_heads,
        entry_bytes=entry_bytes(view, policies, at),
    )
    counts = share(real + budget.waiting) - budget.waiting
    held = of_call(layer, rows, counts) if rows is not None else of_store(layer, view, mask, policy, counts)
    score = torch.zeros_like(held.before) if budget.whole else scored(policy, held)
    if layer.horizon:
        left = layer.out_of_sight(held.position, budget.sinks)
        held = replace(held, position=held.position.masked_fill(left, EMPTY))
        layer.faded = layer.horizon
    pinned = budget.pinned(held.there) | policy.pinned(held)
    ranked = score.masked_fill(pinned, torch.finfo(score.dtype).max)
    ranked = ranked.masked_fill(~held.there, -torch.inf)
    if budget.heads == "layer":
        counts = budget.compete(ranked, counts)
    elif budget.heads == "model":
        layer.waiting = ranked_of(ranked, held.there), counts
        counts = held.there.sum(-1)
    spare = budget.every or None
    keep = best(ranked, counts)
    merged = None
    if policies.merge is not None and bool((keep != held.there).any()):
        merged = policies.merge.merge(held, keep)
    if rows is not None:
        assert layer.pending is not None
        k, v = (t.detach() for t in (layer.pending if merged is None else (merged.k, merged.v)))
        mass = None if merged is None else merged.mass
        layer.store = Ragged.of_call(
            k.to(view.k.dtype), v.to(view.v.dtype), keep, score, layer.seen - view.queries, spare, mass, store
        )
        layer.pending, layer.real = None, real
    elif merged is None:
        layer.store = layer.store.scored(score).select(keep, spare)
    else:
        layer.store = layer.store.scored(score).rewritten(merged.k, merged.v, merged.mass, keep, spare)
    layer.since = 0
    layer.state.clear()
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
        one.state.clear()


def ranked_of(
    ranked: Float[Tensor, "batch kv_heads key"], there: Bool[Tensor, "batch kv_heads key"]
) -> Float[Tensor, "batch kv_heads entry"]:
    """Ranks in the order in which those that are there will be stored; -inf behind the last."""
    order = there.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., : int(there.sum(-1).max())]
    return ranked.gather(-1, order).masked_fill(~there.gather(-1, order), -torch.inf)


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
    mass = store.spread(store.mass) if store.mass is not None else None
    tilt = None if mass is None else Tilt(bias=mass.log().repeat_interleave(view.grouped, 1))
    seen = replace(view, q=q, k=k, v=v, mask=mask, bias=None, tokens=None, tilt=tilt)
    rows = attend(seen, policy.needs()) if policy.needs() else Rows(seen, q[:0], {}, "none")
    return Held(rows, store.positions(), store.spread(store.score), counts, mass)


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


def entry_bytes(view: View, policies: Policies, layer: int) -> int:
    """What one entry of a layer takes: key, value, position, score, and its mass where entries are merged."""
    rows = [(t.shape[3], t.dtype) for t in (view.k, view.v)]
    if policies.store is None:
        stored = sum(width * dtype.itemsize for width, dtype in rows)
    else:
        stored = sum(policies.store.row_bytes(*row, side, layer) for row, side in zip(rows, SIDES, strict=True))
    return stored + ENTRY_BYTES + (0 if policies.merge is None else 4)
