"""Whether keeping heavy hitters beside the recent tokens predicts the text better than keeping recent tokens alone."""

from __future__ import annotations

from _caches import less, losses, stretches
from _claim import mean, trained, write

from foveate.compress import HeavyHitters, KeyNorm, Streaming
from foveate.core.budget import Budget

LENGTH, FOLLOW, COUNT, SHARES = 896, 128, 20, (0.5, 0.2, 0.1)


def main() -> None:
    model, tokenizer = trained()
    texts = stretches(tokenizer, LENGTH + FOLLOW, COUNT)
    settings = {}
    for part in SHARES:
        half = max(1, round(part * LENGTH / 2))
        # half for the recent tokens and half for the heavy ones; without sinks the control is recency alone
        budget = Budget(part, sinks=0, recent=half, every=0)
        settings[f"{part:g} heavy hitters and recent"] = (HeavyHitters(budget),)
        settings[f"{part:g} recent alone"] = (Streaming(Budget(part, sinks=0, every=0)),)
        settings[f"{part:g} first four and recent"] = (Streaming(Budget(part, sinks=4, every=0)),)
        settings[f"{part:g} short keys and recent"] = (KeyNorm(budget),)
    found = losses(model, texts, settings, FOLLOW)
    numbers, control, better, best = {}, {}, [], []
    for part in SHARES:
        mine = found[f"{part:g} heavy hitters and recent"]
        numbers[f"{part:g}: loss over the full cache"] = mean(mine)
        numbers[f"{part:g}: less than recent alone"] = less(mine, found[f"{part:g} recent alone"])
        numbers[f"{part:g}: less than first four and recent"] = less(mine, found[f"{part:g} first four and recent"])
        for name in ("recent alone", "first four and recent", "short keys and recent"):
            control[f"{part:g} {name}: loss over the full cache"] = mean(found[f"{part:g} {name}"])
        better.append(numbers[f"{part:g}: less than recent alone"]["low"] > 0)
        best.append(numbers[f"{part:g}: less than first four and recent"]["low"] > 0)
    write(
        title="H$_2$O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
        claim="A cache of heavy hitters and recent tokens predicts a text better than one of as many recent tokens.",
        verdict="holds" if all(better) and all(best) else "partly" if any(better) else "fails",
        numbers=numbers,
        control=control,
        seeds=[0],
        rule="holds where the loss is less (interval above 0) at every size than with recent tokens alone, and than "
        "with the first four and recent tokens; partly where it is less than with recent tokens alone at some size",
        setting=f"{COUNT} stretches of documentation, {LENGTH} tokens compressed at once and {FOLLOW} predicted behind "
        "them; nats per token",
    )


if __name__ == "__main__":
    main()
