r"""Local mass: how near a head looks.

    m_i(w) = \sum_j p_ij [ |i - j| <= w ],        d_i = \sum_j p_ij |i - j|

A width of 1 is the token itself and its neighbour.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from foveate.core.card import Card, Needs
from foveate.core.mechanism import RowMetric
from foveate.core.params import bounded
from foveate.core.reductions import Distance, Reduction, Within
from foveate.core.rows import Rows

__all__ = ["LocalMass"]


@dataclass(frozen=True)
class LocalMass(RowMetric):
    """Mean mass within some widths (`local_mass_1`, ...) and mean distance in tokens (`local_mass_distance`).

    Args:
        widths: Largest distances in tokens.

    Example:
        Within one token lies all the mass of the heads `previous` and `self`, and less than half of that of the others.

        >>> import foveate
        >>> from foveate.measure import LocalMass
        >>> from foveate.testing import handmade
        >>> model = handmade.model()
        >>> with foveate.attach(model, LocalMass(widths=(1,))) as attached:
        ...     _ = model(handmade.ids("hello world"))
        >>> handmade.named(attached.results.heads, "local_mass_1")
        {'first': 0.17, 'previous': 1.0, 'self': 1.0, 'average': 0.43}
        >>> handmade.named(attached.results.heads, "local_mass_distance")
        {'first': 5.5, 'previous': 0.92, 'self': 0.0, 'average': 2.75}
    """

    widths: tuple[int, ...] = bounded((1, 16, 64, 256), 0, 1 << 20)

    card: ClassVar = Card(
        title="Analyzing the Structure of Attention in a Transformer Language Model",
        year=2019,
        family="locality",
        needs=Needs.WEIGHTS,
        equation="m_i(w) = sum_j p_ij [|i - j| <= w]; d_i = sum_j p_ij |i - j|",
        differs="the paper averages over a corpus, ours over the rows of one text; the mass within a width "
        "is not in the paper",
        use="to find heads that a short window would serve as well",
        misleads="rows shorter than the width have all their mass in it, and a sink far back makes a local "
        "head look far",
    )
    test_params: ClassVar = ({}, {"widths": (0, 3)})

    def needs(self) -> tuple[Reduction, ...]:
        return (*(Within(w) for w in self.widths), Distance())

    def per_row(self, rows: Rows) -> dict[str, Float[Tensor, "batch heads query"]]:
        return {f"local_mass_{w}": rows[Within(w)] for w in self.widths} | {"local_mass_distance": rows[Distance()]}
