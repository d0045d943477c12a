"""Finding what to steer: judging, responses, the search, ablation, and the held-out report."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import foveate
from foveate.core.errors import BadInput, NotSupported
from foveate.core.params import bounds_of
from foveate.finding.ablating import Workbench, ablate, ablated_together, heads_in
from foveate.finding.judging import Judge
from foveate.finding.reporting import report
from foveate.finding.responding import responses
from foveate.finding.searching import OBJECTIVES, search
from foveate.steer import Emphasis, HeadScale, InitialTokenScale, Reread, ShiftVectors
from foveate.tasks import Example, prepare, score
from foveate.testing import tiny

PARTS = ("MARK", "ECHO")


def examples(count: int, seed: int = 0, corrupted: bool = False) -> tuple[Example, ...]:
    """Random letters with a word in them, and two answers that share their first token."""
    draw = random.Random(seed)

    def text(size: int) -> str:
        return "".join(draw.choice("abcdefgh") for _ in range(size))

    made = []
    for n in range(count):
        size = draw.randrange(3, 8)
        prompt = text(size) + PARTS[n % 2] + text(4)
        made.append(Example(prompt, ("xy", "xz", "w"), draw.randrange(3), text(len(prompt)) if corrupted else ""))
    return tuple(made)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model("llama")


def judge(model: Any, count: int = 12, **options: Any) -> Judge:
    return Judge(model, tiny.tokenizer(), examples(count), batch=5, **options)


# ---------------------------------------------------------------- judging


def test_without_an_edit_it_is_the_score(model: Any) -> None:
    found = judge(model).score()
    want = score(model, tiny.tokenizer(), examples(12))
    np.testing.assert_allclose(found.margin, want.margin, atol=1e-5)


def test_each_prompt_gets_its_own_span(model: Any) -> None:
    parts = tuple(PARTS[n % 2] for n in range(12))
    found = judge(model, part=parts).score(Emphasis(((0, 1),), 2.0))
    for n, e in enumerate(examples(12)):
        span = foveate.locate(tiny.tokenizer(), e.prompt, parts[n])
        with foveate.attach(model, Emphasis(span, 2.0)):
            alone = score(model, tiny.tokenizer(), [e])
        assert found.margin[n] == pytest.approx(alone.margin[0], abs=1e-4)
    assert [e.prompt for e in found.examples] == [e.prompt for e in examples(12)]


def test_prompt_edits_change_the_prompts(model: Any) -> None:
    edited = [replace(e, prompt=Reread().edit(e.prompt)) for e in examples(12)]
    want = score(model, tiny.tokenizer(), edited)
    np.testing.assert_allclose(judge(model).score(Reread()).margin, want.margin, atol=1e-5)


def test_a_span_edit_asks_where(model: Any) -> None:
    with pytest.raises(BadInput, match="say which words of each prompt"):
        judge(model).score(Emphasis(((0, 1),)))
    with pytest.raises(BadInput, match="'MARK' does not occur"):
        judge(model, part="MARK").score(Emphasis(((0, 1),)))


# ---------------------------------------------------------------- responses


@pytest.mark.parametrize("edit", [InitialTokenScale(1.001), HeadScale(1.001)])
def test_the_response_is_the_derivative(model: Any, edit: Any) -> None:
    prepared = prepare(tiny.tokenizer(), examples(6))
    found = responses(model, [(edit, prepared)])

    def loss(s: Any) -> float:
        return -float(np.log(s.probability).mean())

    before = loss(score(model, None, prepared))
    for head in ((0, 1), (1, 2)):
        one = replace(edit, factor=1.0, heads=((*head, 1.001),))
        with foveate.attach(model, one):
            step = before - loss(score(model, None, prepared))
        assert float(found[head]) == pytest.approx(step, rel=0.05, abs=2e-6)


def test_the_weights_of_the_model_collect_nothing(model: Any) -> None:
    flags = [p.requires_grad for p in model.parameters()]
    responses(model, [(InitialTokenScale(), prepare(tiny.tokenizer(), examples(3)))])
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())


def test_what_does_not_act_in_heads_has_no_response(model: Any) -> None:
    vectors = ShiftVectors(((0, (1.0,) * 32),))
    with pytest.raises(NotSupported, match="ShiftVectors does not act in heads"):
        responses(model, [(vectors, prepare(tiny.tokenizer(), examples(3)))])


# ---------------------------------------------------------------- the search


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_a_search_only_gets_better_and_keeps_to_its_budget(model: Any, objective: str) -> None:
    told = []
    found = search(
        judge(model), InitialTokenScale(), 18, objective, progress=lambda done, of, best: told.append((done, of))
    )
    assert found.objective == max(t.objective for t in found.tries)
    assert found.objective == OBJECTIVES[objective](judge(model).score(found.mechanism))
    assert len(found.tries) <= 17
    assert len({t.mechanism for t in found.tries}) == len(found.tries), "nothing is tried twice"
    assert told[-1][0] <= 18
    assert found.response is not None
    assert found.response.shape == (2, 4)
    assert {t.mechanism.factor for t in found.tries[:9]} == set(bounds_of(InitialTokenScale)["factor"][1].grid)
    assert any(t.mechanism.heads for t in found.tries)


def test_a_search_without_labels_does_not_look_at_them(model: Any) -> None:
    turned = tuple(replace(e, answer=(e.answer + 1) % 3) for e in examples(12))
    a = search(judge(model), InitialTokenScale(), 16, "entropy")
    b = search(Judge(model, tiny.tokenizer(), turned, batch=5), InitialTokenScale(), 16, "entropy")
    assert [t.mechanism for t in a.tries] == [t.mechanism for t in b.tries]
    assert a.mechanism == b.mechanism


def test_heads_can_be_left_alone(model: Any) -> None:
    found = search(judge(model), InitialTokenScale(), 40, heads=False)
    assert not any(t.mechanism.heads for t in found.tries)
    assert len(found.tries) == 9


def test_an_edit_that_names_heads_is_restricted(model: Any) -> None:
    found = search(judge(model, part=tuple(PARTS[n % 2] for n in range(12))), Emphasis(((0, 1),), 1.0), 24)
    tried = {t.mechanism.heads for t in found.tries}
    assert () in tried
    assert any(len(heads) == 1 for heads in tried)
    layers = [t for t in found.tries if t.what.startswith("without layer")]
    assert layers
    for t in layers:
        assert int(t.what.split()[-1]) not in {at for at, _ in t.mechanism.heads}


def test_what_cannot_be_searched_says_so(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="at least 2 are needed"):
        search(judge(model), InitialTokenScale(), 1)
    with pytest.raises(BadInput, match="objective 'luck' must be one of probability"):
        search(judge(model), InitialTokenScale(), 9, "luck")
    monkeypatch.setattr("foveate.finding.searching.searched", lambda m: ({}, {}))
    with pytest.raises(BadInput, match="InitialTokenScale has no parameter that can be searched"):
        search(judge(model), InitialTokenScale(), 9)


# ---------------------------------------------------------------- ablation


@pytest.mark.parametrize("to", ["resample", "mean", "zero", "patch"])
def test_heads_are_ablated_one_by_one_and_together(model: Any, to: str, tmp_path: Path) -> None:
    given = examples(12, corrupted=True)
    bench = Workbench(Judge(model, tiny.tokenizer(), given, batch=5), to)
    found = ablate(bench, top=2)
    table = found.table
    assert list(table.role) == ["found"] * 2 + ["control"] * 2
    assert sorted(table.layer[:2]) == sorted(table.layer[2:]), "controls are of the same layers"
    assert not set(zip(table.layer[:2], table["head"][:2], strict=True)) & set(
        zip(table.layer[2:], table["head"][2:], strict=True)
    )
    assert ((table.low <= table.effect) & (table.effect <= table.high)).all()
    one = (int(table.layer[0]), int(table["head"][0]))
    gap = bench.scores((one,)).margin - bench.scores().margin
    assert table.effect[0] == pytest.approx(gap.mean(), abs=1e-6)
    file = found.save(tmp_path / "ablate.json")
    assert json.loads(file.read_text())["to"] == to
    again = ablate(bench, candidates=[one, (1, 3)])
    assert again.heads == (one, (1, 3))
    assert heads_in(again.save(file)) == again.heads
    together = ablated_together(bench, again.heads, draws=2)
    both = bench.scores(again.heads).margin.mean() - bench.scores().margin.mean()
    assert together["found"]["margin"]["difference"] == pytest.approx(both, abs=1e-6)
    assert len(together["controls"]) == 2


def test_zero_ablation_is_the_edit_of_that_name(model: Any) -> None:
    bench = Workbench(judge(model), "zero")
    with foveate.attach(model, HeadScale(1.0, heads=((1, 1, 0.0),))):
        want = score(model, tiny.tokenizer(), examples(12))
    np.testing.assert_allclose(bench.scores(((1, 1),)).margin, want.margin, atol=1e-5)


def test_patching_all_heads_of_all_layers_brings_most_of_the_clean_run_back(model: Any) -> None:
    # one example whose corrupted prompt differs in one letter: what is left is that letter's own embedding
    clean = "abcdMARKefgh"
    given = (Example(clean, ("x", "w"), 0, "abcdMARKefgg"), Example("h" + clean, ("x", "w"), 0, "g" + clean))
    bench = Workbench(Judge(model, tiny.tokenizer(), given), "patch")
    corrupt, patched = bench.scores(), bench.scores(bench.all_heads())
    target = score(model, tiny.tokenizer(), given)
    assert abs(patched.margin[1] - target.margin[1]) < abs(corrupt.margin[1] - target.margin[1])


def test_donors_stand_beside_their_own_sequences(model: Any) -> None:
    given = examples(12, corrupted=True)
    bench = Workbench(Judge(model, tiny.tokenizer(), given, batch=5))
    batched = bench.scores(((0, 2), (1, 1)))
    for n, e in enumerate(given):
        # an example alone, with another that is never looked at: the donor must be this one's corrupted prompt
        pair = (e, given[(n + 1) % 12])
        alone = Workbench(Judge(model, tiny.tokenizer(), pair, batch=1)).scores(((0, 2), (1, 1)))
        assert batched.margin[n] == pytest.approx(alone.margin[0], abs=1e-4)


def test_what_cannot_be_ablated_says_so(model: Any, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="patching needs a corrupted prompt with every example"):
        Workbench(judge(model), "patch")
    with pytest.raises(BadInput, match="replaced by resample, mean, zero, patch"):
        Workbench(judge(model), "one")
    with pytest.raises(BadInput, match="1 example"):
        Workbench(judge(model, 1))
    with pytest.raises(BadInput, match="cannot read"):
        heads_in(tmp_path / "none.json")
    for text, words in (("{}", "names no heads"), ('{"heads": []}', "no head at all"), ("[3]", "names no heads")):
        (tmp_path / "heads.json").write_text(text)
        with pytest.raises(BadInput, match=words):
            heads_in(tmp_path / "heads.json")


# ---------------------------------------------------------------- the report


def test_a_report_says_before_and_after(model: Any) -> None:
    held_out, other = judge(model), Judge(model, tiny.tokenizer(), examples(10, seed=5))
    found = report(held_out, [InitialTokenScale(4.0)], other, "abcdefgh" * 20, repeats=2)
    before, after = held_out.score(), held_out.score(InitialTokenScale(4.0))
    assert found.probability.after == pytest.approx(after.probability.mean())
    assert found.right.before == pytest.approx(before.accuracy)
    assert found.second is not None
    assert found.perplexity is not None
    assert found.perplexity[0].value != found.perplexity[1].value
    assert found.cost is not None
    assert found.cost.prefill.low <= found.cost.prefill.value <= found.cost.prefill.high
    json.dumps(found.to_json())


def test_what_has_no_meaning_elsewhere_is_left_out(model: Any) -> None:
    found = report(judge(model), [Reread()], judge(model), "abcdefgh" * 20, repeats=1)
    assert found.second is not None
    assert found.perplexity is None
    spans = report(judge(model, part=tuple(PARTS[n % 2] for n in range(12))), [Emphasis(((0, 1),))], judge(model))
    assert (spans.second, spans.perplexity, spans.cost) == (None, None, None)


def test_nothing_stays_on_the_model(model: Any) -> None:
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        search(judge(model), InitialTokenScale(), 14)
        ablate(Workbench(judge(model)), top=1)
        assert torch.equal(model(input_ids=ids).logits, before)
