r"""Key norm: keep the keys that are short.

    s_j = -||k_j||

Keys of small norm tend to receive much attention, so the norm alone ranks a cache without any query.
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

__all__ = ["KeyNorm"]


@dataclass(frozen=True)
class KeyNorm(Policy):
    """Score each key by its negative L2 norm.

    Args:
        budget: How many entries each KV head keeps.

    Example:
        In the induction head of this model the keys that follow a digit are longer, so they go first.

        >>> import foveate
        >>> from foveate.compress import KeyNorm
        >>> from foveate.testing import handmade
        >>> text = "in 1066 or in 1789 or now"
        >>> budget = foveate.Budget(16, sinks=0, recent=1, every=0)
        >>> policy = KeyNorm(budget)
        >>> with foveate.attach(handmade.model(), policy) as attached:
        ...     cache = attached.model(handmade.ids(text)).past_key_values
        >>> handmade.kept(cache, text, layer=1)["induction"]
        '·n ···· or in ···· or now'
    """

    budget: Amount = 0.25

    card: ClassVar = Card(
        title="A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
        year=2024,
        family="kv cache",
        needs=Needs.KEYS,
        equation="s_j = -||k_j||",
        differs="drops in all layers; the paper leaves the first layers of some models whole. The budget's sinks and "
        "recent tokens stay",
        use="where nothing but the keys may be read, and as a baseline that is cheap",
        misleads="in layers where the norm does not follow attention, it drops what is read most",
    )

    def score(self, held: Held) -> Float[Tensor, "batch kv_heads key"]:
        return -held.k.float().norm(dim=-1)
