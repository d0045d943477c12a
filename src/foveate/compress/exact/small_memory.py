r"""Small memory: squares of scores instead of blocks of rows, where the fast memory holds fewer than d^2 numbers.

    t = \sqrt{M},    s = scale q k^T for t rows and t keys,    m' = max(m, max s),
    l' = e^{m - m'} l + \sum e^{s - m'},    o' = e^{m - m'} o + e^{s - m'} v

A square of t^2 scores stays while queries and keys pass by column by column, and then outputs and values do. Each of
the (N / t)^2 squares moves 5 t d numbers: 5 N^2 d / \sqrt{M}. Blocks of whole rows move 4 N^2 d^2 / M, which is more
where \sqrt{M} is small beside d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from foveate.core import tiled, traffic
from foveate.core.card import Card, Needs
from foveate.core.errors import NotSupported
from foveate.core.mechanism import Schedule
from foveate.core.params import bounded
from foveate.core.rows import View
from foveate.core.traffic import Shape, Traffic, side_that_fits

__all__ = ["SmallMemory"]


@dataclass(frozen=True)
class SmallMemory(Schedule):
    """Computes attention in squares of scores, for a fast memory of fewer numbers than a head's width squared.

    `traffic` answers for squares of the memory that it is asked about; `run` takes those of `fast`.

    Args:
        fast: Numbers that the fast memory holds; squares have a side of about its root.

    Example:
        A model computes what it always did, in squares of 10 x 10 scores. For a head of width 64 and a fast memory of
        1,024 numbers they move less than blocks of whole rows.

        >>> import foveate
        >>> import torch
        >>> from foveate.compress import SmallMemory
        >>> from foveate.core.traffic import Shape, tiled
        >>> from foveate.testing import handmade
        >>> model, text = handmade.model(), handmade.ids("abcabcab")
        >>> plain = model(text).logits
        >>> with foveate.attach(model, SmallMemory(fast=150)):
        ...     torch.allclose(model(text).logits, plain, atol=1e-4)
        True
        >>> shape, fast = Shape(queries=8192, keys=8192, dim=64), 1024
        >>> ours, rows = SmallMemory().traffic(shape, fast), tiled(shape, fast)
        >>> round(ours.total / rows.total, 2)
        0.6
    """

    fast: int = bounded(4096, 6, 1 << 30)

    card: ClassVar = Card(
        title="The I/O Complexity of Attention, or How Optimal is Flash Attention?",
        year=2024,
        family="exact",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES,
        equation="t = sqrt(M); squares of t x t scores, with a running softmax; 5 N^2 d / sqrt(M) numbers move",
        differs="the paper states N^2 d / sqrt(M) for its order without a constant; the constant 5 is of this order. "
        "Scores are not written out: a running softmax weighs partial outputs, which come and go square by square. "
        "In `run` a square is one matrix product; queries and keys pass by column by column only in `counted`, which "
        "proves the account. The backward pass makes the squares again",
        use="to see what exact attention costs where fast memory is very small beside the head's width: registers, "
        "embedded processors, wide heads",
        misleads="it moves few numbers and is slow all the same: small squares in Python; on a processor whose cache "
        "holds d^2 numbers, blocks of rows move less",
        claims=("io_bound",),
    )
    test_params: ClassVar = ({"fast": 150}, {})

    def refuses(self, view: View) -> str:
        return tiled.refuses(view)

    def run(
        self, view: View
    ) -> tuple[Float[Tensor, "batch heads query value_dim"], Float[Tensor, "batch heads query"]]:
        if reason := self.refuses(view):
            raise NotSupported(f"small_memory: {reason}")
        side = side_that_fits(self.fast)
        # without it, autograd would keep all squares
        strips = [
            checkpoint(strip, view, slice(first, min(first + side, view.queries)), side, use_reentrant=False)
            for first in range(0, view.queries, side)
        ]
        out, lse = (torch.cat(parts, 2) for parts in zip(*strips, strict=True))
        return out.to(view.q.dtype), lse

    def traffic(self, shape: Shape, fast: int) -> Traffic:
        return traffic.small_memory(shape, fast)


def strip(
    view: View, rows: slice, side: int
) -> tuple[Float[Tensor, "batch heads rows value_dim"], Float[Tensor, "batch heads rows"]]:
    """Outputs and log-sum-exps of some rows, square by square."""
    kind = tiled.working(view.q)
    low, high = (t[:, rows, None] for t in (view.mask.low, view.mask.high))
    blind = (high <= low)[:, None, None]
    # [batch, kv head, head of its group, row, dim]
    q = view.q[:, :, rows].unflatten(1, (view.kv_heads, -1)).to(kind).masked_fill(blind, 0.0)
    peak, mass = q.new_full(q[..., :1].shape, torch.finfo(kind).min), torch.zeros_like(q[..., :1])
    if view.sinks is not None:
        # a learned sink is a key without a value, seen before all others
        sink = view.sinks.to(kind).view(view.kv_heads, -1, 1, 1)
        peak, mass = sink.detach() + torch.zeros_like(mass), mass + torch.exp(sink - sink.detach())
    out = q.new_zeros(*q.shape[:4], view.v.shape[3])
    for first in range(0, view.keys, side):
        at = torch.arange(first, min(first + side, view.keys), device=q.device)
        allowed = (at >= low) & (at < high)
        if not allowed.any():
            continue
        # what none of these rows may see is zero, whatever stands there
        unseen = ~allowed.any(1)[:, None, None, :, None]
        k, v = (x[:, :, None, at].to(kind).masked_fill(unseen, 0.0) for x in (view.k, view.v))
        s = q @ k.transpose(-1, -2) * view.scale
        s = s if view.softcap is None else view.softcap * torch.tanh(s / view.softcap)
        s = s.masked_fill(~allowed[:, None, None], -torch.inf)
        higher = torch.maximum(peak, s.detach().amax(-1, keepdim=True))
        fade, e = torch.exp(peak - higher), torch.exp(s - higher)
        peak, mass, out = higher, fade * mass + e.sum(-1, keepdim=True), fade * out + e @ v
    whole = torch.where(mass > 0, mass, 1.0)
    lse = (peak + torch.log(whole)).masked_fill(blind | (mass <= 0), -torch.inf)
    return (out / whole).flatten(1, 2), lse[..., 0].flatten(1, 2)
