"""From what a model says about masks to our intervals: the mask function beside the attention function."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from foveate.core.mask import Mask

__all__ = ["as_mask", "build_mask"]


def build_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | Mask | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Mask:
    """The mask function beside our attention function: called as `sdpa_mask` is, it gives a `Mask`, no N x N tensor."""
    if isinstance(attention_mask, Mask):
        return attention_mask
    first = int(q_offset)
    position = torch.arange(q_length, device=device) + (first - kv_offset)
    padding, valid = attention_mask, None
    begin = torch.full((1,), -kv_offset, dtype=torch.int32, device=device)
    if padding is not None:
        begin = padding.to(torch.int32).argmax(-1).to(torch.int32) - kv_offset
        if padding.shape[-1] >= first + q_length:
            valid = padding[:, first : first + q_length].bool()
        if bool(padding.all()) and padding.shape[-1] >= kv_length + kv_offset:
            padding, valid = None, None
    if padding is None and mask_function is causal_mask_function:
        mask = Mask.causal_of(q_length, kv_length, device=device, offset=first - kv_offset)
        return replace(mask, key_offset=kv_offset, begin=begin)

    def allowed(a: int, b: int) -> Any:
        return sdpa_mask(
            batch_size,
            b - a,
            kv_length,
            q_offset=first + a,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=padding,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=use_vmap,
            device=device,
        )

    return Mask.traced(allowed, q_length, kv_length, device, position, valid, kv_offset, begin)


def as_mask(
    given: Any,
    module: torch.nn.Module,
    queries: int,
    keys: int,
    device: torch.device,
    is_causal: bool | None,
    window: int | None,
    cross: bool,
    offset: int = 0,
) -> Mask:
    """A `Mask` from what the model handed over: ours, a tensor of the caller's own, or nothing at all.

    `offset` is where the first query stands when the model says nothing.
    """
    if isinstance(given, Mask):
        # a cross-attention's padding speaks of its keys
        return replace(given, valid=None) if cross and given.valid is not None else given
    if isinstance(given, Tensor):
        return Mask.from_tensor(given)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if causal and queries > 1:
        # as the model's own attention reads a missing mask: the first query stands at the first key
        return Mask.causal_of(queries, keys, window, device, offset=offset)
    return Mask.full(queries, keys, device)
