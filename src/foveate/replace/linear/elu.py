r"""Linear attention with features elu + 1: the baseline that the others are measured against.

o_i = \sum_j phi(q_i)^T phi(k_j) v_j / \sum_j phi(q_i)^T phi(k_j),    phi(x) = elu(x) + 1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import elu

from foveate.core.card import Card, Needs
from foveate.core.recurrence import Heads, Recurrence

__all__ = ["Elu"]


@dataclass(frozen=True)
class Elu(Recurrence):
    """Linear attention whose features are elu + 1.

    Example:
        A state in the place of a cache that grows.

        >>> import torch, foveate
        >>> from transformers import DynamicCache
        >>> from foveate.replace import Elu
        >>> attention = foveate.nn.Attention(32, heads=4, rule=Elu())
        >>> held = []
        >>> for length in (10, 1000):
        ...     cache = DynamicCache()
        ...     _ = attention(torch.randn(1, length, 32), cache=cache)
        ...     held.append(cache.layers[0].bytes_held())
        >>> held
        [1152, 1152]
    """

    normalised: ClassVar[bool] = True

    card: ClassVar = Card(
        title="Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
        year=2020,
        family="linear",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES,
        equation="o_i = sum_j phi(q_i).phi(k_j) v_j / sum_j phi(q_i).phi(k_j), phi(x) = elu(x) + 1",
        differs="nothing is added to the sum of the weights, which is above 0 (the authors' code adds 1e-6)",
        use="as the baseline of linear attention: no parameters, time linear in the length, a state of fixed size",
        misleads="its weights are nearly flat: a loaded model needs training before it reads anything under them, and "
        "recall stays behind softmax attention",
    )

    def queries(self, heads: Heads) -> Float[Tensor, "batch heads time key"]:
        return elu(heads.q) + 1

    def keys(self, heads: Heads) -> Float[Tensor, "batch kv_heads time key"]:
        return elu(heads.k) + 1
