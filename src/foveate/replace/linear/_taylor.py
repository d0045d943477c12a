"""Features whose products are 1 + s + s^2 / 2, from queries and keys that are projected to a few numbers."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.rule import Sizes
from foveate.core.states import exact

__all__ = ["Narrow", "second_order"]


def second_order(
    x: Float[Tensor, "batch heads time dim"],
) -> Float[Tensor, "batch heads time features"]:
    """1, x_i, x_i x_j for i < j and x_i^2 / sqrt(2), of x divided by dim^(1/4): 1 + dim + dim (dim + 1) / 2 numbers."""
    x = x.to(exact(x)) / x.shape[-1] ** 0.25
    dim = x.shape[-1]
    squares = torch.cat([x.new_full((1,), 0.5**0.5), x.new_ones(dim - 1)])
    # slices beside each other: an index for each pair takes three times as long
    pairs = [x[..., i : i + 1] * (x[..., i:] * squares[: dim - i]) for i in range(dim)]
    return torch.cat([torch.ones_like(x[..., :1]), x, *pairs], -1)


class Narrow(nn.Module):
    """Projections of queries and keys, one per head; those of a group of heads begin alike, with orthogonal columns.

    Args:
        dim: Width of a projected query or key.
        sizes: Sizes of the layer.
    """

    def __init__(self, dim: int, sizes: Sizes) -> None:
        super().__init__()
        drawn = torch.stack([nn.init.orthogonal_(torch.empty(sizes.head_dim, dim)) for _ in range(sizes.kv_heads)])
        self.k = nn.Parameter(drawn)
        self.q = nn.Parameter(drawn.repeat_interleave(sizes.heads // sizes.kv_heads, 0))

    def queries(self, q: Float[Tensor, "batch heads time dim"]) -> Float[Tensor, "batch heads time features"]:
        """Features of queries."""
        return second_order(q.to(exact(q)) @ self.q.to(exact(q)))

    def keys(self, k: Float[Tensor, "batch kv_heads time dim"]) -> Float[Tensor, "batch kv_heads time features"]:
        """Features of keys."""
        return second_order(k.to(exact(k)) @ self.k.to(exact(k)))
