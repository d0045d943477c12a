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
    "half_precision": variant("OnlyFloat32", score=lambda self, held: torch.from_numpy(held.k.numpy()).norm(dim=-1)),
}


def test_the_sound_policy_passes():
    check_mechanism(Sound)


@pytest.mark.parametrize("check", BROKEN)
def test_a_broken_policy_is_caught(check):
    with pytest.raises(CheckFailed, match=check):
        check_mechanism(BROKEN[check], only=[check])


def test_bytes_held_is_caught(monkeypatch):
    monkeypatch.setattr(cache.RaggedLayer, "bytes_held", lambda self: self.store.keys.nbytes + self.store.values.nbytes)
    with pytest.raises(CheckFailed, match="bytes_held"):
        check_mechanism(Sound, only=["bytes_held"])


def test_bytes_that_are_not_freed_are_caught(monkeypatch):
    packed = ragged.Ragged.packed.__func__

    def keeps_room(cls, keys, values, position, score, length, spare=None, *more):
        return packed(cls, keys, values, position, score, length, 200, *more)

    monkeypatch.setattr(ragged.Ragged, "packed", classmethod(keeps_room))
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
