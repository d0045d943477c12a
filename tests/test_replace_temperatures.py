"""Temperatures and weights of features, against their papers' formulas written out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import foveate
from attending import HEADS, KV_HEADS, LENGTH, WIDTH, module, projected, texts
from foveate.core.errors import BadInput
from foveate.core.rows import attend
from foveate.core.rule import Sizes
from foveate.nn import Attention, auxiliary_loss
from foveate.replace import EntropyGuided, GaussianAdaptive, Selective
from foveate.replace.temperatures.entropy_guided import EntropyGuidedBlock
from foveate.testing import tiny, views
from foveate.testing.checks.measuring import ruled


def mixed(attention: Attention, scores: Tensor, v: Tensor) -> Tensor:
    late = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    p = scores.masked_fill(late, -torch.inf).softmax(-1)
    return attention.o_proj((p @ v).transpose(1, 2).flatten(2))


@torch.no_grad()
@pytest.mark.parametrize("position", [0.0, 0.2])
def test_selective_is_its_formula(position: float) -> None:
    attention, x = module(Selective(position)), texts()
    own, (q, k, v) = attention.rule.learned, projected(attention, x)
    tau_q = torch.zeros(2, HEADS, LENGTH, dtype=torch.float64)
    tau_v = torch.zeros(2, HEADS, LENGTH, dtype=torch.float64)
    for i in range(LENGTH):
        n = math.log(i + 1)
        for h in range(HEADS):
            share, share_v = (own.alpha[h].sigmoid(), own.alpha_value[0].sigmoid()) if position else (0.0, 0.0)
            tau_q[:, h, i] = (x[:, i] * own.query).sum(-1).tanh() + 1 + share * n
            gelu = v[:, h, i] * 0.5 * (1 + torch.erf(v[:, h, i] / math.sqrt(2)))
            tau_v[:, h, i] = (gelu * own.value).sum(-1).tanh() + 1 + share_v * n
    scores = tau_q[..., None] * (q @ k.mT) / math.sqrt(WIDTH // HEADS)
    want = mixed(attention, scores, v * tau_v[..., None])
    assert torch.allclose(attention(x), want, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("rule", [Selective(position=0.0), EntropyGuided()])
def test_a_loaded_model_stays_as_it_was(rule: object) -> None:
    model, inputs = tiny.model("llama"), tiny.inputs("llama", padding="left", length=14)
    before = model(**inputs).logits
    after = foveate.convert(model, rule)(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert torch.allclose(after[real], before[real], atol=1e-5)


def test_selective_costs_under_half_a_percent() -> None:
    learned = Selective().learned(Sizes(576, heads=9, kv_heads=3, head_dim=64))
    assert sum(p.numel() for p in learned.parameters()) == 650
    assert 650 < 0.005 * 576 * (2 * 576 + 2 * 192)


def test_selective_wants_the_layers_input() -> None:
    with pytest.raises(BadInput, match="reads the layer's input"):
        attend(replace(ruled(Selective(), views.view("causal")), hidden=None))


@torch.no_grad()
def test_entropy_guided_is_its_formula() -> None:
    attention, x = module(EntropyGuided(positions=6, temperature=0.5)), texts()
    q, k, v = projected(attention, x)
    t = attention.rule.learned.log_temperature.exp()
    scores = q @ k.mT / math.sqrt(WIDTH // HEADS)
    for i in range(LENGTH):
        scores[:, :, i] /= t[:, min(i, 5)][:, None]
    assert torch.allclose(attention(x), mixed(attention, scores, v), atol=1e-10)


def test_entropy_loss_is_its_algorithm() -> None:
    rule = EntropyGuided(threshold=0.3, tolerance=0.15, weight=2.0)
    attention, x = module(rule).train(), texts()
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[1, :3] = False
    attention(x, mask=real)
    found = auxiliary_loss(attention)
    assert float(auxiliary_loss(attention)) == 0, "reading it forgets it"

    q, k, _ = projected(attention, x)
    t, threshold = attention.rule.learned.log_temperature.exp(), attention.rule.learned.threshold
    total, penalised = torch.zeros((), dtype=torch.float64), 0
    for text, begin in ((0, 0), (1, 3)):
        for h in range(HEADS):
            mean = torch.zeros((), dtype=torch.float64)
            for i in range(begin, LENGTH):
                s = k[text, h, begin : i + 1] @ q[text, h, i] / math.sqrt(WIDTH // HEADS) / t[h, i - begin]
                p = s.softmax(0)
                mean = mean - (p * p.log()).sum() / (LENGTH - begin)
            largest = math.log(LENGTH - begin)
            off = mean - threshold[h] * largest
            if abs(off) > 0.15 * largest:
                total, penalised = total + off**2, penalised + 1
    assert 0 < penalised < 2 * HEADS, "some heads are inside of the tolerance and some are not"
    assert torch.allclose(found, 2.0 * total / (2 * HEADS), rtol=1e-5)
    found.backward()
    learned = attention.rule.learned
    assert learned.threshold.grad.abs().sum() > 0
    assert learned.log_temperature.grad.abs().sum() > 0


def test_entropies_inside_of_the_tolerance_cost_nothing() -> None:
    attention = module(EntropyGuided(tolerance=1.0, weight=1.0)).train()
    attention(texts())
    assert float(auxiliary_loss(attention).detach()) == 0


def test_the_block_has_no_nonlinearity_but_softmax() -> None:
    torch.manual_seed(0)
    block, x = EntropyGuidedBlock(WIDTH, HEADS, KV_HEADS).double(), texts()
    block.alpha.data.fill_(2.0)
    block.beta.data.fill_(0.7)
    y = x + block.attention(x)
    want = 0.7 * y + y @ block.feed_forward.weight.T / 2.0
    assert torch.allclose(block(x), want)
    cache = DynamicCache()
    parts = [block(x[:, a:b], cache=cache) for a, b in ((0, 4), (4, 5), (5, LENGTH))]
    assert torch.allclose(torch.cat(parts, 1), want)
    assert float(block.attention.q_proj.weight.detach().std()) == pytest.approx(0.02, rel=0.2)
    block(x).square().sum().backward()
    silent = [n for n, p in block.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert silent == ["attention.rule.learned.threshold"]


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_gaussian_adaptive_is_its_formula_over_tokens(causal: bool) -> None:
    attention, x = module(GaussianAdaptive(), causal=causal), texts()
    own, want = attention.rule.learned, torch.zeros_like(texts())
    for t in range(LENGTH):
        seen = x[:, : t + 1] if causal else x
        mean = seen.mean(1)
        var = (seen**2).mean(1) - mean**2
        y = (x[:, t] - mean - own.offset) / torch.sqrt(var + 1e-5)
        want[:, t] = x[:, t] * torch.exp(-(y**2) / (2 * own.log_spread.exp()))
    assert torch.allclose(attention(x), want, atol=1e-10)


@torch.no_grad()
def test_gaussian_adaptive_is_its_formula_over_features() -> None:
    attention, x = module(GaussianAdaptive(axis="features")), texts()
    own, want = attention.rule.learned, torch.zeros_like(texts())
    for first in range(0, WIDTH, WIDTH // HEADS):
        own_slice = slice(first, first + WIDTH // HEADS)
        part = x[..., own_slice]
        mean, var = part.mean(-1, keepdim=True), part.var(-1, correction=0, keepdim=True)
        y = (part - mean - own.offset[own_slice]) / torch.sqrt(var + 1e-5)
        want[..., own_slice] = part * torch.exp(-(y**2) / (2 * own.log_spread[own_slice].exp()))
    assert torch.allclose(attention(x), want, atol=1e-10)


@torch.no_grad()
def test_running_moments_survive_a_large_mean() -> None:
    attention, x = module(GaussianAdaptive()), texts()
    want = attention.float()(x.float()) / x.float()
    moved = attention((x + 1000.0).float()) / (x + 1000.0).float()
    assert torch.allclose(moved, want, atol=2e-3)


@torch.no_grad()
def test_the_importance_factor_runs_from_0_to_1() -> None:
    learned, x = module(GaussianAdaptive()).rule.learned, texts()
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[1, 5:] = False
    found = learned.importance(x, real)
    alone = []
    for text in (x[:1], x[1:, :5]):
        for t in range(text.shape[1]):
            seen = text[0, : t + 1]
            y = (seen[-1] - seen.mean(0) - learned.offset) / torch.sqrt(seen.var(0, correction=0) + 1e-5)
            alone.append(torch.exp(-(y**2) / (2 * learned.log_spread.exp())))
    mean = torch.stack(alone).mean(0)
    assert torch.allclose(found, (mean - mean.min()) / (mean.max() - mean.min()))
    assert float(found.min()) == 0
    assert float(found.max()) == 1


@torch.no_grad()
def test_the_state_of_running_moments_is_small() -> None:
    attention, cache = module(GaussianAdaptive()), DynamicCache()
    attention(texts(), cache=cache)
    assert cache.layers[0].bytes_held() == 2 * (3 * WIDTH + 1) * 8


def test_gaussian_adaptive_refuses_heads_that_do_not_divide() -> None:
    with pytest.raises(BadInput, match="no multiple of 3 heads"):
        Attention(16, 3, rule=GaussianAdaptive(axis="features"), head_dim=4)
