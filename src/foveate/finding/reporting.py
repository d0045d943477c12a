"""What an edit is worth, on examples that it was not chosen on: the task, another task, perplexity, and time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from foveate.core.attach import attach
from foveate.core.calls import few_logits
from foveate.core.mechanism import Mechanism, PromptEdit
from foveate.core.places import spans_of
from foveate.finding.judging import Judge
from foveate.probe.perplexity import perplexity, token_ids
from foveate.tasks import Comparison, compare

__all__ = ["Cost", "Report", "Spread", "report", "slowdown"]

TEXT_TOKENS = 2048


@dataclass(frozen=True)
class Spread:
    """A number with the range that it was seen in.

    Args:
        value: Median of the repeats, or the number.
        low: Lower quartile, or lower end of the interval.
        high: Upper quartile, or upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Cost:
    """What an edit adds to the time of a model.

    Args:
        prefill: Time of a prompt under the edit, as a share of the time without it.
        decode: The same for one more token.
        tokens: Length of the prompt.
        repeats: How often each was measured, in turn.
    """

    prefill: Spread
    decode: Spread
    tokens: int
    repeats: int


@dataclass(frozen=True)
class Report:
    """Before and after, on held-out examples.

    Args:
        right: Share of right answers.
        probability: Mean probability of the right choice.
        second: Share of right answers on another task; None where there is none.
        perplexity: Perplexity of a text without the edit and with it; None for edits of prompts and of spans.
        cost: What it costs in time; None for edits of prompts and of spans.
    """

    right: Comparison
    probability: Comparison
    second: Comparison | None
    perplexity: tuple[Spread, Spread] | None
    cost: Cost | None

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON."""
        return asdict(self)


def report(
    judge: Judge,
    mechanisms: Sequence[Mechanism],
    second: Judge | None = None,
    text: str | None = None,
    repeats: int = 5,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Measures mechanisms on a judge's examples, which must not be those that they were chosen on.

    Args:
        judge: The model and held-out examples.
        mechanisms: What is to be judged.
        second: An unrelated task on the same model.
        text: For perplexity: its first 2,048 tokens, or as many as the model reads.
        repeats: How often times are measured.
        seed: Of intervals and p-values.
        progress: Called with what is measured next.
    """

    def tell(what: str) -> None:
        if progress is not None:
            progress(what)

    tell("held-out examples")
    before, after = judge.score(), judge.score(*mechanisms)
    right, probability = (compare(before, after, seed, what) for what in ("right", "probability"))
    other = None
    # where the words of a span are, only the first task says
    everywhere = not any(spans_of(m) for m in mechanisms)
    if second is not None and everywhere:
        tell("another task")
        other = compare(second.score(), second.score(*mechanisms), seed)
    acting = [m for m in mechanisms if not isinstance(m, PromptEdit)]
    if not acting or not everywhere:
        return Report(right, probability, other, None, None)
    pair = None
    if text is not None:
        tell("perplexity")
        limit = judge.model.config.get_text_config().max_position_embeddings
        ids = token_ids(text, judge.tokenizer)[: min(TEXT_TOKENS, limit)]
        plain = Spread(*perplexity(judge.model, ids))
        with attach(judge.model, *acting, trial=False):
            pair = plain, Spread(*perplexity(judge.model, ids))
    tell("time per token")
    return Report(right, probability, other, pair, slowdown(judge.model, acting, repeats=repeats))


@torch.no_grad()
def slowdown(model: Any, mechanisms: Sequence[Mechanism], tokens: int = 512, repeats: int = 5) -> Cost:
    """The time of a prompt and of a decoded token with mechanisms, as shares of those without, measured in turn."""
    config = model.config.get_text_config()
    tokens = min(tokens, (getattr(config, "max_position_embeddings", None) or tokens) - 8)
    ids = torch.randint(config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0)).to(model.device)
    ratios: list[tuple[float, float]] = []
    for n in range(repeats + 1):
        plain, edited = (timed(model, ids, acting) for acting in ((), mechanisms))
        # the first round warms everything up
        if n:
            ratios.append((edited[0] / plain[0], edited[1] / plain[1]))
    prefill, decode = zip(*ratios, strict=True)
    return Cost(spread(prefill), spread(decode), tokens, repeats)


def timed(model: Any, ids: torch.Tensor, mechanisms: Sequence[Mechanism]) -> tuple[float, float]:
    """Seconds of a prompt, and of a decoded token."""
    few = few_logits(model)
    with attach(model, *mechanisms, trial=False) if mechanisms else nullcontext():
        begun = time.perf_counter()
        cache = model(input_ids=ids, use_cache=True, **few).past_key_values
        between = time.perf_counter()
        for _ in range(4):
            cache = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).past_key_values
        ended = time.perf_counter()
    return between - begun, (ended - between) / 4


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles."""
    low, high = np.quantile(values, (0.25, 0.75))
    return Spread(statistics.median(values), float(low), float(high))
