"""The model's own KV cache: what it holds of a text, and what that takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from foveate.core.cache import RaggedLayer

__all__ = ["Entry", "entries_of", "lengths", "own_bytes", "own_length"]


@dataclass(frozen=True)
class Entry:
    """What a layer of a model keeps of each token.

    Args:
        heads: KV heads.
        key: Numbers of a key.
        value: Numbers of a value.
        window: How many tokens a query sees at most; None: all.
    """

    heads: int
    key: int
    value: int
    window: int | None


@torch.no_grad()
def entries_of(model: Any) -> list[Entry]:
    """What each layer that has a cache keeps of a token, by asking the model, whatever is attached to it."""
    cache, found = DynamicCache(config=model.config), []
    model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        if isinstance(layer, RaggedLayer) and layer.store is not None:
            store = layer.store
            found.append(Entry(store.start.shape[1], store.keys.shape[1], store.values.shape[1], layer.window))
        elif isinstance(layer, DynamicLayer) and layer.is_initialized:
            window = getattr(layer, "sliding_window", None)
            found.append(Entry(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3], window))
    return found


def own_length(window: int | None, tokens: int) -> int:
    """How many of so many tokens it holds between two calls where queries see a window."""
    return tokens if window is None else min(tokens, window - 1)


def lengths(model: Any, tokens: int) -> list[int]:
    """How many of so many tokens each layer holds between two calls."""
    return [own_length(e.window, tokens) for e in entries_of(model)]


def own_bytes(model: Any, tokens: int) -> int:
    """Bytes of the cache of one text, between two calls."""
    numbers = sum(e.heads * (e.key + e.value) * own_length(e.window, tokens) for e in entries_of(model))
    return numbers * model.dtype.itemsize
