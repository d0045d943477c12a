"""Learning a gate for each KV head: how much of its far past the answers need, the model frozen."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import DynamicCache

from foveate.core.attach import attach
from foveate.core.errors import BadInput
from foveate.core.mechanism import Edit
from foveate.core.recording import frozen
from foveate.core.rows import RowBlock
from foveate.probe import default_text

__all__ = ["Lesson", "Mixed", "Text", "made_text"]

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
WORDS = (
    "alpha",
    "bravo",
    "charlie",
    "delta",
    "echo",
    "foxtrot",
    "golf",
    "hotel",
    "india",
    "juliett",
    "kilo",
    "lima",
    "mike",
    "november",
    "oscar",
    "papa",
    "quebec",
    "romeo",
    "sierra",
    "tango",
    "uniform",
    "victor",
    "whiskey",
    "xray",
    "yankee",
    "zulu",
)


@dataclass(frozen=True, eq=False)
class Mixed(Edit):
    """alpha times the weights, and 1 - alpha times the weights that sinks and recent tokens have when alone.

    Args:
        sinks: First tokens of a text that are never out of sight.
        recent: Last tokens that are never out of sight, the row's own among them.
        gates: alpha of each KV head, by layer; a layer that comes by for the first time gets ones.
    """

    sinks: int = 0
    recent: int = 1
    gates: dict[int, Float[Tensor, " kv_heads"]] = field(default_factory=dict)

    def edit(
        self, block: RowBlock, weights: Float[Tensor, "batch heads rows keys"]
    ) -> Float[Tensor, "batch heads rows keys"]:
        view = block.view
        if view.layer.cross:
            return weights
        layer = view.layer.index
        if layer not in self.gates:
            self.gates[layer] = torch.ones(view.kv_heads, device=weights.device, requires_grad=True)
        place = view.mask.key_place[:, None, None, block.first : block.last]
        near = (place < self.sinks) | (block.distance < self.recent)
        alone = torch.where(near, weights, 0.0)
        whole = alone.sum(-1, keepdim=True)
        if view.sinks is not None:
            # what a learned sink takes stays in the sum
            whole = whole + (1 - weights.sum(-1, keepdim=True)).clamp_min(0.0)
        alone = alone / whole.clamp_min(torch.finfo(weights.dtype).tiny)
        alpha = self.gates[layer].repeat_interleave(view.grouped)[:, None, None]
        return alpha * weights + (1 - alpha) * alone


@dataclass(frozen=True)
class Text:
    """A text with pass keys in it, and the same pass keys asked for behind it.

    Args:
        context: Tokens of the text.
        asked: Tokens of the questions with their answers.
        rows: Which of `asked` stand before a token of an answer: what they give is what must not change.
    """

    context: tuple[int, ...]
    asked: tuple[int, ...]
    rows: tuple[int, ...]


def made_text(tokenizer: Any, length: int, keys: int, words: int, rng: random.Random) -> Text:
    """One text.

    Args:
        tokenizer: The model's tokenizer.
        length: Tokens of the context.
        keys: Pass keys in it, at random places.
        words: Words of each.
        rng: Where words and places come from.

    Raises:
        BadInput: the pass keys alone are longer than that.
    """

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    secrets = [ids("".join(f" {rng.choice(WORDS)}" for _ in range(words))) for _ in range(keys)]
    leads = [ids(f"\n\nThe {ordinal} secret pass key is:") for ordinal in ORDINALS[:keys]]
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    bare = len(begin) + sum(map(len, secrets)) + sum(map(len, leads))
    if bare >= length:
        raise BadInput(
            f"a text of length={length} cannot hold {keys} pass keys, which take {bare} tokens by themselves"
        )
    text = default_text()
    start = rng.randrange(len(text))
    filling = ids((text[start:] + text[:start])[: 16 * length])[: length - bare]
    cuts = sorted(rng.randrange(len(filling) + 1) for _ in range(keys))
    context, asked, done = list(begin), list[int](), 0
    rows: list[int] = []
    for cut, lead, secret in zip(cuts, leads, secrets, strict=True):
        context += filling[done:cut] + lead + secret
        done = cut
        asked += lead
        rows += range(len(asked) - 1, len(asked) - 1 + len(secret))
        asked += secret
    return Text(tuple(context + filling[done:]), tuple(asked), tuple(rows))


@dataclass(frozen=True)
class Lesson:
    """What gates are learned from, and how.

    Args:
        model: The model.
        texts: What it reads.
        steps: Steps of gradient descent, one text each.
        rate: Learning rate; it rises over the first fifth of the steps and falls over the last.
        l1: Weight of the mean gate, beside the loss.
        seed: Of the order of the texts.
    """

    model: Any
    texts: tuple[Text, ...]
    steps: int
    rate: float
    l1: float
    seed: int

    def learn(self, edit: Mixed, step: Callable[[int], None]) -> None:
        """Moves the gates of an edit down the distance of the last hidden states from the full model's.

        Each text is read once by the full model; what is learned is how the rows of the questions and answers are to
        look back at it.
        """
        with frozen(self.model):
            before = [self.read(text) for text in self.texts]
            with attach(self.model, edit, trial=False), torch.no_grad():
                self.states(self.texts[0], before[0][0])
            gates = list(edit.gates.values())
            optimizer = torch.optim.AdamW(gates, lr=self.rate, weight_decay=0.0)
            fifth = max(1, self.steps // 5)
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda n: min(1.0, max((n + 1) / fifth, 0.1), max((self.steps - n) / fifth, 0.1))
            )
            rng, order = random.Random(self.seed), list[int]()
            with attach(self.model, edit, trial=False):
                for n in range(self.steps):
                    if not order:
                        order = list(range(len(self.texts)))
                        rng.shuffle(order)
                    at = order.pop()
                    cache, wanted = before[at]
                    given = self.states(self.texts[at], cache)
                    apart = (given - wanted).square().sum() / wanted.square().sum()
                    (apart + self.l1 * torch.cat(gates).mean()).backward(inputs=gates)
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()
                    with torch.no_grad():
                        for gate in gates:
                            gate.clamp_(0.0, 1.0)
                    step(n + 1)

    @torch.no_grad()
    def read(self, text: Text) -> tuple[DynamicCache, Float[Tensor, "rows width"]]:
        """The full model's cache behind the context, and its last hidden states where answers are given."""
        cache = DynamicCache(config=self.model.config)
        self.model.base_model(
            input_ids=torch.tensor([text.context], device=self.model.device), past_key_values=cache, use_cache=True
        )
        return cache, self.states(text, cache)

    def states(self, text: Text, cache: DynamicCache) -> Float[Tensor, "rows width"]:
        """The last hidden states of the rows before an answer's tokens, from a cache that stays as it is."""
        out = self.model.base_model(
            input_ids=torch.tensor([text.asked], device=self.model.device),
            past_key_values=copy.deepcopy(cache),
            use_cache=True,
        )
        return out.last_hidden_state[0, list(text.rows)].float()
