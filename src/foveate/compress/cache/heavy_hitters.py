r"""Heavy hitters: keep the keys that have received the most attention so far, and the recent ones.

s_j \leftarrow s_j + \sum_i p_ij        over the rows i since the last round
keep the recent half of the budget, and of the others those of largest s_j
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

__all__ = ["HeavyHitters"]


@dataclass(frozen=True)
class HeavyHitters(Policy):
    """Score each key by the attention that it has received, summed over all rows and the heads that read it.

    Args:
        budget: How many entries each KV head keeps.
        recent: Share of the budget for the last tokens.

    Example:
        The head that looks at full stops keeps them, wherever they stand; the one that looks for copies of a letter
        keeps letters that came back.

        >>> import foveate
        >>> from foveate.compress import HeavyHitters
        >>> from foveate.testing import handmade
        >>> text = "To be. Or not to be. Ask."
        >>> budget = foveate.Budget(8, sinks=1, recent=2, every=0)
        >>> policy = HeavyHitters(budget, recent=0.25)
        >>> with foveate.attach(handmade.model(), policy) as attached:
        ...     cache = attached.model(handmade.ids(text)).past_key_values
        >>> handmade.kept(cache, text, layer=1)["stop"]
        '·····.·············. Ask.'
        >>> handmade.kept(cache, text, layer=1)["same"]
        '·o ·e.······t··········k.'
    """

    budget: Amount = 0.25
    recent: float = bounded(0.5, 0.0, 1.0)

    card: ClassVar = Card(
        title="H$_2$O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
        year=2023,
        family="kv cache",
        needs=Needs.QUERIES | Needs.KEYS | Needs.WEIGHTS,
        equation="s_j = sum over rows i of p_ij; keep the recent tokens and the largest s_j",
        differs="the weights of the query heads that share a KV head are added up, which the paper has not; in "
        "decoding entries are dropped every few tokens instead of at each",
        use="as a strong default when the question may stand anywhere in the text",
        misleads="early keys have been seen by more rows and gain score for that alone",
        claims=("heavy_hitters_recency",),
    )
    test_params: ClassVar = ({}, {"recent": 0.0})

    def needs(self) -> tuple[Reduction, ...]:
        return (ColumnMass(),)

    def score(self, held: Held) -> Float[Tensor, "batch kv_heads key"]:
        return held.before + held.by_kv_head(held.rows[ColumnMass()]).sum(2)

    def pinned(self, held: Held) -> Bool[Tensor, "batch kv_heads key"]:
        return held.newest((self.recent * held.room[..., None]).long())
