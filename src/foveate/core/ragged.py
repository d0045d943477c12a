"""Keys and values of one layer, with a length of its own for every batch row and KV head.

All entries of a layer lie in flat tensors, one stretch of slots per batch row and KV head, in the order of their
original positions. What is dropped is gone: the stretches are written anew and the old tensors freed.

Attention needs no padding here. To the row kernel every (batch row, KV head) is an interval of the one flat list of
keys, so a head that keeps 68 tokens reads 68 keys, however many its neighbour keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core import native
from foveate.core.mask import Mask

__all__ = ["EMPTY", "ENTRY_BYTES", "SIDES", "Packed", "Ragged", "Side", "Store", "numbers", "tensors_in"]

EMPTY = torch.iinfo(torch.int32).max
# with each entry of a head its position and its score
ENTRY_BYTES = 8
# rows that the kernel takes at once without packing the whole flat list for each head
KERNEL_ROWS = 96
SPARE = 32


class Packed:
    """Rows in a form of their own, where attention over a cache expects a tensor [slots, width].

    A subclass holds its tensors as attributes; what it takes and gives is in the dtype of the model.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    def __len__(self) -> int:
        return self.shape[0]

    def new_empty(self, slots: int, width: int) -> Packed:
        """Storage of the same form."""
        raise NotImplementedError

    def __getitem__(self, index: Any) -> Packed:
        """Some rows, as they are stored; a tensor index [...] gives rows in the shape of the index."""
        raise NotImplementedError

    def __setitem__(self, index: Any, rows: Tensor | Packed) -> None:
        """Stores rows; those that are in this form already are copied."""
        raise NotImplementedError

    def dense(self) -> Float[Tensor, "*rows width"]:
        """The rows as numbers."""
        raise NotImplementedError

    @property
    def breadth(self) -> int:
        """Channels of a row as the kernel reads it."""
        return self.shape[1]

    def readable(self) -> Tensor | native.Codes:
        """The rows as the kernel reads them; by default as numbers."""
        return self.dense()

    def turned(self, rows: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows read"]:
        """Rows of numbers in the basis of those that are read, and back again: queries, and what mixes values."""
        return rows


Storage = Any
Side = Literal["keys", "values"]
SIDES: tuple[Side, Side] = ("keys", "values")
Store = Callable[[Tensor, int, Side], Storage]


def numbers(rows: Tensor | Packed) -> Tensor:
    """Rows as numbers, whatever they are stored in."""
    return rows.dense() if isinstance(rows, Packed) else rows


def read(rows: Tensor | Packed) -> Tensor | native.Codes:
    """Rows as the kernel reads them, none of them copied where that can be."""
    found = rows.readable() if isinstance(rows, Packed) else rows
    return found.float() if isinstance(found, Tensor) and found.dtype == torch.float16 else found


def turned(stored: Tensor | Packed, rows: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows read"]:
    """Rows of numbers in the basis of what is read, and back again."""
    return stored.turned(rows) if isinstance(stored, Packed) else rows


def tensors_in(rows: Tensor | Packed) -> list[Tensor]:
    """The tensors that rows are stored in."""
    return [x for x in vars(rows).values() if isinstance(x, Tensor)] if isinstance(rows, Packed) else [rows]


def stacked(parts: Sequence[Packed]) -> Packed:
    """Rows in the same form, one part behind the other."""
    whole, done = parts[0].new_empty(sum(map(len, parts)), parts[0].shape[1]), 0
    for part in parts:
        whole[done : done + len(part)] = part
        done += len(part)
    return whole


def gathered(rows: Tensor | Packed, at: tuple[Int[Tensor, " some"], ...]) -> Storage:
    """rows[at], a row at a time where they lie one behind the other, in whatever order of dimensions."""
    width = rows.shape[-1]
    if isinstance(rows, Packed) or rows.stride(-1) != 1 or any(step % width for step in rows.stride()[:-1]):
        return rows[at]
    steps = [step // width for step in rows.stride()[:-1]]
    count = 1 + sum((size - 1) * step for size, step in zip(rows.shape, steps, strict=False))
    number = sum((index * step for index, step in zip(at, steps, strict=True)), torch.zeros_like(at[0]))
    return rows.as_strided((count, width), (width, 1)).index_select(0, number)


@dataclass
class Edges:
    """What the entries of all stretches lie between, as numbers that a decoded token need not look up again.

    Args:
        earliest: First position of all.
        latest: Last position of all.
        shortest: Entries of the shortest stretch; at 0 the positions are anything.
        longest: Entries of the longest stretch.
        free: Free slots of the fullest stretch.
    """

    earliest: int
    latest: int
    shortest: int
    longest: int
    free: int


@dataclass(eq=False)
class Ragged:
    """The entries of one layer's cache.

    Args:
        keys: One key per slot, as a tensor or `Packed`.
        values: One value per slot.
        position: Original position of each entry; `EMPTY` where a slot is free.
        score: What a policy said of each entry so far.
        start: First slot of each stretch.
        length: Entries in each stretch.
        room: Slots of each stretch.
        mass: How many tokens each entry stands for, where some stand for more than themselves; None: all for one.
    """

    keys: Storage
    values: Storage
    position: Int[Tensor, " slots"]
    score: Float[Tensor, " slots"]
    start: Int[Tensor, "batch kv_heads"]
    length: Int[Tensor, "batch kv_heads"]
    room: Int[Tensor, "batch kv_heads"]
    mass: Float[Tensor, " slots"] | None = None

    # ---------------------------------------------------------------- making one

    @classmethod
    def laid(
        cls,
        keys: Storage,
        values: Storage,
        at: tuple[Int[Tensor, " entries"], ...],
        position: Int[Tensor, " entries"],
        score: Float[Tensor, " entries"],
        length: Int[Tensor, "batch kv_heads"],
        spare: int | None = None,
        mass: Float[Tensor, " entries"] | None = None,
        store: Store | None = None,
    ) -> Ragged:
        """Some rows as entries, in storage of their own.

        Args:
            keys: Keys, [..., dim].
            values: Values, [..., value_dim].
            at: Which of them, in order of batch row, KV head and position; a tensor for each dimension in front.
            position: Original positions of these.
            score: What a policy said of them.
            length: How many entries each stretch has.
            spare: Free slots behind each stretch; None: one in 32, at least 16.
            mass: How many tokens each stands for; None: one.
            store: Makes empty storage for so many rows of `keys` or `values`; None: as they are stored now.
        """
        room = length + (spare if spare is not None else (length // SPARE).clamp_min(16))
        ends = room.flatten().cumsum(0)
        start = (ends - room.flatten()).reshape(room.shape)
        counts = length.flatten()
        before = counts.cumsum(0) - counts
        device = position.device
        to = torch.repeat_interleave(start.flatten() - before, counts) + torch.arange(len(position), device=device)
        slots = int(ends[-1])

        def slotted(entries: Tensor, free: float) -> Tensor:
            whole = torch.full((slots,), free, dtype=entries.dtype, device=device)
            whole[to] = entries
            return whole

        # a free slot takes any row: nobody reads it
        everywhere = tuple(slotted(index, 0) for index in at)

        def stored(rows: Storage, side: Side) -> Storage:
            if store is None:
                return gathered(rows, everywhere) if len(to) else rows.new_empty(slots, rows.shape[-1])
            some = gathered(rows, at)
            made = store(some, slots, side)
            made[to] = some
            return made

        return cls(
            stored(keys, "keys"),
            stored(values, "values"),
            slotted(position.to(torch.int32), EMPTY),
            slotted(score.float(), 0),
            start,
            length.clone(),
            room,
            None if mass is None else slotted(mass, 1),
        )

    @classmethod
    def of_call(
        cls,
        k: Float[Tensor, "batch kv_heads key dim"],
        v: Float[Tensor, "batch kv_heads key value_dim"],
        keep: Bool[Tensor, "batch kv_heads key"],
        score: Float[Tensor, "batch kv_heads key"],
        first: int = 0,
        spare: int | None = None,
        mass: Float[Tensor, "batch kv_heads key"] | None = None,
        store: Store | None = None,
    ) -> Ragged:
        """From the keys and values of one call, of which `keep` stay; what is dropped is never stored.

        The first key stands at position `first`.
        """
        at = keep.nonzero(as_tuple=True)
        mass = None if mass is None else mass[at]
        return cls.laid(k, v, at, at[2] + first, score[at], keep.sum(-1), spare, mass, store)

    @classmethod
    def joined(cls, stores: Sequence[Ragged]) -> Ragged:
        """The batch rows of several, one behind the other; they must be stored in the same form."""

        def each(name: str) -> Any:
            rows = [getattr(one, name) for one in stores]
            return stacked(rows) if isinstance(rows[0], Packed) else torch.cat(rows)

        slots = [len(one.position) for one in stores]
        before = [sum(slots[:n]) for n in range(len(slots))]
        mass = None
        if any(one.mass is not None for one in stores):
            mass = torch.cat([torch.ones_like(one.score) if one.mass is None else one.mass for one in stores])
        return cls(
            each("keys"),
            each("values"),
            each("position"),
            each("score"),
            torch.cat([one.start + n for one, n in zip(stores, before, strict=True)]),
            each("length"),
            each("room"),
            mass,
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        more = () if self.mass is None else (self.mass,)
        stored = (*tensors_in(self.keys), *tensors_in(self.values))
        return (*stored, self.position, self.score, self.start, self.length, self.room, *more)

    @cached_property
    def storage(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self.tensors)

    def bytes_held(self) -> int:
        """Bytes of all tensors, free slots included."""
        # they are filled in place, and never another size
        return self.storage

    # ---------------------------------------------------------------- growing and dropping

    def append(
        self,
        k: Float[Tensor, "batch kv_heads new dim"],
        v: Float[Tensor, "batch kv_heads new value_dim"],
        at: int,
        valid: Bool[Tensor, "batch new"] | None = None,
    ) -> Ragged:
        """Adds the tokens at positions at, at + 1, …; padded ones are left out. Returns the storage to go on with."""
        new = k.shape[2]
        # padding is behind a prompt: decoded tokens are all real
        valid = None if valid is None or bool(valid.all()) else valid
        count = new if valid is None else valid.sum(1, keepdim=True).to(self.length)
        most = new if valid is None else int(count.max())
        grown = self
        if most > self.edges.free:
            grown = self.select(self.held, most + max(16, self.longest // SPARE))
        edges = grown.edges
        rank = torch.arange(new, device=k.device) if valid is None else valid.cumsum(1)[:, None] - 1
        slot = (grown.start + grown.length)[..., None] + rank
        position = torch.arange(at, at + new, dtype=torch.int32, device=k.device).expand(slot.shape)
        if valid is None:
            slot, k, v, position = slot.flatten(), k.flatten(0, 2), v.flatten(0, 2), position.flatten()
        else:
            real = valid[:, None].expand(slot.shape)
            slot, k, v, position = slot[real], k[real], v[real], position[real]
        grown.keys[slot], grown.values[slot] = k, v
        grown.position[slot], grown.score[slot] = position, 0.0
        if grown.mass is not None:
            grown.mass[slot] = 1.0
        grown.length += count
        if valid is None and edges.shortest:
            grown.edges = replace(
                edges,
                latest=at + new - 1,
                shortest=edges.shortest + new,
                longest=edges.longest + new,
                free=edges.free - new,
            )
        else:
            del grown.edges
        return grown

    def select(self, keep: Bool[Tensor, "batch kv_heads entry"], spare: int | None = None) -> Ragged:
        """The entries that stay, in storage of their own; `keep` counts within each stretch."""
        at = keep.nonzero(as_tuple=True)
        return self.gathered(self.start[at[0], at[1]] + at[2], keep.sum(-1), spare)

    def gathered(self, slot: Int[Tensor, " entries"], length: Tensor, spare: int | None = None) -> Ragged:
        """Some slots, in storage of their own."""
        mass = None if self.mass is None else self.mass[slot]
        return Ragged.laid(self.keys, self.values, (slot,), self.position[slot], self.score[slot], length, spare, mass)

    def rewritten(
        self,
        k: Float[Tensor, "batch kv_heads entry dim"],
        v: Float[Tensor, "batch kv_heads entry value_dim"],
        mass: Float[Tensor, "batch kv_heads entry"],
        keep: Bool[Tensor, "batch kv_heads entry"],
        spare: int | None = None,
    ) -> Ragged:
        """The entries that stay with other keys, values and masses, stored as they are now."""
        at = keep.nonzero(as_tuple=True)
        slot = self.start[at[0], at[1]] + at[2]

        def store(rows: Tensor, slots: int, side: Side) -> Storage:
            return (self.keys if side == "keys" else self.values).new_empty(slots, rows.shape[1])

        k, v = k.to(self.keys.dtype), v.to(self.values.dtype)
        return Ragged.laid(
            k, v, at, self.position[slot], self.score[slot], keep.sum(-1), spare, mass[at].float(), store
        )

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
        return self.gathered(self.start[index][at[0], at[1]] + at[2], held.sum(-1))

    # ---------------------------------------------------------------- looking at it

    @property
    def held(self) -> Bool[Tensor, "batch kv_heads entry"]:
        """Which of the first `longest` places of each stretch hold an entry."""
        return torch.arange(self.longest, device=self.keys.device) < self.length[..., None]

    @cached_property
    def edges(self) -> Edges:
        """What the entries lie between; `append` keeps it."""
        last = (self.start + self.length - 1).clamp_min(0).flatten()
        free = (self.room - self.length).min()
        found = (
            self.position[self.start.flatten()].min(),
            self.position[last].max(),
            self.length.min(),
            self.length.max(),
            free,
        )
        return Edges(*(int(x) for x in found))

    @property
    def longest(self) -> int:
        return self.edges.longest

    def spread(self, flat: Tensor | Packed) -> Tensor:
        """A flat tensor as [batch, kv_heads, entry, ...]; what stands behind a stretch's end is anything."""
        size, longest = self.start.shape, self.longest
        if isinstance(flat, Packed):
            at = self.start[..., None] + torch.arange(longest, device=flat.device)
            return flat[at.clamp_max(flat.shape[0] - 1)].dense()
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
        self, mask: Mask, share: int, only: Int[Tensor, "batch kv_heads chosen"] | None = None
    ) -> tuple[Float[Tensor, "batch kv_heads key dim"], Float[Tensor, "batch kv_heads key value_dim"], Mask]:
        """Keys and values at their original positions, and the mask with holes: what metrics and edits see.

        `only` are entries as a policy chose them for reading; all others are holes.
        """
        batch, heads = self.start.shape
        held = self.held if only is None else self.among(only)
        at = held.nonzero(as_tuple=True)
        slot = self.start[at[0], at[1]] + at[2]
        to = (at[0], at[1], self.position[slot].long())
        device = self.position.device
        k = torch.zeros(batch, heads, mask.keys, self.keys.shape[1], dtype=self.keys.dtype, device=device)
        v = torch.zeros(batch, heads, mask.keys, self.values.shape[1], dtype=self.values.dtype, device=device)
        k[to], v[to] = numbers(self.keys[slot]), numbers(self.values[slot])
        there = torch.zeros(batch, heads, mask.keys, dtype=torch.bool, device=k.device)
        there[to] = True
        if mask.dense is None and bool((there | (torch.arange(mask.keys) < mask.low.min())).all()):
            return k, v, mask

        def dense(a: int, b: int, i: int, j: int) -> Tensor:
            rows = torch.arange(a, b, device=k.device)
            gone = ~there[:, :, None, i:j].repeat_interleave(share, 1)
            return mask.additive(rows, i, j).masked_fill(gone, -torch.inf)

        return k, v, replace(mask, dense=dense)

    def among(self, only: Int[Tensor, "batch kv_heads chosen"]) -> Bool[Tensor, "batch kv_heads entry"]:
        """Which entries were chosen."""
        there = torch.zeros(*self.start.shape, self.longest + 1, dtype=torch.bool, device=only.device)
        return there.scatter_(2, torch.where(only < 0, self.longest, only).long(), True)[..., :-1]

    def bias(self, mask: Mask) -> Float[Tensor, "batch kv_heads key"] | None:
        """Logarithm of how many tokens each entry stands for, at its position; None where each stands for one."""
        if self.mass is None:
            return None
        at = self.held.nonzero(as_tuple=True)
        slot = self.start[at[0], at[1]] + at[2]
        made = torch.zeros(*self.start.shape, mask.keys, device=self.mass.device)
        made[at[0], at[1], self.position[slot].long()] = self.mass[slot].log()
        return made

    def sees_all(self, mask: Mask) -> bool:
        """Whether every row of the mask sees every entry."""
        edges = self.edges
        if mask.dense is not None or edges.shortest == 0:
            return False
        latest_low, earliest_high = mask.narrowest
        if edges.earliest >= latest_low and edges.latest < earliest_high:
            return True
        last = self.position.gather(0, (self.start + self.length - 1).clamp_min(0).flatten()).view_as(self.start)
        first = self.position.gather(0, self.start.flatten()).view_as(self.start)
        low, high = mask.low.amax(-1)[:, None], mask.high.amin(-1)[:, None]
        return bool(((first >= low) & (last < high)).all())

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
        stored = (self.keys, self.values)
        wide = max(x.breadth if isinstance(x, Packed) else x.shape[1] for x in stored) > native.MAX_WIDTH
        return mask.dense is not None or wide or self.keys.device.type != "cpu" or not native.available()

    def attend(
        self,
        q: Float[Tensor, "batch heads query dim"],
        mask: Mask,
        scale: float,
        softcap: float | None = None,
        sinks: Float[Tensor, " heads"] | None = None,
        only: Int[Tensor, "batch kv_heads chosen"] | None = None,
    ) -> Float[Tensor, "batch heads query value_dim"]:
        """Attention of the rows over the entries that each of their heads keeps, with the native kernel.

        `only` are entries that a policy chose for reading, -1 behind the last of a head.
        """
        batch, kv_heads = self.start.shape
        heads, queries = q.shape[1:3]
        share, pairs = heads // kv_heads, batch * kv_heads
        index = None
        if only is None:
            lo, hi = (x.reshape(pairs, queries).to(torch.int32) for x in self.intervals(mask))
        else:
            index, count = self.slots(only, mask)
            lo = torch.zeros(pairs, 1, dtype=torch.int32)
            hi = count.reshape(pairs, 1)
        keys, values = read(self.keys), read(self.values)
        rows = turned(self.keys, q).reshape(pairs, share, queries, -1)
        rows = rows.to(keys.dtype) if isinstance(keys, Tensor) else rows.float()
        out = rows.new_empty(pairs, share, queries, values.shape[1])
        # a learned sink belongs to a query head, and the kernel knows one set of them per call
        groups = [slice(None)] if sinks is None else [slice(h, None, kv_heads) for h in range(kv_heads)]
        step = max(1, KERNEL_ROWS // share)
        for n, pick in enumerate(groups):
            some = len(out[pick])
            at = None if index is None else index[pick]
            bias = None if self.mass is None else self.mass.log()[None]
            if bias is not None and at is not None:
                bias = bias.expand(some, -1).gather(1, at.long())
            for a in range(0, queries, step):
                b = min(queries, a + step)
                out[pick, :, a:b] = native.attend(
                    rows[pick, :, a:b],
                    keys.expand(some, 1, *keys.shape),
                    values.expand(some, 1, *values.shape),
                    scale=scale,
                    lo=lo[pick, a:b],
                    hi=hi[pick, a:b],
                    softcap=softcap,
                    sinks=None if sinks is None else sinks[n * share : (n + 1) * share],
                    tilt=None if bias is None else bias[:, None],
                    index=at,
                ).out
        out = turned(self.values, out)[..., : self.values.shape[1]].to(q.dtype)
        return out.reshape(batch, heads, queries, -1)

    def slots(
        self, only: Int[Tensor, "batch kv_heads chosen"], mask: Mask
    ) -> tuple[Int[Tensor, "pairs chosen"], Int[Tensor, "batch kv_heads"]]:
        """Where chosen entries are stored, those that the one row of the mask sees first, and how many these are."""
        sees = only >= 0
        slot = self.start[..., None] + only.clamp_min(0)
        if not self.sees_all(mask):
            at = self.position[slot]
            sees &= (at >= mask.low[:, None, :1]) & (at < mask.high[:, None, :1])
            order = (~sees).to(torch.uint8).argsort(dim=-1, stable=True)
            slot = slot.gather(-1, order)
        return slot.flatten(0, 1).to(torch.int32), sees.sum(-1, dtype=torch.int32)
