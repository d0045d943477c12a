"""Coloured objects: some things of different colours lie on a table; the colour of one is asked for.

The task of "Circuit Component Reuse Across Tasks in Transformer Language Models", by default in that paper's form: one
demonstration, then the question, and the colour as an answer with a capital letter.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from foveate.core.params import bounded, check_bounds, choice
from foveate.probe.distinct import distinct
from foveate.tasks.examples import Example

__all__ = ["ColouredObjects"]

# One token each, with its space, in the vocabularies of GPT-2 and SmolLM2; so are the capitalised colours.
COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "brown", "black"]
THINGS = [
    "ball",
    "basket",
    "bottle",
    "bowl",
    "box",
    "candle",
    "coin",
    "cup",
    "envelope",
    "glass",
    "hat",
    "jug",
    "key",
    "knife",
    "lamp",
    "lighter",
    "necklace",
    "notebook",
    "pen",
    "pencil",
    "phone",
    "plate",
    "puzzle",
    "ring",
    "shirt",
    "spoon",
    "textbook",
    "towel",
]
SURFACES = ["table", "desk", "floor"]
FORMS = ("list", "sentences")
OPENINGS = ("there is", "you see", "I see")


@dataclass(frozen=True)
class ColouredObjects:
    """Asks for the colour of one thing among several.

    The choices are the colours of all things, in random order. The corrupted prompt asks for the thing whose colour is
    the next choice after the answer (the first after the last).

    Args:
        form: `list` is the paper's ("there is a red cup and a blue pen", "A:"). `sentences` says the colour after each
            thing, as the reply does ("the cup is red", "A: The cup is"): easier, for small models.
        objects: Things on the table.
        shots: Demonstrations before the question, with other things.

    Differs from the paper: demonstrations never show a thing of the question again; the things are those that are one
    token in more vocabularies.

    Example:
        >>> from foveate.probe import ColouredObjects
        >>> print(ColouredObjects().examples(1)[0].prompt)
        Q: On the desk, I see a yellow jug, a black bowl, and a brown plate. What color is the bowl?
        A: Black
        Q: On the desk, I see a brown lamp, a red coin, and a black ring. What color is the lamp?
        A:
    """

    form: str = choice("list", *FORMS)
    objects: int = bounded(3, 2, 8)
    shots: int = bounded(1, 0, 2)

    def __post_init__(self) -> None:
        check_bounds(self)

    def examples(self, count: int, seed: int = 0) -> tuple[Example, ...]:
        """Makes `count` different prompts; the same seed gives the same prompts."""
        return distinct("coloured_objects", count, seed, self.draw, lambda e: e.prompt, "raise objects or shots")

    def draw(self, rng: random.Random, number: int) -> Example:
        """The example of a number, which says the place of the answer among the choices."""
        things = rng.sample(THINGS, self.objects * (self.shots + 1))
        head = ""
        for shot in range(self.shots):
            shown = things[shot * self.objects : (shot + 1) * self.objects]
            colours, asked = rng.sample(COLOURS, self.objects), rng.randrange(self.objects)
            head += self.asking(self.scene(rng, shown, colours), shown[asked]) + self.said(colours[asked]) + "\n"
        shown, colours = things[-self.objects :], rng.sample(COLOURS, self.objects)
        told = self.scene(rng, shown, colours)
        order = rng.sample(range(self.objects), self.objects)
        answer = number % self.objects
        asked, other = order[answer], order[(answer + 1) % self.objects]
        choices = tuple(self.said(colours[i]) for i in order)
        return Example(head + self.asking(told, shown[asked]), choices, answer, head + self.asking(told, shown[other]))

    def scene(self, rng: random.Random, things: Sequence[str], colours: Sequence[str]) -> str:
        """What is told of the things and their colours."""
        pairs = list(zip(things, colours, strict=True))
        opening = ""
        if self.form == "sentences":
            items = [f"the {thing} is {colour}" for thing, colour in pairs]
        else:
            items = [f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {thing}" for thing, colour in pairs]
            opening = rng.choice(OPENINGS) + " "
        listed = ", ".join(items[:-1]) + ("," if len(items) > 2 else "") + f" and {items[-1]}"
        return f"On the {rng.choice(SURFACES)}, {opening}{listed}."

    def asking(self, told: str, thing: str) -> str:
        """The scene and the question for one thing, up to where the colour follows."""
        reply = f" The {thing} is" if self.form == "sentences" else ""
        return f"Q: {told} What color is the {thing}?\nA:{reply}"

    def said(self, colour: str) -> str:
        """The answer as it follows the question."""
        return " " + (colour if self.form == "sentences" else colour.title())
