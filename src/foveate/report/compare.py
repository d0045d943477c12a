"""Two profiles side by side: which heads differ by more than their intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from foveate.profiling import Profile

__all__ = ["RULE", "Comparison", "Table", "compare", "table"]

RULE = (
    "A difference counts when the two 95 % intervals do not overlap. Where nothing differs, chance alone does that in "
    "about 1 of 180 comparisons of intervals of the same width. A number that is a fact of its text (an interval of no "
    "width) is not counted: nothing tells its chance."
)


@dataclass(frozen=True, eq=False)
class Table:
    """The numbers of all heads, metric by metric.

    Args:
        heads: Layer and head of each column.
        metrics: Name of each row.
        value: The numbers; NaN where there is none.
        low: Lower ends of the 95 % intervals.
        high: Upper ends.
    """

    heads: list[tuple[int, int]]
    metrics: list[str]
    value: Float[np.ndarray, "metrics heads"]
    low: Float[np.ndarray, "metrics heads"]
    high: Float[np.ndarray, "metrics heads"]


def table(profile: Profile) -> Table:
    """The heads of a profile as arrays."""
    t = profile.heads.drop_duplicates(["layer", "head", "metric"])
    wide = {c: t.pivot(index="metric", columns=["layer", "head"], values=c) for c in ("value", "low", "high")}
    order = [m for m in dict.fromkeys(t.metric) if m in wide["value"].index]
    heads = sorted(wide["value"].columns)
    arrays = [wide[c].loc[order, heads].to_numpy(np.float64) for c in ("value", "low", "high")]
    return Table([(int(n), int(h)) for n, h in heads], [str(m) for m in order], *arrays)


@dataclass(frozen=True, eq=False)
class Comparison:
    """What can be said of two profiles together.

    Args:
        metrics: The metrics that both have.
        matched: Whether both have the same heads; if not, only distributions over depth can be compared.
        exceeds: Where the intervals do not overlap, over `metrics` and the heads of both.
        counted: How many pairs of intervals were compared.
    """

    metrics: list[str]
    matched: bool
    exceeds: Bool[np.ndarray, "metrics heads"]
    counted: int


def compare(a: Table, b: Table) -> Comparison:
    """Compares metric by metric and head by head."""
    metrics = [m for m in a.metrics if m in b.metrics]
    if a.heads != b.heads:
        return Comparison(metrics, False, np.zeros((len(metrics), 0), bool), 0)
    at, bt = [a.metrics.index(m) for m in metrics], [b.metrics.index(m) for m in metrics]
    # a number whose interval is itself is a fact of its text; NaN compares as False
    wide = (a.high[at] > a.low[at]) & (b.high[bt] > b.low[bt])
    apart = (a.low[at] > b.high[bt]) | (b.low[bt] > a.high[at])
    return Comparison(metrics, True, wide & apart, int(wide.sum()))
