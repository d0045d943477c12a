"""What helps training: the p-Laplacian adapter and subsampled attention, against their formulas written out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import foveate
from foveate.core.errors import BadInput
from foveate.core.rows import View, attend
from foveate.core.rule import Rule
from foveate.nn import Attention
from foveate.replace import PLaplacian, Softmax, Subsampled
from foveate.replace.training.subsampled import ensemble, noise
from foveate.testing import tiny, views
from foveate.testing.checks.measuring import ruled


def doubled(view: View) -> View:
    """The call in float64, its rule's parameters too."""
    if view.learned is not None:
        view.learned.double()
    return replace(view, **{n: getattr(view, n).double() for n in "qkv"}, hidden=view.hidden.double())


def seen_by(view: View, entry: int, t: int) -> list[int]:
    """The keys that a row may see."""
    mask = view.mask
    return list(range(int(mask.low.expand(view.batch, -1)[entry, t]), int(mask.high.expand(view.batch, -1)[entry, t])))


# ---------------------------------------------------------------- p-Laplacian


@pytest.mark.parametrize(("situation", "power"), [("causal", 1.25), ("left_padded", 3.0), ("cross", 1.5)])
def test_adapter_is_the_formula(situation: str, power: float) -> None:
    view = doubled(ruled(PLaplacian(reduction=4, p=power), views.view(situation)))
    adapter, plain = view.learned, attend(replace(view, rule=Softmax(), learned=None)).out
    heads, group = view.heads, view.heads // view.kv_heads
    p = adapter.p.item()
    c = 2 * 0.1 * (2 + torch.tanh(adapter.mu).item()) / p
    want = plain.clone()
    for entry in range(view.batch):
        nodes = [
            adapter.value_nodes(torch.cat([view.v[entry, h // group, j] for h in range(heads)])).view(heads, -1)
            for j in range(view.keys)
        ]
        for t in range(view.queries):
            keys = seen_by(view, entry, t)
            if not keys:
                continue
            row = adapter.query_nodes(view.hidden[entry, t]).view(heads, -1)
            parts = []
            for h in range(heads):
                s = torch.stack([view.scale * view.q[entry, h, t] @ view.k[entry, h // group, j] for j in keys])
                a = torch.softmax(s, 0)
                apart = torch.stack([(row[h] - nodes[j][h]).square().sum() for j in keys])
                again = a * (a * apart) ** ((p - 2) / 2)
                total = again.sum() + c
                parts.append(
                    sum(w * nodes[j][h] for w, j in zip(again, keys, strict=True)) / total + c * row[h] / total
                )
            out = plain[entry, :, t].flatten()
            added = adapter.up(torch.nn.functional.gelu(adapter.gate(out)) * torch.cat(parts))
            want[entry, :, t] = (out + added).view(heads, -1)
    real = view.mask.rows.expand(view.batch, -1)
    assert torch.allclose(attend(view).out.transpose(1, 2)[real], want.transpose(1, 2)[real], atol=1e-8)


def test_a_fresh_adapter_adds_nothing_and_a_trained_one_learns_everywhere() -> None:
    model, inputs = tiny.model("llama"), tiny.inputs("llama")
    before = model(**inputs).logits
    foveate.convert(model.requires_grad_(False), PLaplacian())
    assert torch.allclose(model(**inputs).logits, before, atol=1e-5)
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(".rule.learned." in name for name in own)
    steps = torch.optim.SGD(own.values(), lr=1.0)
    for _ in range(2):
        steps.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        steps.step()
    for name, parameter in own.items():
        assert float(parameter.grad.abs().max()) > 0, name


def test_features_that_are_the_same_stay_finite() -> None:
    view = ruled(PLaplacian(p=1.0), views.view("causal", dtype=torch.bfloat16))
    for nodes in (view.learned.query_nodes, view.learned.value_nodes):
        torch.nn.init.zeros_(nodes.weight)
        torch.nn.init.ones_(nodes.bias)
    view.q.requires_grad_()
    out = attend(view).out
    out.float().sum().backward()
    assert bool(out.isfinite().all())
    assert bool(view.q.grad.isfinite().all())


# ---------------------------------------------------------------- subsampling


def weights_of(rule: Rule, keys: int = 40, layer: int = 1, training: bool = False, causal: bool = True) -> Tensor:
    """The weights of one head: values that are unit vectors show them."""
    mask = views.with_mask(causal=causal)
    view = ruled(rule, views.view("causal", batch=1, queries=keys, keys=keys, heads=2, kv_heads=1, mask=mask))
    layers = replace(view.layer, index=layer)
    v = torch.eye(keys)[None, None]
    return attend(replace(view, v=v, layer=layers, training=training)).out[0]


@pytest.mark.parametrize("every", [2, 4, 7])
def test_one_key_of_a_few_is_drawn(every: int) -> None:
    rule = Subsampled(every=every, draw=3)
    w = weights_of(rule)
    drawn = (w[0, -1] > 0).nonzero()[:, 0].tolist()
    assert drawn[0] == 0
    assert [j // every for j in drawn] == list(range(len(drawn)))
    assert 40 // every <= len(drawn) <= -(-40 // every)
    full = weights_of(Subsampled())
    for head in range(2):
        for t in range(40):
            keys = [j for j in drawn if j <= t]
            want = torch.zeros(40)
            want[keys] = full[head, t, keys] / full[head, t, keys].sum()
            assert torch.allclose(w[head, t], want, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_near_keys_are_seen_in_any_case(causal: bool) -> None:
    rule, keys = Subsampled(every=5, window=4, draw=2), 43
    far = set((weights_of(replace(rule, window=0), keys=keys)[0, -1] > 0).nonzero()[:, 0].tolist())
    w, full = weights_of(rule, keys=keys, causal=causal), weights_of(Softmax(), keys=keys, causal=causal)
    for head in range(2):
        for t in range(keys):
            want = torch.zeros(keys)
            seen = [j for j in range(t + 1 if causal else keys) if j in far or abs(t - j) < 4]
            want[seen] = full[head, t, seen] / full[head, t, seen].sum()
            assert torch.allclose(w[head, t], want, atol=1e-5)


def test_near_and_drawn_keys_together_need_no_rows() -> None:
    for name in ("causal", "left_padded_window", "sinks_window_padded", "soft_cap", "full_right_padded", "empty_rows"):
        view = ruled(Subsampled(every=3, window=2 * ("_" in name), draw=1), views.view(name))
        found, rows = attend(view), attend(view, engine="reference", dtype=torch.float64)
        assert found.engine == "shortcut"
        real = view.mask.rows.expand(view.batch, -1)
        assert torch.allclose(found.out.transpose(1, 2)[real], rows.out.transpose(1, 2)[real], atol=1e-5)


def test_a_row_without_a_drawn_key_gives_zeros() -> None:
    view = ruled(Subsampled(every=8, draw=2), views.view("window"))
    view.q.requires_grad_()
    for engine in ("blocks", "auto"):
        out = attend(view, engine=engine).out
        none = (out == 0).all(-1)[:, 0]
        assert bool(none.any())
        assert not bool(none.all())
        gradient = torch.autograd.grad(out.square().sum(), view.q)[0]
        assert bool(gradient.isfinite().all())


def test_draws_differ_and_stay_what_they_are() -> None:
    rule = Subsampled(draw=1)
    a, again = weights_of(rule), weights_of(rule)
    assert torch.equal(a, again)
    for other in (weights_of(Subsampled(draw=2)), weights_of(rule, layer=2)):
        assert not torch.equal(a > 0, other > 0)


def test_training_draws_anew_and_tests_see_all() -> None:
    rule = Subsampled()
    torch.manual_seed(0)
    first, second = weights_of(rule, training=True), weights_of(rule, training=True)
    torch.manual_seed(0)
    assert torch.equal(weights_of(rule, training=True), first)
    assert not torch.equal(first > 0, second > 0)
    assert bool((weights_of(rule) > 0).tril().sum() == 2 * 40 * 41 / 2)
    assert torch.equal(weights_of(Subsampled(every=1), training=True), weights_of(Softmax()))


def test_what_follows_handles_the_drawn_keys_alone() -> None:
    view = ruled(Subsampled(every=4, draw=1), views.view("odd_length"))
    assert view.keys == 67
    assert view.rule.thinned(view).keys == 17
    # where nothing but rows can be made, of few keys
    assert view.rule.prepare(replace(view, dropout=0.1)).keys == 17
    crossing = ruled(view.rule, views.view("cross"))
    assert view.rule.prepare(crossing).rule == Rule()


def test_gradients_reach_the_drawn_keys_alone() -> None:
    module = Attention(32, heads=4, rule=Subsampled(every=4, draw=1)).train()
    x = torch.randn(1, 16, 32, requires_grad=True)
    module(x)[:, -1].sum().backward()
    touched = (x.grad[0].abs().sum(-1) > 0).nonzero()[:, 0].tolist()
    assert len(touched) in (4, 5)
    assert touched[-1] == 15


def test_an_ensemble_is_the_mean_of_its_draws() -> None:
    model, inputs = tiny.model("llama"), tiny.inputs("llama", length=20)
    foveate.convert(model, Subsampled(every=3))
    found = ensemble(model, samples=2, **inputs)
    assert all(layer.self_attn.rule.operator == Subsampled(every=3) for layer in model.model.layers)
    parts = []
    for draw in (1, 2):
        foveate.convert(model, Subsampled(every=3, draw=draw))
        parts.append(model(**inputs).logits.softmax(-1))
    assert torch.allclose(found.exp(), (parts[0] + parts[1]) / 2, atol=1e-6)
    assert not torch.allclose(parts[0], parts[1], atol=1e-4)


def test_an_ensemble_of_nothing_is_refused() -> None:
    model = tiny.model("llama")
    with pytest.raises(BadInput, match="no attention of LlamaForCausalLM subsamples"):
        ensemble(model, **tiny.inputs("llama"))
    foveate.convert(model, "subsampled", layers=0)
    with pytest.raises(BadInput, match="1 or more"):
        ensemble(model, samples=0, **tiny.inputs("llama"))


def test_noise_is_even_and_has_no_state() -> None:
    x = noise(torch.arange(-1000, 100_000), 12)
    assert float(x.min()) >= 0
    assert float(x.max()) < 1
    assert abs(float(x.mean()) - 0.5) < 0.005
    assert abs(float(torch.corrcoef(torch.stack([x[1:], x[:-1]]))[0, 1])) < 0.02
    assert torch.equal(noise(torch.tensor([5]), 12), x[1005:1006])
