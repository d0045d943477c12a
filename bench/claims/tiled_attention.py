"""Whether exact attention by tiles takes memory that grows with N, and no more time than the naive form at any length.

Causal attention of 4 heads, forward and with backward, at 128 to 8,192 tokens. The naive form keeps the weights of all
rows; where they would not fit it is left out. Memory is the largest resident set on top of what was there, in a process
of its own for each length. Times are taken in turns, their ratio inside each repeat.
"""

from __future__ import annotations

import ctypes
import gc
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _claim import number, write
from scipy import stats

from foveate.core import tiled
from foveate.core.mask import Mask
from foveate.core.rows import View

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
MEASURED = (1024, 2048, 4096, 8192)
HEADS, DIM, REPEATS = 4, 64, 9
SEED = 0


def inputs(n: int) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(SEED)
    return [torch.randn(1, HEADS, n, DIM, generator=rng) for _ in range(3)]


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    n = q.shape[2]
    s = q @ k.transpose(-1, -2) * DIM**-0.5 + torch.full((n, n), -torch.inf).triu(1)
    return s.softmax(-1) @ v


def by_tiles(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return tiled.attend(View(q, k, v, Mask.causal_of(q.shape[2])))[0]


WAYS = {"tiled": by_tiles, "naive": naive}


def run(way: str, tensors: list[torch.Tensor], backward: bool) -> None:
    if backward:
        leaves = [x.requires_grad_() for x in tensors]
        torch.autograd.grad(WAYS[way](*leaves).sum(), leaves)
    else:
        with torch.no_grad():
            WAYS[way](*tensors)


def resident(name: str) -> int:
    return int(re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def worker(way: str, n: int, backward: bool) -> None:
    """Bytes on top of the inputs, in this process."""
    run(way, inputs(64), backward)
    tensors = inputs(n)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run(way, tensors, backward)
    print(resident("VmHWM") - before)


def memory(way: str, n: int, backward: bool) -> int:
    command = [sys.executable, __file__, "worker", way, str(n), str(int(backward))]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def grows(way: str, backward: bool) -> dict[str, Any]:
    """Exponent of memory over length with a 95 % interval."""
    used = [memory(way, n, backward) for n in MEASURED]
    fit = stats.linregress(np.log(MEASURED), np.log(used))
    half = float(stats.t.ppf(0.975, len(MEASURED) - 2)) * fit.stderr
    bounds = {"value": number(fit.slope), "low": number(fit.slope - half), "high": number(fit.slope + half)}
    return bounds | {"MB": {f"{n}": number(b / 2**20) for n, b in zip(MEASURED, used, strict=True)}}


def seconds(n: int, backward: bool) -> dict[str, float]:
    """Median of tiled / naive inside a repeat, with quartiles."""
    tensors, found = inputs(n), []
    for _ in range(REPEATS + 1):
        took = {}
        for way in WAYS:
            begun = time.perf_counter()
            # short calls are repeated, so that the clock sees them
            for _ in range(max(1, 1024 // n)):
                run(way, tensors, backward)
            took[way] = time.perf_counter() - begun
        found.append(took["tiled"] / took["naive"])
    low, middle, high = np.percentile(found[1:], [25, 50, 75])
    return {"value": number(middle), "low": number(low), "high": number(high), "n": REPEATS}


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], int(sys.argv[3]), sys.argv[4] == "1")
        return
    numbers: dict[str, Any] = {}
    control: dict[str, Any] = {}
    kinds = {"forward": False, "forward and backward": True}
    for name, backward in kinds.items():
        numbers[f"memory over N, exponent, {name}"] = grows("tiled", backward)
        control[f"naive: memory over N, exponent, {name}"] = grows("naive", backward)
        for n in LENGTHS:
            numbers[f"time / naive at {n} tokens, {name}"] = seconds(n, backward)
    linear = all(numbers[f"memory over N, exponent, {name}"]["value"] < 1.2 for name in kinds)
    fast = all(x["value"] <= 1 for name, x in numbers.items() if name.startswith("time"))
    write(
        title="FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness",
        claim="Exact attention by tiles takes memory that grows with N, and no more time than the naive form at any N.",
        verdict="holds" if linear and fast else "partly" if linear or fast else "fails",
        numbers=numbers,
        control=control,
        seeds=[SEED],
        rule="linear: an exponent of memory over N below 1.2, forward and with backward. Fast: the median ratio of "
        "time to the naive form is at most 1 at every length, forward and with backward. Holds: both",
        encoder="none: random queries, keys and values",
    )


if __name__ == "__main__":
    main()
