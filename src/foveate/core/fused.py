r"""Closed forms from the log-sum-exp: statistics of the weights from fused attention calls, no weight formed.

With p_ij = exp(s_ij - lse_i), and a fused kernel that returns lse:

    entropy_i        = lse_i - scale q_i . (P K)_i            the keys beside the values in one call
    \sum_j p_ij x_j  = (P X)_i                                columns as values, up to a head's width in one call
    mass on a set    = exp(lse_i restricted to the set - lse_i)
    one listed pair  = exp(s_ij - lse_i)
    column mass_j    = exp(lse of a call with queries and keys swapped and -lse_i as one more column)

Plain causal or full masks need no mask tensor; other intervals are cut into row chunks with a mask of their own. Where
derivatives are followed, the calls are tiles (`core/tiled.py`), which know those of the log-sum-exp too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core import tiled
from foveate.core.mask import Mask
from foveate.core.reductions import ColumnMass, Distance, KeyBins, Match, OnKeys, Reduction, RowEntropy, Within, labels

if TYPE_CHECKING:
    from foveate.core.rows import View

__all__ = ["refuses", "rows"]

CHUNK = 512
FAR = -1e30
KNOWN = (RowEntropy, Distance, Within, Match, OnKeys, KeyBins, ColumnMass)
# links that name one key for each row
PAIRS = ("self", "previous", "first")


def refuses(view: View, reductions: Sequence[Reduction]) -> str:
    """Why the closed forms cannot stand for this call, or ""."""
    for r in reductions:
        if not isinstance(r, KNOWN):
            return f"{r} has no closed form"
    if view.softcap is not None or view.bias is not None:
        return "a soft cap or an additive bias is not a product of queries and keys"
    if view.tilt is not None:
        return "a tilt is no product of queries and keys"
    if view.mask.dense is not None:
        return "the mask is no interval of keys"
    if view.dropout:
        return "dropout acts on single weights"
    if view.needs_grad:
        for r in reductions:
            if isinstance(r, ColumnMass) or (isinstance(r, Match) and r.link not in PAIRS):
                return f"gradients of {r} go through the row blocks"
    return ""


def rows(view: View, reductions: Sequence[Reduction]) -> tuple[Tensor, dict[Reduction, Tensor]]:
    """Head outputs, and the reductions by their closed forms."""
    forms = Forms(view, any(isinstance(r, RowEntropy) for r in reductions))
    found: dict[Reduction, Tensor] = {}
    for r in reductions:
        match r:
            case RowEntropy():
                found[r] = forms.entropy()
            case Distance():
                found[r] = forms.distance()
            case Within():
                found[r] = forms.within(r.width)
            case Match():
                found[r] = forms.match(r)
            case OnKeys() | KeyBins():
                found[r] = forms.columns(r.columns(view))
            case ColumnMass():
                found[r] = forms.column_mass()
    return forms.out.to(view.q.dtype), found


class Forms:
    """The closed forms of one call; the first fused call is shared by all of them.

    Args:
        view: The attention call.
        entropy: Whether the entropies will be asked for, which mix the keys beside the values.
    """

    def __init__(self, view: View, entropy: bool) -> None:
        self.view, self.mask = view, view.mask
        self.q, self.k, self.v = view.q.float(), view.k.float(), view.v.float()
        self.empty = (self.mask.high <= self.mask.low)[:, None]
        mixed, keys_lse = self.call(torch.cat([self.v, self.k], -1) if entropy else self.v)
        self.lse = keys_lse
        if view.sinks is not None:
            self.lse = torch.logaddexp(keys_lse, view.sinks.float()[:, None])
        self.lse = self.lse.masked_fill(self.empty, torch.inf)
        self.share = torch.exp(keys_lse - self.lse)
        mixed = mixed * self.share[..., None]
        self.out, self.keys = mixed[..., : self.v.shape[-1]], mixed[..., self.v.shape[-1] :]

    def call(
        self,
        values: Tensor,
        mask: Mask | None = None,
        allowed: Callable[[Tensor, int, int], Tensor] | None = None,
    ) -> tuple[Float[Tensor, "batch heads query dim"], Float[Tensor, "batch heads query"]]:
        """Fused attention with other values, under another mask or over the keys that `allowed` leaves; its own lse."""
        mask = self.mask if mask is None else mask
        if self.view.needs_grad:
            return tiled.attend(self.view.but(q=self.q, k=self.k, v=values, mask=mask, sinks=None))
        kind = mask.plain if allowed is None else ""
        if kind:
            out, lse = attention(self.q, self.k, values, kind == "causal", None, self.view.scale)
        else:
            parts = []
            for a in range(0, self.view.queries, CHUNK):
                b = min(self.view.queries, a + CHUNK)
                first, last = mask.span(a, b)
                if first == last:
                    first, last = 0, 1
                index = torch.arange(a, b, device=self.q.device)
                sees = mask.allowed(index, first, last)
                if allowed is not None:
                    sees = sees & allowed(index, first, last)
                # garbage behind the mask may be NaN, and 0 x NaN is NaN
                any_row = sees.any(2)[..., None]
                k = torch.where(any_row, self.k[:, :, first:last], 0.0)
                v = torch.where(any_row, values[:, :, first:last], 0.0)
                bias = torch.zeros(sees.shape, device=sees.device).masked_fill_(~sees, -torch.inf)
                o, s = attention(self.q[:, :, a:b], k, v, False, bias, self.view.scale)
                nothing = ~sees.any(-1)
                parts.append((o.masked_fill(nothing[..., None], 0.0), s.masked_fill(nothing, -torch.inf)))
            out, lse = (torch.cat(p, 2) for p in zip(*parts, strict=True))
        return out, lse

    def near(self, before: int | None, behind: int) -> Mask:
        """The mask, and of its keys only those up to so many tokens before and behind the row's own place."""
        low, high, place = self.mask.low, self.mask.high, self.mask.position
        high = torch.minimum(high, (place + behind + 1).to(high.dtype))
        if before is not None:
            low = torch.maximum(low, (place - before).to(low.dtype))
        return replace(self.mask, low=torch.minimum(low, high), high=high)

    def columns(self, x: Float[Tensor, "#batch key columns"]) -> Float[Tensor, "batch heads query columns"]:
        """sum_j p_ij x_je, as many columns in one call as a head is wide."""
        width = self.k.shape[-1]
        parts = []
        for part in x.split(width, -1):
            values = torch.nn.functional.pad(part, (0, width - part.shape[-1]))
            values = values[:, None].expand(self.view.batch, self.view.kv_heads, -1, -1)
            parts.append(self.call(values)[0][..., : part.shape[-1]] * self.share[..., None])
        return torch.cat(parts, -1)

    def entropy(self) -> Float[Tensor, "batch heads query"]:
        # rows that see nothing hold what may be anything, and 0 x inf is NaN
        q = torch.where(self.empty[..., None], 0.0, self.q)
        scores = self.view.scale * (q * self.keys).sum(-1)
        return torch.where(self.empty, 0.0, self.lse.masked_fill(self.empty, 0.0) * self.share - scores)

    def distance(self) -> Float[Tensor, "batch heads query"]:
        # \sum p |i - j| = \sum p (j - i) + 2 \sum_{j <= i} p (i - j); positions are centred to keep the digits
        at = torch.arange(self.view.keys, device=self.q.device).float()
        centre = (self.view.keys - 1) / 2
        i = self.mask.position.float() - centre
        x = (at - centre)[None, :, None]
        if self.mask.causal:
            return i * self.share - self.columns(x)[..., 0]
        width = self.k.shape[-1]
        values = torch.nn.functional.pad(x, (0, width - 1))[:, None]
        values = values.expand(self.view.batch, self.view.kv_heads, -1, -1)
        left, lse = self.call(values, self.near(None, 0))
        mass = torch.exp(lse - self.lse)
        return self.columns(x)[..., 0] - i * self.share + 2 * mass * (i - left[..., 0])

    def within(self, width: int) -> Float[Tensor, "batch heads query"]:
        return torch.exp(self.call(self.v, self.near(width, width))[1] - self.lse)

    def match(self, r: Match) -> Float[Tensor, "batch heads query"]:
        of_rows, of_keys = labels(self.view, r.link)
        if r.link in PAIRS:
            return self.pair(of_rows)
        _, lse = self.call(self.v, allowed=lambda i, a, b: (of_rows[:, i, None] == of_keys[:, None, a:b])[:, None])
        return torch.exp(lse - self.lse)

    def pair(self, key: Tensor) -> Float[Tensor, "batch heads query"]:
        """Weight of one listed key per row; 0 where the row may not look there."""
        view = self.view
        key = key.expand(view.batch, -1).long()
        sees = (key >= self.mask.low) & (key < self.mask.high)
        at = torch.where(sees, key, 0)[:, None, :, None].expand(-1, view.kv_heads, -1, self.k.shape[-1])
        k = self.k.gather(2, at)
        q = self.q.unflatten(1, (view.kv_heads, -1))
        # what a row may not see has no derivative either
        q, k = (torch.where(sees[:, None, None, :, None], x, 0.0) for x in (q, k[:, :, None]))
        s = view.scale * (q * k).sum(-1).flatten(1, 2)
        return torch.where(sees[:, None], torch.exp(s - self.lse), 0.0)

    def column_mass(self) -> Float[Tensor, "batch heads key"]:
        view, mask = self.view, self.mask
        real = mask.rows[:, None].expand(view.batch, view.heads, -1)
        minus = torch.where(real, -self.lse, FAR)[..., None]
        k = self.k.repeat_interleave(view.grouped, 1)
        swapped_q = torch.cat([k * view.scale, torch.ones_like(k[..., :1])], -1)
        # padded queries, and those that see nothing, may be NaN
        swapped_k = torch.cat([torch.where(real[..., None], self.q, 0.0), minus], -1)
        values = torch.zeros_like(swapped_k)
        if mask.plain:
            flip = (lambda t: t.flip(2)) if mask.plain == "causal" else (lambda t: t)
            _, lse = attention(flip(swapped_q), flip(swapped_k), values, mask.plain == "causal", None, 1.0)
            return torch.exp(flip(lse[..., None])[..., 0])
        parts = []
        for a in range(0, view.keys, CHUNK):
            b = min(view.keys, a + CHUNK)
            at = torch.arange(a, b, device=k.device)[:, None]
            sees = ((at >= mask.low[:, None, :]) & (at < mask.high[:, None, :]) & mask.rows[:, None])[:, None]
            bias = torch.zeros(sees.shape, device=sees.device).masked_fill_(~sees, -torch.inf)
            nothing = ~sees.any(-1)
            part = torch.where(nothing[..., None], 0.0, swapped_q[:, :, a:b])
            _, lse = attention(part, swapped_k, values, False, bias, 1.0)
            parts.append(torch.exp(lse).masked_fill(nothing, 0.0))
        return torch.cat(parts, 2)


def attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None, scale: float
) -> tuple[Float[Tensor, "batch heads query dim"], Float[Tensor, "batch heads query"]]:
    """One fused attention call that also returns its log-sum-exp, on the device at hand.

    Values may be narrower or wider than the keys: the narrower side is padded, kernels want one width.
    """
    width = v.shape[-1]
    wide = max(q.shape[-1], width)
    q, k, v = (torch.nn.functional.pad(t, (0, wide - t.shape[-1])) if t.shape[-1] < wide else t for t in (q, k, v))
    if q.device.type == "cpu":
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = op(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    else:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        op = torch.ops.aten._scaled_dot_product_efficient_attention
        bias = None if bias is None else bias.expand(*q.shape[:3], k.shape[2])
        out, lse, *_ = op(q, k, v, bias, True, 0.0, causal, scale=scale)
        lse = lse[..., : q.shape[2]]
    return out[..., :width], lse
