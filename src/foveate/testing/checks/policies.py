"""What every KV policy promises, shown on whole tiny models."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from foveate.core.attach import attach
from foveate.core.budget import Budget
from foveate.core.cache import RaggedLayer
from foveate.core.errors import NotSupported
from foveate.core.mask import Mask
from foveate.core.mechanism import Policy
from foveate.core.policy import Held, Merged
from foveate.core.ragged import EMPTY, SIDES, numbers, tensors_in
from foveate.core.reductions import Reduction
from foveate.core.rows import View, attend
from foveate.testing import tiny
from foveate.testing.checks.running import Broken, check, expect
from foveate.testing.policies import (
    PROMPT,
    STEPS,
    Everything,
    Witness,
    chooses,
    company,
    decoded,
    ids_of,
    left_padded,
    padded_ids,
    positions,
    run,
    run_masked,
    tight,
    whole,
)


def alike(got: Tensor, want: Tensor, where: str, tolerance: float = 2e-4) -> None:
    """Fails unless logits agree, relative to their size."""
    expect(got.shape == want.shape, f"{where}: logits {tuple(got.shape)} instead of {tuple(want.shape)}")
    apart = float(((got - want).abs() / want.abs().amax().clamp_min(1)).nan_to_num(torch.inf).max())
    expect(apart <= tolerance, f"{where}: logits are {apart:.3g} apart (allowed {tolerance:g})")


@check(Policy)
def keeping_everything(m: Policy) -> None:
    """With the whole budget a model says what it says without a policy."""
    if not chooses(m):
        return
    for family in ("llama", "gemma3", "gpt_oss"):
        model, ids, padding = tiny.model(family), ids_of(), left_padded()
        for pad in (None, padding):
            given = ids if pad is None else padded_ids(ids, pad)
            plain = plainly(family, pad is not None)
            for chunks in ((), (7, 20)):
                got = decoded(run(model, given, whole(m), pad, chunks))
                alike(got, plain, f"{family}, {'padded, ' if pad is not None else ''}chunks at {chunks}")


@lru_cache
def plainly(family: str, padded: bool) -> Tensor:
    """What a family says without a policy: the same for all of them."""
    ids, padding = ids_of(), left_padded() if padded else None
    given = ids if padding is None else padded_ids(ids, padding)
    return decoded(run(tiny.model(family), given, None, padding))


@check(Policy)
def budget(m: Policy) -> None:
    """No head ever holds more than the budget says, and what is pinned is there."""
    if "score" not in m.parts:
        return
    model, ids, padding = tiny.model("llama"), ids_of(), left_padded()
    for policy in (tight(m), tight(m, keep=12), tight(m, every=0), tight(m, heads="layer"), tight(m, layers="pyramid")):
        given, b = padded_ids(ids, padding), policy.limits
        calls: list[int] = []

        def look(layers: list[RaggedLayer], b: Budget = b, calls: list = calls) -> None:
            calls.append(layers[0].seen)
            decoding = layers[0].seen > PROMPT
            if b.every == 0 and decoding:
                return
            for n, one in enumerate(layers):
                # as a budget counts, whatever this one says of itself
                allowed = Budget.counts(b, one.real, n, len(layers), 2, 1)
                held = one.store.length
                over = held.sum(1) > allowed.sum(1) if b.heads == "layer" else (held > allowed).any(1)
                expect(not bool(over.any()), f"{b}: layer {n} holds {held.tolist()} of {allowed.tolist()}")
                at = one.store.positions()
                rising = (at[..., 1:] > at[..., :-1]) | (at[..., 1:] == EMPTY)
                expect(bool(rising.all()), f"layer {n}: entries are not in the order of their positions")
                for row in range(len(at)):
                    first, last = one.seen - int(one.real[row]), one.seen
                    for must in (*range(first, first + b.sinks), *range(last - b.recent, last)):
                        there = (at[row] == must).any(-1)
                        expect(bool(there.all()), f"{b}: token {must} is pinned and gone from layer {n}, row {row}")

        run(model, given, policy, padding, chunks=(17,), after=look)
        expect(len(calls) == STEPS + 2, "a call went by unseen")


@check(Policy)
def bytes_held(m: Policy) -> None:
    """The bytes that are reported are those of all tensors that stay, and dropping frees them."""
    model, ids = tiny.model("llama"), ids_of(length=160 + STEPS)

    def look(layers: list[RaggedLayer]) -> None:
        for one in layers:
            found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(one)}
            expect(
                one.bytes_held() == sum(found.values()), f"reports {one.bytes_held()} of {sum(found.values())} bytes"
            )

    run(model, ids, whole(m), after=look)
    less = run(model, ids, tight(m), after=look).reported[-1]
    if m.parts & {"score", "store"}:
        full = run(model, ids, Everything()).reported[-1]
        expect(less < 0.6 * full, f"holds {less} bytes with a budget of 0.4 and {full} with all of it")


def tensors_of(thing: Any, deep: int = 4) -> Iterator[Tensor]:
    """All tensors that an object holds, found without knowing its fields."""
    if isinstance(thing, Tensor):
        yield thing
    elif deep:
        if isinstance(thing, dict):
            thing = tuple(thing.values())
        parts = thing if isinstance(thing, list | tuple) else vars(thing).values() if hasattr(thing, "__dict__") else ()
        for part in parts:
            if not callable(part) or isinstance(part, Tensor):
                yield from tensors_of(part, deep - 1)


@check(Policy)
def row_alone(m: Policy) -> None:
    """A padded row of a batch says and keeps what it does alone, whatever the other rows say."""
    padding, ids = left_padded(), ids_of()
    cut = int((padding[1] == 0).sum())
    kinds = [("llama", tight(m)), ("mistral", tight(m))]
    if "score" in m.parts and isinstance(m.limits.heads, str):
        kinds.append(("llama", tight(m, heads="model")))
    for family, policy in kinds:
        model = tiny.model(family)
        for chunks in ((), (17, 29)):
            both = run(model, padded_ids(ids, padding), policy, padding, chunks)
            alone = run(model, ids[1:, cut:], policy, None, [c - cut for c in chunks])
            where = f"{family}, chunks at {chunks}"
            if policy.limits.heads == "model":
                where += ", all heads compete"
            alike(decoded(both)[1:], decoded(alone), f"{where}: the padded row beside the same row alone")
            shifted = [[[p - cut for p in head] for head in layer[1]] for layer in positions(both)]
            same = shifted == [layer[0] for layer in positions(alone)]
            expect(same, f"{where}: the padded row keeps other tokens than the same row alone")
            first = run(model, ids[:1], policy, None, chunks)
            alike(decoded(both)[:1], decoded(first), f"{where}: the longer row beside the same row alone")
            other = torch.cat([ids_of(seed=7)[:1], ids[1:]])
            beside = run(model, padded_ids(other, padding), policy, padding, chunks)
            alike(decoded(beside)[1:], decoded(both)[1:], f"{where}: another text in the other row")


@check(Policy)
def reads_what_it_holds(m: Policy) -> None:
    """Attention over what is held equals full attention in which all else is masked."""
    if m.parts != {"score"}:
        return
    padding, ids = left_padded(), ids_of()
    for family in ("llama", "gpt_oss", "gemma2"):
        model = tiny.model(family)
        given = padded_ids(ids, padding)
        kept: list[list[Tensor]] = []

        def look(layers: list[RaggedLayer], kept: list = kept) -> None:
            kept.append([one.store.positions() for one in layers])

        got = run(model, given, tight(m), padding, chunks=(23,), after=look)
        want = run_masked(model, given, padding, (23,), kept)
        alike(decoded(got), want, f"{family}: beside a mask over the full cache")


@check(Policy)
def reads_what_it_chose(m: Policy) -> None:
    """Attention over the entries that were chosen equals full attention in which all others are masked."""
    if m.parts != {"read"}:
        return
    padding, ids, chose = left_padded(), ids_of(), False
    for family in ("llama", "gpt_oss", "gemma2"):
        model = tiny.model(family)
        given = padded_ids(ids, padding)
        seen: list[Any] = []
        mine = tight(m)
        got = run(model, given, Witness(mine, seen, mine.limits), padding, chunks=(23,))
        layers = model.config.num_hidden_layers
        calls: list[list[Any]] = [[None] * layers for _ in range(2)]
        for n, (layer, at, room) in enumerate(seen):
            if n % layers == 0:
                calls.append([None] * layers)
            calls[-1][layer] = at
            if at is not None:
                chose = True
                counts = (at != EMPTY).sum(-1)
                expect(bool((counts <= room).all()), f"{family}: reads {counts.tolist()} of {room.tolist()}")
                heads = [[p for p in head if p != EMPTY] for row in at.tolist() for head in row]
                once = [len(head) == len(set(head)) for head in heads]
                expect(all(once), f"{family}: an entry is read twice")
        want = run_masked(model, given, padding, (23,), calls[1:], reading=True)
        alike(decoded(got), want, f"{family}: beside a mask over the full cache")
    expect(chose, "never chose anything: it always reads all")


@check(Policy)
def stored_rows(m: Policy) -> None:
    """What is read back from its storage is near to what was stored, and stays as it is when stored again."""
    if "store" not in m.parts:
        return
    rows = torch.randn(37, 32, generator=torch.Generator().manual_seed(0))
    for dtype, side, layer in itertools.product((torch.float32, torch.bfloat16), SIDES, range(2)):
        given = rows.to(dtype)
        made = m.store(given, 50, side, layer)
        held = sum(t.nbytes for t in tensors_in(made))
        expect(
            held == 50 * m.row_bytes(32, dtype, side, layer), f"50 rows of {side} take {held} bytes, not what it says"
        )
        to = torch.randperm(50, generator=torch.Generator().manual_seed(1))[:37]
        made[to] = given
        back = numbers(made[to])
        expect(back.dtype == dtype, f"{side}: gives {back.dtype} for {dtype}")
        off = float(((back - given).norm(dim=-1) / given.norm(dim=-1)).max())
        expect(off <= 0.12, f"{side}: a row is off by {off:.3g} of its length")
        taken = made[to]
        made[to.flip(0)] = taken[torch.arange(36, -1, -1)]
        expect(bool((numbers(made[to]) == back).all()), "what is moved to another slot is not the same")
        fresh = made.new_empty(20, 32)
        fresh[torch.arange(5)] = back[:5]
        again = numbers(fresh[torch.arange(5)])
        moved = float((again - back[:5]).abs().max() / back.abs().max())
        expect(moved <= 1e-2, f"storing again what was read moves it by {moved:.3g} of the largest number")


@check(Policy)
def alike_entries(m: Policy) -> None:
    """Entries of one key and one value merge into that key and value, and none of their mass is lost or made."""
    if "merge" not in m.parts:
        return
    shape = (2, 2, 24)
    k, v = (torch.randn(2, 2, 1, 8, generator=torch.Generator().manual_seed(n)).expand(*shape, 8) for n in (0, 1))
    view = View(torch.randn(2, 4, 24, 8, generator=torch.Generator().manual_seed(2)), k, v, Mask.causal_of(24))
    position = torch.arange(24).expand(shape).clone()
    position[1, :, :5] = EMPTY
    rows = attend(view, m.needs())
    held = Held(rows, position, torch.zeros(shape), torch.full((2, 2), 9), torch.ones(shape))
    keep = (position < 3) | (position > 17) | m.pinned(held)
    keep &= held.there
    made = m.merge(held, keep)
    for name, got, want in (("keys", made.k, k), ("values", made.v, v)):
        alike(torch.where(keep[..., None], got, want), want, name, 1e-4)
    mass = torch.where(keep, made.mass, 0.0).sum(-1)
    real = held.there.sum(-1)
    expect(bool((mass <= real + 1e-3).all()), f"stands for {mass.tolist()} tokens, there are {real.tolist()}")
    expect(bool((made.mass[keep] >= 1 - 1e-4).all()), "an entry stands for less than itself")


@check(Policy)
def free_slots(m: Policy) -> None:
    """What stands where there is no entry has no influence."""
    model, ids, padding = tiny.model("llama"), ids_of(), left_padded()

    def spoil(layers: list[RaggedLayer]) -> None:
        for one in layers:
            free = one.store.position == EMPTY
            if "store" not in m.parts:
                one.store.keys[free], one.store.values[free] = torch.nan, torch.nan
            one.store.score[free] = torch.nan

    given = padded_ids(ids, padding)
    clean = run(model, given, tight(m), padding, chunks=(17,))
    spoilt = run(model, given, spoilt_by(tight(m)), padding, chunks=(17,), after=spoil)
    alike(decoded(spoilt), decoded(clean), "with NaN where there is no entry", 0.0)


def spoilt_by(m: Policy) -> Policy:
    """The policy, shown NaN where there is no entry."""
    if "score" not in m.parts:
        return m
    cls: Any = dataclass(frozen=True)(type("Spoilt", (Spoilt,), {"card": m.card}))
    return cls(m, m.limits)


@dataclass(frozen=True)
class Spoilt(Policy):
    """A policy that is shown NaN where there is no entry.

    Args:
        inner: The policy.
        budget: Its budget.
    """

    inner: Policy
    budget: Any = 1.0

    @property
    def parts(self) -> frozenset[str]:
        return self.inner.parts

    def needs(self) -> tuple[Reduction, ...]:
        return self.inner.needs()

    def counts(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.inner.counts(*args, **kwargs)

    def merge(self, held: Held, keep: Tensor) -> Merged:
        return self.inner.merge(held, keep)

    def pinned(self, held: Held) -> Tensor:
        return self.inner.pinned(held)

    def score(self, held: Held) -> Tensor:
        gone, view = ~held.there, held.rows.view
        k, v = (t.masked_fill(gone[..., None], torch.nan) for t in (view.k, view.v))
        before = held.before.masked_fill(gone, torch.nan)
        return self.inner.score(replace(held, rows=replace(held.rows, view=replace(view, k=k, v=v)), before=before))


@check(Policy)
def prompts(m: Policy) -> None:
    """Works from a prompt of one token on, shorter than its windows, and gives the same twice."""
    model = tiny.model("llama")
    for prompt in (1, 2, 5, 19):
        ids = ids_of(1, prompt + STEPS)
        for policy in (m, tight(m)):
            one, two = (run(model, ids, policy) for _ in range(2))
            expect(bool(one.logits.isfinite().all()), f"logits after a prompt of {prompt} tokens are not finite")
            expect(positions(one) == positions(two), f"other tokens are kept the second time, prompt of {prompt}")
            alike(two.logits, one.logits, f"the second time, prompt of {prompt} tokens", 0.0)


@check(Policy)
def half_precision(m: Policy) -> None:
    """Works in bfloat16, near to what float32 says."""
    model, ids = tiny.model("llama"), ids_of()
    want = decoded(run(model, ids, whole(m)))
    got = run(model.bfloat16(), ids, tight(m))
    expect(got.layers[0].store.keys.dtype == torch.bfloat16, "keys are not kept in the model's dtype")
    expect(bool(got.logits.isfinite().all()), "logits are not finite")
    if chooses(m):
        alike(decoded(run(model, ids, whole(m))).float(), want, "whole budget in bfloat16", 0.1)


@check(Policy)
def leaves_no_trace(m: Policy) -> None:
    """After leaving, the model computes what it did before, and a compressed cache refuses to be misread."""
    model, ids = tiny.model("llama"), ids_of()
    before = run(model, ids, None).logits
    with torch.no_grad(), attach(model, *company(tight(m))):
        cache = model(input_ids=ids[:, :PROMPT], use_cache=True).past_key_values
    expect(bool((run(model, ids, None).logits == before).all()), "logits differ after leaving")
    try:
        with torch.no_grad():
            model(input_ids=ids[:, PROMPT:], past_key_values=cache, use_cache=True)
    except NotSupported:
        return
    raise Broken("a compressed cache was read by the model's own attention without a word")
