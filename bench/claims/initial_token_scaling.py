"""Does scaling the first token's attention make a small model classify better, and more so head by head?

    python bench/claims/initial_token_scaling.py --data FOLDER

For each data set and seed: the factor is chosen on 48 labelled training examples, first the same for all heads, then
in a share of the heads in the order of their response (one backward pass); all are judged on 200 other examples. The
control takes as many random heads with the same factor. Without labels: the factor with the least entropy.
"""

import random

import numpy as np
from _claim import trained, write
from _tasks import agnews, command, difference, folder, sst2

from foveate.finding.judging import Judge
from foveate.finding.searching import search
from foveate.steer import InitialTokenScale

SEEDS, TRAIN, HELD_OUT = (0, 1), 48, 200


def main() -> None:
    data = folder()
    model, tokenizer = trained()
    everyone = [
        (at, h) for at in range(model.config.num_hidden_layers) for h in range(model.config.num_attention_heads)
    ]
    numbers, control, gains = {}, {}, {}
    for name in ("SST-2", "AG News"):
        right = {k: [] for k in ("plain", "uniform", "by head", "random heads", "no labels")}
        chosen = []
        for seed in SEEDS:
            if name == "SST-2":
                training, held_out = sst2(data, "train", TRAIN, seed), sst2(data, "dev", len(SEEDS) * HELD_OUT, 0)
                held_out = held_out[seed * HELD_OUT : (seed + 1) * HELD_OUT]
            else:
                drawn = agnews(data, len(SEEDS) * (TRAIN + HELD_OUT), 0)
                drawn = drawn[seed * (TRAIN + HELD_OUT) :]
                training, held_out = drawn[:TRAIN], drawn[TRAIN : TRAIN + HELD_OUT]
            judge = Judge(model, tokenizer, training)
            found = search(judge, InitialTokenScale(1.6), evaluations=22, objective="accuracy", seed=seed)
            uniform = max((t for t in found.tries if not t.mechanism.heads), key=lambda t: t.objective)
            by_head = max((t for t in found.tries if t.mechanism.heads), key=lambda t: t.objective)
            table = by_head.mechanism.heads
            drawn = random.Random(seed).sample(everyone, len(table))
            others = InitialTokenScale(1.0, heads=tuple((*h, table[0][2]) for h in sorted(drawn)))
            unlabelled = search(judge, InitialTokenScale(1.6), 10, "entropy", seed, heads=False)
            test = Judge(model, tokenizer, held_out)
            edits = {
                "plain": (),
                "uniform": (uniform.mechanism,),
                "by head": (by_head.mechanism,),
                "random heads": (others,),
                "no labels": (unlabelled.mechanism,),
            }
            for what, mechanisms in edits.items():
                right[what].append(test.score(*mechanisms).right)
            chosen.append(
                {
                    "uniform factor": uniform.mechanism.factor,
                    "heads": len(table),
                    "their factor": round(table[0][2], 3),
                    "factor without labels": unlabelled.mechanism.factor,
                    "training accuracy: plain, uniform, by head": [
                        round(float(x), 3) for x in (found.plain, uniform.objective, by_head.objective)
                    ],
                    "held-out accuracy": {k: round(float(v[-1].mean()), 3) for k, v in right.items()},
                }
            )
            print(name, seed, chosen[-1], flush=True)
        pooled = {k: np.concatenate(v) for k, v in right.items()}
        gains[name] = {
            "uniform against plain": difference(pooled["plain"], pooled["uniform"]),
            "by head against plain": difference(pooled["plain"], pooled["by head"]),
            "by head against uniform": difference(pooled["uniform"], pooled["by head"]),
        }
        numbers[name] = gains[name] | {
            "without labels against plain": difference(pooled["plain"], pooled["no labels"]),
            "chosen, by seed": [str(c) for c in chosen],
        }
        control[f"{name}: random heads against plain"] = difference(pooled["plain"], pooled["random heads"])
    improves = [g["uniform against plain"]["low"] > 0 for g in gains.values()]
    further = [g["by head against uniform"]["low"] > 0 for g in gains.values()]
    any_gain = any(improves) or any(g["by head against plain"]["low"] > 0 for g in gains.values())
    write(
        title="ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models Without Training",
        claim="Scaling the attention to the initial token improves classification (SST-2, AG News), and factors for "
        "single heads improve it further.",
        verdict="holds" if all(improves) and all(further) else "partly" if any_gain else "fails",
        numbers=numbers,
        control=control,
        seeds=list(SEEDS),
        rule="holds: on both data sets the intervals of uniform against plain and of by head against uniform lie above "
        "0, pooled over seeds. Partly: some edit beats plain on one of them",
        **command("initial_token_scaling"),
    )


if __name__ == "__main__":
    main()
