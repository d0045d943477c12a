"""Running a task: greedy answers, how many are right, and how sure that is."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from foveate.core.errors import BadInput
from foveate.probe.sample import Sample, Task

__all__ = ["ProbeResult", "Record", "greedy", "run", "wilson"]

SPARE_TOKENS = 4
"""An answer may start with a space or a quotation mark."""


@dataclass(frozen=True)
class Record:
    """What the model said to one prompt.

    Args:
        depth: Where in the context the needle stood: 0 at the start, 1 at the end.
        tokens: Length of the prompt.
        answer: What it should say.
        said: What it said.
        right: Whether the answer is in that.
    """

    depth: float
    tokens: int
    answer: str
    said: str
    right: bool


@dataclass(frozen=True)
class ProbeResult:
    """The share of right answers with its 95 % Wilson interval, and every answer.

    Args:
        task: The task.
        recall: Share of right answers.
        low: Lower end of the interval.
        high: Upper end.
        records: One entry per prompt.
    """

    task: Task
    recall: float
    low: float
    high: float
    records: tuple[Record, ...]


def run(
    model: Any,
    tokenizer: Any,
    task: Task,
    count: int = 20,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> ProbeResult:
    """Puts `count` prompts of the task to the model.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        task: For instance `Passkey(length=2048)`.
        count: Number of prompts.
        seed: The same seed gives the same prompts.
        progress: Called after each prompt with how many are done and how many there are.
    """
    samples = task.samples(tokenizer, count, seed)
    records: list[Record] = []
    for sample in samples:
        records.append(ask(model, tokenizer, sample))
        if progress is not None:
            progress(len(records), len(samples))
    right = sum(record.right for record in records)
    return ProbeResult(task, right / len(records), *wilson(right, len(records)), tuple(records))


def ask(model: Any, tokenizer: Any, sample: Sample) -> Record:
    """The model's answer to one prompt; right if the true answer is the first of its kind in it."""
    ids = greedy(model, sample.ids, len(sample.answer_ids) + SPARE_TOKENS, stop_tokens(model, tokenizer))
    said = tokenizer.decode(ids)
    # An answer that goes on where it should end is another answer: 1234 is not 12345.
    right = re.search(rf"(?<!\w){re.escape(sample.answer)}(?!\w)", said) is not None
    return Record(sample.depth, len(sample.ids), sample.answer, said, right)


def stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer."""
    config = getattr(model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    ends = found if isinstance(found, Collection) else [found]
    return {end for end in (*ends, tokenizer.eos_token_id) if end is not None}


@torch.no_grad()
def greedy(model: Any, ids: Sequence[int], limit: int, stop: Collection[int] = ()) -> list[int]:
    """Decodes greedily with the model's own KV cache, at most `limit` tokens."""
    if not ids:
        raise BadInput("the prompt is empty; decoding needs at least one token.")
    # Logits of a whole prompt would take more memory than the model.
    few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    step, cache, said = torch.tensor([list(ids)], device=model.device), None, []
    for _ in range(limit):
        out = model(input_ids=step, past_key_values=cache, use_cache=True, **few)
        token = int(out.logits[0, -1].argmax())
        if token in stop:
            break
        said.append(token)
        cache, step = out.past_key_values, torch.tensor([[token]], device=model.device)
    return said


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval for a share; unlike the normal one it is honest at 0 and at 1."""
    share = right / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)
