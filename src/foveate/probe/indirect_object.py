"""Indirect object: two people are named, one of them gives something to the other, who must be named.

The task of Wang et al. (2022), whose circuit "Circuit Component Reuse Across Tasks in Transformer Language Models"
compares with that of coloured objects.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from foveate.probe.distinct import distinct
from foveate.tasks.examples import Example

__all__ = ["IndirectObject"]

# Every word drawn here is one token with its space in the vocabularies of GPT-2 and SmolLM2, so that a prompt and its
# corrupted form align token by token.
NAMES = [
    "Adam",
    "Alan",
    "Alice",
    "Amy",
    "Andrew",
    "Anna",
    "Anthony",
    "Arthur",
    "Barbara",
    "Benjamin",
    "Brian",
    "Bruce",
    "Carl",
    "Charles",
    "Daniel",
    "David",
    "Edward",
    "Elizabeth",
    "Emily",
    "Emma",
    "Eric",
    "Frank",
    "Gary",
    "George",
    "Harry",
    "Helen",
    "Henry",
    "Jack",
    "Jacob",
    "James",
    "Jane",
    "Jason",
    "Jeff",
    "Jessica",
    "John",
    "Jonathan",
    "Joseph",
    "Julia",
    "Justin",
    "Karen",
    "Kate",
    "Kevin",
    "Larry",
    "Laura",
    "Linda",
    "Lisa",
    "Louis",
    "Mark",
    "Martha",
    "Martin",
    "Mary",
    "Matthew",
    "Michael",
    "Nancy",
    "Patrick",
    "Paul",
    "Peter",
    "Philip",
    "Rachel",
    "Richard",
    "Robert",
    "Roger",
    "Ruth",
    "Ryan",
    "Samuel",
    "Sarah",
    "Scott",
    "Simon",
    "Stephen",
    "Steven",
    "Susan",
    "Thomas",
    "William",
]
PLACES = [
    "beach",
    "garden",
    "hospital",
    "house",
    "library",
    "market",
    "museum",
    "office",
    "park",
    "restaurant",
    "school",
    "station",
    "store",
]
OBJECTS = [
    "ball",
    "basket",
    "book",
    "cake",
    "camera",
    "computer",
    "drink",
    "gift",
    "hat",
    "key",
    "letter",
    "phone",
    "ring",
    "ticket",
]
TEMPLATES = (
    "Then, {first} and {second} went to the {place}. {giver} gave a {thing} to",
    "When {first} and {second} were at the {place}, {giver} decided to give a {thing} to",
    "After {first} and {second} had met at the {place}, {giver} handed a {thing} to",
    "While {first} and {second} were walking to the {place}, {giver} offered a {thing} to",
    "Yesterday {first} and {second} spent the day at the {place}. In the end, {giver} passed a {thing} to",
    "Once {first} and {second} had found the {place}, {giver} showed a {thing} to",
)


@dataclass(frozen=True)
class IndirectObject:
    """Asks who is given something: the one of two people who does not give it.

    The giver is the second name in one half of the examples and the first in the other (the orders ABBA and BABA),
    the answer is the first choice in one half of each. The corrupted prompt lets the other one give, so that its
    answer is the other choice.

    Example:
        >>> from foveate.probe import IndirectObject
        >>> example = IndirectObject().examples(1)[0]
        >>> example.prompt
        'When John and Jeff were at the restaurant, Jeff decided to give a ring to'
        >>> example.choices[example.answer]
        ' John'
    """

    def examples(self, count: int, seed: int = 0) -> tuple[Example, ...]:
        """Makes `count` different prompts; the same seed gives the same prompts."""
        return distinct("indirect_object", count, seed, draw, lambda e: e.prompt, "take another task")


def draw(rng: random.Random, number: int) -> Example:
    """The example of a number, which says the order of the names and the place of the answer."""
    first, second = rng.sample(NAMES, 2)
    template, place, thing = rng.choice(TEMPLATES), rng.choice(PLACES), rng.choice(OBJECTS)
    giver, receiver = (second, first) if number % 2 == 0 else (first, second)
    answer = number // 2 % 2
    choices = (receiver, giver) if answer == 0 else (giver, receiver)

    def prompt(who: str) -> str:
        return template.format(first=first, second=second, giver=who, place=place, thing=thing)

    return Example(prompt(giver), tuple(f" {name}" for name in choices), answer, prompt(receiver))
