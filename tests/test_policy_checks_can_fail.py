"""Every check of KV policies has a policy, or a cache, that is broken in just that way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from foveate.core import cache, ragged
from foveate.core.budget import Amount, Budget
from foveate.core.card import Card, Needs
from foveate.core.mechanism import Policy
from foveate.core.policy import Merged
from foveate.core.ragged import Packed
from foveate.testing import CheckFailed, check_mechanism, checks_for


@dataclass(frozen=True)
class Sound(Policy):
    """Keeps long keys."""

    budget: Amount = 0.25

    card: ClassVar = Card("a test", 2026, "test", Needs.KEYS, "none", "nothing known", "in tests")

    def score(self, held):
        return torch.where(held.there, held.k.float().norm(dim=-1), 0.0)


def variant(name: str, **methods):
    """`Sound` with other methods."""
    return dataclass(frozen=True)(type(name, (Sound,), {"__doc__": "A test.", "__module__": __name__, **methods}))


@dataclass(frozen=True)
class Reads(Policy):
    """Reads the keys that the token looks at most."""

    budget: Amount = 0.25

    card: ClassVar = Sound.card

    def read(self, reading):
        return reading.best(reading.weights().mean(2))


@dataclass(frozen=True)
class Folds(Policy):
    """The first entry that stays takes the mean of all that go."""

    card: ClassVar = Sound.card

    def merge(self, held, keep):
        mass = torch.ones(held.position.shape) if held.mass is None else held.mass
        first = keep & (keep.cumsum(-1) == 1)
        part = torch.where((held.there & ~keep) | first, mass, 0.0)[..., None]
        total = part.sum(2, keepdim=True)
        k, v = (self.folded(x, first, part, total) for x in (held.k, held.v))
        return Merged(k, v, torch.where(first, total[..., 0], mass))

    def folded(self, x, first, part, total):
        mean = (torch.where(part > 0, x.float(), 0.0) * part).sum(2, keepdim=True) / total
        return torch.where(first[..., None], mean.to(x.dtype), x)


class Halves(Packed):
    """Rows in bfloat16."""

    def __init__(self, rows, dtype):
        self.rows, self.dtype, self.device, self.shape = rows, dtype, rows.device, tuple(rows.shape)

    def new_empty(self, slots, width):
        return type(self)(torch.empty(slots, width, dtype=torch.bfloat16), self.dtype)

    def __getitem__(self, index):
        return type(self)(self.rows[index], self.dtype)

    def __setitem__(self, index, rows):
        self.rows[index] = rows.rows if isinstance(rows, Packed) else rows.bfloat16()

    def dense(self):
        return self.rows.to(self.dtype)


class Signs(Halves):
    """Rows of which only the signs are kept."""

    def dense(self):
        return super().dense().sign()


@dataclass(frozen=True)
class Stores(Policy):
    """Keeps rows in bfloat16."""

    card: ClassVar = Sound.card
    form: ClassVar = Halves

    def store(self, rows, slots, side, layer):
        return self.form(torch.empty(slots, rows.shape[1], dtype=torch.bfloat16), rows.dtype)

    def row_bytes(self, width, dtype, side, layer):
        return width * torch.bfloat16.itemsize


def of(base, name: str, **members):
    """Another sound policy with other members."""
    return dataclass(frozen=True)(type(name, (base,), {"__doc__": "A test.", "__module__": __name__, **members}))


class Generous(Budget):
    """Lets each head hold two entries more."""

    def counts(self, seen, *args):
        return torch.minimum(super().counts(seen, *args) + 2, seen[:, None])


def generous(self, budget):
    mine = Budget.of(budget)
    return type(self)(Generous(**{f: getattr(mine, f) for f in mine.__dataclass_fields__}))


BROKEN = {
    "keeping_everything": variant("IgnoresBudget", within=lambda self, budget: self),
    "budget": variant("Overspends", within=generous),
    "row_alone": variant("CountsRows", score=lambda self, held: -(held.position % (1 + len(held.position))).float()),
    "free_slots": variant(
        "ReadsFreeSlots", score=lambda self, held: held.k.norm(dim=-1) + held.k.sum((2, 3))[..., None]
    ),
    "prompts": variant(
        "WantsTwenty", score=lambda self, held: held.k[:, :, :, 0] - held.k[:, :, :8, 0].topk(6).values[..., -1:]
    ),
    "reads_what_it_chose": of(Reads, "ReadsAll", read=lambda self, reading: None),
    "stored_rows": of(Stores, "KeepsSigns", form=Signs),
    "alike_entries": of(Folds, "AddsUp", folded=lambda self, x, first, part, total: x * (1 + first[..., None])),
    "half_precision": variant("OnlyFloat32", score=lambda self, held: torch.from_numpy(held.k.numpy()).norm(dim=-1)),
}


def test_the_sound_policy_passes():
    check_mechanism(Sound)


@pytest.mark.parametrize(
    ("sound", "check"),
    [(Reads, "reads_what_it_chose"), (Folds, "alike_entries"), (Stores, "stored_rows"), (Folds, "row_alone")],
)
def test_another_sound_policy_passes(sound, check):
    check_mechanism(sound, only=[check])


@pytest.mark.parametrize("check", BROKEN)
def test_a_broken_policy_is_caught(check):
    with pytest.raises(CheckFailed, match=check):
        check_mechanism(BROKEN[check], only=[check])


def test_bytes_held_is_caught(monkeypatch):
    monkeypatch.setattr(cache.RaggedLayer, "bytes_held", lambda self: self.store.keys.nbytes + self.store.values.nbytes)
    with pytest.raises(CheckFailed, match="bytes_held"):
        check_mechanism(Sound, only=["bytes_held"])


def test_bytes_that_are_not_freed_are_caught(monkeypatch):
    laid = ragged.Ragged.laid.__func__

    def keeps_room(cls, keys, values, at, position, score, length, spare=None, *more):
        return laid(cls, keys, values, at, position, score, length, 200, *more)

    monkeypatch.setattr(ragged.Ragged, "laid", classmethod(keeps_room))
    with pytest.raises(CheckFailed, match="bytes_held"):
        check_mechanism(Sound, only=["bytes_held"])


def test_attention_that_misses_an_entry_is_caught(monkeypatch):
    intervals = ragged.Ragged.intervals

    def short(self, mask):
        lo, hi = intervals(self, mask)
        return lo + (hi - lo > 12), hi

    monkeypatch.setattr(ragged.Ragged, "intervals", short)
    monkeypatch.setattr(ragged.Ragged, "kernel_refuses", lambda self, mask: False)
    with pytest.raises(CheckFailed, match="reads_what_it_holds"):
        check_mechanism(Sound, only=["reads_what_it_holds"])


def test_reading_that_misses_an_entry_is_caught(monkeypatch):
    slots = ragged.Ragged.slots

    def short(self, only, mask):
        at, count = slots(self, only, mask)
        return at, count - (count > 8)

    monkeypatch.setattr(ragged.Ragged, "slots", short)
    monkeypatch.setattr(ragged.Ragged, "kernel_refuses", lambda self, mask: False)
    with pytest.raises(CheckFailed, match="reads_what_it_chose"):
        check_mechanism(Reads, only=["reads_what_it_chose"])


@pytest.mark.parametrize(
    "chosen", [lambda best: best[:, :1], lambda best: best + 50, lambda best: best.repeat(1, 1, 2)[..., :-1]]
)
def test_a_choice_that_cannot_be_is_caught(chosen):
    broken = of(Reads, "Wrong", read=lambda self, reading: chosen(Reads.read(self, reading)))
    with pytest.raises(CheckFailed, match="reads_what_it_chose"):
        check_mechanism(broken, only=["reads_what_it_chose"])


def test_storage_that_takes_more_than_it_says_is_caught():
    broken = of(
        Stores, "Understates", row_bytes=lambda self, width, dtype, side, layer: width * (2 if side == "keys" else 1)
    )
    with pytest.raises(CheckFailed, match="50 rows of values take"):
        check_mechanism(broken, only=["stored_rows"])


def test_a_cache_that_anybody_may_read_is_caught(monkeypatch):
    update = cache.RaggedLayer.update

    def open_to_all(self, key_states, value_states, *args):
        owner, self.owner = self.owner, lambda: self
        try:
            return update(self, key_states, value_states)
        finally:
            self.owner = owner

    monkeypatch.setattr(cache.RaggedLayer, "update", open_to_all)
    with pytest.raises(CheckFailed, match="leaves_no_trace"):
        check_mechanism(Sound, only=["leaves_no_trace"])


def test_every_check_of_policies_has_one():
    general = {"form", "bounds"}
    ours = {"bytes_held", "reads_what_it_holds", "leaves_no_trace"}
    assert set(checks_for(Policy)) == general | set(BROKEN) | ours
