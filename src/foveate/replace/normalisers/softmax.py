"""Softmax attention, the model's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from foveate.core.card import Card, Needs
from foveate.core.rule import Rule

__all__ = ["Softmax"]


@dataclass(frozen=True)
class Softmax(Rule):
    r"""Softmax attention, as it stands in nearly every model.

    p_ij = exp(s_ij - lse_i),    lse_i = ln \sum_j exp s_ij,    s_ij = scale q_i . k_j

    Example:
        A model that was converted gets its own attention back.

        >>> import foveate
        >>> from foveate.testing import tiny
        >>> from foveate.replace import Softmax
        >>> model = foveate.convert(tiny.model("llama"), "relu", layers=1)
        >>> model.config.foveate_attention[0]["layers"]
        [1]
        >>> model = foveate.convert(model, Softmax())
        >>> hasattr(model.config, "foveate_attention")
        False
    """

    card: ClassVar[Card] = Card(
        title="Scaled dot-product attention, the softmax of the scores (no paper of the list)",
        year=2017,
        family="normalisers",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES,
        equation="p_ij = exp(s_ij) / sum_j exp(s_ij)",
        differs="nothing known",
        use="Compare other rules with it, or take one off again.",
        misleads="A model that was trained under another rule is not made for it.",
    )
    identity: ClassVar[dict[str, Any] | None] = {}
