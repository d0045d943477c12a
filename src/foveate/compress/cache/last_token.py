r"""Last token: keep what the newest row looks at.

s_j = mean over the heads of a layer of p_Nj
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from foveate.core.budget import Amount
from foveate.core.card import Card, Needs
from foveate.core.mechanism import Policy
from foveate.core.policy import Held
from foveate.core.reductions import Last, Reduction

__all__ = ["LastToken"]


@dataclass(frozen=True)
class LastToken(Policy):
    """Score each key by the weight that the last row gives it; all heads of a layer keep the same tokens.

    Args:
        budget: How many entries each KV head keeps.

    Example:
        The last row looks at full stops; all heads of the layer keep what it looks at.

        >>> import foveate
        >>> from foveate.compress import LastToken
        >>> from foveate.testing import handmade
        >>> text = "To be. Or not to be. Ask."
        >>> budget = foveate.Budget(8, sinks=1, recent=2, every=0)
        >>> policy = LastToken(budget)
        >>> with foveate.attach(handmade.model(), policy) as attached:
        ...     cache = attached.model(handmade.ids(text)).past_key_values
        >>> handmade.kept(cache, text, layer=1)["stop"]
        '·····. ············. ·sk.'
        >>> handmade.kept(cache, text, layer=1)["same"]
        '·····. ············. ·sk.'
    """

    budget: Amount = 0.25

    card: ClassVar = Card(
        title="Transformers are Multi-State RNNs",
        year=2024,
        family="kv cache",
        needs=Needs.QUERIES | Needs.KEYS | Needs.WEIGHTS,
        equation="s_j = mean over all heads of the layer of p_Nj",
        differs="entries are dropped every few tokens instead of at each; the budget's sinks and recent tokens stay",
        use="in decoding, where the last row says what is needed now",
        misleads="what no head needs at this very token is gone for good",
    )

    def needs(self) -> tuple[Reduction, ...]:
        return (Last(1),)

    def score(self, held: Held) -> Float[Tensor, "batch kv_heads key"]:
        mine = held.window(1)
        # heads that hold different tokens can only speak of their own
        if not bool((held.position == held.position[:, :1]).all()):
            return mine
        return mine.mean(1, keepdim=True).expand_as(mine)
