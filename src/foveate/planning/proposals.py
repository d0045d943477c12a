"""Sets of policies that hold a given share of a cache.

A policy that scores entries is proposed in two ways: the same number for every head, and *sparing* the heads that find
answers, which keep everything while the policy chooses a few tokens for the others. Each policy that stores entries in
fewer bits is proposed alone and beside these.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from foveate.core.budget import Budget
from foveate.core.errors import BadInput
from foveate.core.mechanism import Policy
from foveate.core.places import Value
from foveate.core.ragged import ENTRY_BYTES
from foveate.core.registry import find, make
from foveate.core.written import read, written
from foveate.probe.ledger import Ledger, circumstances

__all__ = ["OVERHEAD", "USUAL", "Family", "families", "named", "spared_heads", "sparing", "with_fit"]

# spare slots, and with positions and scores all that comes with entries of 64 channels in float32
SPARE, OVERHEAD = 1.034, 1.05
USUAL = ("expected_attention", "key_diversity", "streaming", "quantised", "quantised:value_bits=4", "mixed_bits")
"""What is proposed when a user names nothing."""
ELSEWHERE = (0.2, 0.5)
"""Share of the budget that the heads which are not spared get."""
FINER = 0.25
"""How far a form of storage that is fitted lies between its fewest bytes and its most, beside policies that drop."""

Fit = Callable[[str, float], Policy]


@dataclass(frozen=True)
class Family:
    """Sets of policies of one kind, one for every share of the cache.

    Args:
        name: What a reader calls it.
        at: The policies at a share of the model's own cache; raises `BadInput` where there are none.
        least: The smallest share that it can hold; None: not known.
    """

    name: str
    at: Callable[[float], tuple[Policy, ...]]
    least: float | None = None


def named(specs: Sequence[str]) -> list[Policy]:
    """The policies that a user names, with parameters as `observation_window:window=16`.

    Raises:
        BadInput: a policy that only acts beside another one.
        UnknownName: no such policy.
    """
    made = []
    for spec in specs:
        cls = find(spec.partition(":")[0], "compress")
        if not issubclass(cls, Policy):
            raise BadInput(f"{spec} is no KV policy; `foveate list --kind Policy` shows those")
        policy = make(spec, "compress")
        assert isinstance(policy, Policy)
        if policy.parts == {"merge"}:
            raise BadInput(
                f"{spec} only says what dropped entries leave behind; name a policy that drops some as well, and put "
                "both in a plan with foveate.Plan.of"
            )
        made.append(policy)
    return made


def spec(policy: Policy) -> str:
    """A policy as a user names it: its name, and the parameters that are not the usual ones."""
    given = {f.name: getattr(policy, f.name) for f in dataclasses.fields(policy)}
    usual = {f.name: f.default for f in dataclasses.fields(policy)}
    told = ",".join(f"{name}={value}" for name, value in given.items() if value != usual[name])
    return f"{policy.name}:{told}" if told else policy.name


def with_fit(policy: Policy) -> bool:
    """Whether its parameters are found on a model, and were not given."""
    cls = type(policy)
    return hasattr(cls, "fit") and policy == cls()


def families(
    policies: Sequence[Policy],
    gates: Sequence[Value],
    tokens: int,
    head_bytes: Callable[[Policy | None], float],
    fit: Fit,
    lengths: Sequence[int] = (),
) -> list[Family]:
    """What can be proposed with some policies.

    Args:
        policies: What `named` gives.
        gates: (layer, KV head, gate) of every KV head: how much each finds answers.
        tokens: Length that is planned for.
        head_bytes: Bytes of one entry of one head under a policy that stores; None: as the model makes it.
        fit: Finds the parameters of a policy by name, for a share.
        lengths: Tokens that each layer's own cache holds, where sliding windows leave some of them less.
    """
    # of narrow rows, what comes with each entry is a larger part
    narrow = min(1.0, OVERHEAD / (SPARE * (1 + ENTRY_BYTES / head_bytes(None))))
    # the same policy said twice is one
    policies = list(dict.fromkeys(policies))
    forms = [(spec(policy), form(policy, head_bytes, fit)) for policy in policies if "store" in policy.parts]
    found: list[Family] = []

    def add(name: str, at: Callable[[float], tuple[Policy, ...]], least: float | None = None) -> None:
        found.append(Family(name, lambda share: at(share * narrow), None if least is None else least / narrow))
        for called, one in forms:

            def packed(share: float, one: Form = one) -> tuple[Policy, ...]:
                store = one.beside()
                part = head_bytes(store) / head_bytes(None)
                # where all of it fits in this form nothing has to go
                return (one.alone(share),) if share >= part * OVERHEAD else (*at(share / part), store)

            both = None if least is None or one.least is None else least * one.least / OVERHEAD
            found.append(Family(f"{name}, {called}", packed, both))

    found += [Family(called, single(one.alone), one.least) for called, one in forms]
    for policy in policies:
        if "store" in policy.parts:
            continue
        called = spec(policy)
        if with_fit(policy):
            add(called, single(partial(fit, policy.name)))
        elif "read" in policy.parts:
            found.append(Family(f"{called} (reads)", single(policy.within)))
        else:
            limits = policy.limits
            add(called, single(partial(even, policy, tokens, lengths)), share_of(limits.least, lengths or (tokens,)))
            least = share_of(rest_of(limits), lengths or (tokens,))
            for part in ELSEWHERE:
                name = f"{called} sparing heads, {part:.0%} elsewhere"
                add(name, single(partial(spare, policy, gates, tokens, part, lengths)), least)
    return found


def share_of(count: int, lengths: Sequence[int]) -> float:
    """The share of a cache that so many tokens of each head take."""
    return OVERHEAD * sum(min(count, length) for length in lengths) / sum(lengths)


@dataclass(frozen=True)
class Form:
    """Entries in fewer bits.

    Args:
        alone: The policy that stores all entries within a share; raises `BadInput` where they do not fit.
        beside: The policy that stores what others keep.
        least: The smallest share that `alone` can hold; None: not known.
    """

    alone: Callable[[float], Policy]
    beside: Callable[[], Policy]
    least: float | None = None


def form(policy: Policy, head_bytes: Callable[[Policy | None], float], fit: Fit) -> Form:
    """The form in which a policy stores; where its `fit` finds which parts get more bits, as many as fit."""
    if not with_fit(policy):
        least = head_bytes(policy) / head_bytes(None) * OVERHEAD
        return Form(partial(only, policy, least), lambda: policy, least)

    def alone(share: float) -> Policy:
        # it counts spare slots itself
        return fit(policy.name, share * OVERHEAD)

    def beside() -> Policy:
        least, most = head_bytes(policy), head_bytes(alone(1.0))
        return alone((least + FINER * (most - least)) / head_bytes(None) * OVERHEAD)

    return Form(alone, beside)


def single(made: Callable[[float], Policy]) -> Callable[[float], tuple[Policy, ...]]:
    """One policy as a set of them."""
    return lambda share: (made(share),)


def even(policy: Policy, tokens: int, lengths: Sequence[int], share: float) -> Policy:
    """The same share for every head; where a window leaves a head less, the others get what it cannot take.

    Raises:
        BadInput: the policy always keeps more.
    """
    whole = lengths or (tokens,)
    keep = level(whole, share / OVERHEAD * sum(whole)) / tokens
    if keep * tokens < policy.limits.least:
        raise BadInput(
            f"{policy.name} always keeps {policy.limits.least} tokens of each head, more than {share:.1%} of {tokens}"
        )
    return policy.within(dataclasses.replace(policy.limits, keep=min(1.0, keep)))


def level(lengths: Sequence[int], total: float) -> float:
    """The number that sums to a total when it is taken from each length, or all of a length that has not so much."""
    for n, length in enumerate(sorted(lengths)):
        each = total / (len(lengths) - n)
        if each <= length:
            return each
        total -= length
    return max(lengths)


def spare(
    policy: Policy, gates: Sequence[Value], tokens: int, part: float, lengths: Sequence[int], share: float
) -> Policy:
    """Everything for some heads, and a part of the budget for the others."""
    limits = policy.limits
    rest = max(rest_of(limits), round(part * share * tokens))
    return sparing(policy, gates, share, tokens, rest, sinks=limits.sinks, every=limits.every, lengths=lengths)


def rest_of(limits: Budget) -> int:
    """The fewest tokens that a head keeps where others keep everything."""
    return limits.sinks + limits.waiting + 64


def only(store: Policy, least: float, share: float) -> Policy:
    """A policy that stores, alone: it takes what it takes, which fits or does not.

    Raises:
        BadInput: it does not.
    """
    if share < least:
        raise BadInput(f"{spec(store)} alone takes {least:.0%} of the cache, more than {share:.0%}")
    return store


def fitted(
    name: str,
    model: Any,
    tokenizer: Any,
    text: str,
    tokens: int,
    share: float,
    kv_heads: int,
    file: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Policy:
    """A policy with the parameters that its own `fit` finds, made to hold a share.

    Spans and bits are searched under the share itself, spans on texts of a quarter and a half of the length, and tried
    at the length. Of heads that a gate orders as many keep everything as fit; where `fit` says which heads do, the
    others get what is left.

    Args:
        name: Its name.
        model: The model.
        tokenizer: Its tokenizer.
        text: What spans and bits are searched on.
        tokens: Length of the text that the share is of.
        share: Share of the model's own cache.
        kv_heads: KV heads of the whole model.
        file: Where results are kept that another share can use.
        progress: Called with what is done and how much there is, by a `fit` that tells.

    Raises:
        BadInput: it cannot hold so little.
    """
    policy: Any = find(name, "compress")
    takes = inspect.signature(policy.fit).parameters
    more: dict[str, Any] = {"progress": progress} if "progress" in takes else {}
    if "keep" in takes:
        if "file" in takes:
            more |= {"tokens": tokens, "file": file}
        if "lengths" in takes:
            more |= {"lengths": (tokens // 4, tokens // 2), "unseen": tokens}
        return policy.fit(model, tokenizer, text, keep=share / OVERHEAD, **more)
    ledger, key = Ledger(file), Ledger.key("heads", circumstances(model, tokenizer), name)
    if key not in ledger:
        ledger.add(key, written(policy.fit(model, tokenizer, **more)))
    found: Any = read(ledger[key])
    room = share / OVERHEAD * tokens
    if hasattr(found, "keeping"):
        rest = found.limits.keep if isinstance(found.limits.keep, int) else found.limits.least
        if room < rest:
            raise BadInput(f"{name} keeps at least {rest} tokens of every head, more than {share:.0%} of {tokens}")
        spared = min(kv_heads, int((room - rest) * kv_heads / max(tokens - rest, 1)))
        return found.keeping(spared / kv_heads)
    spared = len(found.heads)
    rest = int((room * kv_heads - spared * tokens) / max(kv_heads - spared, 1))
    if rest < found.limits.least:
        raise BadInput(
            f"{name} spares {spared} of {kv_heads} heads, which leaves too little for the others at {share:.0%} of "
            f"{tokens} tokens"
        )
    return found.within(Budget(rest, sinks=found.limits.sinks, recent=found.limits.recent, every=found.limits.every))


def spared_heads(
    gates: Sequence[Value], share: float, tokens: int, rest: int, lengths: Sequence[int] = ()
) -> tuple[Value, ...]:
    """The KV heads of largest gate that may keep everything when the others keep `rest` tokens.

    Args:
        gates: (layer, KV head, gate) of every KV head.
        share: Share of the cache of all heads.
        tokens: Length of the text that the share is of.
        rest: Tokens that each of the other heads keeps.
        lengths: Tokens that each layer's own cache holds; (): all of them.

    Raises:
        BadInput: not even `rest` tokens for each head fit in the share.
    """
    whole = [lengths[layer] if lengths else tokens for layer, *_ in gates]
    few = [min(rest, length) for length in whole]
    room = share / OVERHEAD * sum(whole) - sum(few)
    if room < 0:
        least = math.ceil(1000 * share_of(rest, whole)) / 1000
        raise BadInput(
            f"{share:.0%} of {tokens} tokens is less than the {rest} that every head keeps; the least is {least:.1%}"
        )
    spared = []
    for n in sorted(range(len(gates)), key=lambda n: -gates[n][2]):
        room -= whole[n] - few[n]
        if room < 0:
            break
        spared.append(gates[n])
    return tuple(sorted(spared))


def sparing(
    policy: Policy,
    gates: Sequence[Value],
    share: float,
    tokens: int,
    rest: int,
    *,
    sinks: int = 4,
    every: int = 16,
    lengths: Sequence[int] = (),
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
        lengths: Tokens that each layer's own cache holds; (): all of them.

    Raises:
        BadInput: the share is too small for that.
    """
    heads = tuple((layer, head, 1.0) for layer, head, _ in spared_heads(gates, share, tokens, rest, lengths))
    waiting = max(0, every - 1)
    # what recency alone keeps needs no word; where scores choose, half of the room is theirs
    recent = rest - sinks - waiting if policy.name == "streaming" else (rest - sinks - waiting + 1) // 2
    if recent < 1:
        raise BadInput(f"rest={rest}: give room for {sinks} first tokens, {waiting} new ones and a recent one")
    budget = Budget(rest, sinks=sinks, recent=recent, heads=heads, every=every)
    return policy.within(budget)
