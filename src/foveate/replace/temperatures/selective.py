r"""Selective self-attention: each query has its temperature, and each value its own, by what they are and where."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.card import Card, Needs
from foveate.core.errors import BadInput
from foveate.core.params import bounded
from foveate.core.rows import View
from foveate.core.rule import Rule, Sizes

__all__ = ["Selective"]


@dataclass(frozen=True)
class Selective(Rule):
    r"""Inverse temperatures on queries and values, of the token and of its place.

    s_ij = tau_q(i) scale q_i . k_j,    o_i = \sum_j p_ij tau_v(j) v_j

    tau_q(i) = tanh(w_q . x_i)       + 1 + sigmoid(alpha_h) ln n_i
    tau_v(j) = tanh(w_v . gelu(v_j)) + 1 + sigmoid(alpha_v) ln n_j

    x_i is the layer's input at the query, n_i which token of its text it is, from 1. One w_q and one w_v serve all
    heads.

    Example:
        A layer of width 576 with 9 heads gets 650 numbers more.

        >>> import foveate
        >>> from foveate.replace import Selective
        >>> attention = foveate.nn.Attention(576, heads=9, rule=Selective())
        >>> sum(p.numel() for p in attention.rule.parameters())
        650

    Args:
        position: The share sigmoid(alpha) of ln n where training begins; 0: temperatures know no place.
    """

    position: float = bounded(0.01, 0.0, 0.99)

    card: ClassVar[Card] = Card(
        title="Selective Attention: Enhancing Transformer through Principled Context Control",
        year=2024,
        family="temperatures",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES,
        equation="s_ij = tau_q(i) scale q_i . k_j; o_i = sum_j p_ij tau_v(j) v_j; tau = tanh f + 1 + sigmoid(a) ln n",
        differs=(
            "its code shows the place of queries only; f and the values are as its text and other code have them; f "
            "reads the layer's input where that code shares the query projection, whose output has its rotary "
            "positions in it here; w starts at 0, and sigmoid(alpha) at 0.01 (its code: 0.0006 and 0.011)"
        ),
        use="Fine-tune a loaded model for long inputs at under 0.5 % more parameters.",
        misleads="Fresh, it moves a loaded model a little, by the places of its tokens; position=0 does not.",
        claims=("query_temperature",),
    )
    identity: ClassVar[dict[str, Any] | None] = {"position": 0.0}
    test_params: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"position": 0.0}, {"position": 0.5})

    def learned(self, sizes: Sizes) -> torch.nn.Module:
        return Temperatures(sizes, self.position)

    def prepare(self, view: View) -> View:
        own: Any = view.learned
        mask = view.mask
        if view.hidden is None:
            raise BadInput("Selective reads the layer's input, and this call has none: give View(hidden=…)")
        wide = torch.promote_types(view.q.dtype, torch.float32)
        x, v = view.hidden.to(wide), view.v.to(wide)
        tau_q = 1 + torch.tanh(x @ own.query.to(wide))[:, None]
        tau_v = 1 + torch.tanh(torch.nn.functional.gelu(v) @ own.value.to(wide))
        if own.alpha is not None:
            tau_q = tau_q + torch.sigmoid(own.alpha.to(wide))[:, None] * log_place(mask.place, wide)
            tau_v = tau_v + torch.sigmoid(own.alpha_value.to(wide)) * log_place(mask.key_place, wide)
        return view.but(q=(view.q * tau_q[..., None]).to(view.q.dtype), v=(v * tau_v[..., None]).to(view.v.dtype))


class Temperatures(torch.nn.Module):
    """w_q, w_v, alpha_h and alpha_v of one layer."""

    def __init__(self, sizes: Sizes, position: float) -> None:
        super().__init__()
        self.query = torch.nn.Parameter(torch.zeros(sizes.width))
        self.value = torch.nn.Parameter(torch.zeros(sizes.value_dim))
        for name, count in (("alpha", sizes.heads), ("alpha_value", 1)):
            start = torch.full((count,), math.log(position / (1 - position))) if position else None
            self.register_parameter(name, None if start is None else torch.nn.Parameter(start))


def log_place(place: Int[Tensor, "#batch tokens"], dtype: torch.dtype) -> Float[Tensor, "#batch 1 tokens"]:
    """Ln n of tokens whose place in their text is n - 1; of padding in front 0."""
    return (place.clamp_min(0) + 1).to(dtype).log()[:, None]
