"""What of a profile goes into the page, and how much of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Num

from foveate import catalogue
from foveate.profiling import Profile
from foveate.report.compare import Table
from foveate.report.pack import Pack, coarsen, grade, quantise
from foveate.report.units import describe, unit

__all__ = ["LADDER", "Detail", "page_data", "sink_keys"]

SINKS_SHOWN = 40
CONTEXT = 8


@dataclass(frozen=True)
class Detail:
    """How much is embedded; the first of `LADDER` whose page is small enough is taken.

    Args:
        fine: Most bins per side of the maps of single heads; 0 leaves them out.
        coarse: Most bins per side of the map that every head has.
        keys: Tokens that share one shade of the text (the strongest of them counts).
        windows: Most cells of all windows at full resolution together.
    """

    fine: int
    coarse: int
    keys: int
    windows: int


LADDER = (
    Detail(512, 64, 1, 2 << 20),
    Detail(256, 64, 1, 1 << 20),
    Detail(128, 64, 1, 1 << 19),
    Detail(128, 32, 2, 1 << 19),
    Detail(64, 32, 8, 1 << 18),
    Detail(64, 16, 32, 1 << 17),
    Detail(0, 8, 128, 1 << 16),
    Detail(0, 4, 1024, 1 << 14),
)


def page_data(profile: Profile, table: Table, detail: Detail, pack: Pack) -> tuple[dict[str, Any], list[str]]:
    """One profile for the page's scripts, its arrays in `pack`; and sentences on what had to be made coarser."""
    info, notes = profile.info, []
    data: dict[str, Any] = {
        "model": str(info["model"]),
        "tokens": int(info["tokens"]),
        "heads": table.heads,
        "layers": sorted({n for n, _ in table.heads}),
        "metrics": metric_list(table),
        "value": pack.add(table.value.astype(np.float32)),
        "low": pack.add(table.low.astype(np.float32)),
        "high": pack.add(table.high.astype(np.float32)),
        "kinds": kinds(profile, table.heads),
        "spans": span_names(table.metrics),
        "sinks": sink_keys(profile),
    }
    place = {head: n for n, head in enumerate(table.heads)}
    if "attention_map" in profile.arrays:
        data["map"] = overview(profile, table.heads, detail, pack)
        if data["map"]["bins"] < len(info["map_edges"]) - 1:
            notes.append(f"maps of all heads at {data['map']['bins']} bins")
    if "entropy_by_position" in profile.arrays:
        values = of_heads(profile.arrays["entropy_by_position"], table.heads)
        edges = list(info.get("position_edges") or info["map_edges"])
        data["entropy"] = {"edges": edges, "values": pack.add(values.astype(np.float32))}
    mass = key_values(profile, "column_mass", place)
    if mass is not None:
        # what is not the strongest of its neighbours would not be seen at this scale
        shades = np.maximum.reduceat(grade(mass), np.arange(0, mass.shape[1], detail.keys), axis=1)
        data["shades"] = {"per": detail.keys, "values": pack.add(shades)}
        if detail.keys > 1:
            notes.append(f"text shaded in stretches of {detail.keys} tokens")
    data["maps"], coarser = fine_maps(profile, detail, pack)
    data["windows"], left_out = windows(profile, detail, pack)
    return data, notes + coarser + left_out


def metric_list(table: Table) -> list[dict[str, Any]]:
    """The metrics with their meaning, those of a family together."""
    entries = catalogue.entries()
    listed = []
    for n, name in enumerate(table.metrics):
        known = np.isfinite(table.value[n])
        listed.append(
            {"name": name, "row": n, "unit": unit(name, table.value[n]), **describe(name, entries)}
            # a number of the whole model stands at every head
            | {"same": bool(known.any() and np.ptp(table.value[n][known]) == 0)}
        )
    return sorted(listed, key=lambda m: m["family"])


def kinds(profile: Profile, heads: list[tuple[int, int]]) -> list[str]:
    """What each head is called: retrieves, local or sink, the first that fits; "" when none does."""
    s = profile.summary
    called = {(n, h): "sink" for n, h, v in first_token(profile) if v > 0.5}
    called |= dict.fromkeys(map(tuple, s.get("local_heads", [])), "local")
    called |= {(n, h): "retrieves" for n, h, _ in s.get("retrieval_heads", [])}
    return [called.get(head, "") for head in heads]


def first_token(profile: Profile) -> list[tuple[int, int, float]]:
    t = profile.heads[profile.heads.metric == "first_token_mass"]
    return list(zip(t["layer"].tolist(), t["head"].tolist(), t["value"].tolist(), strict=True))


def span_names(metrics: list[str]) -> list[str]:
    """The spans of `span_mass:FROM>TO`, in order."""
    pairs = [m.removeprefix("span_mass:").split(">", 1) for m in metrics if m.startswith("span_mass:") and ">" in m]
    return list(dict.fromkeys(source for source, _ in pairs))


def of_heads(
    array: Num[np.ndarray, "layers heads *rest"], heads: list[tuple[int, int]]
) -> Num[np.ndarray, all_heads * rest]:
    """[layers, heads, ...] as [heads of the page, ...]."""
    layer, head = np.array(heads).T
    return array[layer, head]


def overview(profile: Profile, heads: list[tuple[int, int]], detail: Detail, pack: Pack) -> dict[str, Any]:
    """The map of every head, as shares of what the rows of each bin give away."""
    mass = of_heads(profile.arrays["attention_map"], heads)
    mass, edges = coarsen(mass, list(profile.info["map_edges"]), detail.coarse)
    return {"bins": len(edges) - 1, "edges": edges, "values": pack.add(quantise(shares(mass, edges)))}


def shares(mass: Float[np.ndarray, "*lead rows columns"], edges: list[int]) -> Float[np.ndarray, "*lead rows columns"]:
    """Mass per row: the sums of a bin over the number of its rows."""
    return mass / np.diff(edges)[:, None]


def fine_maps(profile: Profile, detail: Detail, pack: Pack) -> tuple[list[dict[str, Any]], list[str]]:
    found, notes = [], set()
    for m in profile.maps if detail.fine else ():
        mass, edges = coarsen(np.asarray(m.mass, np.float32), list(m.edges), detail.fine)
        if len(edges) < len(m.edges):
            notes.add(f"fine maps at {len(edges) - 1} bins")
        found.append(
            {"layer": int(m.layer), "head": int(m.head), "why": m.why, "edges": edges}
            | {"values": pack.add(quantise(shares(mass, edges)))}
        )
    if profile.maps and not detail.fine:
        notes.add("no fine maps")
    return found, sorted(notes)


def windows(profile: Profile, detail: Detail, pack: Pack) -> tuple[list[dict[str, Any]], list[str]]:
    """The windows at full resolution, first come first served."""
    found, cells = [], 0
    for w in profile.windows:
        cells += w.weights.size
        if cells > detail.windows:
            break
        found.append(
            {"layer": int(w.layer), "head": int(w.head), "text": w.text, "why": w.why}
            | {"rows": list(map(int, w.rows)), "keys": list(map(int, w.keys))}
            | {"row_tokens": list(w.row_tokens), "key_tokens": list(w.key_tokens)}
            | {"weights": pack.add(quantise(np.asarray(w.weights, np.float32)))}
        )
    missing = len(profile.windows) - len(found)
    return found, [f"{missing} of {len(profile.windows)} windows left out"] if missing else []


def key_values(
    profile: Profile, metric: str, place: dict[tuple[int, int], int]
) -> Float[np.ndarray, "heads keys"] | None:
    """The numbers per key of one metric; None when it was not measured."""
    part = profile.keys[profile.keys["metric"] == metric]
    if part.empty:
        return None
    layer, head, key = (part[c].to_numpy() for c in ("layer", "head", "key"))
    # one number per pair of layer and head is quick to look up for millions of rows
    width = int(head.max()) + 1
    at = np.full((int(layer.max()) + 1) * width, -1)
    for (n, h), index in place.items():
        if h < width and n * width + h < at.size:
            at[n * width + h] = index
    index = at[layer.astype(np.int64) * width + head]
    values = np.full((len(place), int(profile.info["tokens"])), np.nan, np.float32)
    good = (index >= 0) & (key < values.shape[1])
    values[index[good], key[good]] = part["value"].to_numpy()[good]
    return values


def sink_keys(profile: Profile) -> dict[str, Any] | None:
    """The keys that are sinks, by how many heads; None when that was not measured."""
    heads = [(int(n), int(h)) for n, h in profile.heads[["layer", "head"]].drop_duplicates().to_numpy()]
    values = key_values(profile, "sink_rate_importance", {head: n for n, head in enumerate(heads)})
    if values is None:
        return None
    written = re.search(r"SinkRate\(threshold=([\d.e-]+)", " ".join(profile.info.get("metrics", [])))
    threshold = float(written[1]) if written else 0.3
    above = np.nan_to_num(values) > threshold
    counts = above.sum(0)
    keys = [int(k) for k in np.argsort(-counts, kind="stable") if counts[k]]
    listed = []
    for k in keys[:SINKS_SHOWN]:
        by = np.flatnonzero(above[:, k])
        best = by[np.argsort(-values[by, k])]
        listed.append(
            {"key": k, "heads": int(counts[k]), "mean": round(float(values[by, k].mean()), 4)}
            | {"best": [[*heads[n], round(float(values[n, k]), 4)] for n in best[:6]], **context(profile.pieces, k)}
        )
    return {"threshold": threshold, "keys": listed, "all": len(keys), "heads": int(above.any(1).sum())}


def context(pieces: list[str], key: int) -> dict[str, Any]:
    """A token between its neighbours."""
    if key >= len(pieces):
        return {}
    before = max(0, key - CONTEXT)
    return {"before": pieces[before:key], "token": pieces[key], "after": pieces[key + 1 : key + 1 + CONTEXT]}
