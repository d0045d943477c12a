"""Instruction: one statement among others of its kind decides the answer, and is the part to emphasise."""

from __future__ import annotations

import random
from dataclasses import dataclass

from foveate.core.params import bounded, check_bounds, choice
from foveate.probe.distinct import distinct
from foveate.probe.indirect_object import NAMES
from foveate.probe.sample import filler, filler_text, sentence_end
from foveate.tasks.examples import Example

__all__ = ["Emphasised", "Instruction"]

CHOICES = 4


@dataclass(frozen=True)
class Kind:
    """How statements of one kind are worded.

    Args:
        statement: What is said of one name.
        question: What is asked about one name.
        values: What the statements differ in; each one token, with its space, in common vocabularies.
    """

    statement: str
    question: str
    values: tuple[str, ...]


COLOURS = ("black", "blue", "brown", "green", "grey", "orange", "pink", "purple", "red", "white", "yellow", "silver")
WORDS = (
    "apple",
    "bread",
    "bridge",
    "copper",
    "garden",
    "honey",
    "island",
    "lemon",
    "paper",
    "river",
    "silver",
    "stone",
)
# The question repeats the statement up to its value: a model of 135M parameters is else at chance.
KINDS = {
    "fact": Kind(
        "The bird of {name} is {value}.",
        "Question: What color is the bird of {name}?\nAnswer: The bird of {name} is",
        COLOURS,
    ),
    "instruction": Kind(
        "The word for {name} is {value}.",
        "Say the word for {name}.\nThe word for {name} is",
        WORDS,
    ),
}


@dataclass(frozen=True)
class Emphasised:
    """An example, and the part of its prompt that decides the answer.

    Args:
        example: The example.
        part: The deciding statement; it occurs exactly once in the prompt.
    """

    example: Example
    part: str


@dataclass(frozen=True)
class Instruction:
    """Asks for what one statement says, among statements of the same kind about other people.

    The choices are values of up to four of the statements. The corrupted prompt has the values of two statements
    exchanged, so that its answer is the next choice after the answer (the first after the last).

    Args:
        kind: `fact` (whose bird has which colour) or `instruction` (to whom which word is to be said).
        distractors: Statements about others.
        filler: Characters of running text, spread between the statements.
        text: What to fill with; None takes `default_text()`. Each example starts at another place of it.

    Example:
        >>> from foveate.probe import Instruction
        >>> emphasised = Instruction(distractors=2).examples(1)[0]
        >>> print(emphasised.example.prompt)
        The bird of Martin is brown.
        The bird of Michael is orange.
        The bird of Jonathan is silver.
        <BLANKLINE>
        Question: What color is the bird of Martin?
        Answer: The bird of Martin is
        >>> emphasised.part
        'The bird of Martin is brown.'
    """

    kind: str = choice("fact", *KINDS)
    distractors: int = bounded(7, 1, 63)
    filler: int = bounded(0, 0, 2**20)
    text: str | None = None

    def __post_init__(self) -> None:
        check_bounds(self)

    def examples(self, count: int, seed: int = 0) -> tuple[Emphasised, ...]:
        """Makes `count` different prompts; the same seed gives the same prompts."""
        text = filler_text(self.text) if self.filler else ""
        return distinct(
            f"instruction {self.kind}",
            count,
            seed,
            lambda rng, number: self.draw(rng, number, text),
            lambda e: e.example.prompt,
            "raise distractors",
        )

    def draw(self, rng: random.Random, number: int, text: str) -> Emphasised:
        """The example of a number, which says the places of the deciding statement and of the answer."""
        kind, facts = KINDS[self.kind], self.distractors + 1
        names = rng.sample(NAMES, facts)
        values = rng.sample(kind.values, min(facts, len(kind.values)))
        told = [values[i % len(values)] for i in range(facts)]
        rng.shuffle(told)
        # the places run on with each round of the answer's, so that both are even
        count = min(CHOICES, len(values))
        asked, answer = number // count % facts, number % count
        ring = [told[asked], *rng.sample([v for v in values if v != told[asked]], count - 1)]
        other = rng.choice([i for i, value in enumerate(told) if value == ring[1]])
        swapped = list(told)
        swapped[asked], swapped[other] = told[other], told[asked]
        start = rng.randrange(len(text)) if text else 0
        gaps = self.gaps(text[start:] + text[:start])

        def prompt(said: list[str]) -> str:
            lines = [kind.statement.format(name=n, value=v) for n, v in zip(names, said, strict=True)]
            body = "\n".join(part for line, gap in zip(lines, gaps, strict=True) for part in (gap, line) if part)
            return f"{body}\n\n{kind.question.format(name=names[asked])}"

        choices = tuple(f" {ring[(i - answer) % count]}" for i in range(count))
        part = kind.statement.format(name=names[asked], value=told[asked])
        return Emphasised(Example(prompt(told), choices, answer, prompt(swapped)), part)

    def gaps(self, text: str) -> list[str]:
        """The running text before each statement."""
        facts = self.distractors + 1
        if not self.filler:
            return [""] * facts
        whole, done, found = filler(text, self.filler), 0, []
        for i in range(facts):
            cut = sentence_end(whole, (i + 1) * self.filler // facts, done)
            found.append(whole[done:cut].strip())
            done = cut
        return found
