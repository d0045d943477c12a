"""Policies with a plan per head: which heads are found, what they keep, and what the others leave behind."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from transformers.cache_utils import DynamicCache

import foveate
from foveate.compress import GatedHeads, MixtureOfSpans, RetrievalHeads
from foveate.compress.cache._gates import Lesson, Mixed, made_text
from foveate.compress.cache._repeated import repetition_scores
from foveate.compress.cache.retrieval_heads import top
from foveate.core.budget import Budget
from foveate.core.cache import ragged_layers
from foveate.core.errors import BadInput, BadParameter
from foveate.core.mask import Mask
from foveate.core.policy import Held
from foveate.core.ragged import EMPTY
from foveate.core.rows import Layer, Rows, View, attend
from foveate.testing import handmade, tiny
from foveate.testing.policies import ids_of, left_padded, padded_ids, positions, run

SMALL = Budget(0.4, sinks=2, recent=3, every=3)
PROMPT_ONLY = Budget(8, sinks=2, recent=1, every=0)


def prompted(policy, family="llama", length=24, padding=None):
    """The layers of the cache behind one prompt."""
    model, ids = tiny.model(family), ids_of(length=length)
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), foveate.attach(model, policy):
        model(input_ids=ids, attention_mask=padding, past_key_values=cache, use_cache=True)
    return ragged_layers(cache)


def entry(layer, row, head, position):
    """Key, value and mass of the entry at a position."""
    store = layer.store
    at = (store.positions()[row, head] == position).nonzero()[0, 0]
    mass = torch.ones(()) if store.mass is None else store.spread(store.mass)[row, head, at]
    return store.spread(store.keys)[row, head, at], store.spread(store.values)[row, head, at], mass


# ---------------------------------------------------------------- RetrievalHeads


def test_the_mean_of_the_dropped_stays_and_weighs_as_many():
    full = prompted(Everything)
    for n, layer in enumerate(prompted(RetrievalHeads(PROMPT_ONLY, heads=((0, 1),)))):
        for row in range(2):
            for head in range(2):
                k, v = (full[n].store.spread(x)[row, head] for x in (full[n].store.keys, full[n].store.values))
                held = [p for p in layer.store.positions()[row, head].tolist() if p != EMPTY]
                if (n, head) == (0, 1):
                    assert held == list(range(24))
                    assert torch.equal(entry(layer, row, head, 2)[0], k[2])
                    continue
                # two sinks, the mean in the place of the third token, the last five
                assert held == [0, 1, 2, 19, 20, 21, 22, 23]
                mean_k, mean_v, mass = entry(layer, row, head, 2)
                torch.testing.assert_close(mean_k, k[2:19].mean(0))
                torch.testing.assert_close(mean_v, v[2:19].mean(0))
                assert mass == 17
                assert entry(layer, row, head, 1)[2] == entry(layer, row, head, 19)[2] == 1


Everything = MixtureOfSpans(beta=1.0)


def test_later_rounds_go_on_with_the_same_mean():
    model, ids = tiny.model("llama"), ids_of(length=60)
    policy = RetrievalHeads(Budget(14, sinks=2, recent=3, every=3))
    got = run(model, ids, policy, chunks=(17,), steps=20)
    # layer 0 has the keys of the full model, whatever was dropped
    full = run(model, ids, Everything, steps=20).layers[0].store
    for row in range(2):
        for head in range(2):
            held = [p for p in got.layers[0].store.positions()[row, head].tolist() if p != EMPTY]
            assert held[:3] == [0, 1, 2]
            assert held[3:] == list(range(held[3], 60))
            k, v = (full.spread(x)[row, head, 2 : held[3]].mean(0) for x in (full.keys, full.values))
            mean_k, mean_v, mass = entry(got.layers[0], row, head, 2)
            torch.testing.assert_close(mean_k, k, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(mean_v, v, rtol=1e-4, atol=1e-5)
            assert mass == held[3] - 2


def test_the_papers_row_over_the_entries():
    """(n exp(q k) v + sum exp(q k_j) v_j) / (n exp(q k) + sum exp(q k_j)), by hand."""
    layer = prompted(RetrievalHeads(PROMPT_ONLY))[0]
    store, q = layer.store, torch.randn(2, 4, 1, 8, generator=torch.Generator().manual_seed(3))
    got = store.attend(q, Mask.causal_of(1, 25), 0.5)
    for head in range(4):
        k, v = (store.spread(x)[0, head // 2] for x in (store.keys, store.values))
        n = torch.tensor([1, 1, 17, 1, 1, 1, 1, 1])
        e = n * (0.5 * k @ q[0, head, 0]).exp()
        torch.testing.assert_close(got[0, head, 0], (e[:, None] * v).sum(0) / e.sum())


def test_no_room_for_the_mean_leaves_the_sinks_in_place():
    tight = Budget(5, sinks=2, recent=3, every=0)
    layer = prompted(RetrievalHeads(tight))[0]
    assert layer.store.positions()[0].tolist() == 2 * [[0, 1, 21, 22, 23]]
    assert layer.store.mass is None or bool((layer.store.mass == 1).all())


def test_padding_and_rubbish_are_no_part_of_the_mean():
    shape = (2, 2, 12)
    rng = torch.Generator().manual_seed(0)
    k, v = (torch.randn(*shape, 8, generator=rng) for _ in range(2))
    position = torch.arange(12).expand(shape).clone()
    position[1, :, :3] = EMPTY
    mass = torch.full(shape, 2.0)
    for x in (k, v, mass):
        x[1, :, :3] = torch.nan
    view = View(torch.randn(2, 4, 12, 8, generator=rng), k, v, Mask.causal_of(12))
    held = Held(Rows(view, view.q[:0], {}, "none"), position, torch.zeros(shape), torch.full((2, 2), 7), mass)
    policy = RetrievalHeads(Budget(7, sinks=2, recent=3, every=0))
    keep = held.there & ((held.there.cumsum(-1) <= 3) | (position > 8))
    made = policy.merge(held, keep)
    torch.testing.assert_close(made.k[1, :, 5], k[1, :, 5:9].mean(1))
    assert made.mass[1, 0, 5] == 8
    assert made.mass[0, 0, 2] == 14
    assert torch.equal(made.k[:, :, 9:], k[:, :, 9:])


def test_spared_heads_keep_all_in_every_layer_of_a_pyramid():
    budget = replace(SMALL, layers="pyramid")
    layers = prompted(RetrievalHeads(budget, heads=((1, 0),)), length=40)
    assert layers[1].store.length.tolist() == [[40, 7 - 2], [40, 7 - 2]]


def test_retrieval_heads_are_found_where_they_were_planted():
    model, tokenizer = handmade.model(), tiny.tokenizer()
    scores, kv_heads = repetition_scores(model, tokenizer, 12, 4, 0)
    assert kv_heads == {0: 4, 1: 4}
    assert scores["induction"][1, 2] == pytest.approx(1.0, abs=1e-3)
    # 1/2, 2/3 and 3/4 of the mass is on earlier copies in the second to fourth round
    assert scores["echo"][1, 1] == pytest.approx((1 / 2 + 2 / 3 + 3 / 4) / 3, abs=1e-3)
    found = RetrievalHeads.fit(model, tokenizer, tokens=12, induction=0.14, echo=0)
    assert found.heads == ((1, 2),)
    assert RetrievalHeads.fit(model, tokenizer, tokens=12, induction=0, echo=0.01).heads == ((1, 1),)


def test_a_kv_head_is_kept_for_any_of_its_query_heads():
    model, tokenizer = tiny.model("llama", max_position_embeddings=256), tiny.tokenizer()
    scores, _ = repetition_scores(model, tokenizer, 16, 4, 0)
    chosen = top(scores["induction"], 0.25) | top(scores["echo"], 0.25)
    found = RetrievalHeads.fit(model, tokenizer, tokens=16, induction=0.25, echo=0.25)
    # four query heads share two KV heads
    assert found.heads == tuple(sorted({(layer, head // 2) for layer, head in chosen}))
    assert len(top(scores["induction"], 0.25)) == 2
    assert RetrievalHeads.fit(model, tokenizer, tokens=16, induction=0.25, echo=0.25) == found


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"induction": 1.5}, "a share of the heads"),
        ({"repeats": 1}, "at least 2"),
        ({"tokens": 0}, "at least 1"),
        ({"tokens": 1000}, "take fewer"),
        ({"tokens": 60, "repeats": 9}, "take tokens="),
    ],
)
def test_retrieval_heads_refuse_what_they_cannot_be_found_on(given, says):
    with pytest.raises(BadInput, match=says):
        RetrievalHeads.fit(handmade.model(), tiny.tokenizer(), **given)


# ---------------------------------------------------------------- KV heads that the model has not


@pytest.mark.parametrize(
    "policy",
    [
        RetrievalHeads(SMALL, heads=((1, 2),)),
        GatedHeads(SMALL, gates=((1, 2, 0.1),)),
        MixtureOfSpans(SMALL, spans=((1, 2, 4, 0.0),)),
    ],
    ids=lambda p: p.name,
)
def test_a_kv_head_that_the_model_has_not_is_refused(policy):
    # the model has four query heads and two KV heads: `attach` lets this by
    with pytest.raises(BadInput, match="layer 1 has no KV head 2; its 2 KV heads"):
        prompted(policy)
    # more attention layers than layers with a cache: those of an encoder, and cross-attention
    with pytest.raises(BadInput, match="no layer 1; its 1 layers with a KV cache"):
        policy.counts(torch.tensor([24]), 0, 1, 4, 1)


# ---------------------------------------------------------------- MixtureOfSpans


def test_each_head_keeps_what_its_line_says_at_prefill_and_decode():
    budget = Budget(1000, sinks=2, recent=1, every=0)
    spans = ((0, 0, 5, 0.0), (0, 1, 0, 0.25), (1, 0, -4, 0.5), (1, 1, -1000, 1.0))
    layers = prompted(MixtureOfSpans(budget, spans), length=24)
    want = [[2 + 5, 2 + 6], [2 + 8, 2 + 1]]
    assert [layer.store.length[0].tolist() for layer in layers] == want
    at = layers[1].store.positions()[0, 0].tolist()
    assert [p for p in at if p != EMPTY] == [0, 1, *range(16, 24)]


def test_spans_grow_with_the_text_in_decoding_and_are_never_exceeded():
    model, ids = tiny.model("llama"), ids_of(length=80)
    spans = ((0, 0, 6, 0.0), (0, 1, 0, 0.5), (1, 0, 2, 0.25))
    policy = MixtureOfSpans(Budget(1000, sinks=2, recent=1, every=3), spans, alpha=0, beta=1.0)
    seen = []

    def look(layers):
        n = layers[0].seen
        lengths = [layer.store.length[0].tolist() for layer in layers]
        for (layer, head), span in {(0, 0): 6, (0, 1): n // 2, (1, 0): 2 + n // 4, (1, 1): n}.items():
            held = lengths[layer][head]
            # between two rounds up to two tokens less
            assert min(n, 2 + span) - 2 <= held <= min(n, 2 + span), (n, layer, head)
        seen.append(n)

    run(model, ids, policy, chunks=(30,), steps=40, after=look)
    assert seen[-1] == 80


def test_a_padded_row_has_the_span_of_its_own_length():
    padding = left_padded(prompt=40)
    ids = padded_ids(ids_of(length=44), padding)
    policy = MixtureOfSpans(Budget(1000, sinks=2, recent=1, every=0), alpha=1, beta=0.25)
    model = tiny.model("llama")
    got = run(model, ids, policy, padding, steps=4).layers[0].store.length
    # 40 and 29 tokens of prompt, and the four that came after it
    assert got[:, 0].tolist() == [2 + 1 + 10 + 4, 2 + 1 + 7 + 4]


def test_a_budget_caps_all_spans_and_a_whole_one_drops_nothing():
    capped = MixtureOfSpans(Budget(9, sinks=2, recent=1, every=0), beta=1.0)
    assert prompted(capped)[0].store.length.tolist() == [[9, 9], [9, 9]]
    whole = Budget(1.0, sinks=1, recent=1, every=0)
    assert prompted(MixtureOfSpans(whole, alpha=3, beta=0.0))[0].store.length.tolist() == [[24, 24], [24, 24]]


def test_heads_do_not_compete_for_their_spans():
    budget = Budget(1000, sinks=2, recent=1, every=0, heads="layer")
    layers = prompted(MixtureOfSpans(budget, ((0, 0, 12, 0.0),), alpha=3, beta=0.0))
    assert layers[0].store.length[0].tolist() == [14, 5]


@pytest.mark.parametrize(
    "bad", [((0, 0, 1),), ((0, 0, 1, 2.0),), ((0, 0, 1, 0.5), (0, 0, 2, 0.5)), ((0, 0, "1", 0.5),)]
)
def test_a_line_that_is_none_is_refused(bad, unchecked):
    with pytest.raises(BadParameter, match="spans must be a tuple of"):
        MixtureOfSpans(spans=bad)


# ---------------------------------------------------------------- GatedHeads


def test_gates_above_the_threshold_spare_their_heads():
    gates = ((0, 0, 0.2), (0, 1, 0.6), (1, 0, 0.5), (1, 1, 0.9))
    policy = GatedHeads(PROMPT_ONLY, gates)
    assert policy.spared == ((0, 1), (1, 1))
    assert [layer.store.length[0].tolist() for layer in prompted(policy)] == [[8, 24], [8, 24]]
    assert policy.keeping(0.25).spared == ((1, 1),)
    assert policy.keeping(0.75).spared == ((0, 1), (1, 0), (1, 1))
    assert policy.keeping(1.0).spared == tuple(g[:2] for g in gates)
    assert policy.keeping(0.0).spared == ()
    with pytest.raises(BadInput, match="from 0 to 1"):
        policy.keeping(1.5)
    with pytest.raises(BadInput, match="no gates"):
        GatedHeads().keeping(0.5)


def test_mixed_weights_are_the_mixture_of_two_attentions():
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 20, 8, generator=rng) for h in (4, 2, 2))
    padded = replace(Mask.causal_of(20), low=torch.full((1, 20), 3, dtype=torch.int32), begin=torch.tensor([3]))
    padded = replace(padded, high=torch.maximum(padded.high, padded.low))
    for mask, sinks in (
        (Mask.causal_of(20), None),
        (padded, None),
        (Mask.causal_of(20), torch.randn(4, generator=rng)),
    ):
        view = View(q, k, v, mask, sinks=sinks, layer=Layer(2))
        gates = torch.tensor([0.25, 1.0])
        got = attend(view, edits=[Mixed(2, 4, {2: gates})]).out
        full = attend(view).out
        i, j, begin = torch.arange(20)[:, None], torch.arange(20), int(mask.text_begin)
        near = (j < begin + 2) | (i - j < 4)
        alone = attend(replace(view, bias=torch.where(near, 0.0, -torch.inf)[None, None])).out
        alpha = gates.repeat_interleave(2)[None, :, None, None]
        want = alpha * full + (1 - alpha) * alone
        torch.testing.assert_close(got[:, :, begin:], want[:, :, begin:], rtol=1e-4, atol=1e-5)


def test_the_rows_of_a_lesson_stand_before_the_answers():
    tokenizer = tiny.tokenizer()
    text = made_text(tokenizer, 300, 2, 1, random.Random(0))
    assert len(text.context) == 300
    said = tokenizer.decode(text.context)
    answers = "".join(tokenizer.decode(text.asked[row + 1]) for row in text.rows)
    for word in answers.split():
        assert f"is: {word}" in said
    assert len(answers.split()) == 2


def test_the_head_that_copies_keeps_its_gate_and_the_others_lose_theirs():
    model, tokenizer = handmade.model(positions=128), tiny.tokenizer()
    before = {n: p.clone() for n, p in model.named_parameters()}
    told = []
    how = {"sinks": 2, "recent": 16, "steps": 12, "texts": 2, "length": 80, "keys": 1, "words": 1, "rate": 0.3}
    made = GatedHeads.fit(model, tokenizer, **how, progress=lambda n, of: told.append((n, of)))
    gates = {(layer, head): gate for layer, head, gate in made.gates}
    assert len(gates) == 8
    assert gates.pop((1, 2)) > 0.8
    assert max(gates.values()) < 0.2
    assert made.spared == ((1, 2),)
    assert made.limits.sinks == 2 and made.limits.recent == 16
    assert told[-1] == (12, 12)
    assert GatedHeads.fit(model, tokenizer, **how) == made
    assert all(torch.equal(p, before[n]) and p.requires_grad for n, p in model.named_parameters())


def test_a_lesson_leaves_its_caches_as_they_were():
    model, tokenizer = tiny.model("mistral", max_position_embeddings=256), tiny.tokenizer()
    text = made_text(tokenizer, 120, 1, 1, random.Random(0))
    lesson = Lesson(model, (text,), 1, 0.1, 0.0, 0)
    cache, wanted = lesson.read(text)
    torch.testing.assert_close(lesson.states(text, cache), wanted)
    assert cache.get_seq_length() == 120


def test_fitted_policies_survive_a_plan(tmp_path):
    model = tiny.model("llama")
    kept = (
        GatedHeads(Budget(335, sinks=64, recent=256), ((0, 0, 0.123456), (1, 1, 1.0)), 0.25),
        RetrievalHeads(0.5, ((0, 1), (1, 0))),
        MixtureOfSpans(Budget(99, sinks=2, recent=1), ((0, 0, 3, 0.5), (0, 1, -2.5, 0.0)), 1.0, 0.125),
    )
    for policy in kept:
        path = foveate.Plan.of(model, policy).save(tmp_path / "plan.json")
        assert foveate.Plan.load(path).mechanisms == (policy,)
        assert foveate.Plan.load(path).mechanisms[0].limits == policy.limits


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"steps": 0}, "at least 1"),
        ({"keys": 11}, "at most 10"),
        ({"rate": -1.0}, "not be negative"),
        ({"length": 40}, "cannot hold"),
    ],
)
def test_gated_heads_refuse_what_they_cannot_be_learned_on(given, says):
    with pytest.raises(BadInput, match=says):
        GatedHeads.fit(handmade.model(), tiny.tokenizer(), **given)


def test_spared_heads_say_what_the_full_cache_says_when_the_rest_is_near():
    """Batches with padding: what is spared is spared in every row, by its own tokens."""
    padding = left_padded()
    ids = padded_ids(ids_of(), padding)
    policy = GatedHeads(SMALL, ((0, 1, 1.0), (1, 1, 1.0)))
    held = positions(run(tiny.model("llama"), ids, policy, padding, chunks=(17,)))
    cut = int((padding[1] == 0).sum())
    for layer in held:
        assert layer[0][1] == list(range(ids.shape[1]))
        assert layer[1][1] == list(range(cut, ids.shape[1]))
        assert len(layer[0][0]) <= 20
