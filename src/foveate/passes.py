"""Running a text through a model for the sake of its attention: the whole way, or as far as a layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from foveate.core.attach import attach
from foveate.core.errors import NothingObserved
from foveate.core.mechanism import Metric
from foveate.core.rows import Layer, Rows, View

__all__ = ["Reader", "forward", "visit"]


@dataclass(frozen=True)
class Reader(Metric):
    """Hands every attention call to a function and measures nothing."""

    read: Callable[[View], None] = field(default=lambda _: None)

    def needs(self) -> tuple:
        return ()

    def start(self, layer: Layer) -> None:
        return None

    def update(self, state: None, rows: Rows) -> None:
        self.read(rows.view)

    def result(self, state: None) -> dict:
        return {}


def forward(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The hidden states after the last layer, without the language-model head and without a KV cache."""
    body: Any = model.base_model
    accepted = inspect.signature(body.forward).parameters
    inputs: dict[str, Any] = {"input_ids": ids}
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    if "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = ids
    return body(**inputs)[0]


class Seen(Exception):
    """All layers that were asked for have come by; the rest of the model need not run."""


def visit(model: Any, ids: torch.Tensor, layers: Iterable[int], read: Callable[[View], None]) -> None:
    """Runs a text through a model as far as the last of some layers, and hands over the attention calls of these.

    Raises:
        NothingObserved: the model never came to one of the layers.
    """
    missing = set(layers)

    def look(view: View) -> None:
        if view.layer.index in missing:
            read(view)
            missing.remove(view.layer.index)
            if not missing:
                raise Seen

    if not missing:
        return
    try:
        # leaving the context by an exception takes everything off the model, too
        with attach(model.base_model, Reader(look)), torch.inference_mode():
            forward(model, ids)
    except Seen:
        return
    raise NothingObserved(f"{type(model).__name__} did not run attention layer {min(missing)} on this text")
