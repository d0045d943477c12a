"""One truth, many ways to it: engines, gradients, grouped heads, dtypes, and the second time."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from foveate.core.mechanism import Mechanism, Metric
from foveate.core.rows import REFUSALS, View
from foveate.core.rule import Rule
from foveate.testing import views
from foveate.testing.checks.measuring import grid, numbers, output, same, streamed
from foveate.testing.checks.running import ACTING, ROWS, check, expect

# one of each trait, and the traits that get in each other's way
VARIED = [
    "causal",
    "full",
    "window",
    "right_padded",
    "left_padded_window",
    "packed_window",
    "empty_rows",
    "decode_padded",
    "sliding_cache",
    "cross",
    "multi_query",
    "narrow_values",
    "soft_cap",
    "sinks_window_padded",
    "sinks_empty_rows",
    "bias_padded",
    "scattered",
    "odd_length",
]


@check(*ROWS)
def reference(m: Mechanism) -> None:
    """Every way of the row engine gives what the dense form in float64 gives."""
    for name, view in grid(m, VARIED):
        options = {"all_rows": False} if isinstance(m, Metric) else {}
        truth = numbers(m, view, engine="reference", dtype=torch.float64, **options)
        for engine in ("blocks", "fused", "native", "auto"):
            always = engine in ("blocks", "auto")
            if always or (isinstance(m, Metric) and not REFUSALS[engine](view, streamed(m))):
                same(
                    numbers(m, view, engine=engine, **options),
                    truth,
                    f"{name}, engine {engine!r} against the reference",
                )


@check(*ACTING, Rule)
def gradients(m: Mechanism) -> None:
    """The derivative of the head outputs is the one that finite differences give."""
    for name, base in grid(m, ["causal", "left_padded", "soft_cap"]):
        view = replace(base, **{n: getattr(base, n).double() for n in ("q", "k", "v")})
        rng = torch.Generator().manual_seed(3)
        directions = {
            n: torch.randn(getattr(view, n).shape, generator=rng, dtype=torch.float64) for n in ("q", "k", "v")
        }
        weigh = torch.randn(output(m, view).shape, generator=rng, dtype=torch.float64)
        weigh = weigh * view.mask.rows[:, None, :, None]

        def loss(call: View, weigh: Tensor = weigh) -> Tensor:
            return (output(m, call) * weigh).sum()

        leaves = {n: getattr(view, n).clone().requires_grad_() for n in directions}
        got = torch.autograd.grad(loss(replace(view, **leaves)), list(leaves.values()), allow_unused=True)
        step = 1e-5
        for n, g in zip(leaves, got, strict=True):
            expect(g is None or bool(g.isfinite().all()), f"{name}: the gradient of {n} is not finite")
            with torch.no_grad():
                ends = [loss(replace(view, **{n: getattr(view, n) + s * step * directions[n]})) for s in (1, -1)]
            want = float(ends[0] - ends[1]) / (2 * step)
            found = 0.0 if g is None else float((g * directions[n]).sum())
            close = abs(found - want) <= 1e-3 * max(1.0, abs(want))
            expect(close, f"{name}: the derivative along {n} is {found:.6g}, finite differences say {want:.6g}")


@check(*ROWS)
def repeatable(m: Mechanism) -> None:
    """The same input gives the same numbers, whatever the global random state."""
    for name, view in grid(m, ["causal", "left_padded", "odd_length"]):
        found = []
        with torch.random.fork_rng(devices=[]):
            for seed in (0, 1):
                torch.manual_seed(seed)
                found.append(numbers(m, view))
        same(found[1], found[0], f"{name}, the second time", tolerance=0.0)


@check(*ROWS)
def grouped(m: Mechanism) -> None:
    """Grouped heads give what repeated key-value heads give."""
    for name, view in grid(m, ["causal", "multi_query", "left_padded", "sinks", "cross"]):
        same(numbers(m, view), numbers(m, views.repeated(view)), f"{name}, grouped against repeated heads")


@check(*ROWS)
def dtypes(m: Mechanism) -> None:
    """bfloat16 gives nearly what the same numbers in float32 give."""
    for name, view in grid(m, ["bfloat16"]):
        wide = replace(view, q=view.q.float(), k=view.k.float(), v=view.v.float())
        same(numbers(m, view), numbers(m, wide), f"{name} against float32", tolerance=0.03, bounds=False)
