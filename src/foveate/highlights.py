"""The few heads of a profile that deserve a close look, and the places where there is something to see.

`picks` reads the tables; `draw` gets the attention of the picked layers, from the states that were kept or by running
the text again as far as the last of them, and makes the fine maps and windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from foveate import stored
from foveate.closeup import map_of, window_of
from foveate.core.errors import FoveateError
from foveate.core.rows import View
from foveate.opened import Map, Window
from foveate.passes import visit
from foveate.summary import THRESHOLDS

__all__ = ["BINS", "Drawn", "Pick", "Source", "draw", "named", "picks", "pieces_of"]

# 256 x 256 cells of a dozen heads still leave a report under 3 MB, which 512 x 512 would not; a cell of 4,096 tokens
# is then 16 tokens wide, and what is finer is for windows
BINS = 256
AROUND = 32
LEADING = 24
SINK = 0.3

# metric, how many heads, from which value on, and what to say of them
ROLES: tuple[tuple[str, int, float, str], ...] = (
    ("retrieval_score", 3, THRESHOLDS["retrieval"], "retrieves: copies a planted needle, score {:.2f}"),
    ("induction", 1, 0.2, "induction: {:.0%} on the token after an earlier copy"),
    ("duplicate_token", 1, 0.2, "duplicate token: {:.0%} on earlier copies of the token"),
    ("previous_token", 1, 0.3, "previous token: {:.0%} on it"),
    ("local_mass_16", 1, 0.5, "local: {:.0%} within 16 tokens"),
    ("first_token_mass", 1, 0.5, "sink at the first token: {:.0%} on it"),
    ("entropy_relative", 1, 0.5, "broad: {:.2f} of the largest possible entropy"),
)
LOOK = {
    "retrieval_score": "needle",
    "induction": "far",
    "duplicate_token": "far",
    "previous_token": "near",
    "local_mass_16": "near",
}
LATER_SINKS = 2


@dataclass(frozen=True)
class Pick:
    """A head that stands out.

    Args:
        layer: Number of the layer.
        head: Number of the head.
        why: What makes it stand out.
        look: Where a window is due: "near" the diagonal, "far" from it, at a "sink", at the "needle", nowhere ("").
        key: The sink.
    """

    layer: int
    head: int
    why: str
    look: str = ""
    key: int = 0


def picks(heads: pd.DataFrame, keys: pd.DataFrame) -> list[Pick]:
    """The heads that stand out, by role; a head may have several."""
    found = []
    for metric, count, least, said in ROLES:
        table = heads[(heads.metric == metric) & (heads.value > least)].sort_values("value", ascending=False)
        for _, r in table.head(count).iterrows():
            found.append(Pick(int(r.layer), int(r["head"]), said.format(r.value), LOOK.get(metric, "")))
    return found + later_sinks(keys)


def later_sinks(keys: pd.DataFrame) -> list[Pick]:
    """Heads whose strongest sink is not the first token, the strongest of each layer only."""
    if keys.empty:
        return []
    table = keys[(keys.metric == "sink_rate_importance") & (keys.value > SINK) & (keys.key > 0)]
    table = table.sort_values("value", ascending=False).drop_duplicates("layer")
    found = []
    for _, r in table.head(LATER_SINKS).iterrows():
        why = f"later sink: token {r.key} takes {r.value:.0%} of the rows after it"
        found.append(Pick(int(r.layer), int(r["head"]), why, "sink", int(r.key)))
    return found


@dataclass(frozen=True)
class Source:
    """Where the attention of a text comes from.

    Args:
        model: The model to run.
        info: The profile's.
        folder: Where states are kept; None: nowhere.
    """

    model: Any
    info: dict[str, Any]
    folder: Path | None = None

    def views(self, text: str, ids: Sequence[int], layers: Iterable[int], read: Callable[[View], None]) -> None:
        """Hands over the attention of some layers: from the states where they are, else from the model."""
        mark, missing = stored.mark_of(self.info, ids), set()
        for layer in sorted(set(layers)):
            view = None if self.folder is None else stored.read(self.folder, text, layer, mark)
            if view is None:
                missing.add(layer)
            else:
                read(view)
        if missing:
            visit(self.model, torch.tensor([list(ids)], device=self.model.device), missing, read)


@dataclass(frozen=True, eq=False)
class Drawn:
    """What was drawn, and which text the windows on "needle" are of."""

    maps: list[Map] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    needle: dict[str, Any] = field(default_factory=dict)


def draw(
    source: Source,
    tokenizer: Any,
    metrics: Sequence[Any],
    heads: pd.DataFrame,
    keys: pd.DataFrame,
    pieces: list[str],
) -> Drawn:
    """Maps and windows of the heads that stand out in a profile's tables."""
    chosen = picks(heads, keys)
    maps, windows = embed(chosen, source.info["ids"], pieces, source)
    probes = [m for m in metrics if m.name == "retrieval_score"]
    about, needles = needle_windows(chosen, probes[0], tokenizer, source) if probes else ({}, [])
    return Drawn(maps, needles + windows, about)


def embed(
    chosen: Sequence[Pick], ids: Sequence[int], pieces: list[str], source: Source
) -> tuple[list[Map], list[Window]]:
    """Maps of all picked heads, and windows where their attention is worth reading."""
    by_head: dict[tuple[int, int], list[Pick]] = {}
    for pick in chosen:
        by_head.setdefault((pick.layer, pick.head), []).append(pick)
    maps: list[Map] = []
    windows: list[Window] = []
    tokens = named(pieces, ids)

    def read(view: View) -> None:
        for (layer, head), roles in sorted(by_head.items()):
            if layer != view.layer.index:
                continue
            whole = map_of(view, head, BINS, "; ".join(p.why for p in roles))
            maps.append(whole)
            for pick in (p for p in roles if p.look not in ("", "needle")):
                rows, keys = place(pick, whole, len(ids))
                windows.append(window_of(view, head, rows, keys, tokens, "profile", pick.why))

    source.views("profile", ids, {p.layer for p in chosen}, read)
    order = list(by_head)
    return sorted(maps, key=lambda m: order.index((m.layer, m.head))), windows


def place(pick: Pick, whole: Map, tokens: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The rows and keys of a pick's window."""
    if pick.look == "sink":
        return span(pick.key - AROUND // 2, 3 * AROUND, tokens), span(pick.key - AROUND, 2 * AROUND, tokens)
    if pick.look == "near":
        middle = span(tokens // 2 - AROUND, 2 * AROUND, tokens)
        return middle, middle
    # where most mass lies away from the diagonal and from the first keys
    far = np.tril(whole.mass, -1)
    far[:, 0] = 0
    row, key = (int(n) for n in np.unravel_index(far.argmax(), far.shape))
    middles = ((whole.edges[n] + whole.edges[n + 1]) // 2 for n in (row, key))
    rows, keys = (span(n - AROUND, 2 * AROUND, tokens) for n in middles)
    return rows, keys


def span(start: int, length: int, tokens: int) -> tuple[int, int]:
    """A span of this length inside of the text, as near as can be to where it was wanted."""
    start = max(0, min(start, tokens - length))
    return start, min(tokens, start + length)


def needle_windows(
    chosen: Sequence[Pick], metric: Any, tokenizer: Any, source: Source
) -> tuple[dict[str, Any], list[Window]]:
    """Retrieval heads in the retrieval probe's own prompt: the rows that answer, on the keys around the needle.

    The answer is put behind the prompt, as a model that retrieves would say it, and read in one pass.

    Returns:
        What the text is (its ids, pieces, needle and answering rows), and a window per head; both empty where there are
        no such heads, or no needle can be made.
    """
    from foveate.measure.retrieval_score import make_needle

    heads = [p for p in chosen if p.look == "needle"]
    if not heads:
        return {}, []
    # the sample in the middle: its needle stands neither at the beginning nor at the end
    n = metric.samples // 2
    try:
        needle = make_needle(tokenizer, metric.length, (n + 0.5) / metric.samples, metric.seed * 10_007 + n)
    except FoveateError:
        return {}, []
    prompt = needle.ids[0].tolist()
    ids = prompt + needle.tokens
    # the row before a token is the one that says it; the answer's last token says nothing of it
    answering = (len(prompt) - 1, len(ids) - 1)
    rows = (max(0, answering[0] - 4), answering[1])
    keys = (max(0, needle.start - LEADING), min(len(prompt), needle.stop + LEADING // 2))
    pieces = pieces_of(tokenizer, ids)
    windows: list[Window] = []

    def read(view: View) -> None:
        for p in heads:
            if p.layer == view.layer.index:
                windows.append(window_of(view, p.head, rows, keys, pieces, "needle", p.why))

    source.views("needle", ids, {p.layer for p in heads}, read)
    about = {
        "ids": ids,
        "pieces": pieces,
        "needle": [needle.start, needle.stop],
        "answer": needle.answer,
        "answering": list(answering),
    }
    order = [(p.layer, p.head) for p in heads]
    return about, sorted(windows, key=lambda w: order.index((w.layer, w.head)))


def pieces_of(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token, as the tokenizer decodes it alone; half a character is U+FFFD."""
    if tokenizer is None:
        return []
    text = {i: tokenizer.decode([i]) for i in set(ids)}
    return [text[i] for i in ids]


def named(pieces: list[str], ids: Sequence[int]) -> list[str]:
    """The pieces, or the ids where there was no tokenizer."""
    return pieces or [f"#{i}" for i in ids]
