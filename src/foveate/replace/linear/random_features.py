r"""Performer: softmax attention estimated by positive orthogonal random features.

o_i = \sum_j phi(q_i)^T phi(k_j) v_j / \sum_j phi(q_i)^T phi(k_j),
phi(x)_r = exp(w_r . x' - |x'|^2 / 2),   x' = x / d^(1/4),   so that E[phi(q)^T phi(k)] / m = exp(q . k / sqrt(d))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.card import Card, Needs
from foveate.core.params import bounded
from foveate.core.recurrence import Heads, Recurrence
from foveate.core.rule import Sizes
from foveate.replace.linear._random import Draw, orthogonal

__all__ = ["RandomFeatures"]


@dataclass(frozen=True)
class RandomFeatures(Recurrence):
    """An estimate of softmax attention that needs no training.

    Example:
        More features are nearer to softmax.

        >>> import torch, foveate
        >>> from foveate.replace import RandomFeatures
        >>> x, error = torch.randn(1, 50, 32), []
        >>> plain = foveate.nn.Attention(32, heads=4)
        >>> for features in (16, 4096):
        ...     rule = RandomFeatures(features)
        ...     made = foveate.nn.Attention(32, heads=4, rule=rule)
        ...     _ = made.load_state_dict(plain.state_dict(), strict=False)
        ...     error.append((made(x) - plain(x)).norm())
        >>> bool(error[1] < error[0] / 2)
        True

    Args:
        features: Random directions, m.
        seed: Which draw; each layer has its own part of it.
    """

    features: int = bounded(256, 1, 65536)
    seed: int = bounded(0, 0, 2**31 - 1)

    normalised: ClassVar[bool] = True

    card: ClassVar = Card(
        title="Rethinking Attention with Performers",
        year=2020,
        family="linear",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES,
        equation="o_i = sum_j phi(q_i).phi(k_j) v_j / sum_j phi(q_i).phi(k_j), phi(x)_r = exp(w_r.x' - |x'|^2 / 2)",
        differs="one draw for good: another one is another seed, where the authors' code draws again at each call; "
        "exponents of keys are lowered by a constant of the draw, not by the largest of all keys, which would look at "
        "later ones; nothing is added to features or to the sum of the weights",
        use="to estimate softmax attention without training where queries and keys are short, or to train from scratch",
        misleads="the error grows exponentially with the squared lengths of queries and keys, so that the estimate is "
        "useless for many loaded models; compare several seeds; keys longer than about 13 d^(1/4) vanish",
    )
    test_params: ClassVar = ({}, {"features": 13, "seed": 3})

    def learned(self, sizes: Sizes) -> nn.Module:
        return Draw(orthogonal(self.features, sizes.head_dim, self.seed + sizes.layer * 2**31))

    def queries(self, heads: Heads) -> Float[Tensor, "batch heads time key"]:
        assert isinstance(heads.learned, Draw)
        return heads.learned.queries(heads.q, heads.scale)[0]

    def keys(self, heads: Heads) -> Float[Tensor, "batch kv_heads time key"]:
        assert isinstance(heads.learned, Draw)
        return heads.learned.keys(heads.k, heads.scale)
