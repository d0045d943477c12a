r"""Value norm: a key that is looked at matters as much as its value is large.

s_j \leftarrow s_j + \sum_i p_ij ||v_j||_1        over the rows i since the last round

A head's output is the sum of p_ij v_j, so attention to a value of nearly nothing moves nothing: most attention sinks
are of that kind, and the model needs them all the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core.budget import Amount
from foveate.core.card import Card, Needs
from foveate.core.mechanism import Policy
from foveate.core.params import bounded
from foveate.core.policy import Held
from foveate.core.reductions import ColumnMass, Reduction

__all__ = ["ValueNorm"]


@dataclass(frozen=True)
class ValueNorm(Policy):
    """Score each key by the attention that it has received, times the L1 norm of its value.

    Args:
        budget: How many entries each KV head keeps; its `sinks` stay whatever their values are.
        recent: Share of the budget for the last tokens.

    Example:
        All rows of the first head look at the first token, but its value is nothing: of what attention alone counts,
        no score is left.

        >>> import foveate
        >>> from foveate.compress import HeavyHitters
        >>> from foveate.compress import ValueNorm
        >>> from foveate.testing import handmade
        >>> text = "To be. Or not to be. Ask."
        >>> budget = foveate.Budget(8, sinks=1, recent=2, every=0)
        >>> for policy in (HeavyHitters(budget), ValueNorm(budget)):
        ...     with foveate.attach(handmade.model(), policy) as attached:
        ...         cache = attached.model(handmade.ids(text)).past_key_values
        ...     print(policy.name, round(float(cache.layers[1].store.score[0]), 2))
        heavy_hitters 26.0
        value_norm 0.0
    """

    budget: Amount = 0.25
    recent: float = bounded(0.5, 0.0, 1.0)

    card: ClassVar = Card(
        title="Attention Score is not All You Need for Token Importance Indicator in KV Cache Reduction: Value Also "
        "Matters",
        year=2024,
        family="kv cache",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES | Needs.WEIGHTS,
        equation="s_j = (sum over rows i of p_ij) ||v_j||_1; keep the first and the recent tokens and the largest s_j",
        differs="the paper's form on H2O scores, not the one on Scissorhands'; how many first tokens stay is the "
        "budget's `sinks`; the weights of the query heads that share a KV head are added up; in decoding entries are "
        "dropped every few tokens instead of at each",
        use="in place of heavy hitters where sinks stand in the middle of the text too",
        misleads="the norm is that of the value before the output projection, which may shrink what is large; early "
        "keys have been seen by more rows and gain score for that alone",
    )
    test_params: ClassVar = ({}, {"recent": 0.0})

    def needs(self) -> tuple[Reduction, ...]:
        return (ColumnMass(),)

    def score(self, held: Held) -> Float[Tensor, "batch kv_heads key"]:
        # what was added before has the norm in it
        received = held.by_kv_head(held.rows[ColumnMass()]).sum(2)
        return held.before + received * held.v.float().norm(p=1, dim=-1)

    def pinned(self, held: Held) -> Bool[Tensor, "batch kv_heads key"]:
        return held.newest((self.recent * held.room[..., None]).long())
