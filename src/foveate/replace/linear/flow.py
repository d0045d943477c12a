r"""Flow attention: what flows out of a source and into a sink is conserved, so sources compete and sinks allocate.

With queries and keys behind a sigmoid, and e = 1e-6 added to every number of both factors of each product:

    I_i = q_i . \sum_j k_j                 O_j = k_j . \sum_i q_i                 what sink i gets, what source j gives
    I'_i = q_i . \sum_j k_j / O_j          O'_j = clip(k_j . \sum_i q_i / I_i, -1, 1)      where each gives, gets 1
    o_i = sigmoid(I'_i) q_i / I_i . \sum_j k_j (n softmax_j(O'_j) v_j)^T

In causal order all sums are over s <= t, and I', O' over s / O_s, s / I_s and divided by t; what a source won in the
competition when it came, t exp(O'_t) / \sum_{s <= t} exp(O'_s), it keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.card import Card, Needs
from foveate.core.errors import NotSupported
from foveate.core.mixer import State
from foveate.core.recurrence import Heads, Recurrence
from foveate.core.states import Form, Scan, exact, run

__all__ = ["Flow"]

EPS = 1e-6


@dataclass(frozen=True)
class Flow(Recurrence):
    """Linear attention by the conservation of flow, with competition of sources and allocation to sinks.

    Every sum in it is a scan of its own, so that a causal layer keeps a state and four sums per head.

    Example:
        Linear attention without a feature map to choose.

        >>> import torch, foveate
        >>> from foveate.replace import Flow
        >>> for causal in (True, False):
        ...     layer = foveate.nn.Attention(32, heads=4, rule=Flow(), causal=causal)
        ...     print(tuple(layer(torch.randn(2, 100, 32)).shape))
        (2, 100, 32)
        (2, 100, 32)
    """

    card: ClassVar[Card] = Card(
        title="Flowformer: Linearizing Transformers with Conservation Flows",
        year=2022,
        family="linear",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES,
        equation="o_i = sigmoid(I'_i) q_i / I_i . sum_j k_j (n softmax_j(O'_j) v_j)^T, q and k behind a sigmoid",
        differs="The dropout behind the output and the biases of the projections in the authors' code are the layer's "
        "own affair. Where key-value heads are shared, sources compete for each query head apart.",
        use="As linear attention that needs no parameters, no decay and no feature map, causal and not.",
        misleads="Its causal form is another function than the masked full form: other sums divide, and the past is "
        "never weighed anew. Rows do not sum to 1, and features of a sigmoid never reach 0: it is diffuse, and no "
        "stand-in for softmax without training.",
        claims=("degenerate_attention",),
    )

    def scan(self, heads: Heads, first: bool = True) -> Scan:
        return conserved(heads, {}, "auto")[0]

    def flow(
        self, heads: Heads, state: State | None, form: Form = "auto"
    ) -> tuple[Float[Tensor, "batch heads time value_dim"], State]:
        if state and not heads.tokens.causal:
            raise NotSupported("flows between all tokens need them all at once; call it without a cache")
        scan, after = conserved(heads, state or {}, form)
        out, last = run(scan, state["state"] if state else None, form)
        return out, after | {"state": last}


def conserved(heads: Heads, before: State, form: Form) -> tuple[Scan, State]:
    """The scan of the values that have competed, and the sums behind it, of which `before` are those before it."""
    tokens, after, wide = heads.tokens, State(), exact(heads.q)
    q, k = (t.to(wide).sigmoid() for t in (heads.q, heads.every_head(heads.k)))
    scan = partial(Scan, real=tokens.real, opens=tokens.opens, causal=tokens.causal)
    one = torch.ones_like(q[..., :1])

    def summed(name: str, read: Tensor, written: Tensor, by: Tensor) -> Float[Tensor, "batch heads time 1"]:
        out, after[name] = run(scan(read, written, by), before.get(name), form)
        return out

    def product(name: str, read: Tensor, written: Tensor, by: Tensor) -> Float[Tensor, "batch heads time 1"]:
        read = read + EPS
        return summed(name, read, written, by) + EPS * read.sum(-1, keepdim=True)

    # of padding in front, which has seen nothing, anything finite
    n = summed("count", one, one, one).clamp_min(1)
    t = n if tokens.causal else one
    incoming, outgoing = product("keys", q, k, one), product("queries", k, q, one)
    sink = product("sources", q, k, t / outgoing) / t
    source = (product("sinks", k, q, t / incoming) / t).clamp(-1, 1).exp()
    won = n * source / summed("competition", one, one, source).clamp_min(EPS)
    return scan(q * sink.sigmoid() / incoming, k, won * heads.every_head(heads.v)), after
