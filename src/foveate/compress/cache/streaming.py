r"""Streaming: keep the first tokens, which soak up attention, and the recent ones.

    keep j  if  j < sinks  or  j >= N - (budget - sinks)

What a row looks at in between is lost, whatever it says; the sinks keep the softmax in the state that it was trained
for.
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

__all__ = ["Streaming"]


@dataclass(frozen=True)
class Streaming(Policy):
    """Score each key by its position; the budget's `sinks` first tokens always stay.

    Args:
        budget: How many entries each KV head keeps.

    Example:
        Both ends stay, the same for every head.

        >>> import foveate
        >>> from foveate.compress import Streaming
        >>> from foveate.testing import handmade
        >>> text = "To be. Or not to be. Ask."
        >>> budget = foveate.Budget(8, sinks=3, recent=2, every=0)
        >>> policy = Streaming(budget)
        >>> with foveate.attach(handmade.model(), policy) as attached:
        ...     cache = attached.model(handmade.ids(text)).past_key_values
        >>> handmade.kept(cache, text, layer=1)["stop"]
        'To·················· Ask.'
        >>> handmade.kept(cache, text, layer=1)["same"]
        'To·················· Ask.'
    """

    budget: Amount = 0.25

    card: ClassVar = Card(
        title="Efficient Streaming Language Models with Attention Sinks",
        year=2023,
        family="kv cache",
        needs=Needs.KEYS,
        equation="s_j = j; keep the sinks and the largest s_j",
        differs="keys keep the rotary positions that they were stored with; the paper counts positions inside of the "
        "cache, which a stream longer than the model's positions needs",
        use="as the baseline that costs nothing, and for heads that are local",
        misleads="it answers nothing that stands before the window",
    )

    def score(self, held: Held) -> Float[Tensor, "batch kv_heads key"]:
        return held.position.to(held.before.dtype)
