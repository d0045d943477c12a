"""Those that act: they land, do nothing where they say so, and nothing of them remains."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveate.core.attach import attach
from foveate.core.mechanism import Edit, ExpertEdit, HeadEdit, Mechanism, Metric, Pattern, Visits
from foveate.core.rows import Rows
from foveate.core.rows import attend as attend_rows
from foveate.core.rule import Rule
from foveate.testing import tiny, views
from foveate.testing.checks.measuring import acted, grid, output, same
from foveate.testing.checks.running import ACTING, ATTACHED, INSIDE, Skip, check, expect


@check(*ACTING, Rule)
def identity(m: Mechanism) -> None:
    """At the declared setting it changes nothing."""
    if m.identity is None:
        raise Skip("it declares no `identity`, a setting at which it changes nothing")
    nothing = replace(m, **m.identity)
    for name, view in grid(m, views.situations(without="long bfloat16")):
        found = acted(nothing, [view], fresh=True)
        same(found, acted(HeadPass(), [view]), f"{name}, at {m.identity} against plain attention", 1e-5)


@dataclass(frozen=True)
class HeadPass(HeadEdit):
    """Changes nothing."""

    def edit(self, rows: Rows, out: Tensor) -> Tensor:
        return out


@check(Edit, HeadEdit, Pattern)
def landing(m: Mechanism) -> None:
    """It moves the head outputs, unless this is the setting at which it does not."""
    if m.identity is not None and m == replace(m, **m.identity):
        raise Skip("this setting is the identity")
    moved = 0.0
    for _, view in grid(m, ["causal", "long", "left_padded"]):
        ends = output(m, view, engine="blocks"), output(None, view, engine="blocks")
        moved = max(moved, float((ends[0] - ends[1]).abs().max()))
    expect(moved > 1e-5, f"the head outputs move by {moved:.3g}: it does not land")


@check(*ATTACHED, *INSIDE)
def detaching(m: Mechanism) -> None:
    """On a model: it runs, and leaving the context restores the logits bit for bit and leaves nothing on the model."""
    family = "mixtral" if isinstance(m, ExpertEdit) else "llama"
    model, batch_ = tiny.model(family), tiny.inputs(family, padding="left", length=24)
    untouched = standing(model)
    with torch.no_grad():
        before = model(**batch_).logits
        with attach(model, m) as attached:
            inside = model(**batch_).logits
        after = model(**batch_).logits
    expect(torch.equal(before, after), f"logits differ by {float((before - after).abs().max()):.3g} after detaching")
    expect(standing(model) == untouched, f"it leaves something on {standing(model) - untouched}")
    real = batch_["attention_mask"].bool()
    expect(bool(inside[real].isfinite().all()), "logits of real tokens are not finite while attached")
    if isinstance(m, Metric):
        expect(bool(torch.allclose(before[real], inside[real], atol=1e-3)), "a metric changes the logits")
        expect(set(attached.results.heads.layer) == {0, 1}, "it has no results for some layer of a llama")


def standing(model: torch.nn.Module) -> set[tuple[str, str]]:
    """The attributes and hooks of each module, by its name."""
    found = set()
    for name, module in model.named_modules():
        found |= {(name, attribute) for attribute in vars(module)}
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            found |= {(name, f"{hooks}[{key}]") for key in getattr(module, hooks)}
    return found


@check(Pattern)
def full(m: Pattern) -> None:
    """Its table has a place for every block, and visiting all of them is plain attention."""
    for name, view in grid(m, views.situations(without="long")):
        visits = m.select(view)
        want = (-(-view.queries // visits.rows), -(-view.keys // visits.keys))
        got = tuple(visits.table.shape[-2:])
        expect(got == want, f"{name}: a table of {got} for {want} row and key blocks")
        everything = Visits(torch.ones_like(visits.table), visits.rows, visits.keys)
        out = attend_rows(view, pattern=lambda _, v=everything: v).out
        same({"head outputs": out}, {"head outputs": output(None, view)}, f"{name}, full pattern against dense", 0.01)
