r"""Tiled attention: exact attention that walks over tiles of scores and keeps none of them.

    m' = max(m, max_j s_j),   l' = e^{m - m'} l + \sum_j e^{s_j - m'},   o' = e^{m - m'} o + \sum_j e^{s_j - m'} v_j

What a row has summed over the keys so far is rescaled when a larger score comes by, so that the weights of a row never
stand in memory together: out = o / l, lse = m + ln l. The backward pass makes them again from lse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from foveate.core import tiled
from foveate.core.card import Card, Needs
from foveate.core.mechanism import Schedule
from foveate.core.rows import View
from foveate.core.traffic import Shape, Traffic
from foveate.core.traffic import tiled as moved

__all__ = ["Tiled"]


@dataclass(frozen=True)
class Tiled(Schedule):
    """Attention by tiles, forward and backward, in memory that grows with N and not with N².

    Example:
        The model gives what it gave, by tiles.

        >>> import torch, foveate
        >>> from foveate.compress import Tiled
        >>> from foveate.testing import handmade
        >>> model, ids = handmade.model(), handmade.ids("abcabcab")
        >>> plain = model(ids).logits
        >>> with foveate.attach(model, Tiled()):
        ...     torch.allclose(model(ids).logits, plain, atol=1e-5)
        True
    """

    card: ClassVar = Card(
        title="FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness",
        year=2022,
        family="exact",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES,
        equation="o' = e^(m - m') o + sum_j e^(s_j - m') v_j; out = o / l, lse = m + ln l",
        differs="tiles stand in the caches of a CPU, and rows are divided by their sum once, at the end, as "
        "FlashAttention-2 does; block-sparse attention is any Pattern: what it does not visit is never computed",
        use="where attention is trained or run on a CPU over long texts, and memory must not grow with their square",
        misleads="it is exact: what it gives says nothing that plain attention does not say",
        claims=("tiled_attention",),
    )
    test_params: ClassVar = ({},)

    def refuses(self, view: View) -> str:
        return tiled.refuses(view)

    def run(
        self, view: View
    ) -> tuple[Float[Tensor, "batch heads query value_dim"], Float[Tensor, "batch heads query"]]:
        return tiled.attend(view)

    def traffic(self, shape: Shape, fast: int) -> Traffic:
        return moved(shape, fast)
