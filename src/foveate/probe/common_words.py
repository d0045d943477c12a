"""Common words: which words occur most often in a long list of numbered words?

A task of RULER ("RULER: What's the Real Context Size of Your Long-Context Language Models?"): the answer stands at many
places, each of them alone worth little, and there is no filler that could be dropped unread.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from foveate.core.errors import BadInput
from foveate.core.params import bounded, check_bounds
from foveate.probe.sample import Context, Sample, Wording, depths, filler_text, fitted

__all__ = ["CommonWords"]

INSTRUCTION = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often."
)
QUESTION = "Question: What are the {count} most common words in the above list?"
REPLY = "Answer: The {count} words that appear most often in the list are:"
SHOT_TIMES, SHOT_OTHERS = 3, 10
"""A solved example's list: how often it holds each common word, and how many others, each once."""
RATE = 0.2
"""Items that a token takes: about five tokens write one."""


@dataclass(frozen=True)
class CommonWords:
    """Asks for the words that a list holds most often.

    The common words are the same share of the list at any length, each as often as the next. The list holds any other
    word once; where it is too long for the words of `text`, twice, and so on. The needle is the first place of the
    first word of the answer. A model that names three entries of the list at random names 0.35 of the default's words.

    Args:
        length: Tokens of the whole prompt.
        words: Number of common words.
        share: Share of the list that is common words.
        shots: Solved examples in front, with short lists. SmolLM2-135M often copies its answer from them
            and does better with none.
        text: Where the words come from; None takes `default_text()`.

    Differs from the paper: three words by default, and no solved example (10 and 1 there); their share of the list is
    the same at any length (there each occurs 6 times below 4,096 tokens, among others that occur once, and 30 times
    from there, among others that occur 3 times: the longer the list, the less); words come from a text; the reply
    begins with the number of the first word.

    Example:
        >>> from foveate.probe import CommonWords
        >>> from foveate.testing import tiny
        >>> task = CommonWords(500, words=1, share=0.8, text="apples, pears")
        >>> task.samples(tiny.tokenizer(), 1)[0].answer
        'pears'
    """

    length: int = bounded(1024, 1, 2**24)
    words: int = bounded(3, 1, 64)
    share: float = bounded(0.4, 0.05, 0.8)
    shots: int = bounded(0, 0, 4)
    text: str | None = None

    def __post_init__(self) -> None:
        check_bounds(self)

    def samples(self, tokenizer: Any, count: int, seed: int = 0) -> list[Sample]:
        """Makes `count` prompts; the same seed gives the same prompts."""
        numbers = range(len(depths(None, count)))
        return [self.sample(tokenizer, random.Random(f"common_words {seed} {i}")) for i in numbers]

    def sample(self, tokenizer: Any, draw: random.Random) -> Sample:
        """The prompt of a draw."""
        known = list(vocabulary(filler_text(self.text)))
        # With so many others, a common word stays the more frequent one in a list of any length.
        needed = self.shots * (self.words + SHOT_OTHERS) + self.words * (
            1 + math.ceil(4 * (1 - self.share) / self.share)
        )
        if len(known) < needed:
            raise BadInput(
                f"the text has only {len(known)} words that a list can hold; CommonWords(words={self.words}, "
                f"share={self.share}, shots={self.shots}) needs {needed}: give a longer text, or fewer words or shots."
            )
        draw.shuffle(known)
        shots = ""
        for _ in range(self.shots):
            shown, known = known[: self.words + SHOT_OTHERS], known[self.words + SHOT_OTHERS :]
            shots += self.solved(draw, shown)
        common, others = known[: self.words], known[self.words :]
        seed, least = draw.random(), math.ceil(2 * self.words / self.share)

        def context(size: int) -> Context:
            each = max(2, round(self.share * (least + size) / self.words))
            text = numbered(mixed(random.Random(seed), common, each, others, least + size - self.words * each))
            at = re.search(rf"\b{common[0]}\b", text).start()
            return Context(text, common[0], at, at / len(text))

        return fitted(
            tokenizer,
            Wording(shots + INSTRUCTION, QUESTION.format(count=self.words), f"{REPLY.format(count=self.words)} 1."),
            context,
            self.length,
            rate=RATE,
            answer=numbered(common).removeprefix("1. "),
            parts=tuple(common),
        )

    def solved(self, draw: random.Random, words: Sequence[str]) -> str:
        """A solved example with a short list of the words, of which the first are the common ones."""
        common, others = words[: self.words], words[self.words :]
        text = numbered(mixed(draw, common, SHOT_TIMES, others, len(others)))
        question, reply = QUESTION.format(count=self.words), REPLY.format(count=self.words)
        return f"{INSTRUCTION}\n\n{text}\n\n{question}\n{reply} {numbered(common)}\n\n"


def mixed(draw: random.Random, common: Sequence[str], each: int, others: Sequence[str], rest: int) -> list[str]:
    """Every common word `each` times and `rest` places for others, as evenly as they go round, in random order."""
    items = [*common] * each + [others[i % len(others)] for i in range(rest)]
    draw.shuffle(items)
    return items


def numbered(words: Sequence[str]) -> str:
    """The words as a numbered list on one line."""
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))


@cache
def vocabulary(text: str) -> tuple[str, ...]:
    """The plain words of a text, each once; short ones, so that one more takes few tokens of any tokenizer."""
    said = set(re.findall(r"[a-z]+", f"{INSTRUCTION} {QUESTION} {REPLY}".lower()))
    return tuple(sorted(set(re.findall(r"(?<![\w'’])[a-z]{5,8}(?![\w'’])", text)) - said))
