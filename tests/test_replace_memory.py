"""Codes, a workspace, chunks of the past: against their formulas, written out token by token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import foveate
from foveate.core.errors import BadParameter
from foveate.core.mask import Mask
from foveate.core.mixer import Tokens
from foveate.core.rows import RowBlock, View, attend
from foveate.replace import ChunkMemory, KeyValueCodes, Workspace
from foveate.replace.memory.key_value_codes import Codes
from foveate.testing import tiny, views
from foveate.testing.checks.measuring import ruled

SEEN = ("causal", "full", "window", "left_padded", "packed", "scattered", "empty_rows", "decode_padded", "wide_values")


def double(view: View) -> View:
    return replace(view, q=view.q.double(), k=view.k.double(), v=view.v.double())


def weights(view: View, by_hand) -> Tensor:
    """Rows of weights, one at a time: `by_hand(scores, keys, head, entry, row)` over the keys that the row sees."""
    mask, group = view.mask, view.grouped
    seen = (mask.additive(torch.arange(view.queries), 0, view.keys) > -torch.inf).any(1).expand(view.batch, -1, -1)
    p = torch.zeros(view.batch, view.heads, view.queries, view.keys, dtype=torch.float64)
    for b in range(view.batch):
        for h in range(view.heads):
            for i in range(view.queries):
                at = seen[b, i].nonzero()[:, 0]
                if len(at):
                    s = view.scale * view.k[b, h // group, at] @ view.q[b, h, i]
                    p[b, h, i, at] = by_hand(s, at, h, b, i)
    return p


def mixed(view: View, p: Tensor) -> Tensor:
    return p @ view.v.repeat_interleave(view.grouped, 1)


# ---------------------------------------------------------------- chunk memory


def chunked(view: View, rule: ChunkMemory) -> Tensor:
    starts = view.mask.starts.expand(view.batch, -1)

    def row(s: Tensor, at: Tensor, h: int, b: int, i: int) -> Tensor:
        chunk = (at - starts[b, i]) // rule.chunk
        own = int((view.mask.position[i] - starts[b, i]) // rule.chunk)
        relevance = {int(c): s[chunk == c].mean() for c in chunk.unique()}
        others = sorted((c for c in relevance if c != own), key=lambda c: -float(relevance[c]))
        read = [own, *others[: rule.top]]
        total = sum(relevance[c].exp() for c in read)
        p = torch.zeros_like(s)
        for c in read:
            p[chunk == c] = relevance[c].exp() / total * torch.softmax(s[chunk == c], 0)
        return p

    return mixed(view, weights(view, row))


@pytest.mark.parametrize("name", SEEN)
def test_chunk_memory_is_its_formula(name: str) -> None:
    view, rule = double(views.view(name)), ChunkMemory(chunk=4, top=2)
    got = attend(ruled(rule, view), engine="blocks", block=5).out
    assert torch.allclose(got, chunked(view, rule), atol=1e-10)


def test_chunk_memory_across_reads_the_best_chunks_only() -> None:
    view = double(views.view("cross", batch=1))
    rule = ChunkMemory(chunk=4, top=1)
    # the last key stands for padding
    view.mask = Mask.full(view.queries, view.keys)
    s = view.scale * view.q @ view.k.repeat_interleave(view.grouped, 1).transpose(-1, -2)
    means = torch.stack([part.mean(-1) for part in s.split(4, -1)], -1)
    best = torch.arange(view.keys) // 4 == means.argmax(-1)[..., None]
    want = mixed(view, torch.softmax(s.masked_fill(~best, -torch.inf), -1))
    assert torch.allclose(attend(ruled(rule, view)).out, want, atol=1e-10)


def test_chunk_memory_of_one_long_chunk_leaves_a_model_as_it_was() -> None:
    model, batch = tiny.model("llama"), tiny.inputs("llama", padding="left", length=24)
    before = model(**batch).logits
    after = foveate.convert(model, ChunkMemory(chunk=1 << 20))(**batch).logits
    real = batch["attention_mask"].bool()
    assert torch.allclose(before[real], after[real], atol=1e-5)
    assert not torch.allclose(before[real], foveate.convert(model, "chunk_memory:chunk=4,top=1")(**batch).logits[real])


# ---------------------------------------------------------------- workspace


def broadcast(view: View, rule: Workspace) -> Tensor:
    slots = view.learned.query.double()

    def row(s: Tensor, at: Tensor, h: int, b: int, i: int) -> Tensor:
        written, relevance = [], []
        for a in slots[h]:
            u = view.v[b, h // view.grouped, at] @ a / len(a) ** 0.5
            won = u.topk(min(rule.winners, len(u))).indices
            w = torch.zeros_like(s).scatter(0, won, torch.softmax(u[won], 0))
            written.append(w)
            relevance.append(w @ s)
        return torch.softmax(torch.stack(relevance), 0) @ torch.stack(written)

    return weights(view, row)


@pytest.mark.parametrize("name", SEEN)
def test_workspace_is_its_formula(name: str) -> None:
    rule = Workspace(slots=3, winners=2)
    view = ruled(rule, double(views.view(name)))
    with torch.no_grad():
        p = broadcast(view, rule)
    assert (p.count_nonzero(-1) <= 6).all()
    sums = p.sum(-1)
    assert torch.allclose(sums, view.mask.rows[:, None].expand(sums.shape).double())
    assert torch.allclose(attend(view, engine="blocks", block=5).out, mixed(view, p), atol=1e-10)


def test_the_last_row_of_a_causal_workspace_is_the_one_that_sees_all() -> None:
    rule, view = Workspace(slots=3, winners=2), views.view("causal")
    whole = attend(ruled(rule, replace(view, mask=Mask.full(view.queries, view.keys)))).out
    assert torch.allclose(attend(ruled(rule, view)).out[:, :, -1], whole[:, :, -1], atol=1e-5)


@torch.no_grad()
def test_where_a_text_stands_does_not_change_who_wins() -> None:
    model, batch = foveate.convert(tiny.model("llama"), Workspace(slots=2, winners=2)), tiny.inputs("llama", length=12)
    here, there = (model(**batch, position_ids=torch.arange(12)[None] + shift).logits for shift in (0, 7))
    assert torch.allclose(here, there, atol=1e-4)


def test_of_equal_bids_the_earlier_wins() -> None:
    view = views.view("left_padded")
    view = ruled(Workspace(slots=2, winners=2), replace(view, v=torch.ones_like(view.v)))
    block = RowBlock(view, torch.arange(10, 23), 0, 23, torch.float32)
    # the second text begins behind six tokens of padding
    for entry, first in ((0, 0), (1, 6)):
        assert block.weights[entry].sum((0, 1)).nonzero()[:, 0].tolist() == [first, first + 1]


def test_slots_learn() -> None:
    attention = foveate.nn.Attention(16, heads=2, rule=Workspace(slots=3, winners=4))
    attention(torch.randn(2, 12, 16)).square().sum().backward()
    slots = attention.rule.learned.query
    assert slots.shape == (2, 3, 8)
    # with one winner a slot has nothing to weigh
    assert (slots.grad.abs().sum(-1) > 0).all()


# ---------------------------------------------------------------- codes


def codes(value_dim: int = 5, **options) -> Codes:
    made = Codes(KeyValueCodes(**{"codebooks": 3, "pairs": 6, "key_dim": 2} | options), 4, value_dim)
    with torch.no_grad():
        made.values.normal_()
    return made


def tokens(x: Tensor, real: Tensor | None = None, training: bool = False) -> Tokens:
    real = torch.ones(x.shape[:2], dtype=torch.bool) if real is None else real
    return Tokens(x, real, True, torch.arange(x.shape[1]).expand(len(x), -1), training)


def nearest(made: Codes, x: Tensor) -> list[int]:
    """The number of the nearest key in each codebook."""
    z = [x @ p for p in made.projection]
    return [min(range(len(k)), key=lambda j, k=k, c=c: float((k[j] - z[c]).norm())) for c, k in enumerate(made.keys)]


def test_a_token_gets_the_mean_of_the_values_of_its_nearest_keys() -> None:
    made, x = codes(), torch.randn(2, 7, 4)
    out, state = made(tokens(x), None)
    assert state is None
    for b in range(2):
        for i in range(7):
            want = torch.stack([made.values[c, j] for c, j in enumerate(nearest(made, x[b, i]))]).mean(0)
            assert torch.allclose(out[b, i], want, atol=1e-6)


def test_projections_have_columns_of_length_one() -> None:
    made = codes()
    assert torch.allclose(made.projection.norm(dim=1), torch.ones(3, 2))
    assert [name for name, _ in made.named_parameters()] == ["values"]


def test_only_fetched_values_learn_and_the_input_does_not() -> None:
    made, x = codes(), torch.randn(1, 2, 4, requires_grad=True)
    out, _ = made(tokens(x), None)
    out.sum().backward()
    fetched = {(c, j) for i in range(2) for c, j in enumerate(nearest(made, x[0, i].detach()))}
    moved = {(int(c), int(j)) for c, j in made.values.grad.abs().sum(-1).nonzero()}
    assert moved == fetched
    assert x.grad is None


def test_keys_follow_the_tokens_by_moving_averages() -> None:
    made = codes(decay=0.5, expire=0.001)
    made.size.fill_(1.0)
    x, before = torch.randn(1, 8, 4), made.keys.clone()
    made(tokens(x, training=True), None)
    wants = torch.empty_like(before)
    for c in range(3):
        z = x[0] @ made.projection[c]
        chosen = (z[:, None] - before[c]).norm(dim=-1).argmin(-1)
        size = [0.5 + 0.5 * int((chosen == j).sum()) for j in range(6)]
        for j in range(6):
            total = 0.5 * before[c, j] + 0.5 * z[chosen == j].sum(0)
            wants[c, j] = total / ((size[j] + 1e-5) / (sum(size) + 6e-5) * sum(size))
    assert torch.allclose(made.keys, wants, atol=1e-5)


def test_a_key_that_nobody_fetches_becomes_a_token() -> None:
    made, x = codes(pairs=12, expire=1.0), torch.randn(1, 5, 4)
    made(tokens(x, training=True), None)
    z = torch.stack([x[0] @ p for p in made.projection])
    away = torch.cdist(made.keys, z).amin(-1)
    # 5 tokens fetch at most 5 of 12 keys; the size of the others was 0
    assert ((away < 1e-6).sum(-1) >= 7).all()


def test_padding_moves_no_key_and_none_moves_after_its_steps() -> None:
    x, real = torch.randn(1, 9, 4), torch.arange(9)[None] >= 4
    alone, padded = codes(steps=1), codes(steps=1)
    padded.load_state_dict(alone.state_dict())
    for made, given in ((alone, tokens(x[:, 4:], training=True)), (padded, tokens(x, real, training=True))):
        torch.manual_seed(0)
        made(given, None)
    assert torch.allclose(alone.keys, padded.keys)
    still = alone.keys.clone()
    alone(tokens(x, training=True), None)
    assert torch.equal(alone.keys, still)


def test_keys_rest_outside_of_training() -> None:
    attention = foveate.nn.Attention(8, heads=2, rule=KeyValueCodes(codebooks=2, pairs=4, key_dim=2)).eval()
    still = attention.rule.learned.keys.clone()
    attention(torch.randn(1, 6, 8))
    assert torch.equal(attention.rule.learned.keys, still)
    attention.train()(torch.randn(1, 6, 8))
    assert not torch.equal(attention.rule.learned.keys, still)


def test_a_converted_model_keeps_its_codes(tmp_path: Path) -> None:
    model = foveate.convert(tiny.model("llama"), KeyValueCodes(codebooks=2, pairs=4, key_dim=3), layers=0)
    torch.nn.init.normal_(model.model.layers[0].self_attn.rule.learned.values)
    batch = tiny.inputs("llama", length=12)
    model.train()(**batch)
    model.eval().save_pretrained(tmp_path)
    again, _ = foveate.load(tmp_path, tokenizer=False)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert torch.equal(again.model.layers[0].self_attn.rule.learned.calls, torch.tensor(1))


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: ChunkMemory(chunk=0), "chunk must be from 1"),
        (lambda: ChunkMemory(top=0), "top must be from 1"),
        (lambda: Workspace(slots=0), "slots must be from 1"),
        (lambda: Workspace(winners=0), "winners must be from 1"),
        (lambda: KeyValueCodes(pairs=1), "pairs must be from 2"),
        (lambda: KeyValueCodes(decay=1.0), "decay must be from 0.0 to 0.9999"),
    ],
)
def test_bad_parameters_are_named(make, named: str) -> None:
    with pytest.raises(BadParameter, match=named):
        make()
