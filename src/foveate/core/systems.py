r"""Attention as a linear dynamical system, and when two of them are the same.

    S_t = A_t S_{t-1} + B_t v_t^T,    o_t = S_t^T C_t + D_t v_t

A scan of the states engine is one with A_t = diag(a_t) (1 - b_t k_t k_t^T for delta writes), B_t = k_t (b_t k_t),
C_t = q_t, divided by the sum of the weights where they are normalised, and D_t = 0. Softmax attention is one whose
state has no end: exp(q . k) = \sum_n (q . k)^n / n!, so that A_t = 1 and B and C are all monomials of k and of q; cut
off after some power, it can be looked at beside the others (the dynamical systems framework, Sieber et al. 2024).

Coordinates of the state mean nothing: any invertible matrix changes A, B and C and no output. What is compared and
measured here is what does not depend on them, the influence of each token on each output,
W_ts = C_t^T A_t … A_{s+1} B_s, and the ranks of its parts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import BadInput, TooBig
from foveate.core.rows import View
from foveate.core.states import Scan, prepared, run

__all__ = ["Coincidence", "Memory", "System", "coincide", "memory", "softmax_system", "system"]

LARGEST = 1 << 28


@dataclass(frozen=True, eq=False)
class System:
    """A linear dynamical system per batch entry and head.

    Args:
        a: A_t; of a diagonal matrix only the diagonal.
        b: B_t.
        c: C_t.
        d: D_t.
    """

    a: Float[Tensor, "batch heads time state"] | Float[Tensor, "batch heads time state state"]
    b: Float[Tensor, "batch heads time state"]
    c: Float[Tensor, "batch heads time state"]
    d: Float[Tensor, "batch heads time"]

    def run(self, v: Float[Tensor, "batch heads time value"]) -> Float[Tensor, "batch heads time value"]:
        """The outputs for these inputs, token by token."""
        state, outs = v.new_zeros(*self.b.shape[:2], self.b.shape[3], v.shape[3]), []
        for t in range(v.shape[2]):
            a = self.a[:, :, t]
            state = a[..., None] * state if a.ndim == 3 else a @ state
            state = state + self.b[:, :, t, :, None] * v[:, :, t, None]
            out = (self.c[:, :, t, None] @ state)[:, :, 0]
            outs.append(out + self.d[:, :, t, None] * v[:, :, t])
        return torch.stack(outs, 2)

    def influence(self) -> Float[Tensor, "batch heads time time"]:
        """W_ts: what the output at t takes of the input at s."""
        batch, heads, time, _ = self.b.shape
        eye = torch.eye(time, dtype=self.b.dtype, device=self.b.device)
        return self.run(eye.expand(batch, heads, time, time))


def system(scan: Scan) -> System:
    """A causal scan as a dynamical system, one per query head.

    Raises:
        BadInput: a scan in which tokens see later ones; no system whose state runs forward does that.
    """
    if not scan.causal or scan.prefix is not None:
        raise BadInput("a scan whose tokens see later ones is no system in time; take the causal form")
    total = None
    if scan.normalised:
        # the sum of the weights is what values of 1 give
        ones = torch.ones_like(scan.v[..., :1])
        total, _ = run(replace(scan, v=ones, normalised=False))
    ready, _ = prepared(scan, scan.empty())
    groups = ready.q.shape[1] // ready.k.shape[1]
    k = ready.k.repeat_interleave(groups, 1)
    a = torch.ones_like(k)
    if ready.decay is not None:
        a = ready.decay.exp().repeat_interleave(groups, 1).expand_as(k).clone()
    b, c = k, ready.q
    if ready.beta is not None:
        b = ready.beta.repeat_interleave(groups, 1)[..., None] * k
        eye = torch.eye(k.shape[3], dtype=k.dtype, device=k.device)
        a = (eye - b[..., None] * k[..., None, :]) * a[..., None, :]
    if total is not None:
        c = torch.where(total == 0, 0.0, c / torch.where(total == 0, 1.0, total))
    return System(a, b, c, torch.zeros_like(b[..., 0]))


def softmax_system(view: View, order: int) -> System:
    """Causal softmax attention of whole texts, with exp(q . k) cut off after a power.

    Args:
        view: The attention call; its mask says nothing but causal order.
        order: The highest power, 1 or more. The state has 1 + d + … + d^order numbers per value.

    Raises:
        TooBig: the state would have too many numbers.
        BadInput: a mask of another kind.
    """
    if view.mask.plain != "causal":
        raise BadInput("give a call in causal order without padding or windows")
    q, k = view.q * math.sqrt(view.scale), view.k.repeat_interleave(view.grouped, 1) * math.sqrt(view.scale)
    width = sum(q.shape[3] ** n for n in range(order + 1))
    if width * q[..., 0].numel() > LARGEST:
        raise TooBig(f"a state of {width:,} numbers per head; take a lower order than {order}, or narrower heads")
    b, c = monomials(k, order), monomials(q, order)
    total = (c * b.cumsum(2)).sum(-1, keepdim=True)
    return System(torch.ones_like(b), b, c / total, torch.zeros_like(b[..., 0]))


def monomials(x: Float[Tensor, "*axes dim"], order: int) -> Float[Tensor, "*axes state"]:
    """All products of up to `order` components, so that those of q times those of k are the cut-off exp(q . k)."""
    parts, power = [torch.ones_like(x[..., :1])], torch.ones_like(x[..., :1])
    for n in range(1, order + 1):
        power = (power[..., :, None] * x[..., None, :]).flatten(-2)
        parts.append(power / math.sqrt(math.factorial(n)))
    return torch.cat(parts, -1)


@dataclass(frozen=True, eq=False)
class Memory:
    """How much of the past each head's outputs hold.

    Args:
        reach: Mean distance, in tokens, from an output to its inputs, each by its absolute influence; averaged over
            the outputs.
        rank: How many numbers about the first half of the text reach the second one: the exponential of the entropy of
            the singular values of the influence from the one on the other; 0 where nothing does.
    """

    reach: Float[Tensor, "batch heads"]
    rank: Float[Tensor, "batch heads"]


def memory(influence: Float[Tensor, "batch heads time time"]) -> Memory:
    """The effective memory behind an influence of inputs on outputs."""
    size, at = influence.abs(), torch.arange(influence.shape[-1], device=influence.device)
    apart = (at[:, None] - at).abs()
    total = size.sum(-1)
    reach = torch.where(total > 0, (size * apart).sum(-1) / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0)
    half = len(at) // 2
    found = torch.linalg.svdvals(influence[..., half:, :half])
    sums = found.sum(-1, keepdim=True)
    share = found / sums.clamp_min(torch.finfo(found.dtype).tiny)
    entropy = -torch.special.xlogy(share, share).sum(-1)
    return Memory(reach.mean(-1), torch.where(sums[..., 0] > 0, entropy.exp(), 0.0))


@dataclass(frozen=True, eq=False)
class Coincidence:
    """Whether two systems give the same outputs, and under which condition.

    Args:
        condition: "none needed", "reads scaled", "writes scaled", "reads and writes scaled", or "" if they differ under
            each of these.
        apart: Largest difference of their influence under it, relative to the largest influence.
        reads: Factors per token on what the second one reads, under which it is the first.
        writes: The same on what it writes.
    """

    condition: str
    apart: float
    reads: Float[Tensor, "batch heads time"]
    writes: Float[Tensor, "batch heads time"]

    def __bool__(self) -> bool:
        return bool(self.condition)


def coincide(
    one: Float[Tensor, "batch heads time time"], other: Float[Tensor, "batch heads time time"], tolerance: float = 1e-6
) -> Coincidence:
    r"""Whether one influence is the other, as it stands or up to factors per token.

    W_ts = r_t W'_ts w_s. With w = 1 they differ by a normaliser or an output gate; with r = 1 by an input gate; with
    both by a decay of one number per head, too, for exp(G_t - G_s) = r_t w_s: decay, gates and normaliser of one head
    are one condition. A decay per channel, a delta write or another feature map is none of these.
    """
    if one.shape != other.shape:
        raise BadInput(f"influences of {tuple(one.shape)} and {tuple(other.shape)} are not of the same texts")
    batch, heads, time, _ = one.shape
    ones = torch.ones(batch, heads, time, dtype=one.dtype, device=one.device)
    size = float(one.abs().max().clamp_min(torch.finfo(one.dtype).tiny))

    def far(reads: Tensor, writes: Tensor) -> float:
        return float((one - reads[..., None] * other * writes[..., None, :]).abs().max()) / size

    def fitted(axis: int) -> Tensor:
        """Least squares of one factor per row or column."""
        top, bottom = (one * other).sum(axis), (other * other).sum(axis)
        return torch.where(bottom > 0, top / bottom.clamp_min(torch.finfo(one.dtype).tiny), 1.0)

    found = [("none needed", ones, ones), ("reads scaled", fitted(-1), ones), ("writes scaled", ones, fitted(-2))]
    found.append(("reads and writes scaled", *both(one, other, ones)))
    tried = [(far(reads, writes), name, reads, writes) for name, reads, writes in found]
    for apart, name, reads, writes in tried:
        if apart <= tolerance:
            return Coincidence(name, apart, reads, writes)
    apart, _, reads, writes = min(tried, key=lambda t: t[0])
    return Coincidence("", apart, reads, writes)


def both(one: Tensor, other: Tensor, ones: Tensor) -> tuple[Tensor, Tensor]:
    """R and w with one_ts = r_t other_ts w_s, read off the ratios of neighbours, which a product of both must have."""
    ratio = torch.where(other != 0, one / torch.where(other == 0, 1.0, other), 0.0)
    now = ratio.diagonal(0, -2, -1)
    below = ratio.diagonal(-1, -2, -1)
    # r_{t+1} / r_t = ratio_{t+1,t} / ratio_{t,t}
    steps = torch.where((now[..., :-1] != 0) & (below != 0), below / torch.where(now == 0, 1.0, now)[..., :-1], 1.0)
    reads = torch.cat([ones[..., :1], steps.cumprod(-1)], -1)
    return reads, torch.where(now != 0, now / reads, 1.0)
