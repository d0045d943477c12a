"""What edits that take weight from sinks share: where the text begins, which heads are meant, and the moving itself."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core.places import Head
from foveate.core.rows import RowBlock
from foveate.steer._acting import acting

__all__ = ["beginning", "chosen", "moved"]

# less is no weight, in float64 as in float32, which holds nothing below 1e-45
SOME = 1e-30


def beginning(block: RowBlock, tokens: int) -> Bool[Tensor, "#batch 1 rows keys"]:
    """The keys that are among the first tokens of each row's text, in packed batches of its own one."""
    mask = block.view.mask
    starts = mask.starts[:, block.index]
    # a sliding cache has dropped the beginning; how far in front of its first key it stood is known
    starts = torch.where(starts >= 0, starts, mask.text_begin[:, None].clamp_max(-1))[:, None, :, None]
    at = torch.arange(block.first, block.last, device=starts.device)
    return (at >= starts) & (at < starts + tokens)


def chosen(heads: tuple[Head, ...], layers: tuple[int, ...], block: RowBlock) -> Bool[Tensor, "#heads 1 1"] | None:
    """Which heads of a call are meant; None where none is. What looks at another text has no sinks of its own."""
    if layers and block.view.layer.index not in layers:
        return None
    found = acting(heads, block.view)
    return None if found is None else found[:, None, None]


def moved(
    weights: Float[Tensor, "batch heads rows keys"],
    taken: Float[Tensor, "batch heads rows keys"],
    to: Float[Tensor, "batch heads rows keys"],
    share: float | Float[Tensor, "#batch #heads #rows 1"],
) -> Float[Tensor, "batch heads rows keys"]:
    """A share of some weights goes to others in proportion to these; the sum of a row stays.

    A row whose receivers have no weight stays as it is.

    Args:
        weights: All weights.
        taken: Those of the givers, 0 elsewhere.
        to: Those of the receivers, 0 elsewhere.
        share: How much of the givers' weights goes.
    """
    held = to.sum(-1, keepdim=True)
    able = held > SOME
    share = torch.where(able, share, 0.0)
    gain = share * taken.sum(-1, keepdim=True) / torch.where(able, held, 1.0)
    return torch.addcmul(torch.addcmul(weights, taken, share, value=-1), to, gain)
