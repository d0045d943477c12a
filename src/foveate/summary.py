"""What the numbers of a profile mean, in a few sentences that are computed from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

__all__ = ["THRESHOLDS", "Link", "Sentence", "findings", "sentences", "summarise"]

# A head is called something only above these; they stand in every profile that used them.
THRESHOLDS = {"sink_layer": 0.3, "local": 0.95, "retrieval": 0.1, "window": 256, "sinks": 1}


def summarise(heads: pd.DataFrame, info: dict[str, Any]) -> dict[str, Any]:
    """Sink layers, retrieval heads, local heads and the share of the KV cache that local heads could give up.

    Keys are present for what was measured; nothing is guessed.
    """
    found: dict[str, Any] = {
        "thresholds": THRESHOLDS,
        "heads": int(heads[["layer", "head"]].drop_duplicates().shape[0]),
    }
    table = {m: t.set_index(["layer", "head"])["value"] for m, t in heads.groupby("metric")}

    if "first_token_mass" in table:
        by_layer = table["first_token_mass"].groupby("layer").mean()
        found["first_token_mass"] = round(float(by_layer.mean()), 4)
        found["sink_layers"] = {int(n): round(float(v), 3) for n, v in by_layer.items() if v > THRESHOLDS["sink_layer"]}
    if "sink_rate" in table:
        found["sink_rate"] = round(float(table["sink_rate"].mean()), 4)
    if "sink_rate_anywhere" in table:
        found["sink_rate_anywhere"] = round(float(table["sink_rate_anywhere"].mean()), 4)
    if "entropy" in table:
        found["entropy"] = round(float(table["entropy"].mean()), 3)
    if "column_mass_top5" in table:
        found["column_mass_top5"] = round(float(table["column_mass_top5"].mean()), 4)
    if "retrieval_score" in table:
        best = table["retrieval_score"].sort_values(ascending=False)
        best = best[best > THRESHOLDS["retrieval"]]
        found["retrieval_heads"] = [[int(n), int(h), round(float(v), 3)] for (n, h), v in best.items()]
    if "streaming_mass" in table:
        found |= local_heads(table["streaming_mass"], info)
    return found


def local_heads(mass: pd.Series, info: dict[str, Any]) -> dict[str, Any]:
    """Heads that live on the first token and the recent window, and what their caches could give up.

    A KV head can be cut only when all query heads that read it are local.
    """
    local = mass > THRESHOLDS["local"]
    group = max(1, info["query_heads"] // info["kv_heads"])
    owner = [(n, h // group) for n, h in local.index]
    cut = local.groupby(pd.MultiIndex.from_tuples(owner, names=["layer", "kv_head"])).all()
    kept = min(1.0, (THRESHOLDS["sinks"] + THRESHOLDS["window"]) / info["tokens"])
    return {
        "local_heads": [[int(n), int(h)] for (n, h), yes in local.items() if yes],
        "local_kv_heads": [[int(n), int(h)] for (n, h), yes in cut.items() if yes],
        "kv_heads": len(cut),
        "kv_cache_share_to_give_up": round(float(cut.mean() * (1 - kept)), 4),
    }


@dataclass(frozen=True)
class Link:
    """Words of a sentence that point at their evidence: a metric, or one head.

    Args:
        text: The words, a number mostly.
        metric: Label of the metric that says so.
        head: Layer and head, when one head is meant.
    """

    text: str
    metric: str
    head: tuple[int, int] | None = None

    def __str__(self) -> str:
        return self.text


Sentence = tuple[str | Link, ...]


def sentences(info: dict[str, Any]) -> list[str]:
    """The summary in words."""
    return ["".join(map(str, parts)) for parts in findings(info)]


def findings(info: dict[str, Any]) -> list[Sentence]:
    """The summary in words, each number with the metric that it comes from."""
    s = info["summary"]
    said = [
        sinks(info) if "sink_layers" in s else (),
        sink_heads(s) if {"sink_rate", "sink_rate_anywhere"} <= set(s) else (),
        concentration(s) if "entropy" in s or "column_mass_top5" in s else (),
        locality(info) if "local_heads" in s else (),
        retrieval(s) if "retrieval_heads" in s else (),
    ]
    return [parts for parts in said if parts]


def sinks(info: dict[str, Any]) -> Sentence:
    s, metric = info["summary"], "first_token_mass"
    layers = s["sink_layers"]
    return (
        "The first token takes ",
        Link(f"{s['first_token_mass']:.0%}", metric),
        f" of all attention; more than {s['thresholds']['sink_layer']:.0%} in ",
        Link(f"{len(layers)} of {len(info['layers'])} layers", metric),
        f" ({ranges([int(n) for n in layers])})." if layers else ".",
    )


def sink_heads(s: dict[str, Any]) -> Sentence:
    return (
        Link(f"{s['sink_rate']:.0%}", "sink_rate"),
        " of the heads have a sink at the first token, ",
        Link(f"{s['sink_rate_anywhere']:.0%}", "sink_rate_anywhere"),
        " somewhere in the text: a key that the tokens after it give more than the threshold, on average.",
    )


def concentration(s: dict[str, Any]) -> Sentence:
    parts: list[str | Link] = []
    if "column_mass_top5" in s:
        share = Link(f"{s['column_mass_top5']:.0%}", "column_mass_top5")
        parts += ["The heaviest 5 % of the keys hold ", share, " of a head's mass on average. "]
    if "entropy" in s:
        even = Link(f"{s['entropy']:.2f} nats", "entropy")
        parts += ["The mean entropy of a row is ", even, f", as much as {math.exp(s['entropy']):.0f} equal keys have."]
    return tuple(parts)


def locality(info: dict[str, Any]) -> Sentence:
    s, metric = info["summary"], "streaming_mass"
    t = s["thresholds"]
    return (
        Link(f"{len(s['local_heads'])} of {s['heads']} heads", metric),
        f" are local: over {t['local']:.0%} of their mass lies on the first token and the last {t['window']}. "
        "Their caches could give up ",
        Link(f"{s['kv_cache_share_to_give_up']:.0%}", metric),
        f" of the whole KV cache at this length ({len(s['local_kv_heads'])} of {s['kv_heads']} KV heads).",
    )


def retrieval(s: dict[str, Any]) -> Sentence:
    best, metric = s["retrieval_heads"], "retrieval_score"
    above = s["thresholds"]["retrieval"]
    if not best:
        return (Link("No head", metric), f" retrieves (copies a planted needle with a score above {above}).")
    many = len(best) > 1
    parts: list[str | Link] = [
        Link(f"{len(best)} head{'s' * many}", metric),
        f" retrieve{'s' * (not many)} ({'copy' if many else 'copies'} a planted needle, score above {above}): ",
    ]
    for n, h, v in best[:5]:
        parts += [Link(f"L{n}H{h}", metric, (n, h)), f" ({v:.2f}), "]
    return (*parts[:-1], str(parts[-1]).removesuffix(", ") + (", …" if len(best) > 5 else ""))


def ranges(numbers: list[int]) -> str:
    """`[3, 4, 5, 9]` as `3-5, 9`."""
    parts: list[list[int]] = []
    for n in sorted(numbers):
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
