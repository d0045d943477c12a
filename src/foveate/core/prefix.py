r"""A KV cache whose rows share stretches of their text: each stretch is held once, whatever the number of rows.

    out = merge(attention(q, stretch_1), attention(q, stretch_2), …, attention(q, own keys))

The queries of all rows that share a stretch are one batch of rows against its keys (`attend_levels`), each row's own
keys are attended alone, and the parts are merged by their log-sum-exps: the exact result.

To the model the batch looks padded on the left. A row's cells are padding, its stretches from the root to the leaf,
then its own tokens; all rows end together. So masks, windows and positions are the model's own, and what a row may see
of a stretch or of its own keys is an interval (`Layout.reach`). The first cell that is not in the cache is where the
row with the most tokens of its own begins them; the other rows compute the last few tokens of their stretches again
there, which nobody looks at.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from foveate.core import native, tiled
from foveate.core.errors import BadInput, NotSupported
from foveate.core.mask import Mask
from foveate.core.merging import Part, merge
from foveate.core.rows import View

__all__ = ["Layout", "Level", "PrefixLayer", "Reach", "attend_levels", "bytes_full", "prefix_cache", "prefix_layers"]

# tokens of room that a row's own keys get beyond those that there are
ROOM = 16


@dataclass(frozen=True, eq=False)
class Level:
    """Keys and values that some rows of a batch share, in one layer.

    Args:
        k: Keys.
        v: Values.
        first: First of the rows.
        last: One past the last of them.
    """

    k: Float[Tensor, "one kv_heads key dim"]
    v: Float[Tensor, "one kv_heads key value_dim"]
    first: int
    last: int


Interval = tuple[Int[Tensor, "_ _"], Int[Tensor, "_ _"]]


@dataclass(frozen=True, eq=False)
class Reach:
    """What the rows of one call see of each level and of their own keys, as intervals [low, high).

    Args:
        levels: Of each level, one row behind the other: [1, rows * query].
        own: Of the own keys: [batch, query].
    """

    levels: tuple[Interval, ...]
    own: Interval


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the rows of a batch have what they share; the same in all layers.

    Args:
        spans: (first row, one past the last, first token, tokens) of each level, ancestors before descendants.
        begin: Cell in which each row begins.
        shared: Tokens of each row that are in levels.
        cells: Cells that are in the cache before the first call.
        tokens: Token ids of these cells.
    """

    spans: tuple[tuple[int, int, int, int], ...]
    begin: Int[Tensor, " rows"]
    shared: Int[Tensor, " rows"]
    cells: int
    tokens: Int[Tensor, "rows cells"]
    known: weakref.WeakKeyDictionary[Mask, Reach] = field(default_factory=weakref.WeakKeyDictionary, init=False)

    @property
    def rows(self) -> int:
        return len(self.begin)

    def repeats(self, batch: int) -> int:
        """How many rows of a call each row stands for: beams, or several sequences per row.

        Raises:
            BadInput: the batch is no multiple of the rows.
        """
        if batch % self.rows:
            raise BadInput(
                f"a batch of {batch} on a shared prefix that was laid out for {self.rows} rows; give each row equally "
                "many sequences"
            )
        return batch // self.rows

    def own(self, batch: int) -> Int[Tensor, " batch"]:
        """The first of each row's own keys that is no repetition of a shared one."""
        return (self.begin + self.shared - self.cells).repeat_interleave(self.repeats(batch))

    def reach(self, mask: Mask, batch: int) -> Reach:
        """What the rows of a call see; worked out once for all layers that share a mask."""
        if (found := self.known.get(mask)) is None:
            found = self.known[mask] = self.reached(mask, batch)
        return found

    def reached(self, mask: Mask, batch: int) -> Reach:
        """The intervals of a mask, cut at the ends of the levels."""
        each = self.repeats(batch)
        begin = self.begin.repeat_interleave(each)[:, None]
        low, high = mask.low.expand(batch, -1), mask.high.expand(batch, -1)
        levels = []
        for first, last, start, length in self.spans:
            some = slice(first * each, last * each)
            a, b = ((x[some] - begin[some] - start).clamp(0, length) for x in (low, high))
            levels.append((a.reshape(1, -1).int(), torch.maximum(a, b).reshape(1, -1).int()))
        a = torch.maximum(low - self.cells, self.own(batch)[:, None])
        return Reach(tuple(levels), (a.int(), torch.maximum(a, high - self.cells).int()))

    def of_text(self, mask: Mask, batch: int) -> Mask:
        """The mask without the rows that compute a shared token again: each token counts once."""
        text = (self.begin + self.shared).repeat_interleave(self.repeats(batch))
        new = mask.position[None] >= text[:, None]
        return replace(mask, valid=new if mask.valid is None else mask.valid & new)


# ---------------------------------------------------------------- attention


def attend_levels(
    view: View, levels: Sequence[Level], reach: Reach, folded: bool = True
) -> tuple[Float[Tensor, "batch heads query value_dim"], Float[Tensor, "batch heads query"]]:
    """Attention over what rows share and what they have of their own; the mask of the view is not looked at.

    Args:
        view: The queries, and each row's own keys and values (none is allowed).
        levels: What is shared; rows of a level lie side by side in the batch.
        reach: What each row sees of them.
        folded: Whether the rows of a level are one batch of queries; else each row looks at it alone, and the level
            may hold keys for each row, which get gradients of their own.

    Returns:
        Head outputs in the dtype of the queries, and the log-sum-exp of each row, -inf for a row that sees nothing.
    """
    batch, heads, queries, _ = view.q.shape
    parts = [part(view, view.q, view.k, view.v, reach.own)]
    for level, (low, high) in zip(levels, reach.levels, strict=True):
        some = slice(level.first, level.last)
        count = level.last - level.first
        if folded:
            q = view.q[some].transpose(0, 1).reshape(1, heads, count * queries, -1)
            out, lse = part(view, q, level.k, level.v, (low, high))
            out = out.reshape(heads, count, queries, -1).transpose(0, 1)
            lse = lse.reshape(heads, count, queries).transpose(0, 1)
        else:
            k, v = (t.expand(count, -1, -1, -1) for t in (level.k, level.v))
            out, lse = part(view, view.q[some], k, v, (low.reshape(count, -1), high.reshape(count, -1)))
        parts.append(spread(out, lse, batch, some))
    if view.sinks is not None:
        # a learned sink is a key without a value
        lse = view.sinks.to(parts[0][1])[None, :, None].expand(batch, -1, queries)
        seen = torch.stack([lse for _, lse in parts]).amax(0) > -torch.inf
        parts.append((torch.zeros_like(parts[0][0]), lse.masked_fill(~seen, -torch.inf)))
    return merge(parts)


def spread(out: Tensor, lse: Tensor, batch: int, some: slice) -> Part:
    """A part of some rows as one of all rows, of which the others see nothing."""
    if len(out) == batch:
        return out, lse
    whole = out.new_zeros(batch, *out.shape[1:]), lse.new_full((batch, *lse.shape[1:]), -torch.inf)
    whole[0][some], whole[1][some] = out, lse
    return whole


def part(view: View, q: Tensor, k: Tensor, v: Tensor, seen: Interval) -> Part:
    """Attention over one set of keys, without learned sinks, by the CPU kernel where it can."""
    if not k.shape[2]:
        lse = torch.full(q.shape[:3], -torch.inf, dtype=tiled.working(q), device=q.device)
        return q.new_zeros(*q.shape[:3], v.shape[3]), lse
    low, high = seen
    if view.needs_grad or not tiled.by_kernel(q, v):
        mask = Mask(low, high, k.shape[2], False, torch.arange(q.shape[2], device=q.device))
        return tiled.attend(View(q, k, v, mask, view.scale, view.softcap))
    none = torch.zeros(1, max(q.shape[2], k.shape[2]), dtype=torch.int32)
    found = native.attend(
        q,
        k,
        v,
        scale=view.scale,
        lo=low,
        hi=high,
        query_position=none[:, : q.shape[2]],
        key_position=none[:, : k.shape[2]],
        softcap=view.softcap,
    )
    return found.out, found.lse


# ---------------------------------------------------------------- the cache


class PrefixLayer(CacheLayerMixin):
    """One layer of a cache whose rows share levels.

    Args:
        layout: Where the rows have what they share.
        levels: The keys and values of the levels, in the layout's order; none where the layer keeps nothing.
        owner: What says whether the cache may still be read: it is, while `owner.open` is true.
        window: Sliding window of the layer's attention, or None.
    """

    def __init__(
        self, layout: Layout, levels: Sequence[tuple[Tensor, Tensor]], owner: Any, window: int | None = None
    ) -> None:
        super().__init__()
        self.layout, self.shared, self.owner, self.window = layout, tuple(levels), owner, window
        self.is_sliding = window is not None
        self.reset()

    def reset(self) -> None:
        self.keys = self.values = None
        self.held = 0
        self.latest: Any = None
        self.pending: Tensor | None = None
        self.is_initialized = False

    # ---------------------------------------------------------------- what transformers calls

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores the keys and values of a call and hands on the rows' own ones; the levels stay where they are.

        Raises:
            NotSupported: outside of the `with` block, where the model's own attention would miss the prefix; or with
                gradients, which would end here.
            BadInput: another batch than that of the calls before.
        """
        if not self.owner.open:
            raise NotSupported(
                "this KV cache shares a prefix, which the model's own attention cannot read; go on inside `with "
                "foveate.share_prefix(model, prompt_ids)`"
            )
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise NotSupported(
                "a shared prefix lets no gradient through; run the model under torch.no_grad(), or without one"
            )
        batch = len(key_states)
        if self.layout.repeats(batch) and self.keys is not None and len(self.keys) != batch:
            raise BadInput(f"a batch of {batch} on a KV cache of {len(self.keys)} rows; give each row its next tokens")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.held + key_states.shape[2]
        keys, values = self.keys, self.values
        if keys is None or values is None or held > keys.shape[2]:
            # an eighth more: copying costs a constant per token, however many come
            room = held + max(ROOM, held // 8)
            keys, values = self.keys, self.values = grown(keys, key_states, room), grown(values, value_states, room)
        keys[:, :, self.held : held] = key_states
        values[:, :, self.held : held] = value_states
        self.held = held
        k, v = keys[:, :, :held], values[:, :, :held]
        self.latest, self.pending = weakref.ref(k), key_states
        return k, v

    @property
    def seen(self) -> int:
        """Cells so far, padding included."""
        return self.layout.cells + self.held

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens.

        Raises:
            NotSupported: so many that some of them are shared.
        """
        if abs(tokens_to_remove) > self.held:
            raise NotSupported(
                f"{abs(tokens_to_remove)} tokens are to be forgotten, and rows have {self.held} of their own behind "
                "the shared prefix; share a shorter one"
            )
        self.held -= abs(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beams of a row change places; what they share stays."""
        if self.keys is not None:
            at = beam_idx.to(self.device)
            self.keys, self.values = (t.index_select(0, at) for t in (self.keys, self.values))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.keys is not None:
            self.keys, self.values = (t.repeat_interleave(repeats, 0) for t in (self.keys, self.values))

    def batch_select_indices(self, indices: Tensor) -> None:
        raise NotSupported("rows of a KV cache that shares a prefix cannot be picked; generate from other suffixes")

    def offload(self) -> None:
        raise NotSupported("a KV cache that shares a prefix cannot be offloaded; leave `offloading` off")

    # ---------------------------------------------------------------- what attention does with it

    @property
    def opening(self) -> bool:
        """Whether the running call is the first one."""
        return self.pending is not None and self.held == self.pending.shape[2]

    def levels(self, batch: int) -> list[Level]:
        """The levels as a batch reads them."""
        each = self.layout.repeats(batch)
        rows = [(first * each, last * each) for first, last, *_ in self.layout.spans]
        return [Level(k, v, a, b) for (k, v), (a, b) in zip(self.shared, rows, strict=True)]

    def refuses(self, call: View, mask: Mask) -> bool:
        """Whether attention must go through `expanded` keys."""
        return mask.dense is not None or call.bias is not None or bool(call.dropout)

    def attend(self, call: View, mask: Mask) -> Float[Tensor, "batch heads query value_dim"]:
        """Attention of a call, whose keys are the rows' own ones."""
        self.pending = None
        return attend_levels(call, self.levels(call.batch), self.layout.reach(mask, call.batch))[0]

    def expanded(self, call: View, mask: Mask) -> tuple[Tensor, Tensor, Mask]:
        """Keys, values and mask of a call as if nothing were shared."""
        self.pending = None
        begin = self.layout.begin.repeat_interleave(self.layout.repeats(call.batch)).tolist()
        k, v = (own.new_zeros(*own.shape[:2], self.seen, own.shape[3]) for own in (call.k, call.v))
        k[:, :, self.layout.cells :], v[:, :, self.layout.cells :] = call.k, call.v
        for level, (_, _, start, length) in zip(self.levels(call.batch), self.layout.spans, strict=True):
            for row in range(level.first, level.last):
                at = slice(begin[row] + start, begin[row] + start + length)
                k[row, :, at], v[row, :, at] = level.k[0], level.v[0]
        return k, v, self.layout.of_text(mask, call.batch)

    def tokens(self, batch: int) -> Int[Tensor, "batch cells"]:
        """Token ids of the cells in front of the first call."""
        return self.layout.tokens.repeat_interleave(self.layout.repeats(batch), 0)

    def level(self) -> tuple[Tensor, Tensor]:
        """The own keys and values of the only row, as a level for others, without room."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys[:, :, : self.held].clone(), self.values[:, :, : self.held].clone()

    def bytes_own(self) -> int:
        """Bytes of the rows' own keys and values, their room included."""
        return sum(t.untyped_storage().nbytes() for t in (self.keys, self.values) if t is not None)


def grown(old: Tensor | None, new: Tensor, room: int) -> Tensor:
    """Room for so many tokens, with what there is in it."""
    made = new.new_empty(*new.shape[:2], room, new.shape[3])
    if old is not None:
        made[:, :, : old.shape[2]] = old
    return made


def prefix_cache(
    layout: Layout, levels: Sequence[Sequence[tuple[Tensor, Tensor] | None]], owner: Any, model: Any
) -> Cache:
    """A cache whose rows share levels.

    Args:
        layout: Where the rows have what they share.
        levels: For each level, keys and values by cache layer; None for a layer that keeps nothing.
        owner: What says, by its `open`, whether the cache may still be read.
        model: The model that is to use it.

    Raises:
        NotSupported: the model keeps something else than keys and values; says what.
    """
    layers: list[Any] = []
    for n, layer in enumerate(DynamicCache(config=model.config).layers):
        # a dummy stands where a layer's attention was taken out
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer):
            raise NotSupported(
                f"{type(model).__name__} keeps no keys and values in layer {n} but a {type(layer).__name__}, which "
                "rows cannot share; use model.generate"
            )
        held = [kept for one in levels if (kept := one[n]) is not None]
        empty = isinstance(layer, DummyLayer) or (levels and not held)
        window = getattr(layer, "sliding_window", None)
        layers.append(DummyLayer() if empty else PrefixLayer(layout, held, owner, window))
    return Cache(layers=layers)


def prefix_layers(cache: Any) -> list[PrefixLayer]:
    """The layers of a cache whose rows share levels."""
    return [layer for layer in getattr(cache, "layers", ()) if isinstance(layer, PrefixLayer)]


def bytes_full(cache: Cache) -> int:
    """What the model's own cache would hold for the same rows: every row its whole text, as far as windows reach."""
    total = 0
    for layer in prefix_layers(cache):
        if layer.keys is not None and layer.values is not None:
            batch, heads, _, width = layer.keys.shape
            tokens = layer.seen if layer.window is None else min(layer.seen, layer.window - 1)
            total += batch * heads * tokens * (width + layer.values.shape[3]) * layer.keys.dtype.itemsize
    return total
