"""Whether layers differ in how many bits their cache needs, and whether that can be measured."""

from __future__ import annotations

import random

from _caches import less, losses, recalls
from _claim import mean, trained, write

from foveate.compress import MixedBits, Quantised
from foveate.core.mechanism import Policy
from foveate.core.ragged import SIDES
from foveate.probe import KeyValue, default_text
from foveate.probe.trials import FULL

LENGTH, FOLLOW, COUNT, PROMPTS, SEEDS = 896, 128, 20, 50, (0, 1, 2)
KEEP = 0.2


def main() -> None:
    model, tokenizer = trained()
    ids = tokenizer(default_text(), verbose=False).input_ids
    half = len(ids) // 2
    mine = MixedBits.fit(model, tokenizer, tokenizer.decode(ids[:half]), keep=KEEP, tokens=LENGTH, follow=FOLLOW)
    parts = [(side, layer) for side in SIDES for layer in range(model.config.num_hidden_layers)]
    fine = len(mine.keys) + len(mine.values)

    def drawn(seed: int) -> Policy:
        return MixedBits.eight(random.Random(seed).sample(parts, fine))

    plain = {"mixed": mine, "all in 4": Quantised(4), "keys 8, values 4": Quantised(8, 4)}
    settings = {name: (policy,) for name, policy in plain.items()}
    at_random = {f"at random, seed {seed}": (drawn(seed),) for seed in SEEDS}
    step = (len(ids) - half - LENGTH - FOLLOW) // (COUNT - 1)
    texts = [ids[half + n * step :][: LENGTH + FOLLOW] for n in range(COUNT)]
    found = losses(model, texts, settings | at_random, FOLLOW)
    others = [sum(column) / len(SEEDS) for column in zip(*(found[name] for name in at_random), strict=True)]
    by_seed = {seed: settings | {"at random": (drawn(seed),)} for seed in SEEDS[:2]}
    asked = recalls(model, tokenizer, KeyValue(1024), by_seed, PROMPTS)
    lost = {name: mean(values) for name, values in found.items()}
    better, halved = less(found["mixed"], others), less(found["mixed"], [x / 2 for x in found["all in 4"]])
    write(
        title=MixedBits.card.title,
        claim="Layers differ in how many bits their cache needs: a fifth of the bytes, with 8 bits where 4 change the "
        "predictions most, lose less than half of what 4 bits everywhere lose, and less than 8 bits elsewhere.",
        verdict="fails" if better["low"] <= 0 else "holds" if halved["low"] > 0 else "partly",
        numbers={
            "loss over the full cache, mixed": lost["mixed"],
            "less than at random": better,
            "less than half of all in 4": halved,
            "key-value recall, mixed": asked["mixed"],
            "layers whose keys get 8 bits": list(mine.keys),
            "layers whose values get 8 bits": list(mine.values),
        },
        control={
            **{f"loss over the full cache, {name}": found for name, found in lost.items() if name != "mixed"},
            **{f"key-value recall, {name}": asked[name] for name in (FULL, "at random", *list(plain)[1:])},
        },
        seeds=list(SEEDS),
        rule="holds where the loss is less than with as many parts at random and less than half of that of 4 bits "
        "everywhere (both intervals above 0); partly where only the first is so",
        setting=f"bits found on one half of Python's documentation; {COUNT} stretches of the other, {LENGTH} tokens "
        f"compressed at once and {FOLLOW} predicted behind them; {PROMPTS} key-value prompts of 1,024 tokens a seed, "
        "two seeds, the question unseen",
    )


if __name__ == "__main__":
    main()
