"""Times of two things in alternating rounds, and peaks of memory: what the benchmarks have in common."""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# seconds that a round lasts at least, most turns of one, and rounds of what is slow
ROUND, TURNS, FEWEST = 0.2, 256, 3


def timed(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def rounds(base: Callable[[], float], other: Callable[[], float], most: int, seconds: float) -> dict[str, list[float]]:
    """Mean seconds of a base and of another, round by round; after `seconds`, no more than are needed.

    Both follow each other, in turns the one and the other first; a round is as many turns as fill 0.2 s.
    """
    # what is quick is warmed up a second time, with everything in place
    took = base() + other()
    took = took if took > 1 else base() + other()
    turns = max(1, min(TURNS, int(ROUND / took)))
    found: dict[str, list[float]] = {"base": [], "seconds": []}
    begun = time.perf_counter()
    for n in range(most):
        if n >= FEWEST and time.perf_counter() - begun > seconds:
            break
        sums = [0.0, 0.0]
        for turn in range(turns):
            for which in (0, 1) if turn % 2 else (1, 0):
                sums[which] += (base, other)[which]()
        for name, total in zip(found, sums, strict=True):
            found[name].append(rounded(total / turns))
    return found


def rounded(x: float) -> float:
    return float(f"{x:.4g}")


def ratios(figure: dict[str, Any]) -> list[float]:
    return [a / b for a, b in zip(figure["seconds"], figure["base"], strict=True)]


def spread(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratio_cell(found: tuple[float, float, float]) -> str:
    low, middle, high = found
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def verdict(found: tuple[float, float, float], most: float) -> str:
    """Whether the spread of a figure keeps to the most that it may be."""
    if found[2] <= most:
        return "met"
    return "missed" if found[0] > most else "within the spread"


def peak(call: Callable[[], Any]) -> float:
    """Megabytes of resident memory on top of what was there, at most, while something runs (on Linux)."""

    def read(name: str) -> int:
        return int(re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = read("VmRSS")
    call()
    return round((read("VmHWM") - before) / 1024, 1)
