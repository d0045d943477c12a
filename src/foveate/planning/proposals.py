"""Sets of policies that hold a given share of a cache."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from foveate.core.budget import Budget
from foveate.core.errors import BadInput
from foveate.core.mechanism import Policy
from foveate.core.places import Value

__all__ = ["OVERHEAD", "sparing", "spared_heads"]

# positions, scores and spare slots that come with each entry that is held
OVERHEAD = 1.05


def spared_heads(gates: Sequence[Value], share: float, tokens: int, rest: int) -> tuple[Value, ...]:
    """The KV heads of largest gate that may keep everything when the others keep `rest` tokens.

    Args:
        gates: (layer, KV head, gate) of every KV head.
        share: Share of the cache of all heads.
        tokens: Length of the text that the share is of.
        rest: Tokens that each of the other heads keeps.

    Raises:
        BadInput: not even `rest` tokens for each head fit in the share.
    """
    room = share / OVERHEAD * len(gates) * tokens - len(gates) * rest
    if room < 0:
        least = math.ceil(1000 * OVERHEAD * rest / tokens) / 1000
        raise BadInput(
            f"{share:.0%} of {tokens} tokens is less than the {rest} that every head keeps; the least is {least:.1%}"
        )
    count = len(gates) if rest >= tokens else min(len(gates), int(room / (tokens - rest)))
    return tuple(sorted(sorted(gates, key=lambda gate: -gate[2])[:count]))


def sparing(
    policy: Policy, gates: Sequence[Value], share: float, tokens: int, rest: int, *, sinks: int = 4, every: int = 16
) -> Policy:
    """A policy with a budget in which the heads of largest gate keep everything, and all others so many tokens.

    Args:
        policy: What chooses the tokens of the others.
        gates: (layer, KV head, gate) of every KV head.
        share: Share of the cache of all heads, at a text of `tokens`.
        tokens: Length of the text that the share is of.
        rest: Tokens that each of the other heads keeps, the first and recent ones among them.
        sinks: First tokens that all keep.
        every: How often entries are dropped while decoding.

    Raises:
        BadInput: the share is too small for that.
    """
    heads = tuple((layer, head, 1.0) for layer, head, _ in spared_heads(gates, share, tokens, rest))
    waiting = max(0, every - 1)
    # what recency alone keeps needs no word; where scores choose, half of the room is theirs
    recent = rest - sinks - waiting if policy.name == "streaming" else (rest - sinks - waiting + 1) // 2
    if recent < 1:
        raise BadInput(f"rest={rest}: give room for {sinks} first tokens, {waiting} new ones and a recent one")
    budget = Budget(rest, sinks=sinks, recent=recent, heads=heads, every=every)
    return dataclasses.replace(policy, budget=budget)  # type: ignore[call-arg]
