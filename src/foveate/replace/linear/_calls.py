"""The attention calls of a loaded model, for maps that learn from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.attach import attach
from foveate.core.mechanism import HeadEdit
from foveate.core.rows import Rows, View

__all__ = ["calls_of"]


@dataclass(frozen=True, eq=False)
class Calls(HeadEdit):
    """Keeps the attention call of each layer."""

    found: dict[int, View] = field(default_factory=dict)

    def edit(
        self, rows: Rows, out: Float[Tensor, "batch heads query value_dim"]
    ) -> Float[Tensor, "batch heads query value_dim"]:
        self.found[rows.layer.index] = rows.view
        return out


@torch.no_grad()
def calls_of(model: Any, **inputs: Any) -> dict[int, View]:
    """The attention call of each layer that has rows, by number, of one call of the model."""
    seen = Calls()
    with attach(model, seen, trial=False):
        model(**inputs)
    return seen.found
