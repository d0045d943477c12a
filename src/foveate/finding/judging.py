"""A task's examples under mechanisms: whatever these need is made for each prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from foveate.core.attach import attach
from foveate.core.errors import BadInput
from foveate.core.mechanism import Mechanism, PromptEdit
from foveate.core.places import Span, placed, spans_of
from foveate.locating import locate
from foveate.tasks import Example, Prepared, Scores, prepare, score

__all__ = ["Judge"]


Group = tuple[Span | None, Prepared, list[int]]
"""Examples whose spans are the same, and which of all they are."""


@dataclass(eq=False)
class Judge:
    """A model on examples, under any mechanisms.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        examples: The examples.
        normalise: Compare choices by their log-likelihood per token.
        chat: Whether prompts go through the chat template.
        part: The words of each prompt that spans are put on: the same in all, or those of each example.
        index: Which occurrence of `part`, where there are several.
        batch: Sequences that the model reads at once.
    """

    model: Any
    tokenizer: Any
    examples: tuple[Example, ...]
    normalise: bool = False
    chat: bool = False
    part: str | tuple[str, ...] | None = None
    index: int | None = None
    batch: int = 16
    made: dict[Any, list[Group]] = field(default_factory=dict, init=False)

    def score(
        self, *mechanisms: Mechanism, trial: bool = False, progress: Callable[[int, int], None] | None = None
    ) -> Scores:
        """Scores of all examples with these mechanisms attached; prompt edits change the prompts.

        Raises:
            BadInput: a mechanism needs a span and `part` does not say where, or does not stand in a prompt.
        """
        prompt_edits = tuple(m for m in mechanisms if isinstance(m, PromptEdit))
        acting = [m for m in mechanisms if not isinstance(m, PromptEdit)]
        groups = self.groups(prompt_edits, bool([f for m in acting for f in spans_of(m)]))
        parts: list[tuple[Scores, list[int]]] = []
        done = 0
        for span, prepared, at in groups:
            here = [placed(m, span and (span,)) for m in acting]

            def tell(n: int, of: int, done: int = done, size: int = len(at)) -> None:
                if progress is not None:
                    progress(done + size * n // max(of, 1), len(self.examples))

            with attach(self.model, *here, trial=trial) if here else nullcontext():
                found = score(
                    self.model, self.tokenizer, prepared, normalise=self.normalise, batch=self.batch, progress=tell
                )
            parts.append((found, at))
            done += len(at)
            trial = False
        return joined(parts, self.examples)

    def groups(self, prompt_edits: tuple[PromptEdit, ...], spanned: bool) -> list[Group]:
        """The examples, those with the same span together; made once for each way to change the prompts."""
        key = prompt_edits, spanned
        if key in self.made:
            return self.made[key]
        examples = []
        for e in self.examples:
            prompt = e.prompt
            for m in prompt_edits:
                prompt = m.edit(prompt)
            examples.append(dataclasses.replace(e, prompt=prompt))
        by_span: dict[Span | None, list[int]] = {}
        for n, e in enumerate(examples):
            by_span.setdefault(self.span(e.prompt, n) if spanned else None, []).append(n)
        self.made[key] = [
            (span, prepare(self.tokenizer, [examples[n] for n in at], chat=self.chat), at)
            for span, at in by_span.items()
        ]
        return self.made[key]

    def span(self, prompt: str, number: int) -> Span:
        """The tokens of an example's prompt that its part stands in."""
        if self.part is None:
            raise BadInput("this edit acts on a span: say which words of each prompt it is for (--part TEXT)")
        part = self.part if isinstance(self.part, str) else self.part[number]
        if not self.chat:
            return locate(self.tokenizer, prompt, part, self.index)[0]
        turn = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return locate(self.tokenizer, text, part, self.index, add_special_tokens=False)[0]


def joined(parts: Sequence[tuple[Scores, list[int]]], examples: tuple[Example, ...]) -> Scores:
    """The scores of several groups as one, in the order of the examples."""
    if len(parts) == 1:
        return dataclasses.replace(parts[0][0], examples=examples)
    order = np.argsort(np.concatenate([at for _, at in parts]))
    arrays: dict[str, Any] = {}
    for f in dataclasses.fields(Scores):
        values = [getattr(found, f.name) for found, _ in parts]
        if isinstance(values[0], np.ndarray):
            arrays[f.name] = np.concatenate(values)[order]
    flat = [choice for found, _ in parts for choice in found.by_choice]
    return dataclasses.replace(parts[0][0], examples=examples, by_choice=tuple(flat[n] for n in order), **arrays)
