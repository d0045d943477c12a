"""What a mechanism makes of attention calls, as numbers that can be compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.attach import can
from foveate.core.mechanism import Edit, HeadEdit, Mechanism, Metric, Pattern, Schedule
from foveate.core.reductions import Reduction, Sample, Sampled
from foveate.core.rows import Engine, Rows, View
from foveate.core.rows import attend as attend_rows
from foveate.core.rule import Operator, Rule, Sizes
from foveate.testing import views
from foveate.testing.checks.running import Broken, expect
from foveate.testing.views import mask_of

__all__ = [
    "Numbers",
    "acted",
    "grid",
    "measured",
    "moved",
    "numbers",
    "output",
    "readable",
    "rows_of",
    "ruled",
    "same",
    "sampled",
    "streamed",
    "two_layers",
]

Numbers = dict[str, Tensor]
# of what stands for the input of a layer
WIDTH = 16


@dataclass(frozen=True)
class WholeRows(Reduction):
    """All rows of a call, to take samples from that do not depend on how the rows came in."""

    def of_block(self, block: Any) -> Float[Tensor, "batch heads rows keys"]:
        return torch.nn.functional.pad(block.weights, (block.first, block.view.mask.keys - block.last))


def readable(m: Mechanism, view: View) -> bool:
    """Whether the mechanism has a meaning on this call; the door to models leaves out what has none."""
    if isinstance(m, Operator):
        return m.causal if view.mask.causal else m.full
    return not isinstance(m, Metric | Edit) or all(can(r, view) for r in m.needs())


def grid(m: Mechanism, names: Sequence[str]) -> Iterator[tuple[str, View]]:
    """The named situations that the mechanism can read."""
    for name in names:
        view = views.view(name)
        if readable(m, view):
            yield name, view


def rows_of(
    m: Metric, view: View, engine: Engine = "auto", dtype: torch.dtype | None = None, all_rows: bool = True
) -> Rows:
    """The rows of one call with what the metric needs.

    With `all_rows`, samples hold every row, as pairs (0, 1), (2, 3), ...: then even cuts of a text cut no pair.
    """
    needed = [r for r in m.needs() if not (all_rows and isinstance(r, Sample))]
    rows = attend_rows(view, needed, engine=engine, dtype=dtype)
    samples = [r for r in m.needs() if r not in needed]
    if samples:
        index = torch.arange(view.queries // 2 * 2 or 1)
        whole = attend_rows(view, [WholeRows()], engine="blocks")[WholeRows()]
        rows.values |= {r: Sampled(index, whole[:, :, index]) for r in samples}
    return rows


def two_layers(view: View) -> list[View]:
    """The call as the second of two layers, for metrics that compare a layer with the one before."""
    return [
        replace(view, q=view.q * factor, layer=replace(view.layer, index=index))
        for index, factor in enumerate((-0.7, 1.0))
    ]


def measured(
    m: Metric,
    calls: Sequence[View],
    engine: Engine = "auto",
    dtype: torch.dtype | None = None,
    all_rows: bool = True,
    without: Reduction | None = None,
) -> Numbers:
    """What a metric says after these calls, by label; of batches of one, keys of padding are left out.

    Arrays count tokens from the beginning of the text, so they are compared whole.
    """
    states: dict[int, Any] = {}
    with torch.no_grad():
        for view in calls:
            before = None
            for n, call in enumerate(two_layers(view)):
                rows = rows_of(m, call, engine, dtype, all_rows)
                if without is not None:
                    rows.values.pop(without, None)
                rows.before = before
                states[n] = m.update(states[n] if n in states else m.start(call.layer), rows)
                before = rows
    found: Numbers = {}
    for n, state in states.items():
        for label, estimate in m.result(state).items():
            for part in ("value", "low", "high"):
                found[f"{label} ({part}, layer {n})"] = getattr(estimate, part)
        for label, values in m.per_key(state).items():
            found[f"{label} (per key, layer {n})"] = values[:, real_keys(calls[-1], values.shape[1])]
        for label, values in m.arrays(state).items():
            found[f"{label} (array, layer {n})"] = values
    return found


def real_keys(view: View, keys: int) -> Tensor | slice:
    """Keys of the text, in a batch of one whose padding is known; otherwise all."""
    mask = mask_of(view)
    if mask.valid is None or mask.begin is None or view.batch > 1 or keys != view.keys or not mask.causal:
        return slice(None)
    padded = torch.zeros(keys, dtype=torch.bool).index_fill_(0, mask.position[~mask.valid[0]], True)
    # what earlier chunks held of the padding is not in this call's `valid`, but stands before the text
    return (~padded & (torch.arange(keys) >= mask.begin[0])).nonzero()[:, 0]


def acted(
    m: Mechanism,
    calls: Sequence[View],
    engine: Engine = "auto",
    dtype: torch.dtype | None = None,
    fresh: bool = False,
) -> Numbers:
    """The head outputs of the real rows under an edit, a pattern or a rule."""
    outs = []
    for view in calls:
        out = output(m, ruled(m, view, fresh) if isinstance(m, Rule) else view, engine, dtype)
        outs.append(out.movedim(1, 2)[view.mask.rows.expand(view.batch, -1)])
    return {"head outputs": torch.cat(outs)}


def output(
    m: Mechanism | None, view: View, engine: Engine = "auto", dtype: torch.dtype | None = None
) -> Float[Tensor, "batch heads query value_dim"]:
    """The head outputs of one call, as the mechanism leaves them."""
    options: dict[str, Any] = {"engine": engine, "dtype": dtype, "block": 4 if engine == "blocks" else None}
    if isinstance(m, Rule):
        return attend_rows(view if view.rule == m else ruled(m, view), **options).out
    if isinstance(m, Edit):
        return attend_rows(view, edits=[m], **options).out
    if isinstance(m, Pattern):
        return attend_rows(view, pattern=m.select, **options).out
    if isinstance(m, Schedule):
        return attend_rows(view, schedule=m, **options).out
    rows = attend_rows(view, **options)
    return m.edit(rows, rows.out) if isinstance(m, HeadEdit) else rows.out


def ruled(m: Rule, view: View, fresh: bool = False) -> View:
    """The call under a rule, whose parameters are fresh or, to see that they are used, a little away from that.

    What stands for the layer's input is made of the queries, so that whatever happens to these happens to it.
    """
    dim, value_dim = view.q.shape[3], view.v.shape[3]
    by = torch.randn(view.heads * dim, WIDTH, generator=torch.Generator().manual_seed(7)).to(view.q.dtype)
    hidden = view.q.transpose(1, 2).flatten(2) @ by
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        learned = m.learned(Sizes(WIDTH, view.heads, view.kv_heads, dim, view.layer.index, value_dim))
        if learned is not None and not fresh:
            moved(learned)
    return replace(view, rule=m, learned=learned, hidden=hidden)


@torch.no_grad()
def moved(learned: torch.nn.Module) -> None:
    """Moves parameters a little away from where they begin."""
    for parameter in learned.parameters():
        if parameter.is_floating_point():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def numbers(m: Mechanism, *calls: View, **options: Any) -> Numbers:
    """What the mechanism makes of these calls, in one dictionary that can be compared."""
    return measured(m, calls, **options) if isinstance(m, Metric) else acted(m, calls, **options)


def same(got: Numbers, want: Numbers, where: str, tolerance: float = 3e-4, bounds: bool = True) -> None:
    """Fails unless all numbers agree; NaN agrees with NaN only."""
    expect(got.keys() == want.keys(), f"{where}: labels {sorted(got)} instead of {sorted(want)}")
    for label, b in want.items():
        a = got[label]
        if not bounds and ("(low" in label or "(high" in label):
            continue
        expect(a.shape == b.shape, f"{where}: {label} has shape {tuple(a.shape)}, not {tuple(b.shape)}")
        a, b = a.double(), b.double()
        apart = (a - b).abs().masked_fill(a.isnan() & b.isnan() | (a == b), 0.0) / b.abs().nan_to_num(0.0).clamp_min(1)
        worst = apart.nan_to_num(torch.inf).flatten().max(0) if apart.numel() else None
        if worst is not None and worst.values > tolerance:
            x, y = (float(t.flatten()[worst.indices]) for t in (a, b))
            raise Broken(f"{where}: {label} is {x:.6g} instead of {y:.6g} (allowed {tolerance:g})")


def streamed(m: Metric) -> list[Reduction]:
    """The reductions that the engines compute on the way; samples are whole rows."""
    return [r for r in m.needs() if r.axis != "sample"]


def sampled(m: Mechanism) -> bool:
    """Whether it looks at pairs of rows, which single decoded rows do not have."""
    return isinstance(m, Metric) and any(isinstance(r, Sample) for r in m.needs())
