r"""Duplicate-token score.

    m_i = \sum_{j \ne i} p_ij [ t_j = t_i ]

with t the token ids; under a causal mask these are the earlier copies of the current token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core.card import Card, Needs
from foveate.core.mechanism import RowMetric
from foveate.core.reductions import Match, Reduction
from foveate.core.rows import Rows
from foveate.measure._matches import matching

__all__ = ["DuplicateToken"]


@dataclass(frozen=True)
class DuplicateToken(RowMetric):
    """Mean mass on other copies of the same token, over the rows that may see one.

    Example:
        The second `a`, `b` and `c` have one copy each. The head that looks at all copies alike, itself included,
        gives it half of its mass.

        >>> import foveate
        >>> from foveate.measure import DuplicateToken
        >>> from foveate.testing import handmade
        >>> model = handmade.model()
        >>> with foveate.attach(model, DuplicateToken()) as attached:
        ...     _ = model(handmade.ids("abcabc"))
        >>> handmade.named(attached.results.heads, "duplicate_token", layer=1)
        {'first': 0.0, 'same': 0.5, 'induction': 0.0, 'stop': 0.0}
    """

    card: ClassVar = Card(
        title="Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 small",
        year=2022,
        family="circuits",
        needs=Needs.WEIGHTS | Needs.TOKENS,
        equation="m_i = sum_{j != i} p_ij [t_j = t_i]",
        differs="averages over the rows of real text that have a copy to look at; the usual detectors divide "
        "by all rows, so that their score falls where a text repeats less; in a bidirectional layer later "
        "copies count too",
        use="to find heads that mark repeated tokens",
        misleads="frequent tokens have copies everywhere: a head that spreads its mass scores by chance on them",
    )

    def needs(self) -> tuple[Reduction, ...]:
        return (Match("token"), Match("self"))

    def per_row(self, rows: Rows) -> dict[str, Float[Tensor, "batch heads query"]]:
        return {"duplicate_token": (rows[Match("token")] - rows[Match("self")]).clamp_min(0.0)}

    def counted(self, rows: Rows) -> Bool[Tensor, "#batch query"]:
        return rows.view.mask.rows & (matching(rows.view, "token") > matching_self(rows))


def matching_self(rows: Rows) -> Bool[Tensor, "#batch query"]:
    """Whether a row sees its own token."""
    mask = rows.view.mask
    return (mask.low <= mask.position) & (mask.position < mask.high)
