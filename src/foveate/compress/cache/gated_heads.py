r"""Gated heads: which heads need the whole text is learned; the others keep both ends of it.

    o_h = \alpha_h full_h + (1 - \alpha_h) streaming_h        streaming: the sinks and the recent tokens alone
    L   = || H - H' ||^2 / || H ||^2 + l1 mean_h \alpha_h     H, H': last hidden states of the full and the mixed model

A KV head with alpha_h above the threshold keeps everything, any other the sinks and the recent tokens. The gates are
learned on pass keys that stand in a text and are asked for behind it, by the hidden states that give the answers.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from foveate.compress.cache._gates import ORDINALS, Lesson, Mixed, made_text
from foveate.compress.cache._kv_heads import names_kv_heads, whole_for, with_all
from foveate.core.budget import Amount, Budget
from foveate.core.card import Card, Needs
from foveate.core.errors import BadInput
from foveate.core.mechanism import Policy
from foveate.core.params import bounded
from foveate.core.places import Head, Value, values_of
from foveate.core.policy import Held

__all__ = ["GatedHeads"]

# 64 sinks, 256 recent tokens, and room for those that come between two rounds of dropping
BOTH_ENDS = Budget(335, sinks=64, recent=256)


@dataclass(frozen=True)
class GatedHeads(Policy):
    """Spares the KV heads whose gate is above a threshold; the others keep the first tokens and the recent ones.

    Args:
        budget: How many entries each of the other KV heads keeps. Heads do not compete.
        gates: (layer, KV head, gate) for each KV head; `fit` learns them. One without a gate has 0.
        threshold: A KV head whose gate is above it keeps everything.

    Example:
        Gates above a half spare two of the heads.

        >>> import foveate
        >>> from foveate.compress import GatedHeads
        >>> from foveate.testing import handmade
        >>> text = "To be. Or not to be. Ask."
        >>> budget = foveate.Budget(8, sinks=2, recent=2, every=0)
        >>> gates = ((1, 1, 0.4), (1, 2, 0.7), (1, 3, 0.9))
        >>> policy = GatedHeads(budget, gates)
        >>> with foveate.attach(handmade.model(), policy) as attached:
        ...     cache = attached.model(handmade.ids(text)).past_key_values
        >>> handmade.kept(cache, text, layer=1)["stop"]
        'To be. Or not to be. Ask.'
        >>> handmade.kept(cache, text, layer=1)["same"]
        'T··················. Ask.'
        >>> policy.keeping(1 / 3).spared
        ((1, 3),)
    """

    budget: Amount = BOTH_ENDS
    gates: tuple[Value, ...] = values_of(0.0, 1.0)
    threshold: float = bounded(0.5, 0.0, 1.0)

    card: ClassVar = Card(
        title="DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
        year=2024,
        family="kv cache",
        needs=Needs.KEYS | Needs.MODEL | Needs.GRADIENTS | Needs.TRAINING,
        equation="o_h = alpha_h full_h + (1 - alpha_h) streaming_h; keep all where alpha_h > threshold, else sinks and "
        "recent tokens",
        differs="a text is read by the full model and only the rows of questions and answers are mixed, as here a "
        "prompt that comes at once attends to all of itself before entries are dropped; in the paper all rows "
        "are. The distance of hidden states is a share of their size, taken in the rows that give an answer's "
        "tokens (published code: at the tokens of questions and answers), and the penalty is on the mean gate; "
        "the paper's is on their sum, with 0.05. `fit` is small: 150 steps on 8 texts of 1024 tokens with 5 "
        "pass keys of 8 words; published code takes 1000 steps and more on texts of thousands of tokens with 10"
        " of 32 words. In decoding entries are dropped every few tokens instead of at each",
        use="where a few minutes of fitting are worth a cache that keeps far recall",
        misleads="gates learned on pass keys spare the heads that copy; what else heads look far back for is not seen",
        claims=("sparing_heads", "learned_gates"),
    )
    test_params: ClassVar = (
        {"gates": ((0, 1, 0.9), (1, 0, 0.2))},
        {"gates": ((1, 0, 0.4), (1, 1, 0.1)), "threshold": 0.3},
    )

    @classmethod
    def fit(
        cls,
        model: Any,
        tokenizer: Any,
        *,
        sinks: int = 64,
        recent: int = 256,
        steps: int = 150,
        texts: int = 8,
        length: int = 1024,
        keys: int = 5,
        words: int = 8,
        rate: float = 0.05,
        l1: float = 0.05,
        seed: int = 0,
        budget: Amount | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> GatedHeads:
        """Learns the gates. The model is frozen meanwhile, and comes out as it went in.

        Args:
            model: A causal language model.
            tokenizer: Its tokenizer.
            sinks: First tokens that a streaming head sees.
            recent: Last tokens that a streaming head sees.
            steps: Steps of gradient descent.
            texts: Texts to learn from.
            length: Tokens of each.
            keys: Pass keys in each.
            words: Words of each pass key.
            rate: Learning rate.
            l1: Weight of the mean gate, beside the loss.
            seed: Of the texts and their order; the same seed gives the same gates.
            budget: How many entries the streaming heads keep; None: `sinks` and `recent`, with room for the tokens
                between two rounds of dropping.
            progress: Called with the steps done and all steps.

        Raises:
            BadInput: a number that cannot be, or texts that cannot hold their pass keys.
        """
        least = {"steps": steps, "texts": texts, "keys": keys, "words": words, "recent": recent}
        for name, number in least.items():
            if number < 1:
                raise BadInput(f"GatedHeads.fit({name}={number}): give at least 1")
        if keys > len(ORDINALS):
            raise BadInput(f"GatedHeads.fit(keys={keys}): give at most {len(ORDINALS)}")
        if min(sinks, rate, l1) < 0:
            raise BadInput(f"GatedHeads.fit(sinks={sinks}, rate={rate}, l1={l1}): these must not be negative")
        rng = random.Random(seed)
        made = tuple(made_text(tokenizer, length, keys, words, rng) for _ in range(texts))
        edit = Mixed(sinks, recent)
        Lesson(model, made, steps, rate, l1, seed).learn(edit, lambda n: progress(n, steps) if progress else None)
        if budget is None:
            usual = Budget()
            budget = Budget(sinks + recent + usual.waiting, sinks=sinks, recent=recent)
        gates = {layer: alpha.detach().tolist() for layer, alpha in edit.gates.items()}
        return cls(
            budget, tuple((layer, head, g) for layer, own in sorted(gates.items()) for head, g in enumerate(own))
        )

    def keeping(self, share: float) -> GatedHeads:
        """The same gates with the threshold at which this share of the KV heads keeps everything.

        Fewer do where gates are equal.

        Raises:
            BadInput: no share, or there are no gates.
        """
        if not 0 <= share <= 1 or not self.gates:
            what = "there are no gates; `fit` learns them" if not self.gates else "give a share from 0 to 1"
            raise BadInput(f"GatedHeads.keeping({share}): {what}")
        ranked = sorted((gate for *_, gate in self.gates), reverse=True)
        count = round(share * len(ranked))
        return replace(self, threshold=float(ranked[count]) if count < len(ranked) else 0.0)

    @cached_property
    def spared(self) -> tuple[Head, ...]:
        """The KV heads that keep everything."""
        return tuple((layer, head) for layer, head, gate in self.gates if gate > self.threshold)

    @cached_property
    def limits(self) -> Budget:
        """The budget, with all tokens for the heads that are spared."""
        return whole_for(self.spared, Budget.of(self.budget))

    def counts(
        self, seen: Int[Tensor, " batch"], layer: int, layers: int, kv_heads: int, entry_bytes: int
    ) -> Int[Tensor, "batch kv_heads"]:
        named = [(at, head) for at, head, _ in self.gates]
        names_kv_heads("GatedHeads(gates=…)", named, layer, layers, kv_heads)
        mine = [head for at, head in self.spared if at == layer]
        return with_all(self.limits.counts(seen, layer, layers, kv_heads, entry_bytes), mine, seen)

    def score(self, held: Held) -> Float[Tensor, "batch kv_heads key"]:
        return held.position.to(held.before.dtype)
