r"""Exact attention over the key blocks that are visited, with memory linear in N, forward and backward.

    s = scale q k^T,    m' = max(m, max s),    l' = e^{m - m'} l + \sum e^{s - m'},    o' = e^{m - m'} o + e^{s - m'} v
    out = o / l,        lse = m + ln l,        d = \sum out dout,                      ds = p (dout v^T - d + dlse)

Row blocks walk over the key blocks that they visit; blocks that nobody visits cost nothing. The backward pass makes
the weights p = e^{s - lse} again, tile by tile. Under an activation f rows have no normaliser:
out = \sum f(s + shift) v, the sum of the weights stands in the place of lse, and ds = f'(s + shift) (dout v^T + dsum).

Two ways to the same numbers: the package's CPU kernel, which walks over stretches of adjacent blocks, and plain PyTorch
on any device and in any dtype, where row blocks that visit equally many key blocks are one batch of matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core import native
from foveate.core.errors import BadInput, NotSupported

if TYPE_CHECKING:
    from foveate.core.mechanism import Visits
    from foveate.core.reductions import Reduction
    from foveate.core.rows import View

__all__ = ["PIECE", "Ranges", "Tiles", "attend", "by_kernel", "covered", "refuses", "with_sinks"]

# row and key blocks of a dense call
ROWS, KEYS = 64, 256
# keys per part where few rows have many keys
PIECE = 4096
ALONE = {"sigmoid": torch.sigmoid, "relu": torch.relu, "softplus": torch.nn.functional.softplus}
SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": lambda s: torch.sigmoid(s) * torch.sigmoid(-s),
    "relu": lambda s: (s > 0).to(s.dtype),
    "softplus": torch.sigmoid,
}
# bytes of scores that one batch of tiles makes: more do not stay in the cache
STEP_BYTES = 4 << 20


def refuses(view: View, reductions: Sequence[Reduction] = ()) -> str:
    """Why tiles cannot stand for this call, or ""."""
    if reductions:
        return f"{reductions[0]} needs the rows"
    if view.bias is not None or view.mask.dense is not None:
        return "an additive bias, or a mask that is no interval of keys"
    if view.tilt is not None:
        return "a bias on keys, which edits ask for"
    if view.dropout:
        return "dropout acts on single weights"
    return ""


def attend(
    view: View,
    visits: Visits | None = None,
    *,
    activation: str | None = None,
    shift: float = 0.0,
    piece: int = PIECE,
) -> tuple[Float[Tensor, "batch heads query value_dim"], Float[Tensor, "batch heads query"]]:
    """Attention of one call over the key blocks that each row block visits; differentiable, twice not.

    Args:
        view: The attention call, without bias, tilt and dropout.
        visits: Which key blocks are visited; None: all that the mask lets through.
        activation: Weights are this function of each score, and nothing normalises them: "sigmoid", "relu", "softplus";
            None: softmax.
        shift: What is added to the scores before that function.
        piece: Keys per part, by which the CPU kernel divides a few rows over many keys among the cores.

    Returns:
        Head outputs in the dtype of the queries, and the log-sum-exp of each row, -inf for a row that sees nothing
        (under an activation the sum of its weights).

    Raises:
        NotSupported: the call has something that is not in the tiles, see `refuses`.
        BadInput: an activation with a learned sink.
    """
    if reason := refuses(view):
        raise NotSupported(f"tiled attention: {reason}")
    if activation is not None and view.sinks is not None:
        raise BadInput(f"{activation} attention has no normaliser that a learned sink could stand in")
    call = Call(Tiles.of(view, visits), view.scale, view.softcap, activation, shift, piece)
    if visits is None and view.queries == 1 and view.mask.plain == "full":
        out, lse = single(view.q, view.k, view.v, call)
    else:
        out, lse = Exact.apply(view.q, view.k, view.v, call)
    return (out, lse) if view.sinks is None else with_sinks(out, lse, view.sinks)


def with_sinks(
    out: Float[Tensor, "batch heads query value_dim"],
    lse: Float[Tensor, "batch heads query"],
    sinks: Float[Tensor, " heads"],
) -> tuple[Float[Tensor, "batch heads query value_dim"], Float[Tensor, "batch heads query"]]:
    """Outputs and log-sum-exps when a learned sink takes its part of each row."""
    # a row that sees nothing has nothing to weigh its sink against
    empty = lse == -torch.inf
    whole = torch.logaddexp(lse.masked_fill(empty, 0.0), sinks.to(lse)[:, None])
    share = torch.exp(lse.masked_fill(empty, 0.0) - whole)
    return (out * share[..., None]).to(out.dtype), whole.masked_fill(empty, -torch.inf)


# ---------------------------------------------------------------- what is visited


def covered(view: View, visits: Visits) -> Visits:
    """The visits, if they have a place for every block and leave no row with nothing to look at.

    Raises:
        BadInput: they do not; names the first such row, where there is one.
    """
    want = (-(-view.queries // visits.rows), -(-view.keys // visits.keys))
    got = tuple(visits.table.shape[-2:])
    if got != want:
        raise BadInput(
            f"a pattern of {got[0]} x {got[1]} blocks for {view.queries} rows and {view.keys} keys in blocks of "
            f"{visits.rows} x {visits.keys}: it must have {want[0]} x {want[1]}"
        )
    if not view.queries or not view.keys:
        return visits
    low, high = view.mask.low[:, None].long(), view.mask.high[:, None].long()
    row = torch.arange(view.queries, device=low.device) // visits.rows
    before = torch.nn.functional.pad(visits.table.long().cumsum(-1), (1, 0))
    size = (max(len(before), len(low)), before.shape[1], view.queries)

    def visited(edge: Tensor) -> Tensor:
        return before[:, :, row].expand(*size, -1).gather(-1, edge.expand(size)[..., None])[..., 0]

    first, behind = low // visits.keys, (high + visits.keys - 1) // visits.keys
    sees = view.mask.rows[:, None]
    nothing = sees & (visited(behind) == visited(torch.minimum(first, behind)))
    if bool(nothing.any()):
        entry, head, i = nothing.nonzero()[0].tolist()
        a, b = (int(t.expand(size)[entry, head, i]) for t in (low, high))
        which = f"head {head}" if size[1] > 1 else "every head"
        raise BadInput(
            f"the pattern visits none of the keys {a} to {b - 1} that row {i} of batch entry {entry} may see, in "
            f"{which} of {view.layer.name}: let each row visit at least one block that the mask leaves it"
        )
    return visits


@dataclass(frozen=True, eq=False)
class Ranges:
    """Stretches of adjacent keys that row blocks visit, one row block behind the other.

    Args:
        start: Where the stretches of each row block begin in `bounds`, with the end of the last one.
        bounds: First key of each stretch, and one past its last.
        rows: Rows per row block.
        batch: Batch entries that have stretches of their own; 1: all have the same.
        heads: Heads that have.
    """

    start: Int[Tensor, " blocks_and_one"]
    bounds: Int[Tensor, "stretches two"]
    rows: int
    batch: int
    heads: int


@dataclass(frozen=True, eq=False)
class Tiles:
    """The key blocks that each row block visits, and the keys that each row may see.

    Args:
        table: True where a row block visits a key block; None: everywhere.
        low: First key that each row may see.
        high: One past the last.
        rows: Rows per row block.
        keys: Keys per key block.
        count: How many keys there are.
    """

    table: Bool[Tensor, "#batch #heads row_blocks key_blocks"] | None
    low: Int[Tensor, "#batch query"]
    high: Int[Tensor, "#batch query"]
    rows: int
    keys: int
    count: int

    @classmethod
    def of(cls, view: View, visits: Visits | None) -> Tiles:
        """The tiles of a call; blocks that the mask hides from all their rows are not visited."""
        mask = view.mask
        if visits is None:
            rows, keys = (min(most, max(1, n)) for most, n in ((ROWS, view.queries), (KEYS, view.keys)))
            return cls(None, mask.low, mask.high, rows, keys, view.keys)
        return cls(visits.table, mask.low, mask.high, visits.rows, visits.keys, view.keys)

    @cached_property
    def seen(self) -> Bool[Tensor, "#batch #heads row_blocks key_blocks"]:
        """The visits that the mask leaves."""
        blocks, stop = -(-self.count // self.keys), self.low.shape[1]
        pad = (0, -stop % self.rows)
        # rows behind the last one, and rows that see nothing, ask for nothing
        empty = self.high <= self.low
        low = torch.nn.functional.pad(self.low.masked_fill(empty, self.count), pad, value=self.count)
        high = torch.nn.functional.pad(self.high.masked_fill(empty, 0), pad)
        low, high = low.unflatten(1, (-1, self.rows)).amin(2), high.unflatten(1, (-1, self.rows)).amax(2)
        first = torch.arange(blocks, device=low.device) * self.keys
        near = ((first < high[..., None]) & (first + self.keys > low[..., None]))[:, None]
        return near if self.table is None else near & self.table

    @cached_property
    def ranges(self) -> Ranges | None:
        """The visits as stretches of keys, for the CPU kernel; None where the mask says it all."""
        if self.table is None:
            return None
        seen = self.seen
        edge = torch.nn.functional.pad(seen.to(torch.int8), (1, 1)).diff(dim=-1)
        first, behind = ((edge == sign).nonzero()[:, 3] for sign in (1, -1))
        bounds = torch.stack([first * self.keys, (behind * self.keys).clamp_max(self.count)], 1).to(torch.int32)
        start = torch.nn.functional.pad((edge == 1).sum(-1).flatten().cumsum(0), (1, 0))
        return Ranges(start, bounds.contiguous(), self.rows, *seen.shape[:2])


# ---------------------------------------------------------------- forward and backward


@dataclass(frozen=True, eq=False)
class Call:
    """What both passes need besides the tensors.

    Args:
        tiles: The visits.
        scale: Factor of the dot products.
        softcap: c of c tanh(s / c), or None.
        activation: What makes weights of scores, None: softmax.
        shift: What is added to the scores under an activation.
        piece: Keys per part of few rows.
    """

    tiles: Tiles
    scale: float
    softcap: float | None
    activation: str | None
    shift: float
    piece: int


def by_kernel(q: Tensor, v: Tensor) -> bool:
    """Whether the CPU kernel can do it."""
    return (
        native.available()
        and q.device.type == "cpu"
        and q.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and max(q.shape[-1], v.shape[-1]) <= native.MAX_WIDTH
    )


class Exact(torch.autograd.Function):
    """Outputs and log-sum-exps, and their derivatives from weights that are made again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        out, lse = (kernel if by_kernel(q, v) else batched)(q, k, v, call)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = call
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        call: Call = ctx.call
        # what all weights of a row have in common
        shared = -dlse if call.activation else (dout.to(lse) * out.to(lse)).sum(-1) - dlse
        way = kernel_back if by_kernel(q, v) and call.softcap is None else batched_back
        return *way((q, k, v, dout), lse, shared, call), None


def kernel(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """The forward pass by the CPU kernel."""
    tiles = call.tiles
    found = native.attend(
        q,
        k,
        v,
        scale=call.scale,
        lo=tiles.low.contiguous(),
        hi=tiles.high.contiguous(),
        softcap=call.softcap,
        ranges=tiles.ranges,
        activation=call.activation,
        shift=call.shift,
        piece=call.piece,
    )
    return found.out, found.lse


def kernel_back(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor], lse: Tensor, shared: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass by the CPU kernel."""
    q, k, v, dout = tensors
    tiles = call.tiles
    return native.derive(
        q,
        k,
        v,
        dout,
        lse,
        shared,
        scale=call.scale,
        lo=tiles.low.contiguous(),
        hi=tiles.high.contiguous(),
        ranges=tiles.ranges,
        activation=call.activation,
        shift=call.shift,
    )


# ---------------------------------------------------------------- plain PyTorch


def single(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """One row that sees all keys: its weights are no more than its scores, and what starts fastest is best."""
    kind = working(q)
    s, _ = scores(q.to(kind).unflatten(1, (k.shape[1], -1)).flatten(2, 3).flatten(0, 1), k.to(kind).flatten(0, 1), call)
    if call.activation is None:
        lse = s.logsumexp(-1)
        p = torch.exp(s - lse[..., None])
    else:
        p = ALONE[call.activation](s + call.shift if call.shift else s)
        lse = p.sum(-1)
    out = p @ v.to(kind).flatten(0, 1)
    return out.reshape(*q.shape[:3], -1).to(q.dtype), lse.reshape(q.shape[:3])


@dataclass(frozen=True, eq=False)
class Batch:
    """Row blocks that visit equally many key blocks.

    Args:
        row: Which row block of all (batch entry, head, row block) each is.
        pair: Which (batch entry, KV head) it reads.
        block: The key blocks that it visits.
        allowed: Which of their keys each of its rows may see.
    """

    row: Int[Tensor, " tiles"]
    pair: Int[Tensor, " tiles"]
    block: Int[Tensor, "tiles visited"]
    allowed: Bool[Tensor, "tiles rows key"]


def batches(q: Tensor, k: Tensor, tiles: Tiles) -> Iterator[list[Batch]]:
    """The row blocks, those that visit equally many key blocks together; of each lot its steps over the keys."""
    batch, heads, _, _ = q.shape
    seen = tiles.seen.expand(batch, heads, -1, -1)
    row_blocks, device = seen.shape[2], q.device
    pad = (0, -tiles.low.shape[1] % tiles.rows)
    low, high = (
        torch.nn.functional.pad(t.expand(batch, -1), pad).unflatten(1, (-1, tiles.rows))
        for t in (tiles.low, tiles.high)
    )
    flat = seen.flatten(0, 2)
    count = flat.sum(-1)
    for many in count.unique().tolist():
        alike = (count == many).nonzero()[:, 0]
        per_step = max(1, STEP_BYTES // (4 * tiles.rows * tiles.keys * max(1, many)))
        for row in alike.split(per_step):
            entry, head = row // (heads * row_blocks), row // row_blocks % heads
            pair = entry * k.shape[1] + head // (heads // k.shape[1])
            block = flat[row].nonzero()[:, 1].reshape(len(row), many)
            lo, hi = (t[entry, row % row_blocks][..., None] for t in (low, high))
            # a row block that visits much walks over it in several steps
            step = max(1, STEP_BYTES // (4 * tiles.rows * tiles.keys * len(row)))
            steps = []
            for part in block.split(step, 1):
                at = (part[..., None] * tiles.keys + torch.arange(tiles.keys, device=device)).flatten(1)[:, None]
                steps.append(Batch(row, pair, part, (at >= lo) & (at < hi)))
            yield steps


def blocked(x: Float[Tensor, "batch heads length dim"], size: int) -> Float[Tensor, "pairs blocks size dim"]:
    """Cut into blocks, the last one filled up with zeros."""
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size)).flatten(0, 1)


def working(x: Tensor) -> torch.dtype:
    """The precision of scores and weights."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def gathered(blocks: Float[Tensor, "pairs blocks size dim"], one: Batch) -> Float[Tensor, "tiles key dim"]:
    """The keys or values that row blocks visit; what none of their rows may see is zero, whatever stands there."""
    found = blocks[one.pair[:, None], one.block].flatten(1, 2)
    return torch.where(one.allowed.any(1)[..., None], found, 0.0)


def scores(q: Tensor, k: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    """Scores, and the derivative of the soft cap."""
    s = q @ k.transpose(1, 2) * call.scale
    if call.softcap is None:
        return s, None
    bent = torch.tanh(s / call.softcap)
    return call.softcap * bent, 1 - bent.square()


def batched(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """The forward pass in PyTorch."""
    tiles, kind = call.tiles, working(q)
    rows = blocked(q.to(kind), tiles.rows)
    size = rows.shape[:2]
    rows = rows.flatten(0, 1)
    keys, values = blocked(k.to(kind), tiles.keys), blocked(v.to(kind), tiles.keys)
    out = rows.new_zeros(len(rows), tiles.rows, v.shape[3])
    lse = rows.new_full((len(rows), tiles.rows), -torch.inf if call.activation is None else 0.0)
    for steps in batches(q, k, tiles):
        row = steps[0].row
        peak = rows.new_full((len(row), tiles.rows, 1), torch.finfo(kind).min)
        mass, mixed = torch.zeros_like(peak), torch.zeros_like(out[row])
        for one in steps:
            if not one.block.numel():
                continue
            some = rows[row].masked_fill(~one.allowed.any(2)[..., None], 0.0)
            s, _ = scores(some, gathered(keys, one), call)
            if call.activation is not None:
                e = ALONE[call.activation](s + call.shift).masked_fill(~one.allowed, 0.0)
                mass += e.sum(-1, keepdim=True)
                mixed += e @ gathered(values, one)
                continue
            s = s.masked_fill(~one.allowed, -torch.inf)
            higher = torch.maximum(peak, s.amax(-1, keepdim=True))
            fade, e = torch.exp(peak - higher), torch.exp(s - higher)
            mass = fade * mass + e.sum(-1, keepdim=True)
            mixed = fade * mixed + e @ gathered(values, one)
            peak = higher
        if call.activation is None:
            lse[row] = torch.where(mass > 0, peak + torch.log(mass), -torch.inf)[..., 0]
            mixed = mixed / torch.where(mass > 0, mass, 1.0)
        else:
            lse[row] = mass[..., 0]
        out[row] = mixed
    batch, heads, queries, _ = q.shape
    out = out.reshape(batch, heads, size[1] * tiles.rows, -1)[:, :, :queries]
    return out.to(q.dtype), lse.reshape(batch, heads, -1)[:, :, :queries].contiguous()


def batched_back(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor], lse: Tensor, shared: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass in PyTorch."""
    q, k, v, dout = tensors
    tiles, kind = call.tiles, working(q)
    rows, douts = (blocked(x.to(kind), tiles.rows).flatten(0, 1) for x in (q, dout))
    keys, values = blocked(k.to(kind), tiles.keys), blocked(v.to(kind), tiles.keys)
    lse, shared = (blocked(x[..., None].to(kind), tiles.rows).flatten(0, 1) for x in (lse, shared))
    dq, dk, dv = torch.zeros_like(rows), torch.zeros_like(keys), torch.zeros_like(values)
    for steps in batches(q, k, tiles):
        for one in steps:
            if not one.block.numel():
                continue
            hidden = ~one.allowed.any(2)[..., None]
            some, given = (x[one.row].masked_fill(hidden, 0.0) for x in (rows, douts))
            key, value = gathered(keys, one), gathered(values, one)
            s, bend = scores(some, key, call)
            if call.activation is None:
                p = slope = torch.exp(s - lse[one.row].masked_fill(hidden, 0.0)).masked_fill(~one.allowed, 0.0)
            else:
                p = ALONE[call.activation](s + call.shift).masked_fill(~one.allowed, 0.0)
                slope = SLOPES[call.activation](s + call.shift).masked_fill(~one.allowed, 0.0)
            ds = slope * (given @ value.transpose(1, 2) - shared[one.row].masked_fill(hidden, 0.0))
            ds = (ds if bend is None else ds * bend) * call.scale
            dq.index_add_(0, one.row, ds @ key)
            at = (one.pair[:, None], one.block)
            for total, part in ((dk, ds.transpose(1, 2) @ some), (dv, p.transpose(1, 2) @ given)):
                total.index_put_(at, part.unflatten(1, (-1, tiles.keys)), accumulate=True)

    def whole(x: Tensor, like: Tensor) -> Tensor:
        return x.reshape(*like.shape[:2], -1, like.shape[3])[:, :, : like.shape[2]].to(like.dtype)

    return whole(dq, q), whole(dk, k), whole(dv, v)
