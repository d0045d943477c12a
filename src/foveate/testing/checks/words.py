"""What a mechanism says of itself: its form, its bounds, what it needs."""

from __future__ import annotations

import dataclasses
import re
import sys
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from foveate.core.card import BLANK, Card, Needs
from foveate.core.errors import BadInput, BadParameter
from foveate.core.mechanism import Edit, Mechanism, Metric
from foveate.core.params import bounds_of
from foveate.core.reductions import Reduction
from foveate.core.rows import View
from foveate.testing import views
from foveate.testing.checks.measuring import grid, measured, numbers, output, same
from foveate.testing.checks.running import ALL, Broken, annotations_off, check, expect


@check(*ALL)
def form(m: Mechanism) -> None:
    """A frozen dataclass with a docstring and a full card; labels begin with its name."""
    cls = type(m)
    expect(dataclasses.is_dataclass(cls) and "__dataclass_params__" in vars(cls), "is no dataclass of its own")
    expect(vars(cls)["__dataclass_params__"].frozen, "is not frozen: state belongs into what `start` returns")
    expect(bool((cls.__doc__ or "").strip()) and not cls.__doc__.startswith(f"{cls.__name__}("), "has no docstring")
    expect(isinstance(getattr(cls, "card", None), Card), "has no card")
    missing = still_to_write(cls)
    expect(not missing, f"still to write: {'; '.join(missing)}")
    expect(bool(cls.card.needs), "card.needs is empty: say what it reads")
    if isinstance(m, Metric):
        for _, view in grid(m, ["causal", "cross"]):
            wrong = [label for label in measured(m, [view]) if not label.startswith(m.name)]
            expect(not wrong, f"labels {wrong} do not begin with {m.name!r}")


def still_to_write(cls: type[Mechanism]) -> list[str]:
    """What `foveate new` left open and nobody has filled in, and what is missing from the card."""
    module = sys.modules.get(cls.__module__)
    texts = {f"card.{f.name}": getattr(cls.card, f.name) for f in dataclasses.fields(Card)}
    texts |= {"the class's docstring": cls.__doc__, "the module's docstring": module and module.__doc__}
    found = []
    for where, text in texts.items():
        hints = re.findall(f"(?i){BLANK}: ([^\n]+)", text) if isinstance(text, str) else []
        found += [f"{where} ({hint.rstrip('.')})" for hint in hints]
    if not 1900 < cls.card.year < 2100:
        found.append(f"card.year (it is {cls.card.year})")
    return found


@check(*ALL)
def bounds(m: Mechanism) -> None:
    """Values outside of the declared bounds raise `BadParameter`."""
    for name, (default, declared) in bounds_of(type(m)).items():
        for bad in declared.wrong(default) if declared else ():
            try:
                with annotations_off():
                    replace(m, **{name: bad})
            except BadParameter as error:
                expect(name in str(error), f"{name}={bad!r} is refused without naming {name}: {error}")
            except Exception as error:
                raise Broken(f"{name}={bad!r} raises {type(error).__name__}, not BadParameter: {error}") from error
            else:
                raise Broken(f"{name}={bad!r} is accepted; allowed is {declared}")


@check(Metric, Edit)
def declares(m: Metric | Edit) -> None:
    """It names each reduction that it reads, and none that it does not."""
    calls = list(grid(m, ["long", "causal", "empty_rows", "cross"]))
    for _, view in calls:
        numbers(m, view)
    for r in m.needs():
        expect(any(stumbles(m, r, view) for _, view in calls), f"declares {r} in `needs` and never reads it")


def stumbles(m: Metric | Edit, r: Reduction, view: View) -> bool:
    """Whether it fails when one of its reductions is missing."""
    try:
        if isinstance(m, Metric):
            measured(m, [view], without=r)
        else:
            output(Without(m, r), view)
    except (BadInput, KeyError):
        return True
    return False


@dataclass(frozen=True)
class Without(Edit):
    """An edit that is not told one of the facts that it asked for."""

    inner: Edit
    missing: Reduction

    def needs(self) -> tuple[Reduction, ...]:
        return tuple(r for r in self.inner.needs() if r != self.missing)

    def edit_scores(self, block: Any, scores: Tensor) -> Tensor:
        return self.inner.edit_scores(block, scores)

    def edit(self, block: Any, weights: Tensor) -> Tensor:
        return self.inner.edit(block, weights)


@check(Metric)
def card_needs(m: Metric) -> None:
    """What the card does not name has no influence: values, tokens, weights of the model."""
    other = views.view("causal", seed=1)
    for name, view in grid(m, ["causal", "odd_length"]):
        plain = measured(m, [view])
        assert view.tokens is not None
        assert other.projection is not None
        if not m.card.needs & Needs.VALUES:
            same(
                measured(m, [replace(view, v=view.v.flip(2) + 1)]),
                plain,
                f"{name}: card.needs has no VALUES, they matter",
            )
        if not m.card.needs & Needs.TOKENS:
            changed = replace(view, tokens=view.tokens // 2)
            same(measured(m, [changed]), plain, f"{name}: card.needs has no TOKENS, they matter")
        if not m.card.needs & Needs.MODEL:
            changed = replace(view, projection=other.projection * 2)
            same(measured(m, [changed]), plain, f"{name}: card.needs has no MODEL, the projection matters")
