"""What the claims about KV caches share: prompts and stretches of text under many caches at once."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from _claim import mean, share

from foveate.core.mechanism import Policy
from foveate.core.places import Value
from foveate.planning.heads import answer_mass
from foveate.probe import KeyValue, Passkey, default_text
from foveate.probe.trials import FULL, continuations, trials

MEASURED_ON = {"length": 700, "count": 8, "seed": 1000}


def measured(model: Any, tokenizer: Any) -> tuple[Value, ...]:
    """How much of each KV head's weight lies on the answer, on prompts of a seed that nothing else uses; best first."""
    tasks = Passkey(MEASURED_ON["length"]), KeyValue(MEASURED_ON["length"])
    gates = answer_mass(model, tokenizer, tasks, MEASURED_ON["count"], MEASURED_ON["seed"])
    return tuple(sorted(gates, key=lambda gate: -gate[2]))


def drawn(gates: Sequence[Value], count: int, seed: int) -> tuple[Value, ...]:
    """So many KV heads at random."""
    return tuple(random.Random(seed).sample(sorted(gates), count))


def whole(heads: Sequence[Value]) -> tuple[tuple[int, int, float], ...]:
    """These KV heads keep everything, as a budget has it."""
    return tuple((layer, head, 1.0) for layer, head, _ in sorted(heads))


def recalls(
    model: Any, tokenizer: Any, task: Any, settings: Mapping[int, Mapping[str, Sequence[Policy]]], count: int
) -> dict[str, dict[str, Any]]:
    """Recall over the prompts of several seeds, the question unseen, and the share of the bytes held.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        task: The probe.
        settings: For each seed the caches by name; a control that is drawn may be another one for each seed.
        count: Prompts of each seed.
    """
    hits: dict[str, float] = {}
    held: dict[str, float] = {}
    by_seed: dict[str, list[float]] = {}
    for seed, tried in settings.items():
        for name, t in trials(model, tokenizer, task, tried, count, seed).items():
            hits[name] = hits.get(name, 0) + t.result.recall * count
            held[name] = t.share
            by_seed.setdefault(name, []).append(t.result.recall)
        print(f"seed {seed}: " + ", ".join(f"{n} {v[-1]:.2f}" for n, v in by_seed.items()), flush=True)
    return {
        name: share(round(hits[name]), count * len(settings))
        | {"by seed": by_seed[name], "bytes": round(held[name], 4)}
        for name in hits
    }


def stretches(tokenizer: Any, length: int, count: int) -> list[list[int]]:
    """Stretches of Python's documentation, evenly spread."""
    ids = tokenizer(default_text(), verbose=False).input_ids
    step = (len(ids) - length) // (count - 1)
    return [ids[n * step : n * step + length] for n in range(count)]


def losses(model: Any, texts: Any, settings: Mapping[str, Sequence[Policy]], follow: int) -> dict[str, list[float]]:
    """The loss of what follows each stretch over that of the full cache, in nats per token."""
    found = continuations(model, texts, settings, follow)
    full = found[FULL].losses
    return {n: [a - b for a, b in zip(c.losses, full, strict=True)] for n, c in found.items() if n != FULL}


def less(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """How much less a is than b, pair by pair, with its interval."""
    return mean([y - x for x, y in zip(a, b, strict=True)])
