r"""Mass that a streaming cache would keep: the first token and the recent window.

    m_i = p_{i, first} + \sum_{j \ne first} p_ij [ i - j <= w ]

A head whose m is near 1 on long rows would hardly notice if its cache held nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from foveate.core.card import Card, Needs
from foveate.core.mechanism import RowMetric
from foveate.core.params import bounded
from foveate.core.reductions import Match, Reduction, Within
from foveate.core.rows import Rows

__all__ = ["StreamingMass"]


@dataclass(frozen=True)
class StreamingMass(RowMetric):
    """Mean mass on the first token and the last `window` tokens, over the rows that see more than these.

    Args:
        window: How many tokens back the window reaches.

    Example:
        Three of the heads would lose nothing in a cache of the first token and the last two; `average` would.

        >>> import foveate
        >>> from foveate.measure import StreamingMass
        >>> from foveate.testing import handmade
        >>> model = handmade.model()
        >>> with foveate.attach(model, StreamingMass(window=2)) as attached:
        ...     _ = model(handmade.ids("hello world"))
        >>> handmade.named(attached.results.heads, "streaming_mass")
        {'first': 1.0, 'previous': 1.0, 'self': 1.0, 'average': 0.56}
    """

    window: int = bounded(256, 0, 1 << 20)

    card: ClassVar = Card(
        title="DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
        year=2024,
        family="locality",
        needs=Needs.WEIGHTS,
        equation="m_i = p_{i,first} + sum_{j != first} p_ij [i - j <= w]",
        differs="reads attention mass instead of learning a gate per head; one sink token instead of several",
        use="to see which heads could live with a small constant cache, before compressing anything",
        misleads="little far mass can still matter: mass is no measure of what the value it carries does",
    )
    test_params: ClassVar = ({}, {"window": 3})

    def needs(self) -> tuple[Reduction, ...]:
        return (Match("first"), Within(self.window))

    def per_row(self, rows: Rows) -> dict[str, Float[Tensor, "batch heads query"]]:
        return {"streaming_mass": rows[Match("first")] + rows[Within(self.window)]}

    def counted(self, rows: Rows) -> Tensor:
        mask = rows.view.mask
        # nearer rows see the first token inside the window, and would count it twice
        return mask.rows & (mask.position - mask.starts > self.window)
