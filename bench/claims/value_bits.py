"""Whether the bits of a quantised cache matter more in keys than in values."""

from __future__ import annotations

from _caches import less, losses, recalls, stretches
from _claim import mean, trained, write

from foveate.compress import Quantised, Streaming
from foveate.core.budget import Budget
from foveate.probe import KeyValue
from foveate.probe.trials import FULL

LENGTH, FOLLOW, COUNT, PROMPTS, SEEDS = 896, 128, 20, 50, (0, 1)
CACHES = {
    "keys 8, values 4": Quantised(8, 4),
    "keys 4, values 8": Quantised(4, 8),
    "both 8": Quantised(8),
    "both 4": Quantised(4),
    # as many bytes with all of their bits, for fewer tokens
    "first and recent tokens": Streaming(Budget(0.22, every=0)),
}


def main() -> None:
    model, tokenizer = trained()
    settings = {name: (policy,) for name, policy in CACHES.items()}
    found = losses(model, stretches(tokenizer, LENGTH + FOLLOW, COUNT), settings, FOLLOW)
    asked = recalls(model, tokenizer, KeyValue(1024), dict.fromkeys(SEEDS, settings), PROMPTS)
    mine, *others = CACHES
    lost = {name: mean(found[name]) for name in CACHES}
    more = less(found[mine], found["keys 4, values 8"])
    nothing = lost[mine]["high"] < 0.01 and asked[mine]["value"] >= 0.95 * asked[FULL]["value"]
    write(
        title="KVTuner: Sensitivity-Aware Layer-Wise Mixed-Precision KV Cache Quantization for Efficient and Nearly "
        "Lossless LLM Inference",
        claim="Keys need more bits than values: with keys in 8 bits and values in 4 a cache loses less than the other "
        "way round, and next to nothing.",
        verdict="fails" if more["low"] <= 0 else "holds" if nothing else "partly",
        numbers={
            f"loss over the full cache, {mine}": lost[mine],
            "less than keys 4, values 8": more,
            f"key-value recall, {mine}": asked[mine],
        },
        control={
            **{f"loss over the full cache, {name}": lost[name] for name in others},
            **{f"key-value recall, {name}": asked[name] for name in (FULL, *others)},
        },
        seeds=list(SEEDS),
        rule="holds where the loss is less than the other way round (interval above 0), less than 0.01 nats per token "
        "above the full cache (upper end of the interval), and recall is at least 0.95 of the full cache's; partly "
        "where only the first is so",
        setting=f"{COUNT} stretches of documentation, {LENGTH} tokens compressed at once and {FOLLOW} predicted behind "
        f"them; {PROMPTS} key-value prompts of 1,024 tokens a seed, the question unseen",
    )


if __name__ == "__main__":
    main()
