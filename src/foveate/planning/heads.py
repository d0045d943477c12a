"""Which KV heads find an answer in a text: what the rows that give the answer look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from foveate.core.attach import attach
from foveate.core.places import Value
from foveate.measure.span_mass import SpanMass
from foveate.probe.run import fits
from foveate.probe.sample import Task

__all__ = ["answer_mass"]


@torch.no_grad()
def answer_mass(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    count: int = 12,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Value, ...]:
    """How much of each KV head's weight lies on the answer in the text, in the rows that give the answer.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        tasks: Tasks whose answer stands in the text.
        count: Prompts of each.
        seed: Of the prompts.
        progress: Called after each prompt with how many are done and how many there are.

    Returns:
        (layer, KV head, mean weight), where a KV head counts as the best of the query heads that share it.
    """
    samples = [sample for task in tasks for sample in task.samples(tokenizer, count, seed)]
    fits(model, samples)
    config = model.config.get_text_config(decoder=True)
    shared = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    total: dict[tuple[int, int, int], float] = {}
    for n, sample in enumerate(samples):
        ids = torch.tensor([[*sample.ids, *sample.answer_ids[:-1]]], device=model.device)
        spans = (("answer", len(sample.ids) - 1, ids.shape[1]), ("needle", *sample.needle))
        with attach(model, SpanMass(spans)) as attached:
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
        table = attached.results.heads
        rows = table[table.metric == "span_mass:answer>needle"]
        heads = 1 + int(rows["head"].max())
        for layer, head, value in zip(rows.layer, rows["head"], rows.value, strict=True):
            at = int(layer), int(head) * shared // heads, int(head)
            total[at] = total.get(at, 0.0) + float(value) / len(samples)
        if progress is not None:
            progress(n + 1, len(samples))
    best: dict[tuple[int, int], float] = {}
    for (layer, kv_head, _), value in total.items():
        best[layer, kv_head] = max(best.get((layer, kv_head), 0.0), value)
    return tuple((layer, head, round(min(value, 1.0), 5)) for (layer, head), value in sorted(best.items()))
