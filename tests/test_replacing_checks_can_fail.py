"""Every check of rules and mixers has one that is broken in just that way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from foveate.core import converting, standing
from foveate.core.card import Card, Needs
from foveate.core.mechanism import Mechanism
from foveate.core.mixer import Mixer
from foveate.core.params import bounded
from foveate.core.recurrence import Recurrence
from foveate.core.rule import Rule
from foveate.replace import Relu
from foveate.testing import CheckFailed, check_mechanism, checks_for

BROKEN: list[tuple[str, type[Mechanism]]] = []
CARD = Card("a test", 2026, "test", Needs.QUERIES | Needs.KEYS | Needs.VALUES, "none", "nothing known", "in tests")


def breaks(*checks: str) -> Callable[[type], type]:
    """Marks a mechanism as one that these checks must catch."""

    def note(cls: type) -> type:
        BROKEN.extend((check, cls) for check in checks)
        return cls

    return note


# ---------------------------------------------------------------- sound ones, which the broken ones vary


class Temperatures(torch.nn.Module):
    """A number per head."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.log = torch.nn.Parameter(torch.zeros(heads))


class SoundRule(Rule):
    """A learned temperature per head, and values that know their input."""

    card: ClassVar = CARD

    def learned(self, sizes):
        return Temperatures(sizes.heads)

    def write(self, learned, v, hidden):
        return v * (1 + 0.1 * torch.tanh(hidden.mean(-1)))[:, None, :, None]

    def prepare(self, view):
        return replace(view, q=self.turned(view, view.q * view.learned.log.exp()[:, None, None].to(view.q)))

    def turned(self, view, q):
        return q


@dataclass(frozen=True)
class Sharp(Rule):
    """Scores times a factor."""

    by: float = bounded(2.0, 0.5, 4.0)
    card: ClassVar = CARD
    identity: ClassVar = {"by": 1.0}

    def prepare(self, view):
        return replace(view, scale=view.scale * self.by)


class Running(torch.nn.Module):
    """The mean of what came so far, through a matrix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, tokens: Any, state: Any) -> tuple[Tensor, Any]:
        x = self.own(tokens.x) * tokens.real[..., None].to(tokens.x.dtype)
        before = state or {"sum": x.new_zeros(len(x), 1, x.shape[2]), "count": x.new_zeros(len(x), 1, 1)}
        total = before["sum"] + x.cumsum(1)
        count = before["count"] + tokens.real[..., None].to(x.dtype).cumsum(1)
        new = None if state is None else {"sum": total[:, -1:], "count": count[:, -1:]}
        return (total / count.clamp_min(1)) @ self.weight, new

    def own(self, x: Tensor) -> Tensor:
        return x


class SoundMixer(Mixer):
    """The mean of what came so far."""

    card: ClassVar = CARD

    def module(self, sizes):
        return Running(sizes.width)


@dataclass(frozen=True)
class Temperature(SoundRule):
    """Sound."""


@dataclass(frozen=True)
class Mean(SoundMixer):
    """Sound."""


class SoundRecurrence(Recurrence):
    """Positive features with a decay and a learned factor, by the sum of the weights."""

    normalised: ClassVar[bool] = True
    card: ClassVar = CARD

    def learned(self, sizes):
        made = torch.nn.Module()
        made.factor = torch.nn.Parameter(torch.ones(sizes.head_dim))
        return made

    def queries(self, heads):
        return torch.nn.functional.softplus(heads.q * heads.learned.factor)

    def keys(self, heads):
        return torch.nn.functional.softplus(heads.k)

    def decay(self, heads):
        return torch.full((1, heads.k.shape[1], 1, 1), -0.1, dtype=heads.k.dtype)


@dataclass(frozen=True)
class Fading(SoundRecurrence):
    """Sound."""


def mixing(forward: Callable) -> Callable[[type], type]:
    """Gives a mixer's module another forward."""

    def note(cls: type) -> type:
        made = type(f"{cls.__name__}Module", (Running,), {"forward": forward})
        cls.module = lambda self, sizes: made(sizes.width)
        return cls

    return note


# ---------------------------------------------------------------- broken rules


@breaks("form")
class NoDataclass(SoundRule):
    """No frozen dataclass."""


@breaks("bounds")
@dataclass(frozen=True)
class Unbounded(Sharp):
    """Takes any factor."""

    def __post_init__(self) -> None:
        pass


@breaks("reference", "chunks", "decode", "padding")
@dataclass(frozen=True)
class ByBlock(SoundRule):
    """Scores depend on where in its block a row stands."""

    def score(self, block):
        s = super().score(block)
        return s * (1 + torch.arange(s.shape[2])[:, None] / 10)


@breaks("gradients")
@dataclass(frozen=True)
class Detached(SoundRule):
    """Nothing flows back to the keys."""

    def prepare(self, view):
        return replace(super().prepare(view), k=view.k.detach())


@breaks("repeatable", "steady")
@dataclass(frozen=True)
class Dice(SoundRule):
    """Throws dice outside of training."""

    def turned(self, view, q):
        return q * torch.rand(())


@breaks("grouped")
@dataclass(frozen=True)
class FirstGroup(SoundRule):
    """Looks at how many key-value heads there are."""

    def turned(self, view, q):
        return q * view.kv_heads


@breaks("dtypes", "narrow")
@dataclass(frozen=True)
class Coarse(SoundRule):
    """Rounds queries of half precision to whole numbers."""

    def turned(self, view, q):
        return q if q.dtype != torch.bfloat16 else q.round()


@breaks("identity")
@dataclass(frozen=True)
class NotTheIdentity(Sharp):
    """Says that it changes nothing at 1, and doubles."""

    def prepare(self, view):
        return replace(view, scale=view.scale * self.by * 2)


@breaks("batch", "alone")
@dataclass(frozen=True)
class Company(SoundRule):
    """Looks at the other texts of the batch."""

    def turned(self, view, q):
        real = torch.where(view.mask.rows[:, None, :, None], q, 0.0)
        return q * (1 + real.abs().sum() / 100)


@breaks("causal", "order")
@dataclass(frozen=True)
class Prophet(SoundRule):
    """Looks at the last key."""

    def turned(self, view, q):
        return q + view.k[:, :, -1:].repeat_interleave(view.grouped, 1)


@breaks("poison")
@dataclass(frozen=True)
class Tasting(SoundRule):
    """Adds what stands in keys that nobody may see, times zero."""

    def turned(self, view, q):
        return q + 0 * view.k.sum()


@breaks("lengths", "short")
@dataclass(frozen=True)
class Lonely(SoundRule):
    """Divides by nothing at the first token."""

    def turned(self, view, q):
        return q / torch.where(view.mask.place == 0, 0.0, 1.0)[:, None, :, None]


@breaks("remembers", "converts")
@dataclass(frozen=True)
class Forgetful(SoundRule):
    """Scales by the number of queries of the call."""

    def turned(self, view, q):
        return q / view.queries


@breaks("trains")
@dataclass(frozen=True)
class Idle(SoundRule):
    """Has a parameter that does nothing."""

    def prepare(self, view):
        return view


# ---------------------------------------------------------------- broken mixers


@breaks("form")
class NoMixerDataclass(SoundMixer):
    """No frozen dataclass."""


@breaks("bounds")
@dataclass(frozen=True)
class UnboundedMixer(SoundMixer):
    """Takes any width."""

    width: int = bounded(2, 1, 4)

    def __post_init__(self) -> None:
        pass


@breaks("identity")
@dataclass(frozen=True)
class Pretender(SoundMixer):
    """Says that it can be attention."""

    identity: ClassVar = {}


@breaks("alone")
@mixing(lambda self, tokens, state: (tokens.x.cumsum(1) / (1 + torch.arange(tokens.x.shape[1]))[:, None], state))
@dataclass(frozen=True)
class CountsPads(SoundMixer):
    """Takes padding for tokens."""


@breaks("remembers", "converts")
@mixing(lambda self, tokens, state: (Running.forward(self, tokens, None)[0], {}))
@dataclass(frozen=True)
class NoMemory(SoundMixer):
    """Begins anew at each call."""


@breaks("order")
@mixing(lambda self, tokens, state: (tokens.x @ self.weight + tokens.x.mean(1, keepdim=True), state))
@dataclass(frozen=True)
class Foresight(SoundMixer):
    """Looks at the whole text."""


@breaks("short")
@mixing(lambda self, tokens, state: (tokens.x @ self.weight / (tokens.x.shape[1] - 1), state))
@dataclass(frozen=True)
class NeedsTwo(SoundMixer):
    """Gives nothing finite for one token."""


@breaks("trains")
@mixing(lambda self, tokens, state: (tokens.x @ self.weight.detach(), state))
@dataclass(frozen=True)
class Frozen(SoundMixer):
    """Does not learn."""


@breaks("narrow")
@mixing(
    lambda self, tokens, state: (
        (tokens.x * 3).round() @ self.weight if tokens.x.dtype == torch.bfloat16 else tokens.x * 3 @ self.weight,
        state,
    )
)
@dataclass(frozen=True)
class CoarseMixer(SoundMixer):
    """Rounds inputs of half precision."""


@breaks("steady")
@mixing(lambda self, tokens, state: (tokens.x * torch.rand(()) @ self.weight, state))
@dataclass(frozen=True)
class DiceMixer(SoundMixer):
    """Throws dice outside of training."""


# ---------------------------------------------------------------- they are caught


# ---------------------------------------------------------------- broken recurrences


@breaks("form")
class NoRecurrenceDataclass(SoundRecurrence):
    """No frozen dataclass."""


@breaks("bounds")
@dataclass(frozen=True)
class UnboundedRecurrence(SoundRecurrence):
    """Takes any factor."""

    by: float = bounded(1.0, 0.5, 4.0)

    def __post_init__(self) -> None:
        pass


@breaks("alone")
@dataclass(frozen=True)
class WritesPadding(SoundRecurrence):
    """Takes padding for text."""

    def scan(self, heads, first=True):
        return replace(super().scan(heads, first), real=None)


@breaks("remembers", "converts")
@dataclass(frozen=True)
class LosesState(SoundRecurrence):
    """Begins anew with each call."""

    def flow(self, heads, state, form="auto"):
        return super().flow(heads, None, form)


@breaks("order")
@dataclass(frozen=True)
class ReadsAhead(SoundRecurrence):
    """Lets all tokens see all others."""

    def scan(self, heads, first=True):
        return replace(super().scan(heads, first), causal=False)


@breaks("short")
@dataclass(frozen=True)
class NothingAlone(SoundRecurrence):
    """Divides by the spread of the queries over time, which one token has not."""

    def queries(self, heads):
        return super().queries(heads) / heads.q.std(2, keepdim=True)


@breaks("trains")
@dataclass(frozen=True)
class CutOff(SoundRecurrence):
    """Lets no gradient through to its factor."""

    def queries(self, heads):
        return super().queries(replace(heads, q=heads.q.detach()))


@breaks("narrow")
@dataclass(frozen=True)
class CoarseRecurrence(SoundRecurrence):
    """Adds what bfloat16 cannot hold."""

    def values(self, heads):
        return heads.v + 300.0 - 300.0 + (heads.v + 1000.0) - 1000.0


@breaks("steady")
@dataclass(frozen=True)
class DiceRecurrence(SoundRecurrence):
    """Draws its decay."""

    def decay(self, heads):
        return -torch.rand(1, heads.k.shape[1], 1, 1, dtype=heads.k.dtype)


@breaks("forms")
@dataclass(frozen=True)
class ShortStep(SoundRecurrence):
    """Takes another way token by token."""

    def flow(self, heads, state, form="auto"):
        out, after = super().flow(heads, state, form)
        return (out * 1.01 if form == "recurrent" else out), after


@breaks("forms")
@dataclass(frozen=True)
class Growing(SoundRecurrence):
    """Keeps all keys, too."""

    def flow(self, heads, state, form="auto"):
        out, after = super().flow(heads, state, form)
        return out, after | {"keys": heads.k}


@pytest.mark.parametrize(("check", "cls"), BROKEN, ids=[f"{c}-{m.__name__}" for c, m in BROKEN])
def test_broken_operators_are_caught(check: str, cls: type[Mechanism]) -> None:
    with pytest.raises(CheckFailed) as caught:
        check_mechanism(cls, only=[check])
    assert cls.__name__ in str(caught.value)
    assert repr(check) in str(caught.value)


# broken in the code around operators, below
AROUND = {"says_what_it_is", "whose_cache"}


@pytest.mark.parametrize(
    ("kind", "check"), [(k, c) for k in (Rule, Recurrence, Mixer) for c in checks_for(k) if c not in AROUND]
)
def test_every_check_has_been_seen_to_fail(kind: type[Mechanism], check: str) -> None:
    assert [cls for name, cls in BROKEN if name == check and issubclass(cls, kind)]


@pytest.mark.parametrize("cls", [Temperature, Sharp, Mean, Fading])
def test_sound_ones_pass(cls: type[Mechanism]) -> None:
    assert check_mechanism(cls) == checks_for(cls)


@pytest.mark.parametrize("cls", [Temperature, Mean, Fading])
def test_a_state_dict_that_fits_everybody_is_caught(cls: type[Mechanism], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing.Standing, "set_extra_state", lambda self, state: None)
    with pytest.raises(CheckFailed, match="says_what_it_is"):
        check_mechanism(cls, only=["says_what_it_is"])


def test_a_cache_that_everybody_reads_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.nn.use_cache", lambda cache, index, operator: None)
    with pytest.raises(CheckFailed, match="whose_cache"):
        check_mechanism(Temperature, only=["whose_cache"])


def test_a_state_that_is_taken_for_keys_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing.StateLayer, "update", lambda self, k, v, *args, **options: (k, v))
    monkeypatch.setattr(standing.StateLayer, "get_seq_length", lambda self: 0)
    with pytest.raises(CheckFailed, match="whose_cache"):
        check_mechanism(Mean, only=["whose_cache"])


def test_a_state_that_anybody_reads_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.nn.use_cache", lambda cache, index, operator: None)
    monkeypatch.setattr(standing.StateLayer, "get_seq_length", lambda self: 0)
    with pytest.raises(CheckFailed, match="whose_cache"):
        check_mechanism(Fading, only=["whose_cache"])


def test_a_model_whose_rule_is_lost_on_the_way_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converting, "record", lambda model: [])
    with pytest.raises(CheckFailed, match="converts"):
        check_mechanism(Relu, only=["converts"])
