"""Whether an entry that stands for the dropped tokens gives back some of what dropping them took."""

from __future__ import annotations

from _caches import drawn, less, losses, measured, recalls, stretches
from _claim import mean, trained, write

from foveate.compress import GatedHeads, RetrievalHeads
from foveate.core.budget import Budget
from foveate.probe import Passkey

LENGTH, FOLLOW, STRETCHES, COUNT, SEEDS = 896, 128, 20, 8, (1, 2, 3, 4, 5)
BUDGET, PART = Budget(96, sinks=4, recent=64, every=0), 0.14


def pair(heads) -> dict[str, tuple]:
    """The same heads in full, with the entry for the dropped tokens of the others and without."""
    spared = tuple(sorted((layer, head) for layer, head, _ in heads))
    gates = tuple((layer, head, 1.0) for layer, head in spared)
    return {"with it": (RetrievalHeads(BUDGET, spared),), "without it": (GatedHeads(BUDGET, gates),)}


def main() -> None:
    model, tokenizer = trained()
    gates = measured(model, tokenizer)
    best = gates[: round(PART * len(gates))]
    few = drawn(gates, len(best), 0)
    texts = stretches(tokenizer, LENGTH + FOLLOW, STRETCHES)
    found = losses(model, texts, pair(best) | {f"random heads, {n}": p for n, p in pair(few).items()}, FOLLOW)
    asked = recalls(model, tokenizer, Passkey(LENGTH), dict.fromkeys(SEEDS, pair(best)), COUNT)
    gain = less(found["with it"], found["without it"])
    numbers = {
        "loss over the full cache, with it": mean(found["with it"]),
        "loss over the full cache, without it": mean(found["without it"]),
        "less with it": gain,
        **{f"passkeys, {name}": value for name, value in asked.items()},
    }
    control = {
        "random heads in full: less with it": less(found["random heads, with it"], found["random heads, without it"]),
        "random heads in full: loss over the full cache, with it": mean(found["random heads, with it"]),
    }
    write(
        title="RazorAttention: Efficient KV Cache Compression Through Retrieval Heads",
        claim="A compensation token that stands for the dropped ones recovers some of what is lost with them.",
        verdict="holds" if gain["low"] > 0 else "fails" if gain["high"] < 0 or gain["value"] <= 0 else "partly",
        numbers=numbers,
        control=control,
        seeds=list(SEEDS),
        rule="holds where the loss behind a compressed text is less with the entry (interval above 0), fails where it "
        "is not less",
        setting=f"{len(best)} of {len(gates)} KV heads in full, {BUDGET!r} for the others; nats per token",
    )


if __name__ == "__main__":
    main()
