r"""Agent attention: a few agents gather what the keys have, and the queries ask the agents.

    A = means of stretches of the queries,    V_A = softmax_j(s A K^T) V,    O = softmax_m(d^-p Q A^T) V_A + conv(V)

Two softmax attentions of n x m weights in the place of one of n x n. As linear attention, its features are the columns
of the first and the rows of the second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.card import Card, Needs
from foveate.core.params import bounded
from foveate.core.recurrence import Heads, Recurrence
from foveate.core.rule import Sizes
from foveate.core.states import Scan, exact
from foveate.replace.linear._landmarks import check_whole, landmarks
from foveate.replace.linear._local import Local

__all__ = ["Agent"]


@dataclass(frozen=True)
class Agent(Recurrence):
    """Softmax attention through a few agents, in time linear in the length.

    `local=0, exponent=0.15, shortcut=0.075` are the authors' settings for a loaded model that is not trained.

    Example:
        An encoder through 16 agents.

        >>> import torch, foveate
        >>> from foveate.replace import Agent
        >>> rule = Agent(agents=16)
        >>> layer = foveate.nn.Attention(32, heads=4, rule=rule, causal=False)
        >>> layer(torch.randn(1, 300, 32)).shape
        torch.Size([1, 300, 32])

    Args:
        agents: How many; a text of fewer tokens has as many as tokens.
        local: Tokens under the window of the convolution; an even number is one more, and 0 none.
        exponent: p, which makes the second softmax sharper where it is below 0.5.
        shortcut: Share of a token's own value that is added.
    """

    agents: int = bounded(49, 1, 4096, grid=(16, 49, 144))
    local: int = bounded(3, 0, 63)
    exponent: float = bounded(0.5, 0.0, 1.0)
    shortcut: float = bounded(0.0, 0.0, 1.0)

    causal: ClassVar[bool] = False

    card: ClassVar[Card] = Card(
        title="Agent Attention: On the Integration of Softmax and Linear Attention",
        year=2024,
        family="linear",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES,
        equation="o_i = sum_m softmax_m(d^-p q_i . a_m) sum_j softmax_j(s a_m . k_j) v_j + conv(v)_i, a = pooled q",
        differs="Stretches and windows lie along the text; the paper's lie on the grid of an image, whose biases by "
        "place are left out. A text with fewer tokens than agents has fewer agents, none of them twice. They are means "
        "of queries as the layer has them, rotary positions included.",
        use="In encoders of long texts and images, and (p = 0.15, a shortcut, no convolution) without training.",
        misleads="Two softmaxes are not the softmax of the product: all rows are mixtures of as many patterns as there "
        "are agents. No causal form, for agents stand for the whole text.",
        claims=("agents_match",),
    )
    test_params: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"agents": 4, "local": 5},
        {"agents": 4, "local": 0, "exponent": 0.15, "shortcut": 0.075},
    )

    def learned(self, sizes: Sizes) -> nn.Module | None:
        return Local((sizes.heads, sizes.value_dim), self.local | 1) if self.local else None

    def scan(self, heads: Heads, first: bool = True) -> Scan:
        tokens, wide = heads.tokens, exact(heads.q)
        check_whole("Agent", tokens, first)
        q, k = heads.q.to(wide), heads.every_head(heads.k).to(wide)
        a, there = landmarks(q, tokens, self.agents)
        lowest = torch.finfo(wide).min
        asked = (q.shape[3] ** -self.exponent * q @ a.mT).masked_fill(~there[:, None, None], lowest).softmax(-1)
        gathered = (heads.scale * k @ a.mT).masked_fill(~tokens.real[:, None, :, None], lowest).softmax(2)
        return Scan(asked, gathered, heads.every_head(heads.v).to(wide), real=tokens.real, causal=False)

    def finish(
        self, heads: Heads, out: Float[Tensor, "batch heads time value_dim"]
    ) -> Float[Tensor, "batch heads time value_dim"]:
        v = heads.every_head(heads.v)
        if heads.learned is not None:
            out = out + heads.learned(v, heads.tokens)
        return out + self.shortcut * v
