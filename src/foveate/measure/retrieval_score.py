r"""Retrieval score: which heads copy an answer out of the context.

    hit_t   = argmax_j p_tj                    in the row that makes token g_t, one row per decoded token
    score_h = | { hit_t : a <= hit_t < b and x_{hit_t} = g_t } | / (b - a)

Keys a..b hold the needle, a random number that stands once in a real text; x are the tokens of the prompt. A head
scores when the key that it weighs most is a token of the needle and is the very token that the model then says.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.core.accumulate import Estimate, batch_means
from foveate.core.attach import attach
from foveate.core.card import Card, Needs
from foveate.core.errors import BadInput, NotSupported
from foveate.core.mechanism import ModelMetric
from foveate.core.params import bounded
from foveate.core.reductions import Sample
from foveate.core.results import HEAD_COLUMNS
from foveate.core.rows import Rows
from foveate.measure._watch import Watch, seen

__all__ = ["Needle", "RetrievalScore", "answer", "control", "make_needle", "score_of", "span_of"]

THRESHOLD = 0.1
DRAWS = 1000
PLACES = ("Lisbon", "Cairo", "Oslo", "Lima", "Kyoto", "Dublin", "Quito", "Riga", "Accra", "Hanoi", "Boston", "Madrid")
DIGITS = 7


@dataclass(frozen=True)
class RetrievalScore(ModelMetric):
    """Mean retrieval score of each head.

    `retrieval_score` comes with

    - `retrieval_score_mass`: mean mass on the needle in the rows that make its tokens;
    - `retrieval_score_answered`: share of the samples that the model answered, the same for all heads;
    - `retrieval_score_control`: mean score of as many random heads as there are with a score of 0.1 or more, the same
      for all heads, with the range of 95 % of the draws.

    Samples that the model does not answer are left out of the means. If it answers none, the means run over all
    samples, and `retrieval_score_answered` is 0: the scores are then about wrong answers.

    Args:
        length: Tokens of the prompt, roughly.
        samples: Number of prompts, each with its own text, number and depth of the needle.
        seed: Where texts, numbers and depths come from.

    Raises:
        BadInput: the needle is not found again among the prompt's tokens, or the prompt is too long for the model.
        NotSupported: the model does not generate with a KV cache.

    Example:
        An induction head that prefers digits finds the number, digit after digit, and the model says it.

        >>> from foveate.measure import RetrievalScore
        >>> from foveate.testing import handmade, tiny
        >>> model, tokenizer = handmade.model(positions=320), tiny.tokenizer()
        >>> table = RetrievalScore(length=96, samples=3).measure(model, tokenizer)
        >>> handmade.named(table, "retrieval_score", layer=1)
        {'first': 0.0, 'same': 0.0, 'induction': 1.0, 'stop': 0.0}
        >>> answered = handmade.named(table, "retrieval_score_answered", layer=1)
        >>> answered["induction"] > 0
        True
    """

    length: int = bounded(512, 96, 1 << 20)
    samples: int = bounded(10, 2, 10_000)
    seed: int = bounded(0, 0, (1 << 31) - 1)

    card: ClassVar = Card(
        title="Retrieval Head Mechanistically Explains Long-Context Factuality",
        year=2024,
        family="heads",
        needs=Needs.MODEL | Needs.WEIGHTS | Needs.TOKENS,
        equation="score = |{hit_t : a <= hit_t < b, x_hit_t = g_t}| / (b - a), hit_t = argmax_j p_tj",
        differs="each needle token counts once, as the score is defined; the published code counts repeats again. "
        "The needle is a random number, not a sentence, in Python's documentation instead of essays; the answer begins "
        "with the words of the needle, so that small models give it at once; decoding stops after the answer's length; "
        "an answer must be whole, not overlap by half",
        use="to find the heads that long-context recall stands on, and that a compressed cache must spare",
        misleads="a head that finds the needle without copying from it scores 0; read retrieval_score_answered first",
        claims=("retrieval_heads",),
    )
    test_params: ClassVar = ({"length": 128, "samples": 2}, {"length": 96, "samples": 2, "seed": 7})

    def measure(self, model: nn.Module, tokenizer: Any) -> pd.DataFrame:
        scores, masses, answered = [], [], []
        for n in range(self.samples):
            needle = make_needle(tokenizer, self.length, (n + 0.5) / self.samples, self.seed * 10_007 + n)
            said, top, mass = answer(model, needle)
            scores.append({at: score_of(t, said, needle) for at, t in top.items()})
            rows = torch.tensor([g in needle.tokens for g in said])
            masses.append({at: m[rows if rows.any() else ~rows].mean(0) for at, m in mass.items()})
            answered.append(needle.answer in tokenizer.decode(said))

        kept = [n for n in range(self.samples) if answered[n] or not any(answered)]
        tables = [
            frame(label, at, mean_of(torch.stack([values[n][at] for n in kept], 1)))
            for label, values in (("retrieval_score", scores), ("retrieval_score_mass", masses))
            for at in scores[0]
        ]
        table = pd.concat(tables, ignore_index=True)
        whole = {
            "retrieval_score_answered": wilson(sum(answered), self.samples),
            "retrieval_score_control": control(table, seed=self.seed),
        }
        heads = table[table.metric == "retrieval_score"]
        for label, (value, low, high) in whole.items():
            same = heads.assign(metric=label, value=value, low=low, high=high)
            table = pd.concat([table, same], ignore_index=True)
        return table[HEAD_COLUMNS]


@dataclass(frozen=True, eq=False)
class Needle:
    """A prompt whose answer stands at one place in it.

    Args:
        ids: Tokens of the prompt.
        start: First token of the answer in the prompt.
        stop: One past its last token.
        answer: What the model should say.
    """

    ids: Int[Tensor, "1 length"]
    start: int
    stop: int
    answer: str

    @property
    def tokens(self) -> list[int]:
        return self.ids[0, self.start : self.stop].tolist()


def make_needle(tokenizer: Any, length: int, depth: float, seed: int) -> Needle:
    """A question about a number that stands at `depth` (0 is the beginning) of a text of about `length` tokens."""
    from pydoc_data.topics import topics

    draw = random.Random(seed)
    words = " ".join(topics[name] for name in sorted(topics)).split()
    # distinct digits: a copied digit then says where it was copied from
    number = "".join(draw.sample("0123456789", DIGITS))
    fact = f"The magic number of {draw.choice(PLACES)} is"
    question = f"What is the magic number of {fact.split()[-2]}?"

    def prompt(filler: list[str]) -> tuple[str, bool]:
        at = int(depth * len(filler))
        # at the next end of a sentence, if there is one not far away
        at = next((n for n in range(at, min(at + 40, len(filler))) if filler[n - 1].endswith(".")), at)
        text = " ".join([*filler[:at], f"{fact} {number}.", *filler[at:]])
        if getattr(tokenizer, "chat_template", None):
            turn = [{"role": "user", "content": f"{text}\n\n{question}"}]
            return f"{tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)}{fact}", False
        return f"{text}\n\nQuestion: {question}\nAnswer: {fact}", True

    def ids(filler: list[str]) -> list[int]:
        text, special = prompt(filler)
        return tokenizer(text, add_special_tokens=special)["input_ids"]

    start = draw.randrange(max(1, len(words) - length))
    filler = words[start : start + length]
    per_word = len(tokenizer(" ".join(filler), add_special_tokens=False)["input_ids"]) / len(filler)
    filler = filler[: max(8, int((length - len(ids([]))) / per_word))]
    found = ids(filler)
    return Needle(torch.tensor([found]), *span_of(tokenizer, found, number), number)


def span_of(tokenizer: Any, ids: list[int], answer: str) -> tuple[int, int]:
    """Where the answer stands among the tokens of the prompt.

    Raises:
        BadInput: nowhere; a score would silently be 0.
    """
    for text in (f" {answer}", answer):
        wanted = [t for t in tokenizer(text, add_special_tokens=False)["input_ids"] if tokenizer.decode([t]).strip()]
        for n in range(len(ids) - len(wanted) + 1):
            # the text is compared too: a tokenizer that knows no digits would match unknown tokens to each other
            same = wanted and ids[n : n + len(wanted)] == wanted
            if same and "".join(tokenizer.decode(wanted).split()) == answer:
                return n, n + len(wanted)
    raise BadInput(
        f"the needle {answer!r} is not found among the {len(ids)} tokens of the prompt, so hits cannot be told; this "
        f"tokenizer ({type(tokenizer).__name__}) cuts the prompt or does not write numbers"
    )


@torch.no_grad()
def answer(
    model: Any, needle: Needle
) -> tuple[list[int], dict[int, Int[Tensor, "steps heads"]], dict[int, Float[Tensor, "steps heads"]]]:
    """Greedy answer, and per layer each decode row's strongest key and mass on the needle.

    Raises:
        BadInput: the prompt is longer than the model's positions.
        NotSupported: the model gives no KV cache.
    """
    ids = needle.ids.to(next(model.parameters()).device)
    steps = needle.stop - needle.start + 2
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and ids.shape[1] + steps > most:
        raise BadInput(
            f"a prompt of {ids.shape[1]} tokens and {steps} to answer; the model has {most} positions: lower length"
        )
    if not model.can_generate() or getattr(model.config, "is_encoder_decoder", False):
        raise NotSupported(f"{type(model).__name__} does not continue a prompt; the retrieval score needs a causal LM")

    def read(rows: Rows) -> tuple[Tensor, Tensor] | None:
        if rows.layer.cross:
            return None
        p, offset = rows[Sample(1)].weights[0, :, 0], rows.view.mask.key_offset
        # a sliding cache has dropped the keys before `offset`
        first, last = max(0, needle.start - offset), max(0, needle.stop - offset)
        return (p.argmax(-1) + offset).cpu(), p[:, first:last].sum(-1).double().cpu()

    # the last token of the prompt is decoded too: its row makes the first token of the answer
    cache = model.base_model(input_ids=ids[:, :-1], use_cache=True).get("past_key_values")
    if cache is None:
        raise NotSupported(f"{type(model).__name__} returns no KV cache; the retrieval score reads decode rows")
    token, said = ids[:, -1:], []
    with attach(model, Watch(read, (Sample(1),))) as attached:
        for _ in range(steps):
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            said.append(int(token))
        layers = {at: calls for at, calls in seen(attached).items() if None not in calls}
    top = {at: torch.stack([t for t, _ in calls]) for at, calls in layers.items()}
    mass = {at: torch.stack([m for _, m in calls]) for at, calls in layers.items()}
    return said, top, mass


def score_of(top: Int[Tensor, "steps heads"], said: list[int], needle: Needle) -> Float[Tensor, " heads"]:
    """Share of the needle's tokens that each head copied."""
    hit = torch.zeros(needle.ids.shape[1] + len(said) + 1, top.shape[1], dtype=torch.bool)
    x = needle.ids[0].cpu()
    for keys, token in zip(top, said, strict=True):
        inside = (keys >= needle.start) & (keys < needle.stop)
        copied = inside & (x[keys.clamp(max=len(x) - 1)] == token)
        hit[keys[copied], copied.nonzero().flatten()] = True
    return hit.sum(0).double() / (needle.stop - needle.start)


def control(
    table: pd.DataFrame, seed: int = 0, threshold: float = THRESHOLD, draws: int = DRAWS
) -> tuple[float, float, float]:
    """Mean score of as many random heads as reach the threshold, drawn from all, with the middle 95 % of the draws."""
    scores = table.loc[table.metric == "retrieval_score", "value"].to_numpy()
    count = max(1, int((scores >= threshold).sum()))
    rng = np.random.default_rng(seed)
    means = [rng.choice(scores, count, replace=False).mean() for _ in range(draws)]
    low, high = np.quantile(means, (0.025, 0.975))
    value = float(np.mean(means))
    # where next to no head scores, the mean of the draws lies outside of their middle
    return value, min(float(low), value), max(float(high), value)


def mean_of(values: Float[Tensor, "heads samples"]) -> Estimate:
    """Mean of shares over samples with Student's interval, kept between 0 and 1."""
    e = batch_means(values, values.new_ones(values.shape[1]), batches=values.shape[1])
    return Estimate(e.value, e.low.clamp_min(0), e.high.clamp_max(1))


def wilson(hits: int, of: int, z: float = 1.96) -> tuple[float, float, float]:
    """A share with its Wilson interval."""
    share, n = hits / of, z * z / of
    middle, half = (share + n / 2) / (1 + n), z / (1 + n) * (share * (1 - share) / of + n / of / 4) ** 0.5
    return share, max(0.0, middle - half), min(1.0, middle + half)


def frame(label: str, layer: int, e: Estimate) -> pd.DataFrame:
    """Rows of the table for one layer."""
    columns = {"value": e.value.numpy(), "low": e.low.numpy(), "high": e.high.numpy()}
    return pd.DataFrame({"layer": layer, "head": range(len(e.value)), "metric": label} | columns)
