"""What head edits share: vectors put to heads, and what a model's heads give on inputs at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.attach import attach
from foveate.core.errors import BadInput
from foveate.core.mechanism import HeadEdit
from foveate.core.places import Head, some_heads
from foveate.core.rows import Layer, Rows

__all__ = ["Inputs", "Seen", "batches", "refuse_width", "run", "vectors_in"]

Inputs = Mapping[str, Any] | Sequence[Mapping[str, Any]]
VectorOfHead = tuple[int, int, tuple[float, ...]]


def batches(inputs: Inputs) -> list[Mapping[str, Any]]:
    """The calls to make of a model: one, or several.

    Raises:
        BadInput: there are none, or one is no mapping from the model's arguments to their values.
    """
    calls = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    for call in calls:
        if not isinstance(call, Mapping):
            raise BadInput(
                f"inputs are the model's arguments by name, as tokenizer(text, return_tensors='pt') gives them, or a "
                f"list of these; got {type(call).__name__}"
            )
    if not calls:
        raise BadInput("there are no inputs to run the model on; give at least one")
    return calls


@torch.no_grad()
def run(model: Any, seen: Any, inputs: Inputs) -> None:
    """Runs the model on the inputs while `seen` looks on; dropout is off."""
    training = [m for m in model.modules() if m.training]
    calls = batches(inputs)
    try:
        model.eval()
        with attach(model, seen, trial=False):
            for call in calls:
                model(**call)
    finally:
        for module in training:
            module.training = True


def vectors_in(
    name: str, vectors: tuple[VectorOfHead, ...], layer: Layer, out: Float[Tensor, "batch heads query value_dim"]
) -> tuple[list[int], Float[Tensor, "named 1 value_dim"]] | None:
    """The heads of a layer that have a vector, and their vectors; None where no head has one.

    Raises:
        BadInput: a vector has neither as many numbers as the head's outputs, nor one.
    """
    own = [(head, vector) for at, head, vector in vectors if at == layer.index and head < out.shape[1]]
    if not own:
        return None
    for head, vector in own:
        refuse_width(name, layer, head, len(vector), out.shape[3])
    rows = [out.new_tensor(vector).expand(out.shape[3]) for _, vector in own]
    return [head for head, _ in own], torch.stack(rows)[:, None]


def refuse_width(name: str, layer: Layer, head: int, numbers: int, width: int) -> None:
    """Raises `BadInput` unless a vector is as wide as a head's outputs, or one number for all of them."""
    if numbers not in (1, width):
        raise BadInput(
            f"{name}: the vector of layer {layer.index}, head {head} has {numbers} numbers, and the outputs of that "
            f"head ({layer.name}) have {width}; give {width}, or one for all of them"
        )


@dataclass(frozen=True, eq=False)
class Seen(HeadEdit):
    """Keeps head outputs in the order of the text: what is padding is left out.

    Args:
        heads: (layer, head) of those to keep; () keeps all.
        found: For each head, the outputs of each text that came by, [tokens, value_dim].
    """

    heads: tuple[Head, ...] = some_heads()
    found: dict[Head, list[Tensor]] = field(default_factory=dict)

    def edit(
        self, rows: Rows, out: Float[Tensor, "batch heads query value_dim"]
    ) -> Float[Tensor, "batch heads query value_dim"]:
        real = rows.view.mask.rows.expand(out.shape[0], -1)
        for head in range(out.shape[1]):
            at = (rows.layer.index, head)
            if not self.heads or at in self.heads:
                texts = [one[head, kept].detach().clone() for one, kept in zip(out, real, strict=True)]
                self.found.setdefault(at, []).extend(texts)
        return out
