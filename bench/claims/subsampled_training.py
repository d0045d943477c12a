"""Whether training on a random part of the keys generalises better than dense training, at lower cost.

A model that is large for its text is trained for many epochs on a small part of it, dense or with one key of four, and
judged on held-out text with all keys. Time is that of attention's forward and backward pass at 2,048 tokens, measured
beside dense attention in alternating rounds.
"""

from __future__ import annotations

import statistics
import time

import torch
from _claim import mean, number, write
from _trained import SIZE, carried_out, command, last, less, options, runs

from foveate.core.mask import Mask
from foveate.core.rows import View, attend
from foveate.core.rule import Rule
from foveate.replace import Subsampled
from foveate.training.run import Optimisation
from foveate.training.tasks.characters import Characters

LENGTH, PART = 128, 60_000
DENSE, SOME = "softmax", "subsampled:every=4"
TRAINING = Optimisation(steps=1500, batch=32, decay=0.0)
ROUNDS = 9


def main() -> None:
    whole = (options().data / "wikitext2-valid.txt").read_text(encoding="utf-8")
    found = carried_out(runs(Characters(length=LENGTH, longer=1, text=whole[:PART]), (DENSE, SOME), SIZE, TRAINING))
    loss = {m: last(o, "loss", LENGTH) for m, o in found.items()}
    gain = mean(less(loss[DENSE], loss[SOME]))
    fits = {m: mean([o.result["losses"][-1] for o in os]) for m, os in found.items()}
    ratio = cost()
    better, cheaper = gain["low"] > 0, ratio["high"] < 1
    write(
        title="The Information Pathways Hypothesis: Transformers are Dynamic Self-Ensembles",
        claim="Training on subsampled attention generalises better than dense training, at lower cost.",
        verdict=("fails", "partly", "holds")[better + cheaper],
        numbers={
            "held-out loss of dense training minus that of subsampled": gain,
            "time of attention at 2,048 tokens, forward and backward, over dense": ratio,
        },
        control={"held-out loss of dense training": mean(loss[DENSE])}
        | {f"training loss at the end, {m}": fits[m] for m in found},
        rule="better: the interval of the held-out gain lies above 0. Cheaper: the interval of the time ratio lies "
        "below 1. "
        "Holds: both; partly: one",
        encoder="decoders of 2 layers, width 96, 4 heads, on 54,000 characters of WikiText-2, many times over",
        **command(),
    )


def cost() -> dict[str, float]:
    """Time of attention with one key of four over dense attention."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, 2048, 64, generator=rng).requires_grad_() for _ in range(3))
    ratios = []
    for n in range(ROUNDS + 1):
        seconds = {}
        for name, rule in ((SOME, Subsampled(every=4)), (DENSE, Rule()))[:: 1 if n % 2 else -1]:
            begun = time.perf_counter()
            view = View(q, k, v, Mask.causal_of(2048), rule=rule, training=True)
            attend(view).out.sum().backward()
            seconds[name] = time.perf_counter() - begun
        if n:
            ratios.append(seconds[SOME] / seconds[DENSE])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"value": number(middle), "low": number(low), "high": number(high), "n": ROUNDS}


if __name__ == "__main__":
    main()
