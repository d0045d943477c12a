"""Attention by states with decays and flows against its formulas, token by token in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu
from transformers import DynamicCache

from attending import HEADS, KV_HEADS, LENGTH, WIDTH, module, projected, texts
from foveate.core.errors import BadInput, BadParameter, NotSupported
from foveate.core.mask import Mask
from foveate.core.mixer import Tokens
from foveate.core.recurrence import Heads
from foveate.core.rule import Operator
from foveate.core.states import weights
from foveate.nn import Attention
from foveate.replace import Agent, Flow, Lightnet, SimplifiedLinear, Soft, Transnormer
from foveate.replace.linear._repbn import PRepBN
from foveate.replace.linear.soft import inverse, kernel

DIM = WIDTH // HEADS
CAUSAL = [
    Transnormer(3),
    Transnormer(3, lrpe=0),
    Flow(),
    Lightnet(3),
    Lightnet(3, (3,)),
    SimplifiedLinear(),
    SimplifiedLinear(3, 10),
]
WHOLE = [Agent(4), Agent(20, 0, 0.2, 0.3), Soft(4), Soft(20, 5, 0)]
FULL = [*CAUSAL, *WHOLE]


def made(rule: Operator, causal: bool = True, **options: Any) -> tuple[Attention, Tensor, list[Tensor]]:
    """A module whose outputs are those of its heads, its input, and q, k and v."""
    attention = module(rule, causal=causal, **options)
    torch.nn.init.eye_(attention.o_proj.weight)
    x = texts()
    return attention, x, projected(attention, x)


def seen(t: int, causal: bool) -> range:
    return range(t + 1 if causal else LENGTH)


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def beside(out: list[Tensor]) -> Tensor:
    """Outputs of tokens, [batch, heads, dim] each, as the module has them."""
    return torch.stack(out, 1).flatten(2)


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize("rule", FULL, ids=str)
@torch.no_grad()
def test_where_all_see_all_padding_changes_nothing(rule: Operator) -> None:
    attention = module(rule, causal=False)
    x = texts()[:1]
    want = attention(x)
    for left, right in ((3, 0), (0, 5), (2, 4)):
        wide = torch.nn.functional.pad(x, (0, 0, left, right), value=torch.nan)
        real = torch.zeros(1, LENGTH + left + right, dtype=torch.bool)
        real[:, left : left + LENGTH] = True
        torch.testing.assert_close(attention(wide, mask=real)[real], want[0])
    assert attention(x[:, :1]).isfinite().all()
    empty = attention(torch.full_like(x, torch.nan), mask=torch.zeros(1, LENGTH, dtype=torch.bool))
    assert empty.isfinite().all()


@pytest.mark.parametrize("rule", FULL, ids=str)
def test_where_all_see_all_derivatives_are_those_of_differences(rule: Operator) -> None:
    attention, x = module(rule, causal=False), texts().requires_grad_()
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[1, 6:] = False
    leaves = [x, *attention.parameters()]
    weigh = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    along = [torch.randn(p.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64) for p in leaves]

    def loss() -> Tensor:
        return (attention(x, mask=real) * weigh)[real].sum()

    found = sum(dot(g.flatten(), a.flatten()) for g, a in zip(torch.autograd.grad(loss(), leaves), along, strict=True))
    ends = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for p, a in zip(leaves, along, strict=True):
                p += step * a
            ends.append(loss())
    torch.testing.assert_close(found, (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rule", CAUSAL, ids=str)
@torch.no_grad()
def test_packed_texts_are_as_if_each_were_alone(rule: Operator, causal: bool) -> None:
    attention, x = module(rule, causal=causal), texts()
    numbers = torch.tensor([0] * 4 + [1] * 3 + [2] * 2)
    together = attention(x, mask=(numbers[:, None] == numbers)[None, None])
    for a, b in ((0, 4), (4, 7), (7, 9)):
        torch.testing.assert_close(together[:, a:b], attention(x[:, a:b]))
    if causal:
        cache = DynamicCache()
        parts = [
            attention(x[:, a:b], mask=(numbers[a:b, None] == numbers[:b])[None, None], cache=cache)
            for a, b in ((0, 5), (5, 6), (6, 9))
        ]
        torch.testing.assert_close(torch.cat(parts, 1), together)


SIZES = {
    Transnormer(3): HEADS * 2 * DIM * DIM,
    Transnormer(3, lrpe=0): HEADS * DIM * DIM,
    Flow(): HEADS * (DIM * DIM + 4 * DIM + 2),
    Lightnet(3): KV_HEADS * (2 * DIM * DIM + DIM),
    SimplifiedLinear(5): KV_HEADS * (DIM * (DIM + 1) + 4 * DIM),
}


@pytest.mark.parametrize("rule", SIZES, ids=str)
@torch.no_grad()
def test_states_do_not_grow(rule: Operator) -> None:
    attention, cache = module(rule), DynamicCache()
    for part in texts()[:1].split([6, 1, 2], 1):
        attention(part, cache=cache)
        assert cache.layers[0].bytes_held() == 8 * SIZES[rule]


@pytest.mark.parametrize("rule", [Flow(), Lightnet(), SimplifiedLinear(), *WHOLE], ids=str)
def test_all_tokens_at_once(rule: Operator) -> None:
    attention, cache = module(rule, causal=False), DynamicCache()
    attention(texts(), cache=cache)
    with pytest.raises(NotSupported, match="at once; call it without a cache"):
        attention(texts(), cache=cache)


@pytest.mark.parametrize(("rule", "causal"), [*((r, True) for r in CAUSAL), *((r, False) for r in FULL)], ids=str)
@torch.no_grad()
def test_a_scan_is_the_whole_call(rule: Operator, causal: bool) -> None:
    """What analyses read, `scan`, gives the weights of the outputs."""
    attention, x, (q, k, v) = made(rule, causal)
    tokens = Tokens.of(x, Mask.of_padding(None, LENGTH, LENGTH, causal=causal))
    heads = Heads(q, k[:, ::2], v[:, ::2], tokens, DIM**-0.5, attention.rule.learned, attention.sizes)
    scan = rule.scan(heads)
    written = scan.v.repeat_interleave(HEADS // scan.v.shape[1], 1)
    out = rule.finish(heads, weights(scan) @ written)
    torch.testing.assert_close(attention(x), out.transpose(1, 2).flatten(2))


OTHERS = [
    (Transnormer(3), Transnormer(4)),
    (Transnormer(3, 1), Transnormer(3, 2)),
    (Lightnet(3, (3,)), Lightnet(3, (2,))),
    (Agent(4), Agent(5)),
    (Agent(exponent=0.2), Agent(exponent=0.5)),
    (Agent(shortcut=0.2), Agent()),
    (Soft(4), Soft(5)),
    (Soft(steps=5), Soft(steps=6)),
    (SimplifiedLinear(norm=1), SimplifiedLinear(norm=1000)),
    (SimplifiedLinear(norm=1000, warm=50), SimplifiedLinear(norm=1000)),
]


@pytest.mark.parametrize(("one", "other"), OTHERS, ids=str)
@torch.no_grad()
def test_parameters_change_the_output(one: Operator, other: Operator) -> None:
    found = []
    for rule in (one, other):
        attention = module(rule, causal=rule.causal, layer=1).train()
        # what has other parameters has other random ones, too
        for parameter in attention.rule.parameters():
            parameter.fill_(0.5)
        for _ in range(3):
            out = attention(texts())
        found.append(out)
    assert (found[0] - found[1]).abs().max() > 1e-6


@pytest.mark.parametrize("rule", [Agent, Soft, SimplifiedLinear], ids=str)
@torch.no_grad()
def test_windows_are_as_wide_as_they_say(rule: Any) -> None:
    attention = module(rule(local=5), causal=False)
    own, v = attention.rule.learned, torch.zeros(1, HEADS, LENGTH, DIM, dtype=torch.float64)
    v[:, :, 4] = 1
    local = getattr(own, "local", own)
    y = local(v, Tokens.of(texts()[:1], Mask.of_padding(None, LENGTH, LENGTH, causal=False)))
    assert (y != y[:, :, :1]).any(3).any(1)[0].tolist() == [False] * 2 + [True] * 5 + [False] * 2


# ---------------------------------------------------------------- TransNormerLLM


def test_slopes_are_those_of_alibi() -> None:
    def of(heads: int) -> list[float]:
        return Transnormer(1).rates(Attention(4 * heads, heads).sizes).div(1 + 1e-5).tolist()

    assert of(8) == pytest.approx([1 / 2**h for h in range(1, 9)])
    assert of(1) == pytest.approx([2**-8])
    # 4 of 4 heads, then the first and third of 8
    assert of(6) == pytest.approx([1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("layer", "lrpe"), [(0, 1), (1, 1), (1, 2), (2, 0)])
@torch.no_grad()
def test_transnormer_is_its_formula(layer: int, lrpe: int, causal: bool) -> None:
    attention, x, (q, k, v) = made(Transnormer(3, lrpe), causal, layer=layer)
    own, out = attention.rule.learned, []
    assert (own.theta is None) == (layer >= lrpe)
    rate = torch.tensor([2 ** (-2 * h) for h in range(1, 5)], dtype=torch.float64) * (1 - layer / 2 + 1e-5)
    for t in range(LENGTH):
        o = torch.zeros(2, HEADS, DIM, dtype=torch.float64)
        for s in seen(t, causal):
            met = silu(q[:, :, t]) * silu(k[:, :, s])
            if own.theta is not None:
                met = met * torch.cos((t - s) * own.theta)
            o += (met.sum(-1) * torch.exp(-rate * abs(t - s)))[..., None] * v[:, :, s]
        o = o.flatten(1)
        o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        out.append((x[:, t] @ own.gate.weight.T * o).unflatten(-1, (HEADS, DIM)))
    torch.testing.assert_close(attention(x), beside(out))


def test_a_fresh_transnormer_turns_by_one_series() -> None:
    theta = Attention(WIDTH, HEADS, rule=Transnormer()).rule.learned.theta
    assert theta.flatten().tolist() == pytest.approx([10_000 ** (-2 * c / WIDTH) for c in range(WIDTH)])


def test_transnormer_knows_its_layers() -> None:
    with pytest.raises(BadInput, match=r"layer 3 of a model with 3 layers: .* give Transnormer\(layers=4\)"):
        module(Transnormer(3), layer=3)
    with pytest.raises(BadParameter, match="layers must be from 1"):
        Transnormer(0)


# ---------------------------------------------------------------- flow attention


@torch.no_grad()
def test_flow_is_its_formula() -> None:
    attention, x, (q, k, v) = made(Flow(), causal=False)
    q, k, e = q.sigmoid(), k.sigmoid(), 1e-6
    incoming = torch.stack([sum(dot(q[:, :, i] + e, k[:, :, j]) for j in range(LENGTH)) for i in range(LENGTH)], 2)
    outgoing = torch.stack([sum(dot(k[:, :, j] + e, q[:, :, i]) for i in range(LENGTH)) for j in range(LENGTH)], 2)
    incoming, outgoing = incoming + e * (q + e).sum(-1), outgoing + e * (k + e).sum(-1)
    sink = dot(q + e, (k / outgoing[..., None]).sum(2, keepdim=True) + e)
    source = dot(k + e, (q / incoming[..., None]).sum(2, keepdim=True) + e).clamp(-1, 1)
    won = LENGTH * torch.softmax(source, -1)
    out = []
    for i in range(LENGTH):
        met = sum(dot(q[:, :, i], k[:, :, j])[..., None] * won[:, :, j, None] * v[:, :, j] for j in range(LENGTH))
        out.append((sink.sigmoid() / incoming)[:, :, i, None] * met)
    torch.testing.assert_close(attention(x), beside(out))
    # at both ends of the clip
    assert (source == 1).any()
    assert (source < 1).any()


@torch.no_grad()
def test_causal_flow_is_its_formula() -> None:
    attention, x, (q, k, v) = made(Flow())
    q, k, e, out = q.sigmoid(), k.sigmoid(), 1e-6, []
    incoming, outgoing, source = [], [], []
    for t in range(LENGTH):
        n = t + 1
        incoming.append(dot(q[:, :, t] + e, k[:, :, :n].sum(2) + e))
        outgoing.append(dot(k[:, :, t] + e, q[:, :, :n].sum(2) + e))
        given = sum(k[:, :, s] * ((s + 1) / outgoing[s])[..., None] for s in range(n))
        got = sum(q[:, :, s] * ((s + 1) / incoming[s])[..., None] for s in range(n))
        sink = dot(q[:, :, t] + e, given + e / 1) / n
        source.append((dot(k[:, :, t] + e, got + e) / n).clamp(-1, 1).exp())
        o = torch.zeros(2, HEADS, DIM, dtype=torch.float64)
        for s in range(n):
            won = (s + 1) * source[s] / sum(source[: s + 1])
            o += dot(q[:, :, t], k[:, :, s])[..., None] * won[..., None] * v[:, :, s]
        out.append((sink.sigmoid() / incoming[t])[..., None] * o)
    torch.testing.assert_close(attention(x), beside(out))


@torch.no_grad()
def test_flow_of_features_that_vanish_is_finite() -> None:
    attention, x, _ = made(Flow())
    for causal in (True, False):
        attention.causal = causal
        for size in (-1e4, 1e4):
            attention.q_proj.weight.fill_(size)
            attention.k_proj.weight.fill_(size)
            assert attention.float()(x.abs().float()).isfinite().all()


# ---------------------------------------------------------------- LightNet


def places(inner: tuple[int, ...]) -> Tensor:
    """The place of each token on each axis."""
    cells = [(n,) for n in range(LENGTH)]
    for size in reversed(inner):
        cells = [(c[0] // size, c[0] % size, *c[1:]) for c in cells]
    return torch.tensor(cells, dtype=torch.float64)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("inner", [(), (3,), (2, 2)])
@torch.no_grad()
def test_lightnet_is_its_formula(inner: tuple[int, ...], causal: bool) -> None:
    attention, x, (q, k, v) = made(Lightnet(3, inner), causal)
    own, at, out = attention.rule.learned, places(inner), []
    width = math.ceil(DIM / at.shape[1])
    theta = own.theta.repeat_interleave(HEADS // KV_HEADS, 0)
    for t in range(LENGTH):
        o = torch.zeros(2, HEADS, DIM, dtype=torch.float64)
        before = list(seen(t, causal))
        share = torch.softmax(k[:, :, before], 2)
        for s in before:
            for c in range(DIM):
                turn = torch.cos((at[t, c // width] - at[s, c // width]) * theta[:, c % width])
                o += (silu(q[:, :, t, c]) * share[:, :, s, c] * turn)[..., None] * v[:, :, s]
        o = o.flatten(1)
        o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * own.weight
        out.append((o * silu(x[:, t] @ own.down.weight.T @ own.up.weight.T)).unflatten(-1, (HEADS, DIM)))
    torch.testing.assert_close(attention(x), beside(out))


@torch.no_grad()
def test_the_last_token_of_a_text_sees_all_of_it() -> None:
    attention, x, _ = made(Lightnet(3))
    last = attention(x)[:, -1]
    attention.causal = False
    torch.testing.assert_close(attention(x)[:, -1], last)


@torch.no_grad()
def test_large_logits_do_not_overflow() -> None:
    attention, x, _ = made(Lightnet(3))
    attention.k_proj.weight.mul_(1e4)
    attention.float()
    want = attention(x.float())
    assert want.isfinite().all()
    cache = DynamicCache()
    parts = [attention(part, cache=cache) for part in x.float().split(1, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_an_order_of_the_tokens_is_none_without_angles() -> None:
    attention, x, _ = made(Lightnet(3), causal=False)
    torch.testing.assert_close(attention(x.flip(1)).flip(1), attention(x))
    attention.rule.learned.theta.zero_()
    shuffled = torch.tensor([3, 1, 0, 8, 2, 5, 4, 7, 6])
    torch.testing.assert_close(attention(x[:, shuffled]), attention(x)[:, shuffled])


def test_bad_grids() -> None:
    with pytest.raises(BadParameter, match="inner must be tuple of"):
        Lightnet(inner=(0,))


# ---------------------------------------------------------------- what stands for the whole text


def means(x: Tensor, count: int) -> Tensor:
    """Adaptive pooling over time, by torch itself."""
    pooled = torch.nn.functional.adaptive_avg_pool1d(x.transpose(2, 3).flatten(0, 1), min(count, LENGTH))
    return pooled.transpose(1, 2).unflatten(0, x.shape[:2])


def convolved(v: Tensor, weight: Tensor, bias: Tensor | None, causal: bool = False) -> Tensor:
    """A depthwise convolution over all channels, by torch itself."""
    width = weight.shape[-1]
    weight = weight.expand(HEADS, DIM, width).reshape(-1, 1, width)
    bias = None if bias is None else bias.expand(HEADS, DIM).flatten()
    x = torch.nn.functional.pad(v.transpose(2, 3).flatten(1, 2), (width - 1, 0) if causal else (width // 2, width // 2))
    return torch.nn.functional.conv1d(x, weight, bias, groups=HEADS * DIM).unflatten(1, (HEADS, DIM)).transpose(2, 3)


@pytest.mark.parametrize("rule", [Agent(4), Agent(5, 5), Agent(9, 0, 0.2, 0.3), Agent(20), Agent(1)], ids=str)
@torch.no_grad()
def test_agents_are_two_softmaxes(rule: Agent) -> None:
    attention, x, (q, k, v) = made(rule, causal=False)
    a = means(q, rule.agents)
    gathered = torch.softmax(a @ k.mT / DIM**0.5, -1) @ v
    out = torch.softmax(q @ a.mT / DIM**rule.exponent, -1) @ gathered + rule.shortcut * v
    if rule.local:
        own = attention.rule.learned
        out = out + convolved(v, own.weight, own.bias)
    torch.testing.assert_close(attention(x), out.transpose(1, 2).flatten(2))


def test_windows_are_odd() -> None:
    for local in (4, 5):
        assert module(Agent(local=local), causal=False).rule.learned.weight.shape == (HEADS, DIM, 5)
    assert module(Agent(local=0), causal=False).rule.learned is None


@pytest.mark.parametrize("rule", [Soft(4), Soft(4, 6, 5), Soft(20, local=0)], ids=str)
@torch.no_grad()
def test_soft_is_its_formula(rule: Soft) -> None:
    attention, x, (q, k, v) = made(rule, causal=False)
    own, X = attention.rule.learned, (q + k) / 2 / DIM**0.25
    Z = means(X, rule.landmarks) @ own.proj.weight.T
    Z = gelu(
        (Z - Z.mean(-1, keepdim=True)) / (Z.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * own.norm.weight
        + own.norm.bias
    )
    P, A = (torch.exp(-torch.cdist(t, Z).square() / 2) for t in (X, Z))
    ridged = A + 0.01 * torch.eye(A.shape[-1])
    Y = 1.8 * ridged / A.sum(-1).amax(-1)[..., None, None] ** 2
    for _ in range(rule.steps):
        Y = 2 * Y - Y @ ridged @ Y
    half = A.sum(-1) ** -0.5
    out = P @ (half[..., None] * Y * half[..., None, :]) @ P.mT @ v
    if rule.local:
        out = out + convolved(v, own.local.weight, None)
    torch.testing.assert_close(attention(x), out.transpose(1, 2).flatten(2))


@torch.no_grad()
def test_newton_comes_to_the_inverse() -> None:
    z = 3 * torch.randn(2, 3, 8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a = kernel(z, z)
    torch.testing.assert_close(inverse(a, 40), torch.linalg.inv(a + 0.01 * torch.eye(8)))
    # landmarks that coincide
    alike = kernel(torch.zeros(1, 49, 4), torch.zeros(1, 49, 4))
    assert inverse(alike, 20).isfinite().all()
    torch.testing.assert_close(inverse(a.float(), 20), inverse(a, 20).float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rule", WHOLE, ids=str)
def test_whole_texts_alone(rule: Operator) -> None:
    with pytest.raises(BadInput, match="has no causal form"):
        module(rule)
    numbers = torch.tensor([0] * 4 + [1] * 5)
    with pytest.raises(NotSupported, match="one text per row"):
        module(rule, causal=False)(texts(), mask=(numbers[:, None] == numbers)[None, None])


# ---------------------------------------------------------------- simplified linear attention


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rule", [SimplifiedLinear(), SimplifiedLinear(1), SimplifiedLinear(2, norm=5)], ids=str)
@torch.no_grad()
def test_simplified_linear_is_its_formula(rule: SimplifiedLinear, causal: bool) -> None:
    attention, x, (q, k, v) = made(rule, causal)
    own = attention.rule.learned
    if rule.norm:
        # norms that have seen nothing: mean 0 and variance 1
        pairs = ((own.q_norm, attention.q_proj(x)), (own.k_norm, attention.k_proj(x)))
        q, k = (attention.heads_of(n.weight * t / (1 + 1e-5) ** 0.5 + n.bias + n.eta * t) for n, t in pairs)
        k = k.repeat_interleave(2, 1)
    met = torch.stack(
        [torch.stack([dot(q[:, :, i].relu(), k[:, :, j].relu()) for j in range(LENGTH)], -1) for i in range(LENGTH)], 2
    )
    met = met.tril() if causal else met
    total = met.sum(-1, keepdim=True)
    out = torch.where(total == 0, 0.0, met @ v / total) + convolved(v, own.local.weight, own.local.bias, causal)
    torch.testing.assert_close(attention(x), out.transpose(1, 2).flatten(2))


@torch.no_grad()
def test_where_nothing_is_met_the_convolution_is_all() -> None:
    attention, x, (_, _, v) = made(SimplifiedLinear())
    attention.q_proj.weight.zero_()
    own = attention.rule.learned.local
    torch.testing.assert_close(attention(x), convolved(v, own.weight, own.bias, True).transpose(1, 2).flatten(2))


# ---------------------------------------------------------------- PRepBN


def norm(steps: int = 4, warm: int = 2) -> PRepBN:
    torch.manual_seed(0)
    made = PRepBN(WIDTH, steps, warm).double()
    for parameter in made.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return made


@torch.no_grad()
def test_a_norm_turns_on_schedule() -> None:
    made, x, real = norm(), texts(), torch.ones(2, LENGTH, dtype=torch.bool)
    real[1, 5:] = False
    batch = torch.nn.BatchNorm1d(WIDTH).double()
    batch.weight.copy_(made.weight), batch.bias.copy_(made.bias)
    for share in (1, 1, 1, 0.75, 0.5, 0.25, 0, 0):
        assert made.share == share
        layer = torch.nn.functional.layer_norm(x, (WIDTH,))
        want = share * layer[real] + (1 - share) * (batch(x[real]) + made.eta * x[real])
        torch.testing.assert_close(made(torch.where(real[..., None], x, 1e6), real)[real], want)
        torch.testing.assert_close(made.running_mean, batch.running_mean)
        torch.testing.assert_close(made.running_var, batch.running_var)
    # in evaluation, whatever the share is, and nothing moves
    made.calls.zero_()
    made.eval(), batch.eval()
    torch.testing.assert_close(made(x, real), batch(x.flatten(0, 1)).view_as(x) + made.eta * x)
    assert made.calls == 0


@torch.no_grad()
def test_a_norm_of_one_token_takes_what_it_has_seen() -> None:
    made, one = norm(1, 0), torch.ones(1, 1, dtype=torch.bool)
    made(texts()[:1], one.expand(1, LENGTH))
    held = made.running_var.clone()
    got = made(texts()[:1, :1], one)
    torch.testing.assert_close(got, made.eval()(texts()[:1, :1], one))
    torch.testing.assert_close(made.running_var, held)


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_norm_folds_into_its_neighbours(bias: bool) -> None:
    made, x, real = norm(), texts(), torch.ones(2, LENGTH, dtype=torch.bool)
    linear = torch.nn.Linear(WIDTH, WIDTH, bias=bias).double()
    for _ in range(3):
        made(3 * x + 1, real)
    made.eval()
    torch.testing.assert_close(made.before(linear)(x), linear(made(x, real)))
    torch.testing.assert_close(made.behind(linear)(x), made(linear(x), real))


def test_norms_of_queries_move_in_training_alone() -> None:
    attention = module(SimplifiedLinear(norm=2, warm=1))
    own = attention.rule.learned
    attention(texts())
    assert own.q_norm.calls == own.k_norm.calls == 0
    attention.train()(texts()).square().sum().backward()
    assert own.q_norm.calls == own.k_norm.calls == 1
    assert (own.q_norm.share, own.q_norm.eta.grad) == (1.0, 0.0)
    attention(texts())
    attention(texts()).square().sum().backward()
    assert own.q_norm.share == 0.0
    assert all(p.grad.abs().sum() > 0 for p in attention.parameters())
