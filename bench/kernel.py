"""Time the native kernel against scaled_dot_product_attention: python bench/kernel.py [--rounds 9] [--quick].

Both run in turn in one process, so that a busy machine hits both. A ratio is taken within each round; the
table shows its median and quartiles over the rounds. sdpa runs with grouped and with repeated heads; the
faster counts.
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from foveate.core import native
from foveate.core.packed import IntegerRows

RESULTS = Path(__file__).parent / "results" / "kernel.json"
WITHIN = (16, 64, 256, 1024)
# name, batch, heads, kv heads, width, queries, keys, window
SHAPES = (
    ("prefill", 1, 9, 3, 64, 1024, 1024, None),
    ("prefill", 1, 9, 3, 64, 4096, 4096, None),
    ("prefill", 1, 9, 3, 64, 8192, 8192, None),
    ("prefill", 1, 8, 8, 128, 4096, 4096, None),
    ("window 256", 1, 9, 3, 64, 4096, 4096, 256),
    ("window 256", 1, 9, 3, 64, 8192, 8192, 256),
    ("decode", 1, 9, 3, 64, 1, 4096, None),
    ("decode", 1, 12, 12, 64, 1, 4096, None),
    ("decode", 8, 9, 3, 64, 1, 4096, None),
)


# bits of keys and of values
CODES = ((8, 8), (8, 4), (4, 4))


def coded(rows: torch.Tensor, bits: int) -> native.Codes:
    """Rows as a quantised cache stores them."""
    made = IntegerRows.empty(rows[..., 0].numel(), rows.shape[-1], bits, 32, rows.dtype, rows.device)
    made[:] = rows.reshape(-1, rows.shape[-1])
    return native.Codes(*(x.view(*rows.shape[:3], *x.shape[1:]) for x in (made.codes, made.grid)), bits)


def prepare(batch, heads, groups, width, queries, keys, window) -> tuple[list[Callable], dict[str, Callable]]:
    """Two ways to call sdpa, and the kernel with more and more asked of it."""
    torch.manual_seed(0)
    q = torch.randn(batch, queries, heads, width).transpose(1, 2)
    k, v = (torch.randn(batch, keys, groups, width).transpose(1, 2) for _ in range(2))
    repeated = [x.repeat_interleave(heads // groups, 1) for x in (k, v)]
    key_position = torch.arange(keys, dtype=torch.int32)[None]
    position = key_position[:, keys - queries :]
    lo = (position - (window or keys) + 1).clamp(min=0)
    given = {"scale": 1 / math.sqrt(width), "lo": lo, "hi": position + 1}
    given |= {"query_position": position, "key_position": key_position}
    tokens = torch.randint(0, 300, (1, keys), dtype=torch.int32)
    first = torch.where(key_position == 0, 0, 1).int()
    match = (
        (torch.zeros_like(position), first),
        (position - 1, key_position),
        (tokens[:, -queries:], tokens),
        (tokens[:, -queries:], tokens.roll(1)),
    )
    asked = {
        "out": {},
        "entropy, distance": {"want_entropy": True, "want_distance": True},
        "4 within": {"within": WITHIN},
        "4 match": {"match": match},
        "column": {"want_column": True},
    }
    asked["everything"] = {name: x for more in asked.values() for name, x in more.items()}
    causal = queries > 1
    calls = {name: lambda more=more: native.attend(q, k, v, **given, **more) for name, more in asked.items()}
    if not causal:
        for bits in CODES:
            some = [coded(x, n) for x, n in zip((k, v), bits, strict=True)]
            calls[f"out, {bits[0]}/{bits[1]} bits"] = lambda some=some: native.attend(q, *some, **given)
    return (
        [
            lambda: sdpa(q, k, v, is_causal=causal, enable_gqa=True),
            lambda: sdpa(q, *repeated, is_causal=causal),
        ],
        calls,
    )


def seconds(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(shape: tuple, rounds: int) -> list[dict]:
    ways, asked = prepare(*shape[1:])
    rounds = rounds if shape[5] > 1 else 5 * rounds
    for call in (*ways, *asked.values()):
        call()
    theirs, ours = [], {name: [] for name in asked}
    for _ in range(rounds):
        theirs.append([seconds(way) for way in ways])
        for name, call in asked.items():
            ours[name].append(seconds(call))
    way = min(range(2), key=lambda i: statistics.median(times[i] for times in theirs))
    sdpa_times = [times[way] for times in theirs]
    rows = []
    for name, times in ours.items():
        low, middle, high = statistics.quantiles([a / b for a, b in zip(times, sdpa_times, strict=True)], n=4)
        rows.append(
            dict(
                zip(("name", "batch", "heads", "kv_heads", "width", "queries", "keys", "window"), shape, strict=True),
                asked=name,
                milliseconds=round(1e3 * statistics.median(times), 3),
                sdpa_milliseconds=round(1e3 * statistics.median(sdpa_times), 3),
                ratio=round(middle, 3),
                quartiles=[round(low, 3), round(high, 3)],
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="only the shapes of at most 1,024 queries")
    options = parser.parse_args()
    if not native.available():
        raise SystemExit("the native kernel is not built: python setup.py build_ext --inplace")
    print(f"{'shape':38}{'asked':20}{'ms':>9}{'sdpa ms':>9}{'ratio':>7}  quartiles")
    rows = []
    for shape in SHAPES:
        name, batch, heads, groups, width, queries, keys, _ = shape
        if options.quick and queries > 1024:
            continue
        label = f"{name} {heads}/{groups} x {width}, {batch} x {queries} x {keys}"
        for row in measure(shape, options.rounds):
            rows.append(row)
            spread = "{:.2f} to {:.2f}".format(*row["quartiles"])
            print(
                f"{label:38}{row['asked']:20}{row['milliseconds']:9.2f}{row['sdpa_milliseconds']:9.2f}"
                f"{row['ratio']:7.2f}  {spread}",
                flush=True,
            )
    machine = {
        "processor": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if not options.quick:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({"machine": machine, "rounds": options.rounds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
