r"""Value-state drain: sink keys carry values of small norm.

    drain = \frac{mean_{k \in S} \lVert v_k \rVert}{mean_{k \notin S} \lVert v_k \rVert}

S is the first position of the text, or the head's own sink keys; the same for the norms of the keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core.card import Card, Needs
from foveate.core.params import bounded
from foveate.core.reductions import ColumnMass, Match, Reduction
from foveate.core.rows import Rows
from foveate.measure._per_key import KeyMetric, Sums, at_positions, importance, others

__all__ = ["ValueDrain"]


@dataclass(frozen=True)
class ValueDrain(KeyMetric):
    """Norm of the value at the first position, relative to the mean of the others (`value_drain`).

    The same for the norm of the key (`value_drain_key_norm`), and for the values at a head's own sink keys,
    wherever they are (`value_drain_sinks`, NaN for a head that has none). Heads that share keys and values
    share the first two.

    Args:
        threshold: Importance above which a key is a sink, as in `sink_rate`.
        later: Keys with fewer later rows are no sinks.

    Example:
        The head `first` looks at a token whose value is nothing, so that it adds nothing; to the other heads that
        token is like any other.

        >>> import foveate
        >>> from foveate.measure import ValueDrain
        >>> from foveate.testing import handmade
        >>> model = handmade.model()
        >>> with foveate.attach(model, ValueDrain()) as attached:
        ...     _ = model(handmade.ids("hello world, hello again"))
        >>> handmade.named(attached.results.heads, "value_drain")
        {'first': 0.0, 'previous': 1.0, 'self': 1.0, 'average': 1.0}
    """

    threshold: float = bounded(0.3, 0.0, 1.0)
    later: int = bounded(16, 1, 1 << 20)

    card: ClassVar = Card(
        title="Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs",
        year=2024,
        family="sinks",
        needs=Needs.WEIGHTS | Needs.KEYS | Needs.VALUES,
        equation="drain = mean of |v_k| over S / mean of |v_k| over the others",
        differs="the paper plots the norm of each value state; ours is one ratio per head. The key norms are "
        "not in the paper; they are taken with positions applied, as the model caches them",
        use="to tell a sink that does nothing (small value) from one that moves the output",
        misleads="a small value is still moved by a large weight: read it beside output_norm",
    )
    test_params: ClassVar = ({}, {"threshold": 0.1, "later": 3})

    def needs(self) -> tuple[Reduction, ...]:
        return (ColumnMass(), Match("self"))

    def of_call(self, rows: Rows) -> Sums:
        view, mask = rows.view, rows.view.mask
        # a call brings the keys of its own rows; those before came with earlier calls
        here = slice(int(mask.position[0]), int(mask.position[-1]) + 1)
        norm = {n: x[:, :, here].float().norm(dim=-1) for n, x in (("value", view.v), ("key", view.k))}
        placed = {n: at_positions(x, mask) for n, x in norm.items()}
        known = at_positions(torch.ones_like(norm["key"][:, :1]), mask)
        return placed | {"known": known} | others(rows[ColumnMass()], rows[Match("self")], mask)

    def of_text(self, sums: Sums) -> dict[str, Float[Tensor, "batch heads"]]:
        heads = sums["from_others"].shape[1]
        value, key = (sums[n].double().repeat_interleave(heads // sums[n].shape[1], 1) for n in ("value", "key"))
        known = (sums["known"] > 0).expand_as(value)
        first = (sums["first"] > 0).expand_as(value)
        sink = importance(sums, self.later) > self.threshold
        return {
            "value_drain": ratio(value, first, known),
            "value_drain_key_norm": ratio(key, first, known),
            "value_drain_sinks": ratio(value, sink, known),
        }


def ratio(
    norm: Float[Tensor, "batch heads keys"],
    inside: Bool[Tensor, "batch heads keys"],
    known: Bool[Tensor, "batch heads keys"],
) -> Float[Tensor, "batch heads"]:
    """Mean norm inside a set of keys over the mean norm outside; NaN where either side is empty."""
    means = []
    for part in (inside & known, ~inside & known):
        means.append(torch.where(part, norm, 0.0).sum(-1) / part.sum(-1))
    return means[0] / means[1]
