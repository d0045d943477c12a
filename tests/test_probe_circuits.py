"""Generated tasks for head-level evidence: each answer is worked out again from the prompt's text alone."""

from __future__ import annotations

import operator
import re
from collections import Counter

import pytest

from foveate.core.errors import BadInput, BadParameter
from foveate.probe.arithmetic import Arithmetic
from foveate.probe.coloured_objects import ColouredObjects
from foveate.probe.distinct import distinct
from foveate.probe.factual_recall import FACTS, TEMPLATES, FactualRecall
from foveate.probe.indirect_object import IndirectObject
from foveate.probe.instruction import Instruction
from foveate.tasks.examples import Example

SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
NO_NAMES = {"Then", "When", "After", "While", "Yesterday", "Once", "In"}


def given_to(prompt: str) -> str:
    """Who is named once."""
    named = Counter(word for word in re.findall(r"\b[A-Z][a-z]+", prompt) if word not in NO_NAMES)
    assert sorted(named.values()) == [1, 2]
    return min(named, key=lambda name: named[name])


def colour_of(prompt: str) -> str:
    """The word before the thing in the list, or after its `is` in the sentences."""
    told = prompt.rsplit("Q: ", 1)[1]
    scene, asked = re.fullmatch(r"(On .*\.) What color is the (\w+)\?\nA:.*", told).groups()
    said = re.findall(rf"the {asked} is (\w+)", scene)
    return said[0] if said else re.findall(rf"(\w+) {asked}\b", scene)[0].title()


def calculated(prompt: str) -> str:
    """The last line's result, where the lines before it are right, too."""
    *solved, last = prompt.split("\n")
    for line in solved:
        a, sign, b, _, result = line.split(" ")
        assert SIGNS[sign](int(a), int(b)) == int(result)
    a, sign, b, equals = last.split(" ")
    assert equals == "=" and len(a) == len(b)
    return str(SIGNS[sign](int(a), int(b)))


def fact(prompt: str) -> str:
    """What the table says to the last line's sentence."""
    found = [
        answer
        for relation, facts in FACTS.items()
        for country, answer in facts.items()
        if prompt.rsplit("\n", 1)[-1] in [t.format(country=country) for t in TEMPLATES[relation]]
    ]
    assert len(found) == 1
    return found[0]


def told(prompt: str) -> str:
    """How the prompt's last words went on, when they were written before."""
    last = re.escape(re.split(r"[\n:] ?", prompt)[-1])
    (found,) = re.findall(rf"{last} (\w+)\.", prompt)
    return found


TASKS = [
    (IndirectObject(), given_to),
    (ColouredObjects(), colour_of),
    (ColouredObjects(form="sentences", objects=5, shots=0), colour_of),
    (ColouredObjects(objects=2, shots=2), colour_of),
    (Arithmetic(), calculated),
    (Arithmetic(digits=1, operations=("-", "*"), shots=4), calculated),
    (Arithmetic(digits=6, operations=("+", "-", "*"), shots=0), calculated),
    (FactualRecall(), fact),
    (FactualRecall(relations=("currency", "continent"), shots=3), fact),
    (Instruction(), told),
    (Instruction(kind="instruction", distractors=1), told),
    (Instruction(distractors=20, filler=3000), told),
]
each_task = pytest.mark.parametrize(("task", "worked_out"), TASKS, ids=[str(task) for task, _ in TASKS])


def plain(examples) -> list[Example]:
    return [getattr(e, "example", e) for e in examples]


@each_task
def test_answers_follow_from_the_prompt(task, worked_out):
    for example in plain(task.examples(48, seed=1)):
        assert example.choices[example.answer] == " " + worked_out(example.prompt)
        corrupted = example.choices[(example.answer + 1) % len(example.choices)]
        assert corrupted == " " + worked_out(example.corrupted)
        assert len(example.corrupted.split(" ")) == len(example.prompt.split(" "))


@each_task
def test_one_seed_gives_one_set_of_different_prompts(task, worked_out):
    examples = task.examples(32, seed=5)
    assert examples == task.examples(32, seed=5)
    assert examples[:7] == task.examples(7, seed=5)
    assert len({e.prompt for e in plain(examples)}) == 32
    assert len({e.prompt for e in plain(examples)} & {e.prompt for e in plain(task.examples(32, seed=6))}) < 16


@each_task
def test_places_of_the_answers_are_balanced(task, worked_out):
    places = Counter(e.answer for e in plain(task.examples(60)))
    assert len(set(places.values())) == 1
    assert len(places) == len(plain(task.examples(1))[0].choices)


def test_both_orders_of_names_and_both_places_occur_equally():
    seen = Counter()
    for example in IndirectObject().examples(80):
        names = [n for n in re.findall(r"\b[A-Z][a-z]+", example.prompt) if n not in NO_NAMES]
        seen["ABBA" if names[2] == names[1] else "BABA", example.answer] += 1
    assert set(seen.values()) == {20} and len(seen) == 4


def test_corrupted_names_differ_in_one_word():
    for example in IndirectObject().examples(20):
        words = zip(example.prompt.split(), example.corrupted.split(), strict=True)
        assert sum(a != b for a, b in words) == 1


def test_colours_are_those_on_the_table():
    for example in ColouredObjects(objects=4).examples(20):
        scene = example.prompt.rsplit("Q: ", 1)[1]
        assert len(set(example.choices)) == 4
        assert all(choice.lower() in scene for choice in example.choices)


def test_wrong_numbers_are_near_and_not_shown_before():
    task = Arithmetic(operations=("+", "-"), shots=3)
    examples = task.examples(64)
    for example in examples:
        right, right_again = int(example.choices[example.answer]), int(calculated(example.corrupted))
        numbers = [int(c) for c in example.choices]
        assert len(set(numbers)) == 4 and min(numbers) >= 0
        for number in set(numbers) - {right, right_again}:
            assert abs(number - right) in (1, 2, 10) or sorted(str(number).zfill(9)) == sorted(str(right).zfill(9))
        assert not {line.split("= ")[1] for line in example.prompt.split("\n")[:-1]} & {str(n) for n in numbers}
    assert Counter(e.prompt.split("\n")[-1].split()[1] for e in examples) == {"+": 32, "-": 32}


def test_facts_are_many_and_take_turns():
    known = [("capital", "Turkey", "Ankara"), ("language", "Brazil", "Portuguese"), ("currency", "Poland", "zloty")]
    assert all(FACTS[relation][country] == answer for relation, country, answer in known)
    assert sum(map(len, FACTS.values())) >= 60
    # without a space before it a name may take more tokens, and the corrupted prompt would not align
    assert all(" {country}" in template for templates in TEMPLATES.values() for template in templates)
    assert all(len(set(facts.values())) >= 4 for facts in FACTS.values())
    for example, relation in zip(FactualRecall().examples(16), [r for r in FACTS for _ in range(4)], strict=True):
        assert {c[1:] for c in example.choices} <= set(FACTS[relation].values())


@pytest.mark.parametrize("kind", ["fact", "instruction"])
def test_the_part_to_emphasise_occurs_once_and_holds_the_answer(kind):
    places = Counter()
    for emphasised in Instruction(kind=kind, distractors=7, filler=800).examples(32):
        example, part = emphasised.example, emphasised.part
        assert example.prompt.count(part) == 1
        assert part not in example.corrupted
        assert example.choices[example.answer] in part
        statement = re.escape(part.split(" is ")[0]).replace(re.escape(part.split()[3]), r"(\w+)") + r" is \w+\."
        names = re.findall(statement, example.prompt)
        assert len(names) == 8
        places[names.index(part.split()[3])] += 1
    assert places == dict.fromkeys(range(8), 4)


def test_filler_is_as_long_as_asked_for():
    text = "A quiet sentence of some words. " * 9
    bare, filled = (Instruction(filler=n, text=text).examples(1)[0].example.prompt for n in (0, 2000))
    assert 1900 < len(filled) - len(bare) < 2100
    assert filled.count("A quiet sentence") > 50


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: ColouredObjects(objects=1), "objects must be from 2 to 8"),
        (lambda: ColouredObjects(form="poem"), "'list' | 'sentences'"),
        (lambda: Arithmetic(digits=0), "digits must be from 1 to 6"),
        (lambda: Arithmetic(operations=("/",)), "'+', '-', '*'"),
        (lambda: Arithmetic(operations=()), "one or more"),
        (lambda: Arithmetic(operations=("+", "+")), "each once"),
        (lambda: FactualRecall(relations=("capitol",)), "'capital', 'language'"),
        (lambda: FactualRecall(shots=9), "shots must be from 0 to 8"),
        (lambda: Instruction(kind="order"), "'fact' | 'instruction'"),
        (lambda: Instruction(distractors=0), "distractors must be from 1 to 63"),
        (lambda: Instruction(distractors=64), "distractors must be from 1 to 63"),
    ],
)
def test_parameters_out_of_bounds_are_named(make, named):
    with pytest.raises(BadParameter, match=re.escape(named)):
        make()


def test_bounds_are_reached():
    assert ColouredObjects(objects=8, shots=2).examples(2)
    assert Instruction(distractors=63).examples(2)
    assert Arithmetic(digits=1, operations=("-",), shots=8).examples(20)


def test_counts_that_cannot_be_met_are_refused():
    with pytest.raises(BadInput, match="at least one"):
        IndirectObject().examples(0)
    with pytest.raises(BadInput, match=r"only \d+ different prompts.*raise digits"):
        Arithmetic(digits=1, shots=0).examples(200)
    with pytest.raises(BadInput, match="filler text is empty"):
        Instruction(filler=10, text=" ").examples(1)


def test_all_prompts_there_are_can_be_drawn():
    assert len(distinct("coins", 6, 0, lambda rng, i: str(rng.randrange(6)), str, "take dice")) == 6
    with pytest.raises(BadInput, match=r"coins found only 6 different prompts, count=7 needs more; .* take dice"):
        distinct("coins", 7, 0, lambda rng, i: str(rng.randrange(6)), str, "take dice")
