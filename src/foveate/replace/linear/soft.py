r"""SOFT: attention by a Gaussian kernel, of low rank through landmarks, without any softmax.

    G(a, b) = exp(-|a - b|^2 / 2),    X = one projection of the layer's input, by d^(1/4)
    Z = GELU(LayerNorm(W mean X)), means over stretches of the text,    P = G(X, Z),    A = G(Z, Z)
    O = P D^(-1/2) A^+ D^(-1/2) P^T V + conv(V),    D = diag(A 1)

A^+ is what T steps of Newton's method make of A + 0.01: Y <- 2 Y - Y (A + 0.01) Y from Y = 1.8 / r^2 (A + 0.01), r the
largest sum of a row of A.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu

from foveate.core.card import Card, Needs
from foveate.core.params import bounded
from foveate.core.recurrence import Heads, Recurrence
from foveate.core.rule import Sizes
from foveate.core.states import Scan, exact
from foveate.replace.linear._landmarks import check_whole, landmarks
from foveate.replace.linear._local import Local

__all__ = ["Soft"]

# added to the diagonal of A: landmarks that coincide leave it without an inverse
RIDGE = 0.01
# below 2, where Newton's method would no longer come to the inverse
START = 1.8


@dataclass(frozen=True)
class Soft(Recurrence):
    """Softmax-free attention through landmarks and the inverse of their kernel.

    Example:
        Nothing in it is normalised over a row: outputs may have any size.

        >>> import torch, foveate
        >>> from foveate.replace import Soft
        >>> rule = Soft(landmarks=16)
        >>> layer = foveate.nn.Attention(32, heads=4, rule=rule, causal=False)
        >>> layer(torch.randn(1, 300, 32)).shape
        torch.Size([1, 300, 32])

    Args:
        landmarks: How many; a text of fewer tokens has as many as tokens.
        steps: T. It is part of the function: small eigenvalues of A are not inverted in 20 steps.
        local: Tokens under the window of the convolution; an even number is one more, and 0 none.
    """

    landmarks: int = bounded(49, 1, 1024, grid=(16, 49, 144))
    steps: int = bounded(20, 1, 64)
    local: int = bounded(3, 0, 63)

    causal: ClassVar[bool] = False

    card: ClassVar[Card] = Card(
        title="Softmax-free Linear Transformers",
        year=2022,
        family="linear",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES | Needs.TRAINING,
        equation="O = P D^-1/2 A^+ D^-1/2 P^T V + conv(V), P = G(X, Z), A = G(Z, Z), G(a, b) = exp(-|a - b|^2 / 2)",
        differs="X is the mean of the layer's queries and keys, which is one projection as in the paper. Landmarks are "
        "means of equal stretches through one matrix; the paper's default is a convolution with stride over an image. "
        "0.01 and 1.8 are those of its plain code, joined with the normalisation of its journal version, whose code "
        "leaves them out. Gradients go through all steps; the plain code takes those of the true inverse.",
        use="In encoders of images and long texts, trained with it.",
        misleads="It does not approximate softmax attention: weights have no sum to keep to, and may be negative "
        "behind the inverse. No causal form: landmarks stand for the whole text.",
    )
    test_params: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"landmarks": 4, "steps": 6, "local": 0}, {"landmarks": 1})

    def learned(self, sizes: Sizes) -> nn.Module:
        return Landmarks(sizes, self.local)

    def scan(self, heads: Heads, first: bool = True) -> Scan:
        own: Any = heads.learned
        tokens, wide = heads.tokens, exact(heads.q)
        check_whole("Soft", tokens, first)
        x = (heads.q.to(wide) + heads.every_head(heads.k).to(wide)) / 2 * heads.scale**0.5
        z, there = landmarks(x, tokens, self.landmarks)
        z = own(z.to(heads.q.dtype)).to(wide)
        p = kernel(x, z) * there[:, None, None]
        a = kernel(z, z) * (there[:, None, None] & there[:, None, :, None])
        half = a.sum(-1).clamp_min(1).rsqrt()
        middle = half[..., None] * inverse(a, self.steps) * half[..., None, :]
        return Scan(p @ middle, p, heads.every_head(heads.v).to(wide), real=tokens.real, causal=False)

    def finish(
        self, heads: Heads, out: Float[Tensor, "batch heads time value_dim"]
    ) -> Float[Tensor, "batch heads time value_dim"]:
        own: Any = heads.learned
        return out if own.local is None else out + own.local(heads.every_head(heads.v), heads.tokens)


class Landmarks(nn.Module):
    """What makes landmarks of means, for all heads, and a convolution with one window for each head.

    Args:
        sizes: Sizes of the layer.
        local: Tokens under the window; 0: there is none.
    """

    def __init__(self, sizes: Sizes, local: int) -> None:
        super().__init__()
        self.proj = nn.Linear(sizes.head_dim, sizes.head_dim, bias=False)
        self.norm = nn.LayerNorm(sizes.head_dim)
        self.local = Local((sizes.heads, 1), local | 1, bias=False) if local else None

    def forward(self, means: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return gelu(self.norm(self.proj(means)))


def kernel(a: Float[Tensor, "*batch n dim"], b: Float[Tensor, "*batch m dim"]) -> Float[Tensor, "*batch n m"]:
    """G of each pair of rows."""
    squares = a.square().sum(-1)[..., None] + b.square().sum(-1)[..., None, :]
    # rounding may take a distance of nothing below 0
    return torch.exp(-(squares - 2 * a @ b.mT).clamp_min(0) / 2)


def inverse(a: Float[Tensor, "*batch m m"], steps: int) -> Float[Tensor, "*batch m m"]:
    """A^+ by Newton's method."""
    ridged = a + RIDGE * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    y = START / a.sum(-1).amax(-1).clamp_min(1)[..., None, None] ** 2 * ridged
    for _ in range(steps):
        y = 2 * y - y @ ridged @ y
    return y
