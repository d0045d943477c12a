r"""Recurrences of single numbers, h_t = a_t h_{t-1} + x_t, all channels at once.

A text is cut into parts that are stepped through side by side, then the state goes from part to part: as many steps as
twice the root of the length. Backward is the same scan from the last token to the first, with g_t the gradient of h_t:

    g_t = d_t + a_{t+1} g_{t+1},    d a_t = g_t h_{t-1},    d x_t = g_t

The selective scan, whose factors and states are many times its inputs, is a kernel on the CPU, and elsewhere this scan
for one stretch of the text after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from foveate.core import native

__all__ = ["by_stretches", "scan", "selective"]

# numbers per token above which a step is long enough to go through the text in one part
WIDE = 1 << 12
# numbers of a stretch's largest tensor
STRETCH_NUMBERS = 1 << 20


def scan(
    a: Float[Tensor, "batch time *channels"],
    x: Float[Tensor, "batch time *channels"],
    first: Float[Tensor, " batch *channels"],
    parts: int = 0,
) -> Float[Tensor, "batch time *channels"]:
    """The state behind every token, h; the last one is the state behind the text. All of one dtype.

    Args:
        a: Factors, of any size and sign.
        x: What is added.
        first: h before the first token.
        parts: Parts that are stepped through side by side; 0 chooses.
    """
    if x.shape[1] == 0:
        return x
    return Scanned.apply(a, x, first, parts)


class Scanned(torch.autograd.Function):
    """The scan, with the gradients written out."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, x: Tensor, first: Tensor, parts: int) -> Tensor:
        h = stepped(a, x, first, parts)
        ctx.parts = parts
        ctx.save_for_backward(a, first, h)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        a, first, h = ctx.saved_tensors
        # a_{t+1} stands beside g_t
        ahead = torch.cat([torch.ones_like(a[:, :1]), a[:, 1:].flip(1)], 1)
        g = stepped(ahead, d.flip(1), torch.zeros_like(first), ctx.parts).flip(1)
        d_a = g * torch.cat([first[:, None], h[:, :-1]], 1)
        return d_a, g, a[:, 0] * g[:, 0], None


def stepped(a: Tensor, x: Tensor, first: Tensor, parts: int = 0) -> Tensor:
    """The scan without gradients."""
    length = x.shape[1]
    parts = min(parts or parts_for(length, first.numel()), length)
    if parts == 1:
        h = torch.empty_like(x)
        for t in range(length):
            first = torch.addcmul(x[:, t], a[:, t], first, out=h[:, t])
        return h
    size = -(-length // parts)
    more = -length % size
    h, grown = (padded(t, more, fill).unflatten(1, (-1, size)) for t, fill in ((x, 0.0), (a, 1.0)))
    factor = grown
    h, grown = h.clone(), grown.clone()
    for t in range(1, size):
        h[:, :, t].addcmul_(factor[:, :, t], h[:, :, t - 1])
        grown[:, :, t].mul_(grown[:, :, t - 1])
    for n in range(h.shape[1]):
        h[:, n].addcmul_(grown[:, n], first[:, None])
        first = h[:, n, -1]
    return h.flatten(1, 2)[:, :length]


def parts_for(length: int, numbers: int) -> int:
    """Parts of a text with so many numbers per token."""
    return 1 if numbers >= WIDE else math.isqrt(length)


def padded(x: Tensor, more: int, fill: float) -> Tensor:
    """With more tokens behind."""
    return torch.cat([x, x.new_full((x.shape[0], more, *x.shape[2:]), fill)], 1) if more else x


def by_stretches(
    step: Callable[..., tuple[Tensor, Tensor]], tokens: tuple[Tensor, ...], state: Tensor, size: int = 0
) -> tuple[Tensor, Tensor]:
    """A recurrence whose tensors are much larger than its inputs, one stretch of the text at a time.

    Only the inputs and the states between stretches are kept for backward; the rest is computed again there.

    Args:
        step: Called with the tokens of a stretch and the state before it, gives outputs and the state behind it.
        tokens: What it reads, [batch, time, …] each.
        state: The state before the first token.
        size: Tokens per stretch; 0: as many as have a million numbers of state.
    """
    length = tokens[0].shape[1]
    size = size or max(1, STRETCH_NUMBERS // max(1, state.numel()))
    outs = []
    for begin in range(0, length, size):
        part = [t[:, begin : begin + size] for t in tokens]
        if torch.is_grad_enabled():
            out, state = checkpoint(step, *part, state, use_reentrant=False, preserve_rng_state=False)
        else:
            out, state = step(*part, state)
        outs.append(out)
    return torch.cat(outs, 1), state


# ---------------------------------------------------------------- the selective scan


def selective(
    dt: Float[Tensor, "batch time inner"],
    x: Float[Tensor, "batch time inner"],
    rate: Float[Tensor, "inner states"],
    b: Float[Tensor, "batch time states"],
    c: Float[Tensor, "batch time states"],
    first: Float[Tensor, "batch inner states"],
) -> tuple[Float[Tensor, "batch time inner"], Float[Tensor, "batch inner states"]]:
    """y_t = c_t . h_t of the states h_t = exp(dt_t rate) h_{t-1} + dt_t x_t b_t, and the last of them.

    All of one dtype. Differentiable, twice not. float32 on the CPU is the kernel's, where it was built.

    Args:
        dt: Steps, not negative; one of 0 leaves the states as they are.
        x: What is taken in.
        rate: Rates of forgetting per channel and state, not positive.
        b: How it is taken in, the same for all channels.
        c: How the states are read, the same for all channels.
        first: h before the first token.
    """
    inputs = (dt, x, rate, b, c, first)
    if not by_kernel(*inputs):
        return by_stretches(partial(stretched, rate), (dt, dt * x, b, c), first)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return Selected.apply(*inputs)
    y, last, _ = native.selective(*inputs)
    return y, last


def by_kernel(*inputs: Tensor) -> bool:
    """Whether the CPU kernel can do it."""
    return native.available() and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in inputs)


class Selected(torch.autograd.Function):
    """The selective scan by the kernel, which keeps the states of every so many tokens for the way back."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        y, last, marks = native.selective(*inputs, keep=True)
        ctx.save_for_backward(*inputs, marks)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor, ...]:
        *inputs, marks = ctx.saved_tensors
        return native.derive_selective(tuple(inputs), marks, dy, dlast)


def stretched(
    rate: Float[Tensor, "inner states"],
    dt: Float[Tensor, "batch time inner"],
    taken: Float[Tensor, "batch time inner"],
    b: Float[Tensor, "batch time states"],
    c: Float[Tensor, "batch time states"],
    first: Float[Tensor, "batch inner states"],
) -> tuple[Float[Tensor, "batch time inner"], Float[Tensor, "batch inner states"]]:
    """The selective scan of one stretch, with inputs times their steps."""
    h = scan((dt[..., None] * rate).exp(), taken[..., None] * b[:, :, None], first)
    return (h @ c[..., None])[..., 0], h[:, -1].clone()
