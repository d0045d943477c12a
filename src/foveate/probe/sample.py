"""Prompts with a needle: filler of just the right length, and where in the tokens the answer stands."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from foveate.core.errors import BadInput, BadParameter
from foveate.probe.text import default_text

__all__ = [
    "Needle",
    "Sample",
    "Task",
    "Wording",
    "build",
    "check_depth",
    "depths",
    "draw_number",
    "filler",
    "filler_text",
]

SLACK = 16
"""A prompt is at most this many tokens shorter than it should be."""
SENTENCE_ENDS = (".\n", ". ", "\n\n", "\n", " ")


@dataclass(frozen=True)
class Sample:
    """One prompt whose answer is known.

    Args:
        ids: The prompt's tokens, up to where the answer is to follow.
        answer: What the model should say.
        answer_ids: The answer's tokens as they stand in the prompt.
        needle: Where the answer first stands in the prompt: its first token, and one past its last.
        question_start: First position of the question, which follows the context.
        depth: Where in the context the needle stands: 0 at the start, 1 at the end.
    """

    ids: tuple[int, ...]
    answer: str
    answer_ids: tuple[int, ...]
    needle: tuple[int, int]
    question_start: int
    depth: float


@runtime_checkable
class Task(Protocol):
    """A family of prompts with known answers."""

    def samples(self, tokenizer: Any, count: int, seed: int) -> list[Sample]:
        """Makes `count` prompts; the same seed gives the same prompts."""
        ...


@dataclass(frozen=True)
class Wording:
    """What stands around the context.

    Args:
        instruction: Before the context.
        question: Behind it.
        reply: How the answer begins; the model goes on from here.
    """

    instruction: str
    question: str
    reply: str


@dataclass(frozen=True)
class Needle:
    """A sentence to hide, and the part of it that is asked for.

    Args:
        sentence: The sentence.
        answer: The part that is asked for.
        depth: Where in the context it is hidden: 0 at the start, 1 at the end.
    """

    sentence: str
    answer: str
    depth: float


def build(tokenizer: Any, wording: Wording, needles: Sequence[Needle], asked: int, text: str, length: int) -> Sample:
    """Hides the needles in so much of `text` that the prompt has `length` tokens, or up to 16 fewer.

    Raises:
        BadInput: `length` cannot hold the task, or the answer cannot be found again in the tokens.
    """

    def prompt(size: int) -> Prompt:
        return Prompt(tokenizer, wording, needles, asked, filler(text, size))

    whole = fit(prompt, length)
    start, stop = whole.tokens_of(whole.answer_at, len(needles[asked].answer))
    answer_ids = whole.ids[start:stop]
    if squeezed(needles[asked].answer) not in squeezed(tokenizer.decode(list(answer_ids))):
        raise BadInput(
            f"the needle {needles[asked].answer!r} cannot be found again in the tokens of "
            f"{type(tokenizer).__name__}, which read {tokenizer.decode(list(answer_ids))!r} at its place; "
            "the tokenizer cannot write it, choose another one."
        )
    question, _ = whole.tokens_of(whole.question_at, 1)
    return Sample(whole.ids, needles[asked].answer, answer_ids, (start, stop), question, needles[asked].depth)


class Prompt:
    """The text of one prompt, its tokens, and the way from one to the other."""

    def __init__(self, tokenizer: Any, wording: Wording, needles: Sequence[Needle], asked: int, filling: str):
        context, sentence_at = hidden(needles, asked, filling)
        head = wording.instruction + "\n\n"
        content = f"{head}{context}\n\n{wording.question}"
        text, special = rendered(tokenizer, content, wording.reply)
        start = text.find(content)
        if start < 0:
            raise BadInput(f"the chat template of {type(tokenizer).__name__} changes what the user says; clear it.")
        needle = needles[asked]
        self.answer_at = start + len(head) + sentence_at + needle.sentence.index(needle.answer)
        self.question_at = start + len(content) - len(wording.question)
        encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        self.ids = tuple(encoded["input_ids"])
        self.offsets = encoded["offset_mapping"]

    def tokens_of(self, start: int, size: int) -> tuple[int, int]:
        """The span of tokens that write the characters from `start`; empty if none does."""
        inside = [i for i, (a, b) in enumerate(self.offsets) if a < start + size and b > start]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)


def fit(prompt: Callable[[int], Prompt], length: int) -> Prompt:
    """The prompt with as much filler as `length` tokens hold."""
    low, best = 0, prompt(0)
    if len(best.ids) > length:
        raise BadInput(
            f"length={length} is too short: the task without any filler takes {len(best.ids)} tokens; "
            f"give at least {len(best.ids) + SLACK}."
        )
    # Four characters a token is a first guess; each try corrects it by what is still missing, at the rate just seen.
    high, size, bare = None, 4 * (length - len(best.ids)), len(best.ids)
    while length - len(best.ids) > SLACK and size > low:
        tried = prompt(size)
        off = length - len(tried.ids)
        if off >= 0:
            low, best = size, tried
        else:
            high = size
        size += (off - SLACK // 2) * size // max(len(tried.ids) - bare, 1)
        if high is not None and not low < size < high:
            size = (low + high) // 2
    return best


def filler_text(text: str | None) -> str:
    """The text to fill with; `default_text()` if none is given."""
    if text is None:
        return default_text()
    if not text.strip():
        raise BadInput("the filler text is empty; give some running text, or None for the default.")
    return text


def filler(text: str, size: int) -> str:
    """The first `size` characters of the text, said again from the start as often as it takes."""
    return (text * (size // len(text) + 1))[:size]


def hidden(needles: Sequence[Needle], asked: int, filling: str) -> tuple[str, int]:
    """The filler with the needles between its sentences, and where the asked one starts."""
    # Nothing is stripped: each character more of filler must make the prompt longer, or `fit` would not end near.
    pieces, done, at = [], 0, 0
    for number in sorted(range(len(needles)), key=lambda n: needles[n].depth):
        cut = sentence_end(filling, int(needles[number].depth * len(filling)), done)
        pieces.append(filling[done:cut])
        if number == asked:
            at = len("\n\n".join([*pieces, ""]))
        pieces.append(needles[number].sentence)
        done = cut
    return "\n\n".join([*pieces, filling[done:]]), at


def sentence_end(text: str, at: int, after: int) -> int:
    """The last end of a sentence before `at`, or of a line or word where no sentence ends."""
    nearby = max(after, at - 400)
    if at >= len(text):
        return len(text)
    for mark in SENTENCE_ENDS:
        found = text.rfind(mark, nearby, at)
        if found >= 0:
            return found + len(mark)
    return max(at, after)


def rendered(tokenizer: Any, content: str, reply: str) -> tuple[str, bool]:
    """The whole prompt as text, and whether the tokenizer has to add its special tokens."""
    if tokenizer.chat_template is None:
        return f"{content}\n{reply}", True
    said = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True) + reply, False


def squeezed(text: str) -> str:
    """The text without spaces, which some tokenizers put between the tokens."""
    return "".join(text.split())


def check_depth(task: Any) -> None:
    """Raises unless the task's depth is None or from 0 to 1."""
    if task.depth is not None and not (isinstance(task.depth, float | int) and 0 <= task.depth <= 1):
        raise BadParameter(
            f"{type(task).__name__}(depth={task.depth!r}): depth must be from 0 (start) to 1 (end), or None for all."
        )


def depths(depth: float | None, count: int) -> list[float]:
    """The depth of each sample: the given one, or spread evenly."""
    if count < 1:
        raise BadInput(f"count={count}: at least one sample is needed.")
    return [(i + 0.5) / count if depth is None else float(depth) for i in range(count)]


def draw_number(draw: random.Random, digits: int, text: str) -> str:
    """A random number of so many digits that the text does not hold."""
    for _ in range(1000):
        number = str(draw.randrange(10 ** (digits - 1), 10**digits))
        if number not in text:
            return number
    raise BadInput(f"the filler text holds nearly all numbers of {digits} digits; ask for more digits.")
