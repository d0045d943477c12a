"""Goals, what is proposed for them, the search, the proof, and what a person meets who asks for it."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import foveate
from commands import here
from foveate.compress import GatedHeads, KeyNorm, MixedBits, MixtureOfSpans, Quantised, RetrievalHeads, Streaming
from foveate.core.errors import BadInput, UnknownName
from foveate.core.mechanism import Policy
from foveate.core.plan import Plan
from foveate.core.registry import find
from foveate.finding.reporting import Spread
from foveate.planning import compressing, searching
from foveate.planning.compressing import Compressed, Cost, cache_bytes
from foveate.planning.examining import FOLLOW, Exam, Standing, Value, ratio, split
from foveate.planning.goals import Goal, parse_quality
from foveate.planning.heads import answer_mass
from foveate.planning.proposals import Family, families, fitted, level, named, spared_heads, sparing
from foveate.planning.searching import (
    Candidate,
    Searched,
    Verdict,
    between,
    contenders,
    line_up,
    ordered,
    prove,
    search,
)
from foveate.probe import KeyValue
from foveate.probe.sample import Sample
from foveate.probe.text import tokenised
from foveate.testing import handmade, tiny

GATES = tuple((layer, head, (3 * layer + head) / 10) for layer in range(2) for head in range(3))


# ---------------------------------------------------------------- goals


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "there is no goal"),
        ({"keep": 0.2, "bytes": "1MB"}, "--keep and --bytes contradict"),
        ({"keep": 0.2, "quality": (("ppl", 1.1),)}, "--keep and --quality contradict"),
        ({"keep": 1.0}, "above 0 and below 1"),
        ({"keep": 0.0}, "above 0 and below 1"),
        ({"keep": math.nan}, "above 0 and below 1"),
        ({"bytes": "much"}, "bytes are written 200MB"),
        ({"quality": (("ppl", 0.9),)}, "below 1"),
        ({"quality": (("passkey", 1.1),)}, "at most 1"),
        ({"quality": (("passkey", 0.0),)}, "above 0"),
        ({"quality": (("ppl", 1.1), ("ppl", 1.2))}, "ppl twice"),
    ],
)
def test_goals_that_cannot_be(given, says):
    with pytest.raises((BadInput, foveate.FoveateError), match=says):
        Goal(**given)


def test_a_misspelt_target():
    with pytest.raises(UnknownName, match="passkey"):
        Goal(quality=(("paskey", 0.9),))


def test_targets_are_read():
    assert parse_quality("ppl=1.01, passkey=0.99") == (("ppl", 1.01), ("passkey", 0.99))
    for text in ("ppl", "=1", "ppl=much", ""):
        with pytest.raises(BadInput, match="is no target"):
            parse_quality(text)


def test_bytes_are_a_share_of_the_full_cache():
    assert Goal(bytes="1kB").share(4000, 100) == 0.25
    assert Goal(keep=0.1).share(4000, 100) == 0.1
    assert Goal(quality=(("ppl", 1.1),)).share(4000, 100) is None
    with pytest.raises(BadInput, match="fits already"):
        Goal(bytes="4kB").share(4000, 100)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt_oss", "gpt2"])
def test_bytes_of_a_cache_are_those_of_the_model(family):
    """Where a window leaves a layer less than the text, too."""
    model = tiny.model(family)
    full, per_head = cache_bytes(model, 20)
    with torch.no_grad():
        own = model(torch.ones(1, 20, dtype=torch.long), use_cache=True).past_key_values
    held = [(layer.keys.numel() + layer.values.numel()) * 4 for layer in own.layers]
    assert full == sum(held)
    assert (held[0] < max(held)) == (family in ("gemma3", "gpt_oss"))
    assert per_head(Quantised()) < per_head(None) == 4 * 2 * own.layers[0].keys.shape[3]


# ---------------------------------------------------------------- the text


def test_what_is_proved_on_was_not_searched_on():
    ids = list(range(4000))
    search, held_out = split(ids, 500)
    assert len(search) == 4 and len(held_out) == 8
    predicted = [set(text[-FOLLOW:]) for text in (*search, *held_out)]
    assert all(len(text) == 500 + FOLLOW for text in (*search, *held_out))
    assert len(set().union(*predicted)) == 12 * FOLLOW
    assert max(max(text) for text in search) < 2000 <= min(min(text) for text in held_out)
    # as few as there can be
    least = split(list(range(2 * (500 + 2 * FOLLOW))), 500)
    assert [len(part) for part in least] == [2, 2]


def test_every_stretch_begins_as_texts_do():
    tokenizer = tiny.tokenizer()
    assert tokenised(tokenizer, "abc") == (tokenizer("abc")["input_ids"], [])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    ids, front = tokenised(tokenizer, "abc" * 1000)
    assert front == [1] and len(ids) == 3000
    for part in split(ids, 300, front):
        assert all(len(text) == 300 + FOLLOW and text[0] == 1 and 1 not in text[1:] for text in part)


def test_a_text_too_short_to_hold_some_out():
    with pytest.raises(BadInput, match=r"1,511 tokens.*takes 1,512; plan for shorter ones with --tokens 499"):
        split(list(range(1511)), 500)
    with pytest.raises(BadInput, match="give a longer one"):
        split(list(range(300)), 500)


# ---------------------------------------------------------------- proposals


def size_of(store):
    """Bytes of an entry."""
    return 100 if store is None else 30


def test_the_heads_of_largest_gate_are_spared():
    # six heads of 100 tokens, 40 % of them, 10 for each: what is left is room for one more head and a bit
    chosen = spared_heads(GATES, 0.4 * 1.05, 100, 10)
    assert chosen == ((1, 1, 0.4), (1, 2, 0.5))
    policy = sparing(KeyNorm(), GATES, 0.4 * 1.05, 100, 10, sinks=1, every=0)
    seen = torch.tensor([100])
    counts = torch.cat([policy.counts(seen, layer, 2, 3, 64) for layer in range(2)], 1)
    assert counts.tolist() == [[10, 10, 10, 10, 100, 100]]
    assert counts.sum() <= 0.4 * 600
    with pytest.raises(BadInput, match=r"the least is 10\.5%"):
        spared_heads(GATES, 0.08, 100, 10)
    with pytest.raises(BadInput, match="rest=16"):
        sparing(KeyNorm(), GATES, 0.9, 100, 16)


def test_what_is_proposed():
    def fit(name, share):
        return Streaming(share)

    def size(store):
        return 1000 if store is None else 230 if store.value_bits else 300

    tokens = 2000
    policies = named(["key_norm", "quantised", "quantised:value_bits=4", "pages", "gated_heads", "streaming"])
    found = {f.name: f for f in families(policies, GATES, tokens, size, fit)}
    for name in ("key_norm", "key_norm sparing heads, 20% elsewhere", "quantised", "pages (reads)", "gated_heads"):
        assert name in found
    assert "key_norm, quantised" in found and "pages (reads), quantised" not in found
    assert found["quantised"].at(0.4) == (Quantised(),)
    with pytest.raises(BadInput, match="takes 32%"):
        found["quantised"].at(0.25)
    # with values in 4 bits everything fits
    assert found["quantised:value_bits=4"].at(0.25) == (Quantised(value_bits=4),)
    kept, store = found["key_norm, quantised:value_bits=4"].at(0.115)
    assert store == Quantised(value_bits=4) and kept.limits.keep == pytest.approx(0.5 / 1.05)
    # where everything fits in a form nothing is dropped, whoever would choose
    assert found["key_norm, quantised"].at(0.4) == (Quantised(),)
    kept, store = found["key_norm, quantised"].at(0.15)
    assert store == Quantised() and kept.limits.keep == pytest.approx(0.5 / 1.05)
    assert found["gated_heads"].at(0.2) == (Streaming(0.2),)
    seen = torch.tensor([tokens])
    for share in (0.1, 0.25, 0.5):
        for name in ("key_norm", "streaming sparing heads, 50% elsewhere", "key_norm sparing heads, 20% elsewhere"):
            (policy,) = found[name].at(share)
            counts = torch.cat([policy.counts(seen, layer, 2, 3, 64) for layer in range(2)], 1)
            # no more than the share, and most of it used but for a part of one head
            assert share - 1 / 6 < counts.sum() / (6 * tokens) * 1.05 <= share + 1e-9, (name, share)


def test_policies_with_other_parameters_have_names_of_their_own():
    def fit(name, share):
        pytest.fail("fitted")

    given = [
        *("observation_window", "observation_window:window=16", "observation_window:window=64"),
        *("pages:page=8", "pages:page=32", "quantised", "quantised:value_bits=4"),
    ]
    found = families(named(given), GATES, 2000, size_of, fit)
    names = [f.name for f in found]
    assert len(set(names)) == len(names)
    for name in (
        "observation_window",
        "observation_window:window=16, quantised",
        "observation_window:window=64 sparing heads, 20% elsewhere",
        "pages:page=8 (reads)",
    ):
        assert name in names
    # what is said twice is one, however it is written
    again = families(named([*given, "quantised", "observation_window:window=32"]), GATES, 2000, size_of, fit)
    assert [f.name for f in again] == names
    exam = Fixed(lambda keep: (1.0, 0.8))
    mine = [f for f in found if f.name in given and f.name.startswith("observation")]
    tried = search(None, None, exam, Goal(keep=0.2), mine, 0.2).candidates
    assert sorted(c.policies[0].window for c in tried) == [16, 32, 64]
    with pytest.raises(RuntimeError, match="two families of policies are called streaming"):
        search(None, None, exam, Goal(keep=0.2), [KEEPS, KEEPS], 0.2)


def test_the_least_share_that_is_known_is_the_least():
    policies = named(["key_norm", "streaming", "pages", "quantised", "mixed_bits"])
    found = families(policies, GATES, 2000, size_of, lambda name, share: MixedBits())
    known = {f.name: f for f in found if f.least is not None}
    assert {f.name for f in found} - set(known) == {
        *("mixed_bits", "pages (reads)"),
        *(f.name for f in found if f.name.endswith(", mixed_bits")),
    }
    for f in known.values():
        assert f.at(f.least * 1.0001)
        with pytest.raises(BadInput):
            f.at(f.least * 0.9999)


def test_bits_that_are_fitted_are_proposed_alone_and_beside_others(tmp_path, monkeypatch):
    given = []

    def fit(model, tokenizer, text, *, keep, tokens, file):
        given.append({"keep": keep, "text": text, "tokens": tokens, "file": file})
        return MixedBits(keys=(0, 1), values=(0, 1)) if keep == 1 else MixedBits(keys=(0,))

    def size(store):
        return 100 if store is None else 20 + 5 * len(store.keys + store.values)

    monkeypatch.setattr(MixedBits, "fit", fit)
    found = {
        f.name: f
        for f in families(
            named(["key_norm", "mixed_bits", "mixed_bits:keys=1"]),
            GATES,
            1000,
            size,
            lambda name, share: fitted(name, None, None, "read", 1000, share, len(GATES), tmp_path),
        )
    }
    assert found["mixed_bits"].at(0.22) == (MixedBits(keys=(0,)),)
    # its own fit counts spare slots already
    assert given.pop() == {"keep": pytest.approx(0.22), "text": "read", "tokens": 1000, "file": tmp_path}
    # beside a policy that drops a quarter of the parts get more bits, whatever the share
    kept, store = found["key_norm, mixed_bits"].at(0.1)
    assert [one["keep"] for one in given] == [1, pytest.approx(0.25 * 1.05)]
    assert store == MixedBits(keys=(0,)) and kept.limits.keep == pytest.approx(0.1 / 0.25 / 1.05)
    # where there is room for that, as many as the share allows
    given.clear()
    assert found["key_norm, mixed_bits"].at(0.5) == found["mixed_bits"].at(0.5)
    assert given[-1]["keep"] == given[-2]["keep"] == pytest.approx(0.5)
    # with layers that were named it is a form like others
    kept, store = found["key_norm, mixed_bits:keys=(1,)"].at(0.1)
    assert store == MixedBits(keys=(1,))


@pytest.mark.parametrize("name", ["gated_heads", "retrieval_heads", "mixture_of_spans"])
def test_what_is_fitted_holds_the_share(name, tmp_path, monkeypatch):
    """Whatever heads or spans a policy's own `fit` finds, what is proposed holds the share that was asked for."""
    tokens, asked = 1000, []

    def spans(model, tokenizer, text, *, keep, lengths, unseen):
        asked.append((lengths, unseen))
        budget = foveate.Budget(1 << 24, sinks=4, recent=1)
        return MixtureOfSpans(budget, tuple((layer, head, 0.0, keep) for layer, head, _ in GATES))

    def heads(model, tokenizer):
        asked.append(name)
        if name == "gated_heads":
            return GatedHeads(foveate.Budget(40, sinks=4, recent=20, every=0), GATES)
        return RetrievalHeads(0.2, ((1, 2),))

    fit = spans if name == "mixture_of_spans" else heads
    monkeypatch.setattr(find(name, "compress"), "fit", fit)
    model = tiny.model("llama")
    for share in (0.3, 0.5):
        policy = fitted(name, model, None, "", tokens, share, len(GATES), tmp_path / "results")
        seen = torch.tensor([tokens])
        counts = torch.cat([policy.counts(seen, layer, 2, 3, 64) for layer in range(2)], 1)
        assert share - 1 / 6 - 0.05 < counts.sum() / (6 * tokens) * 1.05 <= share + 0.03
    # spans are found for each share at the length that is planned for, heads once
    assert asked == ([((250, 500), 1000)] * 2 if name == "mixture_of_spans" else [name])
    if name != "mixture_of_spans":
        with pytest.raises(BadInput, match=r"more than 4%|too little for the others at 4%"):
            fitted(name, model, None, "", tokens, 0.04, len(GATES))


def test_a_fit_tells_how_far_it_is(monkeypatch):
    def slow(model, tokenizer, text, *, keep, tokens, file, progress):
        for n in range(2):
            progress(n + 1, 2)
        return MixedBits()

    monkeypatch.setattr(MixedBits, "fit", slow)
    told = []
    model = tiny.model("llama")
    found = compressing.fit(model, None, "", 100, 6, None, "mixed_bits", 0.2, tell=lambda *step: told.append(step))
    assert found == MixedBits() and told == [("mixed_bits", 1, 2), ("mixed_bits", 2, 2)]


def test_policies_that_cannot_be_proposed():
    with pytest.raises(BadInput, match="only says what dropped entries leave behind"):
        named(["merge_dropped"])
    with pytest.raises(UnknownName, match="key_norm"):
        named(["key_nrom"])


def test_heads_that_find_answers_are_told_by_what_their_rows_look_at():
    """The planted induction head looks at what followed the last token before; nobody else finds a number."""
    model, tokenizer = handmade.model(positions=96), tiny.tokenizer()

    class Copy:
        def samples(self, tokenizer, count, seed):
            text = "abc 57 def abc "
            ids = tuple(tokenizer(f"<s>{text}")["input_ids"])
            return [Sample(ids, "57", ids[5:7], (5, 7), 12, 0.0)] * count

    gates = answer_mass(model, tokenizer, [Copy()], 2)
    best = max(gates, key=lambda gate: gate[2])
    assert len(gates) == 8 and handmade.HEADS[best[0]][best[1]] == "induction" and best[2] > 0.4


def test_a_kv_head_counts_as_the_best_of_its_query_heads():
    model, tokenizer = tiny.model("llama", max_position_embeddings=1024), tiny.tokenizer()
    heads = model.config.num_key_value_heads
    gates = answer_mass(model, tokenizer, [KeyValue(700)], 1)
    assert [gate[:2] for gate in gates] == [(layer, head) for layer in range(2) for head in range(heads)]


# ---------------------------------------------------------------- search and proof

FULL = {"passkey": 0.8}


def standing(share, ppl, passkey):
    return Standing(share, Value(ppl, ppl, ppl), {"passkey": Value(passkey, 0.0, 1.0)}, FULL)


def candidate(family, asked, ppl=1.0, passkey=0.8):
    return Candidate(family, asked, (Streaming(0.5),), standing(asked, ppl, passkey))


GOAL = Goal(quality=(("ppl", 1.02), ("passkey", 0.95)))


def test_a_target_is_a_share_of_what_the_full_cache_recalls():
    assert standing(0.2, 1.0, 0.8).missed(GOAL) == []
    assert standing(0.2, 1.03, 0.8).missed(GOAL) == ["perplexity 1.0300 x, above 1.02"]
    assert standing(0.2, 1.0, 0.7).missed(GOAL) == ["passkey 0.875 of the full cache's recall, below 0.95"]
    nothing = dataclasses.replace(standing(0.2, 1.0, 0.0), full={"passkey": 0.0})
    assert nothing.distance == 0
    assert nothing.missed(GOAL) == ["passkey: the full cache itself recalls nothing, which no target can be a share of"]
    assert nothing.missed(Goal(keep=0.2)) == []
    # perplexity that is no number comes last and meets nothing
    for broken in (math.nan, math.inf):
        spoilt = standing(0.2, broken, 0.8)
        assert spoilt.distance == math.inf
        assert spoilt.missed(GOAL) == ["perplexity is no number: the model's numbers overflow under it"]
    assert standing(0.2, 1.1, 0.4).distance == pytest.approx(0.5 + 0.1)


def test_perplexity_is_compared_stretch_by_stretch():
    found = ratio((1.0, 3.0), (0.9, 2.9))
    assert found.value == pytest.approx(math.exp(0.1)) and found.low == pytest.approx(found.high)
    wide = ratio((1.0, 3.0), (0.9, 2.5))
    assert wide.low < 1 < wide.value < wide.high


def test_the_order_of_candidates():
    small, large = candidate("a", 0.1), candidate("a", 0.3)
    far, near = candidate("b", 0.2, passkey=0.1), candidate("b", 0.9, passkey=0.7)
    assert ordered([large, far, near, small], GOAL, None) == [small, large, near, far]
    # under a size the best one that keeps to it
    assert ordered([large, far, near, small], Goal(keep=0.2), 0.2) == [small, far, large, near]


def test_between_the_last_that_fails_and_the_first_that_passes():
    row = [
        candidate("a", 0.1, ppl=2),
        candidate("a", 0.5),
        candidate("a", 0.7),
        candidate("b", 0.3),
        candidate("c", 0.2, 2),
    ]
    judged = {c.name: c for c in row}
    assert contenders(judged, GOAL) == ["b", "a"]
    assert between("a", judged, GOAL) == [0.2, 0.3, 0.4]
    assert between("b", judged, GOAL) == [0.075, 0.15, 0.225]


class Fixed(Exam):
    """An exam whose results are given: at each share, perplexity and recall."""

    def __init__(self, worth):
        super().__init__({}, (), 1, 0)
        object.__setattr__(self, "worth", worth)

    def judge(self, model, tokenizer, settings, file=None, tell=None):
        found = {name: standing(p[0].limits.keep, *self.worth(p[0].limits.keep)) for name, p in settings.items()}
        return found | {"full": standing(1.0, 1.0, 0.8)}


def test_a_size_is_kept_to():
    def made(held):
        cost = Cost(100, 1000, held, *[Spread(0.0, 0.0, 0.0)] * 4)
        one = candidate("a", 0.2)
        verdict = Verdict(one, one.standing, one.standing, ())
        return Compressed(Plan((), {}), Goal(keep=0.2), Searched((one,), (), one.standing), verdict, cost)

    assert made(200).met and not made(201).met
    assert made(212).missed == ("212 bytes held, 21.2% of the cache, above 20.0%",)


def test_heads_are_spared_as_far_as_windows_reach():
    """A head that sees a window only costs no more than that, and the whole cache is less."""
    gates = [(layer, head, 1 - 0.1 * layer - 0.01 * head) for layer in range(4) for head in range(2)]
    lengths = [100, 1000, 100, 1000]
    found = spared_heads(gates, 0.3, 1000, 50, lengths)
    assert [gate[:2] for gate in found] == [(0, 0), (0, 1)]
    found = spared_heads(gates, 0.5, 1000, 50, lengths)
    assert [gate[:2] for gate in found] == [(0, 0), (0, 1), (1, 0)]
    # 2 x 2 heads of 100 and 2 x 2 of 1000 are 4,400; all keep 50
    assert 2 * 100 + 1000 + 5 * 50 <= 0.5 / 1.05 * 4400 < 2 * 100 + 2 * 1000 + 4 * 50
    assert level(lengths, 400) == 100 and level(lengths, 1000) == 400 and level(lengths, 9999) == 1000
    first, *_ = families([Streaming()], gates, 1000, lambda _: 1000, lambda *_: Streaming(), lengths)
    (even,) = first.at(0.5)
    assert 200 + 2 * 1000 * even.limits.keep == pytest.approx(0.5 / 1.05 * 2200)
    with pytest.raises(BadInput, match=r"the least is 9\.6%"):
        spared_heads(gates, 0.05, 1000, 50, lengths)


KEEPS = Family("streaming", lambda share: (Streaming(foveate.Budget(share, every=0)),))


def test_the_smallest_cache_that_meets_a_quality_is_found():
    exam = Fixed(lambda keep: (1.0, 0.8 if keep >= 0.2 else 0.1))
    found = search(None, None, exam, GOAL, [KEEPS], None)
    assert found.candidates[0].asked == 0.2
    assert [c.asked for c in found.candidates if c.standing.missed(GOAL)]


def test_a_probe_that_the_full_cache_fails_is_no_target(monkeypatch):
    monkeypatch.setitem(FULL, "passkey", 0.0)
    with pytest.raises(BadInput, match=r"--quality passkey: the full cache itself recalls none of 1.*another probe"):
        search(None, None, Fixed(lambda keep: (1.0, 0.0)), GOAL, [KEEPS], None)
    # it may be looked at where it is none
    search(None, None, Fixed(lambda keep: (1.0, 0.0)), Goal(keep=0.2), [KEEPS], 0.2)


def test_a_family_that_cannot_hold_a_share_is_told():
    def refuses(share):
        raise BadInput("too small")

    exam = Fixed(lambda keep: (1.0, 0.8))
    found = search(None, None, exam, Goal(keep=0.2), [KEEPS, Family("other", refuses)], 0.2)
    assert found.impossible == (("other", "too small"),) and len(found.candidates) == 1
    with pytest.raises(BadInput, match="nothing can be proposed"):
        search(None, None, exam, Goal(keep=0.2), [Family("other", refuses)], 0.2)


def test_reasons_are_told_in_few_words():
    def refuses(why):
        def at(share):
            raise BadInput(why)

        return at

    row = [
        Family(n, refuses(why), least)
        for n, why, least in (
            ("a", "too small", 0.31415),
            ("b", "b has no room", None),
            ("c", "too small", 0.5),
            ("d", "no", 1.5),
            ("e", "never", None),
        )
    ]
    exam, start = Fixed(lambda keep: (1.0, 0.8)), "nothing can be proposed: a and 1 more: too small; b has no room; "
    for kinds, goal, share, says in (
        (row, Goal(keep=0.2), 0.2, "and 2 more like these. The least that is known to hold is a: give --keep 0.315 or"),
        (
            row,
            Goal(bytes="20kB"),
            0.2,
            "and 2 more like these. The least that is known to hold is a: give --bytes 32kB",
        ),
        (row[:2], GOAL, None, "nothing can be proposed: a: too small; b has no room. Plan for longer texts"),
        (row[3:], Goal(keep=0.2), 0.2, "nothing can be proposed: d: no; e: never. Allow a larger cache, or name"),
    ):
        with pytest.raises(BadInput) as told:
            search(None, None, exam, goal, kinds, share)
        assert says in str(told.value) and (kinds != row or str(told.value).startswith(start))


def test_one_that_fails_the_proof_is_followed_by_a_larger_one():
    found = Searched(tuple(candidate("a", share) for share in (0.1, 0.105, 0.2, 0.4)), (), standing(1, 1, 0.8))
    found = dataclasses.replace(
        found,
        candidates=tuple(
            dataclasses.replace(c, policies=(Streaming(foveate.Budget(c.asked, every=0)),)) for c in found.candidates
        ),
    )
    assert [c.asked for c in line_up(found, GOAL)] == [0.1, 0.2, 0.4]
    verdict = prove(None, None, Fixed(lambda keep: (1.0, 0.8 if keep > 0.3 else 0.1)), GOAL, found)
    assert verdict.candidate.asked == 0.4 and verdict.missed == ()
    assert verdict.attempts == ("a @ 0.1", "a @ 0.2")
    verdict = prove(None, None, Fixed(lambda keep: (2.0 - keep, 0.8)), GOAL, found)
    assert verdict.candidate.asked == 0.4 and verdict.missed and len(verdict.attempts) == 3
    # what keeps to a size is proved once, whatever it is worth
    assert prove(None, None, Fixed(lambda keep: (2.0, 0.1)), Goal(keep=0.2), found).missed == ()


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved tiny model that reads characters."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny.model("llama", max_position_embeddings=2048).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"The {n} cat sat on the {n * 7} mat. " for n in range(100)))
    return path


def compress(folder, text, out, *more, tokens=640, samples=2, policy="streaming"):
    command = ["compress", folder, "--text", text, "--tokens", tokens, "--samples", samples, "--out", out]
    return here(*command, "--policy", policy, "--probe", "passkey", *more)


def test_a_search_without_a_file_measures_once(text, monkeypatch):
    """What one share measured another one takes; nothing is left behind."""
    asked = []

    def fit(model, tokenizer, text, *, keep, tokens, file):
        asked.append((keep, file))
        return MixedBits()

    monkeypatch.setattr(MixedBits, "fit", fit)
    model, policies = tiny.model("llama", max_position_embeddings=2048), named(["streaming", "mixed_bits"])
    given = {"tokens": 640, "probes": ("passkey",), "count": 2}
    compressing.compress(model, tiny.tokenizer(), text.read_text(), Goal(keep=0.3), policies, **given)
    files = {file for _, file in asked}
    assert len(files) == 1 and files != {None} and not files.pop().exists()
    assert len({keep for keep, _ in asked}) == len(asked) == 3


def test_what_is_fitted_has_not_read_what_it_is_judged_on(folder, text, tmp_path, monkeypatch):
    read = []

    def fit(model, tokenizer, text, *, keep, tokens, file):
        read.append(text)
        return MixedBits()

    monkeypatch.setattr(MixedBits, "fit", fit)
    done = compress(folder, text, tmp_path / "made", "--keep", 0.5, policy="mixed_bits")
    assert done.returncode == 0, done.stderr
    whole = text.read_text()
    assert set(read) == {whole[: len(whole) // 2]}
    assert foveate.Plan.load(tmp_path / "made" / "plan.json").mechanisms == (MixedBits(),)


def test_a_plan_is_found_proved_and_used(folder, text, tmp_path):
    out = tmp_path / "made"
    done = compress(folder, text, out, "--keep", 0.3, "--policy", "quantised", policy="key_norm")
    assert done.returncode == 0, done.stderr
    for words in (
        "a cache of 30%",
        "tried (best first)",
        "held out",
        "passkey",
        "bytes of the cache",
        "a decoded token",
    ):
        assert words in done.stdout, words
    # all were made for one share, which the title says
    assert "@" not in done.stdout
    plan = foveate.Plan.load(out / "plan.json")
    assert plan.evidence["goal"]["keep"] == 0.3 and plan.evidence["proof"]["standing"]["share"] <= 0.31
    assert all(isinstance(m, Policy) for m in plan.mechanisms)
    page = (out / "report.html").read_text()
    assert "Everything that was tried" in page and "http://" not in page.split("<script>")[0]
    short = tmp_path / "short.txt"
    short.write_text(text.read_text()[:600])
    used = here("generate", folder, "--plan", out / "plan.json", "--text", short, "--tokens", 3, "--json")
    figures = json.loads(used.stdout)
    assert figures["bytes_held"] < 0.4 * figures["bytes_full"]
    assert "the cache that the plan keeps" in used.stderr

    # the same again has nothing left to measure but time
    begun = (out / "results.jsonl").read_text()
    again = compress(folder, text, out, "--keep", 0.3, "--policy", "quantised", "--json", policy="key_norm")
    assert json.loads(again.stdout)["met"] and (out / "results.jsonl").read_text() == begun

    other = tiny.model("llama", seed=1, max_position_embeddings=2048)
    with pytest.raises(BadInput, match="this plan is for tiny"):
        foveate.apply(other, plan)


def test_an_interrupted_search_goes_on(folder, text, tmp_path, monkeypatch):
    out = tmp_path / "made"
    search_for = searching.Exam.judge
    monkeypatch.setattr(searching.Exam, "judge", lambda self, *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    done = compress(folder, text, out, "--keep", 0.3)
    assert done.returncode == 130 and "the same command goes on" in done.stderr
    assert sorted(p.name for p in out.iterdir()) == ["results.jsonl"]
    monkeypatch.setattr(searching.Exam, "judge", search_for)
    monkeypatch.setattr(compressing, "answer_mass", lambda *_: pytest.fail("measured again"))
    done = compress(folder, text, out, "--keep", 0.3)
    assert done.returncode == 0 and "going on where it was interrupted" in done.stdout


def test_a_target_that_nothing_meets(folder, text, tmp_path, monkeypatch):
    out = tmp_path / "made"
    (out).mkdir()
    (out / "plan.json").write_text("an older one")
    monkeypatch.setattr(searching, "GRID", (0.2, 0.4))
    monkeypatch.setattr(Standing, "missed", lambda self, goal: ["perplexity 2.0000 x, above 1.01"])
    done = compress(folder, text, out, "--quality", "ppl=1.01", policy="key_norm")
    assert done.returncode == 1
    assert "key_norm @ 0.2" in done.stdout and "key_norm @ 0.4" in done.stdout
    assert "nothing that was tried meets the goal; nearest.json comes nearest (perplexity" in done.stderr
    assert (out / "nearest.json").exists() and not (out / "plan.json").exists()
    assert "Not met." in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--keep", "0.3", "--bytes", "1MB"], "contradict each other"),
        ([], "there is no goal"),
        (["--quality", "ppl"], "is no target"),
        (["--quality", "paskey=0.9"], "passkey"),
        (["--keep", "0.3", "--probe", "paskey"], "passkey"),
        (["--keep", "0.3", "--policy", "merge_dropped"], "only says what dropped entries leave behind"),
        (["--keep", "0.001"], "The least that is known to hold is streaming: give --keep 0.093 or more"),
        (["--bytes", "900MB"], "fits already"),
    ],
)
def test_what_cannot_be_asked(folder, text, tmp_path, more, says):
    done = compress(folder, text, tmp_path / "made", *more)
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "made" / "plan.json").exists()


def test_numbers_and_texts_that_cannot_be(folder, text, tmp_path):
    for tokens, samples, says in ((64, 2, "--tokens 64"), (800, 1, "--samples 1"), (1900, 2, "reads 2048")):
        done = compress(folder, text, tmp_path / "made", "--keep", 0.3, tokens=tokens, samples=samples)
        assert done.returncode == 2 and says in done.stderr, done.stderr
    done = compress(folder, text, tmp_path / "made", "--keep", 0.3, tokens=1700)
    assert done.returncode == 2 and "too few to search on one half" in done.stderr
    file = tmp_path / "a file"
    file.write_text("")
    done = compress(folder, text, file, "--keep", 0.3)
    assert done.returncode == 2 and "is a file, not a folder" in done.stderr


@pytest.mark.parametrize(
    ("name", "more", "says"),
    [
        ("llama", {"max_position_embeddings": 383}, "reads 383 tokens, too few to plan for"),
        ("llama", {"max_position_embeddings": 384}, "--tokens 640: LlamaForCausalLM reads 384; plan for at most 128"),
        ("bert", {"max_position_embeddings": 2048}, "BertModel is no causal language model"),
        ("t5", {}, "T5ForConditionalGeneration is no causal language model"),
    ],
)
def test_models_that_cannot_be(name, more, says, text, tmp_path):
    tiny.model(name, **more).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    done = compress(tmp_path / "model", text, tmp_path / "made", "--keep", 0.3)
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "made").exists()


# heads are measured on passkeys and key-value pairs, whatever is judged by
@pytest.mark.parametrize(
    ("asked", "tokens", "probe"),
    [((), 200, "passkey"), (("--probe", "needles"), 300, "needles"), ((), 300, "key_value")],
)
def test_a_length_that_is_too_short_is_told_before_anything_is_measured(
    folder, text, tmp_path, monkeypatch, asked, tokens, probe
):
    monkeypatch.setattr(compressing, "answer_mass", lambda *_: pytest.fail("measured"))
    done = compress(folder, text, tmp_path / "made", "--keep", 0.3, *asked, tokens=tokens)
    assert done.returncode == 2
    assert f"--tokens {tokens}, probe {probe}: length={tokens} is too short" in done.stderr


def test_nothing_is_searched_for_where_nothing_can_be_written(folder, text, monkeypatch):
    monkeypatch.setattr(compressing, "answer_mass", lambda *_: pytest.fail("measured"))
    done = compress(folder, text, "/proc", "--keep", 0.3)
    assert done.returncode == 2 and "--out /proc: nothing can be written there (" in done.stderr


def test_how_much_is_kept_is_told_where_something_goes(folder):
    common = ("generate", folder, "--prompt", "Box 3 is black.", "--tokens", 2, "--policy", "quantised")
    alone = here(*common).stdout
    assert "tokens, quantised" in alone and "keeping" not in alone
    assert "quantised and streaming, keeping 0.5" in here(*common, "--policy", "streaming", "--keep", 0.5).stdout
