"""Attention over a prefix that is held once, beside prefixes that each sequence holds for itself.

    python bench/prefix.py [--batch 32] [--prefix 256 512 1024 2048 4096] [--suffix 64] [--rounds 9] [--quick]

Smollm2's shape: 9 heads, 3 KV heads, width 64, 30 layers, float32. Keys and values are random (time does not depend on
what stands in them). `attention` is one layer's attention for one new token of each sequence: ours over the prefix and
the sequences' own keys, beside scaled_dot_product_attention with grouped heads over contiguous keys of full length, as
transformers' dynamic cache holds them. `step` is a whole decode step of smollm2, ours beside transformers' own with
that cache. The two follow each other in each round; ratios are taken inside a round, and their median and quartiles
reported. Bytes are those of all layers' caches, room included, as of the end of the step.

`--quick` tries one small size of each and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

# this folder would hide Python's own module `profile`, which torch imports
if str(Path(__file__).resolve().parent) in sys.path:
    sys.path.remove(str(Path(__file__).resolve().parent))

import torch
from transformers import DynamicCache

import foveate
from foveate.core.mask import Mask
from foveate.core.prefix import Layout, Level, attend_levels, prefix_cache, prefix_layers
from foveate.core.rows import View

RESULTS = Path(__file__).parent / "results"
HEADS, KV_HEADS, WIDTH, LAYERS = 9, 3, 64, 30
STEPS = 2


class Open:
    """The owner of a cache that may be read."""

    open = True


def laid_out(batch: int, prefix: int) -> Layout:
    """A batch whose sequences share one prefix and have equally many tokens of their own."""
    begin = torch.zeros(batch, dtype=torch.long)
    return Layout(((0, batch, 0, prefix),), begin, begin + prefix, prefix, torch.zeros(batch, prefix, dtype=torch.long))


def drawn(batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random keys and values."""
    return torch.randn(batch, KV_HEADS, tokens, WIDTH), torch.randn(batch, KV_HEADS, tokens, WIDTH)


def seconds(call: Callable[[], object], times: int) -> float:
    """Seconds per call."""
    begun = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begun) / times


def compared(ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> dict:
    """Milliseconds of both and the ratio, over rounds in which one follows the other; both tell their seconds."""
    # the first round warms up
    found = [(ours(), theirs()) for _ in range(rounds + 1)][1:]
    low, middle, high = statistics.quantiles([b / a for a, b in found], n=4)
    return {
        "ours_ms": round(1e3 * statistics.median(a for a, _ in found), 3),
        "theirs_ms": round(1e3 * statistics.median(b for _, b in found), 3),
        "times_faster": round(middle, 3),
        "quartiles": [round(low, 3), round(high, 3)],
        "rounds": found,
    }


def attention(batch: int, prefix: int, suffix: int, rounds: int) -> dict:
    """One layer's attention for one new token of each sequence."""
    q, (k, v) = torch.randn(batch, HEADS, 1, WIDTH), drawn(batch, suffix)
    shared = drawn(1, prefix)
    whole = [torch.cat([a.expand(batch, -1, -1, -1), b], 2) for a, b in zip(shared, (k, v), strict=True)]
    view, layout = View(q, k, v), laid_out(batch, prefix)
    mask = Mask.causal_of(1, prefix + suffix)

    def ours() -> torch.Tensor:
        return attend_levels(view, [Level(*shared, 0, batch)], layout.reach(mask, batch))[0]

    def theirs() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, *whole, enable_gqa=True)

    torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=1e-5)
    return compared(lambda: seconds(ours, 5), lambda: seconds(theirs, 5), rounds)


def step(model, batch: int, prefix: int, suffix: int, rounds: int) -> dict:
    """A whole decode step of the model."""
    layout, token = laid_out(batch, prefix), torch.full((batch, 1), 1000)
    shared, own = [drawn(1, prefix) for _ in range(LAYERS)], [drawn(batch, suffix) for _ in range(LAYERS)]
    plain = DynamicCache(config=model.config)
    for layer, levels, new in zip(plain.layers, shared, own, strict=True):
        layer.update(*(torch.cat([a.expand(batch, -1, -1, -1), b], 2) for a, b in zip(levels, new, strict=True)))
    cache = prefix_cache(layout, [shared], Open(), model)
    for layer, new in zip(prefix_layers(cache), own, strict=True):
        layer.update(*new)
    del own

    def run(with_cache) -> tuple[float, torch.Tensor]:
        logits = []
        taken = seconds(lambda: logits.append(model(input_ids=token, past_key_values=with_cache).logits), STEPS)
        with_cache.crop(-STEPS)
        return taken, logits[0]

    def ours() -> tuple[float, torch.Tensor]:
        # a context that is entered once for many tokens is not timed
        with foveate.attach(model, trial=False):
            return run(cache)

    # rounding grows over 30 layers of random keys: row blocks and the framework's kernel are 0.003 apart, too
    torch.testing.assert_close(ours()[1], run(plain)[1], rtol=0, atol=0.1)
    found = compared(lambda: ours()[0], lambda: run(plain)[0], rounds)
    found["ours_bytes"] = sum(t.nbytes for pair in shared for t in pair)
    found["ours_bytes"] += sum(layer.bytes_own() for layer in prefix_layers(cache))
    token_bytes = 2 * KV_HEADS * WIDTH * 4 * LAYERS
    found["theirs_bytes"] = batch * (prefix + suffix + STEPS) * token_bytes
    return found


def line(batch: int, prefix: int, suffix: int, what: str, found: dict) -> str:
    low, high = found["quartiles"]
    held = ""
    if "ours_bytes" in found:
        held = f"{found['ours_bytes'] / 1e6:.0f} of {found['theirs_bytes'] / 1e6:.0f}"
    return (
        f"| {batch} | {prefix:,} | {suffix} | {what} | {found['ours_ms']:.2f} | {found['theirs_ms']:.2f} | "
        f"{found['times_faster']:.2f} ({low:.2f}-{high:.2f}) | {held} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prefix", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--suffix", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="one small size, nothing is written")
    args = parser.parse_args()
    if args.quick:
        args.batch, args.prefix, args.suffix, args.rounds = 4, [128], 16, 3
    torch.manual_seed(0)
    model, _ = foveate.load("smollm2", tokenizer=False)
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    rows = []
    page = [
        "# A prefix that is held once",
        f"smollm2's shape, float32, {machine}. What each line is stands in the head of bench/prefix.py; rounds are in "
        "the json.",
        "`python bench/prefix.py`: one new token of each sequence",
        "| sequences | prefix | suffix | what | ms | each its own, ms | times faster (quartiles) | MB held |\n"
        "|---|---|---|---|---|---|---|---|",
    ]
    with torch.inference_mode():
        for prefix in args.prefix:
            for what in ("attention", "step"):
                size = (args.batch, prefix, args.suffix)
                found = attention(*size, args.rounds) if what == "attention" else step(model, *size, args.rounds)
                rows.append({"batch": args.batch, "prefix": prefix, "suffix": args.suffix, "what": what} | found)
                page[-1] += "\n" + line(*size, what, found)
                print(line(*size, what, found), flush=True)
    if args.quick:
        return
    RESULTS.mkdir(exist_ok=True)
    command = f"python bench/prefix.py --rounds {args.rounds}"
    (RESULTS / "prefix.json").write_text(
        json.dumps({"command": command, "machine": machine, "rows": rows}, indent=1) + "\n"
    )
    (RESULTS / "prefix.md").write_text("\n\n".join(page) + "\n")


if __name__ == "__main__":
    main()
