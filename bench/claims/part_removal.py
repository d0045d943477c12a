"""Whether attention is easier to take out than feed-forward parts, and deep attention more than early one.

Parts go one by one, each time the one without which the next-token distributions change least, on pieces of prose.
What is left is judged on other text and on passkeys. The control takes out as many parts at random, the last attention
spared, and the untrained twin says how much of the first step comes with the architecture.
"""

from __future__ import annotations

import random

import torch
from _claim import mean, number, share, trained, untrained, write
from scipy import stats

from foveate.compress import PartRemoval
from foveate.core.attach import attach, attention_layers
from foveate.core.removing import KINDS
from foveate.measure.active_dormant import KINDS as TEXTS
from foveate.measure.active_dormant import pieces_of
from foveate.probe import Passkey, perplexity, run

LENGTH, PIECES, COUNT, EVERY, SEED = 128, 3, 12, 4, 0
HELD_OUT, KEYS, KEY_LENGTH, RANDOM_SEEDS = 1536, 12, 256, (1, 2, 3)


def at_random(layers: int, count: int, seed: int) -> PartRemoval:
    """So many parts, all alike likely."""
    drawn = random.Random(seed).sample([(kind, n) for kind in KINDS for n in range(layers)], count)
    attention, feed_forward = (tuple(sorted(n for kind, n in drawn if kind == k)) for k in KINDS)
    return PartRemoval(attention[: layers - 1], feed_forward)


def scores(model, tokenizer, ids, removal: PartRemoval | None) -> dict[str, float]:
    """Perplexity on other text and recall of passkeys, and the share of the parameters that are left."""
    whole = sum(p.numel() for p in model.parameters())
    with attach(model, *([removal] if removal else []), trial=False):
        recall = run(model, tokenizer, Passkey(length=KEY_LENGTH), KEYS, SEED)
        left = sum(p.numel() for p in model.parameters())
        return {
            "perplexity": number(perplexity(model, ids)[0]),
            "passkeys": number(recall.recall),
            "parameters left": number(left / whole),
        }


def alone(step, kind: str) -> torch.Tensor:
    """The distance without each part by itself, by layer."""
    return torch.tensor([d for k, _, d in sorted(step.tried, key=lambda t: t[1]) if k == kind], dtype=torch.float64)


def main() -> None:
    model, tokenizer = trained()
    layers = len(attention_layers(model))
    ids = pieces_of(TEXTS["prose"](), tokenizer, LENGTH, PIECES, SEED, "prose")
    other = pieces_of(TEXTS["code"](), tokenizer, HELD_OUT, 1, SEED, "code")[0]
    found = PartRemoval.fit(model, ids, count=COUNT, progress=lambda n, of: print(f"\r{n} of {of}", end=""))
    attention, feed_forward = (alone(found.steps[0], kind) for kind in KINDS)
    went = [step for step in found.steps if step.kind == "attention"]
    depths = [step.layer / (layers - 1) for step in went]
    order = [f"{step.kind} {step.layer}: {number(step.distance)}" for step in found.steps]
    # the course takes the easiest, so that its layers are no sample; all layers alone are looked at, too
    trend = stats.spearmanr(range(1, layers - 1), attention[1:-1])
    numbers = {
        "one part by itself, attention: divergence": mean(attention),
        "one part by itself, feed-forward: divergence": mean(feed_forward),
        "one part by itself: feed-forward minus attention of the same layer": mean(feed_forward - attention),
        "layers whose attention is easier": share(int((attention < feed_forward).sum()), layers),
        f"attention among the first {COUNT} that go": share(len(went), COUNT),
        "depth of the attention that goes, 0 the first layer and 1 the last": mean(depths) if depths else None,
        "rank correlation of depth and divergence without the attention, first and last layer left out": {
            "value": number(trend.statistic),
            "p": number(trend.pvalue),
            "n": layers - 2,
        },
        "what went": order,
        "whole model": scores(model, tokenizer, other, None),
    }
    control = {}
    for n in range(EVERY, COUNT + 1, EVERY):
        numbers[f"{n} parts gone"] = scores(model, tokenizer, other, found.after(n))
        drawn = [scores(model, tokenizer, other, at_random(layers, n, seed)) for seed in RANDOM_SEEDS]
        control[f"{n} parts gone at random"] = {
            "log perplexity": mean([torch.tensor(d["perplexity"]).log() for d in drawn]),
            "passkeys": mean([d["passkeys"] for d in drawn]),
        }
    twin = untrained(model, SEED)
    plain = [alone(PartRemoval.fit(twin, ids[:1], count=1).steps[0], kind) for kind in KINDS]
    control["untrained: feed-forward minus attention of the same layer"] = mean(plain[1] - plain[0])
    easier = (
        numbers["one part by itself: feed-forward minus attention of the same layer"]["low"] > 0
        and numbers[f"attention among the first {COUNT} that go"]["low"] > 0.5
    )
    deeper = trend.statistic < 0 and trend.pvalue < 0.05 and len(depths) > 1 and mean(depths)["low"] > 0.5
    write(
        title="FinerCut: Finer-grained Interpretable Layer Pruning for Large Language Models",
        claim="Attention layers are easier to take out than feed-forward layers, those of deep layers most of all.",
        verdict="holds" if easier and deeper else "partly" if easier or deeper else "fails",
        numbers=numbers,
        control=control,
        seeds=[SEED, *RANDOM_SEEDS],
        rule="easier: by itself, the attention of a layer changes less than its feed-forward (interval above 0), and "
        f"more than half of the first {COUNT} parts that go are attention (interval above 0.5). Deeper: the attention "
        "that goes lies behind the middle (interval above 0.5), and the divergence without the attention of a layer "
        "falls with depth (p < 0.05). Holds: both",
    )


if __name__ == "__main__":
    main()
