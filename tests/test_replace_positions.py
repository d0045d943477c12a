"""Relative positions, against their papers' formulas written out."""

from __future__ import annotations

import math
import tempfile

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import foveate
from attending import HEADS, KV_HEADS, LENGTH, WIDTH, module, projected, texts
from foveate.core.errors import BadInput
from foveate.core.reductions import Sample
from foveate.core.rows import RowBlock, attend
from foveate.nn import Attention
from foveate.replace import RelativeConvolution, SkewedRelative, UniversalRelative
from foveate.replace.positions._relative import skewed
from foveate.testing import tiny, views
from foveate.testing.checks.measuring import ruled

DIM = WIDTH // HEADS


def weights(scores: Tensor, causal: bool = True) -> Tensor:
    late = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    return (scores.masked_fill(late, -torch.inf) if causal else scores).softmax(-1)


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_universal_relative_is_its_formula(causal: bool) -> None:
    attention, x = module(UniversalRelative(span=5), causal=causal), texts()
    own, (q, k, v) = attention.rule.learned, projected(attention, x)
    scores, factor = q @ k.mT / math.sqrt(DIM), torch.zeros(HEADS, LENGTH, LENGTH, dtype=torch.float64)
    for i in range(LENGTH):
        for j in range(LENGTH):
            entry = min(max(j - i, -4), 4) + 4
            scores[:, :, i, j] += own.bias[:, entry]
            factor[:, i, j] = own.factor[:, entry]
    out = (weights(scores, causal) * factor) @ v
    assert torch.allclose(attention(x), attention.o_proj(out.transpose(1, 2).flatten(2)), atol=1e-10)


@torch.no_grad()
def test_only_the_universal_form_tells_places_apart() -> None:
    same = torch.ones(1, LENGTH, WIDTH, dtype=torch.float64)
    for causal in (True, False):
        found = module(UniversalRelative(), causal=causal)(same)[0]
        assert float(found.diff(dim=0).abs().min(0).values.max()) > 1e-3
    relative = module(SkewedRelative())(same)[0]
    assert torch.allclose(relative, relative[:1].expand_as(relative), atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("rule", [UniversalRelative(), SkewedRelative(start=0.0)])
def test_a_loaded_model_stays_as_it_was(rule: object) -> None:
    model, inputs = tiny.model("llama"), tiny.inputs("llama", padding="left", length=14)
    before = model(**inputs).logits
    after = foveate.convert(model, rule)(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert torch.allclose(after[real], before[real], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("span", [1, 4, 9, 40])
def test_skewed_relative_is_its_formula(span: int) -> None:
    attention, x = module(SkewedRelative(span)), texts()
    e, (q, k, v) = attention.rule.learned.distance, projected(attention, x)
    scores = q @ k.mT
    for i in range(LENGTH):
        for j in range(max(0, i - span + 1), i + 1):
            scores[:, :, i, j] += (q[:, :, i] * e[:, i - j]).sum(-1)
    out = weights(scores / math.sqrt(DIM)) @ v
    assert torch.allclose(attention(x), attention.o_proj(out.transpose(1, 2).flatten(2)), atol=1e-10)


@torch.no_grad()
def test_in_a_model_with_rotary_positions_padding_changes_nothing_if_places_are_given() -> None:
    model, inputs = tiny.model("llama"), tiny.inputs("llama", padding="left", length=14)
    foveate.convert(model, SkewedRelative(span=6))
    ids, real = inputs["input_ids"], inputs["attention_mask"]
    place = (real.cumsum(-1) - 1).clamp_min(0)
    whole = model(input_ids=ids, attention_mask=real, position_ids=place).logits
    alone = model(input_ids=ids[1:][:, real[1].bool()]).logits
    assert torch.allclose(whole[1:][:, real[1].bool()], alone, atol=1e-4)
    cache = DynamicCache(config=model.config)
    parts = [
        model(
            input_ids=ids[:, a:b], attention_mask=real[:, :b], position_ids=place[:, a:b], past_key_values=cache
        ).logits
        for a, b in ((0, 8), (8, 9), (9, 14))
    ]
    assert torch.allclose(torch.cat(parts, 1)[real.bool()], whole[real.bool()], atol=1e-4)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again, _ = foveate.load(folder, tokenizer=False)
    assert torch.allclose(again(input_ids=ids, attention_mask=real, position_ids=place).logits, whole, atol=1e-5)


@pytest.mark.parametrize("rows", [[0], [22], [3, 4, 5, 6], list(range(23)), [2, 3, 9, 22], [5, 4], []])
@pytest.mark.parametrize("span", [1, 3, 50])
@pytest.mark.parametrize("stretch", [(0, 23), (4, 5), (7, 7), (0, 3)])
def test_skewing_puts_each_product_in_its_place(rows: list[int], span: int, stretch: tuple[int, int]) -> None:
    block = RowBlock(views.view("causal"), torch.tensor(rows, dtype=torch.long), *stretch, torch.float32)
    e = torch.randn(4, span, 8, generator=torch.Generator().manual_seed(2))
    found = skewed(block, block.q, e)
    assert found.shape == (2, 4, len(rows), stretch[1] - stretch[0])
    for r, i in enumerate(rows):
        for column, j in enumerate(range(*stretch)):
            want = (block.q[:, :, r] * e[:, i - j]).sum(-1) if 0 <= i - j < span else torch.zeros(2, 4)
            assert torch.allclose(found[:, :, r, column], want, atol=1e-5)


@torch.no_grad()
def test_rows_that_are_looked_at_are_those_that_are_mixed() -> None:
    view, sample = ruled(SkewedRelative(span=5), views.view("causal")), Sample(4)
    rows = attend(view, [sample])
    seen = rows[sample]
    assert bool((seen.index.diff() != 1).any()), "rows with gaps"
    v = view.v.repeat_interleave(2, 1)[:, :, : seen.weights.shape[-1]]
    assert torch.allclose(seen.weights @ v, rows.out[:, :, seen.index], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kernel", [2, 3])
def test_relative_convolution_is_its_formula(kernel: int) -> None:
    attention, x = module(RelativeConvolution(kernel, span=4)), texts()
    own = attention.rule.learned
    made = []
    for name in ("q", "k", "v"):
        conv = own.convolutions[name]
        raw = own.projections[name](x).unflatten(-1, (-1, DIM)).transpose(1, 2)
        out = torch.zeros_like(raw)
        for t in range(LENGTH):
            for m in range(min(kernel, t + 1)):
                out[:, :, t] += conv.weight[:, 0, kernel - 1 - m] * raw[:, :, t - m]
            out[:, :, t] += conv.bias
        made.append(out.repeat_interleave(HEADS // out.shape[1], 1))
    q, k, v = made
    scores = (q + own.toward_keys[:, None]) @ k.mT
    for i in range(LENGTH):
        for j in range(max(0, i - 3), i + 1):
            scores[:, :, i, j] += (q[:, :, i] * own.distance[:, i - j]).sum(-1) + own.distance_bias[:, i - j]
    want = own.output((weights(scores / math.sqrt(DIM)) @ v).transpose(1, 2).flatten(2))
    assert torch.allclose(attention(x), want, atol=1e-10)


@torch.no_grad()
def test_relative_convolution_goes_on_where_it_was() -> None:
    attention, x = module(RelativeConvolution(span=8)), texts()
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[1, :4] = False
    whole, cache = attention(x, mask=real), DynamicCache()
    parts = [attention(x[:, a:b], mask=real[:, :b], cache=cache) for a, b in ((0, 1), (1, 5), (5, 6), (6, LENGTH))]
    assert torch.allclose(torch.cat(parts, 1)[real], whole[real], atol=1e-10)
    assert torch.allclose(whole[1:, 4:], attention(x[1:, 4:]), atol=1e-10)
    kept = cache.layers[0]
    assert kept.state["last_q"].shape == (2, HEADS, 2, DIM)
    assert kept.bytes_held() == 8 * 2 * (2 * (HEADS + 2 * KV_HEADS) + 2 * KV_HEADS * LENGTH) * DIM + 2 * LENGTH


@pytest.mark.parametrize("rule", [SkewedRelative(), RelativeConvolution()])
def test_what_looks_back_is_refused_in_encoders(rule: object) -> None:
    with pytest.raises(BadInput, match="is causal by its nature"):
        Attention(WIDTH, HEADS, rule=rule, causal=False)


def test_gradients_reach_every_parameter() -> None:
    for rule in (UniversalRelative(4), SkewedRelative(4), RelativeConvolution(span=4)):
        attention = module(rule)
        attention(texts()).square().sum().backward()
        silent = [n for n, p in attention.named_parameters() if p.grad is None or not p.grad.abs().sum()]
        assert not silent, silent
