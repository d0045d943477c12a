"""Needles: several numbers are hidden in filler, each under its own name, and all are asked for in one question.

The multi-query needles of RULER ("RULER: What's the Real Context Size of Your Long-Context Language Models?"): what a
short cache must keep is not one place but several.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from foveate.core.errors import BadInput
from foveate.core.params import bounded, check_bounds
from foveate.probe.key_value import keys
from foveate.probe.sample import Needle, Sample, Wording, build, depths, draw_number, filler_text

__all__ = ["Needles"]

INSTRUCTION = "Some secret codes are hidden in the text below. Find them and memorise them."
# Said twice, as in `KeyValue`, and as a list: a small model stops after the first number where it is to speak in
# sentences.
SENTENCE = "The secret code is\n- {key}: {value}\nRemember it:\n- {key}: {value}"
QUESTION = "What are the secret codes for {keys}?"
STATED = "- {key}:"


@dataclass(frozen=True)
class Needles:
    """Asks for all of several numbers that stand in filler text.

    They are asked for in a random order. The first asked one is the needle of the sample; the samples spread it over
    the text.

    Args:
        length: Tokens of the whole prompt.
        needles: How many numbers, spread evenly over the text.
        digits: Digits of each number.
        text: What to fill with, and where the names come from; None takes `default_text()`.

    Differs from the paper: three needles by default (4 there); each number is said twice, in a list, and has four
    digits (7 there); the reply begins with the first name; names are words of the filler (an adjective with a noun
    there); needles stand evenly spread and not at random.

    Example:
        >>> from foveate.probe import Needles
        >>> from foveate.testing import tiny
        >>> text = "Sheep graze on quiet meadows while horses drink. "
        >>> task = Needles(length=500, needles=2, text=text)
        >>> task.samples(tiny.tokenizer(), 1)[0].parts
        ('3162', '9431')
    """

    length: int = bounded(1024, 1, 2**24)
    needles: int = bounded(3, 2, 1024)
    digits: int = bounded(4, 1, 18)
    text: str | None = None

    def __post_init__(self) -> None:
        check_bounds(self)

    def samples(self, tokenizer: Any, count: int, seed: int = 0) -> list[Sample]:
        """Makes `count` prompts; the same seed gives the same prompts."""
        made = []
        for i, depth in enumerate(depths(None, count)):
            first = min(int(depth * self.needles), self.needles - 1)
            made.append(self.sample(tokenizer, random.Random(f"needles {seed} {i}"), first))
        return made

    def sample(self, tokenizer: Any, draw: random.Random, first: int) -> Sample:
        """The prompt of a draw that asks for needle `first` first."""
        text = filler_text(self.text)
        words = keys(text)
        if len(words) < self.needles:
            raise BadInput(
                f"the filler text has only {len(words)} words that can be names; needles={self.needles} needs more."
            )
        values: dict[str, str] = {}
        for key in draw.sample(words, self.needles):
            # No number may stand in the text twice, or two names would have one needle.
            values[key] = draw_number(draw, self.digits, " ".join([text, *values.values()]))
        start = draw.randrange(len(text))
        hidden = [
            Needle(SENTENCE.format(key=key, value=value), value, (n + 0.5) / self.needles)
            for n, (key, value) in enumerate(values.items())
        ]
        names = list(values)
        order = [names.pop(first), *draw.sample(names, len(names))]
        told = [f"{STATED.format(key=key)} {values[key]}" for key in order]
        reply = STATED.format(key=order[0])
        return build(
            tokenizer,
            Wording(INSTRUCTION, QUESTION.format(keys=listed(order)), reply),
            hidden,
            first,
            text[start:] + text[:start],
            self.length,
            answer="\n".join(told).removeprefix(reply + " "),
            parts=tuple(values[key] for key in order),
        )


def listed(items: list[str]) -> str:
    """The items as a sentence lists them."""
    return ", ".join(items[:-1]) + " and " + items[-1]
