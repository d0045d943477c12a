r"""p-Laplacian adapter: attention weights re-normalised by how different what they connect is.

Attention is a graph: queries and values are its nodes, the weights its edges. Where the features at the two ends of an
edge differ a lot, plain averaging smooths away what matters; the power p says how much such edges count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.card import Card, Needs
from foveate.core.params import bounded
from foveate.core.rows import View, attend
from foveate.core.rule import Rule, Sizes
from foveate.replace.training._calibrated import Calibrated

__all__ = ["PLaplacian"]


class Adapter(nn.Module):
    """The projections of one adapter, its power and what a row's own features weigh.

    Args:
        sizes: Sizes of the layer.
        features: Features of a node in each head.
        p: Where the power begins.
    """

    def __init__(self, sizes: Sizes, features: int, p: float) -> None:
        super().__init__()
        inner, narrow = sizes.heads * sizes.value_dim, sizes.heads * features
        self.query_nodes = nn.Linear(sizes.width, narrow)
        self.value_nodes = nn.Linear(inner, narrow)
        self.gate = nn.Linear(inner, narrow)
        self.up = nn.Linear(narrow, inner)
        # at first it adds nothing
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.p = nn.Parameter(torch.tensor(float(p)))
        self.mu = nn.Parameter(torch.zeros(()))


@dataclass(frozen=True)
class PLaplacian(Rule):
    r"""An adapter behind attention that passes messages between features of queries and of values.

        r_i = W_x x_i,  f_j = W_v v_j                                features, in each head its own
        A'_ij = p_ij (sqrt(p_ij) ||r_i - f_j||)^(p - 2)              re-normalised weights, p_ij those of softmax
        F_i = (\sum_j A'_ij f_j + c r_i) / (\sum_j A'_ij + c)        c = 2 mu (2 + tanh m) / p
        out_i <- out_i + W_up (gelu(W_gate out_i) * F_i)             all heads of a row together

    p = 2 leaves the weights as they are; below it edges between what is alike count more, above it those between what
    differs. p and m are learned.

    Args:
        reduction: By how much a node's features are narrower than a head's value.
        p: Where the power begins; it is kept at 1 or more.
        mu: Weight of a row's own features.

    Example:
        With the model frozen it is trained as any adapter, and begins by adding nothing.

        >>> import torch, foveate
        >>> from foveate.replace import PLaplacian
        >>> from foveate.testing import tiny
        >>> model, inputs = tiny.model("llama"), tiny.inputs("llama")
        >>> before = model(**inputs).logits
        >>> model = foveate.convert(model.requires_grad_(False), PLaplacian())
        >>> bool(torch.allclose(model(**inputs).logits, before, atol=1e-5))
        True
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        1116
    """

    reduction: int = bounded(8, 1, 256, grid=(2, 4, 8, 16))
    p: float = bounded(1.25, 1.0, 10.0, grid=(1.25, 1.5, 2.0, 2.5))
    mu: float = bounded(0.1, 0.0, 10.0)

    card: ClassVar[Card] = Card(
        title="p-Laplacian Adaptation for Generative Pre-trained Vision-Language Models",
        year=2023,
        family="training",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES,
        equation="A'_ij = p_ij (sqrt(p_ij) ||W_x x_i - W_v v_j||)^(p - 2), F_i = its mean of W_v v_j",
        differs="it stands before the output projection, where the authors' code stands behind it: the same "
        "function up to a change of basis where that projection can be inverted. A row's node is projected from the "
        "layer's input, of which its query is a projection, so that rotary positions, which the paper's models have "
        "not, are not in it; the code takes one projection for queries and values, and in encoders the row's own "
        "value. It begins as nothing (W_up = 0), the code with PyTorch's start. Squares below 1e-8 count as 1e-8, "
        "where the code adds a floor. Each row sees the keys that attention sees; the code pools those of images to "
        "16",
        use="Adapt a frozen model, of vision and language above all, with few parameters.",
        misleads="the re-normalised weights need whole rows, so a layer costs a second attention without a fused "
        "kernel, and a decoded token projects the values of all keys anew",
    )
    identity: ClassVar[dict[str, Any] | None] = {}
    test_params: ClassVar[tuple[dict[str, Any], ...]] = ({"reduction": 2}, {}, {"reduction": 4, "p": 3.0, "mu": 0.0})

    def learned(self, sizes: Sizes) -> nn.Module:
        return Adapter(sizes, max(1, sizes.value_dim // self.reduction), self.p)

    def finish(
        self, view: View, out: Float[Tensor, "batch heads query value_dim"]
    ) -> Float[Tensor, "batch heads query value_dim"]:
        adapter = view.learned
        assert isinstance(adapter, Adapter)
        # powers below zero of small differences: float32 inside, whatever the model's precision
        dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
        sees = view.mask.rows[:, None, :, None]
        assert view.hidden is not None
        x = torch.where(view.mask.rows[..., None], view.hidden.to(dtype), 0.0)
        r = split(projected(adapter.query_nodes, x), view.heads)
        q, k = view.q.to(dtype), view.k.to(dtype).repeat_interleave(view.grouped, 1)
        # behind padding anything may stand
        v = view.v.to(dtype).nan_to_num(0.0, 0.0, 0.0).repeat_interleave(view.grouped, 1)
        f = split(projected(adapter.value_nodes, joined(v)), view.heads)
        p = adapter.p.to(dtype).clamp_min(1.0)
        c = 2 * self.mu * (2 + torch.tanh(adapter.mu.to(dtype))) / p
        # a column of ones gives the sum of each row's weights
        f = torch.cat([f, torch.ones_like(f[..., :1])], -1)
        sums = attend(view.but(q=q, k=k, v=f, rule=Calibrated(r, p), learned=None, dropout=0.0)).out
        mean = (sums[..., :-1] + c * r) / (sums[..., -1:] + c).clamp_min(torch.finfo(dtype).tiny)
        gate = nn.functional.gelu(projected(adapter.gate, joined(out.to(dtype))))
        added = split(projected(adapter.up, gate * joined(mean)), view.heads)
        return torch.where(sees, out + added, out).to(out.dtype)


def joined(x: Float[Tensor, "batch heads length dim"]) -> Float[Tensor, "batch length inner"]:
    """All heads of a row beside each other."""
    return x.transpose(1, 2).flatten(2)


def split(x: Float[Tensor, "batch length inner"], heads: int) -> Float[Tensor, "batch heads length dim"]:
    """The heads of a row again."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def projected(linear: nn.Linear, x: Float[Tensor, "batch length inner"]) -> Float[Tensor, "batch length outer"]:
    """A projection in the precision of what goes in."""
    return nn.functional.linear(x, linear.weight.to(x.dtype), linear.bias.to(x.dtype))
