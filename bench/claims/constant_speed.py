"""Whether TransNormer's attention takes as many tokens per second at any length, up to 65,536 of them.

65,536 tokens at a time, as 64 texts of 1,024 up to one of 65,536; 4 heads of 64, float32, forward, and with backward as
in training. Features, decays, norm and gate are in it, projections of queries, keys and values are not. The control is
causal softmax by scaled_dot_product_attention on the same queries, keys and values, up to 16,384 tokens. In each round
everything is timed once, in an order of its own.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from _claim import number, write
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from foveate.core.mixer import Tokens
from foveate.core.recurrence import Heads
from foveate.core.rule import Sizes
from foveate.replace import Transnormer

TOTAL, HEADS, DIM, ROUNDS, SEED = 65_536, 4, 64, 7, 0
LENGTHS, CONTROL = tuple(1024 << n for n in range(7)), (1024, 4096, 16_384)
# the slowest length may be this share of the fastest
CONSTANT = 0.9
# relative positions are in the first layer alone, and so are no part of what is typical
RULE, LAYER = Transnormer(), 1
PASSES = {"forward": False, "forward and backward": True}


def inputs(length: int, backward: bool) -> list[Tensor]:
    """Queries, keys, values and the layer's input, for as many texts as there are tokens for."""
    rng = torch.Generator().manual_seed(SEED)
    flat = [torch.randn(TOTAL * HEADS * DIM, generator=rng) for _ in range(4)]
    shapes = [(-1, HEADS, length, DIM)] * 3 + [(-1, length, HEADS * DIM)]
    return [x.view(shape).requires_grad_(backward) for x, shape in zip(flat, shapes, strict=True)]


def transnormer(q: Tensor, k: Tensor, v: Tensor, x: Tensor, learned: torch.nn.Module) -> Tensor:
    batch, length = x.shape[:2]
    place = torch.arange(length).expand(batch, -1)
    tokens = Tokens(x, torch.ones(batch, length, dtype=torch.bool), True, place, x.requires_grad)
    heads = Heads(q, k, v, tokens, DIM**-0.5, learned, Sizes(HEADS * DIM, HEADS, HEADS, DIM, LAYER))
    return RULE.flow(heads, None)[0]


def softmax(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return sdpa(q, k, v, is_causal=True)


def seconds(call: Callable[..., Tensor], length: int, backward: bool) -> float:
    tensors = inputs(length, backward)
    begun = time.perf_counter()
    if backward:
        torch.autograd.grad(call(*tensors).sum(), tensors, allow_unused=True)
    else:
        with torch.no_grad():
            call(*tensors)
    return time.perf_counter() - begun


def quartiles(values: Any) -> dict[str, float]:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"value": number(middle), "low": number(low), "high": number(high), "n": len(values)}


def slowest(speeds: np.ndarray) -> dict[str, float]:
    """Median speed of the slowest length over that of the fastest, [rounds, lengths], with its bootstrap interval."""

    def of(some: np.ndarray) -> np.ndarray:
        middle = np.median(some, axis=-2)
        return middle.min(-1) / middle.max(-1)

    draws = np.random.default_rng(SEED).integers(len(speeds), size=(2000, len(speeds)))
    low, high = np.percentile(of(speeds[draws]), [2.5, 97.5])
    return {"value": number(of(speeds)), "low": number(low), "high": number(high), "n": len(speeds)}


def main() -> None:
    torch.manual_seed(SEED)
    learned = RULE.learned(Sizes(HEADS * DIM, HEADS, HEADS, DIM, LAYER))
    ways = {"transnormer": (partial(transnormer, learned=learned), LENGTHS), "softmax": (softmax, CONTROL)}
    jobs = [(way, name, n) for way, (_, lengths) in ways.items() for name in PASSES for n in lengths]
    found: dict[tuple[str, str, int], list[float]] = {job: [] for job in jobs}
    for way, name, n in jobs:
        # once for the memory to be there
        if n == LENGTHS[0]:
            seconds(ways[way][0], n, PASSES[name])
    for turn in range(ROUNDS):
        for way, name, n in random.Random(turn).sample(jobs, len(jobs)):
            found[way, name, n].append(TOTAL / seconds(ways[way][0], n, PASSES[name]))
        print(f"round {turn}", file=sys.stderr, flush=True)
    told: dict[str, dict[str, Any]] = {way: {} for way in ways}
    for way, (_, lengths) in ways.items():
        for name in PASSES:
            for n in lengths:
                told[way][f"{way}, {name}: thousand tokens per second at {n}"] = quartiles(
                    np.divide(found[way, name, n], 1000)
                )
            speeds = np.stack([found[way, name, n] for n in lengths], 1)
            told[way][f"{way}, {name}: slowest length / fastest"] = slowest(speeds)
    constant = {way: [told[way][f"{way}, {name}: slowest length / fastest"] for name in PASSES] for way in ways}
    steady = [ratio["low"] >= CONSTANT for ratio in constant["transnormer"]]
    told_apart = all(ratio["high"] < CONSTANT for ratio in constant["softmax"])
    write(
        title="Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
        claim="TransNormer's linear attention keeps a constant speed, forward and in training, for texts of various "
        "lengths.",
        verdict="holds" if all(steady) and told_apart else "partly" if any(steady) else "fails",
        numbers=told["transnormer"],
        control=told["softmax"],
        seeds=[SEED],
        rule=f"constant: the median speed at the slowest length is at least {CONSTANT:g} of that at the fastest, with "
        "the whole bootstrap interval over rounds. Holds: forward and with backward, and the control is constant in "
        "neither; partly: one of these; fails: neither",
        setting=f"{TOTAL} tokens at a time, {HEADS} heads of {DIM}, float32, {torch.get_num_threads()} threads, "
        f"{ROUNDS} rounds",
        encoder="none: random queries, keys and values",
    )


if __name__ == "__main__":
    main()
