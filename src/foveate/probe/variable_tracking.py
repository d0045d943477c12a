"""Variable tracking: chains of assignments are hidden in filler; all variables of one value are asked for.

    VAR a = 12345   VAR b = VAR a   VAR c = VAR b

A task of RULER ("RULER: What's the Real Context Size of Your Long-Context Language Models?"): no single place gives the
answer, each assignment must be found from the one before.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from foveate.core.params import bounded, check_bounds
from foveate.probe.sample import Needle, Sample, Wording, build, depths, draw_name, draw_number, filler_text

__all__ = ["VariableTracking"]

DIGITS = 5
INSTRUCTION = "Some variables are assigned values in the text below. Memorize them."
QUESTION = "Which variables have the value {value}?"
# Said twice, the second time as in the reply: a small model else finds no variable of a value.
FIRST = "VAR {name} = {source}. The value {source} is in VAR {name}."
HOP = "VAR {name} = VAR {source}. The value of VAR {source} is also in VAR {name}."
REPLY = "The value {value} is in {count} variables. The value {value} is in VAR"
NEXT = " and also in VAR "


@dataclass(frozen=True)
class Chain:
    """A value and the variables that have it.

    Args:
        value: The value.
        names: The variables: the first is given the value, each other one the variable before it.
    """

    value: str
    names: tuple[str, ...]

    def stated(self, hop: int) -> str:
        """The assignment of a variable."""
        if hop:
            return HOP.format(name=self.names[hop], source=self.names[hop - 1])
        return FIRST.format(name=self.names[0], source=self.value)


@dataclass(frozen=True)
class VariableTracking:
    """Asks for all variables that have a value, directly or by way of others.

    The assignments of a chain stand in their order, those of different chains mixed at random, so that the chain asked
    for may be anywhere. The needle is the variable that is given the value itself. With one chain a model that names
    every variable of the text is right; two chains and more prevent that.

    Args:
        length: Tokens of the whole prompt.
        chains: Number of values.
        hops: Variables of each chain that get the value from another variable.
        shots: Solved examples in front, without filler. SmolLM2-135M often copies its answer from them
            and does better with none.
        text: What to fill with; None takes `default_text()`. Each sample starts at another place of it.

    Differs from the paper: two chains of one hop by default (one of 4 there, with one solved example that has filler);
    names are made up (5 random capital letters there); each assignment is said twice; the question and the
    reply are worded otherwise; assignments are spread evenly and not at random.

    Example:
        >>> from foveate.probe import VariableTracking
        >>> from foveate.testing import tiny
        >>> text = "Sheep graze on quiet meadows while horses drink. "
        >>> task = VariableTracking(length=700, chains=1, text=text)
        >>> task.samples(tiny.tokenizer(), 1)[0].parts
        ('Drufipath', 'Stehumith')
    """

    length: int = bounded(1024, 1, 2**24)
    chains: int = bounded(2, 1, 64)
    hops: int = bounded(1, 1, 64)
    shots: int = bounded(0, 0, 4)
    text: str | None = None

    def __post_init__(self) -> None:
        check_bounds(self)

    def samples(self, tokenizer: Any, count: int, seed: int = 0) -> list[Sample]:
        """Makes `count` prompts; the same seed gives the same prompts."""
        numbers = range(len(depths(None, count)))
        return [self.sample(tokenizer, random.Random(f"variable_tracking {seed} {i}")) for i in numbers]

    def sample(self, tokenizer: Any, draw: random.Random, asked: int = 0) -> Sample:
        """The prompt of a draw that asks for chain `asked`."""
        text = filler_text(self.text)
        chains = self.drawn(draw, text)
        start = draw.randrange(len(text))
        shots = ""
        for n in range(self.chains, len(chains), self.chains):
            shown = chains[n : n + self.chains]
            assignments = " ".join(chain.stated(hop) for chain, hop in self.mixed(draw, shown))
            shots += f"{INSTRUCTION}\n\n{assignments}\n\n{asking(shown[0])}\n{reply(shown[0])} {answer(shown[0])}\n\n"
        mixed = self.mixed(draw, chains[: self.chains])
        needles = [
            Needle(chain.stated(hop), chain.names[hop], (place + 0.5) / len(mixed))
            for place, (chain, hop) in enumerate(mixed)
        ]
        wanted = chains[asked]
        return build(
            tokenizer,
            Wording(shots + INSTRUCTION, asking(wanted), reply(wanted)),
            needles,
            mixed.index((wanted, 0)),
            text[start:] + text[:start],
            self.length,
            answer=answer(wanted),
            parts=wanted.names,
        )

    def drawn(self, draw: random.Random, text: str) -> list[Chain]:
        """The chains to hide, and behind them those of the solved examples; no name or value stands in two."""
        taken, values = [text.lower()], [text]
        chains = []
        for _ in range(self.chains * (1 + self.shots)):
            values.append(draw_number(draw, DIGITS, " ".join(values)))
            chains.append(Chain(values[-1], tuple(draw_name(draw, taken) for _ in range(self.hops + 1))))
        return chains

    def mixed(self, draw: random.Random, chains: Sequence[Chain]) -> list[tuple[Chain, int]]:
        """The assignments of all chains in random order, but each chain's in its own."""
        turns = [chain for chain in chains for _ in range(self.hops + 1)]
        draw.shuffle(turns)
        return [(chain, turns[:place].count(chain)) for place, chain in enumerate(turns)]


def asking(chain: Chain) -> str:
    """The question for a chain."""
    return QUESTION.format(value=chain.value)


def reply(chain: Chain) -> str:
    """How the answer for a chain begins."""
    return REPLY.format(value=chain.value, count=len(chain.names))


def answer(chain: Chain) -> str:
    """How it goes on."""
    return NEXT.join(chain.names)
