"""The search of a mixture of spans: what is foreseen of each head, what the solver makes of it, what it is worth."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
from dataclasses import replace

import pytest
import torch
from scipy.stats import spearmanr
from transformers.cache_utils import DynamicCache

import foveate
from foveate.compress import MixtureOfSpans
from foveate.compress.cache._spans import (
    Search,
    Spans,
    Stretch,
    assign,
    entries,
    extrapolated,
    grid,
    least_share,
    moved,
    profiled,
    sight,
)
from foveate.core.budget import Budget
from foveate.core.errors import BadInput
from foveate.core.mask import Mask
from foveate.core.rows import Layer, View, attend
from foveate.core.unheard import unheard
from foveate.testing import handmade, tiny
from foveate.testing.policies import ids_of, run

LINES = torch.tensor([[0.0, 0.0], [5.0, 0.0], [-3.0, 0.5], [2.0, 0.25], [0.0, 1.0]], dtype=torch.float64)
RHYTHMS = (Budget(999, sinks=2, recent=1, every=3), Budget(999, sinks=0, recent=1, every=1), Budget(999, every=0))


def call(queries=13, keys=37, window=None, seed=0, **changed):
    """The rows behind a prompt, in double."""
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(1, h, n, 8, generator=rng, dtype=torch.float64) for h, n in ((4, queries), (2, keys), (2, keys))
    )
    return View(2 * q, k, v, Mask.causal_of(queries, keys, window=window), layer=Layer(3), **changed)


# ---------------------------------------------------------------- what a head sees


@pytest.mark.parametrize(
    ("family", "budget"),
    [*(("llama", b) for b in RHYTHMS), *((family, RHYTHMS[0]) for family in ("mistral", "gpt_oss", "gpt2"))],
    ids=lambda x: x if isinstance(x, str) else f"every {x.every}",
)
def test_the_masks_show_what_the_cache_shows(family, budget):
    """One head each of a few lines: logits of all rows behind the prompt, against a real cache token by token."""
    model, ids = tiny.model(family), ids_of(batch=1, length=60)
    heads = getattr(model.config, "num_key_value_heads", 4)
    plan = {(layer, head): (3.0 + layer, 0.3 * head / heads) for layer in range(2) for head in range(heads)}
    policy = MixtureOfSpans(budget, tuple((*head, *line) for head, line in plan.items()))
    cached = run(model, ids, policy, steps=21).logits[:, -21:]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :39], past_key_values=cache)
        full = Stretch(ids, cache, 21).logits(model)
        with foveate.attach(model, Spans(plan, budget), trial=False):
            masked = Stretch(ids, cache, 21).logits(model)
    torch.testing.assert_close(masked, cached[0].float(), rtol=1e-3, atol=1e-3)
    # a window of five hides what the spans hide
    assert family == "mistral" or (full - masked).abs().max() > 0.01


@pytest.mark.parametrize("budget", RHYTHMS, ids=lambda b: f"every {b.every}")
@pytest.mark.parametrize("kind", ["plain", "window", "softcap", "sinks", "alone"])
def test_what_spans_do_to_the_loss_equals_attention_with_the_spans(kind, budget):
    """g (o' - o) from one cumulated sum, against the row engine run once for each line and KV head."""
    more = {"softcap": {"softcap": 1.5}, "sinks": {"sinks": torch.randn(4, dtype=torch.float64)}}.get(kind, {})
    view = call(window=9 if kind == "window" else None, queries=1 if kind == "alone" else 13, **more)
    gradient = torch.randn(view.q.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    full = attend(view, engine="reference").out
    got = moved(view, gradient, LINES, budget)
    assert got.shape == (1, 2, view.queries, len(LINES))
    for n, line in enumerate(LINES.tolist()):
        for head in range(2):
            spans = Spans({(3, head): tuple(line)}, budget)
            change = gradient * (attend(view, edits=(spans,), engine="reference").out - full)
            torch.testing.assert_close(got[:, head, :, n], change.sum((1, 3)), rtol=1e-9, atol=1e-10)
    assert got[..., -1].abs().max() < 1e-12
    assert kind in ("window", "alone") or budget.every == 0 or got[..., 0].abs().max() > 0.1


def test_sight_grows_between_two_rounds_and_never_beyond_what_the_line_holds():
    budget = Budget(999, sinks=2, recent=1, every=4)
    near = sight(torch.tensor([[6.0, 0.0]], dtype=torch.float64), 20, 9, budget)[:, 0]
    # 2 sinks and a span of 6 hold 8, less the room for 3; the row's own token comes on top
    assert near.tolist() == [4, 5, 6, 7, 4, 5, 6, 7, 4]


def test_the_usual_grid_is_of_lines_that_fit_all_lengths():
    lines = grid((64, 128, 256))
    assert len(lines) == len(set(lines)) > 50
    assert {(0.0, 0.0), (0.0, 1.0), (0.0, 0.25), (16.0, 0.0), (-16.0, 0.25)} <= set(lines)
    assert all(0 <= a + b * n <= n for a, b in lines for n in (64, 128, 256))


# ---------------------------------------------------------------- the profile


def test_the_profile_foresees_what_each_head_costs():
    """Against the real divergence with one KV head restricted, for all heads and a few lines."""
    model = tiny.model("llama")
    for p in model.parameters():
        # near to where the second order is all there is
        p.requires_grad_(False).mul_(0.15 if p.ndim > 1 else 1.0)
    budget = Budget(999, sinks=1, recent=1, every=1)
    draw = torch.Generator().manual_seed(0)
    texts = [Stretch.of(model, ids_of(batch=1, length=96, seed=n)[0].tolist()) for n in range(3)]
    lines = LINES[:3]
    found = [profiled(model, text, lines, budget, draw) for _ in range(6) for text in texts]
    guess, real = [], []
    for head, (n, line) in itertools.product(found[0], enumerate(lines.tolist())):
        guess.append(float(sum(one[head][n] for one in found)) / len(found))
        total = 0.0
        for text in texts:
            with torch.no_grad():
                full = text.logits(model).log_softmax(-1)
                with foveate.attach(model, Spans({head: tuple(line)}, budget), trial=False):
                    log_p = text.logits(model).log_softmax(-1)
            total += float((full.exp() * (full - log_p)).sum(-1).mean()) / len(texts)
        real.append(total)
    assert len(real) == 12
    assert spearmanr(guess, real)[0] > 0.9
    assert sum(guess) == pytest.approx(sum(real), rel=0.3)


def test_a_profile_leaves_the_model_as_it_was():
    model = tiny.model("llama").train()
    weights = [p.clone() for p in model.parameters()]
    text = Stretch.of(model, ids_of(batch=1, length=24)[0].tolist())
    profiled(model, text, LINES, Budget(999, sinks=1, recent=1), torch.Generator().manual_seed(0))
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert text.cache.get_seq_length() == 18


@pytest.mark.parametrize(("lengths", "power"), [((8, 16), 0.5), ((8, 16, 32), -0.7)])
def test_extrapolation_goes_on_as_all_heads_together_do(lengths, power):
    heads = torch.tensor([[1.0, 4.0], [3.0, 0.0]], dtype=torch.float64)
    law = torch.stack([heads * n**power for n in lengths])
    torch.testing.assert_close(extrapolated(law, lengths, 128), heads * 128**power)
    # noise of one head against another is no trend
    law[0, :, 0] = law[0, :, 0].flip(0)
    noisy = extrapolated(law, lengths, 128)
    assert float(noisy[:, 0].sum()) == pytest.approx(4 * 128**power)


def test_extrapolation_has_bounds():
    steep = torch.tensor([1.0, 8.0], dtype=torch.float64)[:, None, None]
    assert float(extrapolated(steep, (8, 16), 32)) == pytest.approx((4 + 16) / 2)
    assert float(extrapolated(steep.flip(0), (8, 16), 32)) == pytest.approx((8 / 4 + 1 / 2) / 2)
    nothing = torch.zeros(2, 1, 1, dtype=torch.float64)
    assert float(extrapolated(nothing, (8, 16), 32)) == 0
    assert float(extrapolated(steep[1:], (8,), 64)) == 8


# ---------------------------------------------------------------- the solver


@pytest.mark.parametrize("seed", range(4))
def test_the_solver_finds_what_trying_everything_finds(seed):
    rng = torch.Generator().manual_seed(seed)
    losses = torch.rand(5, 4, generator=rng, dtype=torch.float64) * 1e-4
    held = torch.tensor([[2, 5, 9, 16], [4, 5, 20, 20]])
    lengths, keep = (16, 32), 0.4
    best = min(
        (plan for plan in itertools.product(range(4), repeat=5) if fits(plan, held, lengths, keep)),
        key=lambda plan: sum(float(losses[h, n]) for h, n in enumerate(plan)),
    )
    assert tuple(assign(losses, held, lengths, keep).tolist()) == best
    # the second length is what stands in the way
    free = assign(losses, held[:1], lengths[:1], keep).tolist()
    assert fits(free, held[:1], lengths[:1], keep)


def fits(plan, held, lengths, keep):
    return all(sum(int(own[n]) for n in plan) <= keep * len(plan) * N for own, N in zip(held, lengths, strict=True))


def test_a_head_for_which_shorter_is_no_worse_gets_the_shortest():
    losses = torch.tensor([[3.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.5, 0.0]], dtype=torch.float64)
    held = torch.tensor([[2, 4, 6, 16]])
    assert assign(losses, held, (16,), 1.0).tolist() == [1, 0, 3]


def test_a_budget_that_cannot_be_met_is_refused_with_the_least_that_can():
    # one line is short at 10 tokens, the other at 20: only two heads together hold half of both
    held, lengths = torch.tensor([[2, 8], [16, 4]]), (10, 20)
    assert least_share(held, lengths, heads=2) == pytest.approx(0.5)
    assert least_share(held, lengths, heads=1) == pytest.approx(0.8)
    assert sorted(assign(torch.ones(2, 2, dtype=torch.float64), held, lengths, 0.5).tolist()) == [0, 1]
    with pytest.raises(BadInput, match=r"keep=0.4: no assignment of these 2 lines .* the least is 0.5; keep so much"):
        assign(torch.ones(2, 2, dtype=torch.float64), held, lengths, 0.4)
    with pytest.raises(BadInput, match=r"the least is 0.6;"):
        assign(torch.ones(3, 2, dtype=torch.float64), held, lengths, 0.5)


# ---------------------------------------------------------------- the whole search

FAR = "qwertyuiopasdfgh" * 16
SEARCH = Search(0.3, (24, 32), unseen=48, spans=((0, 0.0), (2, 0.0), (20, 0.0), (0, 1.0)), samples=3, sinks=1, every=1)


def settings(search, **changed):
    names = ("keep", "lengths", "at", "spans", "samples", "unseen", "sinks", "every", "seed")
    return {name: getattr(search, name) for name in names} | changed


def test_the_head_that_looks_far_back_gets_the_long_span():
    steps = []
    found = SEARCH.run(handmade.model(), tiny.tokenizer(), FAR, lambda *at: steps.append(at))
    got = {handmade.HEADS[layer][head]: (alpha, beta) for layer, head, alpha, beta in found.lines if layer}
    # earlier copies are 16 tokens back; what the others of its layer see is said to nobody
    assert got["induction"] in ((20, 0.0), (0, 1.0))
    assert found.real == pytest.approx((0, 0, 0), abs=1e-5)
    assert found.predicted == pytest.approx(0, abs=1e-5)
    assert min(found.even) > 0.01 and found.gain[1] > 0
    assert found.surprise[1] == pytest.approx(found.surprise[0], abs=1e-4) and found.surprise[2] > found.surprise[0]
    assert steps == [(n + 1, 12) for n in range(12)]
    table = found.table()
    assert len(table) == 2 * 8 * 4 and table.chosen.sum() == 2 * 8
    assert json.loads(json.dumps(found.record()))["share held"]["48"] <= 0.3


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_caches_hold_the_budget_at_every_length(family):
    """Grouped heads: what real caches hold behind prompts of all lengths, on the mean over the KV heads."""
    model = tiny.model(family)
    search = Search(0.35, (40, 64), unseen=80, samples=1, sinks=2, every=4)
    policy = MixtureOfSpans.fit(model, tiny.tokenizer(), FAR + FAR, **settings(search))
    layers = model.config.num_hidden_layers
    assert [line[:2] for line in policy.spans] == [(layer, head) for layer in range(layers) for head in range(2)]
    assert len({line[2:] for line in policy.spans}) > 1
    for length in (40, 64, 80):
        most = []
        run(model, ids_of(batch=1, length=length), policy, steps=9, after=lambda held: most.append(held_by(held)))
        # between two rounds the cache grows up to the budget, and is not above
        assert 0.25 * length < max(most) <= 0.35 * length, length


def held_by(layers):
    counts = torch.cat([layer.store.length[0] for layer in layers])
    return float(counts.double().mean())


def test_other_lengths_to_hold_the_budget_at():
    lines = torch.tensor(SEARCH.candidates, dtype=torch.float64)
    free = replace(SEARCH, at=(48,), keep=0.4)
    found = free.run(handmade.model(), tiny.tokenizer(), FAR)
    held = entries(lines, torch.tensor([24, 48]), free.budget)[:, list(found.chosen)].double().mean(1)
    assert held[1] / 48 <= 0.4 and found.share(48) == pytest.approx(float(held[1]) / 48)
    assert free.held_at == (48,) and SEARCH.held_at == (24, 32, 48)


def test_the_same_seed_gives_the_same_lines():
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    search = Search(0.35, (32,), unseen=40, samples=1, sinks=2, every=4)
    found = [replace(search, seed=seed).run(model, tokenizer, FAR) for seed in (0, 0, 1)]
    assert found[0].lines == found[1].lines
    assert torch.equal(found[0].profile, found[1].profile)
    # another seed draws other texts
    assert not torch.equal(found[0].profile, found[2].profile)
    fit = MixtureOfSpans.fit(model, tokenizer, FAR, **settings(search))
    assert fit.spans == found[0].lines


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"keep": 0.0}, "keep=0.0: give a mean share"),
        ({"lengths": ()}, r"lengths=\(\): give lengths"),
        ({"lengths": (24, 24)}, "none twice"),
        ({"unseen": 32}, "not among the profiled 24 and 32"),
        ({"at": ()}, r"at=\(\): give lengths"),
        ({"samples": 0}, "samples=0: give 1 or more"),
        ({"sinks": -1}, "sinks=-1: give 0 or more"),
        ({"spans": ()}, "nothing to choose from"),
        ({"spans": ((0.0, 1.5),)}, r"\(0.0, 1.5\) is no line"),
        ({"keep": 0.05}, r"keep=0.05: no assignment of these 4 lines .* the least is 0.08"),
        ({"unseen": 65}, "GPT2LMHeadModel reads 64 tokens"),
        ({"unseen": 2048}, "GPT2LMHeadModel reads 64 tokens"),
    ],
)
def test_settings_that_cannot_be_are_refused(changed, says):
    with pytest.raises(BadInput, match=says):
        MixtureOfSpans.fit(handmade.model(), tiny.tokenizer(), FAR, **settings(SEARCH, **changed))


def test_a_short_text_is_refused():
    with pytest.raises(BadInput, match=r"a text of 100 tokens is too short .* give one of 192 or more"):
        SEARCH.run(handmade.model(), tiny.tokenizer(), FAR[:100])


@pytest.mark.skipif(os.name != "posix", reason="the C library has another name")
def test_what_the_solver_prints_is_not_heard(capfd):
    """HiGHS prints a line from C at times, which would spoil what `--json` prints."""
    print("before")
    with unheard():
        ctypes.CDLL(None).puts(b"from C")
        os.write(1, b"at once")
    print("behind")
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr().out == "before\nbehind\n"


def test_a_solver_without_standard_output(monkeypatch):
    """A program whose standard output is closed gets its answer as well."""

    def closed(fd):
        raise OSError

    monkeypatch.setattr(os, "dup", closed)
    losses = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    assert assign(losses, torch.tensor([[1, 5]]), (10,), 0.5).tolist() == [1]
