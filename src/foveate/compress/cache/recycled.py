r"""Recycled: look at everything now and then, and in between only at what mattered then.

    full step, every `stride` tokens:  read all;  A = the K entries of largest max_h p_hj, over the heads that share j
    in between:                        read A and the tokens since;  each new token takes the place of the last of A

or, layer by layer, as the queries ask for it: a full step when cos(q, q of the last full step) < `similarity`, where q
is the mean over the heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core.budget import Amount
from foveate.core.card import Card, Needs
from foveate.core.mechanism import Policy
from foveate.core.params import bounded
from foveate.core.policy import Reading

__all__ = ["Recycled"]


@dataclass(frozen=True)
class Recycled(Policy):
    """Read what the last full step gave the largest weights, and the tokens since; all entries stay.

    Args:
        budget: How many entries each KV head reads between full steps.
        stride: Most tokens from one full step to the next.
        similarity: A full step is taken earlier when the cosine of the mean query with that of the last full step is
            below this; -1: never earlier.
        check: Queries are compared at every so many tokens.

    Example:
        The first decoded token, a k, reads all. The head that looks for copies remembers where the other k stands and
        reads there for the next token too, which is a comma.

        >>> import foveate
        >>> from foveate.compress import Recycled
        >>> from foveate.testing import handmade
        >>> from foveate.testing.policies import Witness
        >>> text, seen = "Look, to be or not to be. Ask,", []
        >>> ids = handmade.ids(text)
        >>> budget = foveate.Budget(5, sinks=1, recent=2, every=0)
        >>> policy = Witness(Recycled(budget), seen, budget)
        >>> with foveate.attach(handmade.model(), policy) as attached:
        ...     cache = attached.model(ids[:, :-2]).past_key_values
        ...     for n in (-2, -1):
        ...         out = attached.model(ids[:, n:][:, :1], past_key_values=cache)
        >>> [position is None for layer, position, room in seen]
        [True, True, False, False]
        >>> same = seen[-1][1][0, 1].tolist()
        >>> "".join(c if n + 1 in same else "·" for n, c in enumerate(text))
        '···k·······················sk,'
    """

    budget: Amount = 0.25
    stride: int = bounded(10, 1, 4096)
    similarity: float = bounded(-1.0, -1.0, 1.0)
    check: int = bounded(5, 1, 4096)

    card: ClassVar = Card(
        title="Recycled Attention: Efficient inference for long-context language models",
        year=2024,
        family="kv cache",
        needs=Needs.QUERIES | Needs.KEYS | Needs.WEIGHTS,
        equation="every `stride` tokens, or when cos(q, q_full) < similarity, read all and A = top K of max over the "
        "heads that share a key of p_j; in between read A and the tokens since",
        differs="the first full step is the first decoded token, the paper takes the last token of the prompt. The "
        "budget's sinks and recent tokens are in A before all others, and when the tokens since leave no room for "
        "them a full step is taken. The choice by similarity has `stride` as a limit, the paper's has none; queries "
        "are compared as attention gets them, with their rotation. No pooling over neighbouring keys, which a later "
        "version of the paper adds. Each row of a batch and each layer decides alone",
        use="when neighbouring tokens look at the same places, as in long answers from a long text",
        misleads="what becomes important between two full steps is not read; a full step reads more than the budget",
        claims=("recycled", "recycled_local"),
    )
    test_params: ClassVar = ({"stride": 3}, {"similarity": 0.6, "check": 1})

    def read(self, reading: Reading) -> Int[Tensor, "batch kv_heads chosen"] | None:
        state, room, length = reading.state, reading.room, reading.store.length
        short = (length <= room).all(1)
        if bool(short.all()):
            return None
        q = reading.q.float().mean((1, 2))
        full = short | self.due(reading, q)
        since = state["since"] + 1 if state else torch.zeros_like(length[:, 0])
        # whoever reads all anyway takes a first full step as soon as it does not
        state["since"] = torch.where(short, self.stride, since.masked_fill(full, 0))
        if bool(full.any()):
            self.remember(reading, full, q)
        return None if bool(full.all()) else self.partial(reading, full)

    def due(self, reading: Reading, q: Float[Tensor, "batch dim"]) -> Bool[Tensor, " batch"]:
        """Which rows take a full step."""
        state, length = reading.state, reading.store.length
        if not state:
            return torch.ones(len(length), dtype=torch.bool, device=length.device)
        since = state["since"] + 1
        full = since >= self.stride
        if self.similarity > -1:
            near = torch.nn.functional.cosine_similarity(q, state["query"], dim=-1)
            full |= (since % self.check == 0) & (near < self.similarity)
        pinned = reading.budget.sinks + reading.budget.recent
        return full | (length - state["length"] > reading.room - pinned).any(1)

    def remember(self, reading: Reading, full: Bool[Tensor, " batch"], q: Float[Tensor, "batch dim"]) -> None:
        """Notes for the rows of a full step what they look at, the pinned first, then by weight."""
        state = reading.state
        best = reading.best(reading.weights().amax(2))
        fresh = {"best": best, "length": reading.store.length, "query": q}
        for name, now in fresh.items():
            before = state.get(name, now)
            if name == "best":
                wide = max(before.shape[-1], now.shape[-1])
                before, now = (torch.nn.functional.pad(x, (0, wide - x.shape[-1]), value=-1) for x in (before, now))
            state[name] = torch.where(full.view(-1, *[1] * (now.ndim - 1)), now, before)

    def partial(self, reading: Reading, full: Bool[Tensor, " batch"]) -> Int[Tensor, "batch kv_heads chosen"]:
        """The tokens since and the best of the last full step; all entries for rows that take one now."""
        best, begin = reading.state["best"], reading.state["length"][..., None]
        length, room = reading.store.length[..., None], reading.room[..., None]
        full = full[:, None, None]
        width = int(torch.where(full, length, room).max())
        rank = torch.arange(width, device=best.device)
        old = rank - (length - begin)
        chosen = torch.where(old < 0, begin + rank, best.gather(-1, old.clamp(0, best.shape[-1] - 1)))
        chosen = chosen.masked_fill((rank >= room) | (old >= best.shape[-1]), -1)
        return torch.where(full, rank.expand_as(chosen).masked_fill(rank >= length, -1), chosen)
