"""Probes with several needles, chains, counted words and invented facts: right prompts, and nothing given away."""

from __future__ import annotations

import random
import re
from collections import Counter
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from foveate.core.errors import BadInput, BadParameter
from foveate.probe import CommonWords, KeyValue, Needles, PlantedFacts, VariableTracking, default_text
from foveate.probe.common_words import INSTRUCTION as LIST_BELOW
from foveate.probe.planted_facts import RELATIONS
from foveate.probe.sample import SLACK, fit

TASKS = [
    Needles(length=1000),
    Needles(length=1201, needles=5, digits=7),
    VariableTracking(length=1400),
    VariableTracking(length=3000, chains=3, hops=2, shots=1),
    CommonWords(length=1000),
    CommonWords(length=3001, words=4, share=0.25, shots=2),
    PlantedFacts(length=1000),
    PlantedFacts(length=1807, facts=11, depth=1.0),
]
ASKING = (
    *{relation.question.split("{")[0] for relation in RELATIONS},
    "What are the secret codes for ",
    "Which variables have the value ",
    "Question: What are the ",
)
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}<assistant>"
MEADOW = "Sheep graze behind green hedges, while brown horses drink. Nothing moves between these quiet fields. "


@pytest.fixture(scope="module", params=["bytes", "merges"])
def tokenizer(request):
    """One token per byte, or the merges of some English."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    size = {"bytes": len(letters) + 2, "merges": 1500}[request.param]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=letters, show_progress=False
    )
    made.train_from_iterator([default_text()[:60_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def spoken(tokenizer, sample):
    """The prompt up to the question, and from there."""
    return tokenizer.decode(sample.ids[: sample.question_start]), tokenizer.decode(sample.ids[sample.question_start :])


def places(part, text):
    """Where a text holds a piece as whole words."""
    return [found.start() for found in re.finditer(rf"(?<!\w){re.escape(part)}(?!\w)", text)]


@pytest.mark.parametrize("template", [None, CHAT], ids=["plain", "chat"])
@pytest.mark.parametrize("task", TASKS, ids=str)
def test_prompts_are_what_they_say(task, template, tokenizer):
    tokenizer.chat_template = template
    for sample in task.samples(tokenizer, 3, seed=3):
        context, question = spoken(tokenizer, sample)
        assert task.length - SLACK <= len(sample.ids) <= task.length
        assert tokenizer.decode(sample.ids[slice(*sample.needle)]).strip() == sample.asked[0]
        assert sample.needle[1] <= sample.question_start
        assert question.startswith(ASKING)
        assert not any(context.count(asking) for asking in ASKING if not getattr(task, "shots", 0))
        assert len(set(sample.asked)) == len(sample.asked)
        for part in sample.asked:
            assert places(part, context)
            assert places(part, sample.answer)
            assert not places(part, question)
        assert not places(sample.asked[0], tokenizer.decode(sample.ids[: sample.needle[0]]))
        assert tokenizer.decode(sample.answer_ids).strip() == sample.answer
        assert 0 <= sample.depth <= 1


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_the_seed_decides(task, tokenizer):
    first, again, other = (task.samples(tokenizer, 3, seed=s) for s in (1, 1, 2))
    assert first == again
    assert len({s.ids for s in first + other}) == len({s.asked for s in first + other}) == 6


def test_a_sample_without_parts_asks_for_its_answer(tokenizer):
    sample = KeyValue(length=900).samples(tokenizer, 1)[0]
    assert sample.parts == ()
    assert sample.asked == (sample.answer,)


@pytest.mark.parametrize("task", [Needles(1200), VariableTracking(1300), PlantedFacts(1200)], ids=str)
def test_the_context_does_not_tell_what_is_asked(task, tokenizer):
    tokenizer.chat_template = None
    task = type(task)(length=task.length, text=MEADOW)
    one, two = (task.sample(tokenizer, random.Random(5), asked) for asked in (0, 1))
    assert one.asked != two.asked
    assert one.needle[1] < two.needle[0] or one.needle[0] > two.needle[1]
    # The questions are not equally long, so that the filler, and only that, may end elsewhere.
    planted = [
        [line for line in spoken(tokenizer, sample)[0].splitlines() if line.strip() and line not in MEADOW * 30]
        for sample in (one, two)
    ]
    assert len(planted[0]) > 2
    assert planted[0] == planted[1]


@pytest.mark.parametrize("needles", [2, 4, 9])
def test_needles_are_asked_for_by_name(needles, tokenizer):
    for place, sample in enumerate(Needles(length=1800, needles=needles).samples(tokenizer, needles)):
        context, question = spoken(tokenizer, sample)
        said = re.findall(r"- (\w+): (\d+)", context)
        values = dict(said)
        names = re.split(r", | and ", question[len(ASKING[-3]) : question.index("?")])
        assert said[0::2] == said[1::2] == list(values.items())
        assert sample.parts == tuple(values[name] for name in names)
        assert sorted(values) == sorted(names)
        assert sample.parts[0] == list(values.values())[place]


@pytest.mark.parametrize(("chains", "hops"), [(1, 4), (2, 1), (4, 3)])
def test_assignments_lead_to_the_variables_asked_for(chains, hops, tokenizer):
    task = VariableTracking(length=6000, chains=chains, hops=hops)
    for sample in task.samples(tokenizer, 4):
        context, question = spoken(tokenizer, sample)
        held: dict[str, str] = {}
        for name, variable, value in re.findall(r"VAR (\w+) = (?:VAR (\w+)|(\d+))\.", context):
            # A source that stands further down would be a KeyError.
            held[name] = held[variable] if variable else value
        value = re.search(r"\d+", question).group()
        assert sample.parts == tuple(name for name in held if held[name] == value)
        assert len(held) == chains * (hops + 1)
        assert len(sample.parts) == hops + 1


def test_solved_examples_share_nothing_with_the_task(tokenizer):
    for task in (VariableTracking(length=2600, shots=2), CommonWords(length=2600, shots=2)):
        sample = task.samples(tokenizer, 1)[0]
        context = spoken(tokenizer, sample)[0]
        *shots, own = re.split(r"Memorize (?:them|the ones)", context)[1:]
        assert len(shots) == 2
        for part in sample.parts:
            assert places(part, own)
            assert not any(places(part, shot) for shot in shots)


@pytest.mark.parametrize(
    "text", [None, " ".join(f"w{a}r{b}d" for a in "aeiou" for b in "aeiouyz")], ids=["long", "few"]
)
@pytest.mark.parametrize("length", [700, 9000])
def test_common_words_are_the_most_common(length, text, tokenizer):
    task = CommonWords(length=length, text=text)
    sample = task.samples(tokenizer, 1)[0]
    listed = re.findall(r"(\d+)\. (\w+)", spoken(tokenizer, sample)[0].split(LIST_BELOW)[1])
    assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
    counts = Counter(word for _, word in listed)
    (_, most), *_ = ranked = counts.most_common()
    assert {word for word, count in ranked if count == most} == set(sample.parts)
    rest = {count for word, count in ranked if count < most}
    assert max(rest) - min(rest) <= 1
    if text is None:
        assert rest == {1}
    assert len(sample.parts) * most / len(listed) == pytest.approx(task.share, abs=0.06)


def test_planted_facts_are_new_and_asked_for(tokenizer):
    filling = default_text().lower()
    samples = PlantedFacts(length=2400, facts=8).samples(tokenizer, 8)
    asked = []
    for sample in samples:
        context, question = spoken(tokenizer, sample)
        found = []
        for relation in RELATIONS:
            stated = re.compile(relation.stated.format(name=r"(\w+)") + r" ((?:\w+ ?)+)\.")
            for match in stated.finditer(context):
                found.append((match.start(), relation.question.format(name=match[1]), match[2]))
                assert len(match[2].split()) == relation.names
                assert not any(name.lower() in filling for name in (match[1], *match[2].split()))
        found.sort()
        assert len(found) == 8
        assert len(places(sample.answer, context)) == 1
        (place,) = [n for n, (_, asking, answer) in enumerate(found) if question.startswith(asking)]
        assert found[place][2] == sample.answer
        asked.append(place)
    assert asked == list(range(8))


@pytest.mark.parametrize(("depth", "place"), [(0.0, 0), (0.5, 2), (1.0, 3)])
def test_depth_says_which_fact(depth, place, tokenizer):
    sample = PlantedFacts(length=4000, depth=depth).samples(tokenizer, 1)[0]
    assert sample.depth == (place + 0.5) / 4
    assert sample.needle[0] / len(sample.ids) == pytest.approx(sample.depth, abs=0.15)


@pytest.mark.parametrize("cls", [Needles, VariableTracking, CommonWords, PlantedFacts])
def test_what_cannot_be_asked(cls, tokenizer):
    with pytest.raises(BadInput, match="length=60 is too short"):
        cls(length=60).samples(tokenizer, 1)
    with pytest.raises(BadInput, match="at least one sample"):
        cls().samples(tokenizer, 0)
    with pytest.raises(BadInput, match="filler text is empty"):
        cls(text=" \n").samples(tokenizer, 1)
    with pytest.raises(BadParameter, match="length must be from"):
        cls(length=0)
    if cls in (Needles, CommonWords):
        with pytest.raises(BadInput, match=r"text has only 2 words that .* needs"):
            cls(text="wholly 12 wooden").samples(tokenizer, 1)


def test_parameters_have_bounds():
    with pytest.raises(BadParameter, match="needles must be from 2"):
        Needles(needles=1)
    with pytest.raises(BadParameter, match="hops must be from 1"):
        VariableTracking(hops=0)
    with pytest.raises(BadParameter, match=r"share must be from 0\.05"):
        CommonWords(share=1.0)
    with pytest.raises(BadParameter, match="depth must be from 0"):
        PlantedFacts(depth=-0.1)


@pytest.mark.parametrize("rate", [0.01, 0.2, 4.0])
@pytest.mark.parametrize("step", [1, 5, 13, 16])
def test_the_length_is_met_whatever_a_unit_takes(step, rate, unchecked):
    # what has a length stands for a prompt, which annotations would not have
    for length in range(700, 740):
        found = fit(lambda size: SimpleNamespace(ids=range(30 + step * size)), length, rate)
        assert length - SLACK <= len(found.ids) <= length
