"""Which keys each row may see, in memory that grows with N and not with N².

Causal order, sliding windows, padding on either side, packed sequences and chunks have one thing in common: the keys
that a row may see are consecutive. So a mask is an interval `[low, high)` of keys per row. A mask that is none keeps
a function that is evaluated for one block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Mask"]

TRACE_ROWS = 256


@dataclass(frozen=True, eq=False)
class Mask:
    """The keys that each row may see.

    Args:
        low: First key of each row's interval.
        high: One past the last key of each row's interval; equal to `low` for a row that sees nothing.
        keys: Number of keys.
        causal: Whether no row sees a key behind its own position.
        position: Position of each query on the axis of the keys (row i of a cached decode stands at `keys - 1`).
        valid: Which rows are real; a padded query is no row of anybody's text. None: all.
        key_offset: Token that the first key stands for; a sliding cache has dropped those before it.
        begin: First key of the text that the first row belongs to, where the maker of the mask knows it: in a cached
            call a window hides it. Negative where a sliding cache has dropped it. None: the first key that is seen.
        dense: For masks that are no interval: `dense(start, stop, first, last)` gives the additive mask of rows
            start..stop and keys first..last, of shape [batch|1, heads|1, rows, keys], 0 where allowed and -inf where
            not. None: the interval says it all.
    """

    low: Int[Tensor, "#batch query"]
    high: Int[Tensor, "#batch query"]
    keys: int
    causal: bool
    position: Int[Tensor, " query"]
    valid: Bool[Tensor, "batch query"] | None = None
    key_offset: int = 0
    begin: Int[Tensor, "#batch"] | None = None
    dense: Callable[[int, int, int, int], Float[Tensor, "#batch #heads rows keys"]] | None = None

    @property
    def queries(self) -> int:
        return self.low.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.low.device

    @cached_property
    def narrowest(self) -> tuple[int, int]:
        """The last of all rows' first keys, and the first of all ends: what lies between is seen by every row."""
        return int(self.low.amax()), int(self.high.amin())

    # `generate` with a static cache makes the mask ahead, and takes it for a tensor

    @property
    def ndim(self) -> int:
        return 4

    def contiguous(self) -> Mask:
        return self

    # ---------------------------------------------------------------- ways to make one

    @classmethod
    def full(cls, queries: int, keys: int, device: torch.device | str = "cpu") -> Mask:
        """Every row sees every key."""
        low = torch.zeros(1, queries, dtype=torch.int32, device=device)
        at = max(0, keys - queries)
        return cls(low, low + keys, keys, False, torch.arange(at, at + queries, device=device))

    @classmethod
    def causal_of(
        cls,
        queries: int,
        keys: int | None = None,
        window: int | None = None,
        device: torch.device | str = "cpu",
        offset: int | None = None,
    ) -> Mask:
        """Row i sees the keys up to its own position, and of these at most the last `window`.

        The last query stands at the last key unless `offset`, the position of the first query, says otherwise.
        """
        keys = queries if keys is None else keys
        at = keys - queries if offset is None else offset
        position = torch.arange(at, at + queries, device=device)
        high = torch.arange(at + 1, at + 1 + queries, dtype=torch.int32, device=device)[None].clamp_(0, keys)
        low, begin = torch.zeros_like(high), torch.zeros(1, dtype=torch.int32, device=device)
        if window is not None:
            low = torch.minimum((position + 1 - window).clamp_min(0).to(torch.int32)[None], high)
        return cls(low, high, keys, True, position, begin=begin)

    @classmethod
    def of_padding(
        cls,
        real: Bool[Tensor, "batch key"] | None,
        queries: int,
        keys: int,
        *,
        causal: bool,
        window: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Mask:
        """Rows that see the real keys, in causal order or all of them, and of these at most `window` to a side.

        The queries are the last of the keys. None: all keys are real.
        """
        at = max(0, keys - queries)
        if real is None and causal:
            return cls.causal_of(queries, keys, window, device, at)
        position = torch.arange(at, at + queries, device=device)
        if real is None or bool(real.all()):
            begin, end, valid = position.new_zeros(1), position.new_full((1,), keys), None
        else:
            count = real.sum(-1)
            begin = real.to(torch.uint8).argmax(-1)
            end = torch.where(count > 0, keys - real.flip(-1).to(torch.uint8).argmax(-1), begin)
            valid = real[:, keys - queries :] if queries <= keys else None
            if bool((end - begin != count).any()):
                order = cls.of_padding(None, queries, keys, causal=causal, window=window, device=device)

                def allowed(a: int, b: int) -> Tensor:
                    rows = torch.arange(a, b, device=device)
                    return order.allowed(rows, 0, keys) & real[:, None, None]

                return cls.traced(allowed, queries, keys, device, position, valid, begin=begin.to(torch.int32))
        low, high = begin[:, None].expand(-1, queries), end[:, None].expand(-1, queries)
        if causal:
            high = torch.minimum(high, position + 1)
        if window is not None:
            low = torch.maximum(low, position + 1 - window)
            high = torch.minimum(high, position + window)
        empty = high <= low
        low, high = (t.masked_fill(empty, 0).to(torch.int32) for t in (low, high))
        return cls(low, high, keys, causal, position, valid, begin=begin.to(torch.int32))

    @classmethod
    def from_tensor(cls, mask: Tensor, position: Tensor | None = None) -> Mask:
        """From a boolean (True: may look) or additive mask of shape [batch|1, heads|1, query, key]."""
        queries, keys = mask.shape[-2:]
        if mask.dtype == torch.bool:
            additive = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill_(~mask, -torch.inf)
        else:
            # "minus a lot" of a half-precision mask means the same as minus infinity
            floor = torch.finfo(mask.dtype).min / 2
            additive = mask.float().masked_fill(mask <= floor, -torch.inf)
        return cls.traced(
            lambda a, b: mask[..., a:b, :] if mask.dtype == torch.bool else additive[..., a:b, :] > -torch.inf,
            queries,
            keys,
            mask.device,
            position,
            dense=lambda a, b, i, j: additive[..., a:b, i:j],
            binary=mask.dtype == torch.bool or bool(((additive == 0) | additive.isinf()).all()),
        )

    @classmethod
    def traced(
        cls,
        allowed: Callable[[int, int], Bool[Tensor, "batch heads rows keys"]],
        queries: int,
        keys: int,
        device: torch.device | str,
        position: Tensor | None = None,
        valid: Tensor | None = None,
        key_offset: int = 0,
        begin: Tensor | None = None,
        dense: Callable[[int, int, int, int], Tensor] | None = None,
        binary: bool = True,
    ) -> Mask:
        """From a function that gives the boolean mask of rows start..stop, evaluated once, block by block."""
        lows, highs, solid, causal = [], [], binary, True
        if position is None:
            position = torch.arange(queries, device=device) + max(0, keys - queries)
        for a in range(0, queries, TRACE_ROWS):
            b = min(queries, a + TRACE_ROWS)
            block = allowed(a, b)
            solid = solid and block.shape[1] == 1
            seen = block.any(1)
            count = seen.sum(-1, dtype=torch.int32)
            first = seen.to(torch.uint8).argmax(-1).to(torch.int32)
            last = (keys - seen.flip(-1).to(torch.uint8).argmax(-1)).to(torch.int32)
            first, last = first.where(count > 0, 0), last.where(count > 0, 0)
            solid = solid and bool((last - first == count).all())
            causal = causal and bool((last <= position[a:b] + 1).all())
            lows.append(first)
            highs.append(last)
        if not solid and dense is None:

            def dense(a: int, b: int, i: int, j: int) -> Tensor:
                block = allowed(a, b)[..., i:j]
                return torch.zeros(block.shape, device=block.device).masked_fill_(~block, -torch.inf)

        low, high = torch.cat(lows, -1), torch.cat(highs, -1)
        return cls(low, high, keys, causal, position, valid, key_offset, begin, None if solid else dense)

    # ---------------------------------------------------------------- what the engines ask

    @cached_property
    def plain(self) -> str:
        """Either "causal" or "full" where the framework's own kernels need no mask at all, else ""."""
        if self.dense is not None:
            return ""
        if self.low.numel() == 1:
            return "full" if int(self.low) == 0 and int(self.high) == self.keys else ""
        if bool((self.low == 0).all()):
            if bool((self.high == self.keys).all()):
                return "full"
            square = torch.arange(1, self.queries + 1, device=self.device, dtype=self.high.dtype)
            if self.queries == self.keys and bool((self.high == square).all()):
                return "causal"
        return ""

    @cached_property
    def rows(self) -> Bool[Tensor, "#batch query"]:
        """Rows that are real and see at least one key."""
        sees = self.high > self.low
        return sees if self.valid is None else sees & self.valid

    @cached_property
    def starts(self) -> Int[Tensor, "#batch query"]:
        """The first key of the text that each row belongs to: padding and packing move it, a window does not.

        -1 where a sliding cache has dropped it.
        """
        # a row whose first key is its own opens a text
        opens = (self.high > self.low) & (self.low == self.position)
        begin = torch.where(opens, self.low, torch.full_like(self.low, -1))
        first = self.begin
        if first is None:
            first = self.first_key if self.key_offset == 0 else torch.full_like(self.low[:, 0], -1)
        begin = begin.expand(max(len(begin), len(first)), -1).clone()
        begin[:, 0] = first.clamp_min(-1)
        return begin.cummax(-1).values

    @cached_property
    def first_key(self) -> Int[Tensor, "#batch"]:
        """The first key that any row of the batch entry sees."""
        sees = self.high > self.low
        first = self.low.where(sees, self.keys).amin(-1)
        return first.clamp_max(max(0, self.keys - 1)).to(self.low.dtype)

    @cached_property
    def text_begin(self) -> Int[Tensor, "#batch"]:
        """The key at which the text of each batch entry begins; negative where a sliding cache has dropped it."""
        if self.begin is not None:
            return self.begin.to(torch.int32)
        if self.key_offset:
            return torch.full((1,), -self.key_offset, dtype=torch.int32, device=self.device)
        return self.first_key.to(torch.int32)

    @cached_property
    def place(self) -> Int[Tensor, "#batch query"]:
        """Which token of its text each query is, from 0; negative for padding in front."""
        return self.position.to(torch.int32)[None] - self.text_begin[:, None]

    @cached_property
    def key_place(self) -> Int[Tensor, "#batch key"]:
        """Which token of its text each key is, from 0; negative for padding in front."""
        at = torch.arange(self.keys, device=self.device, dtype=torch.int32)
        return at[None] - self.text_begin[:, None]

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """The smallest range of keys that holds all that rows start..stop see; (0, 0) when they see nothing."""
        if self.plain == "full":
            return (0, self.keys) if start < stop else (0, 0)
        low, high = self.low[:, start:stop], self.high[:, start:stop]
        sees = high > low
        if not bool(sees.any()):
            return 0, 0
        return int(low[sees].min()), int(high[sees].max())

    def allowed(self, rows: Tensor, first: int, last: int) -> Bool[Tensor, "#batch 1 rows keys"]:
        """The interval as a boolean block for the listed rows and keys first..last."""
        at = torch.arange(first, last, device=self.device)
        low, high = self.low[:, rows, None], self.high[:, rows, None]
        return ((at >= low) & (at < high))[:, None]

    def additive(self, rows: Tensor, first: int, last: int) -> Float[Tensor, "#batch #heads rows keys"]:
        """0 where a listed row may look, -inf where not, plus whatever a caller's own additive mask says."""
        if self.dense is None:
            block = self.allowed(rows, first, last)
            return torch.zeros(block.shape, device=block.device).masked_fill_(~block, -torch.inf)
        if len(rows) and int(rows[-1]) - int(rows[0]) == len(rows) - 1:
            return self.dense(int(rows[0]), int(rows[-1]) + 1, first, last)
        return torch.cat([self.dense(int(r), int(r) + 1, first, last) for r in rows], -2)
