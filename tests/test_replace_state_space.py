"""Delta writes, attention as a recurrence and state spaces against their formulas, token by token in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, rms_norm, silu, softplus
from transformers import DynamicCache

import foveate
from attending import HEADS, KV_HEADS, LENGTH, WIDTH, module, texts
from foveate.core.errors import BadInput
from foveate.core.mixer import Tokens
from foveate.nn import Attention
from foveate.replace import H3, AttentionRnn, Delta, GatedDelta, Hyena, SelectiveStateSpace
from foveate.replace.state_space import selective_state_space
from foveate.testing import tiny

DIM = WIDTH // HEADS
ALL = [Delta(), GatedDelta(), AttentionRnn(), SelectiveStateSpace(), Hyena(), H3()]


def out_of(attention: Attention, heads: Tensor) -> Tensor:
    """Head outputs through the output projection."""
    return attention.o_proj(heads.transpose(1, 2).flatten(2))


def kept(rule: object, **options: object) -> int:
    """Numbers that a text leaves in a cache."""
    cache = DynamicCache()
    attention, x = module(rule, **options), texts()
    for part in x.split([5, 1, 3], 1):
        attention(part, cache=cache)
    return cache.layers[0].bytes_held() // 8 // len(x)


def others(attention: Attention, like: Attention) -> dict[str, Tensor]:
    """Weights of one module for one of another rule that has no more of them."""
    theirs, own = attention.state_dict(), like.state_dict()
    return {name: own[name] if "extra" in name else theirs[name] for name in own}


def packed(attention: Attention, x: Tensor, opens: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Head outputs and state of a recurrence for texts that stand behind each other."""
    heads = attention.heads(x)
    return attention.rule.operator.flow(replace(heads, tokens=replace(heads.tokens, opens=opens)), {})


@pytest.mark.parametrize("rule", ALL, ids=lambda rule: rule.name)
def test_all_are_causal_by_their_nature(rule: object) -> None:
    with pytest.raises(BadInput, match="causal by its nature"):
        Attention(WIDTH, HEADS, rule=rule, causal=False)


# ---------------------------------------------------------------- delta writes


def written(attention: Attention, rule: Delta | GatedDelta, x: Tensor) -> Tensor:
    """Outputs by the definition."""
    own, found = attention.rule.learned, {}
    for name, layer in (("q", attention.q_proj), ("k", attention.k_proj), ("v", attention.v_proj)):
        flat = y = layer(x)
        if rule.convolution:
            weight, y = own.convolutions[name].weight, torch.zeros_like(flat)
            for t in range(LENGTH):
                for back in range(min(rule.convolution, t + 1)):
                    y[:, t] += weight[:, -1 - back] * flat[:, t - back]
        y = attention.heads_of(silu(y))
        found[name] = y if name == "v" else y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    outs = torch.zeros(len(x), HEADS, LENGTH, DIM, dtype=x.dtype)
    for b in range(len(x)):
        for h in range(HEADS):
            g = h // (HEADS // KV_HEADS)
            S = torch.zeros(DIM, DIM, dtype=x.dtype)
            for t in range(LENGTH):
                k, v = found["k"][b, g, t], found["v"][b, g, t]
                strength = rule.max_strength * torch.sigmoid(own.strength.weight[g] @ x[b, t])
                if isinstance(rule, GatedDelta):
                    S = S * torch.exp(-own.log_rate[g].exp() * softplus(own.decay.weight[g] @ x[b, t] + own.shift[g]))
                S = S + strength * torch.outer(k, v - k @ S)
                o = rms_norm(found["q"][b, h, t] @ S * DIM**-0.5, (DIM,), own.norm, 1e-5)
                if isinstance(rule, GatedDelta):
                    o = o * silu(own.gate(x[b, t]).view(HEADS, DIM)[h])
                outs[b, h, t] = o
    return out_of(attention, outs)


@pytest.mark.parametrize("kind", [Delta, GatedDelta])
@pytest.mark.parametrize("options", [{}, {"convolution": 0}, {"convolution": 1, "max_strength": 2.0}])
@torch.no_grad()
def test_delta_writes_are_their_formula(kind: type, options: dict[str, float]) -> None:
    rule, x = kind(**options), texts()
    attention = module(rule)
    torch.testing.assert_close(attention(x), written(attention, rule, x))


@pytest.mark.parametrize("kind", [Delta, GatedDelta])
@torch.no_grad()
def test_settings_of_delta_writes_matter(kind: type) -> None:
    x = texts()
    assert not torch.allclose(module(kind())(x), module(kind(max_strength=2.0))(x))
    assert not module(kind(max_strength=0.0))(x).any()
    sharp, plain = module(kind()), module(kind(convolution=0))
    plain.load_state_dict(others(sharp, plain))
    assert not torch.allclose(sharp(x), plain(x))


@torch.no_grad()
def test_a_fresh_convolution_is_the_identity() -> None:
    x, fresh = texts(), Attention(WIDTH, HEADS, rule=Delta()).double()
    plain = Attention(WIDTH, HEADS, rule=Delta(convolution=0)).double()
    plain.load_state_dict(others(fresh, plain))
    torch.testing.assert_close(fresh(x), plain(x))


@torch.no_grad()
def test_without_decay_and_gate_the_gated_one_is_delta() -> None:
    x, gated, plain = texts(), module(GatedDelta()), module(Delta())
    gated.rule.learned.log_rate.fill_(-torch.inf)
    plain.load_state_dict(others(gated, plain))
    # silu is 1 here
    gated.rule.learned.gate = torch.nn.Linear(WIDTH, WIDTH).double()
    gated.rule.learned.gate.weight.zero_()
    gated.rule.learned.gate.bias.fill_(1.2784645427610738)
    torch.testing.assert_close(gated(x), plain(x))


def test_where_the_decays_of_gated_delta_begin() -> None:
    torch.manual_seed(0)
    own = GatedDelta().learned(foveate.core.rule.Sizes(64, 4000, 4000, 4))
    steps, rates = softplus(own.shift), own.log_rate.exp()
    assert 0.00099 < steps.min() < 0.00101 and 0.099 < steps.max() < 0.101
    assert steps.median().item() == pytest.approx(0.01, rel=0.2)
    assert rates.min() > 0 and rates.mean().item() == pytest.approx(8, rel=0.05)


@pytest.mark.parametrize("kind", [Delta, GatedDelta])
@torch.no_grad()
def test_what_delta_writes_keep(kind: type) -> None:
    state, reach = KV_HEADS * DIM * DIM, (HEADS + 2 * KV_HEADS) * DIM
    assert kept(kind()) == state + 3 * reach
    assert kept(kind(convolution=0)) == state


@pytest.mark.parametrize("rule", [Delta(), GatedDelta(), AttentionRnn()], ids=lambda rule: rule.name)
@torch.no_grad()
def test_packed_texts_do_not_see_each_other(rule: object) -> None:
    attention, x = module(rule), texts()
    if isinstance(rule, AttentionRnn):
        # scores of the first text far above those of the second one
        x[:, :6] *= 300
    opens = torch.zeros(2, LENGTH, dtype=torch.bool)
    opens[:, 6] = True
    both, state = packed(attention, x, opens)
    first, _ = packed(attention, x[:, :6], None)
    last, after = packed(attention, x[:, 6:], None)
    torch.testing.assert_close(both, torch.cat([first, last], 2))
    for name in set(state) - {"state", "highest"}:
        torch.testing.assert_close(state[name], after[name])


# ---------------------------------------------------------------- attention as a recurrence


@pytest.mark.parametrize("size", [1.0, 1e4])
@torch.no_grad()
def test_attention_as_a_recurrence_is_softmax_of_one_query(size: float) -> None:
    attention, x = module(AttentionRnn()), texts()
    attention.rule.learned.query *= size
    k, v = (
        attention.heads_of(p(x)).repeat_interleave(HEADS // KV_HEADS, 1) for p in (attention.k_proj, attention.v_proj)
    )
    s = torch.einsum("hd,bhjd->bhj", attention.rule.learned.query, k) * DIM**-0.5
    later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    p = s[:, :, None].expand(-1, -1, LENGTH, -1).masked_fill(later, -torch.inf).softmax(-1)
    want = out_of(attention, p @ v)
    torch.testing.assert_close(attention(x), want)
    cache = DynamicCache()
    parts = [attention(part, cache=cache) for part in x.split([1, 5, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), want)


@torch.no_grad()
def test_attention_as_a_recurrence_in_float32_takes_any_scores() -> None:
    attention, x = module(AttentionRnn()).float(), texts().float()
    # scores that fall by hundreds, then rise again
    attention.rule.learned.query *= 1000
    out = attention(x)
    assert out.isfinite().all()
    assert attention.double()(x.double()).sub(out).abs().max() < 1e-3


def test_what_attention_as_a_recurrence_keeps() -> None:
    assert kept(AttentionRnn()) == HEADS * (DIM + 2)


def test_it_has_no_query_projection_and_a_loaded_model_keeps_its_own() -> None:
    assert not hasattr(module(AttentionRnn()), "q_proj")
    model = foveate.convert(tiny.model("llama"), AttentionRnn())
    assert model.model.layers[0].self_attn.q_proj.weight.requires_grad


# ---------------------------------------------------------------- the selective state space


@pytest.mark.parametrize("options", [{}, {"states": 3, "expand": 1, "convolution": 2}])
@torch.no_grad()
def test_the_selective_state_space_is_its_formula(options: dict[str, int]) -> None:
    rule, u = SelectiveStateSpace(**options), texts()
    attention = module(rule)
    own, inner = attention.rule.learned, rule.expand * WIDTH
    for b in range(len(u)):
        both = u[b] @ own.in_proj.weight.T
        before, z = both[:, :inner], both[:, inner:]
        h = torch.zeros(inner, rule.states, dtype=u.dtype)
        for t in range(LENGTH):
            x = own.convolution.bias.clone()
            for back in range(min(rule.convolution, t + 1)):
                x += own.convolution.weight[:, -1 - back] * before[t - back]
            x = silu(x)
            low, B, C = (own.x_proj.weight @ x).split([1, rule.states, rule.states])
            step = softplus(own.dt_proj.weight @ low + own.dt_proj.bias)
            h = torch.exp(-step[:, None] * own.log_rate.exp()) * h + torch.outer(step * x, B)
            y = (h @ C + own.skip * x) * silu(z[t])
            torch.testing.assert_close(attention(u)[b, t], own.out_proj.weight @ y)


@torch.no_grad()
def test_the_selective_state_space_is_that_of_transformers() -> None:
    from transformers.models.mamba.modeling_mamba import MambaConfig, MambaMixer

    torch.manual_seed(0)
    config = MambaConfig(hidden_size=32, state_size=16, num_hidden_layers=1, use_mambapy=False)
    theirs, attention = MambaMixer(config, 0).eval(), Attention(32, 4, rule=SelectiveStateSpace()).eval()
    state = {n.replace("conv1d", "convolution").replace("A_log", "log_rate"): t for n, t in theirs.state_dict().items()}
    state["convolution.weight"] = state["convolution.weight"][:, 0]
    state["skip"] = state.pop("D")
    own = attention.rule.learned
    torch.testing.assert_close(own.log_rate, state["log_rate"])
    own.load_state_dict(state)
    x = torch.randn(2, 70, 32)
    torch.testing.assert_close(attention(x), theirs(x), atol=1e-5, rtol=1e-4)


def test_where_the_selective_state_space_begins() -> None:
    torch.manual_seed(0)
    own = SelectiveStateSpace().module(foveate.core.rule.Sizes(512, 4, 4, 128))
    steps = softplus(own.dt_proj.bias)
    assert 0.00099 < steps.min() < 0.0012 and 0.08 < steps.max() < 0.101
    assert own.dt_proj.in_features == 32 and own.dt_proj.weight.abs().max() <= 32**-0.5


@torch.no_grad()
def test_what_the_selective_state_space_keeps() -> None:
    assert kept(SelectiveStateSpace()) == 2 * WIDTH * (16 + 3)
    assert kept(SelectiveStateSpace(states=3, expand=1, convolution=1)) == WIDTH * 3


def test_the_selective_state_space_works_on_a_stretch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    x, attention = texts().requires_grad_(), module(SelectiveStateSpace())
    leaves, real = [x, *attention.parameters()], torch.ones(2, LENGTH, dtype=torch.bool)
    real[0, :2] = False

    def found() -> tuple[Tensor, ...]:
        y = attention(x, mask=real)
        return (y, *torch.autograd.grad(y[real].square().sum(), leaves, allow_unused=True))

    whole, lengths = found(), []
    monkeypatch.setattr(selective_state_space, "STRETCH", 2 * 2 * WIDTH * 4)
    own = attention.rule.learned
    stretch = own.stretch
    monkeypatch.setattr(own, "stretch", lambda u, *rest: lengths.append(u.shape[1]) or stretch(u, *rest))
    for a, b in zip(found(), whole, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b)
    assert lengths == [4, 4, 1]


# ---------------------------------------------------------------- hyena


@pytest.mark.parametrize("options", [{"max_length": 9}, {"order": 3, "max_length": 50, "bands": 1, "filter_width": 5}])
@torch.no_grad()
def test_hyena_is_its_formula(options: dict[str, int]) -> None:
    rule, x = Hyena(**options), texts()
    attention = module(rule)
    own, L = attention.rule.learned, rule.max_length
    filters, channels = own.filters, WIDTH * (rule.order - 1)
    h = torch.zeros(LENGTH, channels, dtype=x.dtype)
    for t in range(LENGTH):
        z = [t / (L - 1)]
        speeds = [1e-4 + i * (rule.bands - 1 - 1e-4) / max(1, rule.bands - 1) for i in range(rule.bands)]
        for turn in (torch.cos, torch.sin):
            for f in speeds:
                angle = torch.tensor(2 * torch.pi * t / L * f, dtype=x.dtype)
                z.append(turn(angle) if turn is torch.cos else -turn(angle))
        a = torch.tensor(z, dtype=x.dtype)
        for layer in filters.layers:
            a = torch.sin(filters.frequency * layer(a))
        for c in range(channels):
            slow, fast = torch.tensor(0.01).double().log() / 1.5, torch.tensor(0.01).double().log() / 0.3
            rate = slow + (fast - slow) * c / (channels - 1)
            h[t, c] = (filters.last.weight[c] @ a) * torch.exp(rate * t / (L - 1))
    u = own.in_proj(x)
    shifted = torch.zeros_like(u)
    for t in range(LENGTH):
        shifted[:, t] = own.convolution.bias
        for back in range(min(3, t + 1)):
            shifted[:, t] += own.convolution.weight[:, -1 - back] * u[:, t - back]
    *gates, v = shifted.split(WIDTH, -1)
    for number, i in enumerate(reversed(range(1, rule.order))):
        v = gates[i] * v
        kernel, out = h[:, number * WIDTH : (number + 1) * WIDTH], own.skip[number] * v
        for t in range(LENGTH):
            for s in range(t + 1):
                out[:, t] += kernel[t - s] * v[:, s]
        v = out
    torch.testing.assert_close(attention(x), own.out_proj(gates[0] * v), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_what_hyena_keeps() -> None:
    short = 2 * 3 * WIDTH
    assert kept(Hyena(max_length=50)) == short + LENGTH * WIDTH
    # what no later token can read is left out
    assert kept(Hyena(max_length=9)) == short + (LENGTH - 1) * WIDTH
    assert kept(Hyena(order=3, max_length=50)) == 2 * 4 * WIDTH + 2 * LENGTH * WIDTH


def test_hyena_takes_no_longer_texts_than_its_filters() -> None:
    attention, x = module(Hyena(max_length=8)), texts()
    with pytest.raises(BadInput, match=r"a text of 9 tokens and filters for max_length=8; .* larger one"):
        attention(x)
    cache = DynamicCache()
    attention(x[:, :8], cache=cache)
    with pytest.raises(BadInput, match="a text of 9 tokens"):
        attention(x[:, 8:], cache=cache)
    # padding takes no place
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[:, 0] = False
    torch.testing.assert_close(attention(x, mask=real)[:, 1:], attention(x[:, 1:]))


# ---------------------------------------------------------------- hungry hungry hippos


@pytest.mark.parametrize("options", [{}, {"head_dim": 4, "modes": 3, "taps": 5}])
@torch.no_grad()
def test_h3_is_its_recurrence(options: dict[str, int]) -> None:
    rule, x = H3(**options), texts()
    attention = module(rule)
    own, p = attention.rule.learned, rule.head_dim
    A = torch.complex(-own.log_rate.exp(), own.speed)
    B, C = (torch.complex(t[..., 0], t[..., 1]) for t in (own.read_in, own.read_out))
    step = own.log_step.exp()
    for b in range(len(x)):
        q, k, v = (layer(x[b]) for layer in (own.q_proj, own.k_proj, own.v_proj))
        shift = torch.zeros(rule.taps, WIDTH, dtype=x.dtype)
        S = torch.zeros(WIDTH // p, rule.modes, p, p, dtype=torch.complex128)
        for t in range(LENGTH):
            shift = torch.cat([torch.zeros_like(shift[:1]), shift[:-1]])
            shift += own.shift_in.T * k[t]
            key = (own.shift_out.T * shift).sum(0) + own.shift_skip * k[t]
            out = torch.zeros(WIDTH, dtype=x.dtype)
            for h in range(WIDTH // p):
                part = slice(h * p, (h + 1) * p)
                kv = torch.outer(key[part], v[t, part])
                y = own.skip[h] * kv
                for m in range(rule.modes):
                    decay = torch.exp(step[h] * A[h, m])
                    S[h, m] = decay * S[h, m] + B[h, m] * (decay - 1) / A[h, m] * kv
                    y = y + 2 * (C[h, m] * S[h, m]).real
                out[part] = q[t, part] @ y
            torch.testing.assert_close(attention(x)[b, t], own.o_proj(out), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"head_dim": 4, "modes": 3}])
@torch.no_grad()
def test_h3_without_gates_is_a_diagonal_state_space(options: dict[str, int]) -> None:
    rule, x = H3(gated=False, **options), texts()
    attention = module(rule)
    own = attention.rule.learned
    A = torch.complex(-own.log_rate.exp(), own.speed)
    B, C = (torch.complex(t[..., 0], t[..., 1]) for t in (own.read_in, own.read_out))
    decay = torch.exp(own.log_step.exp()[:, None] * A)
    # one row for each channel
    decay, into, out_of = (t.repeat_interleave(rule.head_dim, 0) for t in (decay, B * (decay - 1) / A, C))
    skip, v = own.skip.repeat_interleave(rule.head_dim), own.v_proj(x)
    S = torch.zeros(2, WIDTH, rule.modes, dtype=torch.complex128)
    for t in range(LENGTH):
        S = decay * S + into * v[:, t, :, None]
        y = skip * v[:, t] + 2 * (out_of * S).sum(2).real
        torch.testing.assert_close(attention(x)[:, t], own.o_proj(gelu(y)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("gated", [True, False])
@torch.no_grad()
def test_the_state_of_h3_goes_on_from_stretch_to_stretch(gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    attention, x = module(H3(head_dim=4, taps=3, gated=gated)), texts()
    monkeypatch.setattr(foveate.replace.state_space.h3, "STRETCH", 2)
    cache = DynamicCache()
    parts = [attention(part, cache=cache) for part in x.split([3, 5, 1], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), attention(x))


@torch.no_grad()
def test_padding_behind_does_not_wear_out_the_state_of_h3() -> None:
    own, x = module(H3()).rule.learned, texts()
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[0, 5:] = False
    _, after = own(Tokens(x, real, True, real.cumsum(1) - 1), {})
    _, want = own(Tokens(x[:1, :5], real[:1, :5], True, real[:1, :5].cumsum(1) - 1), {})
    for name, state in want.items():
        torch.testing.assert_close(after[name][:1], state)


@torch.no_grad()
def test_what_h3_keeps() -> None:
    assert kept(H3()) == WIDTH * (2 * 32 + 63)
    assert kept(H3(head_dim=4, modes=3, taps=1)) == WIDTH * 4 * 2 * 3
    assert kept(H3(head_dim=4, modes=3, gated=False)) == WIDTH * 2 * 3


def test_heads_of_h3_divide_the_width() -> None:
    with pytest.raises(BadInput, match=r"head_dim=3 does not divide the layer's width 16"):
        module(H3(head_dim=3))
