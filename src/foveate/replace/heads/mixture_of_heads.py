r"""Mixture of heads: a token chooses among its heads, as it would among experts.

Multi-head attention is a sum over heads, out = \sum_i W_o^i out_i. Here each token gives each head a weight of its
own in that sum, and to some of them none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.card import Card, Needs
from foveate.core.errors import BadParameter
from foveate.core.params import bounded, check_bounds, choice
from foveate.core.rows import Rows, View
from foveate.core.rule import Rule, Sizes

__all__ = ["MixtureOfHeads"]

# under the root of a variance
EPS = 1e-12


class Routers(nn.Module):
    """What says how much a token needs each head: projections of the layer's input, without a bias.

    Args:
        width: Width of the layer's input.
        shared: Heads that always count.
        routed: The other heads.
    """

    def __init__(self, width: int, shared: int, routed: int) -> None:
        super().__init__()
        self.shared = nn.Linear(width, shared, bias=False) if shared > 1 else None
        self.routed = nn.Linear(width, routed, bias=False) if routed else None
        self.kind = nn.Linear(width, 2, bias=False) if shared and routed else None
        for weight in self.parameters():
            nn.init.trunc_normal_(weight, std=0.02)


@dataclass(frozen=True)
class MixtureOfHeads(Rule):
    r"""Head outputs weighed token by token: shared heads always count, of the others the K that a token needs most.

    The first h_s = shared h query heads are shared; of the other h_r = h - h_s the largest K = active h - h_s count.

        out_i <- g_i out_i

        router="learned"    a = softmax(W_s x),  b = softmax(W_r x),  [c_1, c_2] = softmax(W_h x)
                            g_i = 2 c_1 h_s a_i                     shared
                            g_i = 2 c_2 K b_i / \sum_top b          routed, among the K largest; else 0
        router="norm"       b = softmax(n / std(n)),  n_i = ||q_i||_2
                            g_i = 1                                 shared, or among the K largest; else 0

        loss = balance \sum_i P_i f_i       over routed heads: P_i = mean of b_i, f_i = share of tokens that chose i

    The router by norm has no parameters and leaves the heads that count as they were: it is for models that were
    trained without. In training the gradient of its g_i goes to b_i as it comes (straight through).

    Args:
        active: Share of the heads that count for a token, shared and routed together; with routed heads at least one.
        shared: Share of the heads that always count.
        router: "learned" from the layer's input, or "norm" of the queries.
        balance: Weight of the loss that keeps tokens from all choosing the same heads, in each layer.

    Example:
        A model that was trained without goes on with three of its four heads, and must be tuned to it. With all of them
        it is what it was.

        >>> import torch, foveate
        >>> from foveate.replace import MixtureOfHeads
        >>> from foveate.testing import tiny
        >>> model, inputs = tiny.model("llama"), tiny.inputs("llama")
        >>> before = model(**inputs).logits
        >>> every = MixtureOfHeads(active=1.0, router="norm")
        >>> model = foveate.convert(model, every)
        >>> bool(torch.allclose(model(**inputs).logits, before, atol=1e-5))
        True
        >>> model = foveate.convert(model, MixtureOfHeads(router="norm")).train()
        >>> loss = model(**inputs, labels=inputs["input_ids"]).loss
        >>> (loss + foveate.nn.auxiliary_loss(model)).backward()
    """

    active: float = bounded(0.75, 0.01, 1.0, grid=(0.5, 0.75, 0.9))
    shared: float = bounded(0.5, 0.0, 1.0)
    router: str = choice("learned", "learned", "norm")
    balance: float = bounded(0.01, 0.0, 10.0)

    card: ClassVar[Card] = Card(
        title="MoH: Multi-Head Attention as Mixture-of-Head Attention",
        year=2024,
        family="heads",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES | Needs.TRAINING,
        equation="out_i <- g_i(x) out_i, g_i = 0 for all but the shared and the K largest routed heads",
        differs="the weights g follow the authors' code, which scales equations 5 and 6 so that equal scores give "
        "1; the balance loss is equation 7, summed over the layers, where the code averages layers and multiplies "
        "by the number of routed heads. Norms are divided by their deviation as in the code for Llama, whose mask "
        "fits only where half of the heads are shared; its queries are taken after rotation, which keeps their "
        "norm. Heads that do not count are computed and set to zero, so no time is saved. Padding has no part in "
        "the loss",
        use="Train a model whose tokens use some of their heads, or tune a loaded one to it (router='norm').",
        misleads="queries that the model has normalised (Qwen 3, OLMo 2) have nearly the same norm in every head; "
        "of two routed heads, divided by their deviation, the longer always has the same score, which then has no "
        "gradient",
        claims=("mixture_of_heads",),
    )
    identity: ClassVar[dict[str, Any] | None] = {"router": "norm", "active": 1.0}
    test_params: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"router": "norm"},
        {"shared": 0.0, "active": 0.5},
        {"shared": 0.25, "active": 1.0},
        {"shared": 1.0, "active": 1.0},
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.active < self.shared:
            raise BadParameter(
                f"MixtureOfHeads(active={self.active}, shared={self.shared}): shared heads count always, so active "
                "must be no less than shared"
            )

    def counts(self, heads: int) -> tuple[int, int]:
        """Shared heads, and how many of the routed ones a token keeps."""
        shared = math.floor(self.shared * heads + 0.5)
        kept = max(1, math.floor(self.active * heads + 0.5) - shared)
        return shared, min(kept, heads - shared)

    def learned(self, sizes: Sizes) -> nn.Module | None:
        shared = self.counts(sizes.heads)[0]
        return None if self.router == "norm" else Routers(sizes.width, shared, sizes.heads - shared)

    def finish(
        self, view: View, out: Float[Tensor, "batch heads query value_dim"]
    ) -> Float[Tensor, "batch heads query value_dim"]:
        return (out * self.gates(view).transpose(1, 2)[..., None]).to(out.dtype)

    def gates(self, view: View) -> Float[Tensor, "batch query heads"]:
        """The weight of each head for each token, g_i."""
        shared, kept = self.counts(view.heads)
        if self.router == "norm":
            b = self.needed(view)
            g = chosen(b, kept).to(b.dtype)
            if view.training:
                g = g + b - b.detach()
            return torch.cat([g.new_ones(*g.shape[:2], shared), g], -1)
        x, routers = inputs(view), view.learned
        assert isinstance(routers, Routers)
        a = x.new_ones(*x.shape[:2], shared) if routers.shared is None else shared * scores(routers.shared, x)
        if routers.routed is None:
            return a
        b = self.needed(view)
        b = b * chosen(b, kept)
        b = kept * b / b.sum(-1, keepdim=True)
        if routers.kind is None:
            return b
        c = 2 * scores(routers.kind, x)
        return torch.cat([c[..., :1] * a, c[..., 1:] * b], -1)

    def needed(self, view: View) -> Float[Tensor, "batch query routed"]:
        """How much each token needs each routed head, b_i."""
        if self.router == "norm":
            shared = self.counts(view.heads)[0]
            n = wide(view.q[:, shared:]).norm(dim=-1).transpose(1, 2)
            n = torch.where(view.mask.rows[..., None], n, 1.0)
            if n.shape[-1] > 1:
                n = n * torch.rsqrt(n.var(-1, keepdim=True) + EPS)
            return torch.softmax(n, -1)
        assert isinstance(view.learned, Routers)
        assert view.learned.routed is not None
        return scores(view.learned.routed, inputs(view))

    def loss(self, rows: Rows) -> Float[Tensor, ""]:
        view = rows.view
        shared, kept = self.counts(view.heads)
        if shared == view.heads:
            return wide(view.q).new_zeros(())
        b = self.needed(view)
        real = view.mask.rows.expand(view.batch, -1)
        counted = b[real], chosen(b, kept)[real].to(b.dtype)
        tokens = max(1, len(counted[0]))
        p, f = (x.sum(0) / tokens for x in counted)
        return self.balance * (p * f).sum()


def chosen(b: Float[Tensor, "batch query routed"], kept: int) -> Float[Tensor, "batch query routed"]:
    """One for the largest of each token, zero for the others."""
    return torch.zeros_like(b).scatter(-1, b.topk(kept, -1).indices, 1.0)


def inputs(view: View) -> Float[Tensor, "batch query width"]:
    """The layer's input, with nothing at padding, where anything may stand."""
    assert view.hidden is not None
    return torch.where(view.mask.rows[..., None], wide(view.hidden), 0.0)


def scores(router: nn.Linear, x: Float[Tensor, "batch query width"]) -> Float[Tensor, "batch query heads"]:
    """Softmax over a router's heads, in float32: half precision would make heads equal that are not."""
    return torch.softmax(nn.functional.linear(x, router.weight.to(x.dtype)), -1)


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x if x.dtype == torch.float64 else x.float()
