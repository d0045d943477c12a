r"""Sharpening: large weights grow, small ones go.

    p'_ij = relu(n_i p_ij - o)^gamma / \sum_k relu(n_i p_ik - o)^gamma

n_i is the number of keys that row i may see, so that 1 / n_i is the weight that each would have if all were alike. What
is below `o` times that is cut off; the rest is raised to a power.

Without the offset, p'_ij is in proportion to p_ij^gamma, which is softmax at the temperature 1 / gamma: then the edit
`temperature` does the same in closed form. With it there is no such form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.card import Card, Needs
from foveate.core.mask import Mask
from foveate.core.mechanism import Edit
from foveate.core.params import bounded
from foveate.core.passes import Passes
from foveate.core.places import Head, named_layer, some_heads
from foveate.core.rows import RowBlock
from foveate.steer._acting import acting

__all__ = ["Sharpen"]

# rows of so few keys keep them all, and rows this near to uniform have nothing to sharpen but rounding errors
FEW = 3
UNIFORM = 1e-3


@dataclass(frozen=True)
class Sharpen(Edit):
    """Re-weights each row so that its larger weights grow at the cost of the smaller ones.

    Args:
        power: gamma; 1 keeps proportions.
        offset: o, in shares of what each key would get if all were alike; 0 cuts nothing off.
        sink: Number of first tokens of the text whose weights stay as they are; the others are re-weighted among
            themselves, as a row of their own.
        heads: (layer, head) of those that it acts in; () is all.

    Example:
        Heads that choose by 2.5 nats (at a temperature of 100) choose for good. The one that looks at all tokens alike
        has nothing that could be sharpened.

        >>> import foveate
        >>> from foveate.measure import FirstTokenMass
        >>> from foveate.steer import Sharpen, Temperature
        >>> from foveate.testing import handmade
        >>> model = handmade.model()
        >>> for more in ((), (Sharpen(sink=0),)):
        ...     edits = Temperature(100.0), *more, FirstTokenMass()
        ...     with foveate.attach(model, *edits) as attached:
        ...         _ = model(handmade.ids("abcdefghij"))
        ...     handmade.named(attached.results.heads, "first_token_mass")
        {'first': 0.73, 'previous': 0.22, 'self': 0.14, 'average': 0.27}
        {'first': 1.0, 'previous': 0.18, 'self': 0.09, 'average': 0.27}
    """

    power: float = bounded(2.0, 1.0, 64.0, grid=(1.0, 1.5, 2.0, 3.0, 5.0, 15.0))
    offset: float = bounded(1.0, 0.0, 1.0, grid=(0.0, 0.5, 1.0))
    sink: int = bounded(1, 0, 64, grid=(0, 1, 4))
    heads: tuple[Head, ...] = some_heads()

    card: ClassVar = Card(
        title="Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models",
        year=2025,
        family="normalisers",
        needs=Needs.WEIGHTS,
        equation="p'_ij = relu(n_i p_ij - o)^gamma / sum_k relu(n_i p_ik - o)^gamma",
        differs="the paper re-weights softplus weights of a model trained with them, at gamma = 3 or 15 and o = 1; "
        "here softmax weights of any model are, which are sharper to begin with, so that the default power is 2. "
        "sink = 1 leaves the first token out, which would otherwise win every row of a model that rests there; 0 gives "
        "the paper's rule. As there, rows of three keys have no offset. A row in which nothing is over the "
        "offset by a thousandth of 1 / n stays as it is: the rule would sharpen its rounding errors. Rows with a "
        "learned sink keep what they gave to it. n counts the keys from the first to the last that a row may see, "
        "also those that are cut out between them. Cross-attention is left alone",
        use="to see whether a model that spreads its attention over long texts is better off with less of it",
        misleads="softmax models were trained with the tail that is cut off here: a gain on one task says nothing of "
        "perplexity, which usually gets worse as the power grows",
    )
    identity: ClassVar = {"power": 1.0, "offset": 0.0}
    test_params: ClassVar = (
        {},
        {"power": 1.0, "offset": 0.0},
        {"power": 3.0, "sink": 0},
        {"power": 1.5, "offset": 0.0, "heads": ((1, 0), (0, 2), (1, 3))},
        {"offset": 0.5, "sink": 4},
    )

    def acts(self, layer: int) -> bool:
        return named_layer(layer, (), self.heads)

    def edit(
        self, block: RowBlock, weights: Float[Tensor, "batch heads rows keys"]
    ) -> Float[Tensor, "batch heads rows keys"]:
        view, p = block.view, weights
        heads = acting(self.heads, view)
        if heads is None or not p.shape[3]:
            return weights
        rest, n = (x[:, block.index, None] for x in self.counts(view.mask))
        n = n[:, None]
        # they stand in front, and only that part is masked: every pass over whole rows is dear
        front = slice(0, max(0, int(rest.max()) - block.first))
        kept = (torch.arange(block.first, block.last, device=p.device)[front] < rest)[:, None]
        left = p[..., front].masked_fill(kept, 0.0)
        behind = p[..., front.stop :]
        # o in shares of the uniform weight; what is over it in shares of the largest, whose power cannot overflow
        uniform = (left.sum(-1, keepdim=True) + behind.sum(-1, keepdim=True)) / n
        o = torch.where(n <= FEW, 0.0, self.offset) * uniform
        top = torch.cat([part.amax(-1, keepdim=True) for part in (left, behind) if part.shape[3]], -1)
        top = top.amax(-1, keepdim=True) - o
        sharp = top > UNIFORM * uniform
        top = top.where(sharp, 1.0)
        f = torch.addcmul(-o / top, p, 1 / top).relu() ** self.power
        f[..., front] = f[..., front].masked_fill(kept, 0.0)
        total = f.sum(-1, keepdim=True).where(sharp, 1.0)
        new = f * (n * uniform / total)
        new[..., front] = torch.where(kept, p[..., front], new[..., front])
        acts = sharp & heads[:, None, None]
        return new if bool(acts.all()) else torch.where(acts, new, p)

    def counts(self, mask: Mask) -> tuple[Int[Tensor, "#batch query"], Int[Tensor, "#batch query"]]:
        """The first key of each row that is re-weighted, and n, how many there are from there on."""
        # the first tokens of its text are no keys of the row that is re-weighted
        starts = mask.starts.where(mask.starts >= 0, mask.text_begin[:, None])
        rest = (starts + self.sink).to(torch.int32)
        return rest, (mask.high - torch.maximum(mask.low, rest)).clamp_min(1)

    def through(self, passes: Passes) -> Float[Tensor, "batch heads query value_dim"] | None:
        heads, view = acting(self.heads, passes.view), passes.view
        if heads is None:
            return passes.softmax().out
        if self.power != int(self.power):
            return None
        rest, n = self.counts(view.mask)
        n = n[:, None]
        front, left = passes.softmax(high=rest, sinks=False), passes.softmax(low=rest, sinks=False, mixed=False)
        o = torch.where(n <= FEW, 0.0, self.offset) / n
        top = (left.top - left.lse).exp() - o
        sharp = top > UNIFORM / n
        top = top.where(sharp, 1.0)
        found = passes.excess(-left.lse - top.log(), o / top, int(self.power), rest)
        new = found.out / found.mass.where(sharp, 1.0)[..., None]
        # the two parts of a row, and what a learned sink holds, by their log-sum-exps
        lse = torch.logaddexp(front.lse, left.lse)
        if view.sinks is not None:
            lse = torch.logaddexp(lse, view.sinks.float()[:, None])
        # of a row that sees nothing, anything finite
        lse = lse.where(lse > -torch.inf, 0.0)
        out = (front.lse - lse).exp()[..., None] * front.out + (left.lse - lse).exp()[..., None] * new
        still = (left.lse > -torch.inf) & ~(sharp & heads[:, None])
        return torch.where(still[..., None], passes.softmax().out, out) if bool(still.any()) else out
