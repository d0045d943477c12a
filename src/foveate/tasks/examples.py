"""One prompt with its known answer, and the split into what is tuned on and what is judged on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from foveate.core.errors import BadInput

__all__ = ["SMALLEST_PART", "Example", "split"]

SMALLEST_PART = 8
"""Fewer examples than this, on either side of a split, decide nothing."""
SHOWN = 40


@dataclass(frozen=True)
class Example:
    """One prompt with its known answer: one of several choices, or a free text.

    The model reads prompt and answer as one text, so an answer that follows a space begins with that space.

    Args:
        prompt: What the model reads.
        choices: What it may answer; empty for a free answer.
        answer: Index of the right choice, or the text of a free answer.
        corrupted: The prompt with the deciding fact exchanged, for activation patching; "" where there is none.

    Raises:
        BadInput: a text is empty, there is one choice only, two are equal, or the answer is none of them.
    """

    prompt: str
    choices: tuple[str, ...] = ()
    answer: int | str = 0
    corrupted: str = ""

    def __post_init__(self) -> None:
        if not is_said(self.prompt):
            raise BadInput(f"the prompt must be a text that says something, got {shown(self.prompt)}.")
        if not isinstance(self.corrupted, str) or self.corrupted == self.prompt:
            raise BadInput(f"corrupted must be another text than the prompt, or empty; got {shown(self.corrupted)}.")
        if not isinstance(self.choices, tuple):
            raise BadInput(f"choices must be a tuple of texts, got {shown(self.choices)}.")
        if self.choices:
            check_choices(self.choices)
            # True is an int to Python, and as an index never meant
            if not isinstance(self.answer, int) or isinstance(self.answer, bool):
                raise BadInput(f"the answer must be the index of the right choice, got {shown(self.answer)}.")
            if not 0 <= self.answer < len(self.choices):
                raise BadInput(f"answer={self.answer} is none of {len(self.choices)} choices; count from 0.")
        elif not is_said(self.answer):
            raise BadInput(f"without choices the answer must be a text, got {shown(self.answer)}; give it, or choices.")

    @property
    def options(self) -> tuple[str, ...]:
        """The choices; a free answer stands alone."""
        return self.choices or (str(self.answer),)

    @property
    def right(self) -> int:
        """Index of the right answer among the options."""
        return int(self.answer) if self.choices else 0

    @property
    def right_text(self) -> str:
        """The text of the right answer."""
        return self.options[self.right]


def check_choices(choices: Sequence[str]) -> None:
    """Raises unless these are two or more texts, all different."""
    if len(choices) < 2:
        raise BadInput(f"one choice, {shown(choices[0])}, decides nothing; give at least two, or a free answer.")
    for number, choice in enumerate(choices):
        if not is_said(choice):
            raise BadInput(f"choice {number} must be a text that says something, got {shown(choice)}.")
        if choice in choices[:number]:
            raise BadInput(f"choices {choices.index(choice)} and {number} are both {shown(choice)}; make them differ.")


def split(
    examples: Sequence[Example], train: float | int = 0.5, seed: int = 0
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Draws the examples for training; the others are held out.

    Examples with the same prompt stay together: a held-out prompt was never trained on.

    Args:
        examples: All examples.
        train: How many to train on, or their share as a float between 0 and 1. Equal prompts can make it a few more.
        seed: The same seed gives the same split.

    Returns:
        The examples to train on, and the held-out ones.

    Raises:
        BadInput: fewer than 8 examples on either side, or `train` is no share or number.
    """
    if not (0 < train < 1 if isinstance(train, float) else train >= 1):
        raise BadInput(f"train={train}: give a share between 0 and 1, such as 0.5, or a number of examples.")
    wanted = round(train * len(examples)) if isinstance(train, float) else train
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.prompt, []).append(example)
    prompts = list(groups)
    random.Random(seed).shuffle(prompts)
    parts: tuple[list[Example], list[Example]] = ([], [])
    for prompt in prompts:
        parts[len(parts[0]) >= wanted].extend(groups[prompt])
    if min(map(len, parts)) < SMALLEST_PART:
        raise BadInput(
            f"{len(examples)} examples with {len(prompts)} different prompts split into {len(parts[0])} for training "
            f"and {len(parts[1])} held out (train={train}); each part needs at least {SMALLEST_PART}: "
            "give more examples or another share."
        )
    return tuple(parts[0]), tuple(parts[1])


def is_said(text: object) -> bool:
    """Whether this is a text with more than white space in it."""
    return isinstance(text, str) and bool(text.strip())


def shown(value: object) -> str:
    """How a value looks in a message: on one line, and not longer than helps."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
