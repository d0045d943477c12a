"""Training probes: what the tasks ask, what the models are, and that an interruption changes nothing about a run."""

from __future__ import annotations

import json
import math
import os
import queue
import subprocess
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

import foveate
from foveate.core.errors import BadInput, BadParameter, Diverged, FoveateError, UnknownName
from foveate.core.rule import Rule
from foveate.report import charts
from foveate.report.training import page, points_of
from foveate.training import (
    Backcopy,
    Characters,
    Copying,
    Decoder,
    Experiment,
    GatedConvolution,
    Induction,
    Mqar,
    Optimisation,
    Run,
    Size,
    find_task,
    task_names,
    train,
    usual,
)
from foveate.training import loop as loops
from foveate.training.convolution import convolved
from foveate.training.experiment import mean, rows, to_json
from foveate.training.loop import rate, settled
from foveate.training.mixers import operator
from foveate.training.run import differences
from foveate.training.task import NOT_ASKED, Batch, doubled
from foveate.training.tasks.backcopy import bigrams
from foveate.training.tasks.characters import encoded
from foveate.training.workers import labour, side_by_side

SMALL = Mqar(length=16, pairs=2, tokens=32)
LETTERS = "the cat sat on the mat; a dog dug at dawn. " * 40


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def a_run(mixer="softmax", task=SMALL, steps=12, **more):
    size = more.pop("size", Size(width=8))
    return Run(task, mixer, size, Optimisation(steps=steps, batch=4, rate=0.01), judged=8, threads=1, **more)


def a_model(mixer="softmax", task=SMALL, seed=0, **size):
    torch.manual_seed(seed)
    return Decoder(task.vocabulary, Size(**{"width": 8, **size}), operator(mixer, task))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# ---------------------------------------------------------------- tasks


def test_the_tasks_are_the_files():
    assert task_names() == ["backcopy", "characters", "copying", "induction", "mqar"]
    assert find_task("mqar") is Mqar and Mqar().name == "mqar"
    with pytest.raises(UnknownName, match="no training probe is called 'mqra'; did you mean 'mqar'"):
        find_task("mqra")


def test_every_key_of_mqar_is_asked_once_and_answered_by_its_value():
    task = Mqar(length=24, pairs=3, tokens=20, fewest=3)
    batch = task.batch(draw(), 50)
    assert batch.inputs.shape == (50, 24)
    for x, y in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        value = dict(zip(x[0:6:2], x[1:6:2], strict=True))
        assert len(value) == len(set(value.values())) == 3
        assert all(1 <= key < 10 <= value[key] < 20 for key in value)
        asked = [n for n in range(24) if y[n] != NOT_ASKED]
        assert sorted(x[n] for n in asked) == sorted(value)
        assert all(n >= 6 and n % 2 == 0 and value[x[n]] == y[n] for n in asked)
        assert not any(x[n] for n in range(6, 24) if n not in asked)
    noisy = replace(task, noise=True).batch(draw(), 50)
    assert (noisy.inputs[:, 6:] > 0).float().mean() > 0.8


def test_easy_sequences_have_fewer_pairs_and_are_not_judged(monkeypatch):
    task = Mqar(length=24, pairs=3, tokens=20)
    batch = task.batch(draw(), 300)
    asked = (batch.targets != NOT_ASKED).sum(1)
    assert asked.unique().tolist() == [1, 2, 3] and asked.float().mean() == pytest.approx(2, abs=0.15)
    # a key is there twice or not at all
    for x, n in zip(batch.inputs, asked, strict=True):
        assert (x > 0).sum() == 3 * n and ((x > 0) & (x < 10)).sum() == 2 * n
    seen = []

    def answers(self, batch):
        seen.extend((batch.targets != NOT_ASKED).sum(1).unique().tolist())
        return torch.zeros(1), torch.ones(1, dtype=torch.bool)

    monkeypatch.setattr(Decoder, "answers", answers)
    task.judge(a_model(task=task), draw(), 50)
    assert seen == [3]


def test_near_gaps_are_likelier_by_the_power_law():
    task = Mqar(length=10, pairs=1, tokens=8, power=0.2)
    at = (task.batch(draw(), 20_000).targets != NOT_ASKED).float().argmax(1)
    share = torch.bincount((at - 2) // 2, minlength=4) / 20_000
    law = torch.tensor([n**-0.8 for n in (1.0, 2.0, 3.0, 4.0)])
    assert torch.allclose(share, law / law.sum(), atol=0.015)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"length": 14, "pairs": 4}, "give length=16"),
        ({"length": 17, "pairs": 4}, "length must be even"),
        ({"pairs": 16, "tokens": 32}, "give tokens=34"),
        ({"fewest": 5}, "fewest must be at most pairs"),
        ({"power": 0.0}, "power must be from 0.0001 to 1.0"),
    ],
)
def test_mqar_that_cannot_be(wrong, says):
    with pytest.raises(BadParameter, match=says):
        Mqar(**wrong)


def test_triggers_copy_from_behind_and_all_else_follows_the_bigrams():
    task = Backcopy(length=40, triggers=2, tokens=8, text=LETTERS)
    p, triggers = task.law
    batch = task.batch(draw(), 30)
    whole = torch.cat([batch.inputs, batch.targets[:, -1:]], 1).tolist()
    marked = set(triggers.tolist())
    for x in whole:
        assert x[0] == 8 and x[1] not in marked
        for before, now, after in zip(x, x[1:], x[2:], strict=False):
            if now in marked:
                assert after == before and after not in marked
            else:
                assert p[now, after] > 0


def test_the_bigrams_are_those_of_the_text():
    text = "abcabda "
    p, triggers = bigrams(text, 5, 1)
    known = {c: n for n, c in enumerate(" abcd")}
    assert triggers.tolist() == [known["a"]]
    assert p.shape == (6, 6) and torch.allclose(p.sum(1), torch.ones(6, dtype=torch.float64))
    assert p[known["a"], known["b"]] == 2 / 3 and p[known["a"], known[" "]] == 1 / 3
    assert p[known["b"]].tolist() == [0, 0, 0, 0.5, 0.5, 0]
    # behind the begin: what is no trigger, as often as it occurs
    assert torch.allclose(p[5], torch.tensor([1, 0, 2, 1, 1, 0], dtype=torch.float64) / 5)
    with pytest.raises(BadInput, match="has 2 different characters; 3 triggers need"):
        bigrams("abab", 64, 3)


def test_a_copied_string_is_the_string():
    task = Copying(shortest=2, most=5, letters=3)
    begin, bar, end, padding = 3, 4, 5, 6
    batch = task.batch(draw(), 60)
    whole = torch.cat([batch.inputs, batch.targets.new_full((60, 1), padding)], 1)
    whole[:, -1] = torch.where(batch.targets[:, -1] == NOT_ASKED, padding, batch.targets[:, -1])
    sizes = set()
    for x, y in zip(whole.tolist(), batch.targets.tolist(), strict=True):
        n = x.index(bar) - 1
        sizes.add(n)
        assert x[: 2 * n + 3] == [begin, *x[1 : n + 1], bar, *x[1 : n + 1], end]
        assert set(x[2 * n + 3 :]) <= {padding} and max(x[1 : n + 1]) < 3
        assert y == [NOT_ASKED] * (n + 1) + [*x[1 : n + 1], end] + [NOT_ASKED] * (len(y) - 2 * n - 2)
    assert sizes == {2, 3, 4, 5}
    with pytest.raises(BadParameter, match="shortest must be at most most"):
        Copying(shortest=9, most=8)


def test_strings_are_judged_by_their_characters_and_as_a_whole(monkeypatch):
    task, seen = Copying(shortest=2, most=5, letters=3, longer=2), []

    def answers(self, batch):
        right = torch.ones(batch.targets.shape, dtype=torch.bool)[batch.targets != NOT_ASKED].view(4, -1)
        seen.append(right.shape[1] - 1)
        # one letter of one string, and the end of all, which is no letter
        right[0, 0] = right[:, -1] = False
        return right.float().flatten(), right.flatten()

    monkeypatch.setattr(Decoder, "answers", answers)
    found = {(m.name, m.at): m.value for m in task.judge(a_model(task=task), draw(), 4)}
    assert seen == [5, 10]
    assert found["right", 5] == 19 / 20 and found["right", 10] == 39 / 40
    assert found["whole", 5] == found["whole", 10] == 3 / 4


def test_what_follows_the_token_that_stands_out_is_asked_for():
    task = Induction(length=13, tokens=5, times=3)
    batch = task.batch(draw(), 60)
    for x, y in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        at = [n for n in range(13) if x[n] == 5]
        assert len(at) == 3 and at[-1] == 12
        assert x[at[1] + 1] == x[at[0] + 1] < 5
        assert y == [x[at[0] + 1] if n in at[1:] else NOT_ASKED for n in range(13)]
    with pytest.raises(BadParameter, match="give length=10 or more"):
        Induction(length=9, times=5)


def test_induction_is_judged_at_every_length(monkeypatch):
    task, seen = Induction(length=12, tokens=5, times=3, longer=4), []

    def answers(self, batch):
        seen.append(batch.inputs.shape)
        return torch.zeros(4), torch.tensor([True, False, True, True])

    monkeypatch.setattr(Decoder, "answers", answers)
    found = {m.at: m.value for m in task.judge(a_model(task=task), draw(), 2)}
    assert seen == [(2, 12), (2, 24), (2, 48)] and found == {12: 0.75, 24: 0.75, 48: 0.75}


def test_rare_characters_are_one_token():
    ids, many = encoded("aab-abc", 2)
    assert many == 3 and ids.tolist() == [0, 0, 1, 2, 0, 1, 2]


def test_a_character_model_never_trains_on_what_it_is_judged_by():
    text = "a" * 900 + "b" * 100
    task = Characters(length=8, longer=4, text=text)
    train_on, judge_by = task.parts()
    assert len(train_on) == 900 and set(judge_by.tolist()).isdisjoint(train_on.tolist())
    batch = Characters(length=8, longer=4, text=LETTERS).batch(draw(), 500)
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    # the last training character can be a target, what is held out never
    assert task.batch(draw(), 2000).targets.unique().tolist() == [encoded(text)[0][0].item()]
    with pytest.raises(BadInput, match="windows of 1,025 need a text of 10,261"):
        Characters(text="short")


@torch.no_grad()
def test_one_pass_over_long_windows_is_the_loss_at_every_length():
    task = Characters(length=8, longer=4, text=LETTERS)
    model = a_model(task=task, heads=2).eval()
    found = {(m.name, m.at): m.value for m in task.judge(model, draw(), 3)}
    ids = task.parts()[1]
    for length in (8, 16, 32):
        windows = torch.stack([ids[at : at + length + 1] for at in (0, 32, 64)])
        loss = model.answers(Batch(windows[:, :-1], windows[:, 1:]))[0].view(3, length)
        assert found["loss", length] == pytest.approx(loss.mean().item(), rel=1e-5)
        assert found["late_loss", length] == pytest.approx(loss[:, -8:].mean().item(), rel=1e-5)


def test_lengths_are_doubled():
    assert doubled(64, 16) == [64, 128, 256, 512, 1024]
    assert doubled(5, 1) == [5] and doubled(5, 3) == [5, 10]


# ---------------------------------------------------------------- models


def test_the_convolution_is_the_sum_written_out():
    torch.manual_seed(0)
    z, taps = torch.randn(2, 3, 9, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    dense = torch.zeros_like(z)
    for t in range(9):
        for s in range(min(5, t + 1)):
            dense[..., t] += taps[:, s] * z[..., t - s]
    assert torch.allclose(convolved(z, taps), dense)


def test_the_gated_convolution_by_hand():
    torch.manual_seed(0)
    attention = foveate.nn.Attention(4, 1, rule=GatedConvolution(6)).double()
    inner, x = attention.rule.learned, torch.randn(1, 8, 4, dtype=torch.float64)
    with torch.no_grad():
        inner.skip.normal_()
        u = x[0] @ inner.inward.weight.T + inner.inward.bias
        c, b = inner.short.weight[:, 0], inner.short.bias
        mixed = torch.stack([b + sum(c[:, 2 - s] * u[t - s] for s in range(3) if t >= s) for t in range(8)])
        x1, x2, v = mixed.chunk(3, 1)
        z = x1 * v
        y = torch.stack([sum(inner.filter[:, s] * z[t - s] for s in range(6) if t >= s) for t in range(8)])
        out = (x2 * (y + inner.skip * z)) @ inner.outward.weight.T + inner.outward.bias
    assert torch.allclose(attention(x)[0], out)


def test_the_gated_convolution_is_causal_padded_and_cached():
    from transformers import DynamicCache

    torch.manual_seed(0)
    attention = foveate.nn.Attention(4, 1, rule=GatedConvolution(6))
    x = torch.randn(2, 11, 4)
    whole = attention(x)
    later = x.clone()
    later[:, 7:] = torch.randn(2, 4, 4)
    assert torch.allclose(attention(later)[:, :7], whole[:, :7], atol=1e-6)
    cache = DynamicCache()
    parts = [attention(x[:, a:b], cache=cache) for a, b in ((0, 4), (4, 5), (5, 11))]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-6)
    padded = torch.cat([torch.full((2, 3, 4), torch.nan), x], 1)
    mask = torch.arange(14) >= 3
    assert torch.allclose(attention(padded, mask=mask.expand(2, -1))[:, 3:], whole, atol=1e-6)
    with pytest.raises(BadInput, match="causal by its nature"):
        foveate.nn.Attention(4, 1, rule=GatedConvolution(6), causal=False)


@torch.no_grad()
def test_only_what_is_asked_is_answered():
    model, batch = a_model().eval(), SMALL.batch(draw(), 5)
    loss, right = model.answers(batch)
    asked = batch.targets != NOT_ASKED
    logits = model(batch.inputs) @ model.embedding.weight.T
    assert torch.allclose(loss, -logits[asked].log_softmax(-1).gather(1, batch.targets[asked][:, None])[:, 0])
    assert torch.equal(right, logits[asked].argmax(-1) == batch.targets[asked])


@torch.no_grad()
def test_the_short_convolution_by_hand():
    block, x = a_model(taps=3).blocks[0], torch.randn(1, 5, 8, generator=draw())
    u, c = block.attention_norm(x)[0], block.short.weight[:, 0]
    before = torch.stack([sum(c[:, 2 - s] * u[t - s] for s in range(3) if t >= s) for t in range(5)])
    assert torch.allclose(block.read(x)[0], u + before + block.short.bias, atol=1e-6)


def test_a_model_starts_small_and_smaller_where_it_writes():
    model = a_model(width=128, feed_forward=2)
    for block in model.blocks:
        attention, feed_forward = block.attention, block.feed_forward
        assert not attention.v_proj.bias.any() and not attention.o_proj.bias.any()
        for p in (attention.q_proj.weight, attention.v_proj.weight, feed_forward[1].weight):
            assert p.std().item() == pytest.approx(0.02, rel=0.05)
        # two parts of each of two layers add to the residual stream
        for p in (attention.o_proj.weight, feed_forward[3].weight):
            assert p.std().item() == pytest.approx(0.01, rel=0.05)


@torch.no_grad()
def test_what_a_size_says_is_there():
    ids = torch.randint(32, (1, 9), generator=draw())
    shuffled = torch.cat([ids[:, torch.tensor([3, 1, 0, 2, 6, 4, 7, 5])], ids[:, -1:]], 1)
    # without positions, one layer sees a set of tokens
    model = a_model(rope=0.0, layers=1).eval()
    assert torch.allclose(model(ids)[:, -1], model(shuffled)[:, -1], atol=1e-6)
    model = a_model(layers=1).eval()
    assert not torch.allclose(model(ids)[:, -1], model(shuffled)[:, -1], atol=1e-6)
    model = a_model(feed_forward=2).eval()
    stages = dict(model.stages(ids))
    part = model.blocks[1].feed_forward(stages["layer 1, attention"])
    assert torch.equal(stages["layer 1, feed-forward"], stages["layer 1, attention"] + part) and part.any()


def test_positions_that_are_learnt_have_an_end():
    model = a_model(places=16, rope=0.0)
    assert model(torch.zeros(1, 16, dtype=torch.long)).shape == (1, 16, 8)
    with pytest.raises(BadInput, match=r"has learnt 16 positions and the sequence has 17; give Size\(places=0\)"):
        model(torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize("mixer", ["softmax", "relu", "gated_convolution"])
def test_no_model_sees_what_comes_later(mixer):
    model, ids = (
        a_model(mixer, heads=2, feed_forward=2, taps=3, places=12).eval(),
        torch.randint(32, (2, 12), generator=draw()),
    )
    other = ids.clone()
    other[:, 8:] = (other[:, 8:] + 1) % 32
    assert torch.allclose(model(ids)[:, :8], model(other)[:, :8], atol=1e-5)
    assert not torch.allclose(model(ids)[:, 8:], model(other)[:, 8:], atol=1e-5)


def test_bytes_of_state_are_those_of_a_cache():
    assert a_model().state_bytes(16) == 2 * 2 * 8 * 16 * 4
    assert a_model(heads=4, kv_heads=1).state_bytes(16) == 2 * 2 * 2 * 16 * 4
    assert a_model(taps=3).state_bytes(16) == 2 * (2 * 8 * 16 + 2 * 8) * 4
    # the inputs of two taps for three maps, and what all taps of the long filter but the newest reach
    assert a_model("gated_convolution").state_bytes(16) == 2 * 4 * 8 * (3 * 2 + 15)
    assert a_model("gated_convolution").state_bytes(100) == 2 * 4 * 8 * (3 * 2 + 15)


# ---------------------------------------------------------------- runs


class Stop(Exception):
    pass


def stopping(at):
    def tell(step, loss):
        if step == at:
            raise Stop

    return tell


@dataclass(frozen=True)
class Noisy(Rule):
    """Draws in training, as sampling rules do."""

    def normalise(self, block, scores):
        p = super().normalise(block, scores)
        return p * (torch.rand_like(p) > 0.2) if block.view.training else p


@dataclass(frozen=True)
class Drawn(Rule):
    """Learns a number that a loss of its own draws to 1."""

    def learned(self, sizes):
        return torch.nn.ParameterDict({"n": torch.zeros(1)})

    def loss(self, rows):
        return (rows.view.learned["n"] - 1).square().sum()


@dataclass(frozen=True)
class Unlucky(Rule):
    """Goes wrong in one layer where a number that it draws is large."""

    def finish(self, view, out):
        drawn = torch.rand(())
        return out * torch.nan if view.training and view.layer.index == 1 and drawn > 0.8 else out


@dataclass(frozen=True)
class Spoilt(Rule):
    """Goes wrong in one layer from the fifth step on, in its output or in its gradient alone."""

    forward: bool = True
    steps: ClassVar[list] = []

    def finish(self, view, out):
        if view.layer.index != 1 or not view.training:
            return out
        self.steps.append(0)
        if len(self.steps) <= 4:
            return out
        return out * (torch.nan if self.forward else 1 + (out - out).sqrt())


def with_rule(monkeypatch, rule):
    monkeypatch.setattr(loops, "operator", lambda spec, task: rule)


@pytest.mark.parametrize("mixer", ["softmax", "relu", "gated_convolution", "noisy"])
@pytest.mark.parametrize("at", [1, 7])
def test_an_interrupted_run_gives_the_same_numbers(tmp_path, monkeypatch, mixer, at):
    if mixer == "noisy":
        with_rule(monkeypatch, Noisy())
    run = a_run(mixer, every=5)
    whole = train(run)
    with pytest.raises(Stop):
        train(run, tmp_path, stopping(at))
    # what the caller draws in between is the caller's own
    torch.manual_seed(99)
    steps = []
    again = train(run, tmp_path, lambda step, loss: steps.append(step))
    # a part is two steps here, and what had not been kept is done again
    assert steps == list(range(at // 2 * 2 + 1, 13))
    assert same(whole.model, again.model)
    assert whole.measures == again.measures and whole.losses == again.losses
    assert [m.step for m in whole.measures] == [5, 5, 10, 10, 12, 12]
    # a run that has ended is read, not trained
    ended = train(run, tmp_path, stopping(1))
    assert same(whole.model, ended.model) and ended.measures == whole.measures


def test_a_run_leaves_random_numbers_and_threads_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    threads = torch.get_num_threads()
    with settled(replace(a_run(), threads=2)):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == threads
    train(a_run(steps=2))
    assert torch.equal(torch.rand(1), expected)


def test_measuring_moves_nothing():
    assert same(train(a_run(every=1)).model, train(a_run()).model)


def test_seeds_differ_and_nothing_else_does():
    torch.manual_seed(5)
    one = train(a_run(seed=1, steps=3)).model
    torch.manual_seed(6)
    assert same(one, train(a_run(seed=1, steps=3)).model)
    assert not same(train(a_run(seed=1, steps=3)).model, train(a_run(steps=3)).model)


def test_each_seed_trains_and_is_judged_on_sequences_of_its_own(monkeypatch):
    drawn = []
    monkeypatch.setattr(Mqar, "judge", lambda self, model, draw, count: drawn.append(draw.initial_seed()) or [])
    for seed in (0, 1):
        run = a_run(seed=seed)
        with settled(run):
            training = loops.Training(run)
            drawn.append(training.draw.initial_seed())
            training.judged()
    assert len(set(drawn)) == 4


def test_a_step_follows_the_settings():
    run = replace(a_run(), optimisation=Optimisation(steps=4, batch=4, rate=0.5, warmup=0.5, decay=0.25))
    with settled(run):
        training = loops.Training(run)
        for n in range(4):
            training.step()
            training.done += 1
            (group,) = training.optimiser.param_groups
            assert (group["lr"], group["weight_decay"]) == (rate(run.optimisation, n), 0.25)


def test_a_model_is_judged_as_it_is_used_and_trained_on_as_before(monkeypatch):
    modes = []
    step, judge = Decoder.loss, Mqar.judge
    monkeypatch.setattr(Decoder, "loss", lambda self, batch: (modes.append(self.training), step(self, batch))[1])
    monkeypatch.setattr(Mqar, "judge", lambda self, m, *a: (modes.append(m.training), judge(self, m, *a))[1])
    train(a_run(steps=2, every=1))
    assert modes == [True, False, True, False]


def test_losses_are_means_over_parts():
    told = []
    losses = train(a_run(steps=13), tell=lambda step, loss: told.append(loss)).losses
    # the last of seven parts is one step
    want = [sum(told[n : n + 2]) / len(told[n : n + 2]) for n in range(0, 13, 2)]
    assert losses == pytest.approx(want, rel=1e-9)


def test_all_mixers_see_the_same_sequences():
    found = []
    for mixer in ("softmax", "gated_convolution"):
        with settled(a_run(mixer)):
            training = loops.Training(a_run(mixer))
            found.append(SMALL.batch(training.draw, 4).inputs)
    assert torch.equal(*found)


def test_other_settings_are_refused_by_name(tmp_path):
    with pytest.raises(Stop):
        train(a_run(), tmp_path, stopping(6))
    other = replace(a_run(seed=4), optimisation=Optimisation(steps=12, batch=4, rate=0.02))
    with pytest.raises(BadInput, match=r"rate was 0.01 and is 0.02; seed was 0 and is 4\. Give the same settings"):
        train(other, tmp_path)
    with pytest.raises(BadInput, match=r"pairs was 2 and is 'nothing'; .*task was 'mqar' and is 'induction'"):
        train(replace(a_run(), task=Induction(length=16, tokens=32)), tmp_path)
    file = tmp_path / "checkpoint.json"
    file.write_text(file.read_text().replace(torch.__version__, "1.0"))
    with pytest.raises(BadInput, match=r"torch was '1\.0' and is"):
        train(a_run(), tmp_path)


@pytest.mark.parametrize("damage", ["index", "tensors", "gone", "half"])
def test_a_damaged_checkpoint_is_not_read(tmp_path, damage):
    with pytest.raises(Stop):
        train(a_run(), tmp_path, stopping(6))
    (file,) = tmp_path.glob("*.safetensors")
    index = tmp_path / "checkpoint.json"
    if damage == "index":
        index.write_text("{")
    elif damage == "tensors":
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "gone":
        file.unlink()
    else:
        index.write_text(json.dumps({"step": 6}))
    with pytest.raises(BadInput, match=r"is no whole checkpoint .*; delete .* to start that run again"):
        train(a_run(), tmp_path)


def test_one_checkpoint_is_kept_and_a_half_written_one_is_never_read(tmp_path):
    whole = train(a_run())
    with pytest.raises(Stop):
        train(a_run(), tmp_path, stopping(9))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.json", "step-8.safetensors"]
    # interrupted while the next one was being written
    (tmp_path / "step-10.safetensors").write_bytes(b"half")
    (tmp_path / "checkpoint.json.part").write_text("{")
    index = tmp_path / "checkpoint.json"
    kept = json.loads(index.read_text())
    kept["notes"]["seconds"] = 1000.0
    index.write_text(json.dumps(kept))
    again = train(a_run(), tmp_path)
    assert same(again.model, whole.model)
    # what has been spent counts, and the time in between does not
    assert 1000 < again.seconds < 1000 + 600


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
    Spoilt.steps.clear()
    with_rule(monkeypatch, Spoilt())
    says = (
        r"width 8, seed 0\) stopped at step 5: the loss is nan, first in layer 1, attention; the last good checkpoint"
    )
    with pytest.raises(Diverged, match=says) as caught:
        train(a_run("relu"), tmp_path)
    assert f"of step 4, is in {tmp_path}. A lower learning rate than 0.01" in str(caught.value)
    kept = load_file(tmp_path / "step-4.safetensors")
    assert all(t.isfinite().all() for t in kept.values() if t.is_floating_point())
    # from there it goes on, and four steps later meets the same
    Spoilt.steps.clear()
    with pytest.raises(Diverged, match="stopped at step 9"):
        train(a_run("relu"), tmp_path)


def test_what_went_wrong_by_chance_is_found_where_it_was(monkeypatch):
    with_rule(monkeypatch, Unlucky())
    with pytest.raises(Diverged, match="the loss is nan, first in layer 1, attention"):
        train(a_run("relu", steps=100))


def test_a_gradient_that_is_no_number_stops_the_run(monkeypatch):
    Spoilt.steps.clear()
    with_rule(monkeypatch, Spoilt(forward=False))
    says = r"the gradient is no number, first in layer 1, gradient of attention\.v_proj\.bias; no checkpoint had been"
    with pytest.raises(Diverged, match=says):
        train(a_run())


def test_the_rules_own_loss_is_trained_on(monkeypatch):
    with_rule(monkeypatch, Drawn())
    model = train(a_run()).model
    assert all(block.attention.rule.learned["n"].item() > 0.03 for block in model.blocks)


def test_the_rate_rises_and_falls():
    o = Optimisation(steps=100, rate=0.5, warmup=0.1)
    rates = [rate(o, step) for step in range(100)]
    assert rates[:10] == sorted(rates[:10]) and rates[0] == pytest.approx(0.5 / 11)
    assert rates[10] == 0.5 and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.25) and 0 < rates[99] < 0.001
    assert rate(Optimisation(steps=1, rate=0.5, warmup=0.0), 0) == 0.5


def test_sizes_that_do_not_divide():
    with pytest.raises(BadParameter, match="width must be a multiple of heads"):
        Size(width=10, heads=4)
    with pytest.raises(BadParameter, match="heads must be a multiple of kv_heads"):
        Size(width=12, heads=4, kv_heads=3)


def test_a_model_learns():
    run = Run(
        Copying(shortest=2, most=4, letters=4, longer=1),
        size=Size(width=32),
        optimisation=Optimisation(steps=150, batch=32, rate=0.01),
        judged=64,
        threads=1,
    )
    found = train(run)
    assert found.losses[-1] < 0.5 < 1.3 < found.losses[0]
    assert {m.name: m.value for m in found.measures}["right"] > 0.8


def test_backcopy_measures_each_thing_by_hand():
    task = Backcopy(length=12, triggers=2, tokens=6, text=LETTERS)
    run = Run(
        task,
        size=Size(width=8, layers=1, heads=2, feed_forward=2),
        optimisation=Optimisation(steps=3),
        judged=8,
        threads=1,
    )
    trained = train(run)
    model, found = trained.model.eval(), {m.name: m.value for m in trained.measures}
    with torch.no_grad():
        batch = task.batch(torch.Generator().manual_seed(loops.JUDGED), 8)
        block = model.blocks[0]
        before = block.attention_norm(model.embedding(batch.inputs))
        weights, values = block.attention.weights(before), block.attention.view(before).v
        at = torch.isin(batch.inputs, task.law[1])
        others = ~at & (torch.arange(12) > 0)
        sinks = [weights[:, h, :, 0][others].mean().item() for h in range(2)]
        best = sinks.index(max(sinks))
        assert found["sink"] == pytest.approx(max(sinks), rel=1e-5)
        assert found["sink_at_triggers"] == pytest.approx(weights[:, best, :, 0][at].mean().item(), rel=1e-5)
        norms = values[:, best].norm(dim=-1)
        assert found["value_drain"] == pytest.approx((norms[:, 0] / norms[:, 1:].mean(1)).mean().item(), rel=1e-5)
        *_, (_, last), _ = model.stages(batch.inputs)
        norms = last.norm(dim=-1)
        assert found["residual_peak"] == pytest.approx((norms[:, 0] / norms[:, 1:].mean(1)).mean().item(), rel=1e-5)
        loss = model.answers(batch)[0].view(8, 12)
        assert found["copy_loss"] == pytest.approx(loss[at].mean().item(), rel=1e-5)
        own = -task.law[0][batch.inputs, batch.targets].log()
        assert found["excess"] == pytest.approx((loss - own)[others].mean().item(), rel=1e-4)
    convolution = replace(run, mixer="gated_convolution")
    assert {m.name for m in train(convolution).measures} == {"copy_loss", "excess", "residual_peak"}


# ---------------------------------------------------------------- experiments


def an_experiment(mixers=("softmax", "relu"), seeds=2, **more):
    return Experiment(tuple(a_run(m, seed=s, steps=4, **more) for s in range(seeds) for m in mixers))


def test_what_has_been_done_is_not_done_again(tmp_path, monkeypatch):
    experiment = an_experiment()
    whole = experiment.carry_out()
    done = experiment.open(tmp_path)

    def tell(run, step, loss):
        if (run.mixer, run.seed, step) == ("softmax", 1, 3):
            raise Stop

    with pytest.raises(Stop):
        experiment.carry_out(tmp_path, done, tell)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2
    with pytest.raises(BadInput, match="has results already; go on with --resume"):
        experiment.open(tmp_path)
    with pytest.raises(BadInput, match=r"other settings: mixer was \['softmax', 'relu'\] and is 'softmax'"):
        an_experiment(("softmax",)).open(tmp_path, resume=True)
    trained = []
    monkeypatch.setattr("foveate.training.experiment.train", lambda run, *a: (trained.append(run), train(run, *a))[1])
    again = experiment.carry_out(tmp_path, experiment.open(tmp_path, resume=True))
    assert [(run.mixer, run.seed) for run in trained] == [("softmax", 1), ("relu", 1)]
    for a, b in zip(whole, again, strict=True):
        assert a.run == b.run and a.result["measures"] == b.result["measures"]
    assert [p.name for p in (tmp_path / "runs" / "relu-width-8-seed-1").iterdir()] == ["model.safetensors"]
    model = load_file(tmp_path / "runs" / "relu-width-8-seed-1" / "model.safetensors")
    assert all(torch.equal(model[n], t) for n, t in train(trained[1]).model.state_dict().items())


def test_a_run_that_fails_does_not_stop_the_others(monkeypatch):
    Spoilt.steps.clear()
    monkeypatch.setattr(loops, "operator", lambda spec, task: Spoilt() if spec == "relu" else operator(spec, task))
    experiment = Experiment(tuple(a_run(m, steps=6) for m in ("relu", "softmax")))
    outcomes = experiment.carry_out()
    assert "stopped at step 5" in outcomes[0].result["failed"] and not outcomes[1].result["failed"]
    failed, good = rows(outcomes)
    assert (failed.mixer, failed.failed, failed.cells) == ("relu", 1, ()) and good.failed == 0
    told = to_json(experiment, outcomes)
    # a single seed has no interval
    assert told["rows"][1]["cells"][0]["low"] is None
    assert "stopped at step 5" in page(told)


def test_side_by_side_gives_the_same_numbers(tmp_path):
    experiment, told = an_experiment(seeds=1), []
    apart = experiment.carry_out(tmp_path, tell=lambda run, step, loss: told.append((run, step)), workers=2)
    for a, b in zip(apart, experiment.carry_out(), strict=True):
        assert a.run == b.run and a.result["measures"] == b.result["measures"]
    # the first step is told by the process, the last when the run has ended
    assert {(run, step) for run in experiment.runs for step in (1, 4)} <= set(told)


def dies(run, folder, tell):
    os._exit(3)


def fails(run, folder, tell):
    raise BadInput("no good")


def test_a_process_that_dies_is_told():
    with pytest.raises(FoveateError, match=r"died \(exit code 3\)"):
        list(side_by_side(dies, [(a_run(), None)], 1, None))


FAILING = """
from foveate.training.run import Optimisation, Run, Size
from foveate.training.tasks.characters import Characters
from foveate.training.workers import side_by_side


def fails(run, folder, tell):
    raise ValueError("no good")


if __name__ == "__main__":
    task = Characters(length=8, text="ab" * 200_000)
    runs = [(Run(task, "softmax", Size(), Optimisation(), seed, 8), None) for seed in range(4)]
    try:
        list(side_by_side(fails, runs, 1, None))
    except ValueError as e:
        print(e)
"""


def test_nobody_waits_for_what_is_begun_no_more(tmp_path):
    """Models that are still to come, and their texts, do not keep a command that has failed from ending."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout == "no good\n"


def test_what_goes_wrong_in_a_process_comes_back(monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *a: None)
    tasks, found = queue.Queue(), queue.Queue()
    tasks.put((0, a_run(), None))
    tasks.put(None)
    with pytest.raises(TypeError):
        labour(fails, tasks, found)
    n, kind, what = found.get()
    assert (n, kind, str(what)) == (0, "error", "no good")


def test_means_over_seeds_have_t_intervals():
    cell = mean("loss", 8, [1.0, 2.0, 3.0])
    half = 4.302653 * 1.0 / math.sqrt(3)
    assert (cell.value, cell.seeds) == (2.0, 3)
    assert cell.low == pytest.approx(2 - half, abs=1e-5) and cell.high == pytest.approx(2 + half, abs=1e-5)
    assert math.isnan(mean("loss", None, [1.0]).low)


def test_settings_that_differ_are_told():
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": None}) == [
        "b was 2 and is 3",
        "c was 'nothing' and is None",
    ]
    described = Characters(length=8, text=LETTERS).described()
    assert described["text"].startswith("sha256:") and described["task"] == "characters"


def test_the_time_is_that_of_steps_and_measurements(monkeypatch):
    experiment = an_experiment()
    monkeypatch.setattr("foveate.training.experiment.cost", lambda run: {"softmax": 2.0, "relu": 3.0}[run.mixer])
    assert experiment.seconds() == 10.0 and experiment.seconds(workers=2) == 5.0
    assert experiment.seconds(workers=9) == 3.0


def test_the_time_of_a_run_is_that_of_a_few_steps_and_of_a_part_of_a_measurement(monkeypatch):
    # three steps take three seconds, a quarter of a measurement two
    times = iter((0.0, 3.0, 10.0, 12.0))
    monkeypatch.setattr(loops, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    assert loops.cost(a_run(steps=12, every=5)) == 12 * 1 + (1 + 2) * 8


@pytest.mark.parametrize("name", task_names())
@pytest.mark.parametrize("quick", [True, False])
def test_what_is_usual_can_be_built(name, quick):
    experiment = usual(find_task(name), quick=quick)
    assert len(experiment.runs) >= 6 and len(set(experiment.runs)) == len(experiment.runs)
    assert experiment.described()["seed"] == [0, 1, 2]


def test_an_experiment_that_cannot_be(monkeypatch):
    with pytest.raises(UnknownName, match=r"no rule is called 'sofmax'; did you mean 'softmax'.*foveate list"):
        usual(Mqar, ["sofmax"])
    with pytest.raises(BadInput, match="0 seeds"):
        usual(Mqar, seeds=0)
    with pytest.raises(BadInput, match="mqar makes its own sequences and reads no text"):
        usual(Mqar, text=LETTERS)
    with pytest.raises(UnknownName, match="parameter of relu"):
        usual(Mqar, ["relu:bias=1"])
    with pytest.raises(BadInput, match="Agent has no causal form"):
        usual(Mqar, ["agent"])
    made = usual(Characters, text=LETTERS * 10, widths=[16, 32], steps=5, quick=True).described()
    assert made["width"] == [16, 32] and made["steps"] == 5


# ---------------------------------------------------------------- the page


def test_the_page_has_every_run_and_loads_nothing():
    experiment = an_experiment(task=Characters(length=8, longer=2, text=LETTERS))
    told = to_json(experiment, experiment.carry_out())
    json.dumps(told, allow_nan=False)
    told["settings"]["mixer"] = "</script><b>spoilt"
    text = page(told)
    assert "<b>spoilt" not in text and "&lt;b&gt;spoilt" in text
    # the library speaks of addresses that it does not load
    own = text.replace(charts.script().replace("</script", "<\\/script"), "")
    assert len(own) < len(text) / 2 and "http" not in own.replace("http://www.w3.org", "")
    assert text.count('<div id="figure_') == 2 and "softmax, relu" in text
    run = told["runs"][0]
    assert [x for x, _, _ in points_of(run, "loss", "length")] == [8, 16]
    assert [x for x, _, _ in points_of(run, "loss", "bytes")] == [run["state_bytes"]] * 2


def test_of_several_measurements_a_figure_over_bytes_takes_the_last():
    told = to_json(*(lambda e: (e, e.carry_out()))(an_experiment(every=2)))
    run = told["runs"][0]
    assert len(points_of(run, "recall", "bytes")) == 1
    assert [x for x, _, _ in points_of(run, "recall", "step")] == [2, 4]
