r"""Attention calibration: what sinks get for nothing goes to the other tokens.

    S_i   = {j : p_ij > threshold}, without the first tokens of the text
    p'_ij = factor p_ij                                             j in S_i
    p'_ij = p_ij (1 + (1 - factor) P_i / (sum_{k not in S_i} p_ik))   else,      P_i = sum_{k in S_i} p_ik

Sinks are found anew for every text, head and row. The first token is one, too, but not all sinks do harm: it is left
out, and gets its share of what is taken from the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.card import Card, Needs
from foveate.core.mechanism import Edit
from foveate.core.params import bounded
from foveate.core.passes import Passes
from foveate.core.places import Head, named_layer, some_heads, some_indices
from foveate.core.rows import RowBlock
from foveate.steer._sinks import beginning, behind, chosen, gains

__all__ = ["AttentionCalibration"]


@dataclass(frozen=True)
class AttentionCalibration(Edit):
    """Multiplies the large weights of each row, and gives what this frees to its other keys.

    Args:
        factor: beta, what is left of the weight of a sink; 1 changes nothing.
        threshold: Weight above which a key is a sink of its row.
        spared: How many tokens at the beginning of the text are never sinks; 0 takes the first one for one, too.
        heads: (layer, head) of those to calibrate; () is all.
        layers: Layers whose heads are calibrated; () is all.

    Example:
        Where a head looks at up to eight tokens alike, each has more than 0.12: all but the first are sinks, and it
        gets what they give. Heads that look at one token only have nobody to give to, and stay.

        >>> import foveate
        >>> from foveate.measure import FirstTokenMass
        >>> from foveate.steer import AttentionCalibration
        >>> from foveate.testing import handmade
        >>> model = handmade.model()
        >>> for edits in ((), (AttentionCalibration(factor=0.0, threshold=0.12),)):
        ...     with foveate.attach(model, *edits, FirstTokenMass()) as attached:
        ...         _ = model(handmade.ids("hello world"))
        ...     handmade.named(attached.results.heads, "first_token_mass")
        {'first': 1.0, 'previous': 0.17, 'self': 0.08, 'average': 0.26}
        {'first': 1.0, 'previous': 0.17, 'self': 0.08, 'average': 0.7}
    """

    factor: float = bounded(0.4, 0.0, 1.0, grid=(0.0, 0.2, 0.4, 0.6, 0.8))
    threshold: float = bounded(0.1, 0.0, 1.0, grid=(0.05, 0.1, 0.2, 0.3, 0.5))
    spared: int = bounded(1, 0, 64)
    heads: tuple[Head, ...] = some_heads()
    layers: tuple[int, ...] = some_indices()

    card: ClassVar = Card(
        title="Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training "
        "through Attention Calibration",
        year=2024,
        family="sinks",
        needs=Needs.WEIGHTS,
        equation="S_i = {j > 0: p_ij > threshold}; p'_ij = factor p_ij in S_i; what is freed goes to the others in "
        "proportion to p_ij",
        differs="a sink is a key whose weight in the row itself is above the threshold; the paper takes the mean over "
        "all later rows, which are not there yet while a text is decoded. So a key that a single row looks at is "
        "calibrated here, and is no sink there. All heads unless some are named; the paper calibrates those of layers "
        "2 to 30 of 32 that, each alone, did better with it on labelled texts. The published code spares the first "
        "sink that it finds, whichever that is; here it is the first token of the text",
        use="to take weight off tokens that get much of it everywhere, in heads found on labelled examples",
        misleads="a head that does its work by looking at one token (retrieval, induction) has no sinks but that one: "
        "calibrating it spoils what it does",
        claims=("sinks_not_all_help",),
    )
    identity: ClassVar = {"factor": 1.0}
    test_params: ClassVar = (
        {},
        {"factor": 1.0},
        {"factor": 0.0, "threshold": 0.3, "spared": 0},
        {"threshold": 0.05, "spared": 3, "layers": (1,)},
        {"factor": 0.6, "heads": ((1, 0), (0, 1))},
    )

    def miniature(self) -> AttentionCalibration:
        """The same with a first token to give to, and a threshold near the weights of rows of a dozen keys."""
        return replace(self, threshold=0.095, spared=max(1, min(self.spared, 2)))

    def acts(self, layer: int) -> bool:
        return named_layer(layer, self.layers, self.heads)

    def edit(
        self, block: RowBlock, weights: Float[Tensor, "batch heads rows keys"]
    ) -> Float[Tensor, "batch heads rows keys"]:
        here = chosen(self.heads, self.layers, block.view)
        if here is None:
            return weights
        front, spared = beginning(block, self.spared)
        sinks = weights > self.threshold
        sinks[..., front] &= ~spared
        if self.heads:
            sinks &= here
        # what the others hold is summed up itself: a difference would not be 0 where there is none
        held = torch.where(sinks, 0.0, weights).sum(-1, keepdim=True)
        gain = gains((1 - self.factor) * (weights.sum(-1, keepdim=True) - held), held)
        return weights * torch.where(sinks, torch.where(gain > 0, self.factor, 1.0), 1 + gain)

    def through(self, passes: Passes) -> Float[Tensor, "batch heads query value_dim"]:
        here, whole = chosen(self.heads, self.layers, passes.view), passes.softmax()
        if here is None:
            return whole.out
        front = behind(passes.view.mask, self.spared)
        # what the others hold is summed up itself, as in `edit`
        first, low = passes.up_to(whole.lse, math.inf, high=front), passes.up_to(whole.lse, self.threshold, front)
        others, held = first.out + low.out, (first.mass + low.mass)[..., None]
        gain = gains((1 - self.factor) * (passes.total(whole) - held).clamp_min(0), held)
        new = others * (1 + gain) + (whole.out - others) * torch.where(gain > 0, self.factor, 1.0)
        return torch.where(here, new, whole.out)
