"""The native kernels: exact attention and its statistics in one pass, and the selective scan, if a compiler was there.

`available()` says whether they can be used. The library is plain C++ behind `ctypes`, which releases the GIL.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_double, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from foveate.core.tiled import Ranges

__all__ = [
    "ACTIVATIONS",
    "MAX_WIDTH",
    "Codes",
    "NativeResult",
    "attend",
    "available",
    "derive",
    "derive_selective",
    "pack",
    "selective",
]

_VARIANTS = {"AVX512": ("rows_v4", "rows_v3"), "AVX2": ("rows_v3",)}
MAX_WIDTH = 256
# in the order of kernels/tiles.hpp, behind softmax
ACTIVATIONS = ("sigmoid", "relu", "softplus")
# behind these, those with a shift and a cut for each row; only the last has derivatives
OF_ROWS = ("up_to", "excess", "soft_excess")
# a multiple of what one register tile covers, whatever the processor; of kernels/selective.cpp a block of channels
_PANEL = 64
# tokens from one kept state to the next
_STRETCH = 64


def _fields(names: str, kind: type) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class _Ranges(ctypes.Structure):
    """Mirrors `struct Ranges` of kernels/tiles.hpp."""

    _fields_ = (*_fields("start bounds", c_void_p), *_fields("rows batch heads blocks", c_int64))


class _Coded(ctypes.Structure):
    """Mirrors `struct Coded` of kernels/tiles.hpp."""

    _fields_ = (
        *_fields("codes grid", c_void_p),
        *_fields("stride grid_stride", c_int64 * 3),
        *_fields("groups bits", c_int64),
    )


class _Call(ctypes.Structure):
    """Mirrors `struct Call` of kernels/rows.cpp."""

    _fields_ = (
        *_fields("batch heads groups queries keys width values extras withins matches threads", c_int64),
        *_fields("q k v", c_void_p),
        *_fields("q_stride k_stride v_stride", c_int64 * 3),
        *_fields("k_coded v_coded", _Coded),
        *_fields("lo hi query_position key_position", c_void_p),
        *_fields("lo_stride hi_stride query_position_stride key_position_stride", c_int64),
        *_fields("within", POINTER(c_int32)),
        *_fields("match_query match_key", POINTER(c_void_p)),
        *_fields("match_query_stride match_key_stride", POINTER(c_int64)),
        *_fields("sinks extra tilt tilted index", c_void_p),
        *_fields("extra_stride tilt_batch_stride tilt_head_stride tilted_stride index_stride", c_int64),
        ("ranges", _Ranges),
        *_fields("activation power piece", c_int64),
        *_fields("scale softcap shift", c_double),
        *_fields("row_shift row_cut", c_void_p),
        *_fields("out lse top entropy distance within_mass match_mass extra_mass column", c_void_p),
    )


class _Back(ctypes.Structure):
    """Mirrors `struct Back` of kernels/back.cpp."""

    _fields_ = (
        *_fields("batch heads groups queries keys width values threads", c_int64),
        *_fields("q k v dout", c_void_p),
        *_fields("q_stride k_stride v_stride dout_stride", c_int64 * 3),
        *_fields("lse shared lo hi", c_void_p),
        *_fields("lo_stride hi_stride", c_int64),
        ("ranges", _Ranges),
        *_fields("activation power", c_int64),
        *_fields("scale shift", c_double),
        *_fields("row_shift row_cut common", c_void_p),
        *_fields("dq dk dv", c_void_p),
    )


class _Selective(ctypes.Structure):
    """Mirrors `struct Selective` of kernels/selective.cpp."""

    _fields_ = (
        *_fields("batch time inner states stretch threads", c_int64),
        *_fields("dt x rate b c first y last marks dy dlast", c_void_p),
        *_fields("d_dt d_x d_rate d_b d_c d_first", c_void_p),
    )


class _Pack(ctypes.Structure):
    """Mirrors `struct Pack` of kernels/pack.cpp."""

    _fields_ = (
        *_fields("rows width groups size bits threads", c_int64),
        *_fields("from_ turn codes grid", c_void_p),
    )


@dataclass(frozen=True)
class Codes:
    """Rows of small integers, in groups of neighbouring channels: a channel is middle + step (code - top / 2).

    top is 2^bits - 1. The kernel decodes them as it reads, a few at a time.

    Args:
        codes: uint8 [..., row, bytes]; of 4 bits, a byte has one channel of the row's first half, in its lower bits,
            and one of the second.
        grid: bfloat16 [..., row, 2, groups], the middles and the steps.
        bits: Of each integer, 8 or 4.
    """

    codes: Tensor
    grid: Tensor
    bits: int

    def __post_init__(self) -> None:
        codes, grid, bits = self.codes, self.grid, self.bits
        fits = bits in (4, 8) and grid.ndim > 1 and grid.shape == (*codes.shape[:-1], 2, grid.shape[-1])
        shared = fits and grid.shape[-1] > 0 and self.shape[-1] % grid.shape[-1] == 0
        if not shared or codes.dtype != torch.uint8 or grid.dtype != torch.bfloat16:
            got = f"{codes.dtype} {tuple(codes.shape)} of {bits} bits with {grid.dtype} {tuple(grid.shape)}"
            raise ValueError(
                "codes must be uint8 [..., row, bytes] of 8 or 4 bits with a bfloat16 grid [..., row, 2, groups] whose "
                f"groups share out the channels, got {got}".replace("torch.", "")
            )

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.codes.shape[:-1], self.codes.shape[-1] * 8 // self.bits))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def expand(self, *sizes: int) -> Codes:
        """As of a tensor; the last size is that of the rows as it is."""
        grid = self.grid.expand(*sizes[:-1], *self.grid.shape[-2:])
        return Codes(self.codes.expand(*sizes[:-1], self.codes.shape[-1]), grid, self.bits)


@dataclass(frozen=True)
class NativeResult:
    """What `attend` computed; None where it was not asked.

    `out` is [batch, heads, query, value], a view of contiguous [batch, query, heads, value]. `lse`, `top`, `entropy`
    and `distance` are [batch, heads, query], `within` and `match` [n, batch, heads, query], `extra`
    [batch, heads, query, n], `column` [batch, heads, key].

    Args:
        out: Head outputs.
        lse: Log-sum-exp of each row.
        top: Largest score of each row.
        entropy: Entropy of each row.
        distance: Mean distance of each row.
        within: Mass within each width.
        match: Mass on matching keys, for each link.
        extra: Mass on extra columns.
        column: Mass of each key.
    """

    out: Any
    lse: Tensor
    top: Any
    entropy: Any
    distance: Any
    within: Any
    match: Any
    extra: Any
    column: Any


@cache
def _library() -> ctypes.CDLL | None:
    folder = Path(__file__).parent / "kernels"
    for name in _VARIANTS.get(torch.backends.cpu.get_cpu_capability(), ("rows_generic",)):
        try:
            library = ctypes.CDLL(str(folder / f"{name}.so"))
            sizes = (
                (library.foveate_call_size, _Call),
                (library.foveate_back_size, _Back),
                (library.foveate_selective_size, _Selective),
                (library.foveate_pack_size, _Pack),
            )
            for size, _ in sizes:
                size.restype = c_int64
            if all(size() == ctypes.sizeof(mirror) for size, mirror in sizes):
                return library
        except (OSError, AttributeError):
            continue
    return None


def available() -> bool:
    """Whether the kernels were built for this processor."""
    return _library() is not None


def attend(
    q: Tensor,
    k: Tensor | Codes,
    v: Tensor | Codes,
    *,
    scale: float,
    lo: Tensor,
    hi: Tensor,
    query_position: Tensor | None = None,
    key_position: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    tilt: Tensor | None = None,
    tilted: Tensor | None = None,
    index: Tensor | None = None,
    want_out: bool = True,
    want_entropy: bool = False,
    want_distance: bool = False,
    within: tuple[int, ...] = (),
    match: tuple[tuple[Tensor, Tensor], ...] = (),
    extra: Tensor | None = None,
    want_column: bool = False,
    want_top: bool = False,
    ranges: Ranges | None = None,
    activation: str | None = None,
    shift: float | Tensor = 0.0,
    cut: Tensor | None = None,
    power: int = 1,
    piece: int = 4096,
    threads: int | None = None,
) -> NativeResult:
    """Softmax attention over intervals of keys, with statistics of its weights.

    Row i sees the keys lo[i] <= j < hi[i], and nothing outside of them has any influence. A row that sees
    none has output 0, log-sum-exp -inf and statistics 0, also where there are sinks. Work is in float32,
    gradients are not followed, and the numbers do not depend on the count of threads. Keys and values in bfloat16, or
    in codes, are read as they stand.

    Args:
        q: [batch, heads, query, width].
        k: [batch, kv_heads, key, width].
        v: [batch, kv_heads, key, value].
        scale: Factor of the dot products.
        lo: int32 [batch or 1, query].
        hi: int32 [batch or 1, query].
        query_position: int32 [batch or 1, query], for `distance` and `within`, which must have them.
        key_position: int32 [batch or 1, key], for these.
        softcap: c in c * tanh(score / c).
        sinks: [heads], one more logit per head that only takes part in the normalisation.
        tilt: [batch or 1, heads or 1, key], added to the scores after the soft cap; -inf takes a key out.
        tilted: bool [batch or 1, query], the rows that `tilt` is for; by default all.
        index: int32 [batch or 1, key], which row of k and v each key is, the same for all heads; by default key j is
            row j. All that counts keys counts these.
        want_out: Ask for the mixed values.
        want_entropy: Ask for the entropy of each row, in nats.
        want_distance: Ask for the mean distance in positions, weighted.
        within: Ask for the mass on keys at most so many positions away, once for each entry.
        match: Pairs of int32 labels, [batch or 1, query] and [batch or 1, key]: ask for the mass on keys
            whose label is the query's. The label -1 of a query matches nothing.
        extra: float32 [batch or 1, key, n], more value columns, the same for all heads.
        want_column: Ask for the mass that each key receives, summed over the queries.
        ranges: The stretches of keys that row blocks visit; by default all. Outputs and log-sum-exp only.
        want_top: Ask for the largest score of each row.
        activation: Weights are this function of score + shift (`ACTIVATIONS` or `OF_ROWS`), and nothing normalises
            them: outputs are sums, and in the place of log-sum-exps stand the sums of the weights. Nothing else can be
            asked for, but for the largest score. "up_to" is exp, and 0 where that is above the row's cut; "excess" a
            power of how far exp is above it; "soft_excess" a power of shift (softplus(score) - cut).
        shift: What is added to the scores under an activation; for those of `OF_ROWS` [batch, heads, query].
        cut: [batch, heads, query], for these.
        power: Of "excess", from 1, and of "soft_excess", from 0: how many are above the cut.
        piece: Keys per part where few rows have more of them and only outputs and log-sum-exps are asked for; the
            parts are work of their own.
        threads: By default what torch uses.
    """
    (batch, heads, queries, width), groups, keys, values = _shapes(q, k, v)
    if index is not None:
        rows_there, keys = keys, index.shape[-1]
        index = _integers(index, "index", batch, keys)
        if keys and (int(index.min()) < 0 or int(index.max()) >= rows_there):
            raise ValueError(f"index must be from 0 to {rows_there - 1}")
    dtype, q = q.dtype, _rows(q)
    (k_read, k_coded), (v_read, v_coded) = _read(k), _read(v)
    lo, hi = _integers(lo, "lo", batch, queries), _integers(hi, "hi", batch, queries)
    if (want_distance or within) and (query_position is None or key_position is None):
        raise ValueError("distances need query_position and key_position")
    if query_position is not None:
        query_position = _integers(query_position, "query_position", batch, queries)
    if key_position is not None:
        key_position = _integers(key_position, "key_position", batch, keys)
    pairs = [
        (_integers(a, "match query labels", batch, queries), _integers(b, "match key labels", batch, keys))
        for a, b in match
    ]
    if sinks is not None:
        if sinks.shape != (heads,):
            raise ValueError(f"sinks must have the shape ({heads},), got {tuple(sinks.shape)}")
        sinks = _floats(sinks)
    if extra is not None:
        if extra.ndim != 3 or extra.shape[0] not in (1, batch) or extra.shape[1] != keys:
            raise ValueError(f"extra must be [{batch} or 1, {keys}, n], got {tuple(extra.shape)}")
        extra = _floats(extra)
    if tilt is not None:
        if (
            tilt.ndim != 3
            or tilt.shape[0] not in (1, batch)
            or tilt.shape[1] not in (1, heads)
            or tilt.shape[2] != keys
        ):
            raise ValueError(f"tilt must be [{batch} or 1, {heads} or 1, {keys}], got {tuple(tilt.shape)}")
        # whole register tiles are read: the last one must not end outside
        tilt = torch.nn.functional.pad(_floats(tilt), (0, -keys % _PANEL)).contiguous()
    if tilted is not None:
        if (
            tilted.dtype != torch.bool
            or tilted.ndim != 2
            or tilted.shape[0] not in (1, batch)
            or tilted.shape[1] != queries
        ):
            raise ValueError(f"tilted must be bool [{batch} or 1, {queries}], got {tuple(tilted.shape)}")
        tilted = tilted.contiguous()
    of_rows = activation in OF_ROWS
    if of_rows != isinstance(shift, Tensor) or of_rows != (cut is not None):
        raise ValueError(f"{', '.join(OF_ROWS)} take a shift and a cut for each row, and nothing else does")
    if isinstance(shift, Tensor) and cut is not None:
        shift, cut = (_floats(x.expand(batch, heads, queries)) for x in (shift, cut))
    if power < (least := int(activation != "soft_excess")):
        raise ValueError(f"power must be at least {least}, got {power}")
    if piece < 1:
        raise ValueError(f"piece must be at least 1, got {piece}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")

    if (ranges is not None or activation is not None) and (
        want_entropy or want_distance or within or match or extra is not None or want_column
    ):
        raise ValueError("under a pattern, or an activation, only outputs and log-sum-exps can be asked for")
    if activation is not None and sinks is not None:
        raise ValueError("weights under an activation are not normalised: sinks have no part in them")

    rings = sorted(set(within))
    rows = (batch, heads, queries)
    out = torch.empty(batch, queries, heads, values) if want_out else None
    lse = torch.empty(rows)
    top = torch.empty(rows) if want_top else None
    entropy = torch.empty(rows) if want_entropy else None
    distance = torch.empty(rows) if want_distance else None
    within_mass = torch.empty(len(rings), *rows) if within else None
    match_mass = torch.empty(len(match), *rows) if match else None
    extra_mass = torch.empty(*rows, extra.shape[2]) if extra is not None else None
    column = torch.empty(batch, heads, keys) if want_column else None

    call = _Call(
        batch=batch,
        heads=heads,
        groups=groups,
        queries=queries,
        keys=keys,
        width=width,
        values=values,
        extras=0 if extra is None else extra.shape[2],
        withins=len(rings),
        matches=len(pairs),
        threads=threads or torch.get_num_threads(),
        q_stride=q.stride()[:3],
        k_stride=k_read.stride()[:3] if k_coded is None else (0, 0, 0),
        v_stride=v_read.stride()[:3] if v_coded is None else (0, 0, 0),
        k_coded=k_coded or _Coded(),
        v_coded=v_coded or _Coded(),
        lo_stride=_step(lo),
        hi_stride=_step(hi),
        query_position_stride=0 if query_position is None else _step(query_position),
        key_position_stride=0 if key_position is None else _step(key_position),
        within=(c_int32 * len(rings))(*(max(-1, min(w, 2**31 - 1)) for w in rings)),
        match_query=(c_void_p * len(pairs))(*(a.data_ptr() for a, _ in pairs)),
        match_key=(c_void_p * len(pairs))(*(b.data_ptr() for _, b in pairs)),
        match_query_stride=(c_int64 * len(pairs))(*(_step(a) for a, _ in pairs)),
        match_key_stride=(c_int64 * len(pairs))(*(_step(b) for _, b in pairs)),
        extra_stride=0 if extra is None else _step(extra),
        tilt_batch_stride=0 if tilt is None else _step(tilt),
        tilt_head_stride=0 if tilt is None or tilt.shape[1] == 1 else tilt.stride(1),
        tilted_stride=0 if tilted is None else _step(tilted),
        index_stride=0 if index is None else _step(index),
        scale=scale,
        softcap=softcap or 0.0,
        ranges=_visited(ranges, batch, heads, queries),
        activation=_activation(activation),
        power=power,
        shift=0.0 if isinstance(shift, Tensor) else shift,
        piece=piece,
    )
    _run(
        "foveate_attend",
        call,
        f"attention over {queries} queries and {keys} keys",
        **{"q": q, "k": None if k_coded else k_read, "v": None if v_coded else v_read},
        **{"sinks": sinks, "extra": extra},
        **{"tilt": tilt, "tilted": tilted, "index": index},
        **{"lo": lo, "hi": hi, "query_position": query_position, "key_position": key_position},
        **{"row_shift": shift if isinstance(shift, Tensor) else None, "row_cut": cut},
        **{"out": out, "lse": lse, "top": top, "entropy": entropy, "distance": distance},
        **{"within_mass": within_mass, "match_mass": match_mass, "extra_mass": extra_mass, "column": column},
    )

    if within_mass is not None and tuple(rings) != tuple(within):
        within_mass = within_mass[[rings.index(w) for w in within]]
    return NativeResult(
        out=None if out is None else out.to(dtype).transpose(1, 2),
        lse=lse,
        top=top,
        entropy=entropy,
        distance=distance,
        within=within_mass,
        match=match_mass,
        extra=extra_mass,
        column=column,
    )


def derive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lse: Tensor,
    shared: Tensor,
    *,
    scale: float,
    lo: Tensor,
    hi: Tensor,
    ranges: Ranges | None = None,
    activation: str | None = None,
    shift: float | Tensor = 0.0,
    cut: Tensor | None = None,
    common: Tensor | None = None,
    power: int = 1,
    threads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of `attend` with respect to queries, keys and values.

    Args:
        q: [batch, heads, query, width].
        k: [batch, kv_heads, key, width].
        v: [batch, kv_heads, key, value].
        dout: Derivative of the outputs, [batch, heads, query, value].
        lse: Log-sum-exps, [batch, heads, query]; under an activation the sums of the weights.
        shared: sum of dout * out, minus the derivative of lse, [batch, heads, query].
        scale: Factor of the dot products.
        lo: int32 [batch or 1, query].
        hi: int32 [batch or 1, query].
        ranges: The stretches of keys that row blocks visit; by default all.
        activation: Of the weights, as of `attend`. Under "soft_excess" the derivatives are those of means, outputs
            divided by the sums of the weights, where neither shift nor cut depends on the scores.
        shift: What was added to the scores; of "soft_excess" as of `attend`.
        cut: Of "soft_excess", as of `attend`.
        common: For "soft_excess", what to add to the derivative of each softplus(score), [batch, heads, query]: what
            the cut passes on to all of its row.
        power: Of "soft_excess", from 1.
        threads: By default what torch uses.

    Returns:
        The derivatives, in the shapes and dtypes of q, k and v.
    """
    number = _activation(activation, derived=True)
    (batch, heads, queries, width), groups, keys, values = _shapes(q, k, v)
    dtype = q.dtype
    q, k, v, dout = (_rows(x) for x in (q, k, v, dout))
    lse, shared = _floats(lse), _floats(shared)
    given = {"row_shift": shift if isinstance(shift, Tensor) else None, "row_cut": cut, "common": common}
    rows = {name: _floats(x.expand(batch, heads, queries)) for name, x in given.items() if x is not None}
    if len(rows) != (len(given) if activation in OF_ROWS else 0):
        raise ValueError(f"{OF_ROWS[-1]} takes a shift, a cut and what is common for each row, and nothing else does")
    lo, hi = _integers(lo, "lo", batch, queries), _integers(hi, "hi", batch, queries)
    dq, dk, dv = (torch.empty(x.shape) for x in (q, k, v))
    call = _Back(
        batch=batch,
        heads=heads,
        groups=groups,
        queries=queries,
        keys=keys,
        width=width,
        values=values,
        threads=threads or torch.get_num_threads(),
        q_stride=q.stride()[:3],
        k_stride=k.stride()[:3],
        v_stride=v.stride()[:3],
        dout_stride=dout.stride()[:3],
        lo_stride=_step(lo),
        hi_stride=_step(hi),
        ranges=_visited(ranges, batch, heads, queries),
        activation=number,
        power=power,
        scale=scale,
        shift=0.0 if isinstance(shift, Tensor) else shift,
    )
    _run(
        "foveate_back",
        call,
        f"derivatives of attention over {queries} queries and {keys} keys",
        **{"q": q, "k": k, "v": v, "dout": dout, "lse": lse, "shared": shared, "lo": lo, "hi": hi},
        **rows,
        **{"dq": dq, "dk": dk, "dv": dv},
    )
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def selective(
    dt: Tensor,
    x: Tensor,
    rate: Tensor,
    b: Tensor,
    c: Tensor,
    first: Tensor,
    *,
    keep: bool = False,
    threads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The selective scan, y = c . h of the states h = exp(dt rate) h before + dt x b; gradients are not followed.

    All float32; the numbers do not depend on the count of threads.

    Args:
        dt: [batch, time, inner], not negative.
        x: [batch, time, inner].
        rate: [inner, states], not positive.
        b: [batch, time, states].
        c: [batch, time, states].
        first: The states before the first token, [batch, inner, states].
        keep: Ask for what `derive_selective` needs.
        threads: By default what torch uses.

    Returns:
        The outputs, [batch, time, inner], the last states, and states here and there for the way back, or None.
    """
    call, inputs = _selective(dt, x, rate, b, c, first, threads=threads)
    y, last = dt.new_empty(dt.shape), dt.new_empty(first.shape)
    stretches, channels = -(-call.time // _STRETCH), -(-call.inner // _PANEL) * _PANEL
    marks = dt.new_empty(call.batch, stretches, channels * call.states) if keep else None
    _run(
        "foveate_selective",
        call,
        f"a selective scan of {call.time} tokens",
        **inputs,
        **{"y": y, "last": last, "marks": marks},
    )
    return y, last, marks


def derive_selective(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    marks: Tensor,
    dy: Tensor,
    dlast: Tensor,
    *,
    threads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Derivatives of `selective` with respect to its inputs.

    Args:
        inputs: What it was called with.
        marks: What it kept.
        dy: Derivative of the outputs, [batch, time, inner].
        dlast: Derivative of the last states, [batch, inner, states].
        threads: By default what torch uses.

    Returns:
        The derivatives, in the order and the shapes of the inputs.
    """
    call, given = _selective(*inputs, threads=threads)
    found = {f"d_{name}": torch.empty_like(t) for name, t in given.items()}
    found["d_rate"] = torch.empty_like(found["d_first"])
    _run(
        "foveate_selective_back",
        call,
        f"derivatives of a selective scan of {call.time} tokens",
        **given,
        **{"marks": marks, "dy": _floats(dy), "dlast": _floats(dlast)},
        **found,
    )
    # those of the rates come by batch entries
    found["d_rate"] = found["d_rate"].sum(0)
    d_dt, d_x, d_rate, d_b, d_c, d_first = found.values()
    return d_dt, d_x, d_rate, d_b, d_c, d_first


def pack(rows: Tensor, turn: Tensor, groups: int, bits: int, *, threads: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows as small integers, each with a grid of its own: what `Codes` holds of them.

    A group of channels x becomes round((x turn - middle) / step + top / 2), where middle and step reach from its
    smallest to its largest number; what is not finite makes the whole group NaN.

    Args:
        rows: float32 [rows, width], with at most as many channels as the groups have.
        turn: float32 [size, size], the rotation of a group.
        groups: How many groups of `size` channels a row is cut into; what is missing of the last are zeros.
        bits: Of each integer, 8 or 4.
        threads: By default what torch uses.

    Returns:
        The codes, uint8 [rows, groups * size * bits / 8], and the grid, bfloat16 [rows, 2, groups].
    """
    (count, width), size = rows.shape, len(turn)
    breadth = groups * size
    if bits not in (4, 8) or breadth * bits % 8 or turn.shape != (size, size) or not width <= breadth <= MAX_WIDTH:
        raise ValueError(
            f"rows of {width} channels do not fit into {groups} groups of {tuple(turn.shape)} of {bits} bits, of "
            f"{MAX_WIDTH} channels at most"
        )
    rows, turn = _floats(rows), _floats(turn)
    codes = torch.empty(count, breadth * bits // 8, dtype=torch.uint8)
    grid = torch.empty(count, 2, groups, dtype=torch.bfloat16)
    sizes = {"rows": count, "width": width, "groups": groups, "size": size, "bits": bits}
    call = _Pack(**sizes, threads=threads or torch.get_num_threads())
    _run("foveate_pack", call, f"{count} rows as integers", from_=rows, turn=turn, codes=codes, grid=grid)
    return codes, grid


def _selective(
    dt: Tensor, x: Tensor, rate: Tensor, b: Tensor, c: Tensor, first: Tensor, *, threads: int | None
) -> tuple[_Selective, dict[str, Tensor]]:
    """A call without its pointers, and its inputs by their names, contiguous."""
    if dt.ndim != 3 or rate.ndim != 2:
        raise ValueError(f"dt must have 3 dimensions and rate 2, got {dt.ndim} and {rate.ndim}")
    (batch, time, inner), states = dt.shape, rate.shape[1]
    tokens, read, state = (batch, time, inner), (batch, time, states), (batch, inner, states)
    inputs = {"dt": dt, "x": x, "rate": rate, "b": b, "c": c, "first": first}
    for (name, t), shape in zip(inputs.items(), (tokens, tokens, (inner, states), read, read, state), strict=True):
        if t.shape != shape or t.dtype != torch.float32 or t.device.type != "cpu":
            got = f"{t.dtype} {tuple(t.shape)} on {t.device}".replace("torch.", "")
            raise ValueError(f"{name} must be float32 {shape} on the CPU, got {got}")
    call = _Selective(
        batch=batch,
        time=time,
        inner=inner,
        states=states,
        stretch=_STRETCH,
        threads=threads or torch.get_num_threads(),
    )
    return call, {name: _floats(t) for name, t in inputs.items()}


def _run(name: str, call: ctypes.Structure, doing: str, /, **tensors: Tensor | None) -> None:
    """Points a call at its tensors, by the names of its fields, and runs it; `doing` is for the error."""
    library = _library()
    if library is None:
        raise RuntimeError("the native kernels were not built for this machine: check available() first")
    for field, tensor in tensors.items():
        setattr(call, field, None if tensor is None else tensor.data_ptr())
    if getattr(library, name)(ctypes.byref(call)):
        raise MemoryError(f"out of memory in {doing}")


def _activation(name: str | None, derived: bool = False) -> int:
    if derived and name in OF_ROWS[:-1]:
        raise ValueError(f"{name} has no derivatives")
    return 0 if name is None else 1 + (*ACTIVATIONS, *OF_ROWS).index(name)


def _visited(ranges: Ranges | None, batch: int, heads: int, queries: int) -> _Ranges:
    if ranges is None:
        return _Ranges()
    blocks = -(-queries // ranges.rows)
    if ranges.batch not in (1, batch) or ranges.heads not in (1, heads):
        raise ValueError(f"ranges for {ranges.batch} x {ranges.heads} heads in a call of {batch} x {heads}")
    if len(ranges.start) != ranges.batch * ranges.heads * blocks + 1:
        raise ValueError(f"ranges must say where each of {blocks} row blocks begins")
    return _Ranges(
        start=ranges.start.data_ptr(),
        bounds=ranges.bounds.data_ptr(),
        rows=ranges.rows,
        batch=ranges.batch,
        heads=ranges.heads,
        blocks=blocks,
    )


def _shapes(q: Tensor, k: Tensor | Codes, v: Tensor | Codes) -> tuple[torch.Size, int, int, int]:
    if not len(q.shape) == len(k.shape) == len(v.shape) == 4:
        raise ValueError(f"q, k and v must have 4 dimensions, got {len(q.shape)}, {len(k.shape)} and {len(v.shape)}")
    dtypes = [x.dtype for x in (q, k, v) if isinstance(x, Tensor)]
    if len(set(dtypes)) > 1 or q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        got = ", ".join(map(str, dtypes))
        raise ValueError(f"q, k and v must share float32, bfloat16 or float16, got {got}")
    if any(x.device.type != "cpu" for x in (q, k, v)):
        raise ValueError(f"q, k and v must be on the CPU, got {q.device}, {k.device} and {v.device}")
    if k.shape[:3] != v.shape[:3] or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"q, k and v do not fit together: {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}")
    if 0 in (q.shape[1], k.shape[1]) or q.shape[1] % k.shape[1]:
        raise ValueError(f"the {q.shape[1]} query heads must be a multiple of the {k.shape[1]} kv heads")
    if not (1 <= q.shape[3] <= MAX_WIDTH and 1 <= v.shape[3] <= MAX_WIDTH):
        raise ValueError(f"the head widths must be between 1 and {MAX_WIDTH}, got {q.shape[3]} and {v.shape[3]}")
    return q.shape, k.shape[1], k.shape[2], v.shape[3]


def _integers(x: Tensor, name: str, batch: int, length: int) -> Tensor:
    if x.dtype != torch.int32 or x.ndim != 2 or x.shape[0] not in (1, batch) or x.shape[1] != length:
        raise ValueError(
            f"{name} must be int32 [{batch} or 1, {length}], got {x.dtype} {tuple(x.shape)}".replace("torch.", "")
        )
    return x.contiguous()


def _rows(x: Tensor) -> Tensor:
    """float32, with the last dimension contiguous; a copy only where it must be."""
    x = x.detach().float()
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _read(x: Tensor | Codes) -> tuple[Any, _Coded | None]:
    """Rows as the kernel reads them, which must outlive the call, and how they are coded; None: floats."""
    if isinstance(x, Codes):
        groups = x.grid.shape[-1]
        codes = x.codes if x.codes.stride(3) == 1 else x.codes.contiguous()
        grid = x.grid if x.grid.stride()[3:] == (groups, 1) else x.grid.contiguous()
        coded = _Coded(codes.data_ptr(), grid.data_ptr(), codes.stride()[:3], grid.stride()[:3], groups, x.bits)
        return (codes, grid), coded
    if x.dtype == torch.bfloat16 and x.stride(3) == 1:
        x = x.detach()
        return x, _Coded(codes=x.data_ptr(), stride=tuple(2 * n for n in x.stride()[:3]), bits=16)
    return _rows(x), None


def _floats(x: Tensor) -> Tensor:
    return x.detach().float().contiguous()


def _step(x: Tensor) -> int:
    """Elements from one batch entry to the next; 0 where one entry serves all."""
    return 0 if x.shape[0] == 1 else x.stride(0)
