"""KV policies that score entries from what rows look at: each equation by a way of its own, and what they keep."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from foveate.compress import Chunks, ExpectedAttention, HeavyHitters, ValueNorm
from foveate.core.budget import Budget
from foveate.core.errors import BadParameter
from foveate.core.mask import Mask
from foveate.core.mechanism import Policy
from foveate.core.policy import Held, best
from foveate.core.ragged import EMPTY
from foveate.core.rows import Rows, View, attend
from foveate.testing import tiny, views
from foveate.testing.policies import ids_of, left_padded, padded_ids, run

BARE = Budget(4, sinks=0, recent=1, every=0)


def held_of(view: View, policy: Policy, before: Tensor | None = None, mass: Tensor | None = None) -> Held:
    """What a policy sees of a first call."""
    shape = (view.batch, view.kv_heads, view.keys)
    position = torch.arange(view.keys).expand(shape)
    if view.mask.valid is not None:
        position = position.masked_fill(~view.mask.valid[:, None], EMPTY)
    rows = attend(view, policy.needs()) if policy.needs() else Rows(view, view.q[:0], {}, "none")
    before = torch.zeros(shape) if before is None else before
    return Held(rows, position, before, torch.full(shape[:2], 4), mass)


def scores(policy: Policy, view: View, **given: Tensor) -> Tensor:
    held = held_of(view, policy, **given)
    return policy.score(held).masked_fill(~held.there, 0.0)


def looking_at(weight: dict[int, float], keys: int) -> View:
    """One head whose rows give some keys so many nats, and the others nothing; all keys are seen by every row."""
    k = torch.zeros(1, 1, keys, 1)
    for at, nats in weight.items():
        k[0, 0, at] = nats
    return View(torch.ones(1, 1, keys, 1), k, torch.ones(1, 1, keys, 1), Mask.full(keys, keys), scale=1.0)


def kept_of(policy: Policy, view: View, room: int) -> list[int]:
    """What one head keeps."""
    held = held_of(view, policy)
    pinned = policy.limits.pinned(held.there) | policy.pinned(held)
    return best(policy.score(held).masked_fill(pinned, 1e9), torch.tensor([[room]]))[0, 0].nonzero()[:, 0].tolist()


# ---------------------------------------------------------------- expected attention


def by_logits(view: View, window: int, sinks: int) -> Tensor:
    """The scores of one text from the mean and variance of its rows' logits: no statistics of queries."""
    rows = slice(max(sinks, view.queries - window), view.queries)
    q = view.q[0, :, rows].float().unflatten(0, (view.kv_heads, -1))
    logits = view.scale * q @ view.k[0, :, None].float().transpose(-1, -2)
    s = logits.mean(2) + logits.var(2, correction=0) / 2
    s[..., :sinks] = -torch.inf
    last = view.mask.additive(torch.tensor([view.queries - 1]), 0, view.keys)[0, 0, 0] > -torch.inf
    a = s.masked_fill(~last, -torch.inf).softmax(-1).mean(1)
    return a * view.v[0].float().norm(dim=-1)


@pytest.mark.parametrize("name", ["causal", "window", "multi_head", "multi_query", "wide_values", "bfloat16"])
@pytest.mark.parametrize(("window", "sinks"), [(7, 0), (7, 3), (64, 3)])
def test_expected_attention_is_the_mean_and_variance_of_the_logits(name, window, sinks):
    view = views.view(name, batch=1)
    policy = ExpectedAttention(replace(BARE, sinks=sinks), window=window)
    torch.testing.assert_close(scores(policy, view)[0], by_logits(view, window, sinks), rtol=1e-4, atol=1e-6)


def test_expected_attention_is_the_weight_that_drawn_queries_give():
    rng = torch.Generator().manual_seed(0)
    mix = torch.randn(4, 4, generator=rng) * 0.5
    k, v = (torch.randn(1, 1, 6, 4, generator=rng) for _ in range(2))

    def drawn(count: int) -> Tensor:
        return torch.randn(1, 1, count, 4, generator=rng) @ mix + torch.tensor([1.0, 0.5, 0.0, -0.5])

    count = 60_000
    view = View(drawn(count), k, v, Mask.full(count, 6))
    got = scores(ExpectedAttention(BARE, window=count), view)
    # other queries of the same distribution; the expectations of numerator and denominator, as in the paper
    z = (0.5 * drawn(400_000) @ k.transpose(-1, -2)).double().exp().mean(2)
    want = (z / z.sum(-1, keepdim=True)).float() * v.norm(dim=-1)
    torch.testing.assert_close(got, want, rtol=0.03, atol=1e-3)


def test_expected_attention_rates_what_only_some_queries_look_at():
    q = torch.tensor([[4.0, 0.0], [-4.0, 0.0]]).repeat(8, 1)[None, None]
    k = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])[None, None]
    view = View(q, k, torch.ones(1, 1, 4, 2), Mask.full(16, 4), scale=1.0)
    got = scores(ExpectedAttention(BARE), view)[0, 0]
    # the mean query is 0; the variance of the logits is 16 for the first two keys
    e = torch.tensor([8.0, 8.0, 0.0, 0.0]).softmax(-1) * 2**0.5
    torch.testing.assert_close(got, e)


def test_expected_attention_of_a_padded_row_is_that_of_the_row_alone():
    for name, entry, first, last in (
        ("left_padded", 1, 6, 23),
        ("right_padded", 1, 0, 16),
        ("left_padded_window", 0, 4, 23),
    ):
        padded = views.view(name)
        # 9 rows leave out the sinks anyway, 64 would take them in
        for window in (9, 64):
            policy = ExpectedAttention(replace(BARE, sinks=3), window=window, epsilon=0.01)
            one = scores(policy, views.alone(padded, entry, first, last))
            got = scores(policy, views.poisoned(padded))[entry : entry + 1, :, first:last]
            torch.testing.assert_close(got, one, rtol=1e-5, atol=1e-7)


def test_a_key_that_a_sliding_window_has_left_is_worth_nothing():
    view = views.view("window", batch=1)
    got = scores(ExpectedAttention(BARE, epsilon=0.5), view)
    assert (got[..., :-5] == 0).all()
    assert (got[..., -5:] > 0).all()


def test_queries_and_keys_of_sinks_take_no_part():
    policy = ExpectedAttention(replace(BARE, sinks=2), window=64)
    view = views.view("causal")
    loud = replace(view, q=view.q.clone(), k=view.k.clone())
    loud.q[:, :, :2], loud.k[:, :, :2] = 100.0, 100.0
    torch.testing.assert_close(scores(policy, loud)[..., 2:], scores(policy, view)[..., 2:])
    assert not torch.allclose(scores(replace(policy, budget=BARE), loud)[..., 2:], scores(policy, view)[..., 2:])


def test_a_soft_cap_caps_the_expected_logits():
    view = views.view("soft_cap", batch=1)
    alike = replace(view, q=view.q[:, :, -1:].expand_as(view.q))
    logits = 2.0 * torch.tanh(
        view.scale * view.q[0, :, -1:] @ view.k[0].repeat_interleave(2, 0).transpose(-1, -2) / 2.0
    )
    want = logits.softmax(-1).view(2, 2, -1).mean(1) * view.v[0].norm(dim=-1)
    torch.testing.assert_close(scores(ExpectedAttention(BARE), alike)[0], want)
    # and however far the queries are apart, no weight is more than e^(2 * 2) times another
    a = scores(ExpectedAttention(BARE), replace(view, q=view.q * 30)) / view.v.norm(dim=-1)
    assert 1 < a.amax() / a.amin() <= torch.e**4
    open_ = [scores(ExpectedAttention(BARE), replace(view, softcap=cap)) for cap in (1e4, None)]
    torch.testing.assert_close(open_[0], open_[1], rtol=1e-3, atol=1e-6)


def test_an_entry_that_stands_for_three_tokens_weighs_as_three():
    view = views.view("causal", batch=1)
    mass = torch.ones(1, 2, 23)
    mass[..., 4] = 3.0
    copies = torch.cat([torch.arange(23), torch.tensor([4, 4])])
    tripled = replace(view, k=view.k[:, :, copies], v=view.v[:, :, copies], mask=Mask.full(23, 25), tokens=None)
    apart = scores(ExpectedAttention(BARE), tripled)
    merged = scores(ExpectedAttention(BARE), view, mass=mass)
    torch.testing.assert_close(merged[..., 4], 3 * apart[..., 4])
    torch.testing.assert_close(merged[..., 5:], apart[..., 5:23])


def test_epsilon_adds_to_every_weight():
    view = views.view("causal")
    none, some = (scores(ExpectedAttention(BARE, epsilon=e), view) for e in (0.0, 0.25))
    torch.testing.assert_close(some - none, 0.25 * view.v.norm(dim=-1))


@dataclass(frozen=True)
class Recorded(Policy):
    """Expected attention, and what it was shown and said.

    Args:
        inner: The policy.
        calls: What it was shown and said is added here.
        budget: Its budget.
    """

    inner: ExpectedAttention
    calls: list
    budget: Any = 1.0

    card: ClassVar = ExpectedAttention.card

    def score(self, held: Held) -> Tensor:
        self.calls.append((held, self.inner.score(held)))
        return self.calls[-1][1]


def test_expected_attention_of_later_rounds_under_a_sliding_window():
    model, padding = tiny.model("mistral"), left_padded()
    width, calls = model.config.sliding_window, []
    policy = ExpectedAttention(Budget(24, sinks=2, recent=3, every=3), window=12)
    run(model, padded_ids(ids_of(), padding), Recorded(policy, calls, policy.limits), padding, chunks=(14, 30))
    assert [held.rows.view.queries for held, _ in calls[:: model.config.num_hidden_layers]] == [14, 16, 11, 3, 3, 3]
    left = 0
    for held, got in calls:
        view, end = held.rows.view, int(held.rows.view.mask.position[-1])
        for row, begin in enumerate((0, 11)):
            real = [n for n, at in enumerate(view.mask.position.tolist()) if at >= begin][-12:]
            real = [n for n in real if view.mask.position[n] >= begin + 2]
            for head in range(view.kv_heads):
                at = held.position[row, head][held.there[row, head]]
                k, v = (x[row, head][held.there[row, head]] for x in (view.k, view.v))
                q = view.q[row, head * view.grouped : (head + 1) * view.grouped, real]
                logits = view.scale * q @ k.transpose(0, 1)
                gone = (at <= end - width) | (at < begin + 2)
                s = logits.mean(1) + logits.var(1, correction=0) / 2
                want = s.masked_fill(gone, -torch.inf).softmax(-1).nan_to_num(0.0).mean(0) * v.norm(dim=-1)
                torch.testing.assert_close(got[row, head][held.there[row, head]], want, rtol=1e-3, atol=1e-5)
                left += int((at <= end - width).sum())
    assert left > 0


# ---------------------------------------------------------------- value norm


def test_value_norm_by_hand():
    # queries of nothing look at all keys alike: key j gets 1/(j+1) + ... + 1/4
    v = torch.tensor([[1.0, -2.0], [0.0, 0.0], [0.5, 0.5], [-3.0, 1.0]])[None, None]
    view = View(torch.zeros(1, 2, 4, 2), torch.ones(1, 1, 4, 2), v, Mask.causal_of(4))
    got = scores(ValueNorm(BARE), view)[0, 0]
    received = 2 * torch.tensor([1 + 1 / 2 + 1 / 3 + 1 / 4, 1 / 2 + 1 / 3 + 1 / 4, 1 / 3 + 1 / 4, 1 / 4])
    torch.testing.assert_close(got, received * torch.tensor([3.0, 0.0, 1.0, 4.0]))


def test_value_norm_of_two_rounds_is_that_of_one():
    view, policy = views.view("causal"), ValueNorm(BARE)
    first = scores(policy, views.chunk(view, 0, 14))
    second = scores(policy, views.chunk(view, 14, 23), before=torch.nn.functional.pad(first, (0, 9)))
    torch.testing.assert_close(second, scores(policy, view))


def test_a_sink_of_no_value_goes_unless_the_budget_pins_it():
    view = looking_at({0: 4.0, 3: 1.0}, 9)
    view.v[:, :, 0] = 0.0
    without, with_one = (replace(BARE, sinks=sinks) for sinks in (0, 1))
    kept = [kept_of(policy(b), view, 4) for b in (without, with_one) for policy in (HeavyHitters, ValueNorm)]
    assert kept == [[0, 3, 7, 8], [3, 6, 7, 8], [0, 3, 7, 8], [0, 3, 7, 8]]


# ---------------------------------------------------------------- chunks


def test_chunks_sum_the_weights_of_their_keys():
    view = looking_at({1: 3.0, 6: 2.0, 7: 2.0}, 11)
    got = scores(Chunks(BARE, size=4, window=3), view)[0, 0]
    p = view.k[0, 0, :, 0].softmax(-1)
    want = torch.cat([p[a:b].sum().expand(b - a) for a, b in ((0, 4), (4, 8), (8, 11))])
    torch.testing.assert_close(got, want)


def test_whole_chunks_are_kept_and_one_is_cut_for_the_room_that_is_left():
    policy = Chunks(BARE, size=4, window=3)
    view = looking_at({1: 3.0, 6: 2.0, 7: 2.0}, 16)
    # chunk 0 has e^3 + 3, chunk 1 has 2 e^2 + 2; the others 4
    # the newest key is pinned
    assert kept_of(policy, view, 5) == [0, 1, 2, 3, 15]
    assert kept_of(policy, view, 9) == [*range(8), 15]
    assert kept_of(policy, view, 7) == [0, 1, 2, 3, 6, 7, 15]
    # single keys: the first, without which nobody would know where chunks begin, and the three that are looked at
    assert kept_of(Chunks(BARE, size=1, window=3), view, 5) == [0, 1, 6, 7, 15]


def test_only_the_last_rows_vote():
    view = views.view("causal", batch=1)
    got = scores(Chunks(BARE, size=1, window=5), view)[0]
    p = (view.scale * view.q[0] @ view.k[0].repeat_interleave(2, 0).transpose(-1, -2)).masked_fill(
        torch.ones(23, 23).triu(1).bool(), -torch.inf
    )
    torch.testing.assert_close(got, p.softmax(-1)[:, -5:].mean(1).view(2, 2, -1).mean(1), rtol=1e-4, atol=1e-6)


def test_padding_does_not_move_chunks():
    policy = Chunks(BARE, size=4, window=6)
    padded = views.view("left_padded")
    got = scores(policy, views.poisoned(padded))[1:, :, 6:]
    torch.testing.assert_close(got, scores(policy, views.alone(padded, 1, 6, 23)), rtol=1e-5, atol=1e-6)
    # 17 tokens: chunks of 4, 4, 4, 4 and 1
    assert [len(head.unique()) for head in got[0]] == [5, 5]


@pytest.mark.parametrize("sinks", [0, 4])
def test_no_more_than_one_chunk_is_cut_in_a_padded_batch_and_a_prompt_in_pieces(sinks):
    model, padding = tiny.model("llama"), left_padded()
    policy = Chunks(Budget(21, sinks=sinks, recent=2, every=0), size=4, window=8)
    seen: list[list[Tensor]] = []
    run(
        model,
        padded_ids(ids_of(), padding),
        policy,
        padding,
        chunks=(30,),
        steps=9,
        after=lambda layers: seen.append([one.store.positions() for one in layers]),
    )
    for end, layers in zip((30, 41), seen[:2], strict=True):
        for at in layers:
            for row, begin in enumerate((0, 11)):
                for head in at[row].tolist():
                    places = {p - begin for p in head if p != EMPTY}
                    assert len(places) == min(21, end - begin)
                    assert 0 in places
                    text = range(end - begin)
                    chunks = [set(text[n : n + 4]) for n in range(0, len(text), 4)]
                    free = [c for c in chunks if not c & {0, *text[-2:]}]
                    cut = [c for c in free if 0 < len(c & places) < 4]
                    # what the first round cut may be cut again in the second, and no other
                    assert len(cut) <= (1 if end == 30 else 2)
                    for c in cut:
                        assert max(c) in places


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Chunks(size=0), "Chunks(size=0)"),
        (lambda: ExpectedAttention(window=0), "ExpectedAttention(window=0)"),
        (lambda: ExpectedAttention(epsilon=-0.1), "ExpectedAttention(epsilon=-0.1)"),
        (lambda: ValueNorm(recent=1.5), "ValueNorm(recent=1.5)"),
        (lambda: ValueNorm(0), "budget 0"),
    ],
)
def test_what_cannot_be_is_named(make, named):
    with pytest.raises(BadParameter) as error:
        make()
    assert named in str(error.value)
