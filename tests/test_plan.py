"""Plans: written and read whole, refused elsewhere, lasting until they are removed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import foveate
from foveate.compress import Streaming
from foveate.core.errors import BadInput, BadParameter, UnknownName
from foveate.core.mechanism import HeadEdit
from foveate.core.plan import LASTING, Plan, fingerprint
from foveate.steer import Emphasis, InitialTokenScale, Knockout, Reread
from foveate.testing import tiny


def logits(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**given).logits


@pytest.fixture
def model() -> Any:
    return tiny.model("llama")


EDIT = InitialTokenScale(1.0, heads=((0, 1, 3.0), (1, 2, 0.25)))


def test_a_plan_comes_back_as_it_was(model: Any, tmp_path: Path) -> None:
    policy = Streaming(foveate.Budget(0.25, sinks=2, heads=((0, 1, 1.0),)))
    plan = Plan.of(model, Reread(), EDIT, policy, evidence={"p": 0.01}, name="tiny")
    read = Plan.load(plan.save(tmp_path / "deep" / "plan.json"))
    assert read == plan
    assert read.mechanisms == (Reread(), EDIT, policy)
    assert read.model["name"] == "tiny"


def test_attaching_a_plan_is_attaching_its_mechanisms(model: Any) -> None:
    given = tiny.inputs("llama", padding="left")
    with foveate.attach(model, EDIT):
        want = logits(model, given)
    with Plan.of(model, EDIT, Reread()).attach(model):
        got = logits(model, given)
    assert torch.equal(want, got)
    assert Plan.of(model, EDIT, Reread()).prompt("Why?") == Reread().edit("Why?")


def test_a_plan_is_refused_elsewhere(model: Any, tmp_path: Path) -> None:
    file = Plan.of(model, EDIT, name="one").save(tmp_path / "plan.json")
    for other in (tiny.model("llama", seed=1), tiny.model("qwen2"), tiny.model("llama", num_hidden_layers=3)):
        with pytest.raises(BadInput, match=r"this plan is for one \(.*foveate steer"):
            foveate.apply(other, file)
        assert LASTING not in other.__dict__
    Plan.load(file).check(tiny.model("llama").to(torch.bfloat16))


def test_every_weight_and_how_it_attends_tells_a_model(model: Any) -> None:
    own = fingerprint(model)
    for name, weight in model.named_parameters():
        before = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(-1).add_(0.25)
            assert fingerprint(model) != own, name
            weight.copy_(before)
    assert fingerprint(model) == own
    for changed in ({"sliding_window": 7}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}):
        other = tiny.model("llama")
        other.config.update(changed)
        assert fingerprint(other) != own, changed


def test_a_fingerprint_holds_no_path(model: Any) -> None:
    model.config._name_or_path = "somewhere/else"
    assert "somewhere" not in json.dumps(fingerprint(model))


def test_an_applied_plan_lasts_until_it_is_removed(model: Any, tmp_path: Path) -> None:
    given = tiny.inputs("llama")
    before, keys = logits(model, given), set(model.__dict__)
    with foveate.attach(model, EDIT):
        want = logits(model, given)
    applied = foveate.apply(model, Plan.of(model, EDIT).save(tmp_path / "plan.json"))
    assert torch.equal(logits(model, given), want)
    with pytest.raises(BadInput, match="has a plan already"):
        foveate.apply(model, Plan.of(model, EDIT))
    applied.remove()
    assert torch.equal(logits(model, given), before)
    assert set(model.__dict__) == keys
    # unused plans come off too
    foveate.apply(model, Plan.of(model, EDIT)).remove()


def test_a_plan_that_is_off_leaves_the_next_one_alone(model: Any) -> None:
    plan = Plan.of(model, EDIT)
    first = foveate.apply(model, plan)
    first.remove()
    second = foveate.apply(model, plan)
    first.remove()
    with pytest.raises(BadInput, match="has a plan already"):
        foveate.apply(model, plan)
    second.remove()
    assert LASTING not in model.__dict__


@dataclass(frozen=True)
class Mine(HeadEdit):
    """Of nobody's registry."""

    def edit(self, rows: Any, out: torch.Tensor) -> torch.Tensor:
        return out * 2


def test_a_plan_for_words_must_be_put_on_a_prompt(model: Any, tmp_path: Path) -> None:
    emphasis, cut = Emphasis(((0, 1),), 2.0), Knockout(((0, 1),))
    plan = Plan.load(Plan.of(model, emphasis, cut, part="is", index=1).save(tmp_path / "plan.json"))
    assert (plan.part, plan.index) == ("is", 1)
    for use in (lambda: plan.attach(model), lambda: foveate.apply(model, plan)):
        with pytest.raises(BadInput, match=r"acts on the words 'is' of each prompt: put it on yours first"):
            use()
    put = plan.on(((2, 4),))
    # what was left open stays open: all rows outside of the keys
    assert put.mechanisms == (Emphasis(((2, 4),), 2.0), Knockout(((2, 4),), rows=()))
    given = tiny.inputs("llama")
    with put.attach(model):
        logits(model, given)


def test_what_a_plan_cannot_hold(model: Any) -> None:
    with pytest.raises(BadInput, match="Mine is no registered mechanism"):
        Plan.of(model, Mine())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda d: d.update(format="plan 0"), BadInput, "its format is 'plan 0'"),
        (lambda d: d.pop("mechanisms"), BadInput, "a part of the plan is missing"),
        (
            lambda d: d["mechanisms"][0].update(name="initial_token_scal"),
            UnknownName,
            "did you mean 'initial_token_scale'",
        ),
        (lambda d: d["mechanisms"][0]["parameters"].update(factor=-1), BadParameter, "factor must be from"),
        (lambda d: d["mechanisms"][0]["parameters"].update(gamma=1), BadInput, "the parameter 'gamma'; it has factor"),
        (lambda d: d.update(mechanisms=[3]), BadInput, "of another form"),
        (lambda d: d.update(model="x"), BadInput, "of another form"),
        (lambda d: d.update(evidence="x"), BadInput, "of another form"),
        (lambda d: d["mechanisms"][0].update(parameters=[1]), BadInput, "of another form"),
        (lambda d: d["mechanisms"][0].update(parameters={"heads": {"x": 1}}), BadInput, "of another form"),
    ],
)
def test_a_broken_plan_says_what_is_wrong(
    model: Any, tmp_path: Path, change: Any, error: type[Exception], words: str
) -> None:
    file = Plan.of(model, EDIT).save(tmp_path / "plan.json")
    found = json.loads(file.read_text())
    change(found)
    file.write_text(json.dumps(found))
    with pytest.raises(error, match=words):
        Plan.load(file)


def test_no_plan_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such plan"):
        Plan.load(tmp_path / "plan.json")
    with pytest.raises(BadInput, match="is a folder"):
        Plan.load(tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(BadInput, match="is no JSON"):
        Plan.load(tmp_path / "plan.json")
