r"""Gated DeltaNet: delta writes into a state that forgets as the token says.

S_t = a_t S_{t-1} + b_t k_t (v_t - a_t k_t^T S_{t-1})^T,    ln a_t = -exp(A) softplus(w_h . x_t + d)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.card import Card, Needs
from foveate.core.recurrence import Heads
from foveate.core.rule import Sizes
from foveate.core.states import exact
from foveate.replace.linear._delta import DeltaWrites, Written

__all__ = ["GatedDelta"]


@dataclass(frozen=True)
class GatedDelta(DeltaWrites):
    r"""Delta writes of learned strength into a state with learned decay, and a gate on what is read.

    S_t = a_t S_{t-1} + b_t k_t (v_t - a_t k_t^T S_{t-1})^T,    ln a_t = -exp(A) softplus(w_a . x_t + d)
    o_t = g * r_t / sqrt(mean(r_t^2) + 1e-5) * silu(W_g x_t),    r_t = scale q_t^T S_t

    q, k, v and b are those of `Delta`; A and d are learned, one of each per key-value head. Where all a are 1, this is
    `Delta` with a gate.

    Example:
        Head by head, the share of the state that one token leaves where training begins.

        >>> import torch, foveate
        >>> from foveate.replace import GatedDelta
        >>> _ = torch.manual_seed(0)
        >>> attention = foveate.nn.Attention(32, heads=4, rule=GatedDelta())
        >>> own = attention.rule.learned
        >>> a = torch.exp(-own.log_rate.exp() * own.shift.exp().log1p())
        >>> bool(((a > 0.1) & (a < 1)).all())
        True
        >>> attention(torch.randn(2, 10, 32)).shape
        torch.Size([2, 10, 32])

    Args:
        convolution: Tokens that the convolutions of q, k and v reach over, each its own one included; 0: none.
        max_strength: Largest strength of a write. Above 1, a write can turn what its key held to its negative.
    """

    card: ClassVar = Card(
        title="Gated Delta Networks: Improving Mamba2 with Delta Rule",
        year=2024,
        family="linear",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES | Needs.TRAINING,
        equation="S_t = a_t S_{t-1} + b_t k_t (v_t - a_t k_t^T S_{t-1})^T; o_t = rmsnorm(q_t^T S_t) silu(W_g x_t)",
        differs=(
            "q, k and v are those of the layer, as wide as its heads, with its rotary positions where it has them (the "
            "paper has none); the convolutions begin as the identity; exp(A) begins between 0.01 and 16, not 0 and 16; "
            "query heads of a group share the state, strength and decay of their key-value head"
        ),
        use="for recall with forgetting in a state of fixed size, as in hybrids with a few layers of full attention",
        misleads="half of its heads forget within about a dozen tokens where training begins, so that long recall "
        "before training says nothing; published results are of hybrids too",
    )
    test_params: ClassVar = ({}, {"convolution": 0, "max_strength": 2.0})

    def learned(self, sizes: Sizes) -> nn.Module:
        return Gated(self.convolution, sizes)

    def decay(self, heads: Heads) -> Float[Tensor, "batch kv_heads time 1"]:
        own, x = heads.learned, heads.tokens.x
        assert isinstance(own, Gated)
        rate = nn.functional.softplus(own.decay(x).to(exact(x)) + own.shift)
        return (-own.log_rate.to(rate.dtype).exp() * rate).transpose(1, 2)[..., None]

    def finish(
        self, heads: Heads, out: Float[Tensor, "batch heads time value_dim"]
    ) -> Float[Tensor, "batch heads time value_dim"]:
        assert isinstance(heads.learned, Gated)
        gate = nn.functional.silu(heads.learned.gate(heads.tokens.x))
        return super().finish(heads, out) * gate.unflatten(2, (out.shape[1], -1)).transpose(1, 2)


class Gated(Written):
    """Parameters of gated delta writes in one layer.

    Args:
        convolution: Taps of the convolutions; 0: there are none.
        sizes: Sizes of the layer.
    """

    def __init__(self, convolution: int, sizes: Sizes) -> None:
        super().__init__(convolution, sizes)
        self.decay = nn.Linear(sizes.width, sizes.kv_heads, bias=False)
        self.gate = nn.Linear(sizes.width, sizes.heads * sizes.value_dim, bias=False)
        self.log_rate = nn.Parameter(torch.empty(sizes.kv_heads).uniform_(0.01, 16).log())
        # softplus of the shift is between 0.001 and 0.1, evenly in logs
        step = torch.empty(sizes.kv_heads).uniform_(-3, -1).mul(torch.tensor(10.0).log()).exp()
        self.shift = nn.Parameter(step.expm1().log())
