"""How scores become weights, each rule against its paper's formula written out row by row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.core.errors import BadInput, BadParameter
from foveate.core.mask import Mask
from foveate.core.rows import View, attend
from foveate.core.rule import Rule, Sizes
from foveate.models import load
from foveate.replace import KeyBias, LogNToken, Relu, Sigmoid, Softplus
from foveate.replace.normalisers._counts import keys_seen
from foveate.steer import Temperature
from foveate.testing import tiny, views
from foveate.testing.checks import CHECKS

HEADS, GROUPS, LENGTH, DIM, VALUE = 4, 2, 11, 6, 5


def call(rule: Rule, mask: Mask | None = None, dtype: torch.dtype = torch.float64) -> View:
    """A random call under a rule, its parameters large enough to be seen."""
    rng = torch.Generator().manual_seed(7)
    q, k, v = (
        torch.randn(2, heads, LENGTH, width, generator=rng, dtype=torch.float64).to(dtype)
        for heads, width in ((HEADS, DIM), (GROUPS, DIM), (GROUPS, VALUE))
    )
    learned = rule.learned(Sizes(HEADS * DIM, HEADS, GROUPS, DIM, 0, VALUE))
    if learned is not None:
        for parameter in learned.to(dtype).parameters():
            torch.nn.init.normal_(parameter, generator=rng)
    mask = Mask.causal_of(LENGTH) if mask is None else mask
    return View(q, k, v, mask, scale=0.7, rule=rule, learned=learned)


def by_hand(view: View, row: Callable[[Tensor, Tensor, Tensor, int, int], Tensor]) -> Tensor:
    """Head outputs, one row after the other: `row(q, k, v, head, i)` has only the keys that row i sees."""
    out = torch.zeros(*view.q.shape[:3], view.v.shape[3], dtype=torch.float64)
    for b in range(view.batch):
        for h in range(view.heads):
            for i in range(view.queries):
                low, high = (int(t.expand(view.batch, -1)[b, i]) for t in (view.mask.low, view.mask.high))
                k, v = (t[b, h // view.grouped, low:high].double() for t in (view.k, view.v))
                out[b, h, i] = row(view.q[b, h, i].double(), k, v, h, i)
    return out


def softplus(power: float, offset: float) -> Callable[..., Tensor]:
    def row(q: Tensor, k: Tensor, v: Tensor, h: int, i: int) -> Tensor:
        n = len(k)
        s = math.log(DIM) * math.log(n) * (k @ q) / (k.square().sum(1).sqrt() * q.square().sum().sqrt())
        a = torch.log(1 + torch.exp(s))
        a = a / a.sum()
        p = (n * a - (offset if n > 3 else 0)).clamp_min(0) ** power
        return (p / p.sum()) @ v

    return row


def sigmoid(length: int) -> Callable[..., Tensor]:
    def row(q: Tensor, k: Tensor, v: Tensor, h: int, i: int) -> Tensor:
        return (1 / (1 + torch.exp(-(0.7 * k @ q - math.log(length or len(k)))))) @ v

    return row


def relu(alpha: float) -> Callable[..., Tensor]:
    def row(q: Tensor, k: Tensor, v: Tensor, h: int, i: int) -> Tensor:
        return ((0.7 * k @ q).clamp_min(0) / len(k) ** alpha) @ v

    return row


def beside(view: View, key: str, value: bool) -> Callable[..., Tensor]:
    """Softmax over the keys with one more in front of them."""
    extra: dict[str, Tensor] = {} if view.learned is None else dict(view.learned.named_parameters())

    def row(q: Tensor, k: Tensor, v: Tensor, h: int, i: int) -> Tensor:
        own = extra["value"][h] if value else torch.zeros(VALUE, dtype=torch.float64)
        if key == "none":
            return torch.softmax(0.7 * k @ q, 0) @ v + own
        if key == "learned":
            s = 0.7 * torch.cat([extra["key"][h][None], k]) @ q
        else:
            s = torch.cat([extra["score"][h][None] if key == "score" else torch.zeros(1).double(), 0.7 * k @ q])
        return torch.softmax(s, 0) @ torch.cat([own[None], v])

    return row


def special(trained: int, tokens: int) -> Callable[..., Tensor]:
    def row(q: Tensor, k: Tensor, v: Tensor, h: int, i: int) -> Tensor:
        factor = math.log(len(k)) / math.log(trained) if i < tokens else 1
        return torch.softmax(factor * 0.7 * k @ q, 0) @ v

    return row


CASES: dict[str, tuple[Rule, Callable[[View], Callable[..., Tensor]]]] = {
    "softplus": (Softplus(), lambda view: softplus(15, 1)),
    "softplus, power 3": (Softplus(power=3.0), lambda view: softplus(3, 1)),
    "softplus alone": (Softplus(power=1.0, offset=0.0), lambda view: softplus(1, 0)),
    "softplus, no whole power": (Softplus(power=2.5, offset=0.5), lambda view: softplus(2.5, 0.5)),
    "sigmoid": (Sigmoid(), lambda view: sigmoid(0)),
    "sigmoid of 64": (Sigmoid(length=64), lambda view: sigmoid(64)),
    "relu": (Relu(), lambda view: relu(1)),
    "relu by the root": (Relu(alpha=0.5), lambda view: relu(0.5)),
    **{
        f"key_bias {key} {value}": (
            KeyBias(key=key, value=value),
            lambda view, key=key, value=value: beside(view, key, value),
        )
        for key in ("learned", "score", "zero", "none")
        for value in (False, True)
    },
    "log_n_token": (LogNToken(), lambda view: special(512, 1)),
    "two tokens": (LogNToken(trained=4, tokens=2), lambda view: special(4, 2)),
}
FULL = Mask.full(LENGTH, LENGTH)
MASKS = {"causal": Mask.causal_of(LENGTH), "window": Mask.causal_of(LENGTH, window=5), "full": FULL}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mask", MASKS)
@torch.no_grad()
def test_the_formula(name: str, mask: str) -> None:
    rule, rows = CASES[name]
    if mask != "full" and not rule.causal:
        return
    view = call(rule, MASKS[mask])
    want = by_hand(view, rows(view))
    for engine in ("reference", "blocks", "auto"):
        torch.testing.assert_close(attend(view, engine=engine, block=4).out, want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "rule",
    [
        Sigmoid(),
        Sigmoid(length=9),
        Relu(),
        Softplus(power=1.0, offset=0.0),
        Softplus(),
        Softplus(power=3.0, offset=0.0),
        Softplus(power=1.0, offset=0.5),
        KeyBias(value=True),
        KeyBias(key="zero"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "situation", ["causal", "left_padded_window", "full_right_padded", "empty_rows", "multi_query", "decode"]
)
def test_without_rows_as_with_them(rule: Rule, situation: str) -> None:
    """Outputs and derivatives of the way that forms no rows, in float32, with garbage where nobody looks."""
    found = []
    for engine in ("auto", "blocks"):
        view = views.view(situation, value_dim=VALUE)
        # the length of a key that is NaN has no derivative
        if engine == "auto" and not isinstance(rule, Softplus):
            view = views.poisoned(view)
        torch.manual_seed(0)
        learned = rule.learned(Sizes(8, view.heads, view.kv_heads, view.q.shape[3], 0, VALUE))
        leaves = [getattr(view, n).requires_grad_() for n in ("q", "k", "v")]
        leaves += [] if learned is None else list(learned.parameters())
        rows = attend(replace(view, rule=rule, learned=learned), engine=engine)
        # one row alone is sharpened as a row
        alone = isinstance(rule, Softplus) and not rule.plainly and view.queries == 1
        assert rows.engine == ("shortcut" if engine == "auto" and not alone else "blocks")
        weigh = torch.randn(rows.out.shape, generator=torch.Generator().manual_seed(1))
        found.append([rows.out, *torch.autograd.grad((rows.out * weigh).sum(), leaves)])
    for without, with_rows in zip(*found, strict=True):
        # a power multiplies rounding errors
        torch.testing.assert_close(without, with_rows, rtol=1e-4, atol=5e-5 if rule == Softplus() else 1e-5)


def test_derivatives_reach_what_was_learned() -> None:
    for key, value in (("learned", True), ("score", False), ("none", True)):
        view = call(KeyBias(key=key, value=value))
        assert view.learned is not None
        attend(view).out.square().sum().backward()
        for name, parameter in view.learned.named_parameters():
            assert parameter.grad is not None, name
            assert (parameter.grad.abs().sum(-1) > 0).all(), name


def test_keys_are_counted() -> None:
    """Padding and other texts are not counted, nor are holes of a mask that is no interval."""
    for name in ("causal", "left_padded_window", "packed", "full_right_padded", "scattered", "empty_rows"):
        mask = views.view(name).mask
        want = (mask.additive(torch.arange(mask.queries), 0, mask.keys) > -torch.inf).sum(-1)
        assert torch.equal(keys_seen(mask).expand_as(want), want.to(keys_seen(mask)))
        some = torch.tensor([1, 2, 7])
        assert torch.equal(keys_seen(mask, some).expand_as(want[..., some]), want[..., some].to(keys_seen(mask)))


@torch.no_grad()
def test_rows_sum_to_what_they_should() -> None:
    view = replace(call(Softplus()), v=torch.ones(2, GROUPS, LENGTH, VALUE).double())
    torch.testing.assert_close(attend(view).out, torch.ones(2, HEADS, LENGTH, VALUE).double())
    # weights of a fresh model are about 1 / n each, and without the bias near a half
    flat = replace(view, q=view.q * 0, rule=Sigmoid())
    n = torch.arange(1, LENGTH + 1).double()
    torch.testing.assert_close(attend(flat).out[0, 0, :, 0], n / (n + 1))
    torch.testing.assert_close(attend(replace(flat, rule=Sigmoid(length=1))).out[0, 0, :, 0], n / 2)
    # a query that agrees with no key gives nothing
    against = replace(
        view, q=-view.k.sum(2, keepdim=True).expand(-1, -1, LENGTH, -1).abs(), k=view.k.abs(), rule=Relu()
    )
    assert not attend(against).out.any()


@torch.no_grad()
def test_a_higher_power_looks_more_sharply() -> None:
    largest = [
        attend(replace(call(Softplus(power=power)), v=torch.eye(LENGTH).double().expand(2, GROUPS, -1, -1))).out.amax(
            -1
        )
        for power in (1.0, 3.0, 15.0)
    ]
    assert (largest[0] <= largest[1] + 1e-9).all()
    assert (largest[1] <= largest[2] + 1e-9).all()
    assert (largest[2][:, :, 3:].mean() - largest[0][:, :, 3:].mean()) > 0.3


def test_softplus_of_keys_that_are_alike() -> None:
    """A row with nothing to choose keeps its even weights, and zeros have finite derivatives."""
    view = call(Softplus(), dtype=torch.float32)
    alike = replace(view, k=view.k[:, :, :1].expand_as(view.k))
    want = view.v.cumsum(2) / torch.arange(1, LENGTH + 1)[:, None]
    torch.testing.assert_close(attend(alike).out, want.repeat_interleave(2, 1), rtol=1e-4, atol=1e-4)
    nothing = [torch.zeros_like(t).requires_grad_() for t in (view.q, view.k)]
    out = attend(replace(view, q=nothing[0], k=nothing[1])).out
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), nothing))


def test_softplus_of_scores_whose_exponential_is_infinite() -> None:
    """An edit that sharpens scores may make them as large as it likes."""
    view = call(Softplus(), dtype=torch.float32)
    for temperature, tolerance in ((0.01, 1e-3), (100.0, 1e-3)):
        edits = [Temperature(temperature)]
        out = attend(view, edits=edits).out
        wide = replace(view, **{n: getattr(view, n).double() for n in ("q", "k", "v")})
        torch.testing.assert_close(out.double(), attend(wide, edits=edits).out, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_softplus_in_half_precision_is_worked_out_in_single() -> None:
    view = call(Softplus(), dtype=torch.bfloat16)
    wide = replace(view, **{n: getattr(view, n).float() for n in ("q", "k", "v")})
    out = attend(view).out
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), attend(wide).out, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("key", "value"), [("zero", True), ("score", False), ("none", True)])
def test_a_bias_of_no_position_stands_in_any_model(key: str, value: bool) -> None:
    CHECKS["converts"].run(KeyBias(key=key, value=value))


@torch.no_grad()
def test_a_learned_key_stands_in_a_model_that_knows_its_positions(tmp_path: Path) -> None:
    """A padded text gives what it gives alone; saved and loaded, the model is as it was."""
    model, inputs = tiny.model("llama"), tiny.inputs("llama", padding="left", length=14)
    foveate.convert(model, KeyBias(value=True))
    for name, parameter in model.named_parameters():
        if ".rule." in name:
            torch.nn.init.normal_(parameter)
    real = inputs["attention_mask"].bool()
    place = (real.cumsum(-1) - 1).clamp_min(0)
    out = model(**inputs, position_ids=place)[0]
    alone = model(**{name: t[1:][:, real[1]] for name, t in inputs.items()})[0]
    torch.testing.assert_close(out[1:][:, real[1]], alone, rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, tokenizer=False)[0]
    torch.testing.assert_close(again(**inputs, position_ids=place)[0], out)


@torch.no_grad()
def test_other_rows_of_an_encoder_stay() -> None:
    model, inputs = tiny.model("bert"), tiny.inputs("bert", padding="right", length=12)
    before = model(**inputs)[0]
    foveate.convert(model, LogNToken(tokens=0))
    torch.testing.assert_close(model(**inputs)[0], before)
    foveate.convert(model, LogNToken(trained=4), layers=1)
    after = model(**inputs)[0]
    real = inputs["attention_mask"].bool()
    assert (after - before)[:, 0].abs().max() > 1e-5
    torch.testing.assert_close(after[:, 1:][real[:, 1:]], before[:, 1:][real[:, 1:]])


@torch.no_grad()
def test_a_bias_by_position_is_scaled_with_its_score() -> None:
    view = call(LogNToken(trained=4), FULL)
    bias = torch.randn(1, HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(2)).double()
    bias[..., 3] = -torch.inf
    scores = 0.7 * view.q @ view.k.repeat_interleave(2, 1).mT + bias
    scores[:, :, 0] *= math.log(LENGTH) / math.log(4)
    want = torch.softmax(scores, -1) @ view.v.repeat_interleave(2, 1)
    torch.testing.assert_close(attend(replace(view, bias=bias)).out, want)


@pytest.mark.parametrize(
    ("make", "kind", "said"),
    [
        (lambda: Softplus(power=0.5), BadParameter, "power must be from 1.0 to 64.0"),
        (lambda: Sigmoid(length=-1), BadParameter, "length must be from 0"),
        (lambda: KeyBias(key="learnt"), BadParameter, "'learned' | 'score' | 'zero' | 'none'"),
        (lambda: foveate.nn.Attention(8, 2, rule=LogNToken()), BadInput, "LogNToken has no causal form"),
        (lambda: foveate.convert(tiny.model("llama"), "log_n_token"), BadInput, "LogNToken has no causal form"),
    ],
)
def test_bad_input(make: Callable[[], Any], kind: type[Exception], said: str, unchecked: None) -> None:
    with pytest.raises(kind) as caught:
        make()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
