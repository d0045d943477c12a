r"""The selective state-space layer of Mamba: each channel forgets and takes in as the token says.

    h_t = exp(D_t A) h_{t-1} + D_t B_t x_t,    y_t = C_t . h_t + s x_t

per channel, with N states that D_t, B_t and C_t, made from the token, serve in common.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foveate.core.card import Card, Needs
from foveate.core.convolve import ShortConvolution
from foveate.core.mixer import Mixer, State, Tokens
from foveate.core.params import bounded
from foveate.core.rule import Sizes
from foveate.core.scans import selective

__all__ = ["SelectiveStateSpace"]

# inner channels times tokens that are worked on at once
STRETCH = 1 << 19


@dataclass(frozen=True)
class SelectiveStateSpace(Mixer):
    r"""A state-space layer whose step, input and output matrices come from the token.

        [x, z] = W_in u,    x = silu(conv(x)),    [d_t, B_t, C_t] = W_x x_t,    D_t = softplus(W_d d_t + b)
        h_t = exp(D_t A) h_{t-1} + D_t B_t x_t,    y_t = C_t . h_t + s x_t,    out = W_out (y * silu(z))

    h has N numbers per inner channel e, A = -exp(a) is learned per channel and state, D_t is one number per channel
    through a bottleneck of a 16th of the width, B_t and C_t have N numbers that all channels share.

    Example:
        What it keeps of a text does not grow with it.

        >>> import torch, foveate
        >>> from transformers import DynamicCache
        >>> from foveate.replace import SelectiveStateSpace
        >>> attention = foveate.nn.Attention(32, heads=4, rule=SelectiveStateSpace())
        >>> cache = DynamicCache()
        >>> _ = attention(torch.randn(1, 1000, 32), cache=cache)
        >>> cache.layers[0].bytes_held() == 64 * (16 + 3) * 4
        True

    Args:
        states: Numbers N that each inner channel keeps.
        expand: Inner channels per channel of the layer.
        convolution: Tokens that the convolution reaches over, each its own one included.
    """

    states: int = bounded(16, 1, 1024, grid=(8, 16, 64))
    expand: int = bounded(2, 1, 16, grid=(1, 2))
    convolution: int = bounded(4, 1, 16, grid=(2, 4))

    full: ClassVar[bool] = False

    card: ClassVar = Card(
        title="Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
        year=2023,
        family="state_space",
        needs=Needs.TRAINING,
        equation="h_t = exp(D_t A) h_{t-1} + D_t B_t x_t; y_t = C_t . h_t + s x_t; out = W_out (y silu(z))",
        differs=(
            "it takes the place of attention alone, where the paper's block takes that of attention and of the "
            "feed-forward layer, so that a model has more parameters with it"
        ),
        use="for long texts in linear time and a state of fixed size, with forgetting that the tokens decide",
        misleads="32 numbers per channel of the layer do not hold many pairs to be recalled to the letter; its speed "
        "on a CPU says nothing of that on a GPU; its heads are not those of attention: a loaded model is to be trained",
    )
    test_params: ClassVar = ({}, {"states": 3, "expand": 1, "convolution": 1})

    def module(self, sizes: Sizes) -> nn.Module:
        return Selected(self, sizes)


class Selected(nn.Module):
    """Parameters of a selective state-space layer.

    Args:
        of: What it is.
        sizes: Sizes of the layer.
    """

    def __init__(self, of: SelectiveStateSpace, sizes: Sizes) -> None:
        super().__init__()
        width, inner, rank = sizes.width, of.expand * sizes.width, -(-sizes.width // 16)
        self.split = (rank, of.states, of.states)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.convolution = ShortConvolution(inner, of.convolution, bias=True)
        self.x_proj = nn.Linear(inner, sum(self.split), bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.log_rate = nn.Parameter(torch.arange(1, of.states + 1).log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        # softplus of the bias is between 0.001 and 0.1, evenly in logs
        step = torch.empty(inner).uniform_(-3, -1).mul(torch.tensor(10.0).log()).exp()
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-(rank**-0.5), rank**-0.5)
            self.dt_proj.bias.copy_(step.expm1().log())

    def forward(self, tokens: Tokens, state: State | None) -> tuple[Float[Tensor, "batch query width"], State]:
        state = state or {}
        # memory that is new to the process costs more than the work on it: stretches are made in that of those before
        size, outs = max(1, STRETCH // max(1, len(tokens.x) * len(self.skip))), []
        for x, real in zip(tokens.x.split(size, 1), tokens.real.split(size, 1), strict=True):
            out, state = self.stretch(x, real, state)
            outs.append(out)
        return torch.cat(outs, 1), state

    def stretch(
        self, u: Float[Tensor, "batch time width"], real: Bool[Tensor, "batch time"], before: State
    ) -> tuple[Float[Tensor, "batch time width"], State]:
        """The outputs for tokens that stand behind each other, and the state behind them."""
        gap = ~real[..., None]
        x, z = self.in_proj(u).chunk(2, -1)
        x, inputs = self.convolution(x, real, before.get("inputs"))
        x = nn.functional.silu(x).masked_fill_(gap, 0.0)
        low, b, c = self.x_proj(x.to(z.dtype)).split(self.split, -1)
        # steps of a thousandth are lost in half precision; at padding there is no step
        dt = nn.functional.linear(low, self.dt_proj.weight).to(x.dtype).add_(self.dt_proj.bias)
        dt = nn.functional.softplus(dt).masked_fill_(gap, 0.0)
        rate = -self.log_rate.to(x.dtype).exp()
        held = before.get("state", x.new_zeros(x.shape[0], *rate.shape))
        y, held = selective(dt, x, rate, b.to(x.dtype), c.to(x.dtype), held)
        y = y.addcmul_(self.skip, x) * nn.functional.silu(z)
        return self.out_proj(y.to(z.dtype)), {"state": held, "inputs": inputs}
