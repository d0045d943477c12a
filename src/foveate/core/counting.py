"""Attention through a fast memory that counts what goes in and out, and never holds more than it can.

What `foveate.core.traffic` says of an order is checked against these runs: their counts are the same, and what comes
out is attention. For small tensors: blocks and columns pass by one at a time, in Python.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import BadInput, TooBig, unknown
from foveate.core.traffic import Shape, Traffic, even, product_blocks, row_blocks, rows_that_fit, side_that_fits

__all__ = ["Counted", "FastMemory", "Order", "counted"]

Order = Literal["naive", "tiled", "small_memory"]


class FastMemory:
    """A fast memory of so many numbers. What is in it was loaded or made there, and takes room until it is freed."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.held: dict[int, Tensor] = {}
        self.used = 0
        self.read: dict[str, int] = {}
        self.written: dict[str, int] = {}
        self.peak = 0

    def place(self, made: Tensor) -> Tensor:
        """Gives room to a tensor.

        Raises:
            TooBig: there is not enough.
        """
        if self.used + made.numel() > self.size:
            raise TooBig(
                f"a fast memory of {self.size} numbers holds {self.used}, and {made.numel()} more do not fit: take "
                "smaller blocks"
            )
        self.held[id(made)] = made
        self.used += made.numel()
        self.peak = max(self.peak, self.used)
        return made

    def load(self, slow: Tensor, what: str) -> Tensor:
        """Brings numbers in from slow memory."""
        held = self.place(slow.clone())
        self.read[what] = self.read.get(what, 0) + slow.numel()
        return held

    def fill(self, value: float, *size: int, like: Tensor) -> Tensor:
        """Makes numbers in place."""
        return self.place(like.new_full(size, value))

    def store(self, held: Tensor, slow: Tensor, what: str) -> None:
        """Brings numbers out to slow memory.

        Raises:
            BadInput: they are not in the fast memory.
        """
        if id(held) not in self.held:
            raise BadInput(f"{what}: {held.numel()} numbers to be stored were not in the fast memory; load them first")
        self.written[what] = self.written.get(what, 0) + held.numel()
        slow.copy_(held)

    def free(self, *held: Tensor) -> None:
        """Takes the room of tensors back."""
        for t in held:
            self.used -= self.held.pop(id(t)).numel()

    def traffic(self) -> Traffic:
        """What has moved so far."""
        return Traffic.of(self.read, self.written)


@dataclass(frozen=True, eq=False)
class Counted:
    """What comes out of a counted run.

    Args:
        out: Head outputs.
        traffic: What moved.
        peak: Most numbers that were in the fast memory at once.
    """

    out: Float[Tensor, "batch heads query value_dim"]
    traffic: Traffic
    peak: int


@dataclass(frozen=True, eq=False)
class Head:
    """One key-value head of one sequence, and the rows that read it, in slow memory.

    Args:
        q: Queries with the scale in them, those of the heads that share a key side by side.
        k: Keys.
        v: Values.
        out: Where the outputs go.
        shape: Of the call that it belongs to.
    """

    q: Float[Tensor, "rows dim"]
    k: Float[Tensor, "keys dim"]
    v: Float[Tensor, "keys value_dim"]
    out: Float[Tensor, "rows value_dim"]
    shape: Shape

    def hide(self, scores: Tensor, row: int, key: int) -> None:
        """Puts minus infinity where a row sees no key; scores of rows and keys from these on."""
        if self.shape.causal:
            at = torch.arange(row, row + scores.shape[0]) // self.shape.group + self.shape.keys - self.shape.queries
            scores.masked_fill_(torch.arange(key, key + scores.shape[1]) > at[:, None], -torch.inf)

    def blocks(self, most: int) -> Iterator[tuple[int, int, int]]:
        """First row, one past the last, and keys seen, of each row block."""
        first = 0
        for rows, sees in row_blocks(self.shape, most):
            yield first, first + rows, sees
            first += rows


def counted(
    order: Order,
    q: Float[Tensor, "batch heads query dim"],
    k: Float[Tensor, "batch kv_heads key dim"],
    v: Float[Tensor, "batch kv_heads key value_dim"],
    fast: int,
    *,
    causal: bool = False,
    keys: int = 1,
) -> Counted:
    """Attention in one of three orders, through a fast memory of `fast` numbers, which counts.

    Args:
        order: "naive", "tiled" or "small_memory", as `foveate.core.traffic` describes them.
        q: Queries.
        k: Keys.
        v: Values.
        fast: Numbers that the fast memory holds.
        causal: Whether a row sees no key behind itself; the last row stands at the last key.
        keys: Keys per key block of the tiled form.

    Raises:
        UnknownName: no such order.
        BadInput: shapes that do not fit each other, or a fast memory that does not hold the least blocks.
        TooBig: more numbers at once than the fast memory holds, which is a mistake of the order.
    """
    if order not in ORDERS:
        raise unknown("order with a counted form", order, ORDERS)
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise BadInput(
            f"counted: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit; give "
            "[batch, heads, length, dim] with one batch and dim, and k and v of one length"
        )
    batch, heads, queries, dim = q.shape
    shape = Shape(queries, k.shape[2], dim, v.shape[3], batch, heads, k.shape[1], causal)
    memory = FastMemory(fast)
    # [batch, kv head, rows, dim] with the heads of a group side by side, and a scale that costs nothing
    rows = (q * dim**-0.5).unflatten(1, (shape.kv_heads, shape.group)).transpose(2, 3).flatten(2, 3)
    out = rows.new_empty(batch, shape.kv_heads, shape.rows, shape.width)
    for entry in range(batch):
        for head in range(shape.kv_heads):
            one = Head(rows[entry, head], k[entry, head], v[entry, head], out[entry, head], shape)
            if order == "tiled":
                tiled(one, memory, keys)
            else:
                ORDERS[order](one, memory)
            if memory.held:
                raise BadInput(f"{order} leaves {len(memory.held)} tensors in the fast memory")
    out = out.unflatten(2, (queries, shape.group)).transpose(2, 3).flatten(1, 2)
    return Counted(out, memory.traffic(), memory.peak)


def tiled(one: Head, memory: FastMemory, keys: int = 1) -> None:
    """Rows stay with their running softmax, keys and values pass by."""
    for first, last, sees in one.blocks(rows_that_fit(one.shape, memory.size, keys)):
        q = memory.load(one.q[first:last], "queries")
        out = memory.fill(0.0, last - first, one.shape.width, like=q)
        peak, mass, fade = running(memory, last - first, q)
        for key in range(0, sees, keys):
            block = slice(key, min(key + keys, one.shape.keys))
            k = memory.load(one.k[block], "keys and values")
            s = memory.place(q @ k.T)
            memory.free(k)
            one.hide(s, first, key)
            weigh(s, peak, mass, fade)
            v = memory.load(one.v[block], "keys and values")
            out.mul_(fade[:, None]).addmm_(s, v)
            memory.free(v, s)
        out.div_(mass[:, None])
        memory.store(out, one.out[first:last], "outputs")
        memory.free(q, out, peak, mass, fade)


def small_memory(one: Head, memory: FastMemory) -> None:
    """Squares of scores stay, columns of queries, keys, values and outputs pass by."""
    side = side_that_fits(memory.size)
    wide = even(one.shape.keys, side)
    for first, last, sees in one.blocks(side):
        peak, mass, fade = running(memory, last - first, one.q)
        starts = range(0, sees, wide)
        for key in starts:
            block = slice(key, min(key + wide, one.shape.keys))
            s = memory.fill(0.0, last - first, block.stop - key, like=one.q)
            for column in range(one.shape.dim):
                q = memory.load(one.q[first:last, column], "queries")
                k = memory.load(one.k[block, column], "keys and values")
                s.addr_(q, k)
                memory.free(q, k)
            one.hide(s, first, key)
            weigh(s, peak, mass, fade)
            for column in range(one.shape.width):
                place = one.out[first:last, column]
                out = memory.load(place, "partial outputs") if key else memory.fill(0.0, last - first, like=one.q)
                v = memory.load(one.v[block, column], "keys and values")
                out.mul_(fade).addmv_(s, v)
                if key == starts[-1]:
                    out.div_(mass)
                memory.store(out, place, "outputs" if key == starts[-1] else "partial outputs")
                memory.free(out, v)
            memory.free(s)
        memory.free(peak, mass, fade)


def naive(one: Head, memory: FastMemory) -> None:
    """Scores and weights go to slow memory and come back."""
    scores, weights = (one.q.new_empty(one.shape.rows, one.shape.keys) for _ in range(2))
    product((one.q, "queries"), (one.k.T, "keys and values"), (scores, "scores"), memory)
    for row in range(one.shape.rows):
        softmax(one, row, scores[row : row + 1], weights[row : row + 1], memory)
    product((weights, "weights"), (one.v, "keys and values"), (one.out, "outputs"), memory)


def product(a: tuple[Tensor, str], b: tuple[Tensor, str], c: tuple[Tensor, str], memory: FastMemory) -> None:
    """A matrix product: a block of it stays while a column of the left and a row of the right factor pass by."""
    high, wide = product_blocks(c[0].shape[0], c[0].shape[1], memory.size)
    for row in range(0, c[0].shape[0], high):
        for column in range(0, c[0].shape[1], wide):
            place = c[0][row : row + high, column : column + wide]
            block = memory.fill(0.0, *place.shape, like=c[0])
            for inner in range(a[0].shape[1]):
                left = memory.load(a[0][row : row + high, inner], a[1])
                right = memory.load(b[0][inner, column : column + wide], b[1])
                block.addr_(left, right)
                memory.free(left, right)
            memory.store(block, place, c[1])
            memory.free(block)


def softmax(one: Head, row: int, scores: Tensor, weights: Tensor, memory: FastMemory) -> None:
    """The softmax of one row; what does not fit at once is read in pieces, and again to be normalised."""
    peak, mass = (memory.fill(value, 1, like=scores) for value in (-torch.inf, 0.0))
    size, keys = memory.size - 2, one.shape.keys
    for key in range(0, keys, size):
        s = memory.load(scores[:, key : key + size], "scores")
        one.hide(s, row, key)
        higher = torch.maximum(peak, s.amax())
        # before the first key that the row sees, there is nothing to add up
        if higher > -torch.inf:
            mass.mul_(torch.exp(peak - higher)).add_(torch.exp(s - higher).sum())
            peak.copy_(higher)
        if keys > size:
            memory.free(s)
    for key in range(0, keys, size):
        if keys > size:
            s = memory.load(scores[:, key : key + size], "scores")
            one.hide(s, row, key)
        s.sub_(peak).exp_().div_(mass)
        memory.store(s, weights[:, key : key + size], "weights")
        memory.free(s)
    memory.free(peak, mass)


def running(memory: FastMemory, rows: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum, sum and factor of a running softmax, before the first key."""
    peak, mass, fade = (memory.fill(value, rows, like=like) for value in (-torch.inf, 0.0, 0.0))
    return peak, mass, fade


def weigh(s: Tensor, peak: Tensor, mass: Tensor, fade: Tensor) -> None:
    """Turns scores into weights without a normaliser, all in place; `fade` is what earlier outputs lose."""
    torch.maximum(peak, s.amax(1), out=fade)
    # a row that has seen nothing yet has nothing to lose
    fade.masked_fill_(fade == -torch.inf, 0.0)
    s.sub_(fade[:, None]).exp_()
    higher = fade.clone()
    fade.copy_(torch.exp(peak - higher))
    peak.copy_(higher)
    mass.mul_(fade).add_(s.sum(1))


ORDERS = {"naive": naive, "tiled": tiled, "small_memory": small_memory}
