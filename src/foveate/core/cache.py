"""A KV cache in transformers' own shape whose length differs per layer, batch row and KV head.

`adopt` puts `RaggedLayer`s into the cache that `generate` or a caller made. A layer takes the keys and values of each
call and keeps them apart (`pending`) until attention has run over them; only then a policy says what is stored. So a
prompt's keys that are not kept are never stored, and a call that fails leaves the entries as they were.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from foveate.core.errors import NotSupported
from foveate.core.mask import Mask
from foveate.core.ragged import EMPTY, Ragged, Store

__all__ = ["RaggedLayer", "adopt", "ragged_layers"]

# tokens that leave a window together
TOGETHER = 32


class Watched:
    """The last queries of a layer and what they may see: what a policy scores the entries by while decoding."""

    def __init__(self) -> None:
        self.q: list[Tensor] = []
        self.low: list[Tensor] = []
        self.high: list[Tensor] = []

    def add(self, q: Float[Tensor, "batch heads query dim"], mask: Mask) -> None:
        batch = q.shape[0]
        self.q.append(q.detach())
        self.low.append(mask.low.expand(batch, -1))
        self.high.append(mask.high.expand(batch, -1))

    def take(self, end: int) -> tuple[Float[Tensor, "batch heads query dim"], Mask]:
        """The queries, which are the last before position `end`, and their mask; forgets them."""
        q, low, high = torch.cat(self.q, 2), torch.cat(self.low, 1), torch.cat(self.high, 1)
        position = torch.arange(end - q.shape[2], end, device=q.device)
        for kept in (self.q, self.low, self.high):
            kept.clear()
        return q, Mask(low, high, end, True, position)

    def rows(self, index: Tensor) -> None:
        for name in ("q", "low", "high"):
            setattr(self, name, [t[index] for t in getattr(self, name)])

    def bytes_held(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in (*self.q, *self.low, *self.high))


class RaggedLayer(CacheLayerMixin):
    """One layer of a cache whose heads may hold different tokens.

    Args:
        window: How many tokens a query sees at most, itself among them; None: all.
        owner: Weak reference to the attachment that reads it.
    """

    def __init__(self, window: int | None = None, owner: Any = None) -> None:
        super().__init__()
        # transformers asks
        self.is_sliding = window is not None
        self.window = window
        self.owner = owner
        self.reset()

    def reset(self) -> None:
        self.store: Ragged | None = None
        self.seen = 0
        # real tokens of each batch row, and (ranked scores, counts) while the heads of all layers compete
        self.real: Any = None
        self.pending: tuple[Tensor, Tensor] | None = None
        self.latest: Any = None
        self.waiting: Any = None
        self.watched = Watched()
        self.since = 0
        # below which position entries have left the window, and whether none may, for tokens that are taken back
        self.faded, self.recording = 0, False
        # what a policy that chooses what is read keeps between two tokens, [batch, ...]
        self.state: dict[str, Tensor] = {}
        self.is_initialized = False

    # ---------------------------------------------------------------- what transformers calls

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes the keys and values of a call and hands them on; the attention function knows them again.

        Raises:
            NotSupported: nothing is attached to the model, whose own attention cannot read this cache.
        """
        owner = None if self.owner is None else self.owner()
        if owner is None:
            raise NotSupported(
                "this cache was compressed by a KV policy and the model's own attention cannot read it; "
                "go on inside `with foveate.attach(model, …)`, or start with a new cache"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.settle()
        self.pending = key_states, value_states
        # weakly: the call's keys are the model's to free
        self.latest = weakref.ref(key_states)
        owner.handed = weakref.ref(self)
        self.seen += key_states.shape[2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # masks speak of original positions, whatever has been dropped
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens; what a policy has dropped before does not come back.

        Raises:
            NotSupported: tokens that would then be in the window have left it.
        """
        self.settle()
        gone = abs(tokens_to_remove)
        if gone == 0 or self.store is None:
            return
        if self.window is not None and self.faded > max(0, self.seen - gone + 1 - self.window):
            raise NotSupported(
                f"{gone} tokens cannot be taken back: the sliding window of {self.window} has moved on, and what left "
                "it is gone; call activate_past_recording() of the cache before these tokens"
            )
        self.seen -= gone
        if self.real is not None:
            self.real = (self.real - gone).clamp_min(0)
        self.store = self.store.select(self.store.positions() < self.seen)
        self.watched = Watched()
        self.state.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.store is not None or self.pending is not None:
            self.settle()
            rows = torch.arange(len(self.store.start), device=self.store.start.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.settle()
        if self.store is None:
            return
        index = torch.arange(len(self.store.start), device=self.store.start.device)[indices.to(self.store.start.device)]
        if len(index) == len(self.store.start) and bool((index == torch.arange(len(index))).all()):
            return
        self.store = self.store.rows(index)
        self.watched.rows(index)
        self.state = {name: t[index] for name, t in self.state.items()}
        self.real = None if self.real is None else self.real[index]

    def offload(self) -> None:
        raise NotSupported("a cache under a KV policy cannot be offloaded; leave `offloading` off")

    def activate_past_recording(self) -> None:
        """Keeps what leaves the window from now on, for a caller who takes tokens back with `crop`."""
        self.recording = True

    # ---------------------------------------------------------------- what attention does with it

    @property
    def filled(self) -> bool:
        """Whether there are entries from earlier calls."""
        return self.store is not None

    def bytes_held(self) -> int:
        """Bytes of everything that stays between calls."""
        extra = [t for t in (self.real, *(self.waiting or ()), *self.state.values()) if t is not None]
        return (
            (0 if self.store is None else self.store.bytes_held())
            + self.watched.bytes_held()
            + sum(t.untyped_storage().nbytes() for t in extra)
        )

    @property
    def horizon(self) -> int:
        """The first position that the token after those seen can look at."""
        return 0 if self.window is None or self.recording else max(0, self.seen + 1 - self.window)

    def out_of_sight(
        self, position: Int[Tensor, "batch kv_heads entry"], sinks: int
    ) -> Bool[Tensor, "batch kv_heads entry"]:
        """Entries that no later token sees; the first ones stay, by which policies tell where a text begins."""
        return (position < self.horizon) & ((position != EMPTY).cumsum(-1) > sinks)

    def fade(self, sinks: int = 0) -> None:
        """Drops entries that have left the window, some at a time."""
        assert self.store is not None
        if self.window is None or self.horizon - self.faded < max(1, min(TOGETHER, self.window // 8)):
            return
        self.faded = self.horizon
        position = self.store.positions()
        self.store = self.store.select((position != EMPTY) & ~self.out_of_sight(position, sinks))
        self.state.clear()

    def counted(self, valid: Bool[Tensor, "batch new"] | None) -> Int[Tensor, " batch"]:
        """How many real tokens each row has, with those that came with the call."""
        assert self.pending is not None
        k = self.pending[0]
        new = torch.full((len(k),), k.shape[2], device=k.device) if valid is None else valid.sum(1)
        return new if self.real is None else self.real + new

    def settle(
        self,
        valid: Bool[Tensor, "batch new"] | None = None,
        store: Store | None = None,
    ) -> None:
        """Stores what came with the call, all of it; nothing when nothing did.

        Args:
            valid: Which of its tokens are no padding.
            store: Makes storage, where there is none yet; None: as tensors.
        """
        if self.pending is None:
            return
        k, v = (t.detach() for t in self.pending)
        batch, heads, new = k.shape[:3]
        real = self.counted(valid)
        if self.store is None:
            keep = torch.ones(batch, heads, new, dtype=torch.bool, device=k.device)
            keep = keep if valid is None else keep & valid[:, None]
            self.store = Ragged.of_call(k, v, keep, torch.zeros(keep.shape, device=k.device), store=store)
        else:
            self.store = self.store.append(k, v, self.seen - new, valid)
        self.pending, self.real = None, real


def adopt(cache: Any, owner: Any, config: Any = None) -> None:
    """Makes the layers of a cache ragged, in place, with what they hold.

    Args:
        cache: What the model is about to use as `past_key_values`.
        owner: Weak reference to the attachment that reads them.
        config: The model's configuration, for a cache that does not know its layers yet.

    Raises:
        NotSupported: a kind of cache that cannot be; says which can.
    """
    if isinstance(cache, EncoderDecoderCache):
        adopt(cache.self_attention_cache, owner, config)
        return
    if not isinstance(cache, Cache) or getattr(cache, "offloading", False):
        raise NotSupported(
            f"a KV policy needs transformers' dynamic cache, not {type(cache).__name__}"
            + (" with offloading" if getattr(cache, "offloading", False) else "")
            + "; leave `past_key_values` out, or pass DynamicCache(config=model.config)"
        )
    if not cache.layers and config is not None:
        cache.layers.extend(DynamicCache(config=config).layers)
    for n, layer in enumerate(list[Any](cache.layers)):
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            cache.layers[n] = converted(layer)
        elif isinstance(layer, CacheLayerMixin) and not isinstance(layer, RaggedLayer):
            raise NotSupported(
                f"a KV policy needs transformers' dynamic cache; layer {n} of this one is a {type(layer).__name__}. "
                "Leave `cache_implementation` and `past_key_values` out, or pass DynamicCache(config=model.config)"
            )
    if cache.layer_class_to_replicate is not None:
        # layers come as the model asks for them
        cache.layer_class_to_replicate = partial(RaggedLayer, owner=owner)  # type: ignore[assignment]
    for layer in ragged_layers(cache):
        layer.owner = owner


def ragged_layers(cache: Any) -> list[RaggedLayer]:
    """The layers of a cache that are ragged."""
    cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    return [layer for layer in getattr(cache, "layers", ()) if isinstance(layer, RaggedLayer)]


def converted(layer: Any) -> RaggedLayer:
    """A dynamic layer's content as a ragged one; padding in it stays, the mask hides it."""
    made = RaggedLayer(getattr(layer, "sliding_window", None))
    if layer.is_initialized and layer.keys is not None and layer.keys.numel():
        made.lazy_initialization(layer.keys, layer.values)
        held = layer.keys.shape[2]
        made.seen = layer.get_seq_length()
        made.faded, made.recording = made.seen - held, getattr(layer, "record_past", False)
        keep = torch.ones(layer.keys.shape[:3], dtype=torch.bool, device=layer.keys.device)
        score = torch.zeros(keep.shape, device=keep.device)
        made.store = Ragged.of_call(layer.keys, layer.values, keep, score, made.seen - held)
        made.real = torch.full((len(keep),), made.seen, device=keep.device)
    return made
