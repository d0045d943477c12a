r"""Induction score.

    m_i = \sum_{j \le i} p_ij [ t_{j-1} = t_i ]

The keys that follow an earlier copy of the current token t_i: in "A B ... A" the last A looks at B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core.card import Card, Needs
from foveate.core.mechanism import RowMetric
from foveate.core.reductions import Match, Reduction
from foveate.core.rows import Rows
from foveate.measure._matches import matching

__all__ = ["Induction"]


@dataclass(frozen=True)
class Induction(RowMetric):
    """Mean mass on the keys that follow an earlier copy of the current token, over the rows that may see one.

    Layers without causal order have no such rows (NaN): there each token's own follower would count.

    Example:
        After `abcd` and another `abc`, the induction head looks at what followed each letter, and the model says `d`.

        >>> import foveate
        >>> from foveate.measure import Induction
        >>> from foveate.testing import handmade, tiny
        >>> model = handmade.model()
        >>> with foveate.attach(model, Induction()) as attached:
        ...     logits = model(handmade.ids("abcdabc")).logits
        >>> handmade.named(attached.results.heads, "induction", layer=1)
        {'first': 0.0, 'same': 0.0, 'induction': 1.0, 'stop': 0.0}
        >>> tiny.tokenizer().decode(logits[0, -1].argmax())
        'd'
    """

    card: ClassVar = Card(
        title="In-context Learning and Induction Heads",
        year=2022,
        family="circuits",
        needs=Needs.WEIGHTS | Needs.TOKENS,
        equation="m_i = sum_{j <= i} p_ij [t_{j-1} = t_i]",
        differs="the paper's prefix-matching score is taken on repeated random tokens; ours on the text at "
        "hand, over the rows that have an earlier copy. For the paper's score, give it random tokens twice",
        use="to find the heads behind in-context copying",
        misleads="on natural text a frequent token has many followers, which lifts every head that spreads its mass",
    )

    def needs(self) -> tuple[Reduction, ...]:
        return (Match("follower"),)

    def per_row(self, rows: Rows) -> dict[str, Float[Tensor, "batch heads query"]]:
        return {"induction": rows[Match("follower")]}

    def counted(self, rows: Rows) -> Bool[Tensor, "#batch query"]:
        mask = rows.view.mask
        if not mask.causal:
            return torch.zeros_like(mask.rows)
        return mask.rows & (matching(rows.view, "follower") > 0)
