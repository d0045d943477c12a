"""One prompt, many caches: every trial comes out as if it were run alone, and an interrupted one goes on."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import foveate
from foveate.compress import ExpectedAttention, HeavyHitters, KeyNorm, MergeDropped, Pages, Quantised, Streaming
from foveate.core import branches
from foveate.core.branches import Whole, branch, bytes_held, joined, model_bytes
from foveate.core.cache import ragged_layers
from foveate.core.errors import BadInput
from foveate.core.own_cache import entries_of, own_bytes
from foveate.probe import Passkey, run
from foveate.probe.ledger import Ledger
from foveate.probe.trials import EACH, FULL, IN_MEMORY, at_once, continuations, trials
from foveate.testing import tiny

FEW = foveate.Budget(12, sinks=2, recent=3, every=0)
SETTINGS = {
    "heavy": (HeavyHitters(FEW),),
    "norm": (KeyNorm(foveate.Budget(0.3, sinks=1, recent=2, every=0, heads="layer")),),
    "model": (ExpectedAttention(foveate.Budget(0.3, sinks=1, recent=2, every=0, heads="model")),),
    "merged": (HeavyHitters(FEW), MergeDropped()),
}
OTHERS = {
    "packed": (Streaming(FEW), Quantised()),
    "pages": (Pages(foveate.Budget(8, sinks=1, recent=2, every=0), page=4, first=0),),
}
TASK = Passkey(600)


@pytest.fixture(scope="module", params=["llama", "mistral", "gpt2"])
def model(request):
    return tiny.model(request.param, max_position_embeddings=1024)


@pytest.fixture(scope="module")
def llama():
    return tiny.model("llama", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def ids(length=40, batch=1, seed=0):
    return torch.randint(60, (batch, length), generator=torch.Generator().manual_seed(seed)) + 3


def logits(model, policies, cache, tokens):
    with torch.no_grad(), foveate.attach(model, *policies, trial=False):
        return model(input_ids=tokens, past_key_values=cache, use_cache=True).logits


def alone(model, policies, prompt):
    with torch.no_grad(), foveate.attach(model, *policies, trial=False):
        return model(input_ids=prompt, use_cache=True).past_key_values


# ---------------------------------------------------------------- branches


@pytest.mark.parametrize("batch", [1, 2])
def test_a_branch_is_the_cache_that_its_policies_alone_would_fill(model, batch):
    prompt, rest = ids(batch=batch), ids(5, batch, seed=1)
    settings = {**SETTINGS, **OTHERS}
    made = branch(model, prompt, list(settings.values()))
    for policies, mine in zip(settings.values(), made.caches, strict=True):
        theirs = alone(model, policies, prompt)
        for a, b in zip(ragged_layers(mine), ragged_layers(theirs), strict=True):
            assert torch.equal(a.store.positions(), b.store.positions())
        assert bytes_held(mine) == bytes_held(theirs)
        torch.testing.assert_close(logits(model, policies, mine, rest), logits(model, policies, theirs, rest))
    with torch.no_grad():
        whole = model(input_ids=prompt, use_cache=True)
        torch.testing.assert_close(made.logits, whole.logits[:, -1])
        after = model(input_ids=rest, past_key_values=whole.past_key_values).logits
    torch.testing.assert_close(logits(model, (Whole(),), made.full, rest), after)


def test_joined_caches_go_on_as_each_alone(model):
    prompt, rest = ids(), ids(5, seed=1)
    made = branch(model, prompt, list(SETTINGS.values()))
    together = joined([*made.caches, made.full], model.config)
    assert together.get_seq_length() == 40
    found = logits(model, (Whole(),), together, rest.expand(len(SETTINGS) + 1, -1))
    one_by_one = [logits(model, (Whole(),), cache, rest) for cache in (*made.caches, made.full)]
    torch.testing.assert_close(found, torch.cat(one_by_one))


def test_a_cache_that_is_joined_with_the_wrong_rows_is_seen(llama, monkeypatch):
    """The comparison above can fail: rows that are swapped change what comes out."""
    made = branch(llama, ids(), list(SETTINGS.values()))
    right = logits(llama, (Whole(),), joined(made.caches, llama.config), ids(5, len(SETTINGS), seed=1))
    filled = branches.filled
    made = branch(llama, ids(), list(SETTINGS.values()))
    monkeypatch.setattr(branches, "filled", lambda mine, theirs: filled(mine, theirs[::-1]))
    swapped = logits(llama, (Whole(),), joined(made.caches, llama.config), ids(5, len(SETTINGS), seed=1))
    assert not torch.allclose(right, swapped, atol=1e-4)


def test_packed_rows_are_joined_as_they_are(llama):
    policies = OTHERS["packed"]
    made = branch(llama, ids(), [policies, (Streaming(foveate.Budget(9, sinks=1, recent=2, every=0)), Quantised())])
    rest = ids(3, seed=1)
    together = joined(made.caches, llama.config)
    found = logits(llama, (Whole(),), together, rest.expand(2, -1))
    one_by_one = [logits(llama, (Whole(),), cache, rest) for cache in made.caches]
    torch.testing.assert_close(found, torch.cat(one_by_one))


def test_caches_of_different_lengths_are_not_joined(llama):
    first, second = (branch(llama, ids(n), []).full for n in (8, 9))
    with pytest.raises(BadInput, match=r"equally many tokens, not \[8, 9\]"):
        joined([first, second], llama.config)
    with pytest.raises(BadInput, match="none at all"):
        joined([], llama.config)


def test_two_of_a_kind_are_refused_in_a_branch(llama):
    with pytest.raises(BadInput, match="both say which entries stay"):
        branch(llama, ids(), [(HeavyHitters(FEW), Streaming(FEW))])


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_bytes_of_the_models_own_cache(family):
    net = tiny.model(family)
    made = branch(net, ids(), [])
    with torch.no_grad():
        own = net(input_ids=ids(), use_cache=True).past_key_values
    # a window is a view of the whole text there
    assert model_bytes(made.full) == sum((layer.keys.numel() + layer.values.numel()) * 4 for layer in own.layers)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_the_models_own_cache_is_known_whatever_is_attached(family):
    net = tiny.model(family)
    plain = entries_of(net)
    assert len(plain) == net.config.num_hidden_layers
    with foveate.attach(net, Streaming(FEW), Quantised(), trial=False):
        assert entries_of(net) == plain


# ---------------------------------------------------------------- trials


@pytest.mark.parametrize("unseen", [True, False])
def test_a_trial_is_what_a_run_under_the_policies_gives(llama, tokenizer, unseen):
    settings = {**SETTINGS, **OTHERS}
    found = trials(llama, tokenizer, TASK, settings, 2, 3, unseen=unseen)
    assert set(found) == {FULL, *settings}
    plain = run(llama, tokenizer, TASK, 2, 3, unseen=unseen)
    assert found[FULL].result == plain
    assert found[FULL].share == 1.0
    for name, policies in settings.items():
        after = policies if name == "pages" else (Whole(),)
        for sample, record in zip(TASK.samples(tokenizer, 2, 3), found[name].result.records, strict=True):
            context = sample.question_start if unseen else len(sample.ids) - 1
            if not unseen:
                # the last token of the prompt is part of what is compressed; its logits are the full model's
                continue
            cache = alone(llama, policies, torch.tensor([sample.ids[:context]]))
            step, said = torch.tensor([sample.ids[context:]]), []
            for _ in range(len(sample.answer_ids) + 4):
                token = int(logits(llama, after, cache, step)[0, -1].argmax())
                if token == tokenizer.eos_token_id:
                    break
                said.append(token)
                step = torch.tensor([[token]])
            assert record.said == tokenizer.decode(said), name
        assert found[name].share < 0.5 or name == "pages"


def test_a_question_that_is_seen_is_compressed_with_the_text(llama, tokenizer):
    seen, unseen = (trials(llama, tokenizer, TASK, SETTINGS, 1, unseen=u) for u in (False, True))
    # the same count of entries is a smaller share of the longer text
    assert seen["heavy"].share < unseen["heavy"].share


@pytest.fixture
def calls(monkeypatch):
    """How many caches each reading of a prompt fills; the third one is broken off."""
    made = []

    def counted(model, prompt, settings, *beside):
        made.append(len(settings))
        if len(made) == 3:
            raise KeyboardInterrupt
        return branch(model, prompt, settings, *beside)

    monkeypatch.setattr("foveate.probe.trials.branch", counted)
    return made


def test_an_interrupted_trial_goes_on(llama, tokenizer, tmp_path, calls):
    file = tmp_path / "so far.jsonl"
    with pytest.raises(KeyboardInterrupt):
        trials(llama, tokenizer, TASK, SETTINGS, 4, file=file)
    # the line that was being written
    with file.open("a") as out:
        out.write('{"key": "half')
    told = []
    found = trials(llama, tokenizer, TASK, SETTINGS, 4, file=file, progress=lambda *at: told.append(at))
    assert len(calls) == 3 + 2 and told == [(n, 4) for n in (1, 2, 3, 4)]
    again = trials(llama, tokenizer, TASK, SETTINGS, 4, file=file)
    assert len(calls) == 5 and again == found
    # another policy is tried on all prompts, and only it
    more = trials(llama, tokenizer, TASK, {**SETTINGS, "new": (Streaming(FEW),)}, 4, file=file)
    assert calls[5:] == [1] * 4 and {n: more[n] for n in found} == found
    assert trials(llama, tokenizer, TASK, SETTINGS, 4) == found


def test_caches_that_do_not_fit_at_once_are_filled_in_turn(llama, tokenizer, tmp_path, monkeypatch, calls):
    want = trials(llama, tokenizer, TASK, SETTINGS, 2)
    calls.clear()
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2 * EACH / IN_MEMORY * whole))
    whole = own_bytes(llama, at_question(tokenizer))
    assert at_once(llama, at_question(tokenizer)) == 2
    with pytest.raises(KeyboardInterrupt):
        trials(llama, tokenizer, TASK, SETTINGS, 2, file=tmp_path / "so far.jsonl")
    # what was done of a prompt is not done again
    assert trials(llama, tokenizer, TASK, SETTINGS, 2, file=tmp_path / "so far.jsonl") == want
    assert calls == [1, 2, 1, 1, 1, 2, 1]


def at_question(tokenizer):
    return TASK.samples(tokenizer, 1, 0)[0].question_start


def test_results_in_other_circumstances_are_others(llama, tokenizer, tmp_path, monkeypatch):
    file = tmp_path / "so far.jsonl"
    settings = {"packed": (Quantised(),)}
    whole = trials(llama, tokenizer, TASK, settings, 1, file=file)
    half = trials(tiny.model("llama", max_position_embeddings=1024).bfloat16(), tokenizer, TASK, settings, 1, file=file)
    assert half["packed"].share > 1.5 * whole["packed"].share
    lines = len(file.read_text().splitlines())
    other = tiny.tokenizer()
    other.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %} "
    changes = [lambda: monkeypatch.setattr(foveate, "__version__", "another"), lambda: None]
    for chosen, change in zip((tokenizer, other), changes, strict=True):
        change()
        trials(llama, chosen, TASK, settings, 1, file=file)
        assert len(file.read_text().splitlines()) == (lines := lines + 2)
    trials(llama, other, TASK, settings, 1, file=file)
    assert len(file.read_text().splitlines()) == lines


def test_a_run_goes_on_as_well(llama, tokenizer, tmp_path, monkeypatch):
    file = tmp_path / "run.jsonl"
    first = run(llama, tokenizer, TASK, 3, unseen=True, file=file)
    assert len(file.read_text().splitlines()) == 3
    # another model is asked anew
    run(tiny.model("llama", seed=1, max_position_embeddings=1024), tokenizer, TASK, 3, unseen=True, file=file)
    assert len(file.read_text().splitlines()) == 6
    # by the module itself: the package has a function of its name
    monkeypatch.setattr(sys.modules["foveate.probe.run"], "ask", lambda *_: pytest.fail("asked again"))
    assert run(llama, tokenizer, TASK, 3, unseen=True, file=file) == first


def test_results_of_something_else_are_not_taken(tmp_path):
    file = tmp_path / "notes.jsonl"
    file.write_text("a note\nanother\n")
    with pytest.raises(BadInput, match="line 1, is no result"):
        Ledger(file)
    assert file.read_text() == "a note\nanother\n"
    with pytest.raises(BadInput, match="holds no results"):
        Ledger(tmp_path)


def test_a_ledger_keeps_what_it_is_given(tmp_path):
    file = tmp_path / "deep" / "results.jsonl"
    ledger = Ledger(file)
    ledger.add("a", {"x": 1.5})
    assert Ledger(file)["a"] == {"x": 1.5} and "b" not in ledger
    assert [json.loads(line)["key"] for line in file.read_text().splitlines()] == ["a"]


@pytest.mark.parametrize("mark", ["\x85", "\u2028", "\u2029", "\x0b", "\x1c", "\r", "\ud800"])
def test_answers_may_hold_any_character(tmp_path, mark):
    file, said = tmp_path / "results.jsonl", f"one{mark}two"
    Ledger(file).add("a", {"said": said})
    assert Ledger(file)["a"] == {"said": said} and file.read_bytes().isascii()
    if mark != "\ud800":
        # as they stand in files of before
        with file.open("ab") as out:
            out.write(json.dumps({"key": "b", "result": said}, ensure_ascii=False).encode() + b"\n")
        Ledger(file).add("c", 1)
        assert Ledger(file).found == {"a": {"said": said}, "b": said, "c": 1}


def test_a_line_torn_anywhere_is_written_again(tmp_path):
    """Also inside of a character, right before its end, and where it is the first one."""
    file = tmp_path / "results.jsonl"
    line = '{"key": "b", "result": "é\u2028"}\n'.encode()
    for whole in (b"", b'{"key": "a", "result": 1}\n'):
        for cut in range(len(line)):
            file.write_bytes(whole + line[:cut])
            ledger = Ledger(file)
            assert file.read_bytes() == whole and "b" not in ledger
            ledger.add("b", 2)
            assert Ledger(file).found == ({"a": 1} if whole else {}) | {"b": 2}


def test_what_is_whole_is_never_written_anew(tmp_path, monkeypatch):
    file = tmp_path / "results.jsonl"
    file.write_bytes(b'{"key": "a", "result": 1}\n{"key')
    before = file.stat().st_ino
    for name in ("write_text", "write_bytes"):
        monkeypatch.setattr(Path, name, lambda *_, **__: pytest.fail("a kill here would lose everything"))
    assert Ledger(file).found == {"a": 1} and file.stat().st_ino == before


@pytest.mark.parametrize("content", [b"a note", b"\xff\xfe\x00\n\x01", b"\x89PNG", b"{}"])
def test_a_file_that_is_no_ledger_stays_as_it_is(tmp_path, content):
    file = tmp_path / "notes"
    file.write_bytes(content)
    with pytest.raises(BadInput, match="holds no results of an earlier run"):
        Ledger(file)
    assert file.read_bytes() == content


def test_prompts_longer_than_the_model_reads(tokenizer):
    short = tiny.model("llama", max_position_embeddings=512)
    with pytest.raises(BadInput, match=r"LlamaForCausalLM reads 512.*length=50\d at most"):
        trials(short, tokenizer, TASK, {}, 1)
    with pytest.raises(BadInput, match="LlamaForCausalLM reads 512"):
        run(short, tokenizer, TASK, 1)


# ---------------------------------------------------------------- what follows a text


def test_what_follows_is_predicted_behind_the_compressed_text(llama):
    texts = [ids(60, seed=n)[0].tolist() for n in range(3)]
    found = continuations(llama, texts, {**SETTINGS, **OTHERS}, 40)
    for name, policies in {FULL: (Whole(),), **SETTINGS, **OTHERS}.items():
        for text, loss in zip(texts, found[name].losses, strict=True):
            cache = alone(llama, policies, torch.tensor([text[:-40]]))
            after = policies if name == "pages" else (Whole(),)
            with torch.no_grad():
                first = llama(input_ids=torch.tensor([text[:-40]])).logits[:, -1:]
            parts = [first]
            # what is read is chosen for a token that comes alone
            pieces = [(n, n + 1) for n in range(20, 59)] if name == "pages" else [(20, 52), (52, 59)]
            for a, b in pieces:
                parts.append(logits(llama, after, cache, torch.tensor([text[a:b]])))
            wanted = nn.functional.cross_entropy(torch.cat(parts, 1)[0], torch.tensor(text[20:])).item()
            assert math.isclose(loss, wanted, rel_tol=1e-4), name
    for name in ("heavy", "pages"):
        for whole, less in zip(found[FULL].losses, found[name].losses, strict=True):
            assert abs(whole - less) > 1e-4, name


@pytest.mark.parametrize(("texts", "follow"), [([[1, 2, 3]], 3), ([], 1), ([[1, 2]], 0)])
def test_a_text_with_nothing_in_front(llama, texts, follow):
    with pytest.raises(BadInput, match="give stretches of text"):
        continuations(llama, texts, {}, follow)
