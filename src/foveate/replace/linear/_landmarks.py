"""A few rows that stand for all tokens of a text: means of stretches of equal length."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core.errors import NotSupported
from foveate.core.mixer import Tokens

__all__ = ["check_whole", "landmarks"]


def landmarks(
    x: Float[Tensor, "batch heads time dim"], tokens: Tokens, count: int
) -> tuple[Float[Tensor, "batch heads count dim"], Bool[Tensor, "batch count"]]:
    """Means over `count` stretches of each text, as adaptive pooling cuts them, and which of them there are.

    A text of fewer tokens has one stretch per token; the rows of the others are 0.
    """
    n = tokens.real.sum(1)
    at, last = tokens.real.cumsum(1) - 1, n.clamp_max(count)
    j, parts = torch.arange(count, device=x.device), last.clamp_min(1)[:, None]
    low = j * n[:, None] // parts
    high = ((j + 1) * n[:, None] + parts - 1) // parts
    there = j < last[:, None]
    within = (at[:, None] >= low[..., None]) & (at[:, None] < high[..., None])
    within = within & tokens.real[:, None] & there[..., None]
    share = within.to(x) / within.sum(-1, keepdim=True).clamp_min(1)
    return share[:, None] @ x, there


def check_whole(name: str, tokens: Tokens, first: bool) -> None:
    """Raises `NotSupported` where a call is not of whole texts, one per row."""
    if not first:
        raise NotSupported(f"{name} reads stretches of the whole text, all at once; call it without a cache")
    if tokens.opens is not None:
        raise NotSupported(f"{name} knows one text per row; give packed texts a row each, with padding")
