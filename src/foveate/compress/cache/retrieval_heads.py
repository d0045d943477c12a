r"""Retrieval heads: a full cache for the heads that look far back; of what the others drop, its mean stays.

    a KV head that is named                keeps everything
    any other                              keeps the sinks, the recent tokens, and one entry for those that it dropped:
                                           k = 1/n \sum_j k_j,  v = 1/n \sum_j v_j over the n dropped tokens,
                                           with the weight n exp(q k) in each row

The heads that look far back are found on random tokens said several times: those that weigh earlier copies of the
token most (echo heads) and those that weigh what followed the copies most (induction heads).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.compress.cache._kv_heads import names_kv_heads, some_kv_heads, whole_for, with_all
from foveate.compress.cache._repeated import repetition_scores
from foveate.core.budget import Amount, Budget
from foveate.core.card import Card, Needs
from foveate.core.errors import BadInput
from foveate.core.mechanism import Policy
from foveate.core.places import Head
from foveate.core.policy import Held, Merged

__all__ = ["RetrievalHeads", "top"]


@dataclass(frozen=True)
class RetrievalHeads(Policy):
    """Spares the KV heads that are named; the others keep both ends of the text, and the mean of what is between.

    The mean stands in the place of the first token behind the sinks, and takes in more in each later round. It is one
    of the entries of the budget; a budget of nothing but sinks and recent tokens has no room for it.

    Args:
        budget: How many entries each of the other KV heads keeps. Heads do not compete.
        heads: (layer, KV head) of those that keep everything; `fit` finds them.

    Example:
        The head that looks at full stops is spared. The others keep both ends, and where the first letter behind the
        sinks stood, the mean of the 18 that they drop and of itself.

        >>> import foveate
        >>> from foveate.compress import RetrievalHeads
        >>> from foveate.testing import handmade, tiny
        >>> text = "To be. Or not to be. Ask."
        >>> budget = foveate.Budget(8, sinks=1, recent=2, every=0)
        >>> policy = RetrievalHeads(budget, heads=((1, 3),))
        >>> with foveate.attach(handmade.model(), policy) as attached:
        ...     cache = attached.model(handmade.ids(text)).past_key_values
        >>> handmade.kept(cache, text, layer=1)["stop"]
        'To be. Or not to be. Ask.'
        >>> handmade.kept(cache, text, layer=1)["same"]
        'T··················. Ask.'
        >>> cache.layers[1].store.mass.max()
        tensor(19.)

        `fit` finds the heads that look for copies, and for what followed them.

        >>> found = RetrievalHeads.fit(handmade.model(), tiny.tokenizer(), tokens=12)
        >>> [handmade.HEADS[layer][head] for layer, head in found.heads]
        ['same', 'induction']
    """

    budget: Amount = 0.2
    heads: tuple[Head, ...] = some_kv_heads()

    card: ClassVar = Card(
        title="RazorAttention: Efficient KV Cache Compression Through Retrieval Heads",
        year=2024,
        family="kv cache",
        needs=Needs.KEYS | Needs.VALUES,
        equation="named heads keep all; others keep sinks, recent tokens and one entry (mean k_j, mean v_j) with the "
        "weight n exp(q k) for the n dropped tokens",
        differs="the recent window is what the budget leaves: the paper's, the larger of 4000 tokens and a fifth of the"
        " text, is about Budget(0.2, recent=4000). The entry for the dropped tokens stands at the position of "
        "the first of them, so that in layers with a sliding window it goes out of sight with that token. The "
        "heads of models with ALiBi are found by scores too, where the paper computes how far each can see. "
        "`fit` takes its shares (14 % induction, 1 % echo, at least one each) of the query heads, and keeps a "
        "KV head for any of them; published code takes them of the KV heads, by their best query head. It says "
        "512 tokens four times, not 2500, and no token twice in a round",
        use="to shrink the cache of a model with clear retrieval heads without knowing the question",
        misleads="where many query heads share a KV head, the top heads are spread over most of the KV heads, and "
        "little is left to drop",
        claims=("compensation",),
    )
    test_params: ClassVar = (
        {"heads": ((1, 1),)},
        {"heads": ((0, 0),), "budget": Budget(0.4, sinks=2, recent=3, every=3)},
    )

    @classmethod
    def fit(
        cls,
        model: Any,
        tokenizer: Any,
        *,
        induction: float = 0.14,
        echo: float = 0.01,
        tokens: int = 512,
        repeats: int = 4,
        seed: int = 0,
        budget: Amount = 0.2,
    ) -> RetrievalHeads:
        """Finds the heads that look far back, on random tokens said several times.

        Args:
            model: A causal language model.
            tokenizer: Its tokenizer.
            induction: Share of the query heads that are taken as induction heads; at least one unless it is 0.
            echo: Share of the query heads that are taken as echo heads; at least one unless it is 0.
            tokens: How many different tokens are said.
            repeats: How often they are said, in the same order.
            seed: Of the draw of the tokens.
            budget: How many entries each of the other KV heads keeps.

        Raises:
            BadInput: a share that is none, fewer than one token or two repeats, or more than the model can read.
        """
        for name, share in {"induction": induction, "echo": echo}.items():
            if not 0 <= share <= 1:
                raise BadInput(f"RetrievalHeads.fit({name}={share}): give a share of the heads, from 0 to 1")
        for name, number, least in (("tokens", tokens, 1), ("repeats", repeats, 2)):
            if number < least:
                raise BadInput(f"RetrievalHeads.fit({name}={number}): give at least {least}")
        scores, kv_heads = repetition_scores(model, tokenizer, tokens, repeats, seed)
        chosen = top(scores["induction"], induction) | top(scores["echo"], echo)
        counts = {layer: 1 + max(head for at, head in scores["echo"] if at == layer) for layer in kv_heads}
        shared = {(layer, head * kv_heads[layer] // counts[layer]) for layer, head in chosen}
        return cls(budget, tuple(sorted(shared)))

    @cached_property
    def limits(self) -> Budget:
        """The budget, with all tokens for the heads that are spared."""
        return whole_for(self.heads, Budget.of(self.budget))

    def counts(
        self, seen: Int[Tensor, " batch"], layer: int, layers: int, kv_heads: int, entry_bytes: int
    ) -> Int[Tensor, "batch kv_heads"]:
        named = names_kv_heads("RetrievalHeads(heads=…)", self.heads, layer, layers, kv_heads)
        return with_all(self.limits.counts(seen, layer, layers, kv_heads, entry_bytes), named, seen)

    def score(self, held: Held) -> Float[Tensor, "batch kv_heads key"]:
        return held.position.to(held.before.dtype)

    def pinned(self, held: Held) -> Bool[Tensor, "batch kv_heads key"]:
        # where there is room for no more than what the budget pins, the sinks would have to go for it
        room = held.room[..., None] > self.limits.sinks + self.limits.recent
        return self.behind_the_sinks(held) & room

    def behind_the_sinks(self, held: Held) -> Bool[Tensor, "batch kv_heads key"]:
        """The entry that takes in those that go: the first one behind the sinks."""
        return held.there & (held.there.cumsum(-1) == self.limits.sinks + 1)

    def merge(self, held: Held, keep: Bool[Tensor, "batch kv_heads key"]) -> Merged:
        mass = torch.ones_like(held.before) if held.mass is None else held.mass
        place = self.behind_the_sinks(held) & keep
        gone = held.there & ~keep & place.any(-1, keepdim=True)
        place &= gone.any(-1, keepdim=True)
        among = gone | place
        # what is no entry may be anything, NaN too
        n = torch.where(among, mass, 0.0)
        total = n.sum(-1, keepdim=True)

        def mean(x: Float[Tensor, "batch kv_heads key width"]) -> Float[Tensor, "batch kv_heads 1 width"]:
            weighted = torch.where(among[..., None], x.float(), 0.0) * n[..., None]
            return weighted.sum(2, keepdim=True) / total.clamp_min(1.0)[..., None]

        at = place[..., None]
        return Merged(
            torch.where(at, mean(held.k), held.k.float()),
            torch.where(at, mean(held.v), held.v.float()),
            torch.where(place, total, mass),
        )


def top(scores: dict[Head, float], share: float) -> set[Head]:
    """The heads of largest score; at least one unless the share is 0."""
    count = max(1, round(share * len(scores))) if share > 0 else 0
    return set(sorted(scores, key=lambda at: -scores[at])[:count])
