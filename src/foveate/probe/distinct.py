"""Drawing prompts that are all different."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeVar

from foveate.core.errors import BadInput

__all__ = ["distinct"]

TRIES = 2000
"""Draws that may meet a prompt seen before; a task with few prompts left is called empty after so many."""

T = TypeVar("T")


def distinct(
    name: str, count: int, seed: int, draw: Callable[[random.Random, int], T], prompt: Callable[[T], str], more: str
) -> tuple[T, ...]:
    """Draws `count` examples with different prompts; the first ones do not depend on how many follow.

    Args:
        name: The task's name, part of the seed.
        count: Examples to draw.
        seed: The same seed gives the same examples.
        draw: Makes the example of a given number.
        prompt: The text of an example that must differ.
        more: What the user can do to get more prompts, for the error.

    Raises:
        BadInput: `count` is below 1, or the task cannot make so many different prompts.
    """
    if count < 1:
        raise BadInput(f"count={count}: at least one example is needed.")
    made: dict[str, T] = {}
    for i in range(count):
        rng = random.Random(f"{name} {seed} {i}")
        for _ in range(TRIES):
            example = draw(rng, i)
            if prompt(example) not in made:
                break
        else:
            raise BadInput(
                f"{name} found only {i} different prompts, count={count} needs more; ask for fewer, or {more}."
            )
        made[prompt(example)] = example
    return tuple(made.values())
