"""Running a task: greedy answers, how much of them is right, and how sure that is.

A task is put in one of two ways. Its question is *seen* where it is read together with the text, so that a KV policy
drops entries knowing what is asked; it is *unseen* where the text is read, and compressed, before the question comes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from foveate.core.calls import few_logits
from foveate.core.errors import BadInput
from foveate.probe.ledger import Ledger, circumstances
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
        share: Share of the parts of the answer that are in that.
    """

    depth: float
    tokens: int
    answer: str
    said: str
    share: float

    @property
    def right(self) -> bool:
        """Whether all of the answer is there."""
        return self.share == 1.0


@dataclass(frozen=True)
class ProbeResult:
    """The mean share of the answers that was given, with its 95 % Wilson interval, and every answer.

    Where answers have several parts, the parts of one answer stand or fall together; the interval counts prompts.

    Args:
        task: The task.
        recall: Mean share.
        low: Lower end of the interval.
        high: Upper end.
        records: One entry per prompt.
    """

    task: Task
    recall: float
    low: float
    high: float
    records: tuple[Record, ...]

    @classmethod
    def of(cls, task: Task, records: Sequence[Record]) -> ProbeResult:
        """From the answers."""
        given = math.fsum(record.share for record in records)
        return cls(task, given / len(records), *wilson(given, len(records)), tuple(records))


def run(
    model: Any,
    tokenizer: Any,
    task: Task,
    count: int = 50,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    unseen: bool = False,
    file: str | Path | None = None,
) -> ProbeResult:
    """Puts `count` prompts of the task to the model, under whatever is attached to it.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        task: For instance `Passkey(length=2048)`.
        count: Number of prompts.
        seed: The same seed gives the same prompts.
        progress: Called after each prompt with how many are done and how many there are.
        unseen: Whether the question comes in a call of its own, behind the text.
        file: Where answers are kept as they come (JSON lines); what is there from an interrupted run is not asked
            again. Use one file for one model and what is attached to it.

    Raises:
        BadInput: prompts longer than the model can read.
    """
    samples = task.samples(tokenizer, count, seed)
    fits(model, samples)
    ledger = Ledger(file)
    own = () if file is None else circumstances(model, tokenizer)
    records: list[Record] = []
    for n, sample in enumerate(samples):
        key = ledger.key(own, task, seed, count, unseen, n, tuple(sample.ids))
        if key not in ledger:
            ledger.add(key, asdict(ask(model, tokenizer, sample, unseen)))
        records.append(Record(**ledger[key]))
        if progress is not None:
            progress(len(records), len(samples))
    return ProbeResult.of(task, records)


def ask(model: Any, tokenizer: Any, sample: Sample, unseen: bool = False) -> Record:
    """The model's answer to one prompt."""
    context = sample.question_start if unseen else 0
    ids = greedy(model, sample.ids, limit(sample), stop_tokens(model, tokenizer), context)
    return graded(sample, tokenizer.decode(ids))


def limit(sample: Sample) -> int:
    """How many tokens an answer may take."""
    return len(sample.answer_ids) + SPARE_TOKENS


def graded(sample: Sample, said: str) -> Record:
    """What was said, and how much of the answer is in it."""
    # An answer that goes on where it should end is another answer: 1234 is not 12345.
    found = [re.search(rf"(?<!\w){re.escape(part)}(?!\w)", said) is not None for part in sample.asked]
    return Record(sample.depth, len(sample.ids), sample.answer, said, sum(found) / len(found))


def fits(model: Any, samples: Sequence[Sample]) -> None:
    """Raises `BadInput` where prompts and answers are longer than the model's positions."""
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = max(len(s.ids) + limit(s) for s in samples)
    if most is not None and longest > most:
        raise BadInput(
            f"a prompt with its answer takes {longest} tokens, and {type(model).__name__} reads {most}; make the task "
            f"shorter, length={most - (longest - max(len(s.ids) for s in samples))} at most"
        )


def stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer."""
    config = getattr(model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    ends = found if isinstance(found, Collection) else [found]
    return {end for end in (*ends, tokenizer.eos_token_id) if end is not None}


@torch.no_grad()
def greedy(model: Any, ids: Sequence[int], limit: int, stop: Collection[int] = (), context: int = 0) -> list[int]:
    """Decodes greedily with the model's own KV cache, at most `limit` tokens.

    The first `context` tokens are read in a call of their own: what is done to the cache then is done without the rest.
    """
    if len(ids) <= context:
        what = "the prompt is empty" if not ids else f"all {len(ids)} tokens of the prompt are its context"
        raise BadInput(f"{what}; decoding needs at least one token behind it.")
    # Logits of a whole prompt would take more memory than the model.
    few = few_logits(model)
    cache, said = None, []
    if context:
        before = torch.tensor([list(ids[:context])], device=model.device)
        cache = model(input_ids=before, use_cache=True, **few).past_key_values
    step = torch.tensor([list(ids[context:])], device=model.device)
    for _ in range(limit):
        out = model(input_ids=step, past_key_values=cache, use_cache=True, **few)
        token = int(out.logits[0, -1].argmax())
        if token in stop:
            break
        said.append(token)
        cache, step = out.past_key_values, torch.tensor([[token]], device=model.device)
    return said


def wilson(right: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval for a share; unlike the normal one it is honest at 0 and at 1."""
    share = right / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)
