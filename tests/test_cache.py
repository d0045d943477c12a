"""The ragged cache and its budgets, through transformers' own generation and against the full cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers.cache_utils import DynamicCache, StaticCache

import foveate
from foveate.compress import HeavyHitters, KeyNorm, LastToken, ObservationWindow, Quantised, Streaming
from foveate.core.attach import Attached
from foveate.core.branches import Whole, branch
from foveate.core.budget import Budget, in_bytes
from foveate.core.cache import RaggedLayer, ragged_layers
from foveate.core.errors import BadInput, BadParameter, NothingObserved, NotSupported
from foveate.core.mask import Mask
from foveate.core.policy import best
from foveate.core.ragged import EMPTY, Ragged
from foveate.measure import Entropy
from foveate.testing import tiny
from foveate.testing.checks import annotations_off
from foveate.testing.policies import HideDropped, ids_of, left_padded, padded_ids, run

SMALL = Budget(0.4, sinks=2, recent=3, every=3)


@pytest.fixture
def model():
    return tiny.model("llama")


def generated(model, ids, *policies, padding=None, **options):
    given = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    mask = torch.ones_like(ids) if padding is None else padding
    with foveate.attach(model, *policies) as attached:
        out = model.generate(ids, attention_mask=mask, **given)
    return out, attached


# ---------------------------------------------------------------- generate


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generate_with_the_whole_budget_says_the_same(model, options):
    ids, padding = ids_of(length=30), left_padded(prompt=30)
    ids = ids * padding
    plain = model.generate(
        ids, attention_mask=padding, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None, **options
    )
    out, attached = generated(model, ids, HeavyHitters(1.0), padding=padding, **options)
    assert out.tolist() == plain.tolist()
    assert attached.bytes_held() > 0


def test_beam_search_over_a_compressed_cache_scores_its_beams_right(model):
    ids = ids_of(length=40)
    out, _ = generated(
        model, ids, Streaming(SMALL), num_beams=3, return_dict_in_generate=True, output_scores=True, max_new_tokens=6
    )
    # the best beam fed token by token through the same policy has the probability that beam search says
    found = run(model, out.sequences, Streaming(SMALL), steps=6).logits[:, -7:-1]
    said = found.log_softmax(-1).gather(-1, out.sequences[:, -6:, None]).sum((1, 2))
    torch.testing.assert_close(said / 6, out.sequences_scores, rtol=1e-3, atol=1e-3)


def test_generate_holds_less(model):
    ids = ids_of(length=120)
    _, full = generated(model, ids, Streaming(1.0))
    _, less = generated(model, ids, Streaming(SMALL))
    assert less.bytes_held() < 0.55 * full.bytes_held()


def test_without_a_cache_a_policy_says_so(model):
    with pytest.raises(NothingObserved, match="without a KV cache"), foveate.attach(model, Streaming()):
        model(input_ids=ids_of(), use_cache=False)
    with pytest.raises(NothingObserved, match="no attention call"), foveate.attach(model, Streaming()):
        pass
    with foveate.attach(model, Entropy()) as attached:
        model(input_ids=ids_of())
    with pytest.raises(NothingObserved, match="under a policy"):
        attached.bytes_held()


def test_a_model_called_bare_gets_a_cache(model):
    with torch.no_grad(), foveate.attach(model, Streaming(SMALL)):
        out = model(input_ids=ids_of())
    assert all(isinstance(one, RaggedLayer) for one in out.past_key_values.layers)


def test_two_policies_are_refused(model):
    with pytest.raises(BadInput, match="both say which"), foveate.attach(model, Streaming(), KeyNorm()):
        pass
    with foveate.attach(model, Streaming()):
        with pytest.raises(BadInput, match="both say which"), foveate.attach(model, KeyNorm()):
            pass
        model(input_ids=ids_of())


def test_other_caches_are_refused(model):
    static = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(NotSupported, match="dynamic cache"), foveate.attach(model, Streaming()):
        model(input_ids=ids_of(), past_key_values=static)
    ragged = DynamicCache(config=model.config)
    with foveate.attach(model, Streaming()):
        model(input_ids=ids_of(), past_key_values=ragged)
    with pytest.raises(NotSupported, match="offload"):
        ragged.layers[0].offload()


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "mistral", "gpt_oss", "bart", "whisper"])
@pytest.mark.parametrize("policy", [HeavyHitters, Streaming])
def test_families_generate(family, policy):
    net = tiny.model(family)
    given = tiny.inputs(family, length=24)
    given.pop("decoder_input_ids", None)
    with foveate.attach(net, policy(SMALL)) as attached:
        out = net.generate(**given, max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert out.shape[1] >= 20
    assert attached.bytes_held() > 0


def test_a_bias_per_position_is_refused_where_it_would_be_lost():
    net = tiny.model("t5")
    given = tiny.inputs("t5", length=24)
    given.pop("decoder_input_ids")
    with pytest.raises(NotSupported, match="bias per position"), foveate.attach(net, HeavyHitters(SMALL)):
        net.generate(**given, max_new_tokens=20, eos_token_id=None)
    with foveate.attach(net, Streaming(1.0)):
        whole = net.generate(**given, max_new_tokens=20, eos_token_id=None)
    assert whole.tolist() == net.generate(**given, max_new_tokens=20, eos_token_id=None).tolist()


def test_an_encoder_has_nothing_to_compress():
    net = tiny.model("bert")
    with pytest.raises(NothingObserved, match="without a KV cache"), foveate.attach(net, Streaming()):
        net(**tiny.inputs("bert"))


# ---------------------------------------------------------------- a cache that was there before


@torch.no_grad()
def test_a_filled_cache_is_taken_over(model):
    ids = ids_of()
    want = model(input_ids=ids).logits[:, -1]
    cache = model(input_ids=ids[:, :30], use_cache=True).past_key_values
    with foveate.attach(model, Streaming(1.0)):
        got = model(input_ids=ids[:, 30:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == ids.shape[1]


@torch.no_grad()
def test_a_filled_sliding_cache_is_taken_over():
    net, ids = tiny.model("mistral"), ids_of()
    want = net(input_ids=ids).logits[:, -1]
    cache = net(input_ids=ids[:, :30], use_cache=True).past_key_values
    with foveate.attach(net, Streaming(1.0)):
        got = net(input_ids=ids[:, 30:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["mistral", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("policy", [HeavyHitters(1.0), HeavyHitters(Budget(1.0, every=0)), Quantised(), Whole()])
@torch.no_grad()
def test_what_leaves_a_window_is_freed(family, policy):
    """And nothing but that: the model says what it says with its own cache."""
    net, ids = tiny.model(family), ids_of(length=70)
    own, cache = DynamicCache(config=net.config), DynamicCache(config=net.config)
    calls = [ids[:, :40], *ids[:, 40:60].split(1, 1), ids[:, 60:]]
    want = [net(input_ids=part, past_key_values=own).logits for part in calls]
    with foveate.attach(net, policy, trial=False):
        got = [net(input_ids=part, past_key_values=cache).logits for part in calls]
    if policy != Quantised():
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(ragged_layers(cache), own.layers, strict=True):
        waiting = policy.limits.waiting if isinstance(policy, HeavyHitters) and policy.limits.every else 1
        sinks = policy.limits.sinks if isinstance(policy, HeavyHitters) else 0
        assert 0 <= int(mine.store.length.max()) - theirs.keys.shape[2] <= waiting + sinks


@torch.no_grad()
def test_a_policy_chooses_among_what_is_in_sight():
    """Under a window a budget buys no entry that no later token sees, but for the first ones."""
    net, ids = tiny.model("gemma3", sliding_window=16), ids_of(length=60)
    cache = DynamicCache(config=net.config)
    with foveate.attach(net, HeavyHitters(Budget(0.75, sinks=2, recent=3, every=3)), trial=False):
        for part in (ids[:, :45], *ids[:, 45:].split(1, 1)):
            net(input_ids=part, past_key_values=cache)
            sliding, full = ragged_layers(cache)
            old = (sliding.store.positions() < sliding.seen - 16 - 2).sum(-1)
            assert (old == 2).all()
            # all that is in sight, with those that came since and the first ones
            assert 15 + 2 <= int(sliding.store.length.min()) <= int(sliding.store.length.max()) <= 15 + 2 + 2
        assert 0.7 * 60 < int(full.store.length.min()) <= 0.75 * 60


@torch.no_grad()
def test_tokens_are_taken_back_where_a_window_allows_it():
    net, ids = tiny.model("mistral"), ids_of()
    with foveate.attach(net, Whole(), trial=False):
        want = net(input_ids=ids).logits[:, -1]
        cache = DynamicCache(config=net.config)
        net(input_ids=ids[:, :30], past_key_values=cache)
        with pytest.raises(NotSupported, match=r"4 tokens cannot be taken back: the sliding window of 5 has moved on"):
            cache.crop(-4)
        cache = DynamicCache(config=net.config)
        net(input_ids=ids[:, :25], past_key_values=cache)
        cache.activate_past_recording()
        net(input_ids=ids[:, 25:30], past_key_values=cache)
        cache.crop(-5)
        got = net(input_ids=ids[:, 25:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_compressed_cache_goes_on_in_the_next_turn(model):
    ids = ids_of()
    cache = DynamicCache(config=model.config)
    with foveate.attach(model, KeyNorm(SMALL)):
        model(input_ids=ids[:, :30], past_key_values=cache)
        held = [one.store.positions() for one in ragged_layers(cache)]
    with pytest.raises(NotSupported, match="go on inside"):
        model(input_ids=ids[:, 30:31], past_key_values=cache)
    with foveate.attach(model, Entropy()) as attached:
        got = model(input_ids=ids[:, 30:31], past_key_values=cache).logits
    with foveate.attach(model, HideDropped(([held], [1])), trial=False):
        full = model(input_ids=ids[:, :30], use_cache=True)
    assert attached.results["entropy"].notna().all().all()
    del full
    assert got.isfinite().all()


@torch.no_grad()
def test_metrics_see_original_positions(model):
    ids, kept = ids_of(), []
    policy = KeyNorm(SMALL)
    cache = DynamicCache(config=model.config)
    with foveate.attach(model, policy):
        model(input_ids=ids[:, :30], past_key_values=cache)
        kept.append([one.store.positions() for one in ragged_layers(cache)])
        with foveate.attach(model, Entropy()) as inner:
            model(input_ids=ids[:, 30:31], past_key_values=cache)
    plain = DynamicCache(config=model.config)
    with foveate.attach(model, HideDropped((kept, now := [0])), trial=False):
        model(input_ids=ids[:, :30], past_key_values=plain)
        now[0] = 1
        with foveate.attach(model, Entropy()) as want:
            model(input_ids=ids[:, 30:31], past_key_values=plain)
    torch.testing.assert_close(
        torch.tensor(inner.results["entropy"].to_numpy()),
        torch.tensor(want.results["entropy"].to_numpy()),
        rtol=1e-4,
        atol=1e-5,
    )


@torch.no_grad()
def test_crop_and_rows_of_the_cache(model):
    ids = ids_of(3)
    with foveate.attach(model, Streaming(1.0)):
        cache = model(input_ids=ids[:, :30]).past_key_values
        cache.crop(-6)
        assert cache.get_seq_length() == 24
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([5, 0]))
        got = model(input_ids=ids[[2, 0], 24:], past_key_values=cache).logits[:, -1]
    want = model(input_ids=ids[[2, 0]]).logits[:, -1]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    with foveate.attach(model, Streaming(1.0)):
        cache.reset()
        assert cache.get_seq_length() == 0
        again = model(input_ids=ids[[2, 0]], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(again, want, rtol=1e-4, atol=1e-4)


def test_what_entries_lie_between_is_kept_up_to_date():
    rng = torch.Generator().manual_seed(0)
    k = torch.randn(2, 3, 40, 8, generator=rng)
    keep = torch.rand(2, 3, 40, generator=rng) > 0.5
    # one stretch holds nothing at first
    keep[1, 2] = False
    store, at = Ragged.of_call(k, k, keep, torch.zeros(keep.shape), spare=3), 40
    for new, valid in ((1, None), (1, None), (2, [[1, 1], [0, 1]]), (1, None), (5, None), (1, [[0], [1]]), (1, None)):
        real = None if valid is None else torch.tensor(valid, dtype=torch.bool)
        k = torch.randn(2, 3, new, 8, generator=rng)
        store = store.append(k, k, at, real)
        at += new
        # another object, which counts anew
        assert store.edges == replace(store).edges
        assert store.edges.longest == int(store.length.max())
        assert store.edges.free == int((store.room - store.length).min())
        held = store.positions()[store.held]
        if store.edges.shortest:
            assert (store.edges.earliest, store.edges.latest) == (int(held.min()), int(held.max()))
    assert store.edges.shortest == 11
    none = Ragged.of_call(k, k, torch.zeros(2, 3, 1, dtype=torch.bool), torch.zeros(2, 3, 1)).append(k, k, 7)
    assert (none.edges.earliest, none.edges.latest, none.edges.shortest) == (7, 7, 1)
    thinned = store.select((store.positions() > 41) & store.held)
    assert (thinned.edges.earliest, thinned.edges.latest, thinned.edges.shortest) == (42, at - 1, 9)


@pytest.mark.parametrize("low", [[0, 0], [0, 9], [9, 9], [10, 9], [12, 12]])
@pytest.mark.parametrize("high", [[30, 30], [30, 21], [20, 21], [21, 21]])
def test_rows_see_all_entries_where_none_lies_outside(low, high):
    k = torch.randn(2, 2, 30, 8)
    at = torch.arange(30)
    # of the first text the tokens 10 … 20, of the second 9 … 20
    keep = ((at >= torch.tensor([10, 9])[:, None]) & (at <= 20))[:, None].expand(2, 2, 30)
    store = Ragged.of_call(k, k, keep, torch.zeros(keep.shape))
    low, high = (torch.tensor(x, dtype=torch.int32)[:, None] for x in (low, high))
    mask = Mask(low, high, 30, True, torch.tensor([29]))
    want = all(a <= first and b > 20 for a, first, b in zip(low[:, 0], (10, 9), high[:, 0], strict=True))
    assert store.sees_all(mask) == want
    lo, hi = store.intervals(mask)
    seen = ((at >= low) & (at < high))[:, None] & keep
    assert (hi - lo)[..., 0].tolist() == seen.sum(-1).tolist()


def test_keys_that_two_layers_share_are_known_again_beside_branches(model, monkeypatch):
    look_back, known = Attached.look_back, []

    def again(self, cache, view, key, value, mask):
        out = look_back(self, cache, view, key, value, mask)
        # what a layer asks that reads the keys of the one before
        known.append(self.cache_of(key) is cache)
        return out

    monkeypatch.setattr(Attached, "look_back", again)
    branch(model, ids_of(1), [(Streaming(SMALL),), (HeavyHitters(SMALL),)])
    assert known == [True, True]


@torch.no_grad()
def test_out_of_memory_while_dropping_leaves_a_whole_cache(model, monkeypatch):
    ids = ids_of(1)
    cache = DynamicCache(config=model.config)
    made = Ragged.of_call.__func__
    calls = [0]

    def breaks(cls, *args, **kwargs):
        calls[0] += 1
        if calls[0] == 2:
            raise MemoryError("no room")
        return made(cls, *args, **kwargs)

    monkeypatch.setattr(Ragged, "of_call", classmethod(breaks))
    with foveate.attach(model, Streaming(SMALL)), pytest.raises(MemoryError):
        model(input_ids=ids[:, :30], past_key_values=cache)
    first, second = ragged_layers(cache)
    assert int(first.store.length[0, 0]) == 10
    # the second layer still has what came with the call, and stores it when it is asked again
    second.settle()
    assert int(second.store.length[0, 0]) == int(second.real[0]) == 30


def test_gradients_reach_the_prompt_and_not_the_cache(model):
    ids = ids_of(1)
    with foveate.attach(model, Streaming(SMALL)):
        out = model(input_ids=ids)
        out.logits[:, -1].sum().backward()
        held = out.past_key_values.layers[0].store
        assert not held.keys.requires_grad
    assert model.model.embed_tokens.weight.grad is not None


@torch.no_grad()
def test_keys_changed_on_the_way_are_noticed(model, monkeypatch):
    update = RaggedLayer.update
    monkeypatch.setattr(RaggedLayer, "update", lambda self, k, v, *a: tuple(t.clone() for t in update(self, k, v)))
    with pytest.raises(NotSupported, match="changes its keys"), foveate.attach(model, Streaming()):
        model(input_ids=ids_of())


# ---------------------------------------------------------------- budgets


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (0, "share"),
        (0.0, "above 0"),
        (1.5, "at most 1.0"),
        (-0.1, "above 0"),
        (1, "write 1.0"),
        (True, "share"),
        (10, "below the 4 sinks"),
        ("much", "200MB"),
        ("0MB", "200MB"),
        (None, "share"),
    ],
)
def test_bad_budgets(given, says):
    with annotations_off(), pytest.raises(BadParameter, match=says):
        HeavyHitters(given)


@pytest.mark.parametrize(
    "changed",
    [
        {"layers": "round"},
        {"heads": "some"},
        {"heads": ((0, 1),)},
        {"heads": ((0, 1, 2.0),)},
        {"sinks": -1},
        {"every": 1.5},
    ],
)
def test_bad_words_of_a_budget(changed):
    with annotations_off(), pytest.raises(BadParameter):
        Budget(0.5, **changed)


def test_bytes_are_read():
    assert [in_bytes(t) for t in ("200MB", "1.5GB", "800kB", "64", "3m")] == [200e6, 1.5e9, 8e5, 64, 3e6]


@torch.no_grad()
def test_a_budget_in_bytes_is_kept(model):
    ids = ids_of(2, 200)
    with foveate.attach(model, Streaming(Budget("40kB", every=4))) as attached:
        model(input_ids=ids)
    # every entry has 8 + 8 numbers of 4 bytes, its position and its score
    assert 30_000 < attached.bytes_held() <= 42_000


def counts(budget, seen, layer=0, layers=4, heads=2):
    return budget.counts(torch.tensor(seen), layer, layers, heads, 72).tolist()


def test_counts():
    assert counts(Budget(0.25), [1000, 400]) == [[250, 250], [100, 100]]
    assert counts(Budget(100), [1000, 60]) == [[100, 100], [60, 60]]
    # what is pinned stays, of a short text all of it
    assert counts(Budget(0.1), [100, 20]) == [[51, 51], [20, 20]]
    plan = Budget(0.1, sinks=0, recent=1, every=0, heads=((0, 1, 1.0), (3, 0, 50)))
    assert counts(plan, [1000]) == [[100, 1000]]
    assert counts(plan, [1000], layer=3) == [[50, 100]]


def test_a_pyramid_keeps_the_same_in_all():
    for keep in (0.1, 0.3, 0.7, 0.95):
        budget = Budget(keep, sinks=0, recent=1, every=0, layers="pyramid")
        per_layer = [counts(budget, [10_000], n, 30)[0][0] for n in range(30)]
        assert per_layer == sorted(per_layer, reverse=True)
        assert max(per_layer) <= 10_000
        assert abs(sum(per_layer) / 30 - keep * 10_000) < 2


def test_heads_compete_for_what_a_layer_keeps():
    budget = Budget(0.5, heads="layer")
    score = torch.zeros(1, 2, 10)
    score[0, 0] = torch.arange(10) + 100.0
    even = torch.tensor([[5, 5]])
    # the second head has nothing to offer and keeps its fifth
    assert budget.compete(score, even).tolist() == [[9, 1]]
    assert budget.compete(score.flip(1), even).tolist() == [[1, 9]]
    none = score.masked_fill(torch.arange(10) > 3, -torch.inf)
    assert budget.compete(none, even).tolist() == [[4, 4]]


@torch.no_grad()
def test_heads_of_all_layers_compete(model):
    ids = ids_of(2)
    budget = Budget(0.4, sinks=2, recent=3, every=3, heads="model")
    seen = []
    run(model, ids, KeyNorm(budget), after=lambda layers: seen.append(sum(one.store.length.sum(1) for one in layers)))
    for n, held in enumerate(seen):
        assert (held <= 4 * int(0.4 * (41 + n) + 1e-9)).all(), (n, held)
    lengths = run(model, ids, KeyNorm(budget)).lengths[-1]
    assert lengths[0].tolist() != lengths[1].tolist()


def test_best_takes_the_later_of_two_equals():
    keep = best(torch.tensor([[[1.0, 5.0, 1.0, -torch.inf]]]), torch.tensor([[2]]))
    assert keep.tolist() == [[[False, True, True, False]]]
    assert best(torch.full((1, 1, 3), -torch.inf), torch.tensor([[2]])).sum() == 0


def test_a_plan_is_meant_as_it_stands_in_a_pyramid():
    budget = Budget(0.1, layers="pyramid", heads=((3, 0, 1.0), (3, 1, 80)))
    counts = budget.counts(torch.tensor([1000]), 3, 4, 3, 8)
    assert counts[0, :2].tolist() == [1000, 80]
    assert counts[0, 2] < 100


# ---------------------------------------------------------------- policies: what they keep, by hand


@torch.no_grad()
def held_after(model, ids, policy):
    with foveate.attach(model, policy):
        out = model(input_ids=ids)
    return out.past_key_values.layers[0].store.positions()[0]


def test_streaming_keeps_both_ends(model):
    at = held_after(model, ids_of(1, 40), Streaming(Budget(0.5, sinks=3, recent=1, every=0)))
    assert at.tolist() == [[0, 1, 2, *range(23, 40)]] * 2


def test_key_norm_keeps_short_keys(model):
    policy = KeyNorm(Budget(0.25, sinks=0, recent=1, every=0))
    full = held_after(model, ids_of(1, 40), KeyNorm(1.0))
    assert full.tolist() == [list(range(40))] * 2
    with torch.no_grad(), foveate.attach(model, KeyNorm(1.0)):
        norms = model(input_ids=ids_of(1, 40)).past_key_values.layers[0].store
    norms = norms.spread(norms.keys).norm(dim=-1)[0]
    for head, at in enumerate(held_after(model, ids_of(1, 40), policy).tolist()):
        others = norms[head][:39].argsort()[:9].tolist()
        assert sorted(at) == sorted([*others, 39])


@torch.no_grad()
def test_scores_are_the_real_weights():
    """What a policy scores by equals the weights that the model itself computes, in families that scale and cap."""
    for family in ("gemma2", "granite", "olmo2", "cohere", "smollm3", "qwen3", "gpt_oss"):
        net, ids = tiny.model(family, attention="eager"), ids_of(1, 24)
        want = net(input_ids=ids, output_attentions=True).attentions[0]
        mass = want[0].sum(1).unflatten(0, (2, -1)).sum(1)
        with foveate.attach(net, HeavyHitters(Budget(0.9, sinks=0, recent=1, every=0), recent=0.0)):
            store = net(input_ids=ids).past_key_values.layers[0].store
        for head, at in enumerate(store.positions()[0]):
            there = at[at != EMPTY].long()
            got = store.spread(store.score)[0, head][: len(there)]
            torch.testing.assert_close(got, mass[head][there], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_heavy_hitters_add_up_over_decoding(model):
    ids = ids_of(1, 30)
    budget = Budget(200, sinks=0, recent=1, every=4)
    stepwise = run(model, ids, HeavyHitters(budget, recent=0.0), steps=12).layers[0].store
    assert stepwise.longest == 30
    eager = tiny.model("llama", attention="eager")
    mass = eager(input_ids=ids, output_attentions=True).attentions[0][0].sum(1).unflatten(0, (2, -1)).sum(1)
    at = stepwise.positions()[0].long()
    for head in range(2):
        torch.testing.assert_close(stepwise.spread(stepwise.score)[0, head], mass[head][at[head]], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_right_padding_does_not_vote(model):
    ids = ids_of(2, 24)
    mask = torch.ones_like(ids)
    mask[1, 16:] = 0
    for policy in (ObservationWindow(SMALL, window=4, kernel=1), LastToken(SMALL), HeavyHitters(SMALL)):
        with foveate.attach(model, policy):
            both = model(input_ids=ids * mask, attention_mask=mask).past_key_values.layers[0].store.positions()[1]
            alone = model(input_ids=ids[1:, :16]).past_key_values.layers[0].store.positions()[0]
        assert [[p for p in h if p != EMPTY] for h in both.tolist()] == alone.tolist(), policy


def test_padding_is_not_stored(model):
    ids, padding = ids_of(length=30), left_padded(prompt=30)
    with torch.no_grad(), foveate.attach(model, Streaming(1.0)):
        cache = model(input_ids=padded_ids(ids, padding), attention_mask=padding).past_key_values
    assert cache.layers[0].store.length.tolist() == [[30, 30], [19, 19]]
