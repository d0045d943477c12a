"""Which heads look back at a repetition: tokens drawn at random, said several times."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core.attach import attach
from foveate.core.calls import few_logits
from foveate.core.errors import BadInput
from foveate.core.mechanism import RowMetric
from foveate.core.places import Head
from foveate.core.reductions import Match, Reduction
from foveate.core.rows import Rows

__all__ = ["Scores", "repetition_scores"]

Scores = dict[str, dict[Head, float]]


@dataclass(frozen=True)
class Repeated(RowMetric):
    """Mean mass on the earlier copies of the token (echo) and on what followed them (induction).

    Args:
        first: Position of the first row that counts.
        kv_heads: KV heads by layer, as they come by.
    """

    first: int
    kv_heads: dict[int, int] = field(default_factory=dict)

    def needs(self) -> tuple[Reduction, ...]:
        return (Match("token"), Match("self"), Match("follower"))

    def per_row(self, rows: Rows) -> dict[str, Float[Tensor, "batch heads query"]]:
        self.kv_heads[rows.layer.index] = rows.view.kv_heads
        return {"echo": rows[Match("token")] - rows[Match("self")], "induction": rows[Match("follower")]}

    def counted(self, rows: Rows) -> Bool[Tensor, "#batch query"]:
        return rows.view.mask.rows & (rows.view.mask.position >= self.first)


@torch.no_grad()
def repetition_scores(
    model: Any, tokenizer: Any, tokens: int, repeats: int, seed: int
) -> tuple[Scores, dict[int, int]]:
    """The scores of all query heads, by name, and how many KV heads each layer has.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer, which tells the special tokens.
        tokens: How many different tokens are said.
        repeats: How often they are said, in the same order.
        seed: Of the draw.

    Raises:
        BadInput: the model knows fewer tokens, or cannot read so many.
    """
    config, special = model.config.get_text_config(), set(tokenizer.all_special_ids)
    ordinary = [t for t in range(min(config.vocab_size, len(tokenizer))) if t not in special]
    if tokens > len(ordinary):
        raise BadInput(f"tokens={tokens}: {type(tokenizer).__name__} has {len(ordinary)} tokens; take fewer")
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = begin + repeats * random.Random(seed).sample(ordinary, tokens)
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and len(ids) > most:
        raise BadInput(
            f"{tokens} tokens said {repeats} times are {len(ids)}, and {type(model).__name__} reads {most}; "
            f"take tokens={(most - 1) // repeats} or fewer"
        )
    metric = Repeated(len(begin) + tokens)
    few = few_logits(model)
    with attach(model, metric) as attached:
        model(input_ids=torch.tensor([ids], device=model.device), use_cache=False, **few)
        table = attached.results.heads
    found: Scores = {}
    for row in table.itertuples():
        found.setdefault(row.metric, {})[int(row.layer), int(row.head)] = float(row.value)
    return found, metric.kv_heads
