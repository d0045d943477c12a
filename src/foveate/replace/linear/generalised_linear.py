r"""LinFusion: linear attention whose queries and keys see the layer's input through a small network.

o_i = \sum_j phi(q'_i)^T phi(k'_j) v_j / \sum_j phi(q'_i)^T phi(k'_j),   phi(x) = elu(x) + 1,
q' = q + f_q(x),   k' = k + f_k(x),   f(x) = W_2 LeakyReLU(LayerNorm(W_1 x + b_1)) + b_2   over all heads together
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.card import Card, Needs
from foveate.core.recurrence import Heads, Recurrence
from foveate.core.rule import Sizes
from foveate.core.states import exact

__all__ = ["GeneralisedLinear"]


@dataclass(frozen=True)
class GeneralisedLinear(Recurrence):
    """Normalised linear attention with features of the whole input.

    Example:
        Twice as many tokens of the same content give the same.

        >>> import torch, foveate
        >>> from foveate.replace import GeneralisedLinear
        >>> rule = GeneralisedLinear()
        >>> encoder = foveate.nn.Attention(32, 4, rule=rule, causal=False)
        >>> x = torch.randn(1, 10, 32)
        >>> twice = encoder(x.repeat_interleave(2, 1))
        >>> bool(torch.allclose(twice[:, ::2], encoder(x), atol=1e-6))
        True
    """

    normalised: ClassVar[bool] = True

    card: ClassVar = Card(
        title="LinFusion: 1 GPU, 1 Minute, 16K Image",
        year=2024,
        family="linear",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES | Needs.TRAINING,
        equation="o_i = sum_j phi(q'_i).phi(k'_j) v_j / sum_j phi(q'_i).phi(k'_j), q' = q + f_q(x), k' = k + f_k(x)",
        differs="f is added to queries and keys and not to the input of their projections, which is the same but for "
        "what W_2 means, and but for rotary positions, which it has none of; W_2 and b_2 begin at zero, so that a "
        "fresh layer is plain linear attention; nothing is added to the mean of the weights (the authors' code adds "
        "1e-4); the causal form is ours",
        use="in place of self-attention in encoders that must work on more tokens than they were trained on, its "
        "parameters distilled from the layer that it replaces",
        misleads="that outputs do not change when every token is doubled is true of every normalised attention; the "
        "paper's results are of images, all tokens seeing all, after distillation",
    )

    def learned(self, sizes: Sizes) -> nn.Module:
        return Inputs(sizes)

    def queries(self, heads: Heads) -> Float[Tensor, "batch heads time key"]:
        assert isinstance(heads.learned, Inputs)
        return positive(heads.q + by_head(heads.learned.q(heads.tokens.x), heads.q))

    def keys(self, heads: Heads) -> Float[Tensor, "batch kv_heads time key"]:
        assert isinstance(heads.learned, Inputs)
        return positive(heads.k + by_head(heads.learned.k(heads.tokens.x), heads.k))


class Inputs(nn.Module):
    """f_q and f_k of one layer.

    Args:
        sizes: Sizes of the layer.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.q, self.k = (network(sizes.width, heads * sizes.head_dim) for heads in (sizes.heads, sizes.kv_heads))


def network(width: int, inner: int) -> nn.Sequential:
    """f, which gives zeros at first."""
    last = nn.Linear(width, inner)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.LeakyReLU(), last)


def by_head(
    x: Float[Tensor, "batch time inner"], like: Float[Tensor, "batch heads time dim"]
) -> Float[Tensor, "batch heads time dim"]:
    """A projection, head by head."""
    return x.unflatten(-1, (like.shape[1], -1)).transpose(1, 2)


def positive(x: Float[Tensor, "batch heads time dim"]) -> Float[Tensor, "batch heads time dim"]:
    """Features elu(x) + 1, which keep their digits where they are small."""
    x = x.to(exact(x))
    return torch.where(x > 0, x + 1, x.clamp_max(0.0).exp())
