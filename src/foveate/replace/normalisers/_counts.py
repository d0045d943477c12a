"""How many keys a row may see: what stands for the length of a text wherever a paper's N is one."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from foveate.core.mask import Mask

__all__ = ["keys_seen"]

CHUNK = 256


def keys_seen(mask: Mask, index: Int[Tensor, " rows"] | None = None) -> Int[Tensor, "#batch #heads rows"]:
    """n_i, the number of keys that the mask lets each row see; padding and other texts are not among them.

    Args:
        mask: The mask.
        index: Which rows; None: all of them.
    """
    if mask.dense is None:
        seen = (mask.high - mask.low)[:, None]
        return seen if index is None else seen[..., index]
    rows = torch.arange(mask.queries, device=mask.device) if index is None else index
    parts = [(mask.additive(some, 0, mask.keys) > -torch.inf).sum(-1) for some in rows.split(CHUNK)]
    return torch.cat(parts, -1)
