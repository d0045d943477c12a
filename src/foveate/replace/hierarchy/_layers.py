"""What hierarchies of layers are built of: attention and a feed-forward part, each behind a norm."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.mask import Mask
from foveate.core.rows import View, attend
from foveate.core.rule import Sizes
from foveate.nn import Attention, rotated
from foveate.replace._groups import Groups, State

__all__ = ["EPS", "Exchange", "Stack"]

# as wide as all models of the papers
WIDER = 4
EPS = 1e-6


def attended(
    attention: Attention,
    q: Float[Tensor, "batch heads query head_dim"],
    k: Float[Tensor, "batch kv_heads key head_dim"],
    v: Float[Tensor, "batch kv_heads key head_dim"],
    mask: Mask,
) -> Float[Tensor, "batch query width"]:
    """The output of an attention module for these queries, keys and values."""
    return attention.o_proj(attend(View(q, k, v, mask)).out.transpose(1, 2).flatten(2))


class Exchange(nn.Module):
    """x + attention(norm(x), norm(other)): what rows take from other ones.

    Args:
        sizes: Sizes of the attention.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.width
        self.norm, self.other_norm = nn.LayerNorm(width, EPS), nn.LayerNorm(width, EPS)
        self.attention = Attention(
            width, sizes.heads, sizes.kv_heads, head_dim=sizes.head_dim, context_dim=width, causal=False
        )

    def forward(
        self, x: Float[Tensor, "batch query width"], other: Float[Tensor, "batch key width"], mask: Mask
    ) -> Float[Tensor, "batch query width"]:
        a, context = self.attention, self.other_norm(other)
        q, k, v = a.q_proj(self.norm(x)), a.k_proj(context), a.v_proj(context)
        return x + attended(a, a.heads_of(q), a.heads_of(k), a.heads_of(v), mask)


class Layer(nn.Module):
    """y = x + attention(norm(x)), y + feed_forward(norm(y)).

    Args:
        sizes: Sizes of the attention.
        rope: Base of the rotary positions; None: no positions.
    """

    def __init__(self, sizes: Sizes, rope: float | None = None) -> None:
        super().__init__()
        width = sizes.width
        self.norm, self.feed_norm = nn.LayerNorm(width, EPS), nn.LayerNorm(width, EPS)
        self.attention = Attention(width, sizes.heads, sizes.kv_heads, rope=rope, head_dim=sizes.head_dim)
        self.feed = nn.Sequential(nn.Linear(width, WIDER * width), nn.GELU(), nn.Linear(WIDER * width, width))

    def projected(self, x: Float[Tensor, "batch query width"], place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of rows at these places."""
        a, h = self.attention, self.norm(x)
        q, k, v = (a.heads_of(project(h)) for project in (a.q_proj, a.k_proj, a.v_proj))
        return (q, k, v) if a.rope is None else (rotated(q, place, a.rope), rotated(k, place, a.rope), v)

    def forward(self, x: Float[Tensor, "batch query width"], mask: Mask) -> Float[Tensor, "batch query width"]:
        """Rows that see each other as the mask says."""
        q, k, v = self.projected(x, torch.arange(x.shape[1], device=x.device)[None])
        y = x + attended(self.attention, q, k, v, mask)
        return y + self.feed(self.feed_norm(y))

    def across(
        self,
        x: Float[Tensor, "batch groups few width"],
        groups: Groups,
        before: list[Tensor],
        causal: bool,
    ) -> tuple[Float[Tensor, "batch groups few width"], list[Tensor]]:
        """A few rows per group that see those of all groups, or of their own and earlier ones; places are groups.

        Args:
            x: The rows.
            groups: The groups that they belong to.
            before: Keys and values of earlier calls' groups, [batch, groups, few, kv_heads, head_dim]; empty: none.
            causal: Whether no row sees one of a later group.

        Returns:
            The rows, and keys and values for later calls.
        """
        number, few = x.shape[1:3]
        q, k, v = self.projected(x.flatten(1, 2), groups.number.repeat_interleave(few, 1))
        pair = [t.transpose(1, 2).unflatten(1, (number, few)) for t in (k, v)]
        if before:
            pair = [groups.joined(old, new) for old, new in zip(before, pair, strict=True)]
        k, v = (t.flatten(1, 2).transpose(1, 2) for t in pair)
        # groups without a token stand behind those of the text
        high = groups.number + 1 if causal else groups.real.any(2).sum(1, keepdim=True).expand(-1, number)
        high = (high * few).repeat_interleave(few, 1).to(torch.int32)
        mask = Mask(torch.zeros_like(high), high, k.shape[2], False, torch.arange(number * few, device=x.device))
        y = x + attended(self.attention, q, k, v, mask).unflatten(1, (number, few))
        return y + self.feed(self.feed_norm(y)), [groups.kept(t) for t in pair]


class Stack(nn.Module):
    """Layers one after the other.

    Args:
        layers: How many.
        sizes: Sizes of each.
        rope: Base of the rotary positions; None: no positions.
    """

    def __init__(self, layers: int, sizes: Sizes, rope: float | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(sizes, rope) for _ in range(layers))

    def forward(self, x: Float[Tensor, "batch query width"], mask: Mask) -> Float[Tensor, "batch query width"]:
        """Rows that see each other as the mask says."""
        for layer in self.layers:
            x = layer(x, mask)
        return x

    def across(
        self, x: Float[Tensor, "batch groups few width"], groups: Groups, before: State, causal: bool
    ) -> tuple[Float[Tensor, "batch groups few width"], State]:
        """As `Layer.across`; a state has the keys and values of all layers, which stand behind the batch."""
        pairs = []
        for n, layer in enumerate(self.layers):
            x, pair = layer.across(x, groups, [t[:, n] for t in before.values()], causal)
            pairs.append(pair)
        return x, {name: torch.stack(parts, 1) for name, *parts in zip(("keys", "values"), *pairs, strict=True)}
