"""What edits that take weight from sinks share: where the text begins, the heads that are meant, what receivers get."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core.mask import Mask
from foveate.core.places import Head
from foveate.core.rows import RowBlock, View
from foveate.steer._acting import acting

__all__ = ["SOME", "beginning", "behind", "chosen", "gains"]

# less is no weight, in float64 as in float32, which holds nothing below 1e-45
SOME = 1e-30


def starts_of(mask: Mask) -> Int[Tensor, "#batch query"]:
    """The key at which each row's text begins, in packed batches its own one; negative where it is dropped."""
    # a sliding cache has dropped the beginning; how far in front of its first key it stood is known
    return torch.where(mask.starts >= 0, mask.starts, mask.text_begin[:, None].clamp_max(-1))


def behind(mask: Mask, tokens: int) -> Int[Tensor, "#batch query"]:
    """The first key behind the first tokens of each row's text."""
    return (starts_of(mask) + tokens).clamp(0, mask.keys).to(torch.int32)


def beginning(block: RowBlock, tokens: int) -> tuple[slice, Bool[Tensor, "#batch 1 rows front"]]:
    """The keys that are among the first tokens of each row's text.

    They stand in front: which keys of the block are concerned at all, and which of these it is for each row.
    """
    starts = starts_of(block.view.mask)[:, None, block.index, None]
    front = slice(0, max(0, int(starts.max()) + tokens - block.first))
    at = torch.arange(block.first, block.last, device=starts.device)[front]
    return front, (at >= starts) & (at < starts + tokens)


def chosen(heads: tuple[Head, ...], layers: tuple[int, ...], view: View) -> Bool[Tensor, "#heads 1 1"] | None:
    """Which heads of a call are meant; None where none is. What looks at another text has no sinks of its own."""
    if layers and view.layer.index not in layers:
        return None
    found = acting(heads, view)
    return None if found is None else found[:, None, None]


def gains(freed: Float[Tensor, "batch heads rows 1"], held: Float[Tensor, "batch heads rows 1"]) -> Tensor:
    """By what share receivers of so much weight grow when they get what was freed; 0 where they have none."""
    able = held > SOME
    return torch.where(able, freed, 0.0) / torch.where(able, held, 1.0)
