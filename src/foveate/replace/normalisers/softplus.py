r"""Softplus attention: scores that know the length, weights without an exponential, and then a sharper look.

    s_ij = ln d ln n_i (q_i . k_j) / (|q_i| |k_j|)
    a_ij = softplus(s_ij) / \sum_k softplus(s_ik)
    p_ij = max(0, n_i a_ij - o_i)^power / \sum_k max(0, n_i a_ik - o_i)^power

d is the width of a head and n_i the number of keys that row i may see. Scores in proportion to ln n_i keep the entropy
of a row at any length. The last line is the re-weighting, in training or only after it: what is not above 1 / n_i, the
weight of each key if all were alike, is cut off, and the rest raised to a power; `power=1, offset=0` leaves it out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core import native, tiled
from foveate.core.card import Card, Needs
from foveate.core.params import bounded
from foveate.core.rows import RowBlock, View
from foveate.core.rule import Rule
from foveate.replace.normalisers._counts import keys_seen

__all__ = ["Softplus"]

# rows of so few keys have no offset
FEW = 3
# rows this near to uniform have nothing to sharpen but rounding errors
UNIFORM = 1e-3
# e^s is finite up to here in single precision
LARGE = 80.0


@dataclass(frozen=True)
class Softplus(Rule):
    """Softplus of length-scaled cosines in the place of softmax, re-weighted.

    Args:
        power: Of the re-weighting. The paper has 3 for the length of the training texts, 15 for much longer ones.
        offset: o, in shares of what each key would get if all were alike; rows of up to three keys have none.

    Example:
        The re-weighting has no parameters: it can be put on a model that was trained without.

        >>> import foveate
        >>> from foveate.replace import Softplus
        >>> from foveate.testing import tiny
        >>> model, plain = tiny.model("llama"), Softplus(power=1.0, offset=0.0)
        >>> model = foveate.convert(model, plain)  # and train it
        >>> model = foveate.convert(model, Softplus(power=15.0))
        >>> model.model.layers[0].self_attn.rule
        Standing(Softplus(power=15.0, offset=1.0))
    """

    power: float = bounded(15.0, 1.0, 64.0, grid=(1.0, 3.0, 15.0))
    offset: float = bounded(1.0, 0.0, 1.0, grid=(0.0, 1.0))

    card: ClassVar = Card(
        title="Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models",
        year=2025,
        family="normalisers",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES,
        equation="a_ij = softplus(ln d ln n_i cos(q_i, k_j)) / sum_k (same), "
        "p_ij = max(0, n_i a_ij - o)^power / sum_k (same)",
        differs="a row in which nothing is over the offset by a thousandth of 1 / n keeps its weights from before the "
        "re-weighting, which would sharpen its rounding errors. The model's scale, soft cap and learned sinks have no "
        "part in it: cosines are bounded, and rows sum to 1. In half precision it is worked out in single",
        use="to train a model on short texts that is to read long ones",
        misleads="a loaded model is not as it was: its queries lose their size, which said how sharply they choose",
        claims=("softplus_lengths",),
    )
    test_params: ClassVar = (
        {},
        {"power": 3.0},
        {"power": 1.0, "offset": 0.0},
        {"power": 1.5, "offset": 0.5},
    )

    def prepare(self, view: View) -> View:
        # in half precision a power of 15 would be one of rounding errors
        q = torch.nn.functional.normalize(view.q.to(torch.promote_types(view.q.dtype, torch.float32)), dim=-1)
        n = keys_seen(view.mask).clamp_min(1).to(q.dtype)
        scale = math.log(view.q.shape[3]) * n.log()
        return view.but(q=q * scale[..., None], scale=1.0, softcap=None, sinks=None)

    def score(self, block: RowBlock) -> Float[Tensor, "batch heads rows keys"]:
        s = Rule.score(self, block)
        view = block.view
        size = torch.linalg.vector_norm(view.k[:, :, block.first : block.last], dim=-1, dtype=s.dtype)
        size = size.clamp_min(1e-12).repeat_interleave(view.grouped, 1)[:, :, None]
        return s / size if s.requires_grad else s.div_(size)

    def normalise(
        self, block: RowBlock, scores: Float[Tensor, "batch heads rows keys"]
    ) -> Float[Tensor, "batch heads rows keys"]:
        n = keys_seen(block.view.mask, block.index)[..., None].to(scores.dtype)
        return Weights.apply(scores, n, self) if scores.numel() else scores

    @property
    def plainly(self) -> bool:
        """Whether weights stay as softplus has made them."""
        return self.power == 1 and self.offset == 0

    def shortcut(self, view: View) -> Float[Tensor, "batch heads query value_dim"] | None:
        # one row alone is faster as a row
        if tiled.refuses(view) or (not self.plainly and (self.power % 1 or view.queries == 1)):
            return None
        k = torch.nn.functional.normalize(view.k.to(view.q.dtype), dim=-1)
        view = view.but(k=k, v=view.v.to(k.dtype))
        if self.plainly:
            out, total = tiled.attend(view, activation="softplus")
            return out / total.where(total > 0, 1.0)[..., None]
        if not tiled.by_kernel(view.q, view.v):
            return None
        rows = Reweighting.of(view, self)
        return None if rows is None else Reweighted.apply(view.q, view.k, view.v, rows)

    def finish(
        self, view: View, out: Float[Tensor, "batch heads query value_dim"]
    ) -> Float[Tensor, "batch heads query value_dim"]:
        return out.to(view.v.dtype)


@dataclass(frozen=True, eq=False)
class Reweighting:
    """What the re-weighting of a call is, row by row: u_j = (softplus(s_j) - cut) / top where that is over zero.

    Args:
        low: First key of each row.
        high: One past the last.
        cut: o / n of the sum of softplus(s), [batch, heads, query].
        over: One by how far the largest is above the cut, so that no power overflows.
        share: The derivative of the cut by that sum.
        power: Of u.
    """

    low: Int[Tensor, "#batch query"]
    high: Int[Tensor, "#batch query"]
    cut: Float[Tensor, "batch heads query"]
    over: Float[Tensor, "batch heads query"]
    share: Float[Tensor, "batch heads query"]
    power: int

    @classmethod
    def of(cls, view: View, rule: Softplus) -> Reweighting | None:
        """From a first pass over the keys; None if a row is too near to uniform to be sharpened."""
        low, high = view.mask.low.contiguous(), view.mask.high.contiguous()
        asked: Any = {"activation": "softplus", "want_out": False, "want_top": True}
        first = native.attend(view.q, view.k, view.v, scale=1.0, lo=low, hi=high, **asked)
        n = keys_seen(view.mask).clamp_min(1).to(first.lse)
        share = torch.where(n <= FEW, 0.0, rule.offset / n).expand_as(first.lse)
        cut = first.lse * share
        top = torch.nn.functional.softplus(first.top) - cut
        seen = first.lse > 0
        if bool((seen & (top * n <= UNIFORM * first.lse)).any()):
            return None
        return cls(low, high, cut, top.where(seen, 1.0).reciprocal(), share, int(rule.power))

    def sums(self, q: Tensor, k: Tensor, v: Tensor, power: int) -> tuple[Tensor, Tensor]:
        """Of u^power v and u^power over each row."""
        which: Any = {"activation": "soft_excess", "shift": self.over, "cut": self.cut, "power": power}
        found = native.attend(q, k, v, scale=1.0, lo=self.low, hi=self.high, **which)
        return found.out, found.lse


class Reweighted(torch.autograd.Function):
    r"""Re-weighted means of values in two passes over the keys, and their derivative in two more.

        out = \sum u^power v / \sum u^power
        d_j = power (u_j^{power - 1} / top) (g . v_j - g . out) / \sum u^power
        ds_j = sigmoid(s_j) (d_j - o / n \sum_k d_k)

    top cancels in the means and is constant in the derivative.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: Reweighting) -> Tensor:
        out, mass = rows.sums(q, k, v, rows.power)
        out = out / mass.where(mass > 0, 1.0)[..., None]
        ctx.save_for_backward(q, k, v, out, mass)
        ctx.rows = rows
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, mass = ctx.saved_tensors
        rows: Reweighting = ctx.rows
        shared = (g * out).sum(-1)
        mixed, below = rows.sums(q, k, v, rows.power - 1)
        whole = ((g * mixed).sum(-1) - shared * below) * rows.power * rows.over / mass.where(mass > 0, 1.0)
        common = -whole * rows.share
        more = {"activation": "soft_excess", "shift": rows.over, "cut": rows.cut, "common": common}
        found = native.derive(q, k, v, g, mass, shared, scale=1.0, lo=rows.low, hi=rows.high, power=rows.power, **more)
        return *found, None


class Weights(torch.autograd.Function):
    r"""Weights of scores, with their derivative in as few passes over a block as it takes.

    With u_j = max(0, n a_j - o) and the derivative g_j of p_j:

        da_j = n power (p_j / u_j) (g_j - \sum_k g_k p_k)
        ds_j = sigmoid(s_j) (da_j - \sum_k da_k a_k) / \sum_k softplus(s_k)
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, n: Tensor, rule: Softplus) -> Tensor:
        a = softplus(s)
        total = a.sum(-1, keepdim=True)
        a.div_(total.masked_fill_(total == 0, 1.0))
        ctx.rule = rule
        if rule.plainly:
            ctx.save_for_backward(a, total)
            return a
        o = torch.where(n <= FEW, 0.0, rule.offset)
        # u in shares of the largest, whose power cannot overflow; what all of a row have in common cancels
        top = n * a.amax(-1, keepdim=True) - o
        sharp = top > UNIFORM
        top.masked_fill_(~sharp, 1.0)
        u = (a * (n / top)).sub_(o / top).relu_()
        p = raised(u, rule.power)
        p.div_(p.sum(-1, keepdim=True).masked_fill_(~sharp, 1.0))
        if not bool(sharp.all()):
            p = torch.where(sharp, p, a)
        ctx.save_for_backward(a, total, u, p, n / top, sharp)
        return p

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        a, total, *rest = ctx.saved_tensors
        da = g
        if rest:
            u, p, slope, sharp = rest
            da = (g - (g * p).sum(-1, keepdim=True)).mul_(p).div_(u.clamp_min(torch.finfo(u.dtype).tiny))
            da.mul_(ctx.rule.power * slope)
            if not bool(sharp.all()):
                da = torch.where(sharp, da, g)
        ds = (da - (da * a).sum(-1, keepdim=True)).div_(total)
        # sigmoid(s) = 1 - e^-softplus(s)
        return ds.mul_((a * -total).expm1_().neg_()), None, None


def softplus(s: Float[Tensor, "batch heads rows keys"]) -> Float[Tensor, "batch heads rows keys"]:
    """ln(1 + e^s), in a quarter of the time that the framework's own takes where e^s cannot overflow."""
    return torch.nn.functional.softplus(s) if s.amax() > LARGE else torch.exp(s).log1p_()


def raised(x: Float[Tensor, "batch heads rows keys"], power: float) -> Float[Tensor, "batch heads rows keys"]:
    """Raised to a power; products cost less than logarithms where it is a whole number."""
    if power % 1:
        return x**power
    out = x.clone()
    for digit in f"{int(power):b}"[1:]:
        out.mul_(out)
        if digit == "1":
            out.mul_(x)
    return out
