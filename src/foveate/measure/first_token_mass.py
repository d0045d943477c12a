r"""Mass on the first token.

    m_i = p_{i, first}

"First" is the first token of the row's own text: behind left padding, and per sequence in a packed batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from foveate.core.card import Card, Needs
from foveate.core.mechanism import RowMetric
from foveate.core.reductions import Match, Reduction
from foveate.core.rows import Rows

__all__ = ["FirstTokenMass"]


@dataclass(frozen=True)
class FirstTokenMass(RowMetric):
    """Mean mass that a head's rows put on the first token of the text.

    Example:
        The head `average` gives the first token no more than any other; on a short text that is a good deal.

        >>> import foveate
        >>> from foveate.measure import FirstTokenMass
        >>> from foveate.testing import handmade
        >>> model = handmade.model()
        >>> with foveate.attach(model, FirstTokenMass()) as attached:
        ...     _ = model(handmade.ids("hello world"))
        >>> handmade.named(attached.results.heads, "first_token_mass")
        {'first': 1.0, 'previous': 0.17, 'self': 0.08, 'average': 0.26}
    """

    card: ClassVar = Card(
        title="When Attention Sink Emerges in Language Models: An Empirical View",
        year=2024,
        family="sinks",
        needs=Needs.WEIGHTS,
        equation="m_i = p_{i,first}",
        differs="a mean over all rows; the paper's sink rate with its threshold is `sink_rate`",
        use="to see at a glance which layers park their attention on the first token",
        misleads="the first row has nowhere else to look; on short texts that alone lifts the mean",
        claims=("first_token_sink",),
    )

    def needs(self) -> tuple[Reduction, ...]:
        return (Match("first"),)

    def per_row(self, rows: Rows) -> dict[str, Float[Tensor, "batch heads query"]]:
        return {"first_token_mass": rows[Match("first")]}
