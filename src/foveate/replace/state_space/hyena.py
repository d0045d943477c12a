r"""Hyena: long convolutions with filters that a small network makes, between gates.

v <- h^(i) * (x_i v) + D_i x_i v    for i = O-1 down to 1,    out = W_out (x_0 v)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.card import Card, Needs
from foveate.core.convolve import ShortConvolution, convolved, latest
from foveate.core.errors import BadInput
from foveate.core.mixer import Mixer, State, Tokens
from foveate.core.params import bounded
from foveate.core.rule import Sizes

__all__ = ["Hyena"]

# of the windows: what is left of a filter after this share of the longest text, in the slowest and fastest channel
LEFT, SLOW, FAST = 0.01, 1.5, 0.3
FREQUENCY = 10.0
REACH = 3


@dataclass(frozen=True)
class Hyena(Mixer):
    r"""Gated long convolutions, whose filters are functions of the lag.

        [x_0, ..., x_{O-1}, v] = conv_3(W_in x)
        v <- h^(i) * (x_i v) + D_i x_i v    for i = O-1 down to 1,    * the convolution along the text
        out = W_out (x_0 v)

    h_t = window_t MLP(z_t) for lags t below `max_length` L, with z_t of t / (L - 1) and the cosine and sine of `bands`
    frequencies, and window_t = exp(-t |delta_c| / (L - 1)), a rate for each channel c. The MLP has sines between its
    layers, with learned frequencies. D_i is learned, one number per channel.

    Example:
        A layer has fewer parameters of its own for the filters than for its projections.

        >>> import torch, foveate
        >>> from foveate.replace import Hyena
        >>> rule = Hyena(max_length=256, filter_width=16)
        >>> attention = foveate.nn.Attention(64, heads=4, rule=rule)
        >>> attention(torch.randn(2, 100, 64)).shape
        torch.Size([2, 100, 64])
        >>> sum(p.numel() for p in attention.rule.learned.filters.parameters())
        1680

    Args:
        order: Gates, one more than long filters.
        max_length: Tokens of the longest text.
        filter_width: Width of the network that makes the filters.
        bands: Frequencies of the lag that it reads.
    """

    order: int = bounded(2, 2, 8, grid=(2, 3))
    max_length: int = bounded(2048, 2, 1 << 24)
    filter_width: int = bounded(64, 1, 4096, grid=(16, 64))
    bands: int = bounded(2, 1, 64)

    full: ClassVar[bool] = False

    card: ClassVar = Card(
        title="HyenaDNA: Long-Range Genomic Sequence Modeling at Single Nucleotide Resolution",
        year=2023,
        family="state_space",
        needs=Needs.TRAINING,
        equation="v <- D_i x_i v + h^(i) conv (x_i v), i = O-1 down to 1; out = W_out (x_0 v)",
        differs=(
            "lags have the fixed features of the paper's own settings, and no dropout follows the gates; a text longer "
            "than `max_length` is an error (their code cuts it)"
        ),
        use="for very long texts, trained from scratch, at the cost of an FFT",
        misleads="filters do not depend on the text, only gates do, so exact recall is weak; what it keeps grows with "
        "the text up to `max_length`, and a new token costs a pass over it, with the filters made anew",
    )
    test_params: ClassVar = ({"max_length": 128}, {"order": 3, "max_length": 70, "filter_width": 8, "bands": 1})

    def module(self, sizes: Sizes) -> nn.Module:
        return Gates(self, sizes)


class Gates(nn.Module):
    """Projections, gates and filters in one layer.

    Args:
        of: What it is.
        sizes: Sizes of the layer.
    """

    def __init__(self, of: Hyena, sizes: Sizes) -> None:
        super().__init__()
        self.order, self.longest = of.order, of.max_length
        width = sizes.width
        self.in_proj = nn.Linear(width, (of.order + 1) * width)
        self.convolution = ShortConvolution((of.order + 1) * width, REACH, bias=True)
        self.filters = Filters(of, width)
        self.skip = nn.Parameter(torch.randn(of.order - 1, width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, tokens: Tokens, state: State | None) -> tuple[Float[Tensor, "batch query width"], State]:
        before, after, real = state or {}, dict[str, Tensor](), tokens.real
        last = int(tokens.place.masked_fill(~real, -1).amax()) + 1
        if last > self.longest:
            raise BadInput(
                f"a text of {last} tokens and filters for max_length={self.longest}; make the layer with a larger one"
            )
        u = self.in_proj(tokens.x).masked_fill(~real[..., None], 0.0)
        u, after["inputs"] = self.convolution(u, real, before.get("inputs"))
        *gates, v = u.chunk(self.order + 1, -1)
        held = before["filter_1"].shape[1] if before else 0
        kernels = self.filters(min(self.longest, held + u.shape[1]), u.dtype)
        for i, kernel, skip in zip(reversed(range(1, self.order)), kernels, self.skip, strict=True):
            v = (gates[i] * v).masked_fill(~real[..., None], 0.0)
            name = f"filter_{i}"
            past = before.get(name)
            if state is not None:
                after[name] = latest(v, real, past, min(self.longest - 1, held + v.shape[1]))
            v = convolved(v, kernel, past) + skip * v
        return self.out_proj((gates[0] * v).to(tokens.x.dtype)), after


class Filters(nn.Module):
    """The network that makes the long filters of one layer.

    Args:
        of: What the layer is.
        width: Channels.
    """

    def __init__(self, of: Hyena, width: int) -> None:
        super().__init__()
        self.order, self.longest, self.bands = of.order, of.max_length, of.bands
        inner = of.filter_width
        self.layers = nn.ModuleList(nn.Linear(read, inner) for read in (2 * of.bands + 1, inner, inner))
        self.frequency = nn.Parameter(torch.full((inner,), FREQUENCY))
        self.last = nn.Linear(inner, (of.order - 1) * width, bias=False)

    def forward(self, length: int, dtype: torch.dtype) -> Float[Tensor, "filters channels length"]:
        """The filters for lags from 0, in this precision: half of it would lose the phases."""
        lag = torch.arange(length, device=self.frequency.device).to(dtype)[:, None]
        share = lag / (self.longest - 1)
        speeds = torch.linspace(1e-4, self.bands - 1, self.bands, device=lag.device, dtype=dtype)
        turns = 2 * math.pi / self.longest * lag * speeds
        h = torch.cat([share, turns.cos(), -turns.sin()], -1)
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            h = nn.functional.linear(h, layer.weight.to(dtype), layer.bias.to(dtype))
            h = (self.frequency.to(dtype) * h).sin()
        h = h @ self.last.weight.to(dtype).T
        rates = torch.linspace(math.log(LEFT) / SLOW, math.log(LEFT) / FAST, h.shape[1], device=lag.device, dtype=dtype)
        return (h * (share * rates).exp()).T.unflatten(0, (self.order - 1, -1))
