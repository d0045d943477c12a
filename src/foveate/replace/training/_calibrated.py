"""Weights re-normalised by how far the features of a row and of its keys are apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.rows import RowBlock
from foveate.core.rule import Rule

__all__ = ["Calibrated"]

# keeps the power of a square of zero finite
FLOOR = 1e-8


@dataclass(frozen=True, eq=False)
class Calibrated(Rule):
    r"""p-Laplacian weights of a softmax row, not yet divided by their sum: A' = A (A ||r_i - f_j||^2)^(p/2 - 1).

    The features f_j of the keys are the values of the call, all but the last column.

    Args:
        rows: Features of the rows.
        p: The power.
    """

    rows: Float[Tensor, "batch heads query features"]
    p: Float[Tensor, ""]

    def normalise(
        self, block: RowBlock, scores: Float[Tensor, "batch heads rows keys"]
    ) -> Float[Tensor, "batch heads rows keys"]:
        a = Rule.normalise(self, block, scores)
        r = self.rows[:, :, block.index].to(a.dtype)
        f = block.view.v[:, :, block.first : block.last, :-1].to(a.dtype)
        # ||r||^2 + ||f||^2 - 2 r . f as one product: each pass over the weights counts
        one = torch.ones_like
        rows = torch.cat([r, r.square().sum(-1, keepdim=True), one(r[..., :1])], -1)
        keys = torch.cat([-2 * f, one(f[..., :1]), f.square().sum(-1, keepdim=True)], -1)
        square = rows @ keys.transpose(-1, -2)
        return a * torch.exp((self.p / 2 - 1) * torch.log((a * square).clamp_min(FLOOR)))
