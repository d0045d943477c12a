"""Tasks: what is read is all that the file holds, scores are the plain definition's, comparisons are honest."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from foveate.core.errors import BadInput, UnknownName
from foveate.tasks import (
    Example,
    Scores,
    compare,
    log_likelihoods,
    loss,
    parse_columns,
    parse_labels,
    parse_template,
    prepare,
    read,
    score,
    split,
)
from foveate.tasks.preparing import lay_out
from foveate.testing import tiny

SENTIMENT = "Review: {sentence}\nSentiment: {label}"
LABELS = {"0": "negative", "1": "positive"}
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}<assistant>"

EXAMPLES = (
    Example("The sky is", (" blue", " black", " red"), 0),
    Example("2+2=", ("4", "5", "3"), 0),
    Example("A much longer prompt than all of the others, with many words: ", ("yes", "no"), 1),
    Example("The sky is", (" green", " blue"), 1),
    Example("Spell cat:", answer=" c-a-t"),
    Example("x", ("aaaaaaaaaaaaaaaaaaaaaaaab", "aaaaaaaaaaaaaaaaaaaaaaaac"), 1),
)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def llama():
    return tiny.model("llama")


# Examples


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"prompt": " \n"}, "prompt must be a text that says something"),
        ({"prompt": 3}, "prompt must be a text .* got 3"),
        ({"choices": ("a",)}, "one choice, 'a', decides nothing"),
        ({"choices": ("a", "b", "a")}, "choices 0 and 2 are both 'a'"),
        ({"choices": ("a", "")}, "choice 1 must be a text"),
        ({"choices": ["a", "b"]}, "must be a tuple of texts"),
        ({"choices": ("a", "b"), "answer": 2}, "answer=2 is none of 2 choices; count from 0"),
        ({"choices": ("a", "b"), "answer": -1}, "answer=-1 is none of 2 choices"),
        ({"choices": ("a", "b"), "answer": "a"}, "must be the index of the right choice, got 'a'"),
        ({"choices": ("a", "b"), "answer": True}, "must be the index of the right choice, got True"),
        ({"answer": " "}, "without choices the answer must be a text"),
        ({"answer": 0}, "without choices the answer must be a text, got 0"),
        ({"answer": "a", "corrupted": "p"}, "another text than the prompt"),
    ],
)
def test_examples_that_make_no_sense(parts, reason, unchecked):
    with pytest.raises(BadInput, match=reason):
        Example(**{"prompt": "p", **parts})


def test_the_right_text():
    assert Example("p", ("a", "b"), 1).right_text == "b"
    assert Example("p", answer="c").right_text == "c"


def numbered(count):
    return tuple(Example(f"prompt {i}", answer="a") for i in range(count))


def test_split():
    examples = numbered(40)
    train, held = split(examples, 0.4, seed=1)
    assert (len(train), len(held)) == (16, 24)
    assert set(train) | set(held) == set(examples)
    assert (train, held) == split(examples, 16, seed=1)
    assert train != split(examples, 16, seed=2)[0]


def test_equal_prompts_are_not_split():
    examples = numbered(20) + tuple(replace(e, answer="b") for e in numbered(20))
    for seed in range(5):
        train, held = split(examples, 0.5, seed)
        assert not {e.prompt for e in train} & {e.prompt for e in held}
        assert len(train) + len(held) == 40


def test_too_few_to_split():
    with pytest.raises(BadInput, match=r"15 examples .* 8 for training and 7 held out .* at least 8"):
        split(numbered(15), 8)
    with pytest.raises(BadInput, match=r"7 for training and 93 held out \(train=7\)"):
        split(numbered(100), 7)
    assert [len(part) for part in split(numbered(16))] == [8, 8]
    for share in (0, -3, 0.0, 1.0, 1.5):
        with pytest.raises(BadInput, match="give a share between 0 and 1"):
            split(numbered(100), share)


# Reading


def test_json_lines(tmp_path):
    file = tmp_path / "t.jsonl"
    lines = [
        {"prompt": "a\u2028b", "choices": ["x", "y"], "answer": 1, "id": 7},
        {"prompt": "c", "answer": "z", "corrupted": "d"},
    ]
    file.write_text("\ufeff" + "\r\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n", "utf-8")
    assert read(file) == (Example("a\u2028b", ("x", "y"), 1), Example("c", (), "z", "d"))


def test_every_broken_line_is_told(tmp_path):
    file = tmp_path / "t.jsonl"
    good = '{"prompt": "p", "answer": "a"}'
    bad = ["{", "[1]", '{"prompt": "p"}', '{"prompt": "p", "choices": ["a", "b"], "answer": 2}', '{"prompt": 1}', "x"]
    file.write_text("\n".join([good, *bad, good]))
    with pytest.raises(BadInput) as caught:
        read(file)
    said = str(caught.value)
    assert said.startswith(f"{file} cannot be read at 6 of 8 places (the first 5): line 2: no JSON, Expecting")
    assert "line 3: must be an object in braces, got [1]; line 4: has no 'answer', only ['prompt']" in said
    assert "line 5: answer=2 is none of 2 choices" in said and "line 6: has no 'answer'" in said
    assert "line 7" not in said and "\n" not in said


def test_json_lines_with_a_template(tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_text('{"sentence": "good", "label": 1}\n{"sentence": "bad", "label": 0}')
    assert [e.right_text for e in read(file, SENTIMENT, labels=LABELS)] == [" positive", " negative"]
    file.write_text('{"sentence": "good", "label": 1}\n{"sentence": null, "label": true}\n{"label": 1}')
    with pytest.raises(BadInput, match=r"line 2: sentence must .* got None; line 3: sentence must .* got nothing"):
        read(file, SENTIMENT, labels=LABELS)


def test_a_table_between_commas(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text('label,sentence\r\n1,"so ""good"", and\r\nlong"\r\n0,bad\r\n', newline="")
    choices = (" negative", " positive")
    assert read(file, SENTIMENT, labels=LABELS) == (
        Example('Review: so "good", and\r\nlong\nSentiment:', choices, 1),
        Example("Review: bad\nSentiment:", choices, 0),
    )
    assert read(file, SENTIMENT, labels=LABELS) == read(
        str(file), SENTIMENT, None, parse_labels("0=negative,1=positive")
    )
    assert read(file, "{sentence}\n{label}")[1] == Example("bad\n", (), "0")
    assert read(file, "{{{sentence}}} {label}", labels={"0": "\tno", "1": "yes"})[1].choices == ("\tno", " yes")


def test_a_table_between_tabs(tmp_path):
    file = tmp_path / "t.tsv"
    file.write_text('0\t" not closed\n\n1\tgood\n')
    found = read(file, SENTIMENT, ["label", "sentence"], LABELS)
    assert [e.prompt for e in found] == ['Review: " not closed\nSentiment:', "Review: good\nSentiment:"]


def test_broken_rows_of_a_table(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text('label,sentence\n1,"two\nlines"\n1\n2,a\n0,"bad" one\n1,good\n')
    with pytest.raises(BadInput) as caught:
        read(file, SENTIMENT, labels=LABELS)
    said = str(caught.value)
    assert "line 4: 1 cells instead of 2 (label, sentence); line 5: label is '2', which is none of '0', '1'" in said
    assert "line 6: ',' expected after '\"'; look for a quotation mark" in said
    file.write_text('label,sentence\n1,"never closed\n0,bad\n')
    with pytest.raises(BadInput, match="line 2: unexpected end of data"):
        read(file, SENTIMENT, labels=LABELS)


def test_big_bench_hard(tmp_path):
    file = tmp_path / "t.json"
    options = "Which?\nOptions:\n(A) one (B)\n(B) two"
    file.write_text(json.dumps({"canary": "c", "examples": [{"input": options, "target": "(B)"}]}))
    assert read(file) == (Example(f"Q: {options}\nA:", (" (A)", " (B)"), 1),)
    assert read(file, "{input}\nA: ({target}") == (Example(f"{options}\nA: (", ("A", "B"), 1),)
    asked = [{"input": str(i), "target": "yes" if i % 3 else "no"} for i in range(6)]
    file.write_text(json.dumps({"examples": asked}))
    assert [(e.choices, e.answer) for e in read(file)] == [((" no", " yes"), int(i % 3 > 0)) for i in range(6)]
    assert read(file, "{input}? {target}")[0].prompt == "0?"
    file.write_text(json.dumps({"examples": [{"input": str(i), "target": f"word {i}"} for i in range(6)]}))
    assert read(file)[5] == Example("Q: 5\nA:", (), " word 5")
    file.write_text(json.dumps({"examples": [{"input": options, "target": "(C)"}, 3]}))
    with pytest.raises(
        BadInput, match=r"example 1: target is '\(C\)', which is none of .* example 2: must be an object"
    ):
        read(file)


def test_a_list_in_json(tmp_path):
    file = tmp_path / "t.json"
    file.write_text('[{"prompt": "p", "answer": "a"}]')
    assert read(file) == (Example("p", answer="a"),)
    file.write_text('{"prompt": "p", "answer": "a"}\n{"prompt": "p", "answer": "a"}')
    with pytest.raises(BadInput, match=r"line 2: no JSON, Extra data .* must be called .jsonl"):
        read(file)
    file.write_text('{"prompt": "p", "answer": "a"}')
    with pytest.raises(BadInput, match="must hold a list of examples"):
        read(file)


def test_limit_and_seed(tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"prompt {i}", "answer": "a"}) for i in range(30)))
    whole = read(file)
    assert whole == numbered(30)
    assert read(file, limit=5) == whole[:5]
    drawn = read(file, limit=5, seed=3)
    assert drawn == read(file, limit=5, seed=3) != read(file, limit=5, seed=4)
    assert len(set(drawn)) == 5 and set(drawn) < set(whole)
    assert sorted(read(file, seed=0), key=whole.index) == list(whole) != list(read(file, seed=0))
    with pytest.raises(BadInput, match="limit=0"):
        read(file, limit=0)
    file.write_text(file.read_text() + "\n{")
    with pytest.raises(BadInput, match="line 31"):
        read(file, limit=5)


@pytest.mark.parametrize(
    ("name", "text", "options", "reason"),
    [
        ("t.txt", "a", {}, r"ends with \.jsonl, \.json, \.csv, \.tsv, not with '\.txt'"),
        ("t", "a", {}, "not with 'nothing'"),
        ("t.jsonl", "\n", {}, "holds no examples"),
        ("t.csv", "", {"template": "{a}{b}"}, "holds no examples"),
        ("t.csv", "a,b\n1,2", {}, "a table needs a template .* its columns are a, b"),
        ("t.csv", "1,2\n3,4", {"template": "{a} {b}"}, "no column 'a', 'b', .* it has '1', '2'; .* give columns"),
        ("t.csv", "a,b\n3,4", {"template": "{a}{b}", "columns": ["b", "c"]}, "no column 'a'.* it has 'b', 'c'\\.$"),
        ("t.csv", "a,a\n3,4", {"template": "{a}"}, "different names, got \\['a', 'a'\\]"),
        ("t.csv", "a,\n3,4", {"template": "{a}"}, "different names"),
        ("t.jsonl", "{}", {"columns": ["a"]}, "is for .csv and .tsv"),
        ("t.jsonl", "{}", {"labels": {"0": "a", "1": "b"}}, "labels are for the last column"),
        ("t.csv", "a,b\n1,2", {"template": "{a}{b}", "labels": {"0": "a"}}, "labels .* one choice"),
        ("t.csv", "a,b\n1,2", {"template": "{a}{b}", "labels": {}}, "labels {}: there are none"),
        ("t.csv", "a,b\n1,2", {"template": "{a"}, "expected '}' before end of string; a brace"),
        ("t.csv", "a,b\n1,2", {"template": "{a}{b}."}, "must end with the column of the answer"),
        ("t.csv", "a,b\n1,2", {"template": ""}, "must end with the column of the answer"),
        ("t.csv", "a,b\n1,2", {"template": "{b} {a} {b}"}, "gives the answer away"),
        ("t.csv", "a,b\n1,2", {"template": "{a!r} {b}"}, "its name in braces and no more"),
        ("t.csv", "a,b\n1,2", {"template": "{} {b}"}, "its name in braces and no more"),
    ],
)
def test_files_that_do_not_fit(name, text, options, reason, tmp_path):
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(BadInput, match=reason):
        read(file, **options)


def test_files_that_cannot_be_opened(tmp_path):
    with pytest.raises(BadInput, match=r"cannot read .*none.jsonl: No such file"):
        read(tmp_path / "none.jsonl")
    file = tmp_path / "t.jsonl"
    file.write_bytes(b"{}\n\xff")
    with pytest.raises(BadInput, match="line 2: not UTF-8"):
        read(file)


def test_what_is_typed():
    assert parse_labels('0=no, 1 =yes,"2=no, not = yes"') == {"0": "no", "1": "yes", "2": "no, not = yes"}
    assert parse_columns("label, sentence") == ["label", "sentence"]
    assert parse_template(r"a\nb\tc") == "a\nb\tc"
    for typed, reason in [
        ("0=a,1", "'1' has no '='"),
        ("0=a,0=b", "comes twice"),
        ("0=a", "one choice"),
        ("0=a,1=a", "both 'a'"),
        ("", "there are none"),
        ('0=a,"1=b', "unexpected end of data"),
    ]:
        with pytest.raises(BadInput, match=reason):
            parse_labels(typed)


# Preparing


def test_a_model_reads_nothing_twice(tokenizer):
    plain = prepare(tokenizer, [Example("ab", ("c", "d", "e"), 0)]).layout
    assert len(plain.sequences) == len(plain.contexts) == 1
    # "abc" is the beginning of what "cdf" needs
    longer = prepare(tokenizer, [Example("ab", ("cde", "cdf", "g"), 0), Example("ab", ("h", "i"), 0)]).layout
    assert [tokenizer.decode(s) for s in longer.sequences] == ["abcd"]
    assert longer.contexts == ((0, 1), (0, 2), (0, 3))
    assert len(longer.questions) == 9
    apart = prepare(tokenizer, [Example("ab", ("cde", "fgh"), 0)]).layout
    assert [tokenizer.decode(s) for s in apart.sequences] == ["abcd", "abfg"]
    assert len(apart.contexts) == 5, "the prompt's end is asked once"


def test_parts_of_prepared_examples(tokenizer, llama):
    prepared = prepare(tokenizer, EXAMPLES)
    whole, part = score(llama, None, prepared), score(llama, None, prepared[2:4])
    assert part.examples == EXAMPLES[2:4] and len(part) == len(prepared[2:4]) == 2
    np.testing.assert_allclose(part.log_likelihood, whole.log_likelihood[2:4], atol=1e-5)
    assert lay_out(prepared) == prepared.layout is prepared.layout


def test_a_tokenizer_that_merges_across_the_border():
    words = {w: i for i, w in enumerate(["<s>", "a", "b", "c", "ab", "bc"])}
    inner = Tokenizer(models.BPE(words, [("b", "c"), ("a", "b")]))
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    merging = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")
    # "abc" is a|bc, which does not begin with the prompt's own ab
    assert merging("abc")["input_ids"] == [0, words["a"], words["bc"]]
    prepared = prepare(merging, [Example("ab", ("c", "a"), 0)])
    assert prepared.prompts == ((0, words["ab"]),)
    assert prepared.options == (((words["c"],), (words["a"],)),)


def test_chat(tokenizer):
    chatty = tiny.tokenizer()
    chatty.chat_template = CHAT
    prepared = prepare(chatty, [Example("ab", (" c", " d"), 0), Example("e", answer=" f")], chat=True)
    assert [chatty.decode(p) for p in prepared.prompts] == ["<user>ab</><assistant>", "<user>e</><assistant>"]
    assert [[chatty.decode(o) for o in options] for options in prepared.options] == [["c", "d"], ["f"]]
    # a tokenizer that begins each text with <s>, which a chat template writes itself
    chatty.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    for chat in (False, True):
        begun = prepare(chatty, [Example("ab", ("c", "d"), 0)], chat=chat)
        assert (begun.prompts[0][0] == 1) is not chat
        assert begun.options == prepared.options[:1]
    with pytest.raises(BadInput, match="has no chat template"):
        prepare(tokenizer, EXAMPLES, chat=True)


def test_examples_that_cannot_be_prepared(tokenizer):
    with pytest.raises(BadInput, match="at least one"):
        prepare(tokenizer, [])
    with pytest.raises(BadInput, match="example 1: the tokens of 'no' are the first tokens of 'not'"):
        prepare(tokenizer, [EXAMPLES[0], Example("p", ("not", "yes", "no"), 0)])
    with pytest.raises(BadInput, match="the first tokens of"):
        prepare(tokenizer, [Example("p", ("é", "ü"), 0)])
    few = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, "b": 1}, [])))
    with pytest.raises(BadInput, match="example 0: 'c' has no tokens"):
        prepare(few, [Example("a", ("b", "c"), 0)])
    with pytest.raises(BadInput, match="the prompt 'c' has no tokens"):
        prepare(few, [Example("c", ("a", "b"), 0)])


# Scoring


def plain(model, tokenizer, example):
    """The definition: each option alone, all logits, nothing shared."""
    prompt = tokenizer(example.prompt)["input_ids"]
    by, greedy = [], []
    for option in example.options:
        ids = torch.tensor([tokenizer(example.prompt + option)["input_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1].double()
        asked = ids[0, len(prompt) :]
        by.append(logits.log_softmax(-1)[range(len(asked)), asked])
        rest = logits.scatter(1, asked[:, None], -torch.inf).amax(-1)
        greedy.append((logits[range(len(asked)), asked] - rest).min())
    first = torch.distributions.Categorical(logits=logits[0]).entropy()
    return by, greedy[0].item(), first.item()


@pytest.mark.parametrize("normalise", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "granite", "opt"])
def test_scores_are_the_plain_definition(name, batch, normalise, tokenizer):
    changed = {"final_logit_softcapping": 3.0} if name == "gemma2" else {}
    model = tiny.model(name, **changed)
    found = score(model, tokenizer, EXAMPLES, batch=batch, normalise=normalise)
    for i, example in enumerate(EXAMPLES):
        by, lead, entropy = plain(model, tokenizer, example)
        by = torch.stack([b.mean() if normalise else b.sum() for b in by])
        np.testing.assert_allclose(found.by_choice[i], by, rtol=1e-4, atol=1e-4)
        assert found.entropy[i] == pytest.approx(entropy, rel=1e-4)
        assert found.log_likelihood[i] == found.by_choice[i][example.right]
        if example.choices:
            wrong = max(b for n, b in enumerate(by.tolist()) if n != example.answer)
            assert found.predicted[i] == by.argmax()
            assert found.probability[i] == pytest.approx(by.softmax(0)[example.right].item(), rel=1e-3, abs=1e-6)
            assert found.margin[i] == pytest.approx(by[example.right].item() - wrong, abs=2e-4)
            assert found.right[i] == (found.predicted[i] == example.answer)
        else:
            assert found.margin[i] == pytest.approx(lead, abs=2e-4)
            assert found.probability[i] == pytest.approx(by.exp().item(), rel=1e-3)
            assert found.right[i] == (lead > 0)
    assert found.accuracy == found.right.mean()
    assert found.interval[0] < found.accuracy < found.interval[1] or found.accuracy in (0, 1)


def test_choices_are_scored_whole(llama, tokenizer):
    # only the last of 25 tokens tells them apart
    b, c = Example("x", EXAMPLES[5].choices, 0), EXAMPLES[5]
    both = score(llama, tokenizer, [b, c])
    assert sorted(both.right) == [False, True]
    assert both.margin[0] == -both.margin[1] != 0


def test_a_free_answer_is_right_if_greedy_decoding_gives_it(llama, tokenizer):
    ids = tokenizer("Say:", return_tensors="pt")["input_ids"]
    said = llama.generate(ids, do_sample=False, max_new_tokens=4, eos_token_id=None, pad_token_id=0)[0, ids.shape[1] :]
    answer = tokenizer.decode(said)
    assert tokenizer("Say:" + answer)["input_ids"][ids.shape[1] :] == said.tolist()
    other = answer[:-1] + ("a" if answer[-1] != "a" else "b")
    found = score(llama, tokenizer, [Example("Say:", answer=answer), Example("Say:", answer=other)])
    assert found.right.tolist() == [True, False]
    assert found.predicted.tolist() == [0, -1]
    assert found.margin[0] > 0 > found.margin[1]


def test_a_tie_is_not_right(tokenizer):
    model = tiny.model("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    found = score(model, tokenizer, EXAMPLES[1:3], normalise=True)
    assert found.predicted.tolist() == [0, 0]
    assert found.margin.tolist() == [0, 0] and not found.right.any()
    assert found.entropy == pytest.approx(np.log(tiny.VOCABULARY))


def test_progress_and_order(llama, tokenizer):
    seen = []
    whole = score(llama, tokenizer, EXAMPLES, batch=2, progress=lambda *done: seen.append(done))
    count = len(prepare(tokenizer, EXAMPLES).layout.sequences)
    assert seen == [(min(i, count), count) for i in range(2, count + 2, 2)]
    back = score(llama, tokenizer, EXAMPLES[::-1])
    np.testing.assert_allclose(back.log_likelihood[::-1], whole.log_likelihood, atol=1e-5)


def test_many_positions_go_through_the_head_in_chunks(llama, tokenizer, monkeypatch):
    whole = score(llama, tokenizer, EXAMPLES)
    monkeypatch.setattr("foveate.tasks.scoring.CHUNK", 3)
    chunked = score(llama, tokenizer, EXAMPLES)
    for a, b in zip(whole.by_choice, chunked.by_choice, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_allclose(whole.entropy, chunked.entropy, atol=1e-5)


def test_gradients(llama, tokenizer):
    prepared = prepare(tokenizer, EXAMPLES)
    weight = llama.model.layers[0].self_attn.o_proj.weight
    by = log_likelihoods(llama, prepared, batch=4)
    expected = score(llama, None, prepared)
    for a, b in zip(by, expected.by_choice, strict=True):
        np.testing.assert_allclose(a.detach(), b, atol=1e-4)
    value = loss(llama, prepared, batch=4)
    assert value.item() == pytest.approx(-np.log(expected.probability).mean(), rel=1e-4)
    (slope,) = torch.autograd.grad(value, weight)
    step = 1e-3 * slope / slope.norm()
    with torch.no_grad():
        weight += step
        up = loss(llama, prepared).item()
        weight -= 2 * step
        down = loss(llama, prepared).item()
        weight += step
    assert (up - down) / 2e-3 == pytest.approx(slope.norm().item(), rel=0.02)


def test_what_cannot_be_scored(llama, tokenizer):
    with pytest.raises(BadInput, match="257 tokens with its answer, LlamaForCausalLM reads 256"):
        score(llama, tokenizer, [Example("a" * 257, ("b", "c"), 0)])
    with pytest.raises(BadInput, match="batch=0"):
        score(llama, tokenizer, EXAMPLES, batch=0)
    broken = tiny.model("llama")
    torch.nn.init.constant_(broken.lm_head.weight, torch.nan)
    with pytest.raises(BadInput, match="not finite on 6 of 6 examples, first on number 0"):
        score(broken, tokenizer, EXAMPLES)


def test_probabilities_of_long_answers(tokenizer):
    model = tiny.model("llama")
    with torch.no_grad():
        model.lm_head.weight *= 20
    long = Example("p", ("a" * 200, "b"), 0)
    found = score(model, tokenizer, [long, replace(long, answer=1)])
    assert found.margin[1] > 710, "more than an exponential holds"
    assert found.probability.tolist() == [0, 1]


# Comparing


def scores(margin, normalised=False):
    """Scores with these margins, whose other arrays do not matter."""
    margin = np.asarray(margin, dtype=float)
    same = margin - 20.0
    return Scores(
        tuple(Example(f"prompt {i}", ("a", "b"), 0) for i in range(len(margin))),
        np.where(margin > 0, 0, 1),
        margin > 0,
        margin,
        same,
        np.exp(same),
        same,
        tuple(np.array([m, 0.0]) for m in margin),
        normalised,
    )


def test_nothing_changed():
    found = compare(scores([1.0, -1.0] * 10), scores([1.0, -1.0] * 10))
    assert (found.before, found.after, found.difference) == (0.5, 0.5, 0)
    assert (found.low, found.high, found.p, found.n) == (0, 0, 1, 20)


def test_a_change_of_right_answers_is_mcnemars():
    before = [1.0] * 30 + [-1.0] * 30
    after = [1.0] * 28 + [-1.0] * 2 + [1.0] * 9 + [-1.0] * 21
    found = compare(scores(before), scores(after))
    assert found.difference == pytest.approx(7 / 60)
    assert 0 < found.low < 7 / 60 < found.high < 0.3
    # 9 got right and 2 got wrong, of 11 that changed
    assert found.p == pytest.approx(binomtest(2, 11).pvalue)
    assert compare(scores(after), scores(before)).difference == -found.difference


def test_an_interval_is_that_of_pairs():
    rng = np.random.default_rng(0)
    was = rng.normal(0, 10, 200)
    changes = rng.normal(0.3, 1, 200)
    found = compare(scores(was), scores(was + changes), what="margin")
    half = 1.96 * changes.std() / np.sqrt(200)
    assert (found.low, found.high) == pytest.approx((changes.mean() - half, changes.mean() + half), abs=0.03)
    assert found.p < 0.01
    assert found == compare(scores(was), scores(was + changes), what="margin")
    assert found != compare(scores(was), scores(was + changes), what="margin", seed=1)
    none = compare(scores(was), scores(was + changes - changes.mean()), what="margin")
    assert none.p > 0.5 and none.low < 0 < none.high


def test_all_changed_by_the_same():
    found = compare(scores([-1.0] * 10), scores([1.0] * 10))
    assert (found.difference, found.low, found.high) == (1, 1, 1)
    assert found.p == pytest.approx(2 / 2**10)


def test_all_changed_by_the_same_but_for_rounding():
    found = compare(scores([1.0] * 10), scores([2.0] * 9 + [np.nextafter(2.0, 3)]), what="margin")
    assert (found.low, found.high) == pytest.approx((1, 1))


def test_one_change_of_many():
    found = compare(scores([-1.0] * 50), scores([1.0] + [-1.0] * 49))
    assert found.p == 1 and 0 <= found.low <= 0.02 <= found.high < 0.15


def test_scores_that_cannot_be_compared():
    with pytest.raises(BadInput, match="3 and 2 examples, which are not the same"):
        compare(scores([1, 1, 1]), scores([1, 1]))
    other = replace(scores([1.0, 1.0]), examples=numbered(2))
    with pytest.raises(BadInput, match="2 and 2 examples, which are not the same"):
        compare(scores([1, 1]), other)
    with pytest.raises(BadInput, match="normalised by length"):
        compare(scores([1, 1]), scores([1, 1], normalised=True))
    with pytest.raises(BadInput, match="at least two"):
        compare(scores([1]), scores([1]))
    with pytest.raises(UnknownName, match="'rihgt'; did you mean 'right'"):
        compare(scores([1, 1]), scores([1, 1]), what="rihgt")
