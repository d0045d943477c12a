"""Mixtures of heads and of whole attention modules, against their formulas written out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.core.errors import BadInput, BadParameter, NotSupported
from foveate.core.rows import Rows, View, attend
from foveate.nn import Attention, auxiliary_loss
from foveate.replace import AttentionExperts, MixtureOfHeads
from foveate.replace.heads.attention_experts import upcycled
from foveate.testing import tiny, views
from foveate.testing.checks.measuring import moved, ruled

LEARNED = [
    {},
    {"active": 1.0, "shared": 0.25},
    {"active": 0.5, "shared": 0.0},
    {"active": 1.0, "shared": 1.0},
]


def by_hand(view: View, options: dict[str, float]) -> Tensor:
    """Head outputs weighed by the learned routers, token by token and head by head."""
    out = attend(replace(view, rule=foveate.replace.Softmax(), learned=None)).out
    heads = view.heads
    shared = int(options.get("shared", 0.5) * heads)
    kept = max(1, int(options.get("active", 0.75) * heads) - shared)
    weights = {n: p.detach().double() for n, p in view.learned.named_parameters()}
    new = out.clone()
    for entry in range(view.batch):
        for t in range(view.queries):
            x = view.hidden[entry, t].double()
            kind = torch.ones(2, dtype=torch.float64)
            if 0 < shared < heads:
                kind = 2 * torch.softmax(weights["kind.weight"] @ x, 0)
            a = torch.ones(shared, dtype=torch.float64)
            if shared > 1:
                a = shared * torch.softmax(weights["shared.weight"] @ x, 0)
            for i in range(shared):
                new[entry, i, t] = kind[0] * a[i] * out[entry, i, t]
            if shared < heads:
                b = torch.softmax(weights["routed.weight"] @ x, 0)
                top = sorted(range(heads - shared), key=lambda i, b=b: -float(b[i]))[:kept]
                for i in range(heads - shared):
                    g = kept * b[i] / sum(b[j] for j in top) if i in top else 0.0
                    new[entry, shared + i, t] = kind[1] * g * out[entry, shared + i, t]
    return new


@pytest.mark.parametrize("options", LEARNED, ids=str)
def test_learned_routers_weigh_heads(options: dict[str, float]) -> None:
    view = ruled(MixtureOfHeads(**options), views.view("causal"))
    view = replace(view, **{n: getattr(view, n).double() for n in "qkv"}, hidden=view.hidden.double())
    assert torch.allclose(attend(view).out, by_hand(view, options), atol=1e-9)


def test_norms_of_queries_choose_heads() -> None:
    view = ruled(MixtureOfHeads(router="norm", shared=0.25), views.view("causal"))
    plain = attend(replace(view, rule=foveate.replace.Softmax())).out
    out = attend(view).out
    for entry in range(view.batch):
        for t in range(view.queries):
            norms = [float(view.q[entry, h, t].norm()) for h in range(4)]
            # one shared head and the two longest of the other three
            counts = {0, *sorted((1, 2, 3), key=lambda h, norms=norms: -norms[h])[:2]}
            for h in range(4):
                want = plain[entry, h, t] if h in counts else torch.zeros(8)
                assert torch.equal(out[entry, h, t], want)


def test_in_training_the_gradient_of_a_gate_goes_to_its_score() -> None:
    rule = MixtureOfHeads(router="norm", shared=0.25)
    view = ruled(rule, views.view("causal"))
    view = replace(view, q=view.q.double().requires_grad_(), training=True)
    out, weigh = torch.randn(2, *view.q.shape, dtype=torch.float64)
    found = torch.autograd.grad((rule.finish(view, out) * weigh).sum(), view.q)[0]
    n = view.q[:, 1:].norm(dim=-1)
    b = torch.softmax(n / n.std(1, keepdim=True), 1)
    want = torch.autograd.grad((b * (out * weigh).sum(-1)[:, 1:]).sum(), view.q)[0]
    assert torch.allclose(found, want, atol=1e-8)
    assert not rule.finish(replace(view, training=False), out).requires_grad


def test_balance_loss_is_that_of_the_paper_and_leaves_padding_out() -> None:
    rule = MixtureOfHeads(balance=0.5)
    view = ruled(rule, views.view("left_padded"))
    rows = Rows(replace(view, training=True), view.q, {}, "auto")
    p, f, tokens = torch.zeros(2), torch.zeros(2), 0
    for entry, pad in enumerate((0, 6)):
        for t in range(pad, view.queries):
            b = torch.softmax(view.learned.routed.weight @ view.hidden[entry, t], 0)
            p, f, tokens = p + b, f + torch.nn.functional.one_hot(b.argmax(), 2), tokens + 1
    assert torch.allclose(rule.loss(rows), 0.5 * (p / tokens * f / tokens).sum(), atol=1e-6)
    assert float(MixtureOfHeads(shared=1.0, active=1.0).loss(rows)) == 0


def test_a_tuned_model_adds_the_loss_of_its_layers() -> None:
    model, inputs = tiny.model("llama"), tiny.inputs("llama")
    foveate.convert(model, MixtureOfHeads(router="norm", shared=0.25, balance=1.0))
    model(**inputs)
    assert float(auxiliary_loss(model)) == 0
    model.train()(**inputs)
    loss = auxiliary_loss(model)
    # two layers, of three routed heads two: 4/3 where tokens choose evenly, 2 at most
    assert 1.33 < loss.item() < 2
    loss.backward()
    assert float(model.model.layers[0].self_attn.q_proj.weight.grad.abs().max()) > 0


def test_every_router_learns() -> None:
    module = Attention(32, heads=4, kv_heads=2, rule=MixtureOfHeads()).train()
    (module(torch.randn(2, 9, 32)).square().sum() + auxiliary_loss(module)).backward()
    for name, parameter in module.named_parameters():
        assert float(parameter.grad.abs().max()) > 0, name


def test_a_share_below_that_of_the_shared_heads_is_refused() -> None:
    with pytest.raises(BadParameter, match="active must be no less than shared"):
        MixtureOfHeads(active=0.25, shared=0.5)


def test_counts_of_heads() -> None:
    assert MixtureOfHeads().counts(32) == (16, 8)
    assert MixtureOfHeads().counts(9) == (5, 2)
    assert MixtureOfHeads(active=0.5).counts(4) == (2, 1)


# ---------------------------------------------------------------- experts


def dense(count: int = 3, **options: Any) -> list[Attention]:
    """Modules of one architecture, each with weights of its own."""
    torch.manual_seed(0)
    return [Attention(32, 4, 2, rope=100.0, **options).double() for _ in range(count)]


def gates(mixture: Attention, x: Tensor) -> Tensor:
    """How much each token takes of each expert."""
    return torch.softmax(x @ mixture.rule.learned.router.weight.T, -1)


@pytest.mark.parametrize("causal", [True, False])
def test_experts_are_the_dense_modules(causal: bool) -> None:
    made, x = dense(bias=True, causal=causal), torch.randn(2, 9, 32, dtype=torch.float64)
    mixture = upcycled(made)
    moved(mixture.rule.learned.router)
    g = gates(mixture, x)
    want = sum(g[..., e, None] * module(x) for e, module in enumerate(made))
    assert torch.allclose(mixture(x), want, atol=1e-9)


def test_shared_keys_and_values_are_the_mean() -> None:
    made, x = dense(), torch.randn(2, 9, 32, dtype=torch.float64)
    mixture = upcycled(made, kv="shared")
    moved(mixture.rule.learned.router)
    with torch.no_grad():
        for name in ("k_proj", "v_proj"):
            weights = [getattr(module, name).weight for module in made]
            average = (weights[0] + weights[1] + weights[2]) / 3
            for weight in weights:
                weight.copy_(average)
    want = sum(gates(mixture, x)[..., e, None] * module(x) for e, module in enumerate(made))
    assert torch.allclose(mixture(x), want, atol=1e-6)


def test_shared_keys_and_values_are_kept_once() -> None:
    from transformers import DynamicCache

    x, held = torch.randn(1, 9, 32, dtype=torch.float64), {}
    for kv in ("expert", "shared"):
        cache = DynamicCache()
        upcycled(dense(), kv=kv)(x, cache=cache)
        held[kv] = cache.layers[0].state["k"].numel()
    assert held == {"expert": 3 * 9 * 16, "shared": 9 * 16}


def test_every_weight_of_the_experts_learns() -> None:
    for kv in ("expert", "shared"):
        module = Attention(32, 4, 2, AttentionExperts(experts=2, kv=kv, bias="all"))
        module(torch.randn(2, 9, 32)).square().sum().backward()
        for name, parameter in module.named_parameters():
            # a bias of all keys changes no softmax
            if "k_proj.bias" not in name or module.rule.operator.rope:
                assert float(parameter.grad.abs().max()) > 0, name


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_mixture_of_one_model_with_itself_is_that_model(family: str) -> None:
    model, inputs = tiny.model(family), tiny.inputs(family, padding="left")
    real = inputs["attention_mask"].bool()
    mixture = upcycled([model, model])
    assert torch.allclose(mixture(**inputs).logits[real], model(**inputs).logits[real], atol=1e-4)
    assert "foveate_attention" not in model.config.to_dict()


def test_a_mixture_of_models_holds_the_attention_of_each() -> None:
    first, second = tiny.model("llama"), tiny.model("llama")
    torch.manual_seed(7)
    moved(second)
    mixture = upcycled([first, second], kv="expert")
    learned = mixture.model.layers[1].self_attn.rule.learned
    for e, model in enumerate((first, second)):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            want = getattr(model.model.layers[1].self_attn, name).weight
            assert torch.equal(learned.experts[e][name].weight, want)
    ends = [m.model.layers[0].mlp.up_proj.weight for m in (first, second)]
    assert torch.allclose(mixture.model.layers[0].mlp.up_proj.weight, (ends[0] + ends[1]) / 2)
    # all of the second expert, and none of the first
    with torch.no_grad():
        for name, parameter in mixture.named_parameters():
            if name in dict(second.named_parameters()):
                parameter.copy_(second.get_parameter(name))
        for layer in mixture.model.layers:
            only_second(layer.self_attn.rule.learned)
    inputs = tiny.inputs("llama")
    assert torch.allclose(mixture(**inputs).logits, second(**inputs).logits, atol=1e-4)


def only_second(experts: torch.nn.Module) -> None:
    """Makes the second expert speak for both: it is the first, too."""
    experts.experts[0].load_state_dict(experts.experts[1].state_dict())


def test_attention_that_is_more_is_no_expert() -> None:
    for family, why in {
        "qwen3": "no other parameters, and has k_norm.weight",
        "gpt2": "must have q_proj",
        "granite": "is more than projections",
        "cohere": "is more than projections",
    }.items():
        with pytest.raises(NotSupported, match=why):
            upcycled([tiny.model(family)])
    with pytest.raises(NotSupported, match="softmax attention of one sequence"):
        upcycled([Attention(32, 4, rule="relu")])


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_mixed_is_refused() -> None:
    with pytest.raises(BadInput, match="none was given"):
        upcycled([])
    with pytest.raises(BadInput, match="not of one architecture"):
        upcycled([Attention(32, 4), Attention(32, 4, 2)])
    with pytest.raises(BadInput, match="differ in sizes, positions"):
        upcycled([Attention(32, 4, rope=10.0), Attention(32, 4, rope=20.0)])
    with pytest.raises(BadInput, match="Linear is no"):
        upcycled([torch.nn.Linear(2, 2)])
    with pytest.raises(BadInput, match="rope=0"):
        Attention(20, 4, rule=AttentionExperts())
