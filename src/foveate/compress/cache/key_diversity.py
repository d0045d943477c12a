r"""Key diversity: keep the keys that point away from the others.

a = mean_j k_j / ||k_j||,        s_j = -cos(k_j, a)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.budget import Amount
from foveate.core.card import Card, Needs
from foveate.core.mechanism import Policy
from foveate.core.policy import Held

__all__ = ["KeyDiversity"]

# no key is as short
TINY = 1e-12


@dataclass(frozen=True)
class KeyDiversity(Policy):
    """Score each key by how little it resembles the mean direction of the keys.

    Args:
        budget: How many entries each KV head keeps.

    Example:
        A letter that keeps coming back has the mean direction; the rare ones stay.

        >>> import foveate
        >>> from foveate.compress import KeyDiversity
        >>> from foveate.testing import handmade
        >>> text = "aaaabaaaacaaa"
        >>> budget = foveate.Budget(5, sinks=1, recent=1, every=0)
        >>> policy = KeyDiversity(budget)
        >>> with foveate.attach(handmade.model(), policy) as attached:
        ...     cache = attached.model(handmade.ids(text)).past_key_values
        >>> handmade.kept(cache, text, layer=1)["same"]
        '····b····c·aa'
    """

    budget: Amount = 0.25

    card: ClassVar = Card(
        title="KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in "
        "Resource-Constrained Environments",
        year=2025,
        family="kv cache",
        needs=Needs.KEYS,
        equation="a = mean of k_j / ||k_j||; s_j = -cos(k_j, a)",
        differs="a prompt that comes at once is scored once, the paper goes over it in blocks; feed it in chunks for "
        "the paper's form. The budget's sinks and recent tokens stay",
        use="when the question comes later: no query takes part, so nothing is tuned to the wrong one",
        misleads="distinct is not important: rare tokens stay even where nobody reads them",
    )

    def score(self, held: Held) -> Float[Tensor, "batch kv_heads key"]:
        # what is no entry may be anything, NaN too
        k = torch.where(held.there[..., None], held.k.float(), 0.0)
        length = k.norm(dim=-1).clamp_min(TINY)
        # the sum of the directions, without laying them out
        anchor = (1 / length)[:, :, None] @ k
        return -(k @ anchor.mT)[..., 0] / (length * anchor.norm(dim=-1).clamp_min(TINY))
