r"""Exact softmax attention in a local window, which keeps the last keys and values as its state.

Token i sees the `window` tokens that end with it; where all see all, the window - 1 on either side as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.mixer import State
from foveate.core.recurrence import Heads
from foveate.core.states import exact

__all__ = ["Windows"]

# fewer queries at once wait for the interpreter
BLOCK = 16


@dataclass(frozen=True, eq=False)
class Windows:
    """The tokens of one call without the gaps that padding leaves, the last `window` of earlier calls in front.

    Args:
        heads: The call.
        window: Keys that a token sees, itself included.
        order: Where the tokens stand in the call, padding last.
        q: Queries.
        k: Keys, those of `window` earlier tokens in front.
        v: Values, as the keys.
        text: Which text of the batch row a token is of; -1 where there is none.
    """

    heads: Heads
    window: int
    order: Int[Tensor, "batch query"] | None
    q: Float[Tensor, "batch heads query dim"]
    k: Float[Tensor, "batch kv_heads time dim"]
    v: Float[Tensor, "batch kv_heads time value_dim"]
    text: Int[Tensor, "batch time"]

    @classmethod
    def of(cls, heads: Heads, window: int, state: State | None) -> Windows:
        """The tokens of a call behind this state; None or {}: there were none before."""
        tokens = heads.tokens
        q, k, v, real = heads.q, heads.k, heads.v, tokens.real
        opens = torch.zeros_like(real) if tokens.opens is None else tokens.opens
        order = None
        if not bool(real.all()):
            order = torch.argsort((~real).to(torch.uint8), dim=1, stable=True)
            q, k, v = (moved(t, order) for t in (q, k, v))
            real, opens = real.gather(1, order), opens.gather(1, order)
        text = opens.long().cumsum(1).masked_fill(~real, -1)
        before = text.new_full((len(text), window), -1)
        if state:
            old_k, old_v = state["keys"].to(k), state["values"].to(v)
            places = torch.arange(window, device=text.device)
            before = before.masked_fill(places >= window - state["held"][:, None], 0)
        else:
            old_k, old_v = (t.new_zeros(*t.shape[:2], window, t.shape[3]) for t in (k, v))
        return cls(
            heads,
            window,
            order,
            q,
            torch.cat([old_k, k], 2),
            torch.cat([old_v, v], 2),
            torch.cat([before, text], 1),
        )

    def back(self, x: Float[Tensor, "batch heads query dim"]) -> Float[Tensor, "batch heads query dim"]:
        """Rows of these tokens where their tokens stand in the call."""
        return x if self.order is None else moved(x, self.order.argsort(1))

    def state(self) -> State:
        """The last keys and values, and how many of them are of the text that goes on."""
        new = (self.text[:, self.window :] >= 0).sum(1)
        last = new[:, None] + torch.arange(self.window, device=new.device)
        text = self.text.gather(1, last)
        held = ((text == text[:, -1:]) & (text >= 0)).sum(1)
        return {"keys": moved(self.k, last), "values": moved(self.v, last), "held": held}

    def attend(self) -> tuple[Float[Tensor, "batch heads query value_dim"], Float[Tensor, "batch heads query 1"]]:
        """Outputs, and the log-sum-exp of the scores in each window."""
        window, length = self.window, self.q.shape[2]
        size = max(1, min(length, max(window, BLOCK)))
        behind = 0 if self.heads.tokens.causal else window
        more, span = -length % size, size + window + behind
        q = torch.nn.functional.pad(self.q, (0, 0, 0, more)).to(exact(self.q)).unflatten(2, (-1, size))
        k, v = (
            torch.nn.functional.pad(t, (0, 0, 0, more + behind))
            .to(q)
            .unfold(2, span, size)
            .repeat_interleave(q.shape[1] // t.shape[1], 1)
            for t in (self.k, self.v)
        )
        text = torch.nn.functional.pad(self.text, (0, more + behind), value=-1).unfold(1, span, size)
        here = torch.arange(size, device=q.device)[:, None] + window
        there = torch.arange(span, device=q.device)
        near = (there > here - window) & (there < here + window if behind else there <= here)
        seen = near & (text[:, :, None] == text[:, :, window : window + size, None])
        # `unfold` gives the keys of a span last
        scores = (q * self.heads.scale) @ k
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
        lse = scores.logsumexp(-1, keepdim=True)
        out = (scores - lse).exp() @ v.transpose(3, 4)
        return out.flatten(2, 3)[:, :, :length], lse.flatten(2, 3)[:, :, :length]


def moved(
    x: Float[Tensor, "batch heads from dim"], order: Int[Tensor, "batch to"]
) -> Float[Tensor, "batch heads to dim"]:
    """Rows in another order, one for each text."""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
