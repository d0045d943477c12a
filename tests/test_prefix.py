"""Prompts that are read and held once: the same answers as `model.generate`, row by row, and less memory."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import json
import weakref

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicCache

import foveate
from commands import here
from foveate.compress import PartRemoval, SharedPrefix, Streaming
from foveate.core import native, prefix
from foveate.core.attach import ACTIVE
from foveate.core.errors import BadInput, NothingObserved, NotOnInterface, NotSupported
from foveate.core.mask import Mask
from foveate.core.merging import merge
from foveate.core.prefix import Layout
from foveate.core.rows import View
from foveate.core.rows import attend as attend_rows
from foveate.measure import DuplicateToken, Entropy, LocalMass
from foveate.steer import HeadScale
from foveate.testing import tiny
from foveate.testing.checks.acting import standing

PROMPT = list(range(10, 33))
ENDS = [[40, 41, 42, 43, 44], [50], [60, 61, 62, 63, 64, 65, 66, 67, 68], []]
GREEDY = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
LOGITS = {"output_logits": True, "return_dict_in_generate": True}


@pytest.fixture
def model():
    return tiny.model("llama")


def alone(net, ids, **options):
    """What the model itself gives for one text."""
    ids = torch.tensor([ids])
    return net.generate(ids, attention_mask=torch.ones_like(ids), **{**GREEDY, **options})


def together(net, texts, **options):
    """What the model itself gives for texts padded on the left."""
    width = max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(t)) + t for t in texts])
    mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in texts])
    return net.generate(ids, attention_mask=mask, **{**GREEDY, **options})


def same_rows(net, got, texts, given):
    """Tokens and logits of each row are those of its text alone."""
    for row, text in enumerate(texts):
        want = alone(net, text, **LOGITS)
        assert got.sequences[row, given:].tolist() == want.sequences[0, len(text) :].tolist(), row
        for a, b in zip(got.logits, want.logits, strict=True):
            torch.testing.assert_close(a[row], b[0], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- merging


def split(view, *ends):
    """Attention over stretches of keys, each by itself."""
    parts = []
    for a, b in itertools.pairwise((0, *ends, view.keys)):
        low, high = (x.clamp(a, b) - a for x in (view.mask.low, view.mask.high))
        part = View(view.q, view.k[:, :, a:b], view.v[:, :, a:b], Mask(low, high, b - a, False, view.mask.position))
        parts.append(dense(part))
    return parts


def dense(view):
    s = view.q @ view.k.repeat_interleave(view.grouped, 1).transpose(-1, -2) * view.scale
    s = s + view.mask.additive(torch.arange(view.queries), 0, view.keys)
    empty = (s == -torch.inf).all(-1)
    s = s.masked_fill(empty[..., None], 0.0)
    p = s.softmax(-1).masked_fill(empty[..., None], 0.0)
    return p @ view.v.repeat_interleave(view.grouped, 1), s.logsumexp(-1).masked_fill(empty, -torch.inf)


def some_view(keys=31, queries=9, batch=2, **more):
    rng = torch.Generator().manual_seed(keys)
    made = [torch.randn(batch, h, n, 8, generator=rng) for h, n in ((4, queries), (2, keys), (2, keys))]
    return View(*made, Mask.causal_of(queries, keys, window=12), **more)


@pytest.mark.parametrize("ends", [(7,), (1, 2, 30), (5, 5, 12), (0, 31), tuple(range(31))])
def test_merging_any_split_gives_the_whole(ends):
    view = some_view()
    out, lse = merge(split(view, *ends))
    want = dense(view)
    torch.testing.assert_close(out, want[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, want[1], rtol=1e-5, atol=1e-6)


def test_merging_is_associative_and_commutative():
    a, b, c = split(some_view(), 10, 20)
    for parts in ([merge([a, b]), c], [a, merge([b, c])], [merge([c, a]), b]):
        for x, y in zip(merge(parts), merge([a, b, c]), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_parts_that_see_nothing_add_nothing():
    (out, lse), nothing = dense(some_view()), torch.full((2, 4, 9), -torch.inf)
    poison = torch.full_like(out, torch.nan)
    for parts in ([(out, lse), (poison, nothing)], [(poison, nothing), (out, lse)]):
        for x, y in zip(merge(parts), (out, lse), strict=True):
            torch.testing.assert_close(x, y)
    both = merge([(poison, nothing), (poison, nothing)])
    assert torch.equal(both[0], torch.zeros_like(out))
    assert torch.equal(both[1], nothing)


def test_merging_large_log_sum_exps_does_not_overflow():
    out, lse = dense(some_view())
    merged = merge([(out, lse + 500), (out, lse + 400)])
    torch.testing.assert_close(merged[0], out)
    torch.testing.assert_close(merged[1], lse + 500)


def test_gradients_go_through_a_merge():
    view = some_view()
    leaves = [t.double().requires_grad_() for t in (view.q, view.k, view.v)]
    mask = Mask(view.mask.low, view.mask.high, 31, False, view.mask.position)

    def whole(q, k, v):
        return dense(View(q, k, v, mask))

    def parts(q, k, v):
        # the first stretch has rows that see nothing of it
        return merge(split(View(q, k, v, mask), 3, 20))

    grads = []
    for way in (whole, parts):
        out, lse = way(*leaves)
        grads.append(torch.autograd.grad((out.square().sum() + lse.sin().sum()), leaves))
    for a, b in zip(*grads, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b)


def test_parts_of_different_shapes_are_refused():
    out, lse = dense(some_view())
    for parts in ([], [(out, lse), (out[:, :, :4], lse[:, :, :4])], [(out, lse[:, :, :4])]):
        with pytest.raises(BadInput, match="one shape"):
            merge(parts)


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("family", tiny.models("decoder"))
def test_each_row_says_what_it_says_alone(family):
    net = tiny.model(family)
    with foveate.share_prefix(net, PROMPT) as shared:
        out = shared.generate(ENDS, **GREEDY, **LOGITS)
        given = shared.given
    same_rows(net, out, [PROMPT + end for end in ENDS], given)


@pytest.mark.parametrize("ends", [[[]], [[], [], []], [[40]], [[40, 41], [42, 43]], [[], list(range(40, 80))]])
@pytest.mark.parametrize("prompt", [[9], PROMPT])
def test_any_suffixes(model, prompt, ends):
    with foveate.share_prefix(model, prompt) as shared:
        out = shared.generate(ends, **GREEDY, **LOGITS)
        same_rows(model, out, [prompt + end for end in ends], shared.given)


def test_ids_in_any_form(model):
    forms = [PROMPT, torch.tensor(PROMPT), torch.tensor([PROMPT]), [PROMPT], torch.tensor(PROMPT).numpy()]
    ends = [
        [[40, 41], [42, 43]],
        torch.tensor([[40, 41], [42, 43]]),
        [torch.tensor([40, 41]), torch.tensor([[42, 43]])],
    ]
    outs = []
    for form, end in itertools.product(forms, ends):
        with foveate.share_prefix(model, form) as shared:
            outs.append(shared.generate(end, **GREEDY).tolist())
    assert all(out == outs[0] for out in outs)


def test_the_result_is_that_of_a_batch_padded_on_the_left(model):
    with foveate.share_prefix(model, PROMPT) as shared:
        out = shared.generate(ENDS, **GREEDY)
    assert out.tolist() == together(model, [PROMPT + end for end in ENDS]).tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"num_return_sequences": 3, "do_sample": True, "temperature": 1.5},
        {"do_sample": True, "top_k": 9},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"num_beams": 4, "do_sample": True},
        {"repetition_penalty": 1.5},
        {"max_new_tokens": 40},
        {"prefill_chunk_size": 3},
    ],
)
def test_options_of_generate(model, options):
    texts = [PROMPT + end for end in ENDS]
    torch.manual_seed(3)
    want = together(model, texts, **options)
    torch.manual_seed(3)
    with foveate.share_prefix(model, PROMPT) as shared:
        # the seed is the caller's: reading the prompt draws nothing
        out = shared.generate(ENDS, **{**GREEDY, **options})
    assert out.tolist() == want.tolist()


def test_rows_stop_at_their_own_end(model):
    texts = [PROMPT + end for end in ENDS]
    plain = [alone(model, text)[0, len(text) :].tolist() for text in texts]
    stop = plain[0][2]
    with foveate.share_prefix(model, PROMPT) as shared:
        out = shared.generate(ENDS, **{**GREEDY, "eos_token_id": stop})[:, shared.given :]
    for row, want in zip(out.tolist(), plain, strict=True):
        ended = want[: want.index(stop) + 1] if stop in want else want
        assert row == ended + [0] * (len(row) - len(ended))
    assert plain[1] != plain[0], "rows end at different places"


def test_a_prompt_serves_many_calls(model):
    with foveate.share_prefix(model, PROMPT) as shared:
        for end in (*ENDS, *ENDS):
            assert shared.generate([end], **GREEDY)[0].tolist() == alone(model, PROMPT + end)[0].tolist()


def test_a_window_that_reaches_into_the_prompt():
    net = tiny.model("mistral", sliding_window=9)
    with foveate.share_prefix(net, PROMPT) as shared:
        out = shared.generate(ENDS, **GREEDY, **LOGITS)
        same_rows(net, out, [PROMPT + end for end in ENDS], shared.given)


@torch.no_grad()
def test_half_precision():
    net = tiny.model("llama").bfloat16()
    with foveate.share_prefix(net, PROMPT) as shared:
        out = shared.generate(ENDS, **{**GREEDY, "max_new_tokens": 1}, **LOGITS)
    for row, end in enumerate(ENDS):
        want = net(torch.tensor([PROMPT + end])).logits[0, -1]
        torch.testing.assert_close(out.logits[0][row].float(), want.float(), rtol=0.1, atol=0.3)


def test_without_the_kernel(model, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    with foveate.share_prefix(model, PROMPT) as shared:
        out = shared.generate(ENDS, **GREEDY, **LOGITS)
        same_rows(model, out, [PROMPT + end for end in ENDS], shared.given)


# ---------------------------------------------------------------- trees

LEFT, RIGHT, DEEP = [70, 71, 72], [80, 81, 82, 83, 84, 85], [90]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mistral", "gpt_oss", "opt"])
def test_a_tree_at_once(family):
    net = tiny.model(family)
    tree = [(LEFT, [[40, 41], (DEEP, [[], [42]])]), [43, 44, 45], (RIGHT, [[]])]
    texts = [[*LEFT, 40, 41], LEFT + DEEP, LEFT + DEEP + [42], [43, 44, 45], RIGHT]
    with foveate.share_prefix(net, PROMPT) as shared:
        out = shared.generate(tree, **GREEDY, **LOGITS)
        same_rows(net, out, [PROMPT + text for text in texts], shared.given)


def test_a_tree_with_beams(model):
    tree, texts = [(LEFT, [[40, 41], []]), (RIGHT, [[42]])], [[*LEFT, 40, 41], LEFT, [*RIGHT, 42]]
    options = {"num_beams": 3, "num_return_sequences": 2}
    with foveate.share_prefix(model, PROMPT) as shared:
        out = shared.generate(tree, **{**GREEDY, **options})
    assert out.tolist() == together(model, [PROMPT + text for text in texts], **options).tolist()


@pytest.mark.parametrize("tree", [[(LEFT, [[]])], [(LEFT, [(RIGHT, [(DEEP, [[40]])])])]])
def test_a_tree_with_one_leaf(model, tree):
    text, below = [*PROMPT], tree
    while isinstance(below[0], tuple):
        text, below = [*text, *below[0][0]], below[0][1]
    with foveate.share_prefix(model, PROMPT) as shared:
        out = shared.generate(tree, **GREEDY)
    assert out[0].tolist() == alone(model, text + below[0])[0].tolist()


def test_a_prompt_that_extends_another(model):
    with foveate.share_prefix(model, PROMPT) as shared:
        root = shared.bytes_held()
        with shared.extend(LEFT) as child, child.extend(DEEP) as grandchild:
            assert grandchild.length == len(PROMPT + LEFT + DEEP)
            # the root's bytes are those of the root, whoever counts them
            assert grandchild.bytes_held() * len(PROMPT) == root * grandchild.length
            for one, text in ((shared, PROMPT), (child, PROMPT + LEFT), (grandchild, PROMPT + LEFT + DEEP)):
                out = one.generate(ENDS, **GREEDY, **LOGITS)
                same_rows(model, out, [text + end for end in ENDS], one.given)
        with pytest.raises(NotSupported, match="has been left"):
            grandchild.generate(ENDS, **GREEDY)
        assert shared.generate([[]], **GREEDY)[0].tolist() == alone(model, PROMPT)[0].tolist()


def test_a_branch_is_held_once(model):
    with foveate.share_prefix(model, PROMPT) as shared:
        shared.generate([[40]] * 8, **GREEDY)
        flat = shared.bytes_held()
        shared.generate([(LEFT * 20, [[40]] * 8)], **GREEDY)
        token = 2 * 2 * 2 * 8 * 4
        assert shared.bytes_held() - flat == len(LEFT) * 20 * token


# ---------------------------------------------------------------- memory


def test_the_prompt_is_held_once(model):
    long = [n % 80 + 10 for n in range(150)]
    held = {}
    with foveate.share_prefix(model, long) as shared:
        prompt = shared.bytes_held()
        # 2 layers, keys and values, 2 KV heads of 8 numbers, 4 bytes each
        assert prompt == len(long) * 2 * 2 * 2 * 8 * 4
        for rows in (1, 2, 16):
            shared.generate([[40, 41]] * rows, **GREEDY)
            held[rows] = shared.bytes_held() - prompt
            assert shared.bytes_full() == rows * (len(long) + 2 + 6) * 2 * 2 * 2 * 8 * 4
    assert held[16] == 16 * held[1] == 8 * held[2]
    assert prompt + held[16] < 0.3 * 16 * (prompt + 8 * 256)


def test_bytes_full_are_those_of_the_models_own_cache():
    for family in ("llama", "mistral", "gemma3"):
        net = tiny.model(family)
        with foveate.share_prefix(net, PROMPT) as shared:
            shared.generate(ENDS, **GREEDY)
            told = shared.bytes_full()
        own = DynamicCache(config=net.config)
        together(net, [PROMPT + end for end in ENDS], past_key_values=own)
        assert told == sum(layer.keys.nbytes + layer.values.nbytes for layer in own.layers), family


def test_room_grows_in_steps():
    """Most decoded tokens copy nothing."""
    owner = type("Owner", (), {"open": True})
    layer = prefix.PrefixLayer(one_row(0), [], owner)
    rooms, content = set(), []
    for n in range(200):
        new = torch.full((2, 1, 1, 4), float(n))
        k, _ = layer.update(new, new)
        rooms.add(layer.keys.shape[2])
        content.append(float(n))
        assert k[0, 0, :, 0].tolist() == content
    assert len(rooms) < 15
    assert layer.bytes_own() < 2 * 2 * 4 * 4 * 200 * 1.25


def one_row(tokens):
    begin = torch.zeros(1, dtype=torch.long)
    return Layout((), begin, begin + tokens, tokens, torch.zeros(1, tokens, dtype=torch.long))


def test_nobody_looks_at_the_rows_that_are_computed_again(model, monkeypatch):
    """A row with fewer tokens of its own fills the first of its cells with shared ones; they are never read."""
    attend = prefix.PrefixLayer.attend

    def poisoned(layer, call, mask):
        for row, first in enumerate(layer.layout.own(call.batch).tolist()):
            call.k[row, :, :first] = call.v[row, :, :first] = torch.nan
        return attend(layer, call, mask)

    monkeypatch.setattr(prefix.PrefixLayer, "attend", poisoned)
    with foveate.share_prefix(model, PROMPT) as shared:
        out = shared.generate(ENDS, **GREEDY, **LOGITS)
    monkeypatch.undo()
    same_rows(model, out, [PROMPT + end for end in ENDS], out.sequences.shape[1] - 7)


# ---------------------------------------------------------------- beside others


def values(attached):
    heads = attached.results.heads
    return heads.set_index(["layer", "head", "metric"]).value


def measured(net, ends, *metrics):
    with foveate.share_prefix(net, PROMPT) as shared, foveate.attach(net, *metrics) as attached:
        out = shared.generate(ends, **GREEDY)
    return out, values(attached)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_metrics_around_a_prefix_see_what_they_see_without(family):
    net, metrics = tiny.model(family), (Entropy(), LocalMass(), DuplicateToken())
    with foveate.attach(net, *metrics) as attached, foveate.share_prefix(net, PROMPT) as shared:
        out = shared.generate([ENDS[0]], **GREEDY)
    with foveate.attach(net, *metrics) as plain:
        assert out.tolist() == alone(net, PROMPT + ENDS[0]).tolist()
    assert (values(attached) - values(plain)).abs().max(skipna=False) < 1e-4


def test_metrics_count_each_token_of_a_row_once(model):
    metrics = Entropy(), LocalMass(), DuplicateToken()
    ends = [[40, 41, 42, 43, 44], PROMPT[3:5]]
    out, both = measured(model, ends, *metrics)
    assert out.tolist() == together(model, [PROMPT + end for end in ends]).tolist()
    one, other = (measured(model, [end], *metrics)[1] for end in ends)
    # rows are tokens of the suffix, and generated ones but for the last
    texts = [row[-len(PROMPT) - len(end) - 7 : -1].tolist() for row, end in zip(out, ends, strict=True)]
    copies = [sum(t in text[:n] for n, t in enumerate(text) if n >= len(PROMPT)) for text in texts]
    every = [len(text) - len(PROMPT) for text in texts]
    counts = [copies if metric == "duplicate_token" else every for _, _, metric in both.index]
    first, second = (torch.tensor(counts).double().T.numpy()[n] for n in (0, 1))
    want = (one[both.index] * first + other[both.index] * second) / (first + second)
    assert set(both.index) == set(one.index) == set(other.index)
    assert "duplicate_token" in both.index.get_level_values("metric")
    assert (both - want).abs().max(skipna=False) < 1e-5


def test_edits_act_on_prompt_and_rows(model):
    edit = HeadScale(heads=((0, 1, 0.0), (1, 2, 3.0)))
    texts = [PROMPT + end for end in ENDS]
    with foveate.attach(model, edit), foveate.share_prefix(model, PROMPT) as shared:
        out = shared.generate(ENDS, **GREEDY)
    with foveate.attach(model, edit):
        assert out.tolist() == together(model, texts).tolist()
    assert out.tolist() != together(model, texts).tolist()


def test_a_pruned_model_shares_what_is_left(model):
    with foveate.attach(model, PartRemoval(attention=(0,))):
        with foveate.share_prefix(model, PROMPT) as shared:
            out = shared.generate(ENDS, **GREEDY)
        assert out.tolist() == together(model, [PROMPT + end for end in ENDS]).tolist()


def test_a_schedule_beside_a_prefix_changes_nothing(model):
    with foveate.share_prefix(model, PROMPT) as shared, foveate.attach(model, SharedPrefix(3)):
        out = shared.generate(ENDS, **GREEDY)
    assert out.tolist() == together(model, [PROMPT + end for end in ENDS]).tolist()


def test_policies_are_refused(model):
    refused = pytest.raises(NotSupported, match="Streaming is attached")
    with refused, foveate.attach(model, Streaming(0.5)), foveate.share_prefix(model, PROMPT):
        pass
    with foveate.share_prefix(model, PROMPT) as shared:
        with pytest.raises(NotSupported, match="Streaming is attached"), foveate.attach(model, Streaming(0.5)):
            shared.generate(ENDS, **GREEDY)
        assert shared.generate([[]], **GREEDY).tolist() == alone(model, PROMPT).tolist()


@torch.no_grad()
def test_plain_calls_inside_the_context_are_plain(model):
    ids = torch.tensor([PROMPT])
    want = model(ids).logits
    with foveate.share_prefix(model, PROMPT) as shared:
        shared.generate(ENDS, **GREEDY)
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-5, atol=1e-5)
        assert shared.generate([[]], **GREEDY).tolist() == alone(model, PROMPT).tolist()


# ---------------------------------------------------------------- leaving


@torch.no_grad()
@pytest.mark.parametrize("breaks", [False, True])
def test_leaving_leaves_nothing(model, breaks):
    ids, untouched = torch.tensor([PROMPT]), standing(model)
    before = model(ids).logits
    halted = pytest.raises(RuntimeError, match="halt") if breaks else contextlib.nullcontext()
    with halted, foveate.share_prefix(model, PROMPT) as shared, shared.extend(LEFT) as child:
        child.generate(ENDS, **GREEDY)
        if breaks:
            raise RuntimeError("halt")
    assert torch.equal(model(ids).logits, before)
    assert standing(model) == untouched
    assert model not in ACTIVE
    assert not child.open
    for one in (shared, child):
        with pytest.raises(NotSupported, match="has been left"):
            one.generate(ENDS, **GREEDY)
    with pytest.raises(NotSupported, match="has been left"), shared.extend(LEFT):
        pass


def test_leaving_frees_the_prompt(model):
    with foveate.share_prefix(model, PROMPT) as shared:
        kept = [weakref.ref(t) for one in shared.stretches for pair in one.kept for t in pair]
        shared.generate(ENDS, **GREEDY)
    gc.collect()
    assert len(kept) == 4
    assert not any(t() is not None for t in kept)


@torch.no_grad()
def test_a_cache_is_of_no_use_outside(model):
    with foveate.share_prefix(model, PROMPT) as shared:
        cache = shared.generate(ENDS, **GREEDY, return_dict_in_generate=True).past_key_values
        with pytest.raises(BadInput, match=r"a batch of 3 .* 4 rows"):
            model(torch.tensor([[5]] * 3), past_key_values=cache)
    with pytest.raises(NotSupported, match="cannot read; go on inside"):
        model(torch.tensor([[5]] * 4), past_key_values=cache)


def test_what_a_cache_cannot_do_says_so(model):
    with foveate.share_prefix(model, PROMPT) as shared:
        cache = shared.generate([[40], [41]], **GREEDY, return_dict_in_generate=True).past_key_values
        with pytest.raises(NotSupported, match="no gradient"):
            model(torch.tensor([[5]] * 2), past_key_values=cache)
        with pytest.raises(NotSupported, match="cannot be picked"):
            cache.batch_select_indices(torch.tensor([0]))
        with pytest.raises(NotSupported, match="offload"):
            cache.layers[0].offload()
        with pytest.raises(NotSupported, match="8 tokens are to be forgotten"):
            cache.crop(-8)


@torch.no_grad()
def test_a_cache_can_be_cut_back(model):
    with foveate.share_prefix(model, PROMPT) as shared:
        out = shared.generate([[40], [41]], **GREEDY, return_dict_in_generate=True)
        out.past_key_values.crop(-3)
        got = model(out.sequences[:, -4:-3], past_key_values=out.past_key_values).logits[:, -1]
    want = model(out.sequences[:, :-3]).logits[:, -1]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_keys_changed_on_the_way_are_noticed(model, monkeypatch):
    update = prefix.PrefixLayer.update
    monkeypatch.setattr(prefix.PrefixLayer, "update", lambda *a: tuple(t.clone() for t in update(*a)))
    with pytest.raises(NotSupported, match="changes its keys"), foveate.share_prefix(model, PROMPT):
        pass


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ([], "the prompt has no tokens"),
        ("words", "tokenizer\\(text\\).input_ids"),
        ([[1, 2], [3, 4]], "token ids of one text"),
        (torch.zeros(2, 3, dtype=torch.long), "token ids of one text"),
        ([1.5, 2.0], "token ids of one text"),
        ([True], "token ids of one text"),
        ([5, 99], "knows no token 99; its tokens are 0 to 98"),
        ([-1], "knows no token -1"),
        (None, "got NoneType"),
    ],
)
def test_bad_prompts(model, prompt, says):
    with pytest.raises(BadInput, match=says), foveate.share_prefix(model, prompt):
        pass
    assert model not in ACTIVE


@pytest.mark.parametrize(
    ("ends", "says"),
    [
        ([], "no suffixes"),
        ([1, 2], "suffix 0 must be the token ids of one text"),
        ("abc", "suffixes must be a list"),
        (None, "not NoneType"),
        ([[5], [500]], "suffix 1: .* knows no token 500"),
        (torch.tensor([4, 5]), "must be \\[rows, tokens\\]"),
        ([([5], [])], "no suffixes of branch 0"),
        ([[5], ([], [[5]])], "branch 1 has no tokens"),
    ],
)
def test_bad_suffixes(model, ends, says):
    with foveate.share_prefix(model, PROMPT) as shared, pytest.raises(BadInput, match=says):
        shared.generate(ends, **GREEDY)


def test_bad_options(model):
    with foveate.share_prefix(model, PROMPT) as shared:
        with pytest.raises(NothingObserved, match="nothing has been generated"):
            _ = shared.given
        with pytest.raises(NothingObserved, match="nothing has been generated"):
            shared.bytes_full()
        with pytest.raises(BadInput, match="attention_mask=…"):
            shared.generate(ENDS, attention_mask=torch.ones(4, 40))
        with pytest.raises(NotSupported, match=r"prompt_lookup_num_tokens=….*assisted decoding"):
            shared.generate([[40]], prompt_lookup_num_tokens=3)
        with pytest.raises(BadInput, match="use_cache=False"):
            shared.generate(ENDS, use_cache=False)


@pytest.mark.parametrize("family", ["bert", "t5", "vit"])
def test_models_that_continue_nothing_are_refused(family):
    with pytest.raises(NotSupported, match="continues no prompt"), foveate.share_prefix(tiny.model(family), PROMPT):
        pass


def test_models_off_the_interface_are_refused():
    with pytest.raises(NotOnInterface, match="BloomForCausalLM"), foveate.share_prefix(tiny.model("bloom"), PROMPT):
        pass


def test_states_cannot_be_shared():
    config = transformers.Qwen3NextConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    )  # fmt: skip
    net = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(NotSupported, match="keeps no keys and values in layer 0"), foveate.share_prefix(net, PROMPT):
        pass


# ---------------------------------------------------------------- the card


def batch_of(prefix_keys, rows=3, queries=2, own=5, expand=True, **more):
    rng = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=rng)

    k, v = (
        torch.cat([draw(1, 2, prefix_keys, 8).expand(rows, -1, -1, -1), draw(rows, 2, own, 8)], 2) for _ in range(2)
    )
    keys = prefix_keys + own
    return View(draw(rows, 4, queries, 8), k, v, Mask.causal_of(queries, keys), **more)


@pytest.mark.parametrize("more", [{}, {"softcap": 2.0}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}])
@pytest.mark.parametrize(("prefix_keys", "own"), [(6, 5), (1, 4), (9, 2)])
def test_the_schedule_equals_attention(prefix_keys, own, more):
    view, schedule = batch_of(prefix_keys, own=own, **more), SharedPrefix(prefix_keys)
    assert schedule.refuses(view) == ""
    out, lse = schedule.run(view)
    wide = dataclasses.replace(view, q=view.q.double(), k=view.k.double(), v=view.v.double())
    want = attend_rows(wide, engine="reference", dtype=torch.float64).out
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-5)
    assert lse.shape == out.shape[:3]
    assert attend_rows(view, schedule=schedule).engine == "schedule"


def test_the_schedule_reads_the_prefix_of_one_row(monkeypatch):
    shapes = []
    part = prefix.part

    def seen(view, q, k, v, reach):
        shapes.append((tuple(q.shape), tuple(k.shape)))
        return part(view, q, k, v, reach)

    monkeypatch.setattr(prefix, "part", seen)
    SharedPrefix(6).run(batch_of(6))
    assert shapes == [((3, 4, 2, 8), (3, 2, 5, 8)), ((1, 4, 6, 8), (1, 2, 6, 8))]


def test_the_schedule_has_the_gradients_of_each_row():
    view = batch_of(6)
    leaves = [t.double().requires_grad_() for t in (view.q, view.k, view.v)]
    grads = []
    for run in (SharedPrefix(6).run, lambda v: (attend_rows(v, engine="reference", dtype=torch.float64).out, None)):
        out, _ = run(View(*leaves, view.mask))
        grads.append(torch.autograd.grad(out.sin().sum(), leaves))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_the_schedule_says_why_not():
    view = batch_of(6)
    assert "do not have their first 7 keys" in SharedPrefix(7).refuses(view)
    assert "a row does not see the whole prefix of 11" in SharedPrefix(11).refuses(view)
    assert "11 keys, fewer than a prefix of 12" in SharedPrefix(12).refuses(view)
    other = dataclasses.replace(view, v=view.v + torch.arange(3)[:, None, None, None])
    assert "in common" in SharedPrefix(6).refuses(other)
    window = dataclasses.replace(view, mask=Mask.causal_of(2, 11, window=8))
    assert "does not see the whole prefix" in SharedPrefix(6).refuses(window)
    assert "bias" in SharedPrefix(6).refuses(dataclasses.replace(view, bias=torch.zeros(1, 1, 2, 11)))


# ---------------------------------------------------------------- a real model, and the command line


def test_a_trained_model_says_the_same():
    net, tokenizer = foveate.load("smollm2")
    prompt = tokenizer("The following are capitals. France: Paris. Italy: Rome. Spain: Madrid. " * 3).input_ids
    ends = [tokenizer(f"{name}:").input_ids for name in ("Germany", "United Kingdom of Great Britain", "Japan")]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 2}
    with foveate.share_prefix(net, prompt) as shared:
        out = shared.generate(ends, **options)[:, shared.given :]
    said = tokenizer.batch_decode(out)
    assert ["Berlin" in said[0], "London" in said[1], "Tokyo" in said[2]] == [True] * 3
    for row, end in zip(out, ends, strict=True):
        assert row.tolist() == alone(net, prompt + end, **options)[0, -4:].tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved tiny model with a tokenizer."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    net = tiny.model("llama")
    net.save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def files(tmp_path):
    made = {"prompt": tmp_path / "prompt.txt", "ends": tmp_path / "ends.txt", "json": tmp_path / "ends.jsonl"}
    made["prompt"].write_text("Say a word: ")
    made["ends"].write_text("[b]one[/b]\n\ntwo and three\n")
    made["json"].write_text('{"text": "one\\ntwo"}\n{"text": "", "id": 4}\n')
    return made


def test_the_command_continues_each_line(folder, files):
    options = ("generate", folder, "--prompt", files["prompt"], "--tokens", 9)
    done = here(*options, "--continuations", files["ends"], "--json")
    told = json.loads(done.stdout)
    tokenizer, net = tiny.tokenizer(), tiny.model("llama")
    assert [one["text"] for one in told["continuations"]] == ["[b]one[/b]", "two and three"]
    for one in told["continuations"]:
        ids = tokenizer("Say a word: " + one["text"]).input_ids
        out = alone(net, ids, max_new_tokens=9, eos_token_id=2)[0, len(ids) :].tolist()
        assert one["answer"] == tokenizer.decode(out, skip_special_tokens=True)
        assert one["tokens"] == (out.index(2) + 1 if 2 in out else 9)
    assert told["prompt_tokens"] == 12
    assert told["bytes_held"] > 0
    assert told["bytes_full"] == 2 * (12 + 13 + told["continuations"][0]["tokens"] - 1) * 256
    shown = here(*options, "--continuations", files["ends"])
    assert shown.returncode == 0, shown.stderr
    assert "[b]one[/b]" in shown.stdout
    assert "per second" in shown.stdout
    assert "with a prompt for each" in shown.stdout
    few = json.loads(here(*options, "--continuations", files["ends"], "--batch", 1, "--json").stdout)
    assert few["continuations"] == told["continuations"]
    assert few["bytes_held"] < told["bytes_held"]


def test_the_command_reads_json_lines(folder, files):
    done = here(
        "generate", folder, "--prompt", files["prompt"], "--continuations", files["json"], "--tokens", 2, "--json"
    )
    assert [one["text"] for one in json.loads(done.stdout)["continuations"]] == ["one\ntwo", ""]


def test_the_command_says_what_is_wrong(folder, files, tmp_path):
    empty, bad, half = tmp_path / "empty.txt", tmp_path / "bad.jsonl", tmp_path / "half.txt"
    empty.write_text("\n")
    bad.write_text("words\n")
    half.write_text('{"text": "a"}\n{"words": "b"}\n')
    prompt, ends = ("--prompt", files["prompt"]), ("--continuations", files["ends"])
    for options, says in (
        (ends, "--continuations needs the prompt"),
        ((*prompt, "--continuations", empty), "is empty"),
        ((*prompt, "--continuations", bad), "line 1 is no JSON"),
        ((*prompt, "--continuations", half), 'line 2 has no "text"'),
        ((*prompt, "--continuations", tmp_path / "none"), "check the path given to --continuations"),
        (("--prompt", tmp_path / "none", *ends), "check the path given to --prompt"),
        ((*prompt, *ends, "--policy", "streaming"), "--policy beside --continuations"),
        ((*prompt, *ends, "--plan", tmp_path / "plan.json"), "--plan beside --continuations"),
        ((*prompt, *ends, "--batch", 0), "--batch 0"),
        ((*prompt, *ends, "--tokens", 500), "256 positions"),
    ):
        done = here("generate", folder, *options)
        assert done.returncode == 2, (options, done.stdout)
        assert says in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
