"""Random attention calls of every shape that models make: causal, padded, packed, cached, grouped, capped, and so on.

`situations()` names them, `view(name, seed)` makes one. `chunk`, `alone`, `poisoned` and `repeated` give what must lead
to the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from foveate.core.errors import unknown
from foveate.core.mask import Mask
from foveate.core.rows import Layer, View

__all__ = ["Situation", "alone", "chunk", "mask_of", "poisoned", "repeated", "situations", "view", "with_mask"]

WORDS = 7


@dataclass(frozen=True)
class Situation:
    """How to make one attention call.

    Args:
        mask: From the batch, queries and keys.
        batch: Entries of the batch.
        queries: Queries per entry.
        keys: Keys per entry.
        heads: Query heads.
        kv_heads: Key-value heads.
        dim: Width of a query and of a key.
        value_dim: Width of a value.
        softcap: Soft cap on the scores, or None.
        sinks: Whether the heads have learned sinks.
        bias: Whether there is an additive bias.
        cross: Whether the keys come from another sequence.
        spread: Standard deviation of the queries; large ones give peaked rows.
        dtype: Of queries, keys and values.
    """

    mask: Callable[[int, int, int], Mask]
    batch: int = 2
    queries: int = 23
    keys: int = 23
    heads: int = 4
    kv_heads: int = 2
    dim: int = 8
    value_dim: int = 8
    softcap: float | None = None
    sinks: bool = False
    bias: bool = False
    cross: bool = False
    spread: float = 1.5
    dtype: torch.dtype = torch.float32


def interval(
    batch: int,
    queries: int,
    keys: int,
    *,
    left: tuple[int, ...] = (0,),
    right: tuple[int, ...] = (0,),
    window: int | None = None,
    causal: bool = True,
    offset: int | None = None,
    sequences: tuple[int, ...] = (),
) -> Mask:
    """A mask of intervals, from its definition: `left` and `right` pads per batch entry, packed `sequences`."""
    offset = keys - queries if offset is None else offset
    pad = torch.tensor([left[b % len(left)] for b in range(batch)])[:, None]
    end = keys - torch.tensor([right[b % len(right)] for b in range(batch)])[:, None]
    at = torch.arange(queries) + offset
    begin = pad.expand(batch, queries)
    if sequences:
        begin = torch.repeat_interleave(
            torch.tensor(sequences).cumsum(0) - torch.tensor(sequences), torch.tensor(sequences)
        )
        begin = begin[None, offset : offset + queries].expand(batch, -1)
    low = begin if window is None else torch.maximum(begin, at - window + 1)
    high = torch.minimum(end, at + 1) if causal else end.expand(batch, queries)
    real = (at >= pad) & (at < end)
    # a padded query in front of the text sees nothing, one behind it sees the text
    empty = (high <= low) | (causal & (at < pad))
    low, high = (torch.where(empty, 0, t).to(torch.int32) for t in (low, high))
    valid = None if bool(real.all()) else real
    return Mask(low, high, keys, causal, at, valid, begin=begin[:, 0].to(torch.int32))


def with_mask(**options: Any) -> Callable[[int, int, int], Mask]:
    """`interval` with its options filled in."""
    return lambda batch, queries, keys: interval(batch, queries, keys, **options)


def scattered(batch: int, queries: int, keys: int) -> Mask:
    """A causal mask with holes: no interval."""
    at, rows = torch.arange(keys), torch.arange(queries) + keys - queries
    seen = (at <= rows[:, None]) & ((at % 3 != 1) | (at == rows[:, None]))
    return Mask.from_tensor(seen.expand(batch, 1, -1, -1), position=rows)


def windowed_cache(batch: int, queries: int, keys: int) -> Mask:
    """A sliding cache that has dropped its first five tokens."""
    return replace(interval(batch, queries, keys, window=6), key_offset=5, begin=torch.tensor([-5]))


def some_empty(batch: int, queries: int, keys: int) -> Mask:
    """Rows in the middle that see nothing at all."""
    mask = interval(batch, queries, keys)
    hole = (torch.arange(queries) % 5 == 3) & (torch.arange(batch)[:, None] == 0)
    return replace(mask, low=torch.where(hole, 0, mask.low), high=torch.where(hole, 0, mask.high))


def none_seen(batch: int, queries: int, keys: int) -> Mask:
    """Not a single row sees anything."""
    nothing = torch.zeros(batch, queries, dtype=torch.int32)
    return Mask(nothing, nothing, keys, True, torch.arange(queries) + keys - queries)


SITUATIONS: dict[str, Situation] = {
    "causal": Situation(with_mask()),
    "full": Situation(with_mask(causal=False)),
    "window": Situation(with_mask(window=5)),
    "left_padded": Situation(with_mask(left=(0, 6))),
    "right_padded": Situation(with_mask(right=(0, 7))),
    "left_padded_window": Situation(with_mask(left=(4, 0), window=5)),
    "full_right_padded": Situation(with_mask(causal=False, right=(0, 7))),
    "packed": Situation(with_mask(sequences=(9, 1, 13))),
    "packed_window": Situation(with_mask(sequences=(9, 14), window=4)),
    "empty_rows": Situation(some_empty),
    "all_masked": Situation(none_seen, queries=5, keys=5),
    "decode": Situation(with_mask(), queries=1),
    "decode_padded": Situation(with_mask(left=(0, 6)), queries=1),
    "chunk": Situation(with_mask(), queries=9),
    "sliding_cache": Situation(windowed_cache, queries=4, keys=10),
    "cross": Situation(with_mask(causal=False, right=(0, 3), offset=0), queries=9, keys=14, cross=True),
    "multi_head": Situation(with_mask(), kv_heads=4),
    "multi_query": Situation(with_mask(), kv_heads=1),
    "wide_values": Situation(with_mask(), dim=6, value_dim=10),
    "narrow_values": Situation(with_mask(window=7), dim=10, value_dim=6),
    "soft_cap": Situation(with_mask(), softcap=2.0),
    "soft_cap_window": Situation(with_mask(window=6), softcap=2.0),
    "sinks": Situation(with_mask(), sinks=True),
    "sinks_window_padded": Situation(with_mask(left=(0, 5), window=6), sinks=True),
    "sinks_empty_rows": Situation(some_empty, sinks=True),
    "bias": Situation(with_mask(), bias=True),
    "bias_padded": Situation(with_mask(left=(0, 6)), bias=True),
    "scattered": Situation(scattered),
    "bfloat16": Situation(with_mask(), dtype=torch.bfloat16),
    "peaked": Situation(with_mask(), spread=12.0),
    "length_1": Situation(with_mask(), queries=1, keys=1),
    "length_2": Situation(with_mask(), batch=1, queries=2, keys=2),
    "odd_length": Situation(with_mask(), batch=1, queries=67, keys=67),
    # longer than the row chunks of the engines and of mask tracing
    "long": Situation(with_mask(), batch=1, queries=531, keys=531, heads=2, kv_heads=1),
    "long_window_padded": Situation(with_mask(left=(9,), window=40), batch=1, queries=531, keys=531, heads=2),
}


def situations(*, without: str = "", causal: bool | None = None, cross: bool | None = None) -> list[str]:
    """Names of the situations, of all or of some.

    Args:
        without: Words that must not be in the name, separated by blanks.
        causal: Only those whose mask is causal, or is not.
        cross: Only cross-attention, or only attention of a sequence to itself.
    """
    kept = []
    for name, s in SITUATIONS.items():
        if any(w in name for w in without.split()) or cross not in (None, s.cross):
            continue
        if causal is None or s.mask(s.batch, s.queries, s.keys).causal == causal:
            kept.append(name)
    return kept


def view(name: str, seed: int = 0, **changed: Any) -> View:
    """A random attention call.

    Args:
        name: One of `situations()`.
        seed: Of the contents.
        changed: Fields of `Situation` that differ.

    Raises:
        UnknownName: no such situation.
    """
    if name not in SITUATIONS:
        raise unknown("situation", name, SITUATIONS)
    s = replace(SITUATIONS[name], **changed)
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    q = normal(s.batch, s.heads, s.queries, s.dim) * s.spread
    k = normal(s.batch, s.kv_heads, s.keys, s.dim)
    v = normal(s.batch, s.kv_heads, s.keys, s.value_dim)
    return View(
        q.to(s.dtype),
        k.to(s.dtype),
        v.to(s.dtype),
        mask=s.mask(s.batch, s.queries, s.keys),
        scale=0.4,
        softcap=s.softcap,
        sinks=normal(s.heads) if s.sinks else None,
        bias=normal(1, s.heads, s.queries, s.keys) if s.bias else None,
        tokens=None if s.cross else torch.randint(0, WORDS, (s.batch, s.keys), generator=rng),
        projection=normal(12, s.heads * s.value_dim),
        layer=Layer(1, f"tiny.{name}", s.cross),
    )


def mask_of(call: View) -> Mask:
    """The mask of a call; `View` makes one where none was given."""
    assert call.mask is not None
    return call.mask


# ---------------------------------------------------------------- what must lead to the same numbers


def chunk(whole: View, start: int, stop: int) -> View:
    """Rows start..stop of a causal call, as a cached prefill or decode sees them: no later key exists yet."""
    mask, keys = mask_of(whole), whole.keys - (whole.queries - stop)
    low, high = (t[:, start:stop].clamp_max(keys) for t in (mask.low, mask.high))
    valid = None if mask.valid is None else mask.valid[:, start:stop]

    def dense(a: int, b: int, i: int, j: int) -> Tensor:
        assert mask.dense is not None
        return mask.dense(start + a, start + b, i, j)

    return replace(
        whole,
        q=whole.q[:, :, start:stop],
        k=whole.k[:, :, :keys],
        v=whole.v[:, :, :keys],
        mask=replace(
            mask,
            low=low,
            high=high,
            keys=keys,
            position=mask.position[start:stop],
            valid=valid,
            begin=mask.starts[:, start],
            dense=None if mask.dense is None else dense,
        ),
        bias=None if whole.bias is None else whole.bias[..., start:stop, :keys],
        tokens=None if whole.tokens is None else whole.tokens[:, :keys],
    )


def alone(padded: View, entry: int, first: int, last: int) -> View:
    """Tokens first..last of one batch entry, as if nothing had been padded to them."""
    mask, one = mask_of(padded), slice(entry, entry + 1)
    low, high = (t.expand(padded.batch, -1)[one, first:last] for t in (mask.low, mask.high))
    sees = high > low
    low, high = (torch.where(sees, t - first, 0).to(torch.int32) for t in (low, high))
    begin = torch.zeros(1, dtype=torch.int32)
    return replace(
        padded,
        q=padded.q[one, :, first:last],
        k=padded.k[one, :, first:last],
        v=padded.v[one, :, first:last],
        mask=Mask(low, high, last - first, mask.causal, torch.arange(last - first), begin=begin),
        bias=None if padded.bias is None else padded.bias[..., first:last, first:last],
        tokens=None if padded.tokens is None else padded.tokens[one, first:last],
    )


def poisoned(clean: View, value: float = float("nan")) -> View:
    """Keys and values that no row sees, and queries that see nothing, hold garbage."""
    seen = (clean.mask.additive(torch.arange(clean.queries), 0, clean.keys) > -torch.inf).any(1)
    seen = seen.expand(clean.batch, -1, -1)
    no_key, no_row = ~seen.any(1)[:, None, :, None], ~seen.any(2)[:, None, :, None]
    return replace(
        clean,
        q=clean.q.masked_fill(no_row, value),
        k=clean.k.masked_fill(no_key, value),
        v=clean.v.masked_fill(no_key, value),
    )


def repeated(grouped: View) -> View:
    """Each query head with a key-value head of its own."""
    k, v = (t.repeat_interleave(grouped.grouped, 1) for t in (grouped.k, grouped.v))
    return replace(grouped, k=k, v=v)
