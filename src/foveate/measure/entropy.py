r"""Entropy of attention.

    H_i = -\sum_j p_ij ln p_ij,        relative: H_i / ln n_i

with n_i the number of keys that row i may see. 0 nats is one key; ln n_i is all keys alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.accumulate import Cells, Estimate
from foveate.core.card import Card, Needs
from foveate.core.mechanism import RowMetric
from foveate.core.params import bounded
from foveate.core.reductions import KeyBins, Reduction, RowEntropy
from foveate.core.rows import Layer, Rows
from foveate.measure._binned import Binned, by_bin

__all__ = ["Entropy"]


@dataclass
class Sums:
    """Sums for the means over all rows, and sums and numbers of rows by place in the text."""

    course: Binned
    rows: Binned
    cells: dict[str, Cells] = field(default_factory=dict)


@dataclass(frozen=True)
class Entropy(RowMetric):
    """Mean entropy of a head's rows, in nats (`entropy`) and relative to the row's length (`entropy_relative`).

    Rows that see a single key have relative entropy 0. As a picture per head: the mean entropy over the course of the
    text (`entropy_by_position`).

    Args:
        bins: Most stretches in the course of a text, cut as `attention_map` cuts it.

    Example:
        Heads that pick one key have no entropy; the head that averages has the most that there can be (but for its
        first row, which sees one key).

        >>> import foveate
        >>> from foveate.measure import Entropy
        >>> from foveate.testing import handmade
        >>> model = handmade.model()
        >>> with foveate.attach(model, Entropy()) as attached:
        ...     _ = model(handmade.ids("hello world"))
        >>> handmade.named(attached.results.heads, "entropy")
        {'first': 0.0, 'previous': 0.0, 'self': 0.0, 'average': 1.67}
        >>> handmade.named(attached.results.heads, "entropy_relative")
        {'first': 0.0, 'previous': 0.0, 'self': 0.0, 'average': 0.92}
    """

    bins: int = bounded(64, 2, 512)

    card: ClassVar = Card(
        title="Stabilizing Transformer Training by Preventing Attention Entropy Collapse",
        year=2023,
        family="concentration",
        needs=Needs.WEIGHTS,
        equation="H_i = -sum_j p_ij ln p_ij; relative: H_i / ln n_i",
        differs="averages over the rows of one text, not over a training batch; adds the relative form",
        use="to tell heads that pick from heads that average, and to watch for entropy collapse",
        misleads="one sink key lowers it as much as real selectivity does: read it beside first_token_mass",
        claims=("entropy_bound",),
    )
    test_params: ClassVar = ({}, {"bins": 4})

    def needs(self) -> tuple[Reduction, ...]:
        return (RowEntropy(),)

    def per_row(self, rows: Rows) -> dict[str, Float[Tensor, "batch heads query"]]:
        entropy = rows[RowEntropy()]
        mask = rows.view.mask
        most = torch.log((mask.high - mask.low).clamp_min(1).float())[:, None]
        return {"entropy": entropy, "entropy_relative": torch.where(most > 0, entropy / most.clamp_min(1e-9), 0.0)}

    def start(self, layer: Layer) -> Sums:
        return Sums(Binned(KeyBins(self.bins)), Binned(KeyBins(self.bins)))

    def update(self, state: Sums, rows: Rows) -> Sums:
        RowMetric.update(self, state.cells, rows)
        if not rows.layer.cross:
            bins, real = KeyBins(self.bins), rows.view.mask.rows
            tokens, place = bins.of_view(rows.view)
            width = bins.width(tokens)
            counted = real.expand(rows.view.batch, -1)[:, None].float()
            for sums, values in ((state.course, rows[RowEntropy()]), (state.rows, counted)):
                sums.add(by_bin(values, real, place, width, -(-tokens // width)).cpu(), tokens)
        return state

    def result(self, state: Sums) -> dict[str, Estimate]:
        return RowMetric.result(self, state.cells)

    def arrays(self, state: Sums) -> dict[str, Float[Tensor, "heads bins"]]:
        if state.course.sums is None or state.rows.sums is None:
            return {}
        return {"entropy_by_position": state.course.sums / state.rows.sums}
