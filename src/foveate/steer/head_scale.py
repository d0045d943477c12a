r"""Head scaling: each head says what it says, louder or not at all.

    o'_h = s_h o_h

o_h is what head h gives before the output projection, so that only this head's part of the residual stream changes.
At s_h = 0 the head is taken out: zero ablation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.card import Card, Needs
from foveate.core.mechanism import HeadEdit
from foveate.core.params import bounded
from foveate.core.places import Value, factors, named_layer, values_of
from foveate.core.rows import Rows

__all__ = ["HeadScale"]

GRID = (0.0, 0.5, 0.8, 1.25, 1.5, 2.0)


@dataclass(frozen=True)
class HeadScale(HeadEdit):
    """Multiplies the outputs of heads before the output projection, of all or of each by its own factor.

    Args:
        factor: s, for all heads without one of their own; 1 changes nothing, 0 takes them out.
        heads: (layer, head, s) for single heads.

    Example:
        Without its induction head the model no longer knows how "abcabcab" goes on.

        >>> import foveate
        >>> from foveate.steer import HeadScale
        >>> from foveate.testing import handmade, tiny
        >>> model, text = handmade.model(), handmade.ids("abcabcab")
        >>> c = tiny.tokenizer().get_vocab()["c"]
        >>> round(model(text).logits[0, -1].softmax(-1)[c].item(), 2)
        1.0
        >>> with foveate.attach(model, HeadScale(1.0, heads=((1, 2, 0.0),))):
        ...     round(model(text).logits[0, -1].softmax(-1)[c].item(), 2)
        0.01
    """

    factor: float = bounded(1.0, -100.0, 100.0, grid=GRID)
    heads: tuple[Value, ...] = values_of(-100.0, 100.0, grid=GRID)

    card: ClassVar = Card(
        title="Scaling of head outputs; zero ablation at factor 0",
        year=2019,
        family="heads",
        needs=Needs.VALUES,
        equation="o'_h = s_h o_h",
        differs="no single paper is behind it. It acts before the output projection: zeroing a stretch of what comes "
        "after the projection, as some tools do, takes out a mixture of all heads",
        use="to see what a head is worth to a task (0), or to make the heads that a task needs count for more",
        misleads="zero is an output that the model may never see from that head, so that a fall shows harm by the "
        "unusual as well as the loss of what the head does: compare mean_ablation and resample_ablation. Where a norm "
        "stands behind the projection (Gemma 2), one factor on all heads of a layer cancels out; `attach` refuses it",
    )
    identity: ClassVar = {"factor": 1.0, "heads": ()}
    test_params: ClassVar = (
        {"factor": 0.5, "heads": ((0, 3, 1.0), (1, 1, 1.0))},
        {"factor": 1.0},
        {"heads": ((1, 0, 0.0), (0, 1, 2.0))},
        {"factor": 0.0, "heads": ((1, 1, -1.5),)},
    )

    def sets(self) -> frozenset[tuple]:
        """Heads that are taken out."""
        return frozenset(("layer", layer, "head", head) for layer, head, factor in self.heads if factor == 0)

    def acts(self, layer: int) -> bool:
        return self.factor != 1 or named_layer(layer, (), tuple((at, head) for at, head, _ in self.heads))

    def edit(
        self, rows: Rows, out: Float[Tensor, "batch heads query value_dim"]
    ) -> Float[Tensor, "batch heads query value_dim"]:
        s = factors(self.factor, self.heads, rows.layer.index, out.shape[1], out)[:, None, None]
        # where, not times: what is taken out may be infinite
        return torch.where(s == 0, 0.0, s * out)
