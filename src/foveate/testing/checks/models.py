"""Those that run the model themselves."""

from __future__ import annotations

import torch

from foveate.core.mechanism import ModelMetric
from foveate.testing import tiny
from foveate.testing.checks.running import check, expect

__all__ = ["COLUMNS"]

COLUMNS = ["layer", "head", "metric", "value", "low", "high"]


@check(ModelMetric)
def table(m: ModelMetric) -> None:
    """Its table has the columns of all tables, one row per layer, head and label, and the same numbers each time."""
    model, tokenizer = tiny.model("llama", max_position_embeddings=1 << 14), tiny.tokenizer()
    before = {n: p.clone() for n, p in model.named_parameters()}
    found, again = (m.measure(model, tokenizer) for _ in range(2))
    expect(list(found.columns) == COLUMNS, f"columns {list(found.columns)}, not {COLUMNS}")
    expect(len(found) > 0, "the table is empty")
    wrong = sorted({label for label in found.metric if not label.startswith(m.name)})
    expect(not wrong, f"labels {wrong} do not begin with {m.name!r}")
    twice = found.duplicated(["layer", "head", "metric"])
    expect(not twice.any(), f"{int(twice.sum())} rows of layer, head and metric stand there twice")
    inside = found.low.isna() | ((found.low <= found.value + 1e-12) & (found.value <= found.high + 1e-12))
    expect(bool(inside.all()), "values lie outside of their intervals")
    expect(found.equals(again), "the second run gives other numbers")
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    expect(not moved, f"it changes the model's weights: {moved[:3]}")
