"""Examples as tokens, laid out so that a model reads nothing twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from foveate.core.errors import BadInput
from foveate.tasks.examples import Example, shown

__all__ = ["Layout", "Prepared", "prepare"]

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Prepared:
    """Examples as tokens; a slice of it is a part of the examples.

    Args:
        examples: The examples.
        prompts: The tokens of each prompt.
        options: For each example, the tokens of each of its options: its choices, or its free answer alone.
    """

    examples: tuple[Example, ...]
    prompts: tuple[Ids, ...]
    options: tuple[tuple[Ids, ...], ...]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, part: slice) -> Prepared:
        return Prepared(self.examples[part], self.prompts[part], self.options[part])

    @cached_property
    def layout(self) -> Layout:
        """What the model has to read, and where its answers are to be found."""
        return lay_out(self)


@dataclass(frozen=True)
class Layout:
    """The sequences to read, the contexts in them, and the tokens asked for behind each context.

    Contexts are in the order of their sequences and questions in the order of their contexts, so that a stretch of
    sequences has a stretch of both.

    Args:
        sequences: Token ids, the longest first.
        contexts: Index of the sequence that begins with each context, and the position of the context's last token.
        questions: Index of a context, the token that is to follow it, and the option that this token is part of, the
            options of all examples counted in one row.
        ends: For each example, the context that is its whole prompt.
    """

    sequences: tuple[Ids, ...]
    contexts: tuple[tuple[int, int], ...]
    questions: tuple[tuple[int, int, int], ...]
    ends: tuple[int, ...]


def prepare(tokenizer: Any, examples: Sequence[Example], *, chat: bool = False) -> Prepared:
    """Tokenises examples once, for any number of scores.

    The tokens of an option are those that come to the prompt's when both are written as one text. Where the prompt's
    own tokens change by that (a tokenizer that merges across the border), the option is tokenised on its own.

    Args:
        tokenizer: The model's tokenizer.
        examples: The examples.
        chat: Whether the prompt is said by the user of the tokenizer's chat template, and the option is the reply,
            which then begins without a space.

    Raises:
        BadInput: there are no examples or no chat template, a text has no tokens, or all tokens of an option are the
            first ones of another.
    """
    if not examples:
        raise BadInput("there are no examples to prepare; give at least one.")
    if chat and getattr(tokenizer, "chat_template", None) is None:
        raise BadInput(f"{type(tokenizer).__name__} has no chat template; leave chat out.")
    prompts: list[Ids] = []
    options: list[tuple[Ids, ...]] = []
    for number, example in enumerate(examples):
        said = chatted(tokenizer, example.prompt) if chat else example.prompt
        prompt = tokens(tokenizer, said, special=not chat)
        if not prompt:
            raise BadInput(f"example {number}: the prompt {shown(example.prompt)} has no tokens.")
        texts = [text.lstrip() if chat else text for text in example.options]
        prompts.append(prompt)
        options.append(tuple(behind(tokenizer, said, prompt, text, special=not chat) for text in texts))
        refuse_beginnings(number, example, options[-1])
    return Prepared(tuple(examples), tuple(prompts), tuple(options))


def chatted(tokenizer: Any, prompt: str) -> str:
    """The prompt as a user's turn, up to where the reply begins."""
    said = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)


def tokens(tokenizer: Any, text: str, special: bool) -> Ids:
    """The ids of a text; a chat template has written the special tokens already."""
    return tuple(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def behind(tokenizer: Any, said: str, prompt: Ids, option: str, special: bool) -> Ids:
    """The tokens of an option behind its prompt."""
    whole = tokens(tokenizer, said + option, special)
    return whole[len(prompt) :] if whole[: len(prompt)] == prompt else tokens(tokenizer, option, special=False)


def refuse_beginnings(number: int, example: Example, options: Sequence[Ids]) -> None:
    """Raises if an option has no tokens, or if another one begins with all of them."""
    for text, ids in zip(example.options, options, strict=True):
        if not ids:
            raise BadInput(f"example {number}: {shown(text)} has no tokens; give an answer that has some.")
    # in sorted order a beginning stands right before something that it begins
    ordered = sorted(range(len(options)), key=lambda i: options[i])
    for short, long in pairwise(ordered):
        if options[long][: len(options[short])] == options[short]:
            raise BadInput(
                f"example {number}: the tokens of {shown(example.options[short])} are the first tokens of "
                f"{shown(example.options[long])}, so that it would win whenever the other one does; reword one of them."
            )


def lay_out(prepared: Prepared) -> Layout:
    """Finds few sequences that hold every context: one serves all the contexts that it begins with.

    That holds for causal models, in which what follows a context changes nothing in it.
    """
    reader: dict[Ids, Ids] = {}
    for prompt, options in zip(prepared.prompts, prepared.options, strict=True):
        own: list[Ids] = []
        contexts = {prompt + option[:length] for option in options for length in range(len(option))}
        for context in sorted(contexts - reader.keys(), key=lambda ids: (-len(ids), ids)):
            found = next((ids for ids in own if ids[: len(context)] == context), context)
            own += [context] * (found is context)
            reader[context] = found
    sequences = sorted(set(reader.values()), key=lambda ids: (-len(ids), ids))
    number = {ids: i for i, ids in enumerate(sequences)}
    ordered = sorted(reader, key=lambda context: (number[reader[context]], len(context)))
    index = {context: i for i, context in enumerate(ordered)}
    questions = [
        (index[prompt + option[:length]], token, row)
        for row, (prompt, option) in enumerate(flat(prepared))
        for length, token in enumerate(option)
    ]
    return Layout(
        tuple(sequences),
        tuple((number[reader[context]], len(context) - 1) for context in ordered),
        tuple(sorted(questions)),
        tuple(index[prompt] for prompt in prepared.prompts),
    )


def flat(prepared: Prepared) -> Iterator[tuple[Ids, Ids]]:
    """All options in one row, each behind its prompt."""
    for prompt, options in zip(prepared.prompts, prepared.options, strict=True):
        yield from ((prompt, option) for option in options)
