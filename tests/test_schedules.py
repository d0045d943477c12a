"""Orders in which attention is computed: that every check which only they pass can fail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from foveate.core import tiled, traffic
from foveate.core.card import Card, Needs
from foveate.core.mechanism import Schedule
from foveate.core.rows import View
from foveate.core.traffic import Shape, Traffic
from foveate.testing import CheckFailed, check_mechanism
from foveate.testing.checks import CHECKS


@dataclass(frozen=True)
class Sound(Schedule):
    """Tiles, as they come."""

    card: ClassVar = Card("a test", 2026, "exact", Needs.KEYS, "none", "nothing known", "in tests")

    def refuses(self, view: View) -> str:
        return tiled.refuses(view)

    def run(self, view: View) -> tuple[torch.Tensor, torch.Tensor]:
        return tiled.attend(view)

    def traffic(self, shape: Shape, fast: int) -> Traffic:
        return traffic.tiled(shape, fast)


@dataclass(frozen=True)
class Unscaled(Sound):
    """Forgets the scale of the call."""

    def run(self, view: View) -> tuple[torch.Tensor, torch.Tensor]:
        return tiled.attend(View(view.q, view.k, view.v, view.mask, scale=2 * view.scale))


@dataclass(frozen=True)
class NoNormaliser(Sound):
    """Gives the logarithm of a sum that it never took."""

    def run(self, view: View) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = tiled.attend(view)
        return out, lse - 0.01


@dataclass(frozen=True)
class Idle(Sound):
    """Leaves everything to others."""

    def refuses(self, view: View) -> str:
        return "not today"


@dataclass(frozen=True)
class Forgetful(Sound):
    """Does not read the values."""

    def traffic(self, shape: Shape, fast: int) -> Traffic:
        moved = super().traffic(shape, fast)
        return Traffic(shape.inputs() - shape.kv_heads * shape.keys * shape.dim, moved.written, moved.terms)


@dataclass(frozen=True)
class Secretive(Sound):
    """Never writes its last output."""

    def traffic(self, shape: Shape, fast: int) -> Traffic:
        moved = super().traffic(shape, fast)
        return Traffic(moved.read, moved.written - 1, moved.terms)


@dataclass(frozen=True)
class Wasteful(Sound):
    """Reads the whole fast memory in, once more."""

    def traffic(self, shape: Shape, fast: int) -> Traffic:
        moved = super().traffic(shape, fast)
        return Traffic(moved.read + fast, moved.written, moved.terms)


BREAKS: dict[str, dict[type[Sound], str]] = {
    "stands": {
        Unscaled: "head outputs is",
        NoNormaliser: "lse is",
        Idle: "it refuses all of causal, full.*: not today",
    },
    "accounts": {
        Forgetful: r"numbers read, the inputs are",
        Secretive: r"written, the outputs are",
        Wasteful: r"of fast memory, \d+ with",
    },
}


@pytest.mark.parametrize(("check", "cls"), [(check, cls) for check, broken in BREAKS.items() for cls in broken])
def test_checks_can_fail(check: str, cls: Any) -> None:
    with pytest.raises(CheckFailed, match=rf"check '{check}': .*{BREAKS[check][cls]}"):
        check_mechanism(cls, only=[check])


def test_every_check_has_its_breaker() -> None:
    assert {name for name, check in CHECKS.items() if check.kinds == (Schedule,)} == set(BREAKS)
    assert check_mechanism(Sound, only=list(BREAKS)) == list(BREAKS)
