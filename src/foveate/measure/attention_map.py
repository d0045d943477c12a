r"""Attention map: where every head looks over the whole text, in few cells.

    M_rc = \sum_{i \in r} \sum_{j \in c} p_ij,        cells = min |S| / n  with  \sum_{S} M_rc \ge 0.95 \sum M_rc

r and c run over bins of consecutive tokens, n counts the cells in which some row may see some key. A row of cells sums
to the number of rows in its bin: no mass is lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.accumulate import Estimate
from foveate.core.card import Card, Needs
from foveate.core.mechanism import Metric
from foveate.core.params import bounded
from foveate.core.reductions import KeyBins, Reduction
from foveate.core.rows import Layer, Rows, View
from foveate.measure._binned import Binned, by_bin

__all__ = ["AttentionMap"]

SHARE = 0.95


@dataclass
class Sums:
    """Mass and visible pairs per cell, and how many texts began."""

    mass: Binned
    pairs: Binned
    texts: int = 0


@dataclass(frozen=True)
class AttentionMap(Metric):
    """Mass that the rows of one stretch of the text give to the keys of another, for all pairs of stretches.

    As a picture per head the map itself (`attention_map`, rows x keys), averaged over the texts. As a number the
    smallest share of the cells that holds 95 % of the mass (`attention_map_cells`): how sparse the head is in blocks.

    A cell is a power of two of tokens wide, the smallest with which the text fits, so a text has between half of `bins`
    and `bins` of them; a text that grows while it is read has its cells joined, never cut.

    Args:
        bins: Most cells on each side.

    Example:
        Heads that look at one key fill a column or the diagonal; the head that averages fills the triangle.

        >>> import foveate
        >>> from foveate.measure import AttentionMap
        >>> from foveate.testing import handmade
        >>> model = handmade.model()
        >>> with foveate.attach(model, AttentionMap(bins=4)) as attached:
        ...     _ = model(handmade.ids("hello world"))
        >>> handmade.named(attached.results.heads, "attention_map_cells")
        {'first': 0.47, 'previous': 0.73, 'self': 0.47, 'average': 0.89}
    """

    bins: int = bounded(64, 2, 512)

    card: ClassVar = Card(
        title="SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs",
        year=2024,
        family="concentration",
        needs=Needs.WEIGHTS,
        equation="M_rc = sum_{i in r, j in c} p_ij; cells = least share of the cells with 95 % of the mass",
        differs="the paper pools the weights of a block by their maximum, to teach a gate which blocks to visit; ours "
        "sums them, so that no mass is lost, and trains nothing. The share of cells is not in the paper",
        use="to see a head over the whole text at once, and how few blocks a sparse kernel would have to visit",
        misleads="a cell of many tokens hides how its mass lies inside; shares at other cell widths do not compare",
    )
    test_params: ClassVar = ({}, {"bins": 4})

    def needs(self) -> tuple[Reduction, ...]:
        return (KeyBins(self.bins),)

    def start(self, layer: Layer) -> Sums:
        return Sums(Binned(KeyBins(self.bins), axes=2), Binned(KeyBins(self.bins), axes=2))

    def update(self, state: Sums, rows: Rows) -> Sums:
        bins = KeyBins(self.bins)
        tokens, place = bins.of_view(rows.view)
        width, real = bins.width(tokens), rows.view.mask.rows
        for sums, values in ((state.mass, rows[bins]), (state.pairs, pairs(rows.view, bins))):
            sums.add(by_bin(values, real, place, width, values.shape[-1]).cpu(), tokens)
        state.texts += int((real & (place == 0)).expand(rows.view.batch, -1).sum())
        return state

    def result(self, state: Sums) -> dict[str, Estimate]:
        if state.mass.sums is None or state.pairs.sums is None:
            return {}
        down = state.mass.sums.flatten(1).sort(-1, descending=True).values
        total = down.cumsum(-1)
        wanted = SHARE * total[:, -1:]
        last = (total < wanted).sum(-1, keepdim=True).clamp_max(down.shape[1] - 1)
        # the last cell counts by the part of it that is wanted: shares then have no steps
        part = (wanted - total.gather(1, last)) / down.gather(1, last) + 1
        return {"attention_map_cells": Estimate.exact((last + part)[:, 0] / (state.pairs.sums > 0).sum())}

    def arrays(self, state: Sums) -> dict[str, Float[Tensor, "heads ..."]]:
        # texts of which only later parts were seen count as one
        return {} if state.mass.sums is None else {"attention_map": state.mass.sums / max(1, state.texts)}


def pairs(view: View, bins: KeyBins) -> Float[Tensor, "#batch 1 query columns"]:
    """How many keys of each bin a row may see, taking a mask with holes for the interval around it."""
    x = bins.columns(view).cumsum(1)
    before = torch.nn.functional.pad(x, (0, 0, 1, 0))
    batch = max(len(before), len(view.mask.rows))
    before = before.expand(batch, -1, -1)
    ends = [
        before.gather(1, at.long().expand(batch, -1)[..., None].expand(-1, -1, before.shape[-1]))
        for at in (view.mask.high, view.mask.low)
    ]
    return (ends[0] - ends[1])[:, None]
