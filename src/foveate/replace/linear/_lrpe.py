r"""Linearised relative positions (LRPE, cosine type): the product of two features turned by their places is relative.

f(x, n) = [x cos(n theta), x sin(n theta)],    f(q, n) . f(k, s) = \sum_c q_c k_c cos((n - s) theta_c)
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.mixer import Tokens

__all__ = ["first_theta", "placed", "turned"]


def first_theta(heads: int, dim: int) -> Float[Tensor, "heads dim"]:
    """The angles per place where training begins: one geometric series over the channels of all heads."""
    return 10_000.0 ** (-2 / (heads * dim) * torch.arange(heads * dim, dtype=torch.float32)).view(heads, dim)


def placed(tokens: Tokens) -> Int[Tensor, "batch time"]:
    """Which token of its text each one is, in packed texts too."""
    if tokens.opens is None:
        return tokens.place
    return tokens.place - tokens.place.where(tokens.opens, 0).cummax(1).values


def turned(
    x: Float[Tensor, "batch heads time dim"], angle: Float[Tensor, "#batch #heads time dim"]
) -> Float[Tensor, "batch heads time twice"]:
    """f(x, n), twice as wide."""
    return torch.cat([x * angle.cos(), x * angle.sin()], -1)
