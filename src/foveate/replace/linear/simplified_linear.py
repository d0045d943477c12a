r"""Simplified linear attention: ReLU as the only feature, and a convolution for what is near.

o_i = \sum_j relu(q_i) . relu(k_j) v_j / \sum_j relu(q_i) . relu(k_j) + conv(v)_i
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.card import Card, Needs
from foveate.core.errors import NotSupported
from foveate.core.mixer import State
from foveate.core.params import bounded
from foveate.core.recurrence import Heads, Recurrence
from foveate.core.rule import Sizes
from foveate.core.states import Form, run
from foveate.replace.linear._local import Local
from foveate.replace.linear._repbn import PRepBN

__all__ = ["SimplifiedLinear"]


@dataclass(frozen=True)
class SimplifiedLinear(Recurrence):
    """Linear attention by ReLU with a depthwise convolution of the values.

    The paper's other half, PRepBN, replaces the norms between layers, where no attention reaches. Here it can norm
    queries and keys (`norm`); what it has become folds into their projections, in layers without rotary positions.

    Example:
        A norm that trained, and is gone.

        >>> import torch, foveate
        >>> from foveate.replace import SimplifiedLinear
        >>> x, rule = torch.randn(2, 9, 16), SimplifiedLinear(norm=100)
        >>> layer = foveate.nn.Attention(16, heads=2, rule=rule)
        >>> _ = layer(x)
        >>> plain = foveate.nn.Attention(16, heads=2, rule=SimplifiedLinear())
        >>> own = layer.eval().rule.learned
        >>> plain.q_proj = own.q_norm.behind(layer.q_proj)
        >>> plain.k_proj = own.k_norm.behind(layer.k_proj)
        >>> plain.v_proj, plain.o_proj = layer.v_proj, layer.o_proj
        >>> plain.rule.learned.local = own.local
        >>> torch.allclose(plain(x), layer(x), atol=1e-5)
        True

    Args:
        local: Tokens under the window of the convolution; an even number is one more.
        norm: Calls in training in which the norm of queries and keys turns from LayerNorm into a scale; 0: no norm.
        warm: Calls in training before, with LayerNorm alone.
    """

    local: int = bounded(5, 1, 63)
    norm: int = bounded(0, 0, 1 << 30)
    warm: int = bounded(0, 0, 1 << 30)

    normalised: ClassVar[bool] = True

    card: ClassVar[Card] = Card(
        title="SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch "
        "Normalization",
        year=2024,
        family="linear",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES | Needs.TRAINING,
        equation="o_i = sum_j relu(q_i).relu(k_j) v_j / sum_j relu(q_i).relu(k_j) + conv(v)_i",
        differs="The window lies along the text, the paper's on an image; the causal form, whose window ends at the "
        "token, is ours. A table of learned places, as long as the image, is left out. Nothing is added to the sum of "
        "weights (1e-6 in the authors' code): where it is 0, the convolution is all. PRepBN, which theirs puts between "
        "layers, can stand at queries and keys, over all heads.",
        use="As the cheapest linear attention with an eye for what is near.",
        misleads="Where no channel of a query meets a key the sum of weights is 0, as for many first tokens of a "
        "causal text; and the paper's language models are softmax attention with PRepBN.",
    )
    test_params: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"local": 1}, {"local": 3, "norm": 10})

    def learned(self, sizes: Sizes) -> nn.Module:
        return Learned(self, sizes)

    def queries(self, heads: Heads) -> Float[Tensor, "batch heads time key"]:
        own: Any = heads.learned
        return normed(own.q_norm, heads.q, heads).relu()

    def keys(self, heads: Heads) -> Float[Tensor, "batch kv_heads time key"]:
        own: Any = heads.learned
        return normed(own.k_norm, heads.k, heads).relu()

    def flow(
        self, heads: Heads, state: State | None, form: Form = "auto"
    ) -> tuple[Float[Tensor, "batch heads time value_dim"], State]:
        if state and not heads.tokens.causal:
            raise NotSupported("a window to both sides needs all tokens at once; call it without a cache")
        own: Any = heads.learned
        before = state["recent"] if state else None
        out, last = run(self.scan(heads, not state), state["state"] if state else None, form)
        recent = own.local.kept(heads.v, heads.tokens, before)
        return out + self.near(heads, before), {"state": last, "recent": recent}

    def finish(
        self, heads: Heads, out: Float[Tensor, "batch heads time value_dim"]
    ) -> Float[Tensor, "batch heads time value_dim"]:
        return out + self.near(heads, None)

    def near(
        self, heads: Heads, before: Float[Tensor, "batch kv_heads kept value_dim"] | None
    ) -> Float[Tensor, "batch heads time value_dim"]:
        """What the convolution gives, with the values of earlier calls."""
        own: Any = heads.learned
        return heads.every_head(own.local(heads.v, heads.tokens, before))


class Learned(nn.Module):
    """The convolution, one window for each channel of all heads, and the norms of one layer.

    Args:
        options: What they are.
        sizes: Sizes of the layer.
    """

    def __init__(self, options: SimplifiedLinear, sizes: Sizes) -> None:
        super().__init__()
        self.local = Local((1, sizes.value_dim), options.local | 1)
        widths = (sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim) if options.norm else (0, 0)
        self.q_norm, self.k_norm = (PRepBN(n, options.norm, options.warm) if n else None for n in widths)


def normed(
    norm: PRepBN | None, x: Float[Tensor, "batch heads time dim"], heads: Heads
) -> Float[Tensor, "batch heads time dim"]:
    """Queries or keys behind their norm."""
    if norm is None:
        return x
    return norm(x.transpose(1, 2).flatten(2), heads.tokens.real).unflatten(-1, x.shape[1::2]).transpose(1, 2)
