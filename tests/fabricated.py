"""Profiles made up for the tests of the report: whole, small or large, with tokens that would break a careless page."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from foveate.opened import Map, Window

from foveate.profiling import Profile
from foveate.summary import summarise

HOSTILE = [
    "</script>",
    "<script>window.pwned = 1</script>",
    '<img src=x onerror="window.pwned = 1">',
    "<!--",
    "&lt;b&gt;",
    "\"'`",
    "{{ 7 * 7 }}",
    "\x00",
    "\x1b[31m",
    "\r\n",
    "\ud83d",
    "\u202egnp.exe",
    " שלום",
    " مرحبا",
    "👩\u200d👩\u200d👧",
    "\ufffd",
    "\u2028",
    "]]>",
]
WORDS = [" the", " cat", " sat", ".", "\n", " on", " a", " mat", " and", " looked"]
HOSTILE_MODEL = '<b onclick="window.pwned = 1">evil</b></title>\x00\u202e'


def weights_of(rng: np.random.Generator, heads: int, tokens: int) -> np.ndarray:
    """Causal attention of heads that differ: near, far, on the first token."""
    at = np.arange(tokens)
    distance = at[:, None] - at
    scores = rng.normal(size=(heads, tokens, tokens)) - rng.uniform(0, 0.2, (heads, 1, 1)) * distance
    scores[:, :, 0] += rng.uniform(0, 8, (heads, 1))
    scores = np.where(distance >= 0, scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def binned(p: np.ndarray, edges: list[int]) -> np.ndarray:
    return np.add.reduceat(np.add.reduceat(p, edges[:-1], axis=-2), edges[:-1], axis=-1).astype(np.float32)


def make(
    layers: int = 4,
    heads: int = 3,
    tokens: int = 90,
    seed: int = 0,
    model: str = "made-up",
    pictures: bool = True,
    hostile: bool = False,
    shift: float = 0.0,
) -> Profile:
    """A profile whose tables and pictures come from the same weights.

    `shift` is added to `induction` of head 1.1, far more than its interval is wide.
    """
    rng = np.random.default_rng(seed)
    p = weights_of(rng, layers * heads, tokens).reshape(layers, heads, tokens, tokens)
    names = [(n, h) for n in range(layers) for h in range(heads)]
    entropy = -(p * np.log(np.maximum(p, 1e-30))).sum(-1)
    local = np.tril(p, 0).sum(-1) - np.tril(p, -9).sum(-1) + p[..., 0]
    rows: list[dict[str, Any]] = []

    def add(metric: str, value: np.ndarray, half: float = 0.0) -> None:
        for n, h in names:
            v = float(value[n, h])
            rows.append({"layer": n, "head": h, "metric": metric, "value": v, "low": v - half, "high": v + half})

    induction = rng.uniform(0, 0.3, (layers, heads))
    induction[1, 1] += shift
    add("entropy", entropy.mean(-1), 0.1)
    add("entropy_relative", entropy.mean(-1) / np.log(tokens), 0.02)
    add("first_token_mass", p[..., 0].mean(-1), 0.03)
    add("streaming_mass", np.minimum(1, local.mean(-1)), 0.02)
    add("induction", induction, 0.01)
    mass = p.mean(2)
    add("column_mass_top5", np.sort(mass, -1)[..., -(-tokens // 20) * -1 :].sum(-1))
    importance = p.sum(2) / np.arange(tokens, 0, -1)
    add("sink_rate", (importance[..., 0] > 0.3).astype(float))
    add("sink_rate_anywhere", (importance[..., :-16] > 0.3).any(-1).astype(float))
    retrieval = np.zeros((layers, heads))
    retrieval[min(2, layers - 1), 1], retrieval[layers - 1, 0] = 0.8, 0.3
    add("retrieval_score", retrieval, 0.05)
    add("head_similarity", rng.uniform(0.3, 0.9, (layers, heads)), 0.05)
    table = pd.DataFrame(rows)
    keys = [
        pd.DataFrame(
            {
                "layer": np.repeat([n for n, _ in names], tokens),
                "head": np.repeat([h for _, h in names], tokens),
                "key": np.tile(np.arange(tokens), len(names)),
                "metric": metric,
                "value": values.reshape(-1).astype(np.float32),
            }
        )
        for metric, values in (("column_mass", mass), ("sink_rate_importance", importance))
    ]
    edges = [n * tokens // 16 for n in range(17)]
    pieces = [WORDS[n % len(WORDS)] for n in range(tokens)]
    if hostile:
        pieces[1 : 1 + len(HOSTILE)] = HOSTILE
        pieces[40 : 40 + len(HOSTILE)] = HOSTILE
    info = {
        "format": 1,
        "model": HOSTILE_MODEL if hostile else model,
        "architecture": "MadeUp",
        "tokens": tokens,
        "text_tokens": tokens * 3,
        "layers": {str(n): f"layers.{n}" for n in range(layers)},
        "query_heads": heads,
        "kv_heads": heads,
        "metrics": ["SinkRate(threshold=0.3, later=16)"],
        "skipped": {"span_mass": "no spans <were> given"} if hostile else {},
        "versions": {"foveate": "0.1.0"},
        "ids": list(range(seed, seed + tokens)),
        "map_edges": edges,
    }
    info["summary"] = summarise(table, info)
    if not pictures:
        return Profile(table, pd.concat(keys, ignore_index=True), info)
    maps = [Map(2, 1, list(range(tokens + 1)), p[min(2, layers - 1), 1].astype(np.float32), "retrieves: score 0.80")]
    windows = [
        window(p, 2, 1, "profile", (30, 60), (30, 60), pieces, "near <b>"),
        window(p, 2, 1, "needle", (70, 80), (0, 25), pieces, "the needle"),
        window(p, 0, 0, "profile", (50, 70), (10, 75), pieces, "local"),
    ]
    pictures_of_all = {
        "attention_map": binned(p, edges),
        "entropy_by_position": np.stack([entropy[..., a:b].mean(-1) for a, b in pairwise(edges)], -1).astype(
            np.float32
        ),
    }
    return Profile(table, pd.concat(keys, ignore_index=True), info, pictures_of_all, maps, windows, pieces)


def window(
    p: np.ndarray,
    layer: int,
    head: int,
    text: str,
    rows: tuple[int, int],
    keys: tuple[int, int],
    pieces: list[str],
    why: str,
) -> Window:
    part = p[min(layer, len(p) - 1), head, slice(*rows), slice(*keys)].astype(np.float16)
    return Window(layer, head, text, rows, keys, pieces[slice(*rows)], pieces[slice(*keys)], part, why)


def large(layers: int = 30, heads: int = 9, tokens: int = 8192, bins: int = 512) -> Profile:
    """As much of everything as a real profile of this size has, and more than it would need."""
    rng = np.random.default_rng(0)
    small = make(layers, heads, 40, pictures=False)
    names = [(n, h) for n in range(layers) for h in range(heads)]
    tables = [small.heads]
    for n in range(40):
        value = rng.normal(size=len(names))
        metric = {"layer": [a for a, _ in names], "head": [b for _, b in names], "metric": f"more_{n}", "value": value}
        tables.append(pd.DataFrame(metric | {"low": value - rng.random(), "high": value + rng.random()}))
    mass = rng.lognormal(0, 2, (len(names), tokens)).astype(np.float32)
    mass /= mass.sum(-1, keepdims=True)
    keys = pd.DataFrame(
        {
            "layer": np.repeat(np.array([n for n, _ in names], np.int16), tokens),
            "head": np.repeat(np.array([h for _, h in names], np.int16), tokens),
            "key": np.tile(np.arange(tokens, dtype=np.int32), len(names)),
            "metric": pd.Categorical.from_codes(np.zeros(mass.size, np.int8), ["column_mass"]),
            "value": mass.reshape(-1),
        }
    )
    edges = [n * tokens // 64 for n in range(65)]

    def causal(*shape: int) -> np.ndarray:
        m = np.tril(rng.lognormal(0, 2, shape).astype(np.float32))
        return m / m.sum(-1, keepdims=True)

    arrays = {
        "attention_map": (causal(layers, heads, 64, 64) * (tokens / 64)).astype(np.float32),
        "entropy_by_position": rng.uniform(0, 9, (layers, heads, 64)).astype(np.float32),
    }
    fine = [n * tokens // bins for n in range(bins + 1)]
    maps = [Map(n, n % heads, fine, causal(bins, bins) * (tokens / bins), f"head {n} matters") for n in range(12)]
    pieces = [WORDS[n % len(WORDS)] + str(rng.integers(1000)) for n in range(tokens)]
    part, tokens_of = (64, 192), pieces[64:192]
    windows = [
        Window(n, 0, "profile", part, part, tokens_of, tokens_of, causal(128, 128).astype(np.float16), "near")
        for n in range(16)
    ]
    info = small.info | {"tokens": tokens, "text_tokens": tokens, "map_edges": edges}
    return Profile(pd.concat(tables, ignore_index=True), keys, info, arrays, maps, windows, pieces)
