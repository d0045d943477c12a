"""From an attention call to a window of one head, or a fine map of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.reductions import OnKeys, Reduction
from foveate.core.rows import RowBlock, View, attend
from foveate.opened import Map, Window

__all__ = ["map_of", "one_head", "weights_of", "window_of"]


@dataclass(frozen=True)
class Columns(Reduction):
    """The weights on the keys first..last themselves."""

    first: int
    last: int

    def of_block(self, block: RowBlock) -> Float[Tensor, "batch heads rows keys"]:
        whole = torch.nn.functional.pad(block.weights, (block.first, block.view.mask.keys - block.last))
        return whole[..., self.first : self.last]


def weights_of(view: View, head: int, rows: tuple[int, int], keys: tuple[int, int]) -> Float[Tensor, "rows keys"]:
    """The weights of some rows of a head on some keys, in memory O(block x N)."""
    wanted = Columns(*keys)
    with torch.no_grad():
        return attend(one_head(view, head, rows), [wanted], engine="blocks")[wanted][0, 0]


def window_of(
    view: View,
    head: int,
    rows: tuple[int, int],
    keys: tuple[int, int],
    pieces: list[str],
    text: str = "profile",
    why: str = "",
) -> Window:
    """A window with its tokens; `pieces` are those of the whole text."""
    weights = weights_of(view, head, rows, keys).cpu().numpy().astype(np.float16)
    tokens = (pieces[slice(*rows)], pieces[slice(*keys)])
    return Window(view.layer.index, head, text, rows, keys, *tokens, weights, why)


def map_of(view: View, head: int, bins: int, why: str = "") -> Map:
    """The map of a head in at most `bins` x `bins` stretches of nearly equal length."""
    tokens = max(view.queries, view.keys)
    count = min(bins, tokens)
    edges = [n * tokens // count for n in range(count + 1)]
    spans = OnKeys(tuple(pairwise(edges)))
    with torch.no_grad():
        mass = attend(one_head(view, head), [spans])[spans][0, 0]
        real = view.mask.rows[0, :, None]
        mass = torch.where(real, mass, 0.0)
    parts = [mass[a:b].sum(0, dtype=torch.float64) for a, b in pairwise(edges)]
    return Map(view.layer.index, head, edges, torch.stack(parts).float().cpu().numpy(), why)


def one_head(view: View, head: int, rows: tuple[int, int] | None = None) -> View:
    """The attention call of a single head, and of some of its rows; what its values hold is left out."""
    start, stop = rows or (0, view.queries)
    mask, group = view.mask, head // view.grouped

    def dense(a: int, b: int, i: int, j: int) -> torch.Tensor:
        assert mask.dense is not None
        part = mask.dense(start + a, start + b, i, j)
        return part[:1, head : head + 1] if part.shape[1] > 1 else part[:1]

    bias = view.bias
    if bias is not None:
        bias = bias[:1, head : head + 1] if bias.shape[1] > 1 else bias[:1]
        bias = bias[:, :, start:stop]
    return replace(
        view,
        q=view.q[:1, head : head + 1, start:stop],
        k=view.k[:1, group : group + 1],
        v=view.k[:1, group : group + 1, :, :1],
        mask=replace(
            mask,
            low=mask.low[:1, start:stop],
            high=mask.high[:1, start:stop],
            position=mask.position[start:stop],
            valid=None if mask.valid is None else mask.valid[:1, start:stop],
            # the first row of these is not the first of the text
            begin=None,
            dense=None if mask.dense is None else dense,
        ),
        sinks=None if view.sinks is None else view.sinks[head : head + 1],
        bias=bias,
        tokens=None,
        projection=None,
        dropout=0.0,
    )
