"""Hierarchies of layers against their papers' equations, with dense masks in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import foveate
from foveate.core.errors import BadInput, BadParameter
from foveate.core.rule import Operator
from foveate.replace import GlobalToLocal, LocalLatent

WIDTH, HEADS, KV_HEADS, DIM = 16, 4, 2, 4


def module(rule: Operator, causal: bool = True) -> foveate.nn.Attention:
    """A layer in float64, its parameters away from where they begin."""
    torch.manual_seed(0)
    made = foveate.nn.Attention(WIDTH, HEADS, KV_HEADS, rule, causal=causal).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return made


def text(length: int, seed: int = 1) -> Tensor:
    return torch.randn(1, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    spread = (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    return (x - x.mean(-1, keepdim=True)) / spread * layer.weight + layer.bias


def turned(x: Tensor, places: Tensor) -> Tensor:
    """Rotary positions: pairs (i, i + 2) of a head of four as complex numbers."""
    angles = places[:, None].double() * torch.tensor([1.0, 0.01], dtype=torch.float64)
    z = torch.complex(x[:, :2], x[:, 2:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag], 1)


def attention(own: nn.Module, x: Tensor, other: Tensor, allowed: Tensor, places: Tensor | None = None) -> Tensor:
    """Softmax attention of rows to other rows, head by head; positions where there are places."""
    q, k, v = x @ own.q_proj.weight.T, other @ own.k_proj.weight.T, other @ own.v_proj.weight.T
    out = []
    for h in range(HEADS):
        g = h // (HEADS // KV_HEADS)
        one, two, three = (t[:, n * DIM : (n + 1) * DIM] for t, n in ((q, h), (k, g), (v, g)))
        if places is not None:
            one, two = turned(one, places), turned(two, places)
        s = (one @ two.T / DIM**0.5).masked_fill(~allowed, -torch.inf)
        out.append(torch.softmax(s, -1) @ three)
    return torch.cat(out, 1) @ own.o_proj.weight.T


def layer(own: nn.Module, x: Tensor, allowed: Tensor, places: Tensor | None = None) -> Tensor:
    h = norm(own.norm, x)
    x = x + attention(own.attention, h, h, allowed, places)
    up, _, down = own.feed
    h = norm(own.feed_norm, x) @ up.weight.T + up.bias
    return x + nn.functional.gelu(h) @ down.weight.T + down.bias


def exchange(own: nn.Module, x: Tensor, other: Tensor) -> Tensor:
    allowed = torch.ones(len(x), len(other), dtype=torch.bool)
    return x + attention(own.attention, norm(own.norm, x), norm(own.other_norm, other), allowed)


# ---------------------------------------------------------------- local and latent layers


def interleaved(own: nn.Module, text: Tensor, n: int, causal: bool) -> Tensor:
    """The stack on one text, group by group and then over all latents."""
    groups = [x + own.place[: len(x)] for x in text.split(n)]
    m = own.latents.shape[1]
    z = [own.latents[g] for g in range(len(groups))]

    def local(stack: nn.Module) -> list[Tensor]:
        now = groups
        for one in stack.layers:
            now = [layer(one, x, torch.ones(len(x), len(x), dtype=torch.bool).tril(0 if causal else n)) for x in now]
        return now

    groups = local(own.first)
    for stage in own.stages:
        z = [exchange(stage.read, latents, x) for latents, x in zip(z, groups, strict=True)]
        of = torch.arange(len(groups)).repeat_interleave(m)
        allowed = of[:, None] >= of if causal else torch.ones(len(of), len(of), dtype=torch.bool)
        rows = torch.cat(z)
        for one in stage.overall.layers:
            rows = layer(one, rows, allowed)
        z = list(rows.split(m))
        source = [torch.zeros_like(z[0]), *z[:-1]] if causal else z
        groups = [exchange(stage.write, x, latents) for x, latents in zip(groups, source, strict=True)]
        groups = local(stage.local)
    return norm(own.norm, torch.cat(groups))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [3, 8, 14])
@torch.no_grad()
def test_interleaved_layers_are_those_of_the_paper(causal: bool, length: int) -> None:
    made = module(LocalLatent(4, 3, stages=3, local_layers=2, global_layers=2, max_groups=6), causal)
    x = text(length)
    torch.testing.assert_close(made(x)[0], interleaved(made.rule.learned, x[0], 4, causal))


@torch.no_grad()
def test_where_all_see_all_groups_begin_with_the_text() -> None:
    made, x = module(LocalLatent(4, 3, max_groups=8), causal=False), text(14)
    want = interleaved(made.rule.learned, x[0], 4, causal=False)
    for left, right in ((3, 0), (0, 6), (2, 9)):
        wide = torch.nn.functional.pad(x, (0, 0, left, right), value=torch.nan)
        real = torch.zeros(1, 14 + left + right, dtype=torch.bool)
        real[:, left : left + 14] = True
        torch.testing.assert_close(made(wide, mask=real)[real], want)


def test_far_tokens_reach_each_other_through_latents_alone() -> None:
    for stages, reached in ((2, True), (1, False)):
        made, x = module(LocalLatent(4, 2, stages=stages, max_groups=6)), text(20).requires_grad_()
        made(x)[0, -1].sum().backward()
        assert bool(x.grad[0, 0].abs().sum() > 0) is reached


@torch.no_grad()
def test_a_cache_holds_latents_of_whole_groups_and_the_open_group() -> None:
    made, cache = module(LocalLatent(4, 3, max_groups=6)), DynamicCache()
    made(text(14), cache=cache)
    assert {n: tuple(t.shape) for n, t in cache.layers[0].state.items()} == {
        "open": (1, 4, WIDTH),
        "keys 0": (1, 1, 3, 3, KV_HEADS, DIM),
        "values 0": (1, 1, 3, 3, KV_HEADS, DIM),
        "latents 0": (1, 3, WIDTH),
    }


def test_gradients_reach_all_interleaved_layers() -> None:
    made = module(LocalLatent(4, 3, max_groups=3))
    made(text(14 - 3)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in made.parameters())


def test_too_many_groups() -> None:
    made = module(LocalLatent(4, 3, max_groups=3))
    made(text(12))
    with pytest.raises(BadInput, match=r"4 groups of 4 tokens, and latents for 3; .* larger max_groups"):
        made(text(13))
    with pytest.raises(BadParameter, match="group must be from 1"):
        LocalLatent(0)
    with pytest.raises(BadInput, match="without a cache"):
        module(LocalLatent(), causal=False)(text(3), cache=DynamicCache())


# ---------------------------------------------------------------- global-to-local blocks


def blocks(own: nn.Module, text: Tensor, size: int) -> Tensor:
    """The stack on a text of whole blocks, one block after the other."""
    parts = text.split(size)
    c = torch.stack([torch.cat([own.embed.weight @ row for row in part]) for part in parts])
    number = torch.arange(len(parts))
    for one in own.block_layers.layers:
        c = layer(one, c, number[:, None] >= number, number)
    contexts = [own.start, *norm(own.block_norm, c)]
    decoded = []
    for context, part in zip(contexts, [*parts, text[:0]], strict=True):
        y = torch.cat([own.expand(context).view(2, WIDTH), part[: size - 1]])
        at = torch.arange(len(y))
        for one in own.token_layers.layers:
            y = layer(one, y, at[:, None] >= at, at)
        decoded.append(norm(own.token_norm, y))
    return torch.cat([torch.cat([y[2:], after[1:2]]) for y, after in pairwise(decoded)])


@pytest.mark.parametrize("size", [1, 2, 4])
@torch.no_grad()
def test_blocks_are_those_of_the_paper(size: int) -> None:
    made, x = module(GlobalToLocal(size, 2, 2)), text(12)
    want = blocks(made.rule.learned, x[0], size)
    torch.testing.assert_close(made(x)[0], want)
    # an open block is decoded as far as it goes
    torch.testing.assert_close(made(x[:, :11])[0], want[:11])


@torch.no_grad()
def test_a_cache_holds_a_row_per_block() -> None:
    made, cache = module(GlobalToLocal(4, 3, 1)), DynamicCache()
    made(text(15), cache=cache)
    assert {n: tuple(t.shape) for n, t in cache.layers[0].state.items()} == {
        "open": (1, 4, WIDTH),
        "context": (1, WIDTH),
        "keys": (1, 3, 3, 1, KV_HEADS, DIM),
        "values": (1, 3, 3, 1, KV_HEADS, DIM),
    }


def test_what_lies_before_a_block_comes_through_its_context_alone() -> None:
    made = module(GlobalToLocal(4)).rule.learned
    x, context = text(8), torch.randn(1, 3, WIDTH, dtype=torch.float64)
    y = made.inside(context, x.view(1, 2, 4, WIDTH)[:, :, :-1])
    # the second block with its own context, whatever the first one was
    alone = made.inside(context[:, 1:], x[:, 4:].view(1, 1, 4, WIDTH)[:, :, :-1])
    torch.testing.assert_close(y[:, 1], alone[:, 0])


def test_gradients_reach_all_of_the_blocks() -> None:
    made = module(GlobalToLocal(4))
    made(text(12)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in made.parameters())


def test_bad_blocks() -> None:
    with pytest.raises(BadInput, match="width 16 is no multiple of block=3"):
        module(GlobalToLocal(3))
    with pytest.raises(BadInput, match="causal by its nature"):
        module(GlobalToLocal(), causal=False)
    with pytest.raises(BadParameter, match="block must be from 1"):
        GlobalToLocal(0)


@torch.no_grad()
def test_stacks_work_as_language_models() -> None:
    torch.manual_seed(0)
    for rule in ("global_to_local:block=4", "local_latent:group=4,latents=2"):
        stack = foveate.nn.Attention(WIDTH, HEADS, KV_HEADS, rule)
        model = nn.Sequential(nn.Embedding(30, WIDTH), stack, nn.Linear(WIDTH, 30)).eval()
        ids = torch.randint(30, (2, 13))
        assert model(ids).shape == (2, 13, 30)
        changed = torch.cat([ids[:, :6], (ids[:, 6:] + 1) % 30], 1)
        torch.testing.assert_close(model(changed)[:, :6], model(ids)[:, :6])
