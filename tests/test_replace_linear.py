"""Linear attention by features against its formula, pair by pair in float64, causal and where all see all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import foveate
from attending import HEADS, KV_HEADS, LENGTH, module, projected, texts
from foveate.core.errors import BadInput, NotSupported
from foveate.core.mask import Mask
from foveate.core.mixer import Tokens
from foveate.core.recurrence import Heads
from foveate.core.rows import View
from foveate.core.rule import Operator
from foveate.replace import Elu, GeneralisedLinear, Hedgehog, PrefixLinear, RandomFeatures, Scatterbrain, Taylor
from foveate.replace.linear._random import Draw, orthogonal
from foveate.replace.linear.hedgehog import mimicry_loss
from foveate.testing import tiny

FORMS = pytest.mark.parametrize("causal", [True, False])


def mixed(attention: foveate.nn.Attention, weights: Tensor, causal: bool) -> Tensor:
    """The module's output for unnormalised weights, [batch, heads, query, key]."""
    v = projected(attention, texts())[2]
    weights = weights.tril() if causal else weights
    out = (weights / weights.sum(-1, keepdim=True)) @ v
    return attention.o_proj(out.transpose(1, 2).flatten(2))


def numbers_held(attention: foveate.nn.Attention) -> int:
    """Numbers of the state behind the texts, of one text."""
    cache = DynamicCache()
    attention(texts(), cache=cache)
    return sum(t[0].numel() for t in cache.layers[attention.sizes.layer].state.values())


# ---------------------------------------------------------------- hedgehog


def spiky(own: torch.nn.Module, q: Tensor, k: Tensor, activation: str) -> Tensor:
    """Weights of Hedgehog, not divided by their sum, head by head."""
    found = torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.float64)
    for h in range(HEADS):
        a = q[:, h] @ own.q.weight[h] + own.q.bias[h]
        g = h * KV_HEADS // HEADS
        b = k[:, h] @ own.k.weight[g] + own.k.bias[g]
        for sign in (1, -1):
            x, y = (sign * a).exp(), (sign * b).exp()
            if activation == "softmax":
                x, y = x / x.sum(-1, keepdim=True), y / y.sum(-1, keepdim=True)
            found[:, h] += x @ y.mT
    return found


@FORMS
@pytest.mark.parametrize("activation", ["softmax", "exp"])
@torch.no_grad()
def test_hedgehog_is_its_formula(activation: str, causal: bool) -> None:
    made = module(Hedgehog(activation), causal=causal)
    q, k, _ = projected(made, texts())
    torch.testing.assert_close(made(texts()), mixed(made, spiky(made.rule.learned, q, k, activation), causal))


@torch.no_grad()
def test_the_state_of_hedgehog() -> None:
    # two features for each number of a key, by four numbers of a value and the sum
    assert numbers_held(module(Hedgehog())) == KV_HEADS * 8 * 5


@pytest.mark.parametrize("activation", ["softmax", "exp"])
@torch.no_grad()
def test_hedgehog_bears_large_keys(activation: str) -> None:
    made, x = module(Hedgehog(activation)).float(), texts().float()
    for weight in (made.q_proj.weight, made.k_proj.weight):
        weight *= 1e4
    out = made(x)
    assert out.isfinite().all()
    # a first token sees itself alone, and gets its value from every head
    v = projected(made, x)[2][:, :, 0].flatten(1)
    torch.testing.assert_close(out[:, 0], made.o_proj(v))


@FORMS
@torch.no_grad()
def test_mimicry_is_the_cross_entropy(causal: bool) -> None:
    rule, made = Hedgehog(), module(Hedgehog(), causal=causal)
    q, k, v = projected(made, texts())
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1, :3] = False
    mask = Mask.of_padding(real, 9, 9, causal=causal)
    got = rule.mimicry(made.rule.learned, View(q, k[:, ::2], v[:, ::2], mask))
    a, losses = spiky(made.rule.learned, q, k, "softmax"), []
    for b in range(2):
        for h in range(HEADS):
            for i in range(3 * b, 9):
                js = slice(3 * b, i + 1 if causal else 9)
                p = torch.softmax(k[b, h, js] @ q[b, h, i] / 2, 0)
                losses.append(-(p * (a[b, h, i, js] / a[b, h, i, js].sum()).log()).sum())
    torch.testing.assert_close(got, torch.stack(losses).mean())


def test_maps_learn_the_weights_of_a_loaded_model() -> None:
    torch.manual_seed(0)
    teacher, inputs = tiny.model("llama"), tiny.inputs("llama", padding="left")
    student = foveate.convert(tiny.model("llama"), Hedgehog(), layers=[1])
    learner = torch.optim.Adam(student.parameters(), 0.02)
    losses = []
    for _ in range(30):
        loss = mimicry_loss(teacher, student, **inputs)
        learner.zero_grad()
        loss.backward()
        learner.step()
        losses.append(loss.item())
    assert 0 < losses[-1] < losses[0] - 0.01
    moved = {name for name, p in student.named_parameters() if p.grad is not None}
    assert moved == {f"model.layers.1.self_attn.rule.learned.{x}.{y}" for x in "qk" for y in ("weight", "bias")}
    with pytest.raises(BadInput, match="no layer of the student has maps"):
        mimicry_loss(teacher, teacher, **inputs)


# ---------------------------------------------------------------- random features


@FORMS
@torch.no_grad()
def test_random_features_are_their_formula(causal: bool) -> None:
    made = module(RandomFeatures(features=7, seed=2), causal=causal)
    q, k, _ = projected(made, texts())
    omega, estimates = made.rule.learned.omega, torch.zeros(2, HEADS, 9, 9, dtype=torch.float64)
    assert omega.shape == (7, 4)
    for w in omega:
        a, b = ((x / 4**0.25 @ w - x.square().sum(-1) / 4**0.5 / 2).exp() for x in (q, k))
        estimates += a[..., :, None] * b[..., None, :]
    torch.testing.assert_close(made(texts()), mixed(made, estimates, causal))


@torch.no_grad()
def test_random_features_are_right_on_average() -> None:
    q, k = torch.randn(2, 1, 1, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 2
    found = []
    for seed in range(3000):
        draw = Draw(orthogonal(6, 4, seed)).double()
        found.append(draw.logs(q, 0.5).exp() @ draw.logs(k, 0.5).exp().mT / 6)
    estimates = torch.stack(found)
    error = estimates.mean(0) - (q @ k.mT * 0.5).exp()
    assert (error.abs() < 4 * estimates.std(0) / 3000**0.5).all()


def test_directions_are_orthogonal_and_of_normal_length() -> None:
    omega = orthogonal(10, 4, seed=1)
    for block in omega.split(4):
        off = block @ block.T
        assert (off - off.diagonal().diag()).abs().max() < 1e-5
    assert (omega[:4] @ omega[4:8].T).abs().max() > 1e-2
    # the mean of squared lengths is the width
    assert orthogonal(4000, 4, seed=1).square().sum(1).mean().item() == pytest.approx(4, rel=0.05)
    assert len({len(orthogonal(n, 4, seed=1)) for n in (1, 4, 9)}) == 3


@torch.no_grad()
def test_layers_and_seeds_have_draws_of_their_own() -> None:
    drawn = [
        module(RandomFeatures(8, seed), layer=n).rule.learned.omega for seed, n in ((0, 0), (1, 0), (0, 1), (0, 0))
    ]
    assert drawn[0].equal(drawn[3])
    assert not drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2])
    made = module(RandomFeatures(8))
    assert not list(made.rule.parameters()) and "rule.learned.omega" in made.state_dict()
    assert numbers_held(made) == KV_HEADS * 8 * 5


@torch.no_grad()
def test_random_features_bear_large_queries_and_keys() -> None:
    # keys along a direction of the draw have the largest features that there are
    made = module(RandomFeatures(8), head_dim=256)
    made.rule.learned.omega.copy_(orthogonal(8, 256, 0))
    draw = made.rule.learned
    most = draw.logs(draw.omega[None, None] / 0.1, 0.01).amax().item() - draw.shift
    assert 59 < most < 60.001
    out = made.float()(100 * texts().float())
    assert out.isfinite().all()


# ---------------------------------------------------------------- second-order Taylor features


@FORMS
@pytest.mark.parametrize("f", [1, 3, 6])
@torch.no_grad()
def test_taylor_is_its_formula(f: int, causal: bool) -> None:
    made = module(Taylor(f), causal=causal)
    q, k, _ = projected(made, texts())
    own = made.rule.learned
    s = torch.stack([(q[:, h] @ own.q[h]) @ (k[:, h] @ own.k[h // 2]).mT for h in range(HEADS)], 1) / f**0.5
    torch.testing.assert_close(made(texts()), mixed(made, 1 + s + s * s / 2, causal))
    if causal:
        assert numbers_held(made) == KV_HEADS * (1 + f + f * (f + 1) // 2) * 5


@torch.no_grad()
def test_queries_and_keys_are_projected_alike_at_first() -> None:
    own = foveate.nn.Attention(64, 4, 2, Taylor(16)).rule.learned
    assert own.q[1].equal(own.k[0]) and own.q[3].equal(own.k[1]) and not own.k[0].equal(own.k[1])
    torch.testing.assert_close(own.k[0].T @ own.k[0], torch.eye(16))


def windowed(attention: foveate.nn.Attention, x: Tensor, window: int, causal: bool) -> Tensor:
    """Softmax attention in windows, token by token."""
    q, k, v = projected(attention, x)
    out = torch.zeros_like(q)
    for i in range(x.shape[1]):
        js = slice(max(0, i - window + 1), i + 1 if causal else i + window)
        p = torch.softmax((k[:, :, js] @ q[:, :, i, :, None])[..., 0] / 2, -1)
        out[:, :, i] = (p[:, :, None] @ v[:, :, js])[:, :, 0]
    return attention.o_proj(out.transpose(1, 2).flatten(2))


@FORMS
@pytest.mark.parametrize("window", [1, 3, 20])
@torch.no_grad()
def test_every_second_layer_is_a_window(window: int, causal: bool) -> None:
    made = module(Taylor(4, window), layer=1, causal=causal)
    x = torch.randn(2, 41, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    want = windowed(made, x, window, causal)
    torch.testing.assert_close(made(x), want)
    for left, right in ((3, 0), (0, 5), (2, 2)):
        wide = torch.nn.functional.pad(x, (0, 0, left, right), value=torch.nan)
        real = torch.zeros(2, 41 + left + right, dtype=torch.bool)
        real[:, left : left + 41] = True
        torch.testing.assert_close(made(wide, mask=real)[real].view_as(x), want)
    if causal:
        # keys, values, and how many of them there are
        assert numbers_held(made) == KV_HEADS * window * 8 + 1


@pytest.mark.parametrize("window", [1, 3, 20])
@torch.no_grad()
def test_windows_go_on_from_call_to_call(window: int) -> None:
    made, cache = module(Taylor(4, window), layer=1), DynamicCache()
    x = torch.randn(2, 41, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    real = torch.ones(2, 41, dtype=torch.bool)
    # nothing of the second text is in the first call
    real[1, :6] = False
    whole = torch.where(real[..., None], x, torch.nan)
    parts = [made(whole[:, a:b], mask=real[:, :b], cache=cache) for a, b in ((0, 5), (5, 15), (15, 16), (16, 41))]
    got = torch.cat(parts, 1)
    torch.testing.assert_close(got[:1], windowed(made, x[:1], window, True))
    torch.testing.assert_close(got[1:][real[1:]], windowed(made, x[1:][real[1:]][None], window, True)[0])


def test_windows_learn_and_keep_packed_texts_apart() -> None:
    torch.manual_seed(0)
    model, inputs = foveate.convert(tiny.model("llama"), Taylor(4, window=3)), tiny.inputs("llama", batch=1, length=8)
    ids = inputs["input_ids"]
    alone = torch.cat([model(input_ids=ids[:, :5]).logits, model(input_ids=ids[:, 5:]).logits], 1)
    places = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    packed = model(input_ids=ids, position_ids=places, use_cache=False).logits
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-4)
    packed.square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


# ---------------------------------------------------------------- a prefix that is read twice


def read_twice(attention: foveate.nn.Attention, x: Tensor, prefix: int, f: int) -> Tensor:
    """What each token of one text gets, [length, width]."""
    own = attention.rule.learned
    q, k, v = (t[0] for t in projected(attention, x[None]))
    early_k = (x @ own.k_proj.weight.T).unflatten(-1, (KV_HEADS, f))
    early_v = (x @ own.v_proj.weight.T).unflatten(-1, (KV_HEADS, 4))

    def weight(a: Tensor, b: Tensor) -> Tensor:
        s = a @ b / f**0.5
        return 1 + s + s * s / 2

    out = torch.zeros(len(x), HEADS, 4, dtype=torch.float64)
    for h in range(HEADS):
        g = h // 2
        for t in range(len(x)):
            narrow, above, below = q[h, t] @ own.narrow.q[h], 0.0, 0.0
            for j in range(min(prefix, len(x))):
                w = weight(narrow, early_k[j, g])
                above, below = above + w * early_v[j, g], below + w
            for j in range(t + 1):
                w = weight(narrow, k[h, j] @ own.narrow.k[g])
                above, below = above + w * v[h, j], below + w
            out[t, h] = above / below
    return attention.o_proj(out.flatten(1))


@pytest.mark.parametrize("prefix", [1, 4, 50])
@torch.no_grad()
def test_a_prefix_is_read_twice(prefix: int) -> None:
    made, x = module(PrefixLinear(prefix, feature_dim=3)), texts()
    want = [read_twice(made, x[0], prefix, 3), read_twice(made, x[1, 3:], prefix, 3)]
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1, :3] = False
    out = made(torch.where(real[..., None], x, torch.nan), mask=real)
    torch.testing.assert_close(out[0], want[0])
    torch.testing.assert_close(out[1, 3:], want[1])
    assert numbers_held(made) == KV_HEADS * 10 * 5


@torch.no_grad()
def test_a_prefix_belongs_to_the_call_in_which_its_text_begins() -> None:
    made, x, cache = module(PrefixLinear(4, feature_dim=3)), texts(), DynamicCache()
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1, :5] = False
    parts = [made(x[:, a:b], mask=real[:, :b], cache=cache) for a, b in ((0, 4), (4, 9))]
    torch.testing.assert_close(torch.cat(parts, 1)[0], read_twice(made, x[0], 4, 3))
    torch.testing.assert_close(parts[1][1, 1:], read_twice(made, x[1, 5:], 4, 3))
    # two tokens of the prefix come later, and are read once
    cache = DynamicCache()
    parts = [made(x[:1, a:b], cache=cache) for a, b in ((0, 2), (2, 9))]
    torch.testing.assert_close(torch.cat(parts, 1)[0], read_twice(made, x[0], 2, 3))


def test_what_a_prefix_cannot() -> None:
    model, inputs = foveate.convert(tiny.model("llama"), PrefixLinear(2)), tiny.inputs("llama", batch=1, length=6)
    with pytest.raises(NotSupported, match="one text per row"):
        model(input_ids=inputs["input_ids"], position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False)
    with pytest.raises(BadInput, match="causal by its nature"):
        foveate.nn.Attention(16, 4, rule=PrefixLinear(), causal=False)


# ---------------------------------------------------------------- features of the whole input


def through(network: torch.nn.Sequential, x: Tensor) -> Tensor:
    """f(x), token by token."""
    first, norm, _, last = network
    y = x @ first.weight.T + first.bias
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    y = y * norm.weight + norm.bias
    return torch.maximum(y, y / 100) @ last.weight.T + last.bias


@FORMS
@torch.no_grad()
def test_generalised_linear_is_its_formula(causal: bool) -> None:
    made, x = module(GeneralisedLinear(), causal=causal), texts()
    q, k, _ = projected(made, x)
    q = q + made.heads_of(through(made.rule.learned.q, x))
    k = k + made.heads_of(through(made.rule.learned.k, x)).repeat_interleave(2, 1)
    q, k = (torch.where(t > 0, t + 1, t.exp()) for t in (q, k))
    torch.testing.assert_close(made(x), mixed(made, q @ k.mT, causal))
    if causal:
        assert numbers_held(made) == KV_HEADS * 4 * 5


@torch.no_grad()
def test_fresh_generalised_linear_attention_is_elu() -> None:
    plain = module(Elu())
    made = foveate.nn.Attention(16, 4, 2, GeneralisedLinear()).double()
    assert not made.load_state_dict({n: t for n, t in plain.state_dict().items() if "rule" not in n}, False)[1]
    torch.testing.assert_close(made(texts()), plain(texts()))
    # features far below 0 are small, not 0
    made.q_proj.weight *= 0
    made.rule.learned.k[3].bias -= 60
    assert made.float()(texts().float()).abs().amax(-1).min() > 1e-3


# ---------------------------------------------------------------- a window and an estimate of the rest


def near_and_far(attention: foveate.nn.Attention, x: Tensor, window: int) -> Tensor:
    """Weights of Scatterbrain, not divided by their sum."""
    q, k, _ = projected(attention, x)
    omega = attention.rule.learned.omega
    half = len(omega) // 2
    assert omega[half:].equal(-omega[:half])
    features = []
    for t in (q, k):
        y = t / 4**0.25
        size = (-y.square().sum(-1, keepdim=True) / 2).exp()
        features.append(torch.cat([(y @ w).exp() for w in (omega[:half].T, -omega[:half].T)], -1) * size)
    far = features[0] @ features[1].mT / (2 * half)
    gap = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
    return torch.where(gap.abs() < window, (q @ k.mT / 2).exp(), far)


@FORMS
@pytest.mark.parametrize("window", [1, 4, 20])
@torch.no_grad()
def test_scatterbrain_is_its_formula(window: int, causal: bool) -> None:
    made = module(Scatterbrain(window, directions=3, seed=1), causal=causal)
    want = mixed(made, near_and_far(made, texts(), window), causal)
    torch.testing.assert_close(made(texts()), want)
    for left, right in ((3, 0), (0, 5), (2, 2)):
        wide = torch.nn.functional.pad(texts(), (0, 0, left, right), value=torch.nan)
        real = torch.zeros(2, 9 + left + right, dtype=torch.bool)
        real[:, left : left + 9] = True
        torch.testing.assert_close(made(wide, mask=real)[real].view_as(want), want)
    if causal:
        assert numbers_held(made) == KV_HEADS * (6 * 5 + window * 8) + 1


@torch.no_grad()
def test_scatterbrain_bears_estimates_of_any_size() -> None:
    for size in (0.0, 30.0, 1e3):
        made = module(Scatterbrain(2, directions=3)).float()
        made.q_proj.weight *= size
        made.k_proj.weight *= size
        out = made(texts().float())
        assert out.isfinite().all() and out.abs().amax(-1).min() > 1e-3


@torch.no_grad()
def test_packed_texts_are_kept_apart_where_all_see_all() -> None:
    rule = Scatterbrain(2, directions=5)
    made = module(rule, causal=False)

    def flowed(x: Tensor, opens: Tensor | None) -> Tensor:
        q, k, v = (made.heads_of(p(x)) for p in (made.q_proj, made.k_proj, made.v_proj))
        real = torch.ones(x.shape[:2], dtype=torch.bool)
        tokens = Tokens(x, real, False, torch.arange(x.shape[1]).expand(2, -1), opens=opens)
        return rule.flow(Heads(q, k, v, tokens, 0.5, made.rule.learned, made.sizes), None)[0]

    opens = torch.zeros(2, LENGTH, dtype=torch.bool)
    opens[:, 5] = True
    alone = torch.cat([flowed(texts()[:, :5], None), flowed(texts()[:, 5:], None)], 2)
    torch.testing.assert_close(flowed(texts(), opens), alone)


@pytest.mark.parametrize("rule", [Scatterbrain(2, directions=5), Taylor(3), Hedgehog(), RandomFeatures(5)])
@torch.no_grad()
def test_packed_texts_are_kept_apart(rule: Operator) -> None:
    model, inputs = foveate.convert(tiny.model("llama"), rule), tiny.inputs("llama", batch=1, length=9)
    ids, places = inputs["input_ids"], torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    alone = torch.cat([model(input_ids=ids[:, :5]).logits, model(input_ids=ids[:, 5:]).logits], 1)
    packed = model(input_ids=ids, position_ids=places, use_cache=False).logits
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-4)
