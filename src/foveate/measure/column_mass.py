r"""Column mass: what each key receives, and how much of it the heaviest keys hold.

    c_k = \frac{1}{n} \sum_i p_ik,        share_x = \frac{\sum_{k \in top x %} c_k}{\sum_k c_k}

with n the number of real rows. Keys of large c_k are the heavy hitters; c_k is the attention concentration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core import reductions
from foveate.core.card import Card, Needs
from foveate.core.reductions import Reduction
from foveate.core.rows import Rows
from foveate.measure._per_key import KeyMetric, Sums

__all__ = ["ColumnMass"]

TOP = (5, 20)


@dataclass(frozen=True)
class ColumnMass(KeyMetric):
    """Share of a head's mass on its top 5 % and 20 % of keys (`column_mass_top5`, `column_mass_top20`).

    The number of top keys is rounded up. Several texts are averaged. Per key: the mean mass (`column_mass`).

    Example:
        Of 20 keys the top 5 % are one key. It has all the mass of a head that always looks at the first token, and
        a 20th of that of a head whose rows look at themselves.

        >>> import foveate
        >>> from foveate.measure import ColumnMass
        >>> from foveate.testing import handmade
        >>> model = handmade.model()
        >>> with foveate.attach(model, ColumnMass()) as attached:
        ...     _ = model(handmade.ids("nineteen characters"))
        >>> handmade.named(attached.results.heads, "column_mass_top5")
        {'first': 1.0, 'previous': 0.1, 'self': 0.05, 'average': 0.18}
        >>> keys = attached.results.keys.query("layer == 0 and head == 0")
        >>> keys.value.head(3).round(2).tolist()
        [1.0, 0.0, 0.0]
    """

    card: ClassVar = Card(
        title="H$_2$O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
        year=2023,
        family="concentration",
        needs=Needs.WEIGHTS,
        equation="c_k = sum_i p_ik / n; share_x = sum of the top x % of c_k / sum of all c_k",
        differs="sums over all rows of the finished text; the paper adds up greedily among the keys still "
        "kept, while it decodes. RSQ's attention concentration is the sum of c_k over heads",
        use="to see whether few keys carry a head, before dropping the others from a cache",
        misleads="under a causal mask early keys are seen by more rows and gain mass for that alone",
        claims=("heavy_hitters",),
    )

    def needs(self) -> tuple[Reduction, ...]:
        return (reductions.ColumnMass(),)

    def of_call(self, rows: Rows) -> Sums:
        return {"mass": rows[reductions.ColumnMass()]}

    def of_text(self, sums: Sums) -> dict[str, Float[Tensor, "batch heads"]]:
        seen = (sums["watchers"] > 0).expand_as(sums["mass"])
        down = torch.where(seen, sums["mass"].double(), 0.0).sort(-1, descending=True).values.cumsum(-1)
        keys = seen.sum(-1, keepdim=True)
        shares = {}
        for x in TOP:
            top = -(-keys * x // 100)
            shares[f"column_mass_top{x}"] = (down.gather(-1, (top - 1).clamp_min(0)) / down[..., -1:])[..., 0]
        return shares

    def of_keys(self, sums: Sums) -> dict[str, Float[Tensor, "batch heads keys"]]:
        seen = sums["watchers"] > 0
        return {"column_mass": torch.where(seen, sums["mass"].double() / sums["rows"], torch.nan)}
