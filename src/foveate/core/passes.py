"""Head outputs under an edit of whole rows, without the rows: passes of the CPU kernel over the keys.

A pass before says what a row amounts to, its log-sum-exp and its largest score. Then every weight is a function of its
own score, and a second pass adds up what the edit does to it, a tile of scores at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core import native, onepass

if TYPE_CHECKING:
    from foveate.core.rows import View

__all__ = ["Passes", "Softmax", "Sums"]

Bound = Int[Tensor, "#batch #query"]


class Softmax(NamedTuple):
    """Softmax over some keys of each row.

    Args:
        out: Means of values, [batch, heads, query, value_dim]; None where they were not asked for.
        lse: Log-sum-exps, [batch, heads, query]; -inf where a row sees none of the keys.
        top: Largest scores, [batch, heads, query].
    """

    out: Any
    lse: Float[Tensor, "batch heads query"]
    top: Float[Tensor, "batch heads query"]


class Sums(NamedTuple):
    """Sums over some keys of each row.

    Args:
        out: Of weighted values, [batch, heads, query, value_dim]; None where they were not asked for.
        mass: Of weights, [batch, heads, query].
    """

    out: Any
    mass: Float[Tensor, "batch heads query"]


@dataclass(frozen=True, eq=False)
class Passes:
    """An attention call, whose keys an edit goes over as often as it must.

    Args:
        view: The call; tilts are in it.
    """

    view: View

    @property
    def fit(self) -> bool:
        """Whether the kernel can go over this call."""
        return self.view.q.dtype != torch.float64 and not onepass.refuses(self.view, ())

    def softmax(
        self, low: Bound | None = None, high: Bound | None = None, *, sinks: bool = True, mixed: bool = True
    ) -> Softmax:
        """Softmax over the keys from `low` on and before `high`, of those that each row sees.

        Args:
            low: First key; None: the first one that the row sees.
            high: One past the last key; None: the last one that the row sees.
            sinks: Whether learned sinks take their part.
            mixed: Whether the means of the values are wanted.
        """
        found = self.run(low, high, sinks=self.view.sinks if sinks else None, want_out=mixed, want_top=True)
        return Softmax(found.out, found.lse, found.top)

    def up_to(
        self, lse: Tensor, cut: Tensor | float, low: Bound | None = None, high: Bound | None = None, mixed: bool = True
    ) -> Sums:
        """Sums of the weights p = exp(score - lse) that are at most `cut`.

        Args:
            lse: [batch, heads, query].
            cut: [batch or 1, heads or 1, query or 1], or one for all.
            low: First key, as of `softmax`.
            high: One past the last key.
            mixed: Whether the sums of weighted values are wanted.
        """
        return self.summed("up_to", -lse, torch.as_tensor(cut), low, high, want_out=mixed)

    def excess(
        self, shift: Tensor, cut: Tensor, power: int, low: Bound | None = None, high: Bound | None = None
    ) -> Sums:
        """Sums of relu(exp(score + shift) - cut)^power.

        Args:
            shift: [batch, heads, query].
            cut: [batch, heads, query].
            power: From 1.
            low: First key, as of `softmax`.
            high: One past the last key.
        """
        return self.summed("excess", shift, cut, low, high, power=power)

    def total(self, whole: Softmax) -> Float[Tensor, "batch heads query 1"]:
        """The sum of all weights of a row: 1 but for what a learned sink holds, and 0 where it sees nothing."""
        sinks = self.view.sinks
        held = 0.0 if sinks is None else (sinks.float()[:, None] - whole.lse).exp()
        return torch.where(whole.lse > -torch.inf, 1.0 - held, 0.0)[..., None]

    def summed(
        self, activation: str, shift: Tensor, cut: Tensor, low: Bound | None, high: Bound | None, **more: Any
    ) -> Sums:
        found = self.run(low, high, activation=activation, shift=shift, cut=cut, **more)
        return Sums(found.out, found.lse)

    @cached_property
    def wide(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values in float32: sums are merged before they are rounded to the model's precision."""
        return self.view.q.float(), self.view.k.float(), self.view.v.float()

    def run(self, low: Bound | None, high: Bound | None, **more: Any) -> native.NativeResult:
        """One pass over a part of the keys."""
        mask, (q, k, v) = self.view.mask, self.wide
        return native.attend(
            q,
            k,
            v,
            lo=(mask.low if low is None else torch.maximum(mask.low, low)).contiguous(),
            hi=(mask.high if high is None else torch.minimum(mask.high, high)).contiguous(),
            **onepass.given(self.view),
            **more,
        )
