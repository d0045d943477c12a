"""What rules of relative positions share: distances, and products with a vector per distance without copies of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.rows import RowBlock
from foveate.core.rule import Rule

__all__ = ["Relative", "distances", "skewed"]


def distances(block: RowBlock) -> Int[Tensor, "rows keys"]:
    """How many tokens each key stands before the row, i - j; negative behind it."""
    at = torch.arange(block.first, block.last, device=block.index.device)
    return block.view.mask.position[block.index][:, None] - at


def skewed(
    block: RowBlock, q: Float[Tensor, "batch heads rows dim"], e: Float[Tensor, "heads span dim"]
) -> Float[Tensor, "batch heads rows keys"]:
    r"""q_i . e_{i-j}, and 0 where there is no such vector: for keys behind the row, or `span` tokens or more before it.

    The products of R rows with the distances of K keys are R x (R + K - 1), far to near, and the first key stands one
    further to the left in each row than in the row above. Read in lines that are one shorter, from R - 1 on, each key
    has a column of its own. So nothing of the size rows x keys x dim is ever made.
    """
    rows, keys, span = q.shape[2], block.last - block.first, e.shape[1]
    if not rows or not keys:
        return q.new_zeros(*q.shape[:3], keys)
    position = block.view.mask.position[block.index]
    if bool((position.diff() != 1).any()):
        d = distances(block)
        found = (q @ e.transpose(1, 2)).gather(-1, d.clamp(0, span - 1).expand(*q.shape[:2], -1, -1))
        return torch.where((d >= 0) & (d < span), found, 0.0)
    far = int(position[-1]) - block.first
    near = far - (rows + keys - 2)
    low, high = max(0, near), min(span, far + 1)
    if high <= low:
        return q.new_zeros(*q.shape[:3], keys)
    # one column more than there are distances, so that a line that is one shorter has at least one number
    lines = torch.nn.functional.pad(q @ e[:, low:high].flip(1).transpose(1, 2), (far + 1 - high, low - near + 1))
    shorter = rows + keys - 1
    return lines.flatten(-2)[..., rows - 1 : rows - 1 + rows * shorter].unflatten(-1, (rows, shorter))[..., :keys]


@dataclass(frozen=True)
class Relative(Rule):
    r"""Scores of Transformer-XL: s_ij = scale ((q_i + u_h) . k_j + q_i . e_{i-j} + b_{i-j}), inside of a mixer.

    `view.learned` has `toward_keys` u [heads, dim], `distance` e [heads, span, dim], `distance_bias` b [heads, span].
    """

    def score(self, block: RowBlock) -> Float[Tensor, "batch heads rows keys"]:
        own: Any = block.view.learned
        view, q = block.view, block.q
        u = own.toward_keys.to(q.dtype).unflatten(0, (view.kv_heads, -1))
        k = view.k[:, :, block.first : block.last].to(q.dtype)
        content = (u @ k.transpose(-1, -2)).flatten(1, 2)[:, :, None]
        # b is the product of 1 with one more number of e
        e = torch.cat([own.distance, own.distance_bias[..., None]], -1).to(q.dtype)
        relative = skewed(block, torch.nn.functional.pad(q, (0, 1), value=1.0), e)
        return Rule.score(self, block) + view.scale * (content + relative)
