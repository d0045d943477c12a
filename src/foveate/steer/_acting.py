"""The heads of a layer in which a row edit acts."""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Bool
from torch import Tensor

from foveate.core.places import Head, heads_of
from foveate.core.rows import View

__all__ = ["acting"]


def acting(heads: tuple[Head, ...], view: View) -> Bool[Tensor, " #heads"] | None:
    """Which of a layer's heads are named, or one True for all of them; None in layers where the edit is not at work.

    Cross-attention is none of its layers: tokens, places and lengths are those of another sequence there.
    """
    named = heads_of(heads, view.layer.index, view.heads)
    if view.layer.cross or named == []:
        return None
    return marked(tuple(named or ()), view.heads, view.q.device)


@lru_cache(maxsize=4096)
def marked(named: tuple[int, ...], heads: int, device: torch.device) -> Bool[Tensor, " #heads"]:
    """The named heads, or one True for all where none is; made once, since decoding asks at every token."""
    # a tensor of inference mode could take no part in a backward pass later
    with torch.inference_mode(False):
        made = torch.zeros(heads if named else 1, dtype=torch.bool, device=device)
        made[list(named) or slice(None)] = True
        return made
