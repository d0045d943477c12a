"""Arithmetic: two numbers and an operator; the result is to be told from near misses.

For the heads of "Interpreting and Improving Large Language Models in Arithmetic Calculation".
"""

from __future__ import annotations

import itertools
import operator
import random
from collections.abc import Callable
from dataclasses import dataclass

from foveate.core.errors import BadParameter
from foveate.core.params import bounded, check_bounds
from foveate.probe.distinct import distinct
from foveate.tasks.examples import Example

__all__ = ["Arithmetic"]

OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
CHOICES = 4


@dataclass(frozen=True)
class Arithmetic:
    """Asks for a sum, difference or product of two numbers of the same number of digits.

    The choices are the result, the result of the corrupted prompt, and near misses (off by one, off by ten, two digits
    exchanged), of as many digits as the result where there are such. Choices, and not a free answer, so that the
    margin between right and wrong is a number that moves when a head is removed, also where the first token is shared.
    The corrupted prompt has another operand of as many digits; its result is the next choice after the answer (the
    first after the last).

    Args:
        digits: Digits of both operands.
        operations: The operators to draw from: +, - and *. Differences are never negative.
        shots: Solved examples before the question.

    Example:
        >>> from foveate.probe import Arithmetic
        >>> example = Arithmetic().examples(1)[0]
        >>> print(example.prompt)
        78 + 23 = 101
        91 + 11 = 102
        74 + 73 =
        >>> example.choices
        (' 147', ' 141', ' 417', ' 137')
    """

    digits: int = bounded(2, 1, 6)
    operations: tuple[str, ...] = ("+",)
    shots: int = bounded(2, 0, 8)

    def __post_init__(self) -> None:
        check_bounds(self)
        known = isinstance(self.operations, tuple) and all(o in OPERATIONS for o in self.operations)
        if not known or not self.operations or len(set(self.operations)) < len(self.operations):
            raise BadParameter(
                f"Arithmetic(operations={self.operations!r}): operations must be a tuple of one or more of "
                + ", ".join(repr(o) for o in OPERATIONS)
                + ", each once"
            )

    def examples(self, count: int, seed: int = 0) -> tuple[Example, ...]:
        """Makes `count` different prompts; the same seed gives the same prompts."""
        return distinct("arithmetic", count, seed, self.draw, lambda e: e.prompt, "raise digits")

    def draw(self, rng: random.Random, number: int) -> Example:
        """The example of a number, which says the operator and the place of the answer among the choices."""
        sign = self.operations[number // CHOICES % len(self.operations)]
        a, b = self.operands(rng, sign)
        result = OPERATIONS[sign](a, b)
        corrupted = self.changed(rng, a, b, sign)
        other = OPERATIONS[sign](*corrupted)
        # In a ring that starts with the answer, the corrupted prompt's result comes second.
        ring = [result, other, *near_misses(rng, result, other, CHOICES - 2)]
        answer = number % CHOICES
        choices = tuple(f" {ring[(i - answer) % CHOICES]}" for i in range(CHOICES))
        head = self.solved(rng, ring)
        return Example(f"{head}{a} {sign} {b} =", choices, answer, f"{head}{corrupted[0]} {sign} {corrupted[1]} =")

    def operands(self, rng: random.Random, sign: str) -> tuple[int, int]:
        """Two numbers; for a difference the larger one first."""
        low = 10 ** (self.digits - 1)
        a, b = rng.randrange(low, 10 * low), rng.randrange(low, 10 * low)
        return (max(a, b), min(a, b)) if sign == "-" else (a, b)

    def changed(self, rng: random.Random, a: int, b: int, sign: str) -> tuple[int, int]:
        """The operands with one of them exchanged: another result of as many digits, where one is found."""
        low, result = 10 ** (self.digits - 1), OPERATIONS[sign](a, b)
        for tried in itertools.count():
            new = rng.randrange(low, 10 * low)
            pair = (new, b) if rng.random() < 0.5 else (a, new)
            value = OPERATIONS[sign](*pair)
            if value != result and value >= 0 and (len(str(value)) == len(str(result)) or tried > 100):
                break
        return pair

    def solved(self, rng: random.Random, choices: list[int]) -> str:
        """The solved examples. None has a result that is a choice, or copying it could pass for calculating."""
        lines: list[str] = []
        while len(lines) < self.shots:
            sign = self.operations[len(lines) % len(self.operations)]
            a, b = self.operands(rng, sign)
            line = f"{a} {sign} {b} = {OPERATIONS[sign](a, b)}\n"
            if OPERATIONS[sign](a, b) not in choices and line not in lines:
                lines.append(line)
        return "".join(lines)


def near_misses(rng: random.Random, result: int, other: int, count: int) -> list[int]:
    """Numbers near the result, neither it nor the other one; those of as many digits first."""
    swapped = [int(str(result)[:i] + str(result)[i : i + 2][::-1] + str(result)[i + 2 :]) for i in range(5)]
    near = {result + d for d in (-10, -2, -1, 1, 2, 10)} | set(swapped)
    found = sorted(n for n in near if n >= 0 and n not in (result, other))
    rng.shuffle(found)
    return sorted(found, key=lambda n: len(str(n)) != len(str(result)))[:count]
