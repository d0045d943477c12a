"""Attention by a state in a layer: what turns queries, keys and values into a scan of the states engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.mixer import State, Tokens
from foveate.core.rule import Operator, Sizes
from foveate.core.states import Form, Scan, run

__all__ = ["Heads", "Recurrence"]


@dataclass(frozen=True, eq=False)
class Heads:
    """One call of a recurrence: the new tokens, head by head.

    Args:
        q: Queries, positions already applied; 0 at padding, as k and v. The keys of each head where it reads none.
        k: Keys.
        v: Values.
        tokens: The layer's input, and what is known of its tokens.
        scale: Factor on q . k that the layer would use for softmax attention.
        learned: The recurrence's own parameters, or None.
        sizes: Sizes of the layer.
    """

    q: Float[Tensor, "batch heads time dim"]
    k: Float[Tensor, "batch kv_heads time dim"]
    v: Float[Tensor, "batch kv_heads time value_dim"]
    tokens: Tokens
    scale: float
    learned: torch.nn.Module | None
    sizes: Sizes

    def every_head(self, x: Float[Tensor, "batch kv_heads time dim"]) -> Float[Tensor, "batch heads time dim"]:
        """Keys or values, once for each query head, for features or decays that differ from one to the other."""
        return x.repeat_interleave(self.q.shape[1] // x.shape[1], 1)


@dataclass(frozen=True)
class Recurrence(Operator):
    r"""Attention by a state: o_t = q_t^T S_t with S_t = S_{t-1} + k_t v_t^T, unless it says else.

    Each method is one part of the description, and changes nothing unless a recurrence has it: features of queries
    and keys, values, decay, strength of the writes, prefix, and what happens to the outputs. One that keeps more than
    its state overrides `flow`.
    """

    # whether outputs are divided by the sum of their weights
    normalised: ClassVar[bool] = False
    # whether its outputs are those of its scan, finished, and of nothing else
    one_scan: ClassVar[bool] = True
    # whether the layer's queries have a part in it; a module of our own has no projection of them where not
    reads_queries: ClassVar[bool] = True

    def learned(self, sizes: Sizes) -> torch.nn.Module | None:
        """Fresh parameters for one layer; None: it has none."""
        return None

    def queries(self, heads: Heads) -> Float[Tensor, "batch heads time key"]:
        """Features of the queries."""
        return heads.q * heads.scale

    def keys(self, heads: Heads) -> Float[Tensor, "batch kv_heads time key"]:
        """Features of the keys, by key-value head or by query head, as the values."""
        return heads.k

    def values(self, heads: Heads) -> Float[Tensor, "batch kv_heads time value_dim"]:
        """What is written."""
        return heads.v

    def decay(self, heads: Heads) -> Float[Tensor, "#batch kv_heads #time #key"] | None:
        """Logs of the decays, at most 0; None: nothing is forgotten."""
        return None

    def strength(self, heads: Heads) -> Float[Tensor, "batch kv_heads time"] | None:
        """Strengths of delta writes; None: writes are additive."""
        return None

    def prefix(self, heads: Heads) -> Int[Tensor, " batch"] | None:
        """How many tokens at the start of each text see each other; asked at the start of a text only."""
        return None

    def finish(
        self, heads: Heads, out: Float[Tensor, "batch heads time value_dim"]
    ) -> Float[Tensor, "batch heads time value_dim"]:
        """The head outputs as they go to the output projection."""
        return out

    def scan(self, heads: Heads, first: bool = True) -> Scan:
        """The scan of a call; `first`: it begins its texts. Where `one_scan` is not so, a part of what it does."""
        tokens = heads.tokens
        return Scan(
            self.queries(heads),
            self.keys(heads),
            self.values(heads),
            self.decay(heads),
            self.strength(heads),
            normalised=self.normalised,
            real=tokens.real,
            opens=tokens.opens,
            causal=tokens.causal,
            prefix=self.prefix(heads) if tokens.causal and first else None,
        )

    def flow(
        self, heads: Heads, state: State | None, form: Form = "auto"
    ) -> tuple[Float[Tensor, "batch heads time value_dim"], State]:
        """Head outputs of a call, and the state behind it.

        Args:
            heads: The call.
            state: What it gave for the tokens before, by name, tensors with the batch in front; None or {}: nothing.
            form: Which form of the engine to use.
        """
        out, after = run(self.scan(heads, not state), state["state"] if state else None, form)
        return self.finish(heads, out), {"state": after}
