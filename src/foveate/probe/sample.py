"""Prompts with a needle: filler of just the right length, and where in the tokens the answer stands."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from foveate.core.errors import BadInput, BadParameter
from foveate.probe.text import default_text

__all__ = [
    "Context",
    "Needle",
    "Sample",
    "Task",
    "Wording",
    "build",
    "check_depth",
    "depths",
    "draw_name",
    "draw_number",
    "filler",
    "filler_text",
    "fitted",
]

SLACK = 16
"""A prompt is at most this many tokens shorter than it should be."""
SENTENCE_ENDS = (".\n", ". ", "\n\n", "\n", " ")
ONSETS = ("b", "br", "d", "dr", "f", "g", "h", "j", "k", "kr", "l", "m", "n", "p", "r", "s", "st", "t", "tr", "v", "z")
VOWELS = ("a", "e", "i", "o", "u")
ENDS = ("l", "m", "n", "r", "th", "x")


@dataclass(frozen=True)
class Sample:
    """One prompt whose answer is known.

    Args:
        ids: The prompt's tokens, up to where the answer is to follow.
        answer: What the model should say, in full.
        answer_ids: The answer's tokens, as they stand in the prompt if it stands there whole.
        needle: Where the first of `asked` first stands in the context: its first token, and one past its last.
        question_start: First position of the question, which follows the context.
        depth: Where in the context the needle stands: 0 at the start, 1 at the end.
        parts: The pieces that a right answer names; () for the answer as one piece.
    """

    ids: tuple[int, ...]
    answer: str
    answer_ids: tuple[int, ...]
    needle: tuple[int, int]
    question_start: int
    depth: float
    parts: tuple[str, ...] = ()

    @property
    def asked(self) -> tuple[str, ...]:
        """The pieces that a right answer names, at least one."""
        return self.parts or (self.answer,)


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


@dataclass(frozen=True)
class Context:
    """What stands between the instruction and the question.

    Args:
        text: The whole of it.
        piece: The first piece that is asked for.
        at: The character at which it stands.
        depth: Where that is: 0 at the start, 1 at the end.
    """

    text: str
    piece: str
    at: int
    depth: float


def build(
    tokenizer: Any,
    wording: Wording,
    needles: Sequence[Needle],
    asked: int,
    text: str,
    length: int,
    *,
    answer: str = "",
    parts: tuple[str, ...] = (),
) -> Sample:
    """Hides the needles in so much of `text` that the prompt has `length` tokens, or up to 16 fewer.

    Args:
        tokenizer: The model's tokenizer.
        wording: What stands around the context.
        needles: What to hide.
        asked: Which needle is asked for, or is the first asked for.
        text: What to hide them in.
        length: Tokens of the whole prompt.
        answer: What the model should say, where that is more than the asked needle's answer.
        parts: The pieces that a right answer names, where they are several.

    Raises:
        BadInput: `length` cannot hold the task, or the answer cannot be found again in the tokens.
    """

    def context(size: int) -> Context:
        return hidden(needles, asked, filler(text, size))

    return fitted(tokenizer, wording, context, length, answer=answer, parts=parts)


def fitted(
    tokenizer: Any,
    wording: Wording,
    context: Callable[[int], Context],
    length: int,
    *,
    rate: float = 4.0,
    answer: str = "",
    parts: tuple[str, ...] = (),
) -> Sample:
    """A prompt of `length` tokens, or up to 16 fewer, with a context that can be of any size.

    Args:
        tokenizer: The model's tokenizer.
        wording: What stands around the context.
        context: Makes the context of a size, which is in any unit: one more takes at most 16 tokens more.
        length: Tokens of the whole prompt.
        rate: Units of size that a token takes, as a first guess.
        answer: What the model should say, where that is more than the context's `piece`.
        parts: The pieces that a right answer names, where they are several.

    Raises:
        BadInput: `length` cannot hold the task, or the answer cannot be found again in the tokens.
    """

    def prompt(size: int) -> Prompt:
        return Prompt(tokenizer, wording, context(size))

    whole = fit(prompt, length, rate)
    piece = whole.context.piece
    start, stop = whole.tokens_of(whole.answer_at, len(piece))
    found = whole.ids[start:stop]
    if squeezed(piece) not in squeezed(tokenizer.decode(list(found))):
        raise BadInput(
            f"the needle {piece!r} cannot be found again in the tokens of "
            f"{type(tokenizer).__name__}, which read {tokenizer.decode(list(found))!r} at its place; "
            "the tokenizer cannot write it, choose another one."
        )
    question, _ = whole.tokens_of(whole.question_at, 1)
    said = tuple(tokenizer(answer, add_special_tokens=False)["input_ids"]) if answer else found
    return Sample(whole.ids, answer or piece, said, (start, stop), question, whole.context.depth, parts)


class Prompt:
    """The text of one prompt, its tokens, and the way from one to the other."""

    def __init__(self, tokenizer: Any, wording: Wording, context: Context):
        head = wording.instruction + "\n\n"
        content = f"{head}{context.text}\n\n{wording.question}"
        text, special = rendered(tokenizer, content, wording.reply)
        start = text.find(content)
        if start < 0:
            raise BadInput(f"the chat template of {type(tokenizer).__name__} changes what the user says; clear it.")
        self.context = context
        self.answer_at = start + len(head) + context.at
        self.question_at = start + len(content) - len(wording.question)
        encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        self.ids = tuple(encoded["input_ids"])
        self.offsets = encoded["offset_mapping"]

    def tokens_of(self, start: int, size: int) -> tuple[int, int]:
        """The span of tokens that write the characters from `start`; empty if none does."""
        inside = [i for i, (a, b) in enumerate(self.offsets) if a < start + size and b > start]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)


def fit(prompt: Callable[[int], Prompt], length: int, rate: float) -> Prompt:
    """The prompt with as much filler as `length` tokens hold; `rate` guesses how much a token takes."""
    low, best = 0, prompt(0)
    if len(best.ids) > length:
        raise BadInput(
            f"length={length} is too short: the task without any filler takes {len(best.ids)} tokens; "
            f"give at least {len(best.ids) + SLACK}."
        )
    # Each try corrects the guess by what is still missing, at the rate just seen.
    high, size, bare = None, int(rate * (length - len(best.ids))), len(best.ids)
    while length - len(best.ids) > SLACK and size > low:
        tried = prompt(size)
        off = length - len(tried.ids)
        if off >= 0:
            low, best = size, tried
        else:
            high = size
        # A step of 0 would end the search with room left, where one more unit takes many tokens.
        size += (off - SLACK // 2) * size // max(len(tried.ids) - bare, 1) or 1
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


def hidden(needles: Sequence[Needle], asked: int, filling: str) -> Context:
    """The filler with the needles between its sentences."""
    # Nothing is stripped: each character more of filler must make the prompt longer, or `fit` would not end near.
    pieces, done, at = [], 0, 0
    for number in sorted(range(len(needles)), key=lambda n: needles[n].depth):
        needle = needles[number]
        cut = sentence_end(filling, int(needle.depth * len(filling)), done)
        pieces.append(filling[done:cut])
        if number == asked:
            at = len("\n\n".join([*pieces, ""])) + needle.sentence.index(needle.answer)
        pieces.append(needle.sentence)
        done = cut
    text = "\n\n".join([*pieces, filling[done:]])
    return Context(text, needles[asked].answer, at, needles[asked].depth)


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


def draw_name(draw: random.Random, taken: list[str]) -> str:
    """An invented name that shares no place with a text or name in `taken`, in lower case; it is added there."""
    while True:
        # Of two syllables, one name in some hundreds would be a word or a city.
        name = "".join(draw.choice(ONSETS) + draw.choice(VOWELS) for _ in range(3)) + draw.choice(ENDS)
        if not any(name in other or other in name for other in taken):
            taken.append(name)
            return name.capitalize()
