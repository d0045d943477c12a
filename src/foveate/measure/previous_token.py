r"""Previous-token score.

    m_i = p_{i, i-1}

The mass on the key right before the row's own position.
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

__all__ = ["PreviousToken"]


@dataclass(frozen=True)
class PreviousToken(RowMetric):
    """Mean mass on the token right before, over the rows that may see one.

    Example:
        Only one head looks at the token before; `first` and `average` cannot avoid it at the start of the text.

        >>> import foveate
        >>> from foveate.measure import PreviousToken
        >>> from foveate.testing import handmade
        >>> model = handmade.model()
        >>> with foveate.attach(model, PreviousToken()) as attached:
        ...     _ = model(handmade.ids("hello world"))
        >>> handmade.named(attached.results.heads, "previous_token")
        {'first': 0.09, 'previous': 1.0, 'self': 0.0, 'average': 0.19}
    """

    card: ClassVar = Card(
        title="Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 small",
        year=2022,
        family="circuits",
        needs=Needs.WEIGHTS,
        equation="m_i = p_{i,i-1}",
        differs="averages over the rows of real text that have a token before them; the usual detectors "
        "divide the mass of all rows, the first one too, by the number of rows",
        use="to find the heads that tell each token what stood before it, the first half of an induction circuit",
        misleads="a head that is merely local scores too: compare with local_mass_1 and the mass on the token itself",
    )

    def needs(self) -> tuple[Reduction, ...]:
        return (Match("previous"),)

    def per_row(self, rows: Rows) -> dict[str, Float[Tensor, "batch heads query"]]:
        return {"previous_token": rows[Match("previous")]}

    def counted(self, rows: Rows) -> Bool[Tensor, "#batch query"]:
        mask = rows.view.mask
        return mask.rows & (mask.low < mask.position)
