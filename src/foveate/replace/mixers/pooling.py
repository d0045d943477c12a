r"""Pooling networks: one mean query for the whole text, maxima of segments and of neighbours, and their fusion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.card import Card, Needs
from foveate.core.errors import NotSupported
from foveate.core.mask import Mask
from foveate.core.mixer import Mixer, Tokens
from foveate.core.params import bounded
from foveate.core.rows import View, attend
from foveate.core.rule import Sizes
from foveate.replace._groups import Groups, State

__all__ = ["Pooling"]


@dataclass(frozen=True)
class Pooling(Mixer):
    r"""Global, segment and local pooling of the text, fused with each token.

        g = mean_n q_n,    g' = \sum_n softmax_n(g . k_n / sqrt(d)) k_n       per head: global aggregation
        S_n = max of s_m over the segment of n,    L_n = max(l_{n-1}, l_n, l_{n+1})       per channel
        out_n = W_o ((g' + S_n) * o_n + L_n)

    where q, k, o, s, l are projections of x. Segments have a fixed length in tokens. In causal order, token n gets what
    it would get as the last token of a text that ends with it: means, sums and maxima over what has been, the segment
    and the neighbourhood cut off behind it. The means then differ from token to token, so that this form costs N² time
    and a cache of keys; where all see all, time is linear in N.

    Example:
        An encoder whose time is linear in the length.

        >>> import torch, foveate
        >>> from foveate.replace import Pooling
        >>> rule = Pooling(segment=8)
        >>> encoder = foveate.nn.Attention(32, heads=4, rule=rule, causal=False)
        >>> encoder(torch.randn(2, 20, 32)).shape
        torch.Size([2, 20, 32])

    Args:
        segment: Tokens per segment, counted from the first token of a text.
    """

    segment: int = bounded(32, 1, 65536)

    card: ClassVar[Card] = Card(
        title="PoNet: Pooling Network for Efficient Token Mixing in Long Sequences",
        year=2022,
        family="mixers",
        needs=Needs.TRAINING,
        equation="out_n = W_o ((g' + S_n) * o_n + L_n)",
        differs=(
            "Segments are of a fixed length; the authors' code cuts at sentence marks, or into a fixed number. The "
            "causal form is ours: theirs has none. As in their code, keys are the values of the global aggregation."
        ),
        use="Mix the tokens of long texts in an encoder in time linear in their number.",
        misleads="Its causal form is ours and takes N² time: only where all tokens see all is it linear.",
    )
    test_params: ClassVar = ({"segment": 4}, {"segment": 7}, {})

    def module(self, sizes: Sizes) -> nn.Module:
        return Pooled(self.segment, sizes)


class Pooled(nn.Module):
    """The projections of a pooling network in one layer.

    Args:
        segment: Tokens per segment.
        sizes: Sizes of the layer.
    """

    def __init__(self, segment: int, sizes: Sizes) -> None:
        super().__init__()
        self.segment, self.heads = segment, sizes.heads
        width, inner = sizes.width, sizes.heads * sizes.head_dim
        self.q_proj, self.k_proj, self.gate_proj, self.segment_proj, self.local_proj = (
            nn.Linear(width, inner) for _ in range(5)
        )
        self.o_proj = nn.Linear(inner, width)
        for layer in (self.q_proj, self.k_proj, self.gate_proj, self.segment_proj, self.local_proj, self.o_proj):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tokens, state: State | None) -> tuple[Float[Tensor, "batch query width"], State]:
        if state is not None and not tokens.causal:
            raise NotSupported("pooling over all tokens needs them all at once; call it without a cache")
        before, after = state or {}, dict[str, Tensor]()
        pooled = self.of_text(tokens, before, after) + self.of_segments(tokens, before, after)
        fused = pooled * self.gate_proj(tokens.x) + self.of_neighbours(tokens, before, after)
        return self.o_proj(fused), after

    def of_text(self, tokens: Tokens, before: State, after: State) -> Float[Tensor, "batch query inner"]:
        """The global aggregation g' for each token."""
        x, real = tokens.x, tokens.real
        exact = torch.promote_types(x.dtype, torch.float32)
        q = torch.where(real[..., None], self.q_proj(x).to(exact), 0.0)
        if tokens.causal:
            total = q.cumsum(1) + (before["queries"][:, None] if before else 0.0)
            g = total / (tokens.place + 1).clamp_min(1)[..., None]
            # a copy, here and below: a slice would keep the rows of all tokens in memory
            after["queries"] = total[:, -1].clone()
        else:
            g = q.sum(1, keepdim=True) / real.sum(1)[:, None, None].clamp_min(1)
        k = self.k_proj(x)
        if before:
            k, real = torch.cat([before["keys"], k], 1), torch.cat([before["real"], real], 1)
        if tokens.causal:
            after |= {"keys": k, "real": real}
        q, k = (t.to(x.dtype).unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (g, k))
        mask = Mask.of_padding(real, q.shape[2], k.shape[2], causal=tokens.causal, device=x.device)
        out = attend(View(q, k, k, mask)).out.transpose(1, 2).flatten(2)
        return out.expand(-1, x.shape[1], -1)

    def of_segments(self, tokens: Tokens, before: State, after: State) -> Float[Tensor, "batch query inner"]:
        """S_n for each token; zero at padding."""
        s = self.segment_proj(tokens.x)
        # the maximum so far stands for what earlier calls left in the open segment
        left = before["segment"][:, None].expand(-1, self.segment, -1) if before else None
        groups = Groups.of(tokens, s, self.segment, left)
        known = groups.x.masked_fill(~groups.real[..., None], -torch.inf)
        highest = known.cummax(2).values if tokens.causal else known.amax(2, keepdim=True).expand_as(known)
        out = torch.where(tokens.real[..., None], groups.back(highest), 0.0)
        if tokens.causal:
            after["segment"] = out[:, -1].clone()
        return out

    def of_neighbours(self, tokens: Tokens, before: State, after: State) -> Float[Tensor, "batch query inner"]:
        """L_n for each token; zero at padding."""
        at = self.local_proj(tokens.x).masked_fill(~tokens.real[..., None], -torch.inf)
        edge = torch.full_like(at[:, :1], -torch.inf)
        left = before["local"][:, None] if before else edge
        highest = torch.maximum(at, torch.cat([left, at[:, :-1]], 1))
        if tokens.causal:
            after["local"] = at[:, -1].clone()
        else:
            highest = torch.maximum(highest, torch.cat([at[:, 1:], edge], 1))
        return torch.where(tokens.real[..., None], highest, 0.0)
