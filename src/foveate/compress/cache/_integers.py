"""What policies share that store rows as integers; they say of how many bits, for keys and values of each layer."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.mechanism import Policy
from foveate.core.packed import IntegerRows
from foveate.core.ragged import Side

__all__ = ["Integers"]


class Integers(Policy):
    """Stores keys and values as integers, each row by itself."""

    group: int

    def bits_of(self, side: Side, layer: int) -> int:
        """Of each channel of the keys or of the values of a layer."""
        raise NotImplementedError

    def store(self, rows: Float[Tensor, "entries width"], slots: int, side: Side, layer: int) -> IntegerRows:
        return IntegerRows.empty(slots, rows.shape[1], self.bits_of(side, layer), self.group, rows.dtype, rows.device)

    def row_bytes(self, width: int, dtype: torch.dtype, side: Side, layer: int) -> int:
        return IntegerRows.row_bytes(width, self.bits_of(side, layer), self.group)
