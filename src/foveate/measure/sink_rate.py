r"""Sink rate: heads that park their attention on one key.

    a_k = \frac{1}{|L_k|} \sum_{i \in L_k} p_ik,        sink_k = [ a_k > threshold ]

with L_k the rows after key k that may see it. The mean of `sink_rate` over heads is the published sink rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.card import Card, Needs
from foveate.core.params import bounded
from foveate.core.reductions import ColumnMass, Match, Reduction
from foveate.core.rows import Rows
from foveate.measure._per_key import KeyMetric, Sums, importance, others

__all__ = ["SinkRate"]


@dataclass(frozen=True)
class SinkRate(KeyMetric):
    """Whether a head has a sink at the first position of the text (`sink_rate`, 1 or 0).

    Beside it whether there is one anywhere (`sink_rate_anywhere`), how many keys are sinks
    (`sink_rate_keys`), and the mean mass of all rows on them (`sink_rate_mass`). Several texts are averaged.
    Per key: the importance a_k (`sink_rate_importance`).

    Args:
        threshold: Importance above which a key is a sink.
        later: Keys with fewer later rows than this are no candidates: the mean over a handful of rows says
            little. A text without any candidate has no rate (NaN).

    Example:
        A full stop near the beginning takes all that `stop` has to give: a sink, and not at the first token.

        >>> import foveate
        >>> from foveate.measure import SinkRate
        >>> from foveate.testing import handmade
        >>> model = handmade.model()
        >>> with foveate.attach(model, SinkRate()) as attached:
        ...     _ = model(handmade.ids("a. bcdefghijklmnopqrstu"))
        >>> handmade.named(attached.results.heads, "sink_rate", layer=1)
        {'first': 1.0, 'same': 0.0, 'induction': 0.0, 'stop': 0.0}
        >>> handmade.named(attached.results.heads, "sink_rate_anywhere", layer=1)
        {'first': 1.0, 'same': 0.0, 'induction': 0.0, 'stop': 1.0}
    """

    threshold: float = bounded(0.3, 0.0, 1.0)
    later: int = bounded(16, 1, 1 << 20)

    card: ClassVar = Card(
        title="When Attention Sink Emerges in Language Models: An Empirical View",
        year=2024,
        family="sinks",
        needs=Needs.WEIGHTS,
        equation="a_k = mean of p_ik over the rows i > k that may see k; sink_k = [a_k > threshold]",
        differs="the paper's mean has the key's own row in it (for the first key a weight of 1 among 64), "
        "ours has only later rows; ours takes the whole text, the paper 64 tokens of each of 100 texts; keys "
        "with fewer than `later` later rows are left out; with no causal order all other rows count as later",
        use="to count sink heads by the published threshold, and to find sinks that are not at the first position",
        misleads="a threshold hides how close a head is to it: read it beside sink_rate_mass",
        claims=("first_token_sink", "attention_calibration_sinks"),
    )
    test_params: ClassVar = ({}, {"threshold": 0.1, "later": 3})

    def needs(self) -> tuple[Reduction, ...]:
        return (ColumnMass(), Match("self"))

    def of_call(self, rows: Rows) -> Sums:
        mass = rows[ColumnMass()]
        return {"mass": mass} | others(mass, rows[Match("self")], rows.view.mask)

    def of_text(self, sums: Sums) -> dict[str, Float[Tensor, "batch heads"]]:
        a = importance(sums, self.later)
        candidate, sink = ~a.isnan(), a > self.threshold
        first = candidate & (sums["first"] > 0)
        told = torch.where(candidate.any(-1), 1.0, torch.nan)
        mass = (sums["mass"].double() * sink).sum(-1) / sums["rows"][..., 0]
        return {
            "sink_rate": (sink & first).sum(-1).double() / first.sum(-1),
            "sink_rate_anywhere": sink.any(-1) * told,
            "sink_rate_keys": sink.sum(-1) * told,
            "sink_rate_mass": mass * told,
        }

    def of_keys(self, sums: Sums) -> dict[str, Float[Tensor, "batch heads keys"]]:
        return {"sink_rate_importance": importance(sums, self.later)}
