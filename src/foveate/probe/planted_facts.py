"""Planted facts: facts about invented people, places and things stand in real text; one of them is asked for.

Nobody can know them but from the text, since every name is made up from a seed; and, unlike a number, they look like
the text around them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from foveate.core.params import bounded, check_bounds
from foveate.probe.sample import Needle, Sample, Wording, build, check_depth, depths, draw_name, filler_text

__all__ = ["PlantedFacts"]

INSTRUCTION = "Read the text below. It tells some facts that you will be asked about."


@dataclass(frozen=True)
class Relation:
    """How facts of one kind are worded.

    Args:
        stated: The fact up to its answer.
        question: The question for it.
        names: Names that the answer has: two for a person, one for anything else.
    """

    stated: str
    question: str
    names: int


RELATIONS = (
    Relation("The harbour of {name} was built by", "Who built the harbour of {name}?", 2),
    Relation("The painter {name} was born in the town of", "In which town was the painter {name} born?", 1),
    Relation("The captain of the ship {name} was", "Who was the captain of the ship {name}?", 2),
    Relation("The language of the island {name} is called", "What is the language of the island {name} called?", 1),
    Relation("The novel {name} was written by", "Who wrote the novel {name}?", 2),
    Relation("The river {name} rises on the mountain", "On which mountain does the river {name} rise?", 1),
    Relation("The queen who founded {name} was", "Which queen founded {name}?", 2),
    Relation("The cooks of {name} are famous for a soup called", "For which soup are the cooks of {name} famous?", 1),
)


@dataclass(frozen=True)
class PlantedFacts:
    """Asks for one of several facts that stand in filler text, each once.

    Args:
        length: Tokens of the whole prompt.
        facts: Number of facts, spread evenly over the text.
        depth: Which fact is asked for: 0 the first, 1 the last; None spreads the samples evenly.
        text: What to fill with; None takes `default_text()`. Each sample starts at another place of it.

    Example:
        >>> from foveate.probe import PlantedFacts
        >>> from foveate.testing import tiny
        >>> text = "Sheep graze on quiet meadows while horses drink. "
        >>> task = PlantedFacts(length=500, facts=2, text=text)
        >>> task.samples(tiny.tokenizer(), 1)[0].answer
        'Zekralar Gidehim'
    """

    length: int = bounded(1024, 1, 2**24)
    facts: int = bounded(4, 1, 1024)
    depth: float | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        check_bounds(self)
        check_depth(self)

    def samples(self, tokenizer: Any, count: int, seed: int = 0) -> list[Sample]:
        """Makes `count` prompts; the same seed gives the same prompts."""
        made = []
        for i, depth in enumerate(depths(self.depth, count)):
            asked = min(int(depth * self.facts), self.facts - 1)
            made.append(self.sample(tokenizer, random.Random(f"planted_facts {seed} {i}"), asked))
        return made

    def sample(self, tokenizer: Any, draw: random.Random, asked: int) -> Sample:
        """The prompt of a draw that asks for fact `asked`."""
        text = filler_text(self.text)
        start = draw.randrange(len(text))
        # Names are compared in lower case, as a model may write them.
        taken = [text.lower()]
        turns = [relation for _ in range(-(-self.facts // len(RELATIONS))) for relation in shuffled(draw)]
        needles, wordings = [], []
        for n, relation in enumerate(turns[: self.facts]):
            name = draw_name(draw, taken)
            stated = relation.stated.format(name=name)
            answer = " ".join(draw_name(draw, taken) for _ in range(relation.names))
            needles.append(Needle(f"{stated} {answer}.", answer, (n + 0.5) / self.facts))
            wordings.append(Wording(INSTRUCTION, relation.question.format(name=name), stated))
        return build(tokenizer, wordings[asked], needles, asked, text[start:] + text[:start], self.length)


def shuffled(draw: random.Random) -> list[Relation]:
    """The relations in random order."""
    return draw.sample(RELATIONS, len(RELATIONS))
