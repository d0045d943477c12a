r"""Attention as a recurrence: one learned query per head, so that softmax attention needs no past keys.

m_t = max(m_{t-1}, s_t),    s_t = scale q . k_t
c_t = c_{t-1} exp(m_{t-1} - m_t) + exp(s_t - m_t)
a_t = a_{t-1} exp(m_{t-1} - m_t) + exp(s_t - m_t) v_t,    o_t = a_t / c_t
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.card import Card, Needs
from foveate.core.mixer import State, Tokens
from foveate.core.recurrence import Heads, Recurrence
from foveate.core.rule import Sizes
from foveate.core.states import Form, Scan, exact, run

__all__ = ["AttentionRnn"]


@dataclass(frozen=True)
class AttentionRnn(Recurrence):
    r"""Softmax attention of a learned query, the same for all tokens, over what has been.

    o_t = \sum_{j <= t} exp(s_j) v_j / \sum_{j <= t} exp(s_j),    s_j = scale q_h . k_j

    computed with the largest score so far m_t, as a state whose decay is exp(m_{t-1} - m_t) and whose key is
    exp(s_t - m_t): nothing overflows, and no keys are kept.

    Example:
        What is kept per head: a maximum, a sum of weights and a sum of values.

        >>> import torch, foveate
        >>> from transformers import DynamicCache
        >>> from foveate.replace import AttentionRnn
        >>> attention = foveate.nn.Attention(32, heads=4, rule=AttentionRnn())
        >>> cache = DynamicCache()
        >>> _ = attention(torch.randn(1, 1000, 32), cache=cache)
        >>> cache.layers[0].bytes_held() == 4 * (8 + 2) * 4
        True
    """

    normalised: ClassVar[bool] = True
    full: ClassVar[bool] = False
    reads_queries: ClassVar[bool] = False

    card: ClassVar = Card(
        title="Attention as an RNN",
        year=2024,
        family="state_space",
        needs=Needs.KEYS | Needs.VALUES | Needs.TRAINING,
        equation="o_t = sum_{j <= t} exp(s_j) v_j / sum_{j <= t} exp(s_j), s_j = scale q_h . k_j, q_h learned",
        differs=(
            "the learned query is one vector per head, not one token that goes through the query projection, and that "
            "of a loaded model is left without use; scores have the layer's scale; "
            "keys have the layer's rotary positions "
            "where it has them, so that a score depends on the key's place; read from other people's code, as the "
            "authors' was not to be found"
        ),
        use="for streams: exact softmax weights in a state of fixed size, a maximum, a sum and a mean per head",
        misleads="the query does not look at its token, so that nothing can be looked up; a late token hardly matters "
        "once an early score is large; in a loaded model it reads nothing before training",
    )

    def learned(self, sizes: Sizes) -> nn.Module:
        return Query(sizes)

    def scores(self, heads: Heads) -> Float[Tensor, "batch heads time"]:
        """The score s of each token."""
        assert isinstance(heads.learned, Query)
        k, query = heads.every_head(heads.k), heads.learned.query
        dtype = exact(k)
        return heads.scale * (k.to(dtype) @ query.to(dtype)[..., None])[..., 0]

    def scan(self, heads: Heads, first: bool = True) -> Scan:
        return self.relative(heads, None)[0]

    def flow(
        self, heads: Heads, state: State | None, form: Form = "auto"
    ) -> tuple[Float[Tensor, "batch heads time value_dim"], State]:
        scan, highest = self.relative(heads, state["highest"] if state else None)
        out, after = run(scan, state["state"] if state else None, form)
        return out, {"state": after, "highest": highest}

    def relative(
        self, heads: Heads, before: Float[Tensor, "batch heads"] | None
    ) -> tuple[Scan, Float[Tensor, "batch heads"]]:
        """The scan of scores less the largest so far, and the largest of all; `before`: of earlier calls."""
        s, tokens = self.scores(heads), heads.tokens
        high = highest(s.detach(), tokens, before)
        started = high[..., :-1] > -torch.inf
        # the largest falls only where a text opens, and there the engine forgets everything
        decay = torch.where(started, high[..., :-1] - high[..., 1:], 0.0).clamp_max(0.0)
        k = torch.where(tokens.real[:, None], s - high[..., 1:], -torch.inf).exp()
        v = heads.every_head(heads.v)
        scan = Scan(
            torch.ones_like(k)[..., None],
            k[..., None],
            v,
            decay[..., None],
            normalised=True,
            real=tokens.real,
            opens=tokens.opens,
        )
        return scan, high[..., -1].clone()


class Query(nn.Module):
    """The learned query of each head.

    Args:
        sizes: Sizes of the layer.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(sizes.heads, sizes.head_dim))


def highest(
    s: Float[Tensor, "batch heads time"], tokens: Tokens, before: Float[Tensor, "batch heads"] | None
) -> Float[Tensor, "batch heads after"]:
    """The largest score of the text so far, before the first token and behind each; -inf where there was none."""
    first = torch.full_like(s[..., :1], -torch.inf) if before is None else before[..., None].to(s)
    joined = torch.cat([first, torch.where(tokens.real[:, None], s, -torch.inf)], -1)
    if tokens.opens is None:
        return joined.cummax(-1).values
    # each packed text is lifted above those before it
    finite = joined.double().nan_to_num(0.0, neginf=0.0)
    text = nn.functional.pad(tokens.opens.cumsum(1), (1, 0))[:, None]
    lift = text * (finite.amax() - finite.amin() + 1)
    return ((joined + lift).cummax(-1).values - lift).to(s.dtype)
