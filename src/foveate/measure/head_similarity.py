r"""Similarity of the heads of a layer.

    cos_i(h, g) = \frac{p_i^h \cdot p_i^g}{\lVert p_i^h \rVert \lVert p_i^g \rVert},
    D_i^h = \sum_j p_ij^h \ln \frac{p_ij^h}{m_ij},        m = \frac{1}{H} \sum_h p^h

The mean of D over the heads is the Jensen-Shannon divergence of the layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.accumulate import Cells, Estimate
from foveate.core.card import Card, Needs
from foveate.core.params import bounded
from foveate.core.reductions import Sampled
from foveate.core.rows import Rows
from foveate.measure._sampled import SampledMetric

__all__ = ["HeadSimilarity"]

PAIRS = "pairs of heads"


@dataclass(frozen=True)
class HeadSimilarity(SampledMetric):
    """How much a head's rows are like those of the other heads of its layer.

    The mean cosine with the others (`head_similarity`), that with the most similar one
    (`head_similarity_nearest`), and the distance to the layer's mean row in nats
    (`head_similarity_divergence`; ln H at most). Looks at one row of each sampled pair. A layer of one head
    has no others (NaN).

    Args:
        pairs: Sampled pairs of rows per call.

    Example:
        In a text without a full stop the head `stop` does what `first` does; the two are each other's nearest.

        >>> import foveate
        >>> from foveate.measure import HeadSimilarity
        >>> from foveate.testing import handmade
        >>> model = handmade.model()
        >>> with foveate.attach(model, HeadSimilarity()) as attached:
        ...     _ = model(handmade.ids("hello world"))
        >>> handmade.named(attached.results.heads, "head_similarity_nearest", layer=1)
        {'first': 1.0, 'same': 0.43, 'induction': 0.43, 'stop': 1.0}
        >>> handmade.named(attached.results.heads, "head_similarity", layer=1)
        {'first': 0.48, 'same': 0.14, 'induction': 0.43, 'stop': 0.48}
    """

    pairs: int = bounded(32, 1, 4096)

    card: ClassVar = Card(
        title="What Does BERT Look At? An Analysis of BERT's Attention",
        year=2019,
        family="redundancy",
        needs=Needs.WEIGHTS,
        equation="cos_i(h,g) = p_i^h . p_i^g / (|p_i^h| |p_i^g|); D_i^h = sum_j p_ij^h ln(p_ij^h / mean_g p_ij^g)",
        differs="the paper takes the Jensen-Shannon divergence of every two heads of the model, from all "
        "rows; ours the cosine within a layer from sampled rows, and one divergence per head from the "
        "layer's mean",
        use="to find heads that do the same, before merging or pruning them",
        misleads="two heads with the same sink look alike whatever they do with the rest of their mass",
        sampled=True,
    )
    test_params: ClassVar = ({}, {"pairs": 3})

    def of_sample(self, rows: Rows, sampled: Sampled) -> dict[str, Float[Tensor, "batch heads sample"]]:
        p = sampled.weights.transpose(1, 2).contiguous()
        heads, tiny = p.shape[2], torch.finfo(p.dtype).tiny
        dot = p @ p.transpose(-1, -2)
        length = dot.diagonal(dim1=-2, dim2=-1).sqrt().clamp_min(tiny)
        cos = dot / length[..., None] / length[..., None, :]
        own = torch.eye(heads, dtype=torch.bool, device=p.device)
        others = cos.masked_fill(own, 0.0).sum(-1) / (heads - 1) if heads > 1 else torch.full_like(length, torch.nan)
        mean = p.mean(2)
        apart = -torch.special.entr(p).sum(-1) - (p @ mean.clamp_min(tiny).log()[..., None])[..., 0]
        return {
            "head_similarity": others.transpose(1, 2),
            "head_similarity_divergence": apart.clamp_min(0.0).transpose(1, 2),
            PAIRS: cos.masked_fill(own, torch.nan).permute(0, 2, 3, 1).flatten(1, 2),
        }

    def result(self, state: dict[str, Cells]) -> dict[str, Estimate]:
        found = {label: cells.mean() for label, cells in state.items()}
        if found:
            pairs = found.pop(PAIRS)
            value, low, high = (t.unflatten(0, (len(found["head_similarity"].value), -1)) for t in vars(pairs).values())
            at = value.nan_to_num(-2.0).argmax(-1, keepdim=True)
            found["head_similarity_nearest"] = Estimate(*(t.gather(-1, at)[:, 0] for t in (value, low, high)))
        return found
