"""The heads of a layer in which a row edit acts."""

from __future__ import annotations

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
    made = torch.zeros(view.heads if named else 1, dtype=torch.bool, device=view.q.device)
    made[named or slice(None)] = True
    return made
