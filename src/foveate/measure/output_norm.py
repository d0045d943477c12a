r"""Output norm: how much each head writes to the residual stream.

    n_i^h = \lVert W_O^h o_i^h \rVert = \sqrt{ o_i^{hT} G^h o_i^h },        G^h = W_O^{hT} W_O^h

The Gram matrix G^h makes it O(N d^2): no row is ever taken to the model's width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.card import Card, Needs
from foveate.core.mechanism import RowMetric
from foveate.core.reductions import Reduction
from foveate.core.rows import Rows

__all__ = ["OutputNorm"]


@dataclass(frozen=True)
class OutputNorm(RowMetric):
    """Mean norm of a head's output after its slice of the output projection (`output_norm`).

    Beside it its share of the summed norms of the layer's heads (`output_norm_share`). Layers whose
    projection is not known say nothing.

    Example:
        All heads look at something; in the first layer only `previous` writes what it found to the residual stream.

        >>> import foveate
        >>> from foveate.measure import OutputNorm
        >>> from foveate.testing import handmade
        >>> model = handmade.model()
        >>> with foveate.attach(model, OutputNorm()) as attached:
        ...     _ = model(handmade.ids("hello world"))
        >>> handmade.named(attached.results.heads, "output_norm")
        {'first': 0.0, 'previous': 1.0, 'self': 0.0, 'average': 0.0}
        >>> handmade.named(attached.results.heads, "output_norm_share")
        {'first': 0.0, 'previous': 1.0, 'self': 0.0, 'average': 0.0}
    """

    card: ClassVar = Card(
        title="Identifying and Evaluating Inactive Heads in Pretrained LLMs",
        year=2025,
        family="outputs",
        needs=Needs.WEIGHTS | Needs.VALUES | Needs.MODEL,
        equation="n_i = |W_O^h o_i| = sqrt(o_i^T (W_O^h)^T W_O^h o_i); share: n_i^h / sum_h n_i^h",
        differs="the paper thresholds the average norm of a head's output, plain or relative to its layer's "
        "mean, to call heads inactive; ours reports it, after the output projection, and as a share. The "
        "projection's bias belongs to no head; a gate or norm in between is not seen",
        use="to find heads that are idle whatever their attention looks like",
        misleads="a large output can cancel against another head's, and a constant one says nothing",
    )

    def needs(self) -> tuple[Reduction, ...]:
        return ()

    def per_row(self, rows: Rows) -> dict[str, Float[Tensor, "batch heads query"]]:
        weight, out = rows.view.projection, rows.out
        if weight is None:
            return {}
        batch, heads, queries, dim = out.shape
        kind = torch.promote_types(out.dtype, torch.float32)
        o = out.to(kind)
        w = weight.detach().to(kind).unflatten(1, (heads, dim)).transpose(0, 1)
        if batch * queries < dim:
            # for a decoded token the Gram matrix costs more than the output itself
            n = (o @ w.transpose(1, 2)).norm(dim=-1)
        else:
            gram = w.transpose(1, 2) @ w
            n = ((o @ gram) * o).sum(-1).clamp_min(0.0).sqrt()
        total = n.sum(1, keepdim=True)
        return {"output_norm": n, "output_norm_share": n / total.clamp_min(torch.finfo(kind).tiny)}
