"""Nothing leaks: not from padding, the rest of the batch, later tokens or garbage, and not into what is only read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from foveate.core.mechanism import Mechanism, Metric, RowMetric, Schedule
from foveate.core.reductions import Sampled
from foveate.core.rows import REFUSALS, Rows, View
from foveate.core.rows import attend as attend_rows
from foveate.testing import views
from foveate.testing.checks.measuring import (
    Numbers,
    grid,
    numbers,
    output,
    readable,
    rows_of,
    same,
    sampled,
    streamed,
    two_layers,
)
from foveate.testing.checks.running import ROWS, check, expect
from foveate.testing.views import mask_of

__all__ = ["entry"]


@check(*ROWS)
def padding(m: Mechanism) -> None:
    """A padded row gives what the same row gives alone: in one prefill, in chunks, and decoded."""
    for name, mask in {
        "left_padded": views.with_mask(left=(6,)),
        "right_padded": views.with_mask(right=(6,)),
        "full_right_padded": views.with_mask(causal=False, right=(6,)),
        "sinks_window_padded": views.with_mask(left=(6,), window=5),
    }.items():
        view = views.view(name, batch=1, queries=22, keys=22, mask=mask)
        if not readable(m, view):
            continue
        left = "right" not in name
        single = views.alone(view, 0, 6, 22) if left else views.alone(view, 0, 0, 16)
        want = numbers(m, single)
        same(trimmed(numbers(m, view), view, single), trimmed(want, single, single), f"{name}, against the row alone")
        if view.mask.causal:
            cuts = [(0, 10), (10, 16), (16, 22)]
            chunks = [views.chunk(view, a, b) for a, b in cuts]
            same(numbers(m, *chunks), want, f"{name}, chunked, against the row alone", bounds=False)
        if left and not sampled(m):
            steps = [views.chunk(view, 0, 18), *(views.chunk(view, i, i + 1) for i in range(18, 22))]
            same(numbers(m, *steps), want, f"{name}, decoded, against the row alone", bounds=False)


def trimmed(found: Numbers, view: View, single: View) -> Numbers:
    """Numbers per key cut to the keys of the row alone: bidirectional padding always stands behind it."""
    if view.mask.causal:
        return found
    return {label: x[:, : single.keys] if "(per key" in label else x for label, x in found.items()}


@check(*ROWS)
def batch(m: Mechanism) -> None:
    """Other rows of the batch change nothing."""
    for name, view in grid(m, ["causal", "window", "full"]):
        one = entry(view)
        want = numbers(m, one)
        beside = together(one, views.view(name, seed=1, batch=1), seen=False)
        same(numbers(m, beside), want, f"{name}, beside a row that is all padding")
        if isinstance(m, Metric):
            same(numbers(m, together(one, one)), want, f"{name}, beside itself", bounds=False)
        pair = [together(one, views.view(name, seed=seed, batch=1)) for seed in (1, 2)]
        if isinstance(m, RowMetric):
            a, b = (first_entry(m, rows_of(m, two_layers(call)[1])) for call in pair)
            same(a, b, f"{name}, rows beside another text")
        elif not isinstance(m, Metric):
            a, b = ({"head outputs": output(m, call)[0]} for call in pair)
            same(a, b, f"{name}, rows beside another text")


def entry(view: View) -> View:
    """The first batch entry."""
    whole = mask_of(view)
    begin = None if whole.begin is None else whole.begin[:1]
    mask = replace(whole, low=whole.low[:1], high=whole.high[:1], begin=begin, valid=None)
    tokens = None if view.tokens is None else view.tokens[:1]
    return replace(view, q=view.q[:1], k=view.k[:1], v=view.v[:1], mask=mask, tokens=tokens)


def together(one: View, other: View, seen: bool = True) -> View:
    """Two batches of one in one; the other may be all padding, full of garbage."""
    mask = mask_of(one)
    low, high = (torch.cat([t, t if seen else torch.zeros_like(t)]) for t in (mask.low, mask.high))
    valid = None if seen else torch.tensor([[True], [False]]).expand(-1, one.queries)
    begin = None if mask.begin is None else mask.begin.expand(2)
    mask = replace(mask, low=low, high=high, begin=begin, valid=valid)
    joined: dict[str, Any] = {n: torch.cat([getattr(one, n), getattr(other, n)[:1]]) for n in ("q", "k", "v", "tokens")}
    view = replace(one, mask=mask, **joined)
    return view if seen else views.poisoned(view)


def first_entry(m: RowMetric, rows: Rows) -> Numbers:
    """The numbers of the counted rows of the first batch entry."""
    counted: Bool[Tensor, " query"] = m.counted(rows)[0]
    return {label: x[0][:, counted] for label, x in m.per_row(rows).items()}


@check(*ROWS)
def causal(m: Mechanism) -> None:
    """What comes later in a causal text has no influence on earlier rows."""
    for name in ("causal", "window", "sinks"):
        mask = views.with_mask(window=5) if name == "window" else views.with_mask()
        first, other = (views.view(name, seed=seed, mask=mask, queries=22, keys=22) for seed in (0, 1))
        if not readable(m, first):
            continue
        real = torch.arange(22).expand(2, -1) < 14
        first.mask = replace(mask_of(first), valid=real)
        late = {n: ~real if n == "tokens" else ~real[:, None, :, None] for n in ("q", "k", "v", "tokens")}
        new: dict[str, Any] = {n: torch.where(at, getattr(other, n), getattr(first, n)) for n, at in late.items()}
        changed = replace(first, **new)
        a, b = (
            {label: x[:, :14] if "(per key" in label else x for label, x in numbers(m, call).items()}
            for call in (changed, first)
        )
        same(a, b, f"{name}, rows 0 to 13 with other rows after them")


@check(*ROWS)
def poison(m: Mechanism) -> None:
    """Garbage where nobody may look does not come through."""
    for name, view in grid(
        m, ["left_padded", "right_padded", "full_right_padded", "empty_rows", "sinks_empty_rows", "cross"]
    ):
        # not by sdpa, which is called as the model would have called it, and as little proof against NaN
        clean = numbers(m, view, engine="blocks")
        dirty = views.poisoned(view)
        if view.tokens is not None:
            unseen = dirty.k.isnan().all(-1).all(1)
            dirty.tokens = torch.where(unseen, (view.tokens + 1) % views.WORDS, view.tokens)
        # no engine is named for a schedule: it is one; what it refuses goes to the blocks
        if isinstance(m, Schedule):
            same(numbers(m, dirty, engine="blocks" if m.refuses(view) else "auto"), clean, f"{name}, with NaN behind")
            continue
        for engine in ("blocks", "native"):
            if engine == "blocks" or (isinstance(m, Metric) and not REFUSALS[engine](view, streamed(m))):
                same(numbers(m, dirty, engine=engine), clean, f"{name}, with NaN behind the mask, engine {engine!r}")


@check(Metric)
def observing(m: Metric) -> None:
    """Looking changes nothing: head outputs are those of plain attention, and nothing that is read is written to."""
    for name, view in grid(m, ["causal", "left_padded", "sinks", "soft_cap", "cross"]):
        plain = attend_rows(view, engine="reference", dtype=torch.float64).out
        call = two_layers(view)[1]
        rows = rows_of(m, call)
        watched = {"out": rows.out, "q": call.q, "k": call.k, "v": call.v}
        watched |= {str(r): x.weights if isinstance(x, Sampled) else x for r, x in rows.values.items()}
        copies = {n: x.clone() for n, x in watched.items()}
        m.result(m.update(m.start(call.layer), rows))
        for n, x in watched.items():
            expect(torch.equal(x.nan_to_num(), copies[n].nan_to_num()), f"{name}: `update` writes to {n}")
        same({"head outputs": rows.out}, {"head outputs": plain}, f"{name}, observed against plain attention")
