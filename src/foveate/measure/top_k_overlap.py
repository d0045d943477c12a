r"""Top-k overlap: whether a row's strongest keys were the strongest before.

    o_i = |T_i \cap T'| / |T_i|,        mass: \sum_{j \in T'} p_ij

T_i are the k strongest keys of row i of a head, T' those of the row before (`rows`), or of the same row in
the layer before (`layers`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core.accumulate import Cells, Estimate
from foveate.core.card import Card, Needs
from foveate.core.mask import Mask
from foveate.core.mechanism import Metric
from foveate.core.params import bounded
from foveate.core.reductions import Reduction, Sample, Sampled
from foveate.core.rows import Layer, Rows
from foveate.measure._sampled import add, pieces, seconds

__all__ = ["TopKOverlap"]

PAIRS = "pairs of heads"


@dataclass(frozen=True, eq=False)
class Top:
    """The strongest keys of some rows, as places in the text; `real` is False where a row has fewer."""

    keys: Int[Tensor, "batch heads rows k"]
    real: Bool[Tensor, "batch heads rows k"]

    def part(self, rows: slice) -> Top:
        return Top(self.keys[:, :, rows], self.real[:, :, rows])


@dataclass
class Overlaps:
    """Sums by label, and the last row of the last call, which a decoded token is compared with."""

    cells: dict[str, Cells] = field(default_factory=dict)
    last: Top | None = None
    place: int = -1

    def follows(self, top: Top, place: int) -> Top | None:
        """The last row, if the one at `place` comes right after it in the same batch."""
        near = self.last is not None and self.place == place - 1
        return self.last if near and self.last.keys.shape[:2] == top.keys.shape[:2] else None


@dataclass(frozen=True)
class TopKOverlap(Metric):
    """Share of a row's top-k keys that were in the top-k before.

    Before is the row before (`top_k_overlap_rows`), or the same row in the layer before: of the head of the
    same number (`top_k_overlap_layers`) and of the head that fits best on average
    (`top_k_overlap_layers_best`).
    Beside them the mass that the row would find on the keys from before (`top_k_overlap_rows_mass`,
    `top_k_overlap_layers_mass`). NaN for a layer with none before it.

    The keys are those of weight above zero among the k strongest, so rows shorter than k have fewer.

    Args:
        k: Number of keys.
        pairs: Sampled pairs of rows per call; a call with a single row is compared with the call before.

    Example:
        From row to row `first` looks at the same key, and `self` at another one; so does `previous`, but for the
        second row, which looks where the first row did. `average` adds one key to those of the row before.

        >>> import foveate
        >>> from foveate.measure import TopKOverlap
        >>> from foveate.testing import handmade
        >>> model = handmade.model()
        >>> with foveate.attach(model, TopKOverlap()) as attached:
        ...     _ = model(handmade.ids("hello world"))
        >>> handmade.named(attached.results.heads, "top_k_overlap_rows")
        {'first': 1.0, 'previous': 0.17, 'self': 0.0, 'average': 0.8}
    """

    k: int = bounded(64, 1, 1 << 20)
    pairs: int = bounded(32, 1, 4096)

    card: ClassVar = Card(
        title="TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention",
        year=2024,
        family="stability",
        needs=Needs.WEIGHTS,
        equation="o_i = |T_i & T'| / |T_i|, T the k strongest keys, T' of the row before or of the layer before",
        differs="TidalDecode reuses the keys of one selecting layer, head by head, in many layers: ours "
        "compares each layer with the one right before it, head by head, and adds the best head as a bound; "
        "the overlap with the row before is the one-step case of Recycled Attention, which reuses a row's "
        "keys for several steps",
        use="to see whether keys chosen once can serve the next token or the next layer",
        misleads="sinks and recent tokens are in every set: a high overlap does not say that the rare key is "
        "kept; the best head is chosen on the rows that it is judged on",
        sampled=True,
        claims=("layer_overlap", "recycled"),
    )
    test_params: ClassVar = ({"k": 4}, {"k": 1, "pairs": 3})

    @property
    def sample(self) -> Sample:
        """The sample that is asked of the engine."""
        return Sample(self.pairs)

    def needs(self) -> tuple[Reduction, ...]:
        return (self.sample,)

    def start(self, layer: Layer) -> Overlaps:
        return Overlaps()

    def update(self, state: Overlaps, rows: Rows) -> Overlaps:
        sampled, mask = rows[self.sample], rows.view.mask
        top, second = strongest(sampled, self.k, mask), seconds(sampled)
        row_before: Top | None
        if len(sampled.index) > 1:
            now, row_before = top.part(slice(1, None, 2)), top.part(slice(0, None, 2))
        else:
            now, row_before = top, state.follows(top, int(mask.position[0]) + mask.key_offset)
        self.compare(state, "rows", now, row_before, rows, second)
        state.last = top.part(slice(-1, None))
        state.place = int(mask.position[sampled.index[-1]]) + mask.key_offset

        below = same_rows(rows, self.sample)
        layer_before = None if below is None else strongest(seconds(below), self.k, mask)
        self.compare(state, "layers", now, layer_before, rows, second)
        if layer_before is not None:
            shares = all_pairs(now, layer_before, rows.view.keys + mask.key_offset)
            add(state.cells, PAIRS, shares, rows, second.index)
        return state

    def compare(self, state: Overlaps, what: str, now: Top, before: Top | None, rows: Rows, second: Sampled) -> None:
        """Adds overlap and mass, head by head; with nothing before, the label is known and has no rows."""
        known, other = before is not None, before or now
        offset = rows.view.mask.key_offset
        share = overlap(now, other, rows.view.keys + offset)
        # a key that a sliding cache has dropped since has no weight any more
        here = other.real & (other.keys >= offset)
        mass = (second.weights.gather(-1, (other.keys - offset).clamp_min(0)) * here).sum(-1)
        add(state.cells, f"top_k_overlap_{what}", share, rows, second.index, known)
        add(state.cells, f"top_k_overlap_{what}_mass", mass, rows, second.index, known)

    def result(self, state: Overlaps) -> dict[str, Estimate]:
        found = {label: cells.mean() for label, cells in state.cells.items() if label != PAIRS}
        if not found:
            return found
        best = found["top_k_overlap_layers"]
        if PAIRS in state.cells:
            pairs, heads = state.cells[PAIRS].mean(), len(best.value)
            value, low, high = (t.reshape(heads, -1) for t in (pairs.value, pairs.low, pairs.high))
            at = value.nan_to_num(-1.0).argmax(-1, keepdim=True)
            best = Estimate(*(t.gather(-1, at)[:, 0] for t in (value, low, high)))
        return found | {"top_k_overlap_layers_best": best}


def strongest(sampled: Sampled, k: int, mask: Mask) -> Top:
    """The top-k of each row; keys without weight are in nobody's top."""
    keys, real = [], []
    for piece, first in pieces(sampled, mask):
        weights, at = piece.weights.topk(min(k, piece.weights.shape[-1]), -1)
        missing = (0, k - at.shape[-1])
        keys.append(torch.nn.functional.pad(at + first + mask.key_offset, missing))
        real.append(torch.nn.functional.pad(weights > 0, missing))
    return Top(torch.cat(keys, 2), torch.cat(real, 2))


def members(top: Top, places: int) -> Bool[Tensor, "batch heads rows places"]:
    """The sets as indicator rows over the places of the text."""
    # keys that are not real, or no longer there, go to a place of their own that nobody asks for
    keys = torch.where(top.real & (top.keys < places), top.keys, places)
    nobody = torch.zeros(*keys.shape[:-1], places + 1, dtype=torch.bool, device=keys.device)
    return nobody.scatter_(-1, keys, True)


def overlap(now: Top, before: Top, places: int) -> Float[Tensor, "batch heads rows"]:
    """|T_i & T'| / |T_i|, head by head."""
    hits = members(before, places).gather(-1, now.keys) & now.real
    return hits.sum(-1) / now.real.sum(-1).clamp_min(1)


def all_pairs(now: Top, before: Top, places: int) -> Float[Tensor, "batch pairs rows"]:
    """The overlap of every head with every head of the layer before."""
    sets = members(before, places)
    shares = []
    # head by head: all at once would be heads x heads x rows x k indices
    for h in range(now.keys.shape[1]):
        keys, real = (t[:, h : h + 1].expand(-1, sets.shape[1], -1, -1) for t in (now.keys, now.real))
        shares.append((sets.gather(-1, keys) & real).sum(-1))
    return (torch.stack(shares, 1) / now.real.sum(-1).clamp_min(1)[:, :, None]).flatten(1, 2)


def same_rows(rows: Rows, sample: Sample) -> Sampled | None:
    """The sample of the layer before, if it has the same rows and keys; hybrid caches may differ."""
    before = rows.before
    if before is None or sample not in before.values or before.layer.cross != rows.layer.cross:
        return None
    one, two = before.view, rows.view
    same = one.q.shape[:3] == two.q.shape[:3] and one.keys == two.keys and one.mask.causal == two.mask.causal
    return before[sample] if same and one.mask.key_offset == two.mask.key_offset else None
