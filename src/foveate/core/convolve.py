r"""Causal convolutions along a text, one kernel per channel or per group, at once or from call to call.

    y_t = \sum_{l=0}^{L-1} h_l x_{t-l}

The state between calls is the last inputs (`latest`). Short kernels are sums of shifted inputs; long ones go through
the FFT, over as many points as keep the end of the text out of its beginning.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from scipy.fft import next_fast_len
from torch import Tensor, nn

from foveate.core.states import exact

__all__ = ["ShortConvolution", "convolved", "latest"]

# tokens up to which sums of products are cheaper than transforms
FEW = 8
# numbers that stay in the cache from one tap to the next
CACHED = 1 << 18


def convolved(
    x: Float[Tensor, "batch time channels"],
    kernel: Float[Tensor, "kernels taps"],
    past: Float[Tensor, "batch before channels"] | None = None,
) -> Float[Tensor, "batch time channels"]:
    """The convolution of each channel with its kernel, in the dtype of x, in float32 or finer inside.

    Each kernel serves equally many channels that stand beside each other.

    Args:
        x: The inputs, 0 at padding: NaN anywhere would be everywhere.
        kernel: From the present token's tap to that of the most distant one, of any length.
        past: Inputs of earlier calls, as many as the kernel reaches or all there were; None: there were none.
    """
    dtype, length = exact(x), x.shape[1]
    joined = x if past is None else torch.cat([past.to(x.dtype), x], 1)
    joined, kernel = joined.to(dtype), kernel[:, : joined.shape[1]].to(dtype)
    kernels, taps = kernel.shape
    joined = joined[:, -min(joined.shape[1], length + taps - 1) :]
    before = joined.shape[1] - length
    if length <= FEW:
        flipped, rows = kernel.flip(1).repeat_interleave(x.shape[2] // kernels, 0).T, []
        for t in range(before + 1, before + length + 1):
            reach = min(taps, t)
            rows.append((joined[:, t - reach : t] * flipped[taps - reach :]).sum(1))
        return torch.stack(rows, 1).to(x.dtype) if rows else x
    # what wraps around falls on the inputs of earlier calls
    points = next_fast_len(length + taps - 1, real=True)
    met = torch.fft.rfft(joined.transpose(1, 2), points).unflatten(1, (kernels, -1))
    met = (met * torch.fft.rfft(kernel, points)[:, None]).flatten(1, 2)
    out = torch.fft.irfft(met, points)[..., before : before + length]
    return out.transpose(1, 2).to(x.dtype)


def latest(
    x: Float[Tensor, "batch time channels"],
    real: Bool[Tensor, "batch time"],
    past: Float[Tensor, "batch before channels"] | None,
    count: int,
) -> Float[Tensor, "batch count channels"]:
    """The last inputs that are real, a copy, with zeros in front where there are fewer."""
    batch, _, channels = x.shape
    before = x.new_zeros(batch, count, channels) if past is None else past.to(x.dtype)
    if bool(real.all()):
        joined = torch.cat([before, x[:, max(0, x.shape[1] - count) :]], 1)
        more = max(0, count - joined.shape[1])
        return nn.functional.pad(joined[:, joined.shape[1] - count + more :], (0, 0, more, 0)).clone()
    joined = torch.cat([before, x], 1)
    real = torch.cat([real.new_ones(batch, before.shape[1]), real], 1)
    places = torch.where(real, torch.arange(joined.shape[1], device=x.device), -1)
    index = places.topk(count, 1).values.flip(1)[..., None]
    return torch.where(index < 0, 0.0, joined.take_along_dim(index.clamp_min(0), 1))


class ShortConvolution(nn.Module):
    """A convolution of few taps, as `torch.nn.Conv1d` with one group per channel, but causal and with a state.

    Args:
        channels: Channels.
        width: Taps of each kernel, the present token's last.
        bias: Whether a learned number is added to each channel.
    """

    def __init__(self, channels: int, width: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width).uniform_(-(width**-0.5), width**-0.5))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-(width**-0.5), width**-0.5)) if bias else None

    def forward(
        self,
        x: Float[Tensor, "batch time channels"],
        real: Bool[Tensor, "batch time"],
        past: Float[Tensor, "batch before channels"] | None = None,
        opens: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch before channels"]]:
        """The outputs, in float32 or finer, and the last inputs for the next call.

        Args:
            x: The inputs, 0 at padding.
            real: Which tokens are no padding.
            past: The last inputs of the call before; None: there was none.
            opens: Which tokens open a text of their own, where several are packed.
        """
        dtype, reach = exact(x), self.weight.shape[1] - 1
        joined = torch.cat([x.new_zeros(x.shape[0], reach, x.shape[2]) if past is None else past.to(x.dtype), x], 1)
        weight, joined = self.weight.to(dtype), joined.to(dtype)
        text = None if opens is None else nn.functional.pad(opens.cumsum(1), (reach, 0))
        out = Shifted.apply(joined, weight, text)
        if self.bias is not None:
            out.add_(self.bias)
        if text is not None:
            # of the last text alone
            real = real & (text[:, reach:] == text[:, -1:])
            past = None if past is None else past.masked_fill((text[:, :1] != text[:, -1:])[..., None], 0.0)
        return out, latest(x, real, past, reach)


class Shifted(torch.autograd.Function):
    """Sums of taps times shifted inputs, none of another text than the token's own.

    The way back adds up in place, for so many tokens at a time as stay in the cache; autograd would make several
    tensors of the whole text for each tap.
    """

    @staticmethod
    def forward(ctx: Any, joined: Tensor, weight: Tensor, text: Tensor | None) -> Tensor:
        ctx.save_for_backward(joined, weight, text)
        reach = weight.shape[1] - 1
        length = joined.shape[1] - reach
        out = joined[:, reach:] * weight[:, -1]
        for tap in reversed(range(reach)):
            seen = joined[:, tap : tap + length]
            if text is not None:
                seen = seen.masked_fill((text[:, tap : tap + length] != text[:, reach:])[..., None], 0.0)
            out.addcmul_(seen, weight[:, tap])
        return out

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor, None]:
        joined, weight, text = ctx.saved_tensors
        d_joined, d_weight, taps = torch.zeros_like(joined), torch.zeros_like(weight), weight.shape[1]
        begin = 0
        for part in d.split(max(1, CACHED // (d.shape[0] * d.shape[2])), 1):
            end = begin + part.shape[1]
            own = None if text is None else text[:, begin + taps - 1 : end + taps - 1]
            for tap in range(taps):
                at, got = slice(begin + tap, end + tap), part
                if own is not None:
                    got = part.masked_fill((text[:, at] != own)[..., None], 0.0)
                d_joined[:, at].addcmul_(got, weight[:, tap])
                d_weight[:, tap] += (got * joined[:, at]).sum((0, 1))
            begin = end
        return d_joined, d_weight, None
