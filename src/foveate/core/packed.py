"""Rows as small integers: the storage of a quantised cache.

A row is cut into groups of neighbouring channels. Each group x is rotated by a fixed orthogonal matrix R, which spreads
channels that are far larger than the others over the group, and has a middle m and a step s of its own:

    code = round((x R - m) / s + top / 2)        in 0 … top = 2^bits - 1
    x'   = (m + s (code - top / 2)) R^T

Every row stands for itself, so that rows can be dropped, moved and added one by one.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core import native
from foveate.core.ragged import Packed, numbers

__all__ = ["IntegerRows", "rotation"]

# middles and steps: the range of float32, and errors below those of the codes
GRID = torch.bfloat16


class IntegerRows(Packed):
    """Rows of integers with a middle and a step per group of channels.

    Args:
        codes: Channels as integers; of 4 bits, a byte has one of the first half of the row and one of the second.
        grid: Middle and step of each group.
        width: Channels of a row.
        bits: Of each integer, 8 or 4.
        dtype: What rows are given in.
    """

    def __init__(self, codes: Tensor, grid: Tensor, width: int, bits: int, dtype: torch.dtype) -> None:
        self.codes, self.grid, self.bits = codes, grid, bits
        self.shape = (*codes.shape[:-1], width)
        self.dtype, self.device = dtype, codes.device

    @classmethod
    def empty(
        cls, slots: int, width: int, bits: int, group: int, dtype: torch.dtype, device: torch.device
    ) -> IntegerRows:
        """Storage for so many rows; what it holds until they are set is anything.

        Args:
            slots: How many rows.
            width: Channels of a row.
            bits: Of each integer, 8 or 4.
            group: Channels that share a middle and a step, at most; the groups of a row are of one size.
            dtype: What rows are given in.
            device: Where they are kept.
        """
        groups, size = grouping(width, bits, group)
        codes = torch.empty(slots, groups * size * bits // 8, dtype=torch.uint8, device=device)
        grid = torch.empty(slots, 2, groups, dtype=GRID, device=device)
        return cls(codes, grid, width, bits, dtype)

    @staticmethod
    def row_bytes(width: int, bits: int, group: int) -> int:
        """Bytes of one row, middles and steps included."""
        groups, size = grouping(width, bits, group)
        return groups * size * bits // 8 + 2 * groups * GRID.itemsize

    def new_empty(self, slots: int, width: int) -> IntegerRows:
        codes, grid = (t.new_empty(slots, *t.shape[1:]) for t in (self.codes, self.grid))
        return type(self)(codes, grid, width, self.bits, self.dtype)

    def __getitem__(self, index: Any) -> IntegerRows:
        return type(self)(self.codes[index], self.grid[index], self.shape[-1], self.bits, self.dtype)

    def __setitem__(self, index: Any, rows: Tensor | Packed) -> None:
        if isinstance(rows, IntegerRows) and (rows.bits, rows.grid.shape[-1]) == (self.bits, self.grid.shape[-1]):
            self.codes[index], self.grid[index] = rows.codes, rows.grid
        else:
            self.codes[index], self.grid[index] = self.packed(numbers(rows))

    @property
    def form(self) -> tuple[int, int, int]:
        """Groups of a row, channels of each, and the largest code."""
        groups = self.grid.shape[-1]
        return groups, self.codes.shape[-1] * 8 // self.bits // groups, 2**self.bits - 1

    def packed(self, rows: Float[Tensor, "rows width"]) -> tuple[Tensor, Tensor]:
        """Codes and grid of rows."""
        groups, size, top = self.form
        if native.available() and rows.device.type == "cpu" and self.breadth <= native.MAX_WIDTH:
            return native.pack(rows, rotation(size, rows.device), groups, self.bits)
        x = self.turned(rows).unflatten(-1, (groups, size))
        low, high = x.aminmax(dim=-1, keepdim=True)
        middle = ((low + high) / 2).to(GRID)
        step = (torch.maximum(high - middle, middle - low) * 2 / top).to(GRID)
        codes = (x - middle).div_(step.float().clamp_min(torch.finfo(torch.float32).tiny)).add_(top / 2)
        codes = codes.round_().clamp_(0, top).flatten(-2).to(torch.uint8)
        if self.bits == 4:
            first, second = codes.chunk(2, -1)
            codes = first | second << 4
        return codes, torch.cat([middle, step], -1).transpose(-1, -2)

    def dense(self) -> Float[Tensor, "*rows width"]:
        groups, size, top = self.form
        codes = self.codes.reshape(-1, self.codes.shape[-1])
        x = torch.empty(len(codes), groups * size, device=self.device)
        if self.bits == 4:
            half = codes.shape[1]
            x[:, :half], x[:, half:] = codes & 15, codes >> 4
        else:
            x.copy_(codes)
        middle, step = self.grid.reshape(-1, 2, groups, 1).float().unbind(1)
        x.unflatten(-1, (groups, size)).mul_(step).add_(middle - top / 2 * step)
        return self.turned(x)[:, : self.shape[-1]].reshape(self.shape).to(self.dtype)

    @property
    def breadth(self) -> int:
        groups, size, _ = self.form
        return groups * size

    def readable(self) -> native.Codes:
        return native.Codes(self.codes, self.grid, self.bits)

    def turned(self, rows: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows read"]:
        groups, size, _ = self.form
        x, missing = rows.float(), groups * size - rows.shape[-1]
        if missing:
            x = torch.nn.functional.pad(x, (0, missing))
        # the rotation is its own inverse, and leaves products of rows as they are
        return (x.reshape(-1, size) @ rotation(size, self.device)).view(x.shape)


def grouping(width: int, bits: int, group: int) -> tuple[int, int]:
    """How many groups a row has, and of how many channels: all of one size, which fills whole bytes.

    Sizes that divide the width go first, so that no group has channels that nobody needs.
    """
    whole = 8 // bits
    for size in range(min(group, width), group // 2, -1):
        if width % size == 0 and size % whole == 0:
            return width // size, size
    groups = -(-width // group)
    size = -(-width // groups)
    return groups, size + size % whole


@lru_cache(maxsize=16)
def rotation(size: int, device: torch.device) -> Float[Tensor, "size size"]:
    r"""A symmetric orthogonal matrix whose entries are all about as large: H \otimes C.

    H is the Hadamard matrix of the largest power of two that divides the size, C_jk = cos jk + sin jk the Hartley
    matrix of what remains (jk in units of 2 pi over its size).
    """
    power = size & -size
    rest = torch.arange(size // power, dtype=torch.float64)
    angle = 2 * math.pi * torch.outer(rest, rest) / len(rest)
    made = angle.cos() + angle.sin()
    for _ in range(power.bit_length() - 1):
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return (made / size**0.5).float().to(device)
