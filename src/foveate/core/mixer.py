"""Mixing of tokens that is no attention by rows: a module that takes the layer's input and gives its output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from foveate.core.errors import BadInput, NotSupported
from foveate.core.mask import Mask
from foveate.core.rule import Operator, Sizes

__all__ = ["Mixer", "State", "StateLayer", "Tokens"]

State = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of one call of a mixer.

    Args:
        x: The layer's input.
        real: Which tokens are no padding; what stands in the others may be anything, NaN too.
        causal: Whether no token may see a later one.
        place: Which token of its text each one is, from 0; of padding in front negative.
        training: Whether the model is being trained.
        opens: Which tokens open a text behind another one, where several are packed; None: none does.
    """

    x: Float[Tensor, "batch query width"]
    real: Bool[Tensor, "batch query"]
    causal: bool
    place: Int[Tensor, "batch query"]
    training: bool = False
    opens: Bool[Tensor, "batch query"] | None = None

    @classmethod
    def of(
        cls, x: Float[Tensor, "batch query width"], mask: Mask, training: bool = False, packed: bool = False
    ) -> Tokens:
        """The tokens of a call whose mask is one of padding and order alone, and of packed texts where it may be.

        Raises:
            NotSupported: the mask says more: a window, packed texts, a pattern of the caller's own.
        """
        batch, length = x.shape[:2]
        real = torch.ones(batch, length, dtype=torch.bool, device=x.device) if mask.valid is None else mask.valid
        place = mask.place.expand(batch, -1)
        low, high = (t.expand(batch, -1) for t in (mask.low, mask.high))
        begin = (mask.starts if packed else mask.text_begin[:, None]).clamp_min(0)
        wrong = mask.dense is not None or bool(((low != begin) & real & (high > low)).any())
        if wrong or (mask.causal and bool(((high != mask.position + 1) & real).any())):
            raise NotSupported(
                f"what keeps a state knows padding and order, not windows{'' if packed else ', packed texts'} or masks "
                "of the caller's own; run such calls with a rule"
            )
        real, opens = real.expand(batch, -1), None
        if packed:
            opens = (low == mask.position) & (mask.position > mask.text_begin[:, None]) & real
            opens = opens if bool(opens.any()) else None
        return cls(torch.where(real[..., None], x, 0.0), real, mask.causal, place, training, opens)


class Mixer(Operator):
    """Attention's place taken by something that reads the layer's whole input."""

    def module(self, sizes: Sizes) -> torch.nn.Module:
        """A fresh module for one layer.

        It is called as `module(tokens, state)` and gives the output, [batch, query, width], and the new state. `state`
        is None where nothing is kept, {} before the first token of a text, and otherwise what it gave for the tokens
        before, by name, tensors with the batch in front. The output at padding may be anything finite.
        """
        raise NotImplementedError


class StateLayer(CacheLayerMixin):
    """One layer of a transformers cache that holds the state of a mixer or a recurrence.

    Args:
        operator: Whose state it is.
        passes: Whether keys and values are handed on as they come, to a recurrence that takes them into its state.
    """

    def __init__(self, operator: Operator, passes: bool = False) -> None:
        super().__init__()
        self.operator, self.passes = operator, passes
        self.state: State = {}
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values.

        Raises:
            BadInput: the state of a mixer takes none.
        """
        if self.passes:
            return key_states, value_states
        raise BadInput(
            f"this cache holds the state of {type(self.operator).__name__}, not keys and values; start with a new one"
        )

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Raises `NotSupported`: what a state has taken in cannot be taken out."""
        raise NotSupported(f"the state of {type(self.operator).__name__} cannot forget its last tokens; start anew")

    def reset(self) -> None:
        self.state, self.seen = {}, 0

    def rows(self, index: Tensor) -> None:
        """Takes these rows of the batch."""
        self.state = {name: t.index_select(0, index.to(t.device)) for name, t in self.state.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state = {name: t.repeat_interleave(repeats, 0) for name, t in self.state.items()}

    def offload(self) -> None:
        self.state = {name: t.to("cpu") for name, t in self.state.items()}

    def prefetch(self) -> None:
        """Nothing: a state goes where the next call's tensors are."""

    def bytes_held(self) -> int:
        """Bytes of the state."""
        return sum(t.untyped_storage().nbytes() for t in self.state.values())
