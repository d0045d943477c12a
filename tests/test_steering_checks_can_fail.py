"""Every check of edits of the residual stream, of experts and of prompts has one that is broken in just that way."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from foveate.core import attach
from foveate.core.card import Card, Needs
from foveate.core.errors import BadInput
from foveate.core.mechanism import ExpertEdit, Mechanism, PromptEdit, ResidualEdit
from foveate.core.params import bounded
from foveate.core.places import Span, some_spans
from foveate.testing import CheckFailed, check_mechanism, checks_for

BROKEN: list[tuple[str, type[Mechanism]]] = []
CARD = Card("a test", 2026, "test", Needs.MODEL, "none", "nothing known", "in tests")


def breaks(check: str) -> Callable[[type], type]:
    """Marks a mechanism as one that this check must catch."""

    def note(cls: type) -> type:
        BROKEN.append((check, cls))
        return cls

    return note


# ---------------------------------------------------------------- sound ones, which the broken ones vary


class Residual(ResidualEdit):
    """Turns the residual stream a little."""

    card: ClassVar = CARD

    def edit(self, stream):
        return self.turned(stream.hidden)

    def turned(self, hidden):
        return hidden + 0.5 * hidden.roll(1, -1)


@dataclass(frozen=True)
class SoundResidual(Residual):
    """Turns the tokens of a span."""

    by: float = bounded(0.5, -2.0, 2.0)
    span: tuple[Span, ...] = some_spans(none="tokens 2 to 8")
    identity: ClassVar = {"by": 0.0}
    test_params: ClassVar = ({}, {"by": 0.0}, {"span": ((0, 3), (4, 8))})

    def edit(self, stream):
        edges = torch.tensor(self.span or ((2, 9),))
        inside = (stream.place >= edges[:, :1]) & (stream.place < edges[:, 1:]) & stream.real
        return torch.where(inside[..., None], stream.hidden + self.by * stream.hidden.roll(1, -1), stream.hidden)


class Expert(ExpertEdit):
    """Weighs experts anew."""

    card: ClassVar = CARD

    def edit(self, layer, logits):
        return self.by_number(logits)

    def by_number(self, logits):
        return logits + 2.0 * (torch.arange(logits.shape[-1]) == 1)


@dataclass(frozen=True)
class SoundExpert(Expert):
    """Adds something to the second expert."""

    by: float = bounded(2.0, -9.0, 9.0)
    identity: ClassVar = {"by": 0.0}
    test_params: ClassVar = ({}, {"by": -3.0}, {"by": 0.0})

    def edit(self, layer, logits):
        return logits + self.by * (torch.arange(logits.shape[-1]) == 1)


class Prompt(PromptEdit):
    """Puts a line in front."""

    card: ClassVar = CARD

    def edit(self, text):
        if not text.strip():
            raise BadInput("no text")
        return f"Think first.\n{text}"


@dataclass(frozen=True)
class SoundPrompt(Prompt):
    """Puts lines in front."""

    lines: int = bounded(1, 0, 3)
    identity: ClassVar = {"lines": 0}
    test_params: ClassVar = ({}, {"lines": 0}, {"lines": 2})

    def edit(self, text):
        if not text.strip():
            raise BadInput("no text")
        return self.lines * "Think first.\n" + text


SOUND = (SoundResidual, SoundExpert, SoundPrompt)


@pytest.mark.parametrize(("cls", "check"), [(c, n) for c in SOUND for n in checks_for(c)])
def test_sound_mechanisms_pass(cls: type[Mechanism], check: str) -> None:
    assert check_mechanism(cls, only=[check]) == [check]


# ---------------------------------------------------------------- of themselves


@breaks("form")
@dataclass(frozen=True)
class NoCard(ResidualEdit):
    """Has no card."""


@breaks("form")
class NoDataclass(Expert):
    """Is no dataclass."""


@breaks("form")
@dataclass(frozen=True)
class NoDocstring(Prompt):
    __doc__ = ""


class NoBounds:
    """Declares bounds and does not look at them."""

    def __post_init__(self):
        pass


@breaks("bounds")
@dataclass(frozen=True)
class ResidualBoundsOnPaper(NoBounds, Residual):
    """Takes anything."""

    by: float = bounded(0.5, 0.0, 1.0)


@breaks("bounds")
@dataclass(frozen=True)
class ExpertBoundsOnPaper(NoBounds, Expert):
    """Takes anything."""

    by: float = bounded(0.5, 0.0, 1.0)


@breaks("bounds")
@dataclass(frozen=True)
class PromptBoundsOnPaper(NoBounds, Prompt):
    """Takes anything."""

    times: int = bounded(1, 0, 3)


# ---------------------------------------------------------------- the method by itself


@breaks("gradients")
@dataclass(frozen=True)
class CutsGradients(Residual):
    """Is a constant to its gradient."""

    def turned(self, hidden):
        return hidden.detach() * 2 - hidden


@breaks("gradients")
@dataclass(frozen=True)
class SteepRoot(Residual):
    """Has an infinite slope at nothing."""

    def turned(self, hidden):
        return hidden + (hidden - hidden).abs().sqrt()


@breaks("poison")
@dataclass(frozen=True)
class ReadsPadding(Residual):
    """Takes the mean of what may be padding away, times nothing."""

    def turned(self, hidden):
        return hidden - 0 * hidden.mean(1, keepdim=True)


@breaks("dtypes")
@dataclass(frozen=True)
class OneDtype(Residual):
    """Can read float32 only."""

    def turned(self, hidden):
        return torch.from_numpy(2 * hidden.numpy())


@breaks("dtypes")
@dataclass(frozen=True)
class OneDtypeOfExperts(Expert):
    """Can read float32 only."""

    def by_number(self, logits):
        return torch.from_numpy(2 * logits.numpy())


@breaks("repeatable")
@dataclass(frozen=True)
class Dice(Residual):
    """Adds noise."""

    def turned(self, hidden):
        return hidden + 0.01 * torch.randn(hidden.shape)


@breaks("repeatable")
@dataclass(frozen=True)
class DiceOfExperts(Expert):
    """Adds noise."""

    def by_number(self, logits):
        return logits + torch.randn(logits.shape)


@breaks("repeatable")
@dataclass(frozen=True)
class CountsCalls(Prompt):
    """Says how often it was asked."""

    calls: ClassVar = itertools.count()

    def edit(self, text):
        return f"{next(self.calls)}. {text}"


# ---------------------------------------------------------------- on models


@breaks("identity")
@dataclass(frozen=True)
class NotTheIdentity(Residual):
    """Declares a setting at which it does something."""

    by: float = bounded(0.5, 0.0, 1.0)
    identity: ClassVar = {"by": 0.0}


@breaks("identity")
@dataclass(frozen=True)
class NotTheIdentityOfExperts(Expert):
    """Declares a setting at which it does something."""

    by: float = bounded(0.5, 0.0, 1.0)
    identity: ClassVar = {"by": 0.0}


@breaks("identity")
@dataclass(frozen=True)
class NotTheIdentityOfPrompts(Prompt):
    """Declares a setting at which it does something."""

    lines: int = bounded(1, 0, 3)
    identity: ClassVar = {"lines": 0}


@breaks("landing")
@breaks("trial")
@dataclass(frozen=True)
class NeverLands(Residual):
    """Edits a copy."""

    def turned(self, hidden):
        hidden.clone().mul_(2)
        return hidden


@breaks("trial")
@dataclass(frozen=True)
class EditsACopy(Expert):
    """Edits a copy."""

    def by_number(self, logits):
        logits.clone().mul_(2)
        return logits


@breaks("landing")
@dataclass(frozen=True)
class NeverLandsOnExperts(Expert):
    """Adds the same to all experts, of which a softmax knows nothing."""

    def by_number(self, logits):
        return logits + 1


@breaks("landing")
@dataclass(frozen=True)
class NeverLandsOnPrompts(Prompt):
    """Gives back what it got."""

    def edit(self, text):
        return text


@breaks("detaching")
@dataclass(frozen=True)
class GrowsWithoutEnd(Residual):
    """Gives numbers that are none."""

    def turned(self, hidden):
        return hidden * 1e30 * 1e30


@breaks("detaching")
@dataclass(frozen=True)
class AllExpertsOff(Expert):
    """Switches all experts off."""

    def by_number(self, logits):
        return torch.full_like(logits, -torch.inf)


@breaks("padding")
@breaks("on_models")
@dataclass(frozen=True)
class CountsRows(Residual):
    """Counts tokens from the first row of the call, padding included."""

    def edit(self, stream):
        first = (torch.arange(stream.hidden.shape[1]) < 3)[:, None]
        return torch.where(first, self.turned(stream.hidden), stream.hidden)


@breaks("padding")
@breaks("batch")
@breaks("chunks")
@breaks("on_models")
@dataclass(frozen=True)
class CountsTokens(Expert):
    """Goes by the number of tokens of the whole batch."""

    def by_number(self, logits):
        return logits * (1 + len(logits) / 20)


@breaks("batch")
@dataclass(frozen=True)
class MixesTexts(Residual):
    """Takes the mean over the batch."""

    def turned(self, hidden):
        return hidden - 0.5 * hidden.mean(0, keepdim=True)


@breaks("chunks")
@breaks("decode")
@dataclass(frozen=True)
class LooksAround(Residual):
    """Takes the mean over the rows of the call."""

    def turned(self, hidden):
        return hidden - 0.5 * hidden.mean(1, keepdim=True)


@breaks("decode")
@dataclass(frozen=True)
class OnlyPrefill(Expert):
    """Acts on long calls only."""

    def by_number(self, logits):
        return super().by_number(logits) if len(logits) > 4 else logits


# ---------------------------------------------------------------- prompts


@breaks("keeps_text")
@dataclass(frozen=True)
class Tidies(Prompt):
    """Loses the blanks at the ends."""

    def edit(self, text):
        return f"{text.strip()} Think first."


@breaks("keeps_text")
@dataclass(frozen=True)
class NoText(Prompt):
    """Gives a list of texts."""

    def edit(self, text):
        return [text, text]


@breaks("empty_text")
@dataclass(frozen=True)
class TakesAnything(Prompt):
    """Makes a prompt of nothing."""

    def edit(self, text):
        return f"Think first.\n{text}"


# ---------------------------------------------------------------- they are caught


@pytest.mark.parametrize(("check", "cls"), BROKEN, ids=[f"{c}-{m.__name__}" for c, m in BROKEN])
def test_broken_mechanisms_are_caught(check: str, cls: type[Mechanism]) -> None:
    with pytest.raises(CheckFailed) as caught:
        check_mechanism(cls, only=[check])
    assert cls.__name__ in str(caught.value)
    assert repr(check) in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "check"), [(k, c) for k in (ResidualEdit, ExpertEdit, PromptEdit) for c in checks_for(k)]
)
def test_every_check_has_been_seen_to_fail(kind: type[Mechanism], check: str) -> None:
    assert [cls for name, cls in BROKEN if name == check and issubclass(cls, kind)]


@pytest.mark.parametrize("cls", [SoundResidual, SoundExpert])
def test_what_stays_on_the_model_is_caught(cls: type[Mechanism], monkeypatch: pytest.MonkeyPatch) -> None:
    right = attach.hooks

    def forgets(attached):
        yield from list(right(attached))[1:]

    monkeypatch.setattr(attach, "hooks", forgets)
    with pytest.raises(CheckFailed, match="leaves something on"):
        check_mechanism(cls, only=["detaching"])
