r"""Split keys: the keys of a long text are divided among the cores, and what each found is merged.

    (o_n, lse_n) = attention over part n,    lse = \ln \sum_n e^{lse_n},    o = \sum_n e^{lse_n - lse} o_n

A decoded token has one row per head, so that there is nothing to divide but the keys. The merge is associative: parts
of equal size are equal work, wherever one sequence of the batch ends and the next begins.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core import tiled
from foveate.core.card import Card, Needs
from foveate.core.mechanism import Schedule
from foveate.core.merging import merge
from foveate.core.params import bounded
from foveate.core.rows import View
from foveate.core.traffic import Shape, Traffic, split

__all__ = ["SplitKeys"]


@dataclass(frozen=True)
class SplitKeys(Schedule):
    """Attention of few rows over many keys, by parts of the keys; calls with more than a few rows are left alone.

    Args:
        piece: Keys per part.
        rows: The most rows that a call may have.

    Example:
        The model says what it said, with four keys to a part.

        >>> import torch, foveate
        >>> from foveate.compress import SplitKeys
        >>> from foveate.testing import handmade
        >>> model, ids = handmade.model(), handmade.ids("abcabcab")
        >>> plain = model.generate(ids, max_new_tokens=4)
        >>> with foveate.attach(model, SplitKeys(piece=4)):
        ...     torch.equal(model.generate(ids, max_new_tokens=4), plain)
        True
    """

    piece: int = bounded(tiled.PIECE, 1, 1 << 30)
    rows: int = bounded(4, 1, 64)

    card: ClassVar = Card(
        title="Lean Attention: Hardware-Aware Scalable Attention Mechanism for the Decode-Phase of Transformers",
        year=2024,
        family="exact",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES,
        equation="o = sum_n e^(lse_n - lse) o_n, lse = ln sum_n e^lse_n, over parts n of the keys",
        differs="the paper gives each core one equal stretch of all the keys of a batch, here parts of a fixed size "
        "wait in a queue, the largest first: the numbers then do not depend on how many cores there are",
        use="where one or a few long texts are decoded, with fewer heads than there are cores",
        misleads="one core gains nothing by it, and where the memory's bandwidth is used up more cores gain nothing",
        claims=("split_keys",),
    )
    test_params: ClassVar = ({"piece": 5, "rows": 64}, {"piece": 1, "rows": 64}, {})

    def refuses(self, view: View) -> str:
        if view.queries > self.rows:
            return f"{view.queries} rows, more than {self.rows}: they are work enough for all cores"
        return tiled.refuses(view)

    def run(
        self, view: View
    ) -> tuple[Float[Tensor, "batch heads query value_dim"], Float[Tensor, "batch heads query"]]:
        if tiled.by_kernel(view.q, view.v):
            return tiled.attend(view, piece=self.piece)
        # parts as entries of one batch: to the framework they are independent
        parts = max(1, -(-view.keys // self.piece))
        pad = (0, 0, 0, parts * self.piece - view.keys)
        k, v = (
            torch.nn.functional.pad(x, pad).unflatten(2, (parts, self.piece)).transpose(1, 2).flatten(0, 1)
            for x in (view.k, view.v)
        )
        start = torch.arange(parts, device=k.device)[:, None] * self.piece
        low, high = (
            (edge.expand(view.batch, -1)[:, None] - start).clamp(0, self.piece).flatten(0, 1).to(torch.int32)
            for edge in (view.mask.low, view.mask.high)
        )
        mask = replace(view.mask, low=low, high=high, keys=self.piece, valid=None, begin=None)
        q = view.q.repeat_interleave(parts, 0)
        out, lse = tiled.attend(view.but(q=q, k=k, v=v, mask=mask, sinks=None, tokens=None))
        found = [x.unflatten(0, (view.batch, parts)).unbind(1) for x in (out, lse)]
        merged = merge(list(zip(*found, strict=True)))
        return merged if view.sinks is None else tiled.with_sinks(*merged, view.sinks)

    def traffic(self, shape: Shape, fast: int) -> Traffic:
        return split(shape, fast, -(-shape.keys // self.piece))
