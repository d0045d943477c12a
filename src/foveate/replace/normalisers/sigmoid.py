r"""Sigmoid attention: each weight is decided by itself, and begins small enough for all of them.

    p_ij = 1 / (1 + exp(-(s_ij + b_i))),    b_i = -ln n

Without the bias a fresh row of n keys has weights near 1/2, n / 2 in sum, and the first steps of training fail; with it
they begin near 1 / n, as those of softmax do. n is the length of the texts in training, or for each row the number of
keys that it may see.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core import tiled
from foveate.core.card import Card, Needs
from foveate.core.mask import Mask
from foveate.core.params import bounded
from foveate.core.rows import RowBlock, View
from foveate.core.rule import Rule
from foveate.replace.normalisers._counts import keys_seen

__all__ = ["Sigmoid"]


@dataclass(frozen=True)
class Sigmoid(Rule):
    """Sigmoids of the scores as weights, with a bias of minus the logarithm of the length.

    Args:
        length: n of the bias, the length of the texts in training, the same for all rows; 0: the number of keys that
            each row may see; 1 is no bias.

    Example:
        A fresh module attends about as much in all as softmax does, and without the bias to much more.

        >>> import torch, foveate
        >>> from foveate.replace import Sigmoid
        >>> def mass(rule):
        ...     attention = foveate.nn.Attention(8, heads=1, rule=rule)
        ...     for name in ("v_proj", "o_proj"):
        ...         _ = torch.nn.init.eye_(getattr(attention, name).weight)
        ...     _ = torch.nn.init.zeros_(attention.q_proj.weight)
        ...     return attention(torch.ones(1, 100, 8))[0, -1, 0].detach()
        >>> mass(Sigmoid()), mass(Sigmoid(length=1))
        (tensor(0.9901), tensor(50.))
    """

    length: int = bounded(0, 0, 1 << 30, grid=(0,))

    card: ClassVar = Card(
        title="Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
        year=2024,
        family="normalisers",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES,
        equation="p_ij = sigmoid(s_ij - ln n)",
        differs="the paper's bias is one number for all rows of a model, from the length of its training texts (-7.62 "
        "for 2,048 tokens in its code): that is `length`. The default counts the keys of each row, so that the first "
        "rows of a text, too, have weights that sum to about 1, and no length need be known. Normalised queries and "
        "keys, LayerScale and a norm behind the attention, which the paper adds for large models, belong to the model. "
        "Learned sinks of a model have no part in it, for nothing is normalised",
        use="to train a model whose weights do not compete, without attention sinks",
        misleads="a loaded model is not as it was: the sum of its rows now follows the size of its scores; train it on",
        claims=("sigmoid_bias",),
    )
    test_params: ClassVar = ({}, {"length": 64}, {"length": 1})

    def bias(
        self, mask: Mask, dtype: torch.dtype, index: Int[Tensor, " rows"] | None = None
    ) -> Float[Tensor, "#batch #heads rows"]:
        """b_i of the rows."""
        n = keys_seen(mask, index).clamp_min(1)
        return torch.full_like(n, -math.log(self.length), dtype=dtype) if self.length else -n.to(dtype).log()

    def normalise(
        self, block: RowBlock, scores: Float[Tensor, "batch heads rows keys"]
    ) -> Float[Tensor, "batch heads rows keys"]:
        return torch.sigmoid(scores + self.bias(block.view.mask, scores.dtype, block.index)[..., None])

    def shortcut(self, view: View) -> Float[Tensor, "batch heads query value_dim"] | None:
        if tiled.refuses(view):
            return None
        view = view.but(sinks=None)
        kind = torch.promote_types(view.q.dtype, torch.float32)
        b = self.bias(view.mask, kind)
        if b.numel() and bool((b == b.flatten()[0]).all()):
            return tiled.attend(view, activation="sigmoid", shift=float(b.flatten()[0]))[0]
        if view.softcap is not None:
            return None
        # one more coordinate of queries and keys holds a bias that differs from row to row
        q, k, v = (t.to(kind) for t in (view.q, view.k, view.v))
        b = (b / view.scale).expand(*q.shape[:3])[..., None]
        wider = view.but(q=torch.cat([q, b], -1), k=torch.cat([k, torch.ones_like(k[..., :1])], -1), v=v)
        return tiled.attend(wider, activation="sigmoid")[0].to(view.q.dtype)
