r"""Attention over several sets of keys as one: outputs are weighted by what their log-sum-exps say they hold.

    lse = \ln \sum_n e^{lse_n},    out = \sum_n e^{lse_n - lse} out_n

The order of the sets and how they are put together in steps make no difference, and a set in which a row sees nothing
(lse -inf) adds nothing, whatever stands in its output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import BadInput

__all__ = ["Part", "merge"]

# head outputs [batch, heads, query, value_dim] and log-sum-exps [batch, heads, query]
Part = tuple[Tensor, Tensor]


def merge(
    parts: Sequence[Part],
) -> tuple[Float[Tensor, "batch heads query value_dim"], Float[Tensor, "batch heads query"]]:
    """What attention over all keys gives, from what it gives over sets of them that have no key in common.

    Args:
        parts: Head outputs and log-sum-exps of each set, all of one shape; gradients go through both.

    Returns:
        Head outputs in the dtype of the first ones, and log-sum-exps; 0 and -inf for a row that sees nothing.

    Raises:
        BadInput: no parts, or parts of different shapes.
    """
    if not parts or any(out.shape != parts[0][0].shape or lse.shape != out.shape[:-1] for out, lse in parts):
        shapes = [(tuple(out.shape), tuple(lse.shape)) for out, lse in parts]
        raise BadInput(
            "parts are merged that have one shape, outputs [batch, heads, query, value_dim] and log-sum-exps [batch, "
            f"heads, query]; got {shapes or 'none'}"
        )
    if len(parts) == 1:
        return parts[0]
    each = torch.stack([lse for _, lse in parts])
    peak = each.detach().amax(0)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    share = torch.exp(each - peak)
    total = share.sum(0)
    empty = total == 0
    # where nothing is seen at all, a derivative of ln 0 would be NaN
    total = total.masked_fill(empty, 1.0)
    mixed = torch.zeros_like(parts[0][0], dtype=each.dtype)
    for (out, lse), weight in zip(parts, share / total, strict=True):
        # masked, not weighed: 0 x NaN is NaN
        held = out.to(each.dtype).masked_fill((lse == -torch.inf)[..., None], 0.0)
        mixed = mixed + weight[..., None] * held
    return mixed.to(parts[0][0].dtype), (peak + total.log()).masked_fill(empty, -torch.inf)
