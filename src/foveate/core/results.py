"""What metrics found, as tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from torch import Tensor

from foveate.core.errors import NothingObserved, unknown
from foveate.core.mechanism import Metric

if TYPE_CHECKING:
    from foveate.core.attach import Attached

__all__ = ["HEAD_COLUMNS", "KEY_COLUMNS", "Results", "collect"]

HEAD_COLUMNS = ["layer", "head", "metric", "value", "low", "high"]
KEY_COLUMNS = ["layer", "head", "key", "metric", "value"]


@dataclass(frozen=True, eq=False)
class Results:
    """What metrics found.

    Args:
        heads: One row per layer, head and metric: value with its 95 % interval (low, high).
        keys: One row per layer, head and key, for the metrics that speak of keys.
        layers: Dotted path in the model of each layer number.
        skipped: Metrics that could read no layer of this model, with the reason.
        arrays: Pictures per head by label, [layers, heads, ...]; NaN where a layer has none.
    """

    heads: pd.DataFrame
    keys: pd.DataFrame
    layers: dict[int, str]
    skipped: dict[str, str]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def __getitem__(self, metric: str) -> pd.DataFrame:
        """Layers x heads of one metric's values."""
        part = self.heads[self.heads.metric == metric]
        if metric in self.skipped:
            raise NothingObserved(f"{metric}: {self.skipped[metric]}")
        if part.empty:
            raise unknown("measured metric", metric, set(self.heads.metric))
        return part.pivot(index="layer", columns="head", values="value")


def collect(attached: Attached) -> Results:
    """The tables of one attachment."""
    metrics = [(n, m) for n, m in enumerate(attached.mechanisms) if isinstance(m, Metric)]
    if attached.calls == 0:
        raise NothingObserved(
            "the model has not run while attached, so there are no results; run it in the `with` block"
        )
    heads, keys, skipped = [], [], {}
    pictures: dict[str, dict[int, np.ndarray]] = {}
    for n, m in metrics:
        layers = sorted(layer for k, layer in attached.states if k == n)
        found = {layer: m.result(attached.states[n, layer]) for layer in layers}
        if m.needs() and not any(found.values()):
            skipped[m.name] = (
                f"could read no layer of {type(attached.model).__name__}: what it needs (token ids, keys of the same "
                "sequence, an output projection) was not there"
            )
        for layer in layers:
            state = attached.states[n, layer]
            for label, e in found[layer].items():
                columns = {"value": e.value.numpy(), "low": e.low.numpy(), "high": e.high.numpy()}
                heads.append(pd.DataFrame({"layer": layer, "head": range(len(e.value)), "metric": label} | columns))
            keys += [(layer, label, mass.float().cpu()) for label, mass in m.per_key(state).items()]
            for label, x in m.arrays(state).items():
                pictures.setdefault(label, {})[layer] = x.float().cpu().numpy()
    if metrics and len(skipped) == len(metrics):
        raise NothingObserved("; ".join(f"{name} {why}" for name, why in skipped.items()))
    table = pd.concat(heads, ignore_index=True)[HEAD_COLUMNS] if heads else pd.DataFrame(columns=HEAD_COLUMNS)
    names = {layer.index: layer.name for layer in attached.layers.values()}
    arrays = {label: stacked(by_layer, len(names)) for label, by_layer in pictures.items()}
    return Results(table, key_table(keys), names, skipped, arrays)


def stacked(found: dict[int, np.ndarray], layers: int) -> np.ndarray:
    """One array of all layers, as large as the largest of them; NaN where a layer or head has nothing."""
    shape = np.max([x.shape for x in found.values()], axis=0)
    whole = np.full((layers, *shape), np.nan, dtype=np.float32)
    for layer, x in found.items():
        whole[layer][tuple(slice(n) for n in x.shape)] = x
    return whole


def key_table(found: list[tuple[int, str, Tensor]]) -> pd.DataFrame:
    """One row per layer, head, key and label, in narrow types: there are heads x keys of them."""
    sizes = [mass.numel() for _, _, mass in found]
    heads = [np.repeat(np.arange(mass.shape[0], dtype=np.int16), mass.shape[1]) for _, _, mass in found]
    keys = [np.tile(np.arange(mass.shape[1], dtype=np.int32), mass.shape[0]) for _, _, mass in found]
    labels = sorted({label for _, label, _ in found})
    codes = np.repeat(np.array([labels.index(label) for _, label, _ in found], dtype=np.int8), sizes)
    columns = {
        "layer": np.repeat(np.array([layer for layer, _, _ in found], dtype=np.int16), sizes),
        "head": np.concatenate(heads) if heads else np.empty(0, np.int16),
        "key": np.concatenate(keys) if keys else np.empty(0, np.int32),
        "metric": pd.Categorical.from_codes(codes, labels),
        "value": np.concatenate([mass.flatten().numpy() for *_, mass in found]) if found else np.empty(0, np.float32),
    }
    return pd.DataFrame(columns, copy=False)[KEY_COLUMNS]
