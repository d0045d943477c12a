r"""Gated convolution, the mixer without attention that recall is compared with.

    x_1, x_2, v = c * (W_in u + b)                c: three taps for each channel
    y           = W_out (x_2 (h * z + d z)) + b', z = x_1 v

Every output is a product of linear maps of the past whose weights depend on distance, and not on content.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.mixer import Mixer, State, Tokens
from foveate.core.params import bounded
from foveate.core.rule import Sizes

__all__ = ["GatedConvolution"]

TAPS = 3
SLOW, FAST, FADED = 1.5, 0.3, 0.01


@dataclass(frozen=True)
class GatedConvolution(Mixer):
    """A causal gated convolution over all of a sequence, as Hyena and H3 have it.

    Args:
        length: Taps of the long filter h; what lies further back is not seen.

    Source: Zoology: Measuring and Improving Recall in Efficient Language Models, which trains Hyena as one of its
    models without attention. There a small network makes h; here its taps are parameters, so that it can be any filter
    of that length. They start as noise that fades as Hyena's does, to 1 % after 0.3 to 1.5 lengths by channel.
    """

    length: int = bounded(64, 1, 1 << 20)

    full: ClassVar[bool] = False

    def module(self, sizes: Sizes) -> Convolution:
        return Convolution(sizes.width, self.length)


class Convolution(nn.Module):
    """The gated convolution of one layer."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.inward = nn.Linear(width, 3 * width)
        self.short = nn.Conv1d(3 * width, 3 * width, TAPS, groups=3 * width)
        self.outward = nn.Linear(width, width)
        self.skip = nn.Parameter(torch.ones(width))
        fades = torch.exp(math.log(FADED) / torch.linspace(SLOW, FAST, width)[:, None] * torch.linspace(0, 1, length))
        taps = torch.randn(width, length) * fades
        self.filter = nn.Parameter(taps / taps.norm(dim=1, keepdim=True))

    def forward(self, tokens: Tokens, state: State | None) -> tuple[Float[Tensor, "batch query width"], State | None]:
        """The output, and what the next tokens need: the inputs of the last taps of c, and z as far as h reaches."""
        real, n = tokens.real[:, None], tokens.x.shape[1]
        before = state or {}
        u = torch.where(real, self.inward(tokens.x).transpose(1, 2), 0.0)
        u = torch.cat([before.get("u", u.new_zeros(*u.shape[:2], TAPS - 1)), u], 2)
        x1, x2, v = self.short(u).chunk(3, 1)
        z = torch.where(real, x1 * v, 0.0)
        z = torch.cat([before.get("z", z[..., :0]), z], 2)
        out = self.outward((x2 * (convolved(z, self.filter) + self.skip[:, None] * z)[..., -n:]).transpose(1, 2))
        if state is None:
            return out, None
        reach = max(0, min(self.filter.shape[1] - 1, z.shape[2]))
        return out, {"u": u[..., -(TAPS - 1) :].clone(), "z": z[..., z.shape[2] - reach :].clone()}


def convolved(
    z: Float[Tensor, "batch width position"], taps: Float[Tensor, "width taps"]
) -> Float[Tensor, "batch width position"]:
    r"""y_t = \sum_s h_s z_{t - s}."""
    n = z.shape[2]
    # twice as long, so that the end does not reach round to the beginning
    product = torch.fft.rfft(z, n=2 * n) * torch.fft.rfft(taps[:, :n], n=2 * n)
    return torch.fft.irfft(product, n=2 * n)[..., :n]
