"""Taking parts out from the command line: the search, the proof, the plan, and what a person meets who asks for it."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

import foveate
from commands import here
from foveate.compress import PartRemoval
from foveate.compress.prune._greedy import Step
from foveate.compress.prune.part_removal import Course
from foveate.core.errors import BadInput, NotSupported
from foveate.planning import pruning
from foveate.planning.examining import ratio
from foveate.planning.pruning import at_random, halves, in_words, milestones, prune
from foveate.probe import Passkey, perplexity, run
from foveate.testing import tiny

TOKENS, PIECES = 640, 2
SENTENCES = "".join(f"The {n} cat sat on the {n * 7} mat. " for n in range(100))


def model(name="llama", seed=0):
    """Three layers, of which five parts can go."""
    return tiny.model(name, seed=seed, num_hidden_layers=3, max_position_embeddings=2048)


# ---------------------------------------------------------------- the text


def test_what_is_proved_on_was_not_chosen_on():
    chosen_on, held_out = halves(list(range(8000)), 500, 4)
    assert len(chosen_on) == 4 and len(held_out) == 8
    assert all(len(piece) == 500 for piece in (*chosen_on, *held_out))
    assert len({n for piece in (*chosen_on, *held_out) for n in piece}) == 12 * 500
    assert max(map(max, chosen_on)) < 4000 <= min(map(min, held_out))
    # as few as there can be
    assert [len(part) for part in halves(list(range(4 * 500)), 500, 1)] == [1, 2]


def test_a_text_too_short_to_hold_some_out():
    with pytest.raises(BadInput, match=r"has 3,999 tokens, too few .*: 4 pieces of 500 tokens in each take 4,000"):
        halves(list(range(3999)), 500, 4)
    with pytest.raises(BadInput, match="take 2,000"):
        halves(list(range(1999)), 500, 1)


# ---------------------------------------------------------------- the search


@pytest.mark.parametrize("after", [0, 12, 30, 40])
def test_an_interrupted_search_gives_the_same_steps(tmp_path, after):
    ids, file = torch.randint(4, 99, (2, 9), generator=torch.Generator().manual_seed(1)), tmp_path / "steps.jsonl"
    plain = model()
    before, whole = copy.deepcopy(plain.state_dict()), PartRemoval.fit(plain, [ids[0], ids[1]], count=5)
    ticks = []

    def interrupt(done, of):
        ticks.append((done, of))
        if done > after:
            raise KeyboardInterrupt

    def search(count=5, progress=None, **more):
        return PartRemoval.fit(plain, [ids[0], ids[1]], count=count, progress=progress, file=file, **more)

    # 12, 10, 8, 6 and 4 tries, no more than two of them without a choice
    if after < 40:
        with pytest.raises(KeyboardInterrupt):
            search(progress=interrupt)
        known = {0: 0, 12: 1, 30: 3}[after]
        assert (len(file.read_text().splitlines()) if known else int(file.exists())) == known
    else:
        search(count=3)
        known = 3
    assert all(torch.equal(before[n], x) for n, x in plain.state_dict().items())
    rest = []
    assert search(progress=lambda done, of: rest.append((done, of))) == whole
    assert rest[0] == (1, 2 * sum(6 - n for n in range(known, 5)))
    # all is known, also where fewer are asked for; other texts, measures and parts are other searches
    nothing = []
    assert search(3, lambda *n: nothing.append(n)) == Course(whole.steps[:3], whole.measure, whole.tokens)
    assert not nothing
    lines = len(file.read_text().splitlines())
    for n, more in enumerate(({"measure": "angle"}, {"among": ("feed_forward",)}, {"first": 1})):
        search(1, **more)
        assert len(file.read_text().splitlines()) == lines + n + 1
    PartRemoval.fit(plain, ids[:1], count=1, file=file)
    PartRemoval.fit(model(seed=1), [ids[0], ids[1]], count=1, file=file)
    assert len(file.read_text().splitlines()) == lines + 5


def test_layers_that_are_not_there():
    with pytest.raises(BadInput, match=r"first=3\): the last layer is 2"):
        PartRemoval.fit(model(), torch.ones(1, 9, dtype=torch.long), count=1, first=3)


@pytest.mark.parametrize(
    ("name", "says"),
    [("t5", "take a decoder alone"), ("bart", "take a decoder alone"), ("bert", "has no attention that can be told")],
)
def test_models_without_parts_of_their_own_are_refused_before_the_search(name, says):
    with pytest.raises(NotSupported, match=says):
        PartRemoval.fit(tiny.model(name), torch.ones(1, 9, dtype=torch.long), count=1)


# ---------------------------------------------------------------- the proof


def test_points_on_the_way():
    assert [milestones(n) for n in (1, 2, 3, 4, 6, 8)] == [(1,), (1, 2), (1, 2, 3), (1, 2, 4), (2, 3, 6), (2, 4, 8)]


def test_parts_in_words():
    assert in_words(PartRemoval((24, 25), (12,))) == "attention of layers 24, 25; feed-forward of layer 12"
    assert in_words(PartRemoval((), (1, 2))) == "feed-forward of layers 1, 2"
    assert in_words(PartRemoval()) == "nothing"


def test_random_parts_are_those_that_could_have_gone():
    tried = tuple((kind, n, 0.0) for n in range(3) for kind in ("attention", "feed_forward"))
    course = Course((Step("attention", 0, 0.0, tried),), "divergence", 1)
    drawn = [at_random(course, 3, seed) for seed in range(20)]
    assert at_random(course, 3, 0) == drawn[0] and len(set(map(tuple, drawn))) > 10
    for parts in drawn:
        assert len(set(parts)) == len(parts) == 5 and set(parts) < {t[:2] for t in tried}
        assert sum(kind == "attention" for kind, _ in parts) == 2
    # attention elsewhere is left, so that all of these can go
    assert len(at_random(course, 4, 0)) == 6


@pytest.fixture(scope="module")
def found():
    """Four parts out of a model, in Python."""
    return prune(
        model(),
        tiny.tokenizer(),
        SENTENCES,
        4,
        tokens=TOKENS,
        pieces=PIECES,
        probes=["passkey"],
        samples=3,
        name="mine",
    )


def test_the_proof_is_what_anybody_would_measure(found):
    plain, tokenizer = model(), tiny.tokenizer()
    chosen_on, held_out = halves(tokenizer(SENTENCES)["input_ids"], TOKENS, PIECES)
    course = PartRemoval.fit(plain, [torch.tensor([piece]) for piece in chosen_on], count=4)
    assert found.course.steps == course.steps
    assert [p.gone for p in found.points] == [0, 1, 2, 4]
    attention = at_random(course, 3, pruning.SEED)
    losses, full = {}, sum(p.numel() for p in plain.parameters())
    for point in found.points:
        wanted = {"own": course.after(point.gone), "random": pruning.removal(attention[: point.gone])}
        assert point.mechanism == wanted["own"]
        for which, mechanism in wanted.items():
            with foveate.attach(plain, *([mechanism] if point.gone else [])) as _:
                each = [math.log(perplexity(plain, list(piece))[0]) for piece in held_out]
                losses[which, point.gone] = tuple(each)
                if which == "own":
                    left = sum(p.numel() for p in plain.parameters())
                    recall = run(plain, tokenizer, Passkey(TOKENS), 3, pruning.SEED) if point.gone == 4 else None
        assert point.parameters == left and point.bytes == 4 * left
        assert (left < full) == (point.gone > 0)
        own, whole = losses["own", point.gone], losses["own", 0]
        assert point.perplexity.value == pytest.approx(math.exp(sum(own) / len(own)), rel=1e-5)
        times = ratio(own, whole)
        assert vars(point.times) == pytest.approx(vars(times), rel=1e-4)
        if point.gone:
            assert vars(point.random) == pytest.approx(vars(ratio(losses["random", point.gone], whole)), rel=1e-4)
        assert 0 < point.read.low <= point.read.value <= point.read.high
        assert 0 < point.decoded.low <= point.decoded.value <= point.decoded.high
    assert found.points[0].random is None and found.points[0].times.value == 1
    last = found.points[-1].recall["passkey"]
    assert (last.value, last.low, last.high) == (recall.recall, recall.low, recall.high)


def test_the_parts_are_really_gone(found):
    other = model()
    foveate.apply(other, found.plan)
    assert sum(p.numel() for p in other.parameters()) == found.points[-1].parameters
    assert found.plan.mechanisms == (found.course.mechanism,) and found.plan.model["name"] == "mine"
    assert found.plan.evidence["steps"] == found.course.evidence()["steps"]
    assert [p["gone"] for p in found.plan.evidence["points"]] == [0, 1, 2, 4]


def test_times_are_measured_in_turn(monkeypatch):
    seen = []

    def timed(_, ids, mechanisms):
        seen.append((ids.shape[1], mechanisms))
        # in round n, from 0, it takes n seconds per token, twice that with a mechanism
        return 64.0 * ((len(seen) - 1) // 2) * (1 + len(mechanisms)), 2.0

    monkeypatch.setattr(pruning, "timed", timed)
    one = PartRemoval((0,))
    (plain, pruned) = pruning.Proof(model(), None, {}, (), 2).seconds([PartRemoval(), one], 64)
    assert seen == [(64, ()), (64, (one,))] * (pruning.REPEATS + 1)
    # the first round warms up and does not count
    assert plain[0].value == 3 and pruned[0].value == 6 and plain[1].value == pruned[1].value == 2


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved tiny model that reads characters."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    model().save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(SENTENCES)
    return path


def command(folder, text, out, *more, count=3, tokens=TOKENS, pieces=PIECES, samples=2):
    sizes = ("--count", count, "--tokens", tokens, "--pieces", pieces, "--samples", samples)
    return here("prune", folder, "--text", text, "--out", out, *sizes, *more)


def test_parts_are_found_proved_and_taken_out(folder, text, tmp_path):
    out = tmp_path / "made"
    done = command(folder, text, out)
    assert done.returncode == 0, done.stderr
    plan = foveate.Plan.load(out / "plan.json")
    (mechanism,) = plan.mechanisms
    for words in (
        "taking 3 of its attention and feed-forward parts out, chosen on 2 x 640 tokens",
        f"3 gone: {in_words(mechanism)}",
        "parameters",
        "weights",
        "x the whole",
        "random parts",
        "passkey",
        "key_value",
        "prompt, token",
        "decoded token",
        f"--plan {out / 'plan.json'}",
    ):
        assert words in done.stdout, words
    assert sorted(p.name for p in out.iterdir()) == ["plan.json", "results.jsonl"]
    points = plan.evidence["points"]
    assert f"{points[-1]['parameters']:,}" in done.stdout and [p["gone"] for p in points] == [0, 1, 2, 3]
    assert set(points[-1]["recall"]) == {"passkey", "key_value"}

    short = tmp_path / "short.txt"
    short.write_text(SENTENCES[:300])
    used = here("generate", folder, "--plan", out / "plan.json", "--text", short, "--tokens", 3, "--json")
    assert used.returncode == 0 and "under PartRemoval" in used.stderr
    assert json.loads(used.stdout)["tokens"] == 3
    with pytest.raises(BadInput, match="this plan is for tiny"):
        foveate.apply(model(seed=1), plan)

    # the same again has nothing left to measure but time
    begun = (out / "results.jsonl").read_text()
    again = command(folder, text, out, "--json")
    assert (out / "results.jsonl").read_text() == begun and "going on where it was interrupted" in again.stderr
    told = json.loads(again.stdout)
    assert told["gone"] == in_words(mechanism) and told["feed_forward"] == list(mechanism.feed_forward)
    assert told["steps"] == plan.evidence["steps"]
    for name in ("perplexity", "times", "random", "recall", "parameters", "bytes", "mechanism"):
        assert [p[name] for p in told["points"]] == [p[name] for p in points], name


def test_only_what_may_go_goes(folder, text, tmp_path):
    out = tmp_path / "made"
    more = ("--among", "feed_forward", "--first", 1, "--measure", "angle", "--probe", "passkey")
    done = command(folder, text, out, *more, count=2)
    assert done.returncode == 0, done.stderr
    assert "key_value" not in done.stdout and "its feed-forward parts" in done.stdout
    plan = foveate.Plan.load(out / "plan.json")
    assert plan.mechanisms == (PartRemoval((), (1, 2)),)
    assert [plan.evidence[k] for k in ("measure", "among", "first")] == ["angle", ["feed_forward"], 1]


def test_an_interrupted_run_goes_on(folder, text, tmp_path, monkeypatch):
    out, judge = tmp_path / "made", pruning.Proof.recall
    monkeypatch.setattr(pruning.Proof, "recall", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    done = command(folder, text, out)
    assert done.returncode == 130 and "the same command goes on from it" in done.stderr and not done.stdout.count("MB")
    assert sorted(p.name for p in out.iterdir()) == ["results.jsonl"]
    monkeypatch.setattr(pruning.Proof, "recall", judge)
    monkeypatch.setattr(pruning, "token_losses", lambda *_: pytest.fail("measured again"))
    done = command(folder, text, out)
    assert done.returncode == 0 and "going on where it was interrupted" in done.stdout
    assert (out / "plan.json").exists()


@pytest.mark.parametrize(
    ("more", "sizes", "says"),
    [
        ([], {"count": 0}, "--count 0: give at least 1"),
        ([], {"count": 6}, "count=6): from 1 to 5"),
        (["--first", "-1"], {}, "--first -1: give at least 0"),
        (["--first", "3"], {}, "the last layer is 2"),
        (["--probe", "paskey"], {}, "did you mean 'passkey'"),
        (["--measure", "angel"], {}, "did you mean 'angle'"),
        (["--among", "atention"], {}, "did you mean 'attention'"),
        ([], {"samples": 1}, "--samples 1"),
        ([], {"pieces": 0}, "--pieces 0"),
        ([], {"tokens": 64}, "--tokens 64"),
        ([], {"tokens": 256}, "--tokens 256, probe key_value: length=256 is too short"),
        ([], {"tokens": 1900}, "reads 2048; plan for at most 1792"),
        ([], {"pieces": 4}, "too few to choose on one half and prove on the other"),
    ],
)
def test_what_cannot_be_asked(folder, text, tmp_path, more, sizes, says):
    done = command(folder, text, tmp_path / "made", *more, **sizes)
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "made" / "plan.json").exists()


def test_where_nothing_can_be_written(folder, text, tmp_path):
    file = tmp_path / "a file"
    file.write_text("")
    done = command(folder, text, file)
    assert done.returncode == 2 and "is a file, not a folder" in done.stderr
    done = command(folder, text, "/proc")
    assert done.returncode == 2 and "--out /proc: nothing can be written there (" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_command_that_fails_at_once_leaves_no_folder(folder, text, tmp_path):
    done = command(folder, text, tmp_path / "deep" / "made", "--measure", "angel")
    assert done.returncode == 2 and not (tmp_path / "deep").exists()
    (tmp_path / "made").mkdir()
    assert command(folder, text, tmp_path / "made", "--measure", "angel").returncode == 2
    assert not list((tmp_path / "made").iterdir())


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_models_that_nothing_can_be_planned_for(name, text, tmp_path):
    path = tmp_path / name
    more = {} if name == "t5" else {"max_position_embeddings": 2048}
    tiny.model(name, **more).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    done = command(path, text, tmp_path / "made", "--probe", "passkey", count=1)
    assert done.returncode == 2 and "is no causal language model, so nothing" in done.stderr, done.stderr
    assert not (tmp_path / "made" / "plan.json").exists()
