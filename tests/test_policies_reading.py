"""Policies that choose what a decoded token reads: their choices by hand, and what they remember between two tokens."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.compress import KeyNorm, Pages, Recycled, SelectionLayers
from foveate.core.budget import Budget
from foveate.core.cache import RaggedLayer
from foveate.core.errors import BadInput, NotSupported
from foveate.core.mask import Mask
from foveate.core.policy import Reading
from foveate.core.ragged import Ragged
from foveate.core.rows import View
from foveate.testing import tiny
from foveate.testing.policies import (
    PROMPT,
    STEPS,
    Witness,
    ids_of,
    left_padded,
    padded_ids,
    run,
)

SMALL = Budget(0.4, sinks=2, recent=3, every=3)
DIM = 8


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(k, keep=None):
    """A layer of a cache that holds these keys, or some of them."""
    keep = torch.ones(k.shape[:3], dtype=torch.bool) if keep is None else keep
    made = RaggedLayer()
    made.store = Ragged.of_call(k, k.clone(), keep, torch.zeros(keep.shape))
    made.seen, made.real = k.shape[2], torch.full((len(k),), k.shape[2])
    return made


def reading_of(q, layers, at, room, budget, window=None):
    """The newest token of a layer, which sees all, or a window."""
    seen, (batch, kv_heads) = layers[at].seen, layers[at].store.start.shape
    low = 0 if window is None else seen - window
    mask = Mask(torch.tensor([[low]]), torch.tensor([[seen]]), seen, True, torch.tensor([seen - 1]))
    new = torch.zeros(batch, kv_heads, 1, DIM)
    view = View(q, new, new, Mask.full(1, 1), scale=1.0)
    return Reading(view, mask, layers, at, torch.full((batch, kv_heads), room), budget)


def heads(only):
    """What each head reads, in order."""
    return [[sorted(n for n in head if n >= 0) for head in row] for row in only.tolist()]


def grow(layer, k):
    layer.store = layer.store.append(k, k.clone(), layer.seen)
    layer.seen += k.shape[2]
    layer.real = layer.real + k.shape[2]


# ---------------------------------------------------------------- pages


def test_the_bound_of_a_page_by_hand():
    budget = Budget(6, sinks=0, recent=1, every=0)
    k = torch.zeros(1, 1, 13, DIM)
    # page 1 has the two halves of a match in different keys, page 2 one key that matches a little
    k[0, 0, 3, 0], k[0, 0, 5, 1], k[0, 0, 7, 0] = 1.0, -1.0, 1.5
    q = torch.zeros(1, 1, 1, DIM)
    q[..., 0], q[..., 1] = 1.0, -1.0
    policy = Pages(budget, page=3, first=0)
    # u_1 = 1 + 1, u_2 = 1.5; the key itself is entry 12, and two entries of page 2 fit besides
    only = policy.read(reading_of(q, [layer_of(k)], 0, 6, budget))
    assert only.tolist() == [[[12, 3, 4, 5, 6, 7]]]
    # with the other sign of the second element the smallest keys of no page help
    q[..., 1] = 0.0
    assert policy.read(reading_of(q, [layer_of(k)], 0, 4, budget)).tolist() == [[[12, 6, 7, 8]]]


def test_query_heads_that_share_a_key_are_each_heard():
    budget = Budget(9, sinks=0, recent=1, every=0)
    k = torch.zeros(1, 1, 17, DIM)
    k[0, 0, 5, 0] = k[0, 0, 10, 1] = 1.0
    q = torch.zeros(1, 2, 1, DIM)
    q[0, 0, 0, 0], q[0, 1, 0, 1] = 1.0, 1.0
    only = Pages(budget, page=4, first=0).read(reading_of(q, [layer_of(k)], 0, 9, budget))
    assert heads(only) == [[[4, 5, 6, 7, 8, 9, 10, 11, 16]]]


def test_corners_grow_with_the_last_page_and_far_keys_are_not_touched_again():
    budget, policy = (
        Budget(9, sinks=1, recent=2, every=0),
        Pages(Budget(9, sinks=1, recent=2, every=0), page=4, first=0),
    )
    k = drawn(2, 2, 40, DIM)
    keep = torch.ones(2, 2, 18, dtype=torch.bool)
    # rows and heads of lengths 18, 15 and 13: a padded row, and entries dropped by another policy
    keep[1, :, :3], keep[1, 1, 5:7] = False, False
    layer = layer_of(k[:, :, :18], keep)
    for n in range(18, 40):
        q = drawn(2, 4, 1, DIM, seed=n)
        policy.read(reading_of(q, [layer], 0, 9, budget))
        if n == 20:
            # whatever stands in pages that were full is not looked at again
            for b in range(2):
                for h in range(2):
                    at = int(layer.store.start[b, h])
                    layer.store.keys[at : at + 12] = torch.nan
        length = layer.store.length
        for b in range(2):
            for h in range(2):
                entries = k[b, h, :n][torch.cat([keep[b, h], torch.ones(n - 18, dtype=torch.bool)])]
                assert len(entries) == length[b, h]
                want = [torch.cat([p.amax(0), p.amin(0)]) for p in entries.split(4)]
                torch.testing.assert_close(layer.state["corners"][b, h, : len(want)], torch.stack(want))
        grow(layer, k[:, :, n : n + 1])


@pytest.mark.parametrize("window", [None, 5, 17, 30])
@pytest.mark.parametrize("room", [7, 12, 29])
@pytest.mark.parametrize("page", [1, 3, 16, 64])
def test_pages_fill_the_room_and_hold_what_is_pinned(window, room, page):
    budget = Budget(room, sinks=3, recent=4, every=0)
    keep = torch.ones(2, 2, 41, dtype=torch.bool)
    keep[1, :, :11], keep[1, 1, 14:36] = False, False
    layer = layer_of(drawn(2, 2, 41, DIM), keep)
    only = Pages(budget, page=page, first=0).read(reading_of(drawn(2, 4, 1, DIM), [layer], 0, room, budget, window))
    at = layer.store.positions()
    for b in range(2):
        for h, got in enumerate(heads(only)[b]):
            low = 0 if window is None else 41 - window
            seen = [n for n, p in enumerate(at[b, h].tolist()) if low <= p < 41]
            length = int(layer.store.length[b, h])
            assert len(set(got)) == len(got) == min(room, len(seen))
            assert set(got) <= set(seen)
            assert {n for n in (*range(3), *range(length - 4, length)) if n in seen} <= set(got)
    # -1 stands behind the last
    assert bool(((only[..., 1:] < 0) | (only[..., :-1] >= 0)).all())


def test_the_first_layers_read_everything():
    seen: list = []
    run(tiny.model("llama", num_hidden_layers=4), ids_of(1), Witness(Pages(SMALL, page=4), seen, SMALL))
    assert {(layer, at is None) for layer, at, _ in seen} == {(0, True), (1, True), (2, False), (3, False)}


# ---------------------------------------------------------------- recycled


def pointed(*entries):
    """A query per row that looks at one entry of a cache whose keys are the rows of an identity."""
    q = torch.zeros(len(entries), 1, 1, DIM)
    for row, entry in enumerate(entries):
        q[row, 0, 0, entry] = 5.0
    return q


def identity_layer(batch=1, length=DIM):
    return layer_of(torch.eye(DIM)[:length].expand(batch, 1, length, DIM).clone())


def test_a_full_step_every_stride_tokens():
    seen: list = []
    run(tiny.model("llama"), ids_of(1), Witness(Recycled(SMALL, stride=4), seen, SMALL))
    assert [at is None for layer, at, _ in seen if layer == 1] == [n % 4 == 0 for n in range(STEPS)]
    every: list = []
    run(tiny.model("llama"), ids_of(1), Witness(Recycled(SMALL, stride=1), every, SMALL))
    assert all(at is None for _, at, _ in every)


def test_new_tokens_take_the_place_of_the_least():
    budget = Budget(4, sinks=1, recent=1, every=0)
    policy, layer = Recycled(budget), identity_layer()
    q = pointed(3) + 0.8 * pointed(5)
    assert policy.read(reading_of(q, [layer], 0, 4, budget)) is None
    grow(layer, torch.zeros(1, 1, 1, DIM))
    assert policy.read(reading_of(q, [layer], 0, 4, budget)).tolist()[0][0] in ([8, 0, 7, 3], [8, 7, 0, 3])
    grow(layer, torch.zeros(1, 1, 1, DIM))
    assert heads(policy.read(reading_of(q, [layer], 0, 4, budget))) == [[[0, 7, 8, 9]]]
    # no room is left for the tokens since beside what is pinned
    grow(layer, torch.zeros(1, 1, 1, DIM))
    assert policy.read(reading_of(q, [layer], 0, 4, budget)) is None


def test_the_largest_weight_of_the_heads_that_share_a_key_counts():
    budget = Budget(3, sinks=0, recent=1, every=0)
    # one head looks at 2 most and one at 3, both a little less at 5, whose mean weight is the largest
    q = torch.cat([pointed(2), 0.98 * pointed(3)], 1) + 0.92 * pointed(5)
    layers = [identity_layer(), identity_layer()]
    assert Recycled(budget).read(reading_of(q, layers, 0, 3, budget)) is None
    assert sorted(layers[0].state["best"][0, 0].tolist()) == [2, 3, 7]
    layers, policy = [identity_layer(), identity_layer()], SelectionLayers(budget, first=0, again=())
    assert policy.read(reading_of(q, layers, 0, 3, budget)) is None
    assert heads(policy.read(reading_of(q, layers, 1, 3, budget))) == [[[2, 3, 7]]]


def test_a_row_takes_a_full_step_alone_when_its_query_turns():
    budget = Budget(4, sinks=1, recent=1, every=0)
    policy, layer = Recycled(budget, similarity=0.5, check=1), identity_layer(2)
    assert policy.read(reading_of(pointed(2, 3), [layer], 0, 4, budget)) is None
    before = {name: t.clone() for name, t in layer.state.items()}
    grow(layer, torch.zeros(2, 1, 1, DIM))
    got = heads(policy.read(reading_of(pointed(2, 5), [layer], 0, 4, budget)))
    assert got[0] == [[0, 2, 7, 8]]
    assert got[1] == [list(range(9))]
    for name in ("best", "length", "query"):
        assert bool((layer.state[name][0] == before[name][0]).all()), name
    assert 5 in layer.state["best"][1, 0]
    assert layer.state["since"].tolist() == [1, 0]


def test_queries_are_compared_now_and_then():
    budget = Budget(5, sinks=1, recent=1, every=0)
    policy, layer, full = Recycled(budget, similarity=0.5, check=2), identity_layer(), []
    for entry in (2, 3, 3, 3, 4):
        full.append(policy.read(reading_of(pointed(entry), [layer], 0, 5, budget)) is None)
        grow(layer, torch.zeros(1, 1, 1, DIM))
    # the second token turns and is not asked; the fourth is near to the third; the fifth is asked
    assert full == [True, False, True, False, True]


def test_a_row_that_read_all_for_want_of_entries_remembers_nothing():
    budget = Budget(8, sinks=1, recent=1, every=0)
    policy = Recycled(budget)
    keep = torch.ones(2, 1, 9, dtype=torch.bool)
    keep[1, :, :2] = False
    both, alone = layer_of(drawn(2, 1, 9, DIM), keep), layer_of(drawn(2, 1, 9, DIM)[1:], keep[1:])
    for n in range(6):
        q, k = drawn(2, 1, 1, DIM, seed=n), drawn(2, 1, 1, DIM, seed=10 + n)
        got = policy.read(reading_of(q, [both], 0, 8, budget))
        want = policy.read(reading_of(q[1:], [alone], 0, 8, budget))
        length = int(both.store.length[1, 0])
        everything = [list(range(length))]
        assert (everything if got is None else heads(got)[1]) == (everything if want is None else heads(want)[0]), n
        grow(both, k)
        grow(alone, k[1:])


def test_a_row_takes_a_full_step_beside_one_that_does_not():
    model, padding, seen = tiny.model("llama"), left_padded(), []
    given = padded_ids(ids_of(), padding)
    run(model, given, Witness(Recycled(SMALL, similarity=0.6, check=1), seen, SMALL), padding, (23,))
    # more than the budget gives is read in a full step only
    over = [(room > 25).any(1).tolist() for _, at, room in seen if at is not None]
    assert [True, False] in over or [False, True] in over


# ---------------------------------------------------------------- selection layers


@torch.no_grad()
def test_layers_read_where_the_selection_layer_below_looks():
    net, ids, seen = tiny.model("llama", num_hidden_layers=6), ids_of(1), []
    budget = Budget(12, sinks=1, recent=2, every=0)
    policy = SelectionLayers(budget, first=1, again=(0.5,))
    with foveate.attach(net, Witness(policy, seen, budget)):
        cache = net(input_ids=ids[:, :PROMPT]).past_key_values
        net(input_ids=ids[:, PROMPT : PROMPT + 1], past_key_values=cache)
    assert [at is None for _, at, _ in seen] == [True, True, False, True, False, False]
    assert not any(layer.state for layer in cache.layers)
    # up to its first layer that reads less the model is the plain one
    eager = tiny.model("llama", num_hidden_layers=6, attention="eager")
    weights = eager(input_ids=ids[:, : PROMPT + 1], output_attentions=True).attentions[1][0, :, -1]
    most = weights.unflatten(0, (2, -1)).amax(1)
    most[:, 0], most[:, -2:] = 2.0, 2.0
    want = most.topk(12, -1).indices.sort(-1).values
    assert seen[2][1][0].sort(-1).values.tolist() == want.tolist()
    assert seen[4][1].tolist() == seen[5][1].tolist() != seen[2][1].tolist()


def test_positions_are_found_where_layers_hold_other_entries():
    budget = Budget(4, sinks=1, recent=1, every=0)
    k = torch.eye(DIM).expand(1, 1, DIM, DIM).clone()
    keep = torch.ones(1, 1, DIM, dtype=torch.bool)
    keep[..., 3] = keep[..., 4] = False
    layers = [layer_of(k), layer_of(k, keep)]
    policy = SelectionLayers(budget, first=0, again=())
    q = pointed(5) + 0.9 * pointed(3)
    assert policy.read(reading_of(q, layers, 0, 4, budget)) is None
    only = policy.read(reading_of(q, layers, 1, 4, budget))
    # layer 0 chose 0, 7, 5 and 3; 3 is not held here, and 5 is entry 3
    assert heads(only) == [[[0, 3, 5]]]


@pytest.mark.parametrize("holes", [False, True])
def test_a_layer_with_less_room_reads_the_best(holes):
    budget = Budget(4, sinks=0, recent=1, every=0)
    k = torch.eye(DIM).expand(2, 1, DIM, DIM).clone()
    keep = torch.ones(2, 1, DIM, dtype=torch.bool)
    keep[..., 4] = not holes
    layers, policy = [layer_of(k), layer_of(k, keep)], SelectionLayers(budget, first=0, again=())
    q = (pointed(5) + 0.9 * pointed(3) + 0.8 * pointed(2)).expand(2, -1, -1, -1)
    policy.read(reading_of(q, layers, 0, 4, budget))
    reading = reading_of(q, layers, 1, 4, budget)
    reading.room = torch.tensor([[2], [3]])
    read = reading.position.gather(-1, (only := policy.read(reading)).clamp_min(0)).masked_fill(only < 0, -1)
    assert read.tolist() == [[[7, 5, -1]], [[7, 5, 3]]]


def test_layers_with_a_window_stand_aside():
    net, seen = tiny.model("gemma2", num_hidden_layers=6), []
    run(net, ids_of(1), Witness(SelectionLayers(SMALL, first=0, again=()), seen, SMALL))
    # every other layer has a window; of those that see all the first chooses
    assert [at is None for _, at, _ in seen[-6:]] == [True, True, True, False, True, False]
    seen.clear()
    run(
        tiny.model("mistral", num_hidden_layers=3, sliding_window=30),
        ids_of(1),
        Witness(SelectionLayers(SMALL, first=0, again=()), seen, SMALL),
    )
    assert [at is None for _, at, _ in seen[-3:]] == [True, False, False]


def test_other_numbers_of_heads_are_refused():
    budget = Budget(4, sinks=1, recent=1, every=0)
    layers = [layer_of(drawn(1, 2, 9, DIM)), layer_of(drawn(1, 1, 9, DIM))]
    policy = SelectionLayers(budget, first=0, again=())
    policy.read(reading_of(drawn(1, 2, 1, DIM), layers, 0, 4, budget))
    with pytest.raises(NotSupported, match="1 KV heads and the layer that chose for it 2"):
        policy.read(reading_of(drawn(1, 1, 1, DIM), layers, 1, 4, budget))


# ---------------------------------------------------------------- all of them


ALL = (
    Pages(SMALL, page=4, first=0),
    Recycled(SMALL, stride=3, similarity=0.6, check=1),
    SelectionLayers(SMALL, first=0, again=()),
)


@pytest.mark.parametrize("policy", ALL, ids=lambda policy: policy.name)
def test_beams_carry_the_state_with_them(policy):
    model, ids = tiny.model("llama"), ids_of(1, 40)
    given = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "num_beams": 3}
    with foveate.attach(model, policy):
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, output_scores=True, **given
        )
    # the best beam fed token by token has the probability that beam search says
    found = run(model, out.sequences, policy, steps=7).logits[:, -8:-1]
    said = found.log_softmax(-1).gather(-1, out.sequences[:, -7:, None]).sum((1, 2))
    torch.testing.assert_close(said / 7, out.sequences_scores, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("policy", ALL, ids=lambda policy: policy.name)
def test_beside_a_policy_that_drops_entries(policy):
    model, ids, padding, cut = tiny.model("llama"), ids_of(), left_padded(), 11
    drops = KeyNorm(Budget(0.7, sinks=2, recent=3, every=4))

    def said(ids, mask):
        with torch.no_grad(), foveate.attach(model, drops, policy):
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=9,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
                return_dict_in_generate=True,
                output_logits=True,
            )
        return torch.stack(out.logits, 1)

    both = said(padded_ids(ids, padding)[:, :PROMPT], padding)
    alone = said(ids[1:, cut:PROMPT], padding[1:, cut:])
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)


def test_two_that_read_are_refused():
    with (
        pytest.raises(BadInput, match="both say which entries are read"),
        foveate.attach(tiny.model("llama"), Pages(), Recycled()),
    ):
        pass
