r"""Sink redistribution: heads that look into a region look at its contents rather than at its sinks.

    S_i   = {j : p_ij > threshold / n_i} and the first token               n_i keys that row i sees
    R     = the region,  in_i = sum_{j in R} p_ij,  clear_i = sum_{j in R, not in S_i} p_ij
    where in_i >= least and clear_i >= centric in_i:
    p'_ij = (1 - portion) p_ij                                             j in S_i
    p'_ij = p_ij (1 + portion sum_{k in S_i} p_ik / clear_i)               j in R, not in S_i

The paper's region are the tokens of an image. What sinks get does no work: a head that looks into the region anyway
can have it. Sinks inside of the region give, too, and get nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core.card import Card, Needs
from foveate.core.mechanism import Edit
from foveate.core.params import bounded
from foveate.core.passes import Passes
from foveate.core.places import Head, Span, named_layer, some_heads, some_indices, some_spans
from foveate.core.rows import RowBlock, View
from foveate.steer._sinks import SOME, beginning, behind, chosen, gains

__all__ = ["SinkRedistribution"]


@dataclass(frozen=True)
class SinkRedistribution(Edit):
    """Gives a portion of the weight of sinks to a stretch of the text, in the rows behind it that look there anyway.

    Args:
        span: The region, as tokens of each row's text: (first, one past the last).
        portion: p, how much of the weight of a sink is taken; 0 changes nothing.
        centric: rho, how much of a row's weight on the region must be on tokens there that are no sinks.
        least: How much weight the region must have in a row at least.
        threshold: How many times as much as the mean weight of its row makes a key a sink.
        heads: (layer, head) of those in which it may act; () is all.
        layers: Layers in which it may act; () is all.

    Example:
        The head that looks at all tokens alike gives "hello" what it took from the first token; one that looks at its
        own token does not look there, and stays.

        >>> import foveate
        >>> from foveate.measure import FirstTokenMass
        >>> from foveate.steer import SinkRedistribution
        >>> from foveate.testing import handmade
        >>> model = handmade.model()
        >>> for edits in ((), (SinkRedistribution(span=((1, 6),), portion=1.0),)):
        ...     with foveate.attach(model, *edits, FirstTokenMass()) as attached:
        ...         _ = model(handmade.ids("hello world"))
        ...     handmade.named(attached.results.heads, "first_token_mass")
        {'first': 1.0, 'previous': 0.17, 'self': 0.08, 'average': 0.26}
        {'first': 1.0, 'previous': 0.17, 'self': 0.08, 'average': 0.2}
    """

    span: tuple[Span, ...] = some_spans()
    portion: float = bounded(0.6, 0.0, 1.0, grid=(0.2, 0.4, 0.6, 0.8))
    centric: float = bounded(0.5, 0.0, 1.0, grid=(0.5, 0.8, 0.9))
    least: float = bounded(0.2, 0.0, 1.0, grid=(0.05, 0.1, 0.2))
    threshold: float = bounded(20.0, 1.0, 100000.0, grid=(10.0, 20.0, 50.0))
    heads: tuple[Head, ...] = some_heads()
    layers: tuple[int, ...] = some_indices()

    card: ClassVar = Card(
        title="See What You Are Told: Visual Attention Sink in Large Multimodal Models",
        year=2025,
        family="sinks",
        needs=Needs.WEIGHTS,
        equation="p'_ij = (1 - portion) p_ij for sinks j; the region's other tokens get what is taken in proportion to "
        "p_ij, in rows with sum_R p >= least and sum_{R without S} p >= centric sum_R p",
        differs="the paper knows sinks by massive activations in certain dimensions of the hidden state, which differ "
        "from model to model and do not reach an attention call: here they are the first token and keys whose weight "
        "is `threshold` times the mean of their row, so that a token that is looked at that much for its contents is "
        "one, too. `portion` is what is taken, as in the paper; in its code it is what is left. As in the code, a "
        "row must put `least` of its weight on the region; the code leaves a layer alone in which the image has no "
        "sink. Any stretch of text can be the region. All layers unless some are named; the paper leaves out the first "
        "two and the last",
        use="to make a model look harder at an image, a document or an example that stands before the question",
        misleads="in a short text a weight of 20 times the mean cannot be, and only the first token gives",
    )
    identity: ClassVar = {"portion": 0.0}
    test_params: ClassVar = (
        {"span": ((2, 9),)},
        {"span": ((2, 9),), "portion": 0.0},
        {"span": ((1, 12),), "portion": 0.9, "centric": 0.1, "least": 0.0, "threshold": 1.5},
        {"span": ((0, 4),), "portion": 1.0, "centric": 0.0, "least": 0.0, "heads": ((1, 0), (0, 1))},
        {"span": ((3, 7),), "centric": 0.2, "least": 0.05, "threshold": 2.0, "layers": (1,)},
    )

    def miniature(self) -> SinkRedistribution:
        """A region in a text of a dozen tokens that all rows behind it look into, and sinks that they have."""
        return replace(self, span=((1, 6),), centric=0.0, least=0.0, threshold=min(self.threshold, 1.05))

    def acts(self, layer: int) -> bool:
        return named_layer(layer, self.layers, self.heads)

    def edit(
        self, block: RowBlock, weights: Float[Tensor, "batch heads rows keys"]
    ) -> Float[Tensor, "batch heads rows keys"]:
        here = chosen(self.heads, self.layers, block.view)
        if here is None:
            return weights
        view, mask = block.view, block.view.mask
        region = view.inside(self.span, mask.key_place)[:, None, None, block.first : block.last]
        sinks = weights > self.threshold / seen(block)
        front, first = beginning(block, 1)
        sinks[..., front] |= first
        taken = torch.where(sinks, weights, 0.0)
        # the region is a few columns of the block, and only these are looked at for it
        columns = region.any(0)[0, 0].nonzero()[:, 0]
        at = slice(int(columns[0]), int(columns[-1]) + 1) if len(columns) else slice(0, 0)
        clear = torch.where(region[..., at] & ~sinks[..., at], weights[..., at], 0.0)
        contents = clear.sum(-1, keepdim=True)
        inside = contents + torch.where(region[..., at], taken[..., at], 0.0).sum(-1, keepdim=True)
        centric = (inside >= self.least) & (contents >= self.centric * inside)
        acts = here & centric & self.later(view)[:, None, block.index, None] & (contents > SOME)
        share = torch.where(acts, self.portion, 0.0)
        new = torch.addcmul(weights, taken, share, value=-1)
        new[..., at] += clear * gains(share * taken.sum(-1, keepdim=True), contents)
        return new

    def later(self, view: View) -> Bool[Tensor, "#batch query"]:
        """Which rows stand behind the region."""
        return view.inside(tuple((b, torch.iinfo(torch.int32).max) for _, b in self.span), view.mask.place)

    def through(self, passes: Passes) -> Float[Tensor, "batch heads query value_dim"]:
        view, mask = passes.view, passes.view.mask
        here, whole = chosen(self.heads, self.layers, view), passes.softmax()
        if here is None:
            return whole.out
        front, cut = behind(mask, 1), self.threshold / (mask.high - mask.low).clamp_min(1)[:, None]
        bounds = torch.tensor(self.span, dtype=torch.int32, device=mask.device)
        low, high = ((mask.text_begin[:, None] + b[:, None]).clamp(0, mask.keys).to(torch.int32) for b in bounds.T)
        others = passes.up_to(whole.lse, cut, front)
        clear = passes.up_to(whole.lse, cut, torch.maximum(low, front), high)
        inside, contents = passes.up_to(whole.lse, math.inf, low, high, mixed=False).mass, clear.mass[..., None]
        inside = inside[..., None]
        centric = (inside >= self.least) & (contents >= self.centric * inside)
        acts = here & centric & self.later(view)[:, None, :, None] & (contents > SOME)
        share = torch.where(acts, self.portion, 0.0)
        taken = (passes.total(whole) - others.mass[..., None]).clamp_min(0)
        return whole.out - share * (whole.out - others.out) + clear.out * gains(share * taken, contents)


def seen(block: RowBlock) -> Tensor:
    """How many keys each row sees, at least 1."""
    mask = block.view.mask
    if mask.dense is None and block.visited is None:
        count = (mask.high - mask.low)[:, None, block.index, None]
    else:
        count = (block.scores > -torch.inf).sum(-1, keepdim=True)
    return count.clamp_min(1)
