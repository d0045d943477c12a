r"""ReLU attention: no sum over the row stands behind the weights, so no key must take what nobody wants.

    p_ij = max(0, s_ij) / n_i^alpha

n_i is the number of keys that row i may see. Division by it keeps the size of the output at any length, as the sum of
softmax does, and lets each weight be what it is whatever the others are: a row that agrees with nothing gives zero, and
has no use for a sink.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core import tiled
from foveate.core.card import Card, Needs
from foveate.core.params import bounded
from foveate.core.rows import RowBlock, View
from foveate.core.rule import Rule
from foveate.replace.normalisers._counts import keys_seen

__all__ = ["Relu"]


@dataclass(frozen=True)
class Relu(Rule):
    """ReLU in the place of softmax, divided by the number of keys that the row may see.

    Args:
        alpha: Power of the number of keys by which weights are divided; 0 leaves them as they are.

    Example:
        The second token agrees with itself alone, and the third too; the first has no weight for them.

        >>> import torch, foveate
        >>> from foveate.replace import Relu
        >>> attention = foveate.nn.Attention(4, heads=1, rule=Relu())
        >>> for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        ...     _ = torch.nn.init.eye_(getattr(attention, name).weight)
        >>> x = torch.tensor([[[2.0, 0, 0, 0], [0, 1, 0, 0], [-1, 0, 2, 0]]])
        >>> attention(x)[0].detach()
        tensor([[ 4.0000,  0.0000,  0.0000,  0.0000],
                [ 0.0000,  0.2500,  0.0000,  0.0000],
                [-0.8333,  0.0000,  1.6667,  0.0000]])
    """

    alpha: float = bounded(1.0, 0.0, 2.0, grid=(0.5, 1.0))

    card: ClassVar = Card(
        title="Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs",
        year=2024,
        family="normalisers",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES,
        equation="p_ij = max(0, s_ij) / n_i^alpha",
        differs="nothing known at alpha = 1: the paper's causal model divides row i by i. The power is of Replacing "
        "softmax with ReLU in Vision Transformers (arXiv 2309.08586), which divides by the length of the sequence. "
        "Learned sinks of a model have no part in it, for nothing is normalised",
        use="to train a small model without attention sinks",
        misleads="a loaded model is not as it was: softmax compares scores, and gives weight to those below zero too",
        claims=("sinks_emerge",),
    )
    test_params: ClassVar = ({}, {"alpha": 0.5})

    def normalise(
        self, block: RowBlock, scores: Float[Tensor, "batch heads rows keys"]
    ) -> Float[Tensor, "batch heads rows keys"]:
        return scores.relu() * self.share(block.view, block.index).to(scores.dtype)

    def shortcut(self, view: View) -> Float[Tensor, "batch heads query value_dim"] | None:
        if tiled.refuses(view):
            return None
        out, _ = tiled.attend(view.but(sinks=None), activation="relu")
        return out * self.share(view).to(out.dtype)

    def share(self, view: View, index: Int[Tensor, " rows"] | None = None) -> Float[Tensor, "#batch #heads rows 1"]:
        """1 / n_i^alpha of the rows."""
        kind = torch.promote_types(view.q.dtype, torch.float32)
        return keys_seen(view.mask, index)[..., None].clamp_min(1).to(kind) ** -self.alpha
