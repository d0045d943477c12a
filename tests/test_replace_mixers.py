"""Extractors and pooling networks against their formulas, token by token in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import foveate
from foveate.core.errors import BadInput, BadParameter, NotSupported
from foveate.core.rule import Operator
from foveate.replace import Extractor, Pooling

WIDTH, HEADS = 12, 3


def module(rule: Operator, causal: bool = True) -> foveate.nn.Attention:
    """A layer in float64, its parameters away from where they begin."""
    torch.manual_seed(0)
    made = foveate.nn.Attention(WIDTH, HEADS, rule=rule, causal=causal).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return made


def text(length: int, seed: int = 1) -> Tensor:
    return torch.randn(1, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- extractors


@pytest.mark.parametrize("kind", ["she", "he", "we", "me"])
@torch.no_grad()
def test_an_extractor_is_its_sum(kind: str) -> None:
    made = module(Extractor(kind, max_length=9))
    own, x = made.rule.learned, text(9)[0]
    for t in range(9):
        total = torch.zeros(WIDTH, dtype=torch.float64)
        for j in range(t + 1):
            w = own.weight[j]
            total += x[j] @ w if kind == "she" else x[j] * w
        want = total / (t + 1) ** 0.5
        if kind != "me":
            want = want * (x[t] @ own.adjust)
        torch.testing.assert_close(made(x[None])[0, t], want)


@pytest.mark.parametrize(("kind", "parameters"), [("she", 5 * 144 + 144), ("he", 60 + 144), ("we", 5 + 144), ("me", 5)])
def test_simpler_extractors_have_fewer_parameters(kind: str, parameters: int) -> None:
    made = foveate.nn.Attention(WIDTH, HEADS, rule=Extractor(kind, max_length=5))
    assert sum(p.numel() for p in made.parameters()) == parameters


def test_a_fresh_she_keeps_the_size_of_its_input() -> None:
    torch.manual_seed(0)
    extract = foveate.nn.Attention(256, 4, rule=Extractor(max_length=8)).rule.learned
    assert extract.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert extract.adjust.std().item() == pytest.approx(256**-0.5, rel=0.02)


@torch.no_grad()
def test_the_state_of_an_extractor_does_not_grow() -> None:
    made, cache = module(Extractor(max_length=40)), DynamicCache()
    for part in text(40).split([20, 1, 19], 1):
        made(part, cache=cache)
        assert cache.layers[0].bytes_held() == WIDTH * 8


def test_bad_extractors() -> None:
    with pytest.raises(BadInput, match=r"a text of 6 tokens .* weights for 5 places; .* larger max_length"):
        module(Extractor(max_length=5))(text(6))
    with pytest.raises(BadInput, match="causal by its nature"):
        module(Extractor(), causal=False)
    with pytest.raises(BadParameter, match="kind must be one of 'she'"):
        Extractor("they")
    made, cache = module(Extractor(max_length=5)), DynamicCache()
    made(text(5), cache=cache)
    with pytest.raises(BadInput, match="a text of 6 tokens"):
        made(text(1), cache=cache)
    # padding needs no place
    real = torch.tensor([[True] * 5 + [False] * 3])
    assert made(torch.nn.functional.pad(text(5), (0, 0, 0, 3)), mask=real).isfinite().all()


# ---------------------------------------------------------------- pooling


def pooled(own: nn.Module, x: Tensor, segment: int) -> Tensor:
    """What each token of a text gets where all see all."""
    q, k, o, s, near = (p(x) for p in (own.q_proj, own.k_proj, own.gate_proj, own.segment_proj, own.local_proj))
    dim, out = WIDTH // HEADS, []
    for n in range(len(x)):
        begin = n // segment * segment
        S = s[begin : begin + segment].max(0).values
        L = near[max(0, n - 1) : n + 2].max(0).values
        G = []
        for h in range(HEADS):
            part = slice(h * dim, (h + 1) * dim)
            g = q[:, part].mean(0)
            G.append(torch.softmax(k[:, part] @ g / dim**0.5, 0) @ k[:, part])
        out.append((torch.cat(G) + S) * o[n] + L)
    return own.o_proj(torch.stack(out))


@pytest.mark.parametrize("segment", [1, 4, 32])
@torch.no_grad()
def test_pooling_is_its_formula(segment: int) -> None:
    made, x = module(Pooling(segment), causal=False), text(11)
    torch.testing.assert_close(made(x)[0], pooled(made.rule.learned, x[0], segment))


@torch.no_grad()
def test_pooling_knows_where_a_padded_text_begins() -> None:
    made, x = module(Pooling(4), causal=False), text(11)
    want = pooled(made.rule.learned, x[0], 4)
    for left, right in ((3, 0), (0, 5), (2, 2)):
        wide = torch.nn.functional.pad(x, (0, 0, left, right), value=torch.nan)
        real = torch.zeros(1, 11 + left + right, dtype=torch.bool)
        real[:, left : left + 11] = True
        torch.testing.assert_close(made(wide, mask=real)[real], want)


@pytest.mark.parametrize("segment", [1, 4, 32])
@torch.no_grad()
def test_causal_pooling_is_that_of_the_text_so_far(segment: int) -> None:
    made, x = module(Pooling(segment)), text(11)
    out = made(x)[0]
    for n in range(11):
        torch.testing.assert_close(out[n], pooled(made.rule.learned, x[0, : n + 1], segment)[-1])


def test_pooling_of_all_tokens_wants_them_at_once() -> None:
    with pytest.raises(NotSupported, match="all at once"):
        module(Pooling(), causal=False)(text(3), cache=DynamicCache())
    with pytest.raises(BadParameter, match="segment must be from 1 to 65536"):
        Pooling(0)


def test_gradients_reach_all_of_pooling() -> None:
    made = module(Pooling(4), causal=False)
    made(text(11)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in made.parameters())
