r"""Hungry Hungry Hippos: what followed a token is kept under that token, by two state spaces and two products.

o_t = q_t^T \sum_{l >= 0} g_l k'_{t-l} v_{t-l}^T,    k'_t = \sum_l h_l k_{t-l}
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor, nn

from foveate.core.card import Card, Needs
from foveate.core.convolve import convolved, latest
from foveate.core.errors import BadInput
from foveate.core.mixer import Mixer, State, Tokens
from foveate.core.params import bounded, choice
from foveate.core.rule import Sizes
from foveate.core.states import exact

__all__ = ["H3"]

# tokens whose powers of the decays are in memory at once
STRETCH = 64


@dataclass(frozen=True)
class H3(Mixer):
    r"""A shift state space on keys and a diagonal one on keys times values, read by queries.

        k'_t = \sum_{l < n} h_l k_{t-l} + e k_t,    h_l = \sum_j b_j c_{j+l}                  per channel
        y_t  = \sum_{l >= 0} g_l k'_{t-l} v_{t-l}^T + f k'_t v_t^T,    o_t = q_t^T y_t         per head
        g_l  = 2 Re \sum_m C_m B_m (exp(s A_m) - 1) / A_m exp(l s A_m),    out = W_o concat_h(o)

    q, k, v are projections of x with biases; n is `taps`. A = -exp(a) + i w, B and C are complex numbers per head and
    mode m, s = exp(r) one per head; all are learned, with b, c, e and f. The convolutions run through the FFT; from
    call to call the diagonal state space is a state, exp(s A) S_{t-1} + B (exp(s A) - 1) / A k'_t v_t^T.

    Without gates the diagonal state space is all there is, the layer of S4D, which the paper compares with:

        y_t = \sum_{l >= 0} g_l v_{t-l} + f v_t,    out = W_o gelu(concat_h(y))

    Example:
        What it keeps of a text does not grow with it: 32 complex numbers and 63 past keys per channel.

        >>> import torch, foveate
        >>> from transformers import DynamicCache
        >>> from foveate.replace import H3
        >>> attention = foveate.nn.Attention(32, heads=4, rule=H3())
        >>> cache = DynamicCache()
        >>> _ = attention(torch.randn(1, 1000, 32), cache=cache)
        >>> cache.layers[0].bytes_held() == 32 * (32 * 2 + 63) * 4
        True

    Args:
        head_dim: Width of its own heads, which divides that of the layer. With gates, the state is this many times as
            large.
        modes: Complex numbers that the diagonal state space keeps for each pair of channels in a head; without gates,
            for each channel.
        taps: Tokens that the shift state space reaches over.
        gated: Whether there are keys and queries, and so the shift state space and both products.
    """

    head_dim: int = bounded(1, 1, 1024, grid=(1, 8))
    modes: int = bounded(32, 1, 1024)
    taps: int = bounded(64, 1, 4096)
    gated: bool = choice(True, True, False)

    full: ClassVar[bool] = False

    card: ClassVar = Card(
        title="Hungry Hungry Hippos: Towards Language Modeling with State Space Models",
        year=2022,
        family="state_space",
        needs=Needs.TRAINING,
        equation="k' = h conv k; y_t = sum_l g_l k'_{t-l} v_{t-l}^T; o_t = q_t^T y_t; h shift, g diagonal state space",
        differs=(
            "the diagonal state space is made discrete by zero-order hold, where the code has the bilinear rule by "
            "default: they agree to second order in the step, and this one has no pole; widths of heads are as in "
            "their code, whose default is 1; without gates the state space reads values, S4D the input of the layer"
        ),
        use="for cheap recall of what came with or after a token, in linear time, next to a few layers of attention",
        misleads="what is forgotten does not depend on the text; published results are of hybrids with attention; it "
        "has projections of its own, so a loaded model is to be trained",
        claims=("gated_state_space",),
    )
    test_params: ClassVar = (
        {},
        {"head_dim": 8, "modes": 3, "taps": 5},
        {"gated": False},
        {"head_dim": 4, "modes": 3, "gated": False},
    )

    def module(self, sizes: Sizes) -> nn.Module:
        if sizes.width % self.head_dim:
            raise BadInput(
                f"head_dim={self.head_dim} does not divide the layer's width {sizes.width}; take one that does"
            )
        return Hippos(self, sizes.width)


class Hippos(nn.Module):
    """Parameters of both state spaces and projections in one layer.

    Args:
        of: What it is.
        width: Width of the layer.
    """

    def __init__(self, of: H3, width: int) -> None:
        super().__init__()
        self.dim, self.gated, heads = of.head_dim, of.gated, width // of.head_dim
        if of.gated:
            self.q_proj, self.k_proj = (nn.Linear(width, width) for _ in range(2))
        self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(2))
        if of.gated:
            self.shift_in = nn.Parameter(nn.functional.pad(torch.ones(width, 1), (0, of.taps - 1)))
            self.shift_out = nn.Parameter(torch.empty(width, of.taps).uniform_(-1, 1) * of.taps**-0.5)
            self.shift_skip = nn.Parameter(torch.randn(width))
        # complex numbers are pairs of real ones, which can be of any precision
        self.log_rate = nn.Parameter(torch.full((heads, of.modes), math.log(0.5)))
        self.speed = nn.Parameter((math.pi * torch.arange(of.modes)).repeat(heads, 1))
        self.log_step = nn.Parameter(torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)))
        self.read_in = nn.Parameter(torch.tensor([1.0, 0.0]).repeat(heads, of.modes, 1))
        self.read_out = nn.Parameter(torch.randn(heads, of.modes, 2) * 0.5**0.5)
        self.skip = nn.Parameter(torch.randn(heads))

    def forward(self, tokens: Tokens, state: State | None) -> tuple[Float[Tensor, "batch query width"], State]:
        before, after, real = state or {}, dict[str, Tensor](), tokens.real
        v = self.projected(self.v_proj, tokens).unflatten(2, (-1, self.dim))
        dtype = v.dtype
        # without gates, one key that is 1 writes values and reads them as they are
        q = k = torch.ones_like(v[..., :1])
        if self.gated:
            q, k = (self.projected(layer, tokens) for layer in (self.q_proj, self.k_proj))
            past, shift = before.get("keys"), self.shift_kernel(dtype)
            if state is not None:
                after["keys"] = latest(k, real, past, shift.shape[1] - 1)
            k = convolved(k, shift, past) + self.shift_skip * k
            q, k = (t.unflatten(2, (-1, self.dim)) for t in (q, k))
        # per head: every channel of a key with every one of a value
        pairs = k[..., None] * v[..., None, :]
        y = convolved(pairs.flatten(2), self.kernel(real.shape[1], dtype)).view_as(pairs)
        y = y + self.skip.to(dtype)[:, None, None] * pairs
        out = (q[..., None] * y).sum(3)
        if state is not None:
            held = torch.view_as_complex(before["state"]) if before else None
            earlier, left = self.carried(q, pairs, real, held)
            out, after["state"] = out + earlier, torch.view_as_real(left).contiguous()
        out = out.flatten(2) if self.gated else nn.functional.gelu(out.flatten(2))
        return self.o_proj(out.to(tokens.x.dtype)), after

    def projected(self, layer: nn.Module, tokens: Tokens) -> Float[Tensor, "batch time width"]:
        """A projection of the input, 0 at padding."""
        x = layer(tokens.x)
        return x.to(exact(x)).masked_fill(~tokens.real[..., None], 0.0)

    def shift_kernel(self, dtype: torch.dtype) -> Float[Tensor, "width taps"]:
        """The kernel h of the shift state space."""
        b, c = self.shift_in.to(dtype), self.shift_out.to(dtype)
        points = 2 * b.shape[1]
        return torch.fft.irfft(torch.fft.rfft(b, points).conj() * torch.fft.rfft(c, points), points)[:, : b.shape[1]]

    def diagonal(self, dtype: torch.dtype) -> tuple[Complex[Tensor, "heads modes"], ...]:
        """Logs of the decays, what writes are multiplied by, and what is read."""
        a = torch.complex(-self.log_rate.to(dtype).exp(), self.speed.to(dtype))
        b, c = (torch.view_as_complex(t.to(dtype).contiguous()) for t in (self.read_in, self.read_out))
        logs = self.log_step.to(dtype).exp()[:, None] * a
        return logs, b * torch.expm1(logs) / a, c

    def kernel(self, length: int, dtype: torch.dtype) -> Float[Tensor, "heads length"]:
        """The kernel g of the diagonal state space, from few powers: lags are multiples of a root and the rest."""
        logs, into, out_of = self.diagonal(dtype)
        size = math.isqrt(length - 1) + 1
        steps = torch.arange(size, device=logs.device)
        coarse = (into * out_of)[..., None] * powers(logs, steps * size)
        return 2 * (coarse.transpose(1, 2) @ powers(logs, steps)).real.flatten(1)[:, :length]

    def carried(
        self,
        q: Float[Tensor, "batch time heads key"],
        pairs: Float[Tensor, "batch time heads key value"],
        real: Bool[Tensor, "batch time"],
        held: Complex[Tensor, "batch heads modes inner"] | None,
    ) -> tuple[Float[Tensor, "batch time heads value"], Complex[Tensor, "batch heads modes inner"]]:
        """What queries read of the state of earlier calls, and the state behind these tokens."""
        logs, into, out_of = self.diagonal(q.dtype)
        # one row for all texts where they are alike
        alike = real[:1] if bool(real.all()) else real
        outs, left = [], torch.zeros((), dtype=logs.dtype, device=q.device)
        for begin in range(0, q.shape[1], STRETCH):
            part = slice(begin, begin + STRETCH)
            seen = alike[:, part].cumsum(1)
            faded = powers(logs, seen)
            if held is None:
                outs.append(torch.zeros_like(pairs[:, part, :, 0]))
            else:
                y = 2 * ((faded * out_of[..., None]).transpose(2, 3) @ held).real
                y = y.unflatten(3, (q.shape[3], -1)).transpose(1, 2)
                outs.append((q[:, part, ..., None] * y).sum(3))
                held = held * faded[..., -1:]
            until = powers(logs, seen[:, -1:] - seen) * into[..., None]
            flat = pairs[:, part].flatten(3).transpose(1, 2)
            left = left * faded[..., -1:] + torch.complex(until.real @ flat, until.imag @ flat)
        return torch.cat(outs, 1), left if held is None else left + held


def powers(
    logs: Complex[Tensor, "heads modes"], steps: Int[Tensor, "*batch time"]
) -> Complex[Tensor, "*batch heads modes time"]:
    """What is left of a state after so many tokens."""
    # in real functions, which are several times as fast
    steps = steps[..., None, None, :].to(logs.real.dtype)
    left, turned = (logs.real[..., None] * steps).exp(), logs.imag[..., None] * steps
    return torch.complex(left * turned.cos(), left * turned.sin())
