r"""Attention knock-out: one part of a text may not look at another.

    s'_ij = -inf    for i in the rows, j in the keys

What these rows took from these keys in these layers no longer comes through, and the rest of the row takes its weight.
If the answer suffers, that is the way which the information took.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from foveate.core.card import Card, Needs
from foveate.core.mechanism import Edit, Tilt
from foveate.core.places import Head, Span, some_heads, some_indices, some_spans
from foveate.core.rows import View
from foveate.steer._acting import acting

__all__ = ["Knockout"]


@dataclass(frozen=True)
class Knockout(Edit):
    """Takes the keys of one span away from the rows of another, in some layers and heads.

    Args:
        keys: The span that is not to be looked at, one for the batch or one per batch row.
        rows: The span whose rows may not look; () is all rows outside of the keys, which in a causal model are those
            behind them.
        layers: The layers where; () is all.
        heads: (layer, head) of those where; () is all.

    Example:
        The last "a" finds "b" because "b", the third token, has looked at the "a" before it. Where it may not, nothing
        is found: the head looks at all tokens alike, and says what is there twice.

        >>> import foveate
        >>> from foveate.steer import Knockout
        >>> from foveate.testing import handmade, tiny
        >>> model, text = handmade.model(), handmade.ids("abca")
        >>> tiny.tokenizer().decode(model(text).logits[0, -1].argmax())
        'b'
        >>> with foveate.attach(model, Knockout(keys=((1, 2),), rows=((2, 3),))):
        ...     tiny.tokenizer().decode(model(text).logits[0, -1].argmax())
        'a'
    """

    keys: tuple[Span, ...] = some_spans()
    rows: tuple[Span, ...] = some_spans(none="all rows outside of the keys")
    layers: tuple[int, ...] = some_indices()
    heads: tuple[Head, ...] = some_heads()

    card: ClassVar = Card(
        title="Attention knock-out between two spans",
        year=2023,
        family="circuits",
        needs=Needs.WEIGHTS,
        equation="s'_ij = -inf for i in the rows and j in the keys",
        differs="as in Dissecting Recall of Factual Associations in Auto-Regressive Language Models, where target rows "
        "are cut off from source keys in a window of layers around each; here any layers and heads are named. A row "
        "that has nothing left to look at gives zeros. Cross-attention is left alone",
        use="to find out by which layers, and from where to where, a fact reaches the answer",
        misleads="cut in a few layers, what was there may go round by a third token or a later layer; rows that gave "
        "the keys much weight (a sink at the first token) are disturbed whatever the keys say",
    )
    test_params: ClassVar = (
        {"keys": ((1, 4),)},
        {"keys": ((0, 3),), "rows": ((3, 9),)},
        {"keys": ((2, 6),), "rows": ((4, 8),)},
        {"keys": ((0, 6),), "rows": ((2, 5),)},
        {"keys": ((2, 6),), "layers": (1,), "heads": ((1, 0), (1, 3))},
    )

    def miniature(self) -> Knockout:
        """Tokens 1 to 3 are taken from those behind them."""
        return replace(self, keys=((1, 4),), rows=((5, 12),) if self.rows else ())

    def tilt(self, view: View) -> Tilt | None:
        heads = acting(self.heads, view)
        if heads is None or (self.layers and view.layer.index not in self.layers):
            return None
        place = view.mask.place
        rows = view.inside(self.rows, place) if self.rows else ~view.inside(self.keys, place)
        out = view.inside(self.keys, view.mask.key_place)[:, None] & heads[:, None]
        return Tilt(bias=torch.where(out, -torch.inf, 0.0), rows=rows)
