r"""DeltaNet: a write replaces what the state held under its key, and adds nothing else.

    S_t = S_{t-1} + b_t k_t (v_t - k_t^T S_{t-1})^T,    o_t = q_t^T S_t,    b_t = sigmoid(w_h . x_t)

where k and q have length 1, so that the state cannot grow without end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from foveate.core.card import Card, Needs
from foveate.core.rule import Sizes
from foveate.replace.linear._delta import DeltaWrites, Written

__all__ = ["Delta"]


@dataclass(frozen=True)
class Delta(DeltaWrites):
    r"""Delta writes of learned strength, nothing forgotten.

    S_t = S_{t-1} + b_t k_t (v_t - k_t^T S_{t-1})^T
    o_t = g * r_t / sqrt(mean(r_t^2) + 1e-5),    r_t = scale q_t^T S_t

    q, k and v go through a short causal convolution along the text and SiLU; q and k are then brought to length 1. g
    is learned, one number per channel of a value.

    Example:
        The second value under a key takes the place of the first one.

        >>> import torch, foveate
        >>> from foveate.replace import Delta
        >>> attention = foveate.nn.Attention(32, heads=4, kv_heads=2, rule=Delta())
        >>> attention(torch.randn(2, 10, 32)).shape
        torch.Size([2, 10, 32])
        >>> k = torch.eye(4)[[0, 1, 0]][None, None]
        >>> v = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 3, 1)
        >>> scan = foveate.core.states.Scan(k, k, v, beta=torch.ones(1, 1, 3))
        >>> foveate.core.states.run(scan)[1].flatten()
        tensor([3., 2., 0., 0.])

    Args:
        convolution: Tokens that the convolutions of q, k and v reach over, each its own one included; 0: none.
        max_strength: Largest strength of a write. Above 1, a write can turn what its key held to its negative.
    """

    card: ClassVar = Card(
        title="Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
        year=2024,
        family="linear",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES | Needs.TRAINING,
        equation="S_t = S_{t-1} + b_t k_t (v_t - k_t^T S_{t-1})^T; o_t = rmsnorm(q_t^T S_t); |k_t| = |q_t| = 1",
        differs=(
            "q, k and v are those of the layer, with its rotary positions where it has them (the paper has none); the "
            "convolutions begin as the identity; query heads of a group share the state and strength of their "
            "key-value head"
        ),
        use="for recall in a state of fixed size: a key's value is replaced by the new one and not added to",
        misleads="it forgets nothing by itself, and a head holds about as many keys apart as keys are wide; in a "
        "loaded model it reads nothing before training",
    )
    test_params: ClassVar = ({}, {"convolution": 0, "max_strength": 2.0})

    def learned(self, sizes: Sizes) -> nn.Module:
        return Written(self.convolution, sizes)
