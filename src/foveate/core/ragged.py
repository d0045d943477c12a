"""Keys and values of one layer, with a length of its own for every batch row and KV head.

All entries of a layer lie in flat tensors, one stretch of slots per batch row and KV head, in the order of their
original positions. What is dropped is gone: the stretches are written anew and the old tensors freed.

Attention needs no padding here. To the row kernel every (batch row, KV head) is an interval of the one flat list of
keys, so a head that keeps 68 tokens reads 68 keys, however many its neighbour keeps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core import native
from foveate.core.mask import Mask

__all__ = ["EMPTY", "Ragged"]

EMPTY = torch.iinfo(torch.int32).max
# rows that the kernel takes at once without packing the whole flat list for each head
KERNEL_ROWS = 96
SPARE = 32


@dataclass(eq=False)
class Ragged:
    """The entries of one layer's cache.

    Args:
        keys: One key per slot.
        values: One value per slot.
        position: Original position of each entry; `EMPTY` where a slot is free.
        score: What a policy said of each entry so far.
        start: First slot of each stretch.
        length: Entries in each stretch.
        room: Slots of each stretch.
    """

    keys: Float[Tensor, "slots dim"]
    values: Float[Tensor, "slots value_dim"]
    position: Int[Tensor, " slots"]
    score: Float[Tensor, " slots"]
    start: Int[Tensor, "batch kv_heads"]
    length: Int[Tensor, "batch kv_heads"]
    room: Int[Tensor, "batch kv_heads"]

    # ---------------------------------------------------------------- making one

    @classmethod
    def packed(
        cls,
        keys: Float[Tensor, "entries dim"],
        values: Float[Tensor, "entries value_dim"],
        position: Int[Tensor, " entries"],
        score: Float[Tensor, " entries"],
        length: Int[Tensor, "batch kv_heads"],
        spare: int | None = None,
    ) -> Ragged:
        """From entries in order of batch row, KV head and position.

        Args:
            keys: The keys.
            values: The values.
            position: Original positions.
            score: What a policy said of them.
            length: How many entries each stretch has.
            spare: Free slots behind each stretch; None: one in 32, at least 16.
        """
        room = length + (spare if spare is not None else (length // SPARE).clamp_min(16))
        ends = room.flatten().cumsum(0)
        start = (ends - room.flatten()).reshape(room.shape)
        counts = length.flatten()
        before = counts.cumsum(0) - counts
        to = torch.repeat_interleave(start.flatten() - before, counts) + torch.arange(len(keys), device=keys.device)
        slots = int(ends[-1])
        made = cls(
            keys.new_empty(slots, keys.shape[1]),
            values.new_empty(slots, values.shape[1]),
            torch.full((slots,), EMPTY, dtype=torch.int32, device=keys.device),
            torch.zeros(slots, device=keys.device),
            start,
            length.clone(),
            room,
        )
        made.keys[to], made.values[to] = keys, values
        made.position[to], made.score[to] = position.to(torch.int32), score.float()
        return made

    @classmethod
    def of_call(
        cls,
        k: Float[Tensor, "batch kv_heads key dim"],
        v: Float[Tensor, "batch kv_heads key value_dim"],
        keep: Bool[Tensor, "batch kv_heads key"],
        score: Float[Tensor, "batch kv_heads key"],
        first: int = 0,
        spare: int | None = None,
    ) -> Ragged:
        """From the keys and values of one call, of which `keep` stay; what is dropped is never stored.

        The first key stands at position `first`.
        """
        at = keep.nonzero(as_tuple=True)
        return cls.packed(k[at], v[at], at[2] + first, score[at], keep.sum(-1), spare)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.keys, self.values, self.position, self.score, self.start, self.length, self.room)

    def bytes_held(self) -> int:
        """Bytes of all tensors, free slots included."""
        return sum(t.untyped_storage().nbytes() for t in self.tensors)

    # ---------------------------------------------------------------- growing and dropping

    def append(
        self,
        k: Float[Tensor, "batch kv_heads new dim"],
        v: Float[Tensor, "batch kv_heads new value_dim"],
        at: int,
        valid: Bool[Tensor, "batch new"] | None = None,
    ) -> Ragged:
        """Adds the tokens at positions at, at + 1, …; padded ones are left out. Returns the storage to go on with."""
        batch, heads, new = k.shape[:3]
        count = torch.full((batch, 1), new) if valid is None else valid.sum(1, keepdim=True)
        count = count.to(self.length)
        grown = self
        if bool((self.length + count > self.room).any()):
            grown = self.select(self.held, int(count.max()) + max(16, int(self.length.max()) // SPARE))
        rank = torch.arange(new, device=k.device) if valid is None else valid.cumsum(1)[:, None] - 1
        slot = ((grown.start + grown.length)[..., None] + rank).expand(batch, heads, new)
        position = torch.arange(at, at + new, dtype=torch.int32, device=k.device).expand(batch, heads, new)
        if valid is None:
            slot, k, v, position = slot.flatten(), k.flatten(0, 2), v.flatten(0, 2), position.flatten()
        else:
            real = valid[:, None].expand(batch, heads, new)
            slot, k, v, position = slot[real], k[real], v[real], position[real]
        grown.keys[slot], grown.values[slot] = k, v
        grown.position[slot], grown.score[slot] = position, 0.0
        grown.length += count
        return grown

    def select(self, keep: Bool[Tensor, "batch kv_heads entry"], spare: int | None = None) -> Ragged:
        """The entries that stay, in storage of their own; `keep` counts within each stretch."""
        at = keep.nonzero(as_tuple=True)
        slot = self.start[at[0], at[1]] + at[2]
        length = keep.sum(-1)
        return Ragged.packed(self.keys[slot], self.values[slot], self.position[slot], self.score[slot], length, spare)

    def scored(self, score: Float[Tensor, "batch kv_heads entry"]) -> Ragged:
        """The same entries with new scores; nothing else is copied."""
        at = self.held.nonzero(as_tuple=True)
        fresh = self.score.clone()
        fresh[self.start[at[0], at[1]] + at[2]] = score[at]
        return replace(self, score=fresh)

    def rows(self, index: Int[Tensor, " chosen"]) -> Ragged:
        """The batch rows of `index`, in its order, repeats allowed (beam search)."""
        held = self.held[index]
        at = held.nonzero(as_tuple=True)
        slot = self.start[index][at[0], at[1]] + at[2]
        return Ragged.packed(self.keys[slot], self.values[slot], self.position[slot], self.score[slot], held.sum(-1))

    # ---------------------------------------------------------------- looking at it

    @property
    def held(self) -> Bool[Tensor, "batch kv_heads entry"]:
        """Which of the first `longest` places of each stretch hold an entry."""
        return torch.arange(self.longest, device=self.keys.device) < self.length[..., None]

    @property
    def longest(self) -> int:
        return int(self.length.max())

    def spread(self, flat: Tensor) -> Tensor:
        """A flat tensor as [batch, kv_heads, entry, ...]; what stands behind a stretch's end is anything."""
        size, longest = self.start.shape, self.longest
        if bool((self.room == self.room[0, 0]).all()):
            return flat.unflatten(0, (*size, int(self.room[0, 0])))[:, :, :longest]
        at = self.start[..., None] + torch.arange(longest, device=flat.device)
        return flat[at.clamp_max(len(flat) - 1)]

    def positions(self) -> Int[Tensor, "batch kv_heads entry"]:
        """Original positions of the entries, `EMPTY` behind the end of a stretch."""
        return self.spread(self.position).masked_fill(~self.held, EMPTY)

    def entries(
        self, mask: Mask, share: int
    ) -> tuple[Float[Tensor, "batch kv_heads entry dim"], Float[Tensor, "batch kv_heads entry value_dim"], Mask]:
        """Keys, values and mask on the axis of the entries, which `share` query heads read: what a policy scores."""
        at = self.positions()
        if mask.dense is None and bool((at[:, :1] == at).all()) and self.sees_all(mask):
            plain = Mask.full(mask.queries, self.longest, mask.device)
            return self.spread(self.keys), self.spread(self.values), replace(plain, position=mask.position)
        low, high = mask.low[:, None], mask.high[:, None]

        def dense(a: int, b: int, i: int, j: int) -> Tensor:
            block = at[:, :, None, i:j]
            seen = (block >= low[:, :, a:b, None]) & (block < high[:, :, a:b, None])
            block = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -torch.inf)
            return block.repeat_interleave(share, 1)

        sees = (mask.high > mask.low).to(torch.int32).expand(len(at), -1)
        whole = replace(
            mask,
            low=torch.zeros_like(sees),
            high=sees * self.longest,
            keys=self.longest,
            causal=False,
            key_offset=0,
            begin=None,
            dense=dense,
        )
        return self.spread(self.keys), self.spread(self.values), whole

    def by_position(
        self, mask: Mask, share: int
    ) -> tuple[Float[Tensor, "batch kv_heads key dim"], Float[Tensor, "batch kv_heads key value_dim"], Mask]:
        """Keys and values at their original positions, and the mask with holes: what metrics and edits see."""
        batch, heads = self.start.shape
        at = self.held.nonzero(as_tuple=True)
        slot = self.start[at[0], at[1]] + at[2]
        to = (at[0], at[1], self.position[slot].long())
        k = self.keys.new_zeros(batch, heads, mask.keys, self.keys.shape[1])
        v = self.values.new_zeros(batch, heads, mask.keys, self.values.shape[1])
        k[to], v[to] = self.keys[slot], self.values[slot]
        there = torch.zeros(batch, heads, mask.keys, dtype=torch.bool, device=k.device)
        there[to] = True
        if mask.dense is None and bool((there | (torch.arange(mask.keys) < mask.low.min())).all()):
            return k, v, mask

        def dense(a: int, b: int, i: int, j: int) -> Tensor:
            rows = torch.arange(a, b, device=k.device)
            gone = ~there[:, :, None, i:j].repeat_interleave(share, 1)
            return mask.additive(rows, i, j).masked_fill(gone, -torch.inf)

        return k, v, replace(mask, dense=dense)

    def sees_all(self, mask: Mask) -> bool:
        """Whether every row of the mask sees every entry."""
        if mask.dense is not None:
            return False
        last = self.position.gather(0, (self.start + self.length - 1).clamp_min(0).flatten()).view_as(self.start)
        first = self.position.gather(0, self.start.flatten()).view_as(self.start)
        low, high = mask.low.amax(-1)[:, None], mask.high.amin(-1)[:, None]
        return bool(((first >= low) & (last < high) & (self.length > 0)).all())

    def intervals(self, mask: Mask) -> tuple[Int[Tensor, "batch kv_heads query"], Int[Tensor, "batch kv_heads query"]]:
        """The slots lo <= slot < hi that each row sees, per KV head."""
        shape = (*self.start.shape, mask.queries)
        start = self.start[..., None]
        if self.sees_all(mask):
            return start.expand(shape), (start + self.length[..., None]).expand(shape)
        at = self.positions().contiguous()
        low, high = (x[:, None].to(torch.int32).expand(shape).contiguous() for x in (mask.low, mask.high))
        return start + torch.searchsorted(at, low), start + torch.searchsorted(at, high)

    # ---------------------------------------------------------------- attention without padding

    def kernel_refuses(self, mask: Mask) -> bool:
        """Whether attention must go through `entries` instead of the kernel."""
        wide = max(self.keys.shape[1], self.values.shape[1]) > 256
        return mask.dense is not None or wide or self.keys.device.type != "cpu" or not native.available()

    def attend(
        self,
        q: Float[Tensor, "batch heads query dim"],
        mask: Mask,
        scale: float,
        softcap: float | None = None,
        sinks: Float[Tensor, " heads"] | None = None,
    ) -> Float[Tensor, "batch heads query value_dim"]:
        """Attention of the rows over the entries that each of their heads keeps, with the native kernel."""
        batch, kv_heads = self.start.shape
        heads, queries = q.shape[1:3]
        share, pairs = heads // kv_heads, batch * kv_heads
        lo, hi = (x.reshape(pairs, queries).to(torch.int32) for x in self.intervals(mask))
        rows = q.reshape(pairs, share, queries, q.shape[3])
        k, v = self.keys.float()[None, None], self.values.float()[None, None]
        slots = torch.arange(len(self.keys), dtype=torch.int32)[None]
        out = q.new_empty(pairs, share, queries, self.values.shape[1])
        # a learned sink belongs to a query head, and the kernel knows one set of them per call
        groups = [slice(None)] if sinks is None else [slice(h, None, kv_heads) for h in range(kv_heads)]
        step = max(1, KERNEL_ROWS // share)
        for n, pick in enumerate(groups):
            some = rows[pick]
            for a in range(0, queries, step):
                b = min(queries, a + step)
                out[pick, :, a:b] = native.attend(
                    some[:, :, a:b].float(),
                    k.expand(len(some), -1, -1, -1),
                    v.expand(len(some), -1, -1, -1),
                    scale=scale,
                    lo=lo[pick, a:b],
                    hi=hi[pick, a:b],
                    query_position=torch.zeros(1, b - a, dtype=torch.int32),
                    key_position=slots,
                    softcap=softcap,
                    sinks=None if sinks is None else sinks[n * share : (n + 1) * share],
                ).out.to(q.dtype)
        return out.reshape(batch, heads, queries, -1)
