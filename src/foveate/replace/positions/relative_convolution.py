r"""Relative convolutional heads: queries, keys and values blurred over the last tokens, and relative positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.card import Card, Needs
from foveate.core.mask import Mask
from foveate.core.mixer import Mixer, State, Tokens
from foveate.core.params import bounded
from foveate.core.rows import View, attend
from foveate.core.rule import Sizes
from foveate.replace.positions._relative import Relative

__all__ = ["RelativeConvolution"]


@dataclass(frozen=True)
class RelativeConvolution(Mixer):
    r"""Attention whose queries, keys and values are causal depth-wise convolutions, the same in all heads.

    q'_t = a + \sum_{m < kernel} w_m * q_{t-m}, and so k' and v', each with its own w and a

    s_ij = scale ((q'_i + u_h) . k'_j + q'_i . e_{h,i-j} + b_{h,i-j}),    e = b = 0 from `span` tokens on

    The state is the last `kernel` - 1 projections and the keys and values that were convolved.

    Example:
        Each query, key and value knows the two tokens before its own.

        >>> import torch, foveate
        >>> from foveate.replace import RelativeConvolution
        >>> rule = RelativeConvolution(span=64)
        >>> attention = foveate.nn.Attention(32, heads=4, rule=rule)
        >>> attention(torch.randn(2, 5, 32)).shape
        torch.Size([2, 5, 32])

    Args:
        kernel: Tokens that a convolution reads, its own included.
        span: How many distances have a vector, from 0.
    """

    kernel: int = bounded(3, 2, 64)
    span: int = bounded(4096, 1, 1 << 20)

    card: ClassVar[Card] = Card(
        title="RCMHA: Relative Convolutional Multi-Head Attention for Natural Language Modelling",
        year=2023,
        family="positions",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES,
        equation="q', k', v' = conv(q), conv(k), conv(v); s_ij = scale ((q'_i + u) . k'_j + q'_i . e_{i-j} + b_{i-j})",
        differs=(
            "as in its code, the convolutions follow the projections (the abstract: they precede them), and e, b and u "
            "start at 0; vectors for later keys, which a causal text never reads, are left out; there may be fewer "
            "key-value heads"
        ),
        use="Small language models trained from nothing.",
        misleads="A loaded model loses its projections to it.",
    )
    full: ClassVar[bool] = False
    test_params: ClassVar[tuple[dict[str, Any], ...]] = ({"span": 64}, {"kernel": 5, "span": 4})

    def module(self, sizes: Sizes) -> torch.nn.Module:
        return Convolved(sizes, self)


class Convolved(torch.nn.Module):
    """The layer: projections, a convolution behind each, and what its scores know of distances."""

    def __init__(self, sizes: Sizes, mixer: RelativeConvolution) -> None:
        super().__init__()
        self.sizes, self.kernel = sizes, mixer.kernel
        dims = {"q": sizes.head_dim, "k": sizes.head_dim, "v": sizes.value_dim}
        heads = {"q": sizes.heads, "k": sizes.kv_heads, "v": sizes.kv_heads}
        self.projections = torch.nn.ModuleDict(
            {n: torch.nn.Linear(sizes.width, heads[n] * dims[n], bias=n == "v") for n in dims}
        )
        self.convolutions = torch.nn.ModuleDict(
            {n: torch.nn.Conv1d(dim, dim, mixer.kernel, groups=dim) for n, dim in dims.items()}
        )
        self.output = torch.nn.Linear(sizes.heads * sizes.value_dim, sizes.width)
        self.toward_keys = torch.nn.Parameter(torch.zeros(sizes.heads, sizes.head_dim))
        self.distance = torch.nn.Parameter(torch.zeros(sizes.heads, mixer.span, sizes.head_dim))
        self.distance_bias = torch.nn.Parameter(torch.zeros(sizes.heads, mixer.span))

    def forward(self, tokens: Tokens, state: State | None) -> tuple[Float[Tensor, "batch query width"], State]:
        """The output, and what later tokens need of these."""
        made: dict[str, Tensor] = {}
        kept: State = {}
        for n in self.projections:
            made[n], kept[f"last_{n}"] = self.convolved(n, tokens, state)
        kept |= {"k": made["k"], "v": made["v"], "real": tokens.real}
        if state:
            kept |= {n: torch.cat([state[n], kept[n]], -1 if n == "real" else 2) for n in ("k", "v", "real")}
        queries, keys = tokens.x.shape[1], kept["real"].shape[1]
        mask = Mask.of_padding(kept["real"], queries, keys, causal=True, device=tokens.x.device)
        view = View(made["q"], kept["k"], kept["v"], mask, rule=Relative(), learned=self)
        out = attend(view).out.transpose(1, 2).flatten(2)
        return self.output(out), kept

    def convolved(
        self, name: str, tokens: Tokens, state: State | None
    ) -> tuple[Float[Tensor, "batch heads query dim"], Float[Tensor, "batch heads before dim"]]:
        """One of q, k and v behind its convolution, and the last projections."""
        conv = self.convolutions[name]
        x = self.projections[name](tokens.x).unflatten(-1, (-1, conv.in_channels)).transpose(1, 2)
        # in front of a text there is nothing, and a bias of the projection is not nothing
        x = torch.where(tokens.real[:, None, :, None], x, 0.0)
        before = state[f"last_{name}"] if state else x.new_zeros(*x.shape[:2], self.kernel - 1, x.shape[3])
        x = torch.cat([before, x], 2)
        # torch counts the taps of a filter from the oldest token to the newest
        out = conv(x.flatten(0, 1).transpose(1, 2)).transpose(1, 2).unflatten(0, x.shape[:2])
        # a slice would keep the whole text
        return out, x[:, :, 1 - self.kernel :].clone()
