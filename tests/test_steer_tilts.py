"""Edits of where rows look: each equation against a dense computation of its own, and what they do on models."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.core.errors import BadInput, BadParameter, NothingObserved, NotLanded, NotSupported
from foveate.core.mechanism import Edit, Mechanism
from foveate.core.rows import View, attend
from foveate.steer import Emphasis, InitialTokenScale, Knockout, LengthTemperature, Sharpen, Temperature
from foveate.steer.emphasis import gains, spans_in
from foveate.testing import tiny, views

SITUATIONS = (
    "causal",
    "full",
    "window",
    "left_padded",
    "right_padded",
    "left_padded_window",
    "packed",
    "packed_window",
    "empty_rows",
    "decode_padded",
    "sliding_cache",
    "soft_cap",
    "sinks_window_padded",
    "bias_padded",
)
LONG = 1 << 30


def seen_by(view: View) -> Tensor:
    """[batch, query, key]: the pairs that the mask allows, from its intervals."""
    keys, mask = torch.arange(view.keys), view.mask
    return ((keys >= mask.low[..., None]) & (keys < mask.high[..., None])).expand(view.batch, -1, -1)


def places(view: View) -> tuple[Tensor, Tensor]:
    """Which token of its text each query and each key is, counted by hand from where the batch row begins."""
    begin = torch.tensor([int(b) for b in view.mask.begin.expand(view.batch)])[:, None]
    return view.mask.position[None] - begin, torch.arange(view.keys)[None] - begin


def scores(view: View, factor: Tensor | float = 1.0) -> Tensor:
    """Scores of a textbook: dense, float64, the factor before the soft cap, without the mask."""
    k = view.k.double().repeat_interleave(view.grouped, 1)
    s = view.scale * torch.einsum("bhid,bhjd->bhij", view.q.double(), k) * factor
    if view.softcap:
        s = view.softcap * torch.tanh(s / view.softcap)
    return s if view.bias is None else s + view.bias.double()


def softmax(view: View, s: Tensor, seen: Tensor) -> Tensor:
    """Weights over the pairs that are seen; rows that see nothing give zeros."""
    e = torch.where(seen, s.exp(), 0.0)
    total = e.sum(-1, keepdim=True)
    sinks = 0.0 if view.sinks is None else view.sinks.double().exp()[None, :, None, None]
    return torch.where(total > 0, e / (total + sinks).where(total > 0, 1.0), 0.0)


def plain(view: View) -> Tensor:
    return softmax(view, scores(view), seen_by(view)[:, None])


def mixed(view: View, p: Tensor) -> Tensor:
    return torch.einsum("bhij,bhjd->bhid", p, view.v.double().repeat_interleave(view.grouped, 1))


def agree(view: View, edits: Edit | list[Edit], p: Tensor, tolerance: float = 2e-5) -> None:
    """The head outputs of the real rows are those that these weights give."""
    edits = edits if isinstance(edits, list) else [edits]
    real = torch.ones(view.batch, view.queries, dtype=torch.bool) if view.mask.valid is None else view.mask.valid
    want = mixed(view, p).movedim(1, 2)[real]
    for engine in ("auto", "blocks"):
        got = attend(view, edits=edits, engine=engine, block=None if engine == "auto" else 5).out
        torch.testing.assert_close(got.movedim(1, 2)[real].double(), want, rtol=tolerance, atol=tolerance)


def moves(view: View, edit: Edit) -> bool:
    return not torch.allclose(attend(view, edits=[edit]).out, attend(view).out, atol=1e-4)


# ---------------------------------------------------------------- the first token


@pytest.mark.parametrize("situation", SITUATIONS)
def test_initial_token_scale_is_the_papers_equation(situation: str) -> None:
    view, gamma = views.view(situation), torch.tensor([2.5, 0.2, 2.5, 7.0]).double()
    edit = InitialTokenScale(2.5, heads=((1, 1, 0.2), (1, 3, 7.0), (0, 0, 9.0)))
    p, initial = plain(view), torch.zeros(view.batch, view.queries, view.keys, dtype=torch.bool)
    for b in range(view.batch):
        for i in range(view.queries):
            first = text_of(view, situation, b, i)
            if first >= 0:
                initial[b, i, first] = True
    g = torch.where(initial[:, None], gamma[:, None, None], 1.0)
    p0 = (p * initial[:, None]).sum(-1, keepdim=True)
    agree(view, edit, p * g / ((gamma[:, None, None] - 1) * p0 + 1))


def text_of(view: View, situation: str, b: int, i: int) -> int:
    """The key at which the text of a row begins, from what the situations say of themselves."""
    if "packed" in situation:
        at = int(view.mask.position[i])
        return max(s for s in ((0, 9) if "window" in situation else (0, 9, 10)) if s <= at)
    begin = view.mask.begin.expand(view.batch)
    return int(begin[b])


def test_a_window_that_has_left_the_first_token_is_left_alone() -> None:
    view = views.view("window")
    apart = attend(view, edits=[InitialTokenScale(50.0)]).out - attend(view).out
    assert float(apart[:, :, 1:5].abs().max()) > 0.01
    assert float(apart[:, :, 5:].abs().max()) < 1e-6


# ---------------------------------------------------------------- emphasis


@pytest.mark.parametrize("strength", [1.7, -3.0])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_emphasis_is_an_exact_reweighting(situation: str, strength: float) -> None:
    view, p = views.view(situation), plain(views.view(situation))
    inside = (places(view)[1] >= 3) & (places(view)[1] < 9)
    strengths = torch.tensor([0.0, strength, strength, 0.0]).double()[:, None, None]
    inside = inside[:, None, None]
    m = torch.where(inside, p, 0.0).sum(-1, keepdim=True)
    want = p * torch.where(inside, strengths.exp(), 1.0) / (1 + (strengths.exp() - 1) * m)
    agree(view, Emphasis(((3, 9),), strength, heads=((1, 1), (1, 2), (0, 0))), want)


def test_each_row_of_a_batch_has_its_own_span() -> None:
    view = views.view("left_padded")
    both = attend(view, edits=[Emphasis(((0, 2), (5, 8)), 2.0)]).out
    for row, span in enumerate(((0, 2), (5, 8))):
        for other in (0, 1):
            alone = attend(view, edits=[Emphasis((span,), 2.0)]).out
            assert torch.equal(both[other], alone[other]) == (row == other)
    with pytest.raises(BadInput, match="3 spans on a batch of 2"):
        attend(view, edits=[Emphasis(((0, 1),) * 3, 2.0)])


def test_emphasis_in_a_padded_batch_generates_what_each_row_alone_does() -> None:
    model, batch = tiny.model("llama"), tiny.inputs("llama", batch=2, length=14, padding="left")
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    edit = Emphasis(((2, 6), (0, 3)), strength=4.0)
    with foveate.attach(model, edit):
        together = model.generate(**batch, **options)[:, -5:]
    bare = model.generate(**batch, **options)[:, -5:]
    assert not torch.equal(together, bare)
    for row, span in enumerate(edit.span):
        ids = batch["input_ids"][row : row + 1, batch["attention_mask"][row].bool()]
        with foveate.attach(model, edit.on((span,))):
            assert torch.equal(model.generate(ids, **options)[:, -5:], together[row : row + 1])


def test_emphasis_on_tokens_that_never_come_is_an_error() -> None:
    model = tiny.model("llama")
    with pytest.raises(NothingObserved, match="token 40 was never seen"), foveate.attach(model, Emphasis(((40, 42),))):
        model(**tiny.inputs("llama"))


def test_emphasis_keeps_all_but_the_span() -> None:
    edit = Emphasis(((0, 2),), strength=3.0, heads=((0, 1),))
    assert edit.on(((4, 5), (6, 7))) == Emphasis(((4, 5), (6, 7)), strength=3.0, heads=((0, 1),))
    assert Emphasis(((0, 2),), strength=0.0).nothing
    assert not edit.nothing


# ---------------------------------------------------------------- the heads in which emphasis helps

EXAMPLES = (
    ("the sky is blue and so is it", " blue", "blue"),
    ("a cat sat on a mat and then", " ran", "mat"),
    ("one two three four five six", " seven", "three four"),
    ("red green red green red", " green", "green red green"),
)


def loss_of(model: Any, prompt: str, answer: str) -> float:
    tokenizer = tiny.tokenizer()
    ids, start = tokenizer(prompt + answer, return_tensors="pt")["input_ids"], len(tokenizer(prompt)["input_ids"])
    logs = model(ids).logits[0].double().log_softmax(-1)
    return float(-torch.stack([logs[n - 1, ids[0, n]] for n in range(start, ids.shape[1])]).mean())


@torch.no_grad()
def by_differences(model: Any, examples: Any, step: float = 0.03) -> Tensor:
    """The responses of all heads from emphasis by a little more and a little less."""
    table = torch.zeros(len(examples), 2, 4, dtype=torch.float64)
    for n, (prompt, answer, part) in enumerate(examples):
        span = foveate.locate(tiny.tokenizer(), prompt, part)
        for layer in range(2):
            for head in range(4):
                ends = []
                for b in (step, -step):
                    with foveate.attach(model, Emphasis(span, b, heads=((layer, head),)), trial=False):
                        ends.append(loss_of(model, prompt, answer))
                table[n, layer, head] = (ends[0] - ends[1]) / (2 * step)
    return table


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_responses_are_derivatives_of_the_loss(family: str) -> None:
    model = tiny.model(family).double()
    edit = Emphasis(spans_in(tiny.tokenizer(), EXAMPLES[:1]), 1.0)
    found = -gains(model, tiny.tokenizer(), edit, EXAMPLES[:1])
    want = by_differences(model, EXAMPLES[:1])
    size = float(want.abs().max())
    assert size > 1e-3
    torch.testing.assert_close(found / size, want / size, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("strength", [2.0, -2.0])
def test_fit_takes_the_heads_that_respond_most_consistently(strength: float) -> None:
    model = tiny.model("llama").train()
    found = Emphasis.fit(model, tiny.tokenizer(), EXAMPLES, strength=strength, count=2)
    edit = Emphasis(spans_in(tiny.tokenizer(), EXAMPLES), math.copysign(1.0, strength))
    gain = gains(model, tiny.tokenizer(), edit, EXAMPLES)
    ranked = {}
    for layer in range(2):
        for head in range(4):
            x = gain[:, layer, head]
            ranked[layer, head] = float(x.mean() / (x.var() / len(x)) ** 0.5)
    best = sorted(sorted(ranked, key=lambda at: -ranked[at])[:2])
    assert all(ranked[at] > 0 for at in best)
    assert found.heads == tuple(best)
    assert found.strength == strength
    assert found.span == tuple(foveate.locate(tiny.tokenizer(), p, part)[0] for p, _, part in EXAMPLES)
    # as many heads as help, when more are asked for than there are
    everyone = Emphasis.fit(model, tiny.tokenizer(), EXAMPLES, strength=strength, count=100)
    assert everyone.heads == tuple(sorted(at for at, value in ranked.items() if value > 0))
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("examples", "options", "words"),
    [
        (EXAMPLES[:1], {}, "1 examples: at least 2"),
        (EXAMPLES, {"count": 0}, "count=0 heads: at least 1"),
        ((EXAMPLES[0], ("a b", " c")), {}, "example 1 must be .prompt, answer, part"),
        ((EXAMPLES[0], ("a b", " c", "z")), {}, "example 1: 'z' does not occur"),
        ((EXAMPLES[0], ("a b a", " c", "a")), {}, "example 1: 'a' occurs 2 times"),
        ((EXAMPLES[0], ("a b", "", "b")), {}, "example 1 must be .*three texts"),
    ],
)
def test_fit_says_what_is_wrong_with_its_examples(unchecked: None, examples: Any, options: dict, words: str) -> None:
    model = tiny.model("llama")
    with pytest.raises(BadInput, match=words):
        Emphasis.fit(model, tiny.tokenizer(), examples, **options)
    assert all(p.requires_grad for p in model.parameters())


def test_fit_where_no_head_responds() -> None:
    model = tiny.model("llama")
    # all answers are as likely, whatever the heads do
    torch.nn.init.zeros_(model.lm_head.weight)
    with pytest.raises(BadInput, match="more weight on these parts helps the 4 answers in no head"):
        Emphasis.fit(model, tiny.tokenizer(), EXAMPLES)


def test_fit_needs_a_model_that_goes_on() -> None:
    for family in ("bert", "bart"):
        with pytest.raises(NotSupported, match=r"causal language model"):
            Emphasis.fit(tiny.model(family), tiny.tokenizer(), EXAMPLES)


# ---------------------------------------------------------------- temperature


@pytest.mark.parametrize("situation", SITUATIONS)
def test_temperature_divides_the_scores(situation: str) -> None:
    view = views.view(situation)
    tau = torch.tensor([0.6, 3.0, 0.6, 0.25]).double()[:, None, None]
    want = softmax(view, scores(view, 1 / tau), seen_by(view)[:, None])
    agree(view, Temperature(0.6, heads=((1, 1, 3.0), (1, 3, 0.25), (0, 0, 9.0))), want)


def test_temperature_raises_odds_to_a_power() -> None:
    view = views.view("causal")
    p, hot = plain(view)[0, 0, 20], softmax(view, scores(view, 1 / 2.5), seen_by(view)[:, None])[0, 0, 20]
    torch.testing.assert_close(hot[1:20] / hot[0], (p[1:20] / p[0]) ** (1 / 2.5))


def test_temperature_in_some_layers() -> None:
    view = views.view("causal")
    assert view.layer.index == 1
    assert moves(view, Temperature(0.5, layers=(1,)))
    assert not moves(view, Temperature(0.5, layers=(0,)))
    # a head's own number counts wherever it is
    assert moves(view, Temperature(0.5, layers=(0,), heads=((1, 2, 3.0),)))


def test_temperature_keeps_long_texts_of_an_encoder_apart() -> None:
    model, batch = tiny.model("bert"), tiny.inputs("bert", batch=4, length=60)
    with torch.no_grad():
        found = {}
        for tau in (3.0, 1.0, 0.3):
            with foveate.attach(model, Temperature(tau)):
                rows = model(**batch)[0][:, 0]
            found[tau] = float(torch.cdist(rows, rows).sum())
    assert found[0.3] > found[1.0] > found[3.0]


# ---------------------------------------------------------------- temperature by length


@pytest.mark.parametrize("least", [1.0, 0.0])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_length_temperature_follows_the_number_of_keys(situation: str, least: float) -> None:
    view, seen = views.view(situation), seen_by(views.view(situation))
    n = seen.sum(-1).double().clamp_min(1)
    factor = (n.log() / math.log(5)).clamp_min(least)[:, None, :, None]
    of_heads = torch.tensor([True, False, True, False])[:, None, None]
    want = softmax(view, scores(view, torch.where(of_heads, factor, 1.0)), seen[:, None])
    agree(view, LengthTemperature(5, least, heads=((1, 0), (1, 2), (0, 1))), want)


def test_length_temperature_is_qwens_table_in_a_causal_text() -> None:
    view = views.view("causal")
    table = [math.log(i) / math.log(8) if i > 8 else 1.0 for i in range(1, view.queries + 1)]
    tilt = LengthTemperature(8).tilt(view)
    assert tilt is not None
    assert tilt.factor is not None
    assert tilt.factor[0, 0].tolist() == pytest.approx(table)
    # a decoded row counts the cache, too
    last = LengthTemperature(8).tilt(views.chunk(view, 22, 23))
    assert last is not None
    assert last.factor is not None
    assert last.factor[0, 0].tolist() == pytest.approx(table[-1:])


def test_length_temperature_counts_by_place_where_a_mask_has_holes() -> None:
    view = views.view("scattered")
    tilt = LengthTemperature(2).tilt(view)
    assert tilt is not None
    assert tilt.factor is not None
    assert tilt.factor[0, 0, -1].item() == pytest.approx(math.log(23) / math.log(2))


def test_length_temperature_is_tried_as_for_short_texts() -> None:
    model, batch = tiny.model("llama"), tiny.inputs("llama", length=40)
    with torch.no_grad():
        bare = model(**batch).logits
        with foveate.attach(model, LengthTemperature(1024)):
            torch.testing.assert_close(model(**batch).logits, bare, rtol=1e-4, atol=1e-4)
        with foveate.attach(model, LengthTemperature(16)):
            moved = (model(**batch).logits - bare).abs().amax((0, 2))
    assert float(moved[:16].max()) < 1e-4
    assert float(moved[16:].min()) > 1e-3
    assert LengthTemperature(LONG).nothing


# ---------------------------------------------------------------- knock-out


def cut(view: View, keys: tuple[int, int], rows: Callable[[Tensor], Tensor]) -> Tensor:
    """[batch, query, key]: the pairs that are knocked out."""
    of_rows, of_keys = places(view)
    return rows(of_rows)[:, :, None] & ((of_keys >= keys[0]) & (of_keys < keys[1]))[:, None]


@pytest.mark.parametrize("situation", SITUATIONS)
def test_knockout_takes_keys_from_rows(situation: str) -> None:
    view, seen = views.view(situation), seen_by(views.view(situation))
    spans = {
        Knockout(((2, 6),)): cut(view, (2, 6), lambda i: (i < 2) | (i >= 6)),
        Knockout(((1, 4),), rows=((8, 15),)): cut(view, (1, 4), lambda i: (i >= 8) & (i < 15)),
        # rows 0 to 2 have nothing left, nor has row 3 in a short window
        Knockout(((0, 4),), rows=((0, 5),)): cut(view, (0, 4), lambda i: (i >= 0) & (i < 5)),
    }
    for edit, out in spans.items():
        agree(view, edit, softmax(view, scores(view), (seen & ~out)[:, None]))
    head = torch.tensor([False, True, False, False])[:, None, None]
    out = (
        cut(view, (2, 6), lambda i: i >= 6) if situation != "full" else cut(view, (2, 6), lambda i: (i < 2) | (i >= 6))
    )
    want = softmax(view, scores(view), seen[:, None] & ~(out[:, None] & head))
    agree(view, Knockout(((2, 6),), heads=((1, 1), (0, 0))), want)


def test_a_row_that_has_nothing_left_gives_zeros() -> None:
    view = views.view("sinks")
    for engine in ("auto", "blocks"):
        out = attend(view, edits=[Knockout(((0, 4),), rows=((0, 6),))], engine=engine).out
        assert not out[:, :, :4].any()
        assert out[:, :, 4:].abs().amax(-1).min() > 0


def test_knockouts_of_different_rows_go_together() -> None:
    view, seen = views.view("left_padded"), seen_by(views.view("left_padded"))
    edits: list[Edit] = [
        Knockout(((0, 3),), rows=((4, 9),)),
        Knockout(((2, 7),), rows=((7, 12),)),
        Emphasis(((1, 5),), 2.0),
    ]
    out = cut(view, (0, 3), lambda i: (i >= 4) & (i < 9)) | cut(view, (2, 7), lambda i: (i >= 7) & (i < 12))
    inside = (places(view)[1] >= 1) & (places(view)[1] < 5)
    s = scores(view) + torch.where(inside, 2.0, 0.0)[:, None, None]
    agree(view, edits, softmax(view, s, (seen & ~out)[:, None]))


def test_knockout_with_rows_of_each_text() -> None:
    view = views.view("left_padded")
    both = attend(view, edits=[Knockout(((0, 2),), rows=((3, 5), (6, 9)))]).out
    for row, rows in enumerate(((3, 5), (6, 9))):
        alone = attend(view, edits=[Knockout(((0, 2),), rows=(rows,))]).out
        assert torch.equal(both[row], alone[row])
        assert not torch.equal(both[1 - row], alone[1 - row])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_nothing_of_what_is_knocked_out_everywhere_comes_through(family: str) -> None:
    model, text = tiny.model(family), tiny.inputs(family, batch=1, length=16)["input_ids"]
    other = text.clone()
    other[:, 3:6] = torch.tensor([50, 60, 70])
    ends = {}
    with torch.no_grad():
        for name, edits in {
            "plain": (),
            "out": (Knockout(((3, 6),)),),
            "layer": (Knockout(((3, 6),), layers=(1,)),),
        }.items():
            with foveate.attach(model, *edits):
                ends[name] = float((model(text).logits - model(other).logits)[:, 6:].abs().max())
    assert ends["plain"] > 0.01
    assert ends["out"] < 1e-5
    # through the other layer it still does
    assert ends["layer"] > 0.1 * ends["plain"]


def test_knockout_acts_while_generating() -> None:
    model, ids = tiny.model("llama"), tiny.inputs("llama", batch=1, length=12)["input_ids"]
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    other = ids.clone()
    other[:, 1:9] = ids[:, 1:9].flip(1)
    with foveate.attach(model, Knockout(((1, 9),))):
        first, second = (model.generate(x, **options)[:, 12:] for x in (ids, other))
    assert torch.equal(first, second)
    assert not torch.equal(model.generate(ids, **options)[:, 12:], model.generate(other, **options)[:, 12:])


def test_knockout_names_rows_as_spans_or_none(unchecked: None) -> None:
    for rows in (((3, 3),), ((-1, 2),), (3, 4), "all"):
        with pytest.raises(BadParameter, match=r"rows must be a tuple of .first token, one past the last.*\(\) is all"):
            Knockout(((0, 1),), rows=rows)
    with pytest.raises(BadParameter, match="keys must be a tuple of"):
        Knockout(())


# ---------------------------------------------------------------- sharpening


def reweighted(p: Tensor, power: float, offset: float, late: Tensor) -> Tensor:
    """One row of all heads by the paper's rule, on the keys that are not the first ones of its text."""
    if not late.any():
        return p
    part, n = p[:, late], int(late.sum())
    mass = part.sum(-1, keepdim=True)
    raised = torch.relu(n * part / mass - (0.0 if n <= 3 else offset)) ** power
    new = p.clone()
    new[:, late] = torch.where(
        raised.amax(-1, keepdim=True) > 1e-3**power, mass * raised / raised.sum(-1, keepdim=True), part
    )
    return new


@pytest.mark.parametrize("options", [{}, {"sink": 0, "power": 3.0}, {"sink": 3, "power": 1.5, "offset": 0.4}])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_sharpening_is_the_papers_rule(situation: str, options: dict) -> None:
    view, edit = views.view(situation), Sharpen(**options)
    p, seen = plain(view), seen_by(view)
    for b in range(view.batch):
        for i in range(view.queries):
            first = text_of(view, situation, b, i)
            late = seen[b, i] & (torch.arange(view.keys) >= first + edit.sink)
            p[b, :, i] = reweighted(p[b, :, i], edit.power, edit.offset, late)
    agree(view, edit, p, tolerance=2e-4)


@pytest.mark.parametrize("situation", ["causal", "window", "sinks_window_padded"])
def test_a_power_alone_is_a_temperature(situation: str) -> None:
    view = replace(views.view(situation), sinks=None)
    sharp = attend(view, edits=[Sharpen(2.5, offset=0.0, sink=0)]).out
    cold = attend(view, edits=[Temperature(1 / 2.5)]).out
    real = view.mask.rows.expand(view.batch, -1)
    torch.testing.assert_close(sharp.movedim(1, 2)[real], cold.movedim(1, 2)[real], rtol=1e-4, atol=1e-4)


def test_rows_without_anything_to_sharpen_stay() -> None:
    view = views.view("causal")
    even = replace(view, q=torch.zeros_like(view.q))
    assert not moves(even, Sharpen(8.0))
    # nor do rounding errors grow to be choices
    nearly = replace(view, q=view.q * 1e-6)
    assert not moves(nearly, Sharpen(8.0))


def test_the_weight_of_the_first_token_stays() -> None:
    # a first key that wins every row, values that show where the weight goes
    view = views.view("causal", batch=1, heads=1, kv_heads=1, value_dim=23)
    k = view.k.clone()
    k[:, :, 0] = view.q.mean(2) * 9
    view = replace(view, k=k, v=torch.eye(23)[None, None])
    p = attend(view).out
    kept, free = (attend(view, edits=[Sharpen(4.0, sink=sink)]).out for sink in (1, 0))
    torch.testing.assert_close(kept[..., 0], p[..., 0])
    torch.testing.assert_close(kept.sum(-1), torch.ones(1, 1, 23))
    assert float((kept - p)[..., 1:].abs().max()) > 0.01
    assert float((free[..., 0] - p[..., 0]).abs().max()) > 0.01


def test_high_powers_of_long_rows_stay_finite() -> None:
    view = views.view("long", spread=12.0)
    out = attend(view, edits=[Sharpen(64.0, sink=0)]).out
    assert bool(out.isfinite().all())
    # at such a power the largest weight takes it all
    best = plain(view).argmax(-1)
    want = view.v.repeat_interleave(view.grouped, 1).gather(2, best[..., None].expand(-1, -1, -1, view.v.shape[3]))
    assert float(((out - want).abs().amax(-1) < 0.01).float().mean()) > 0.9


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize(
    "edit",
    [
        Emphasis(((1, 5),)),
        Temperature(),
        LengthTemperature(64),
        Knockout(((1, 5),)),
        Sharpen(),
        InitialTokenScale(),
    ],
)
def test_cross_attention_is_left_alone(edit: Edit) -> None:
    view = views.view("cross")
    assert torch.equal(attend(view, edits=[edit]).out, attend(view).out) or not moves(view, edit)
    assert edit.tilt(view) is None


@pytest.mark.parametrize("make", [Emphasis, Knockout, LengthTemperature, Sharpen])
def test_heads_that_a_model_has_not_are_refused(make: Any) -> None:
    given: dict[type[Mechanism], Any] = {Emphasis: {"span": ((0, 2),)}, Knockout: {"keys": ((0, 2),)}}
    with (
        pytest.raises(BadInput, match="has no head 4"),
        foveate.attach(tiny.model("llama"), make(**given.get(make, {}), heads=((1, 4),))),
    ):
        pass


def test_an_edit_of_no_effect_is_refused_on_entering() -> None:
    edit = Emphasis(((1, 5),), strength=1e-8)
    with (
        pytest.raises(NotLanded, match="Emphasis changes nothing in any layer"),
        foveate.attach(tiny.model("llama"), edit),
    ):
        pass
