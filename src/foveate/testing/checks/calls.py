"""However the rows come in: in chunks, one by one, few or many."""

from __future__ import annotations

from foveate.core.mechanism import Mechanism, Metric
from foveate.testing import views
from foveate.testing.checks.leaks import entry
from foveate.testing.checks.measuring import Numbers, grid, numbers, output, same, sampled
from foveate.testing.checks.running import ROWS, check, expect


@check(*ROWS)
def chunks(m: Mechanism) -> None:
    """A text read in chunks gives what one prefill gives."""
    for name, whole in grid(m, ["causal", "window", "sinks", "soft_cap", "multi_query"]):
        view = views.chunk(entry(whole), 0, 22)
        cuts = [views.chunk(view, a, b) for a, b in ((0, 8), (8, 14), (14, 22))]
        same(numbers(m, *cuts), numbers(m, view), f"{name}, three chunks against one prefill", bounds=False)


@check(*ROWS)
def decode(m: Mechanism) -> None:
    """A text decoded token by token gives what one prefill gives."""
    for name, whole in grid(m, ["causal", "window", "sinks", "soft_cap"]):
        view = views.chunk(entry(whole), 0, 22)
        # single rows make no pairs: of a sample, only that it works can be asked
        last = 11 if sampled(m) else 22
        steps = [views.chunk(view, 0, 8), *(views.chunk(view, i, i + 1) for i in range(8, last))]
        found = numbers(m, *steps)
        if not sampled(m):
            same(found, numbers(m, view), f"{name}, token by token against one prefill", bounds=False)


@check(*ROWS)
def lengths(m: Mechanism) -> None:
    """Any length works, and so do rows that see nothing; long texts give numbers."""
    odd = [
        "length_1",
        "length_2",
        "odd_length",
        "empty_rows",
        "all_masked",
        "decode",
        "sliding_cache",
        "packed",
        "long",
    ]
    for name, view in grid(m, odd):
        found = numbers(m, view)
        for label, x in found.items():
            expect(not bool(x.isinf().any()), f"{name}: {label} is infinite")
        if isinstance(m, Metric):
            shaped(found, view.heads, name)
        else:
            # also those of rows that see nothing
            expect(bool(output(m, view).isfinite().all()), f"{name}: head outputs are not finite")
        if name == "long":
            expect(any(bool(x.isfinite().any()) for x in found.values()), f"{name}: all {len(found)} numbers are NaN")


def shaped(found: Numbers, heads: int, name: str) -> None:
    """One number per head, inside of its interval."""
    for label, value in found.items():
        if "(value" not in label:
            continue
        expect(
            tuple(value.shape) == (heads,), f"{name}: {label} has shape {tuple(value.shape)}, not one number per head"
        )
        low, high = (found[label.replace("(value", f"({side}")] for side in ("low", "high"))
        within = (low.isnan() & high.isnan()) | ((low <= value + 1e-12) & (value <= high + 1e-12))
        expect(bool(within.all()), f"{name}: {label} lies outside of its interval")
