"""What a model computes on the way, on inputs at hand: head outputs, residual streams, logits of routers.

Mechanisms that are built from a model's own activations (means, shift vectors, experts found by contrast) read them
here, by the same door through which they act.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core.attach import attach
from foveate.core.mechanism import ExpertEdit, HeadEdit, ResidualEdit, Stream
from foveate.core.rows import Rows

__all__ = ["frozen", "head_outputs", "residual_streams", "router_logits"]


@dataclass(frozen=True, eq=False)
class HeadOutputs(HeadEdit):
    """Keeps the head outputs of each layer."""

    found: dict[int, Tensor] = field(default_factory=dict)

    def edit(
        self, rows: Rows, out: Float[Tensor, "batch heads query value_dim"]
    ) -> Float[Tensor, "batch heads query value_dim"]:
        self.found[rows.layer.index] = out
        return out


@dataclass(frozen=True, eq=False)
class Streams(ResidualEdit):
    """Keeps the residual stream behind each layer, and which rows are real."""

    found: dict[int, Tensor] = field(default_factory=dict)
    real: dict[int, Tensor] = field(default_factory=dict)

    def edit(self, stream: Stream) -> Float[Tensor, "batch query width"]:
        self.found[stream.layer] = stream.hidden
        self.real[stream.layer] = stream.real
        return stream.hidden


@dataclass(frozen=True, eq=False)
class Routings(ExpertEdit):
    """Keeps the logits of each router."""

    found: dict[int, Tensor] = field(default_factory=dict)

    def edit(self, layer: int, logits: Float[Tensor, "tokens experts"]) -> Float[Tensor, "tokens experts"]:
        self.found[layer] = logits
        return logits


@torch.no_grad()
def head_outputs(model: Any, **inputs: Any) -> dict[int, Float[Tensor, "batch heads query value_dim"]]:
    """Head outputs of each layer, before the output projection, of one call."""
    seen = HeadOutputs()
    with attach(model, seen, trial=False):
        model(**inputs)
    return seen.found


@torch.no_grad()
def residual_streams(
    model: Any, **inputs: Any
) -> tuple[dict[int, Float[Tensor, "batch query width"]], Bool[Tensor, "#batch query"]]:
    """The residual stream behind each layer, of one call, and which of its rows are no padding.

    Raises:
        NotSupported: the model has none that can be reached.
    """
    seen = Streams()
    with attach(model, seen, trial=False):
        model(**inputs)
    return seen.found, next(iter(seen.real.values()))


@torch.no_grad()
def router_logits(model: Any, **inputs: Any) -> dict[int, Float[Tensor, "tokens experts"]]:
    """Logits of each router over its experts, of one call; tokens are batch rows one after the other.

    Raises:
        NotSupported: the model has no experts.
    """
    seen = Routings()
    with attach(model, seen, trial=False):
        model(**inputs)
    return seen.found


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """Gradients are followed, but into none of the model's weights, and dropout is off; all is put back afterwards."""
    learning = [p for p in model.parameters() if p.requires_grad]
    training = [m for m in model.modules() if m.training]
    try:
        for p in learning:
            p.requires_grad_(False)
        model.eval()
        with torch.enable_grad():
            yield
    finally:
        for p in learning:
            p.requires_grad_(True)
        for module in training:
            module.training = True
