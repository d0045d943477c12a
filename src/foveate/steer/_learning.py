"""Learning vectors for heads by gradient descent, the model frozen."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.attach import attach
from foveate.core.errors import BadInput
from foveate.core.mechanism import HeadEdit
from foveate.core.places import Head
from foveate.core.rows import Rows
from foveate.tasks import Example, Prepared, loss, prepare

__all__ = ["Lesson", "Scaled", "Shifted", "as_example", "started"]

Progress = Callable[[int, int], None]
SMALL = 1e-3


@dataclass(frozen=True, eq=False)
class Scaled(HeadEdit):
    """(1 + A) o for all heads.

    Args:
        factors: A, by layer.
    """

    factors: dict[int, Float[Tensor, "heads 1 value_dim"]] = field(default_factory=dict)

    def edit(
        self, rows: Rows, out: Float[Tensor, "batch heads query value_dim"]
    ) -> Float[Tensor, "batch heads query value_dim"]:
        a = self.factors.get(rows.layer.index)
        return out if a is None else out + a.to(out.dtype) * out


@dataclass(frozen=True, eq=False)
class Shifted(HeadEdit):
    """o + v for some heads.

    Args:
        offsets: The heads and their v, by layer.
    """

    offsets: dict[int, tuple[Int[Tensor, " named"], Float[Tensor, "named 1 value_dim"]]] = field(default_factory=dict)

    def edit(
        self, rows: Rows, out: Float[Tensor, "batch heads query value_dim"]
    ) -> Float[Tensor, "batch heads query value_dim"]:
        if rows.layer.index not in self.offsets:
            return out
        heads, v = self.offsets[rows.layer.index]
        return out.index_add(1, heads, v.to(out.dtype).expand(out.shape[0], -1, out.shape[2], -1))


def started(shape: tuple[int, ...], rng: torch.Generator, device: torch.device) -> Tensor:
    """Numbers near zero, to be learned."""
    return (SMALL * torch.randn(shape, generator=rng)).to(device).requires_grad_()


def as_example(example: Any) -> Example:
    """A prompt with its right answer alone, from an example or a pair of texts."""
    prompt, answer = example if isinstance(example, tuple) else (example.prompt, example.right_text)
    return Example(prompt, answer=answer)


@dataclass(frozen=True)
class Lesson:
    """What is learned from, and how.

    Args:
        model: The model, frozen.
        tokenizer: Its tokenizer.
        examples: Prompts with their right answers.
        epochs: How often each example is seen.
        batch: Examples per step.
        seed: Of the order of the examples.
    """

    model: Any
    tokenizer: Any
    examples: tuple[Example, ...]
    epochs: int
    batch: int
    seed: int

    @property
    def steps(self) -> int:
        """How many steps of gradient descent one `learn` takes."""
        return self.epochs * -(-len(self.examples) // self.batch)

    def learn(self, edit: HeadEdit, parameters: Sequence[Tensor], rate: float, l1: float, step: Progress) -> None:
        """Moves the parameters of an edit down the answers' loss and, `l1` times, their own absolute size.

        The rate falls to zero in a straight line.

        Raises:
            BadInput: the loss is no number any more.
        """
        prepared = prepare(self.tokenizer, self.examples)
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 - n / self.steps)
        with attach(self.model, edit, trial=False):
            for n, part in enumerate(self.batches(prepared)):
                found = loss(self.model, part, normalise=True, batch=self.batch)
                whole = found + l1 * torch.stack([p.abs().sum() for p in parameters]).sum()
                if not whole.isfinite():
                    hint = f"take a smaller rate than {rate}" if n else "the model gives it on these examples by itself"
                    raise BadInput(f"the loss is {whole.item()} after {n} steps; {hint}")
                optimizer.zero_grad()
                whole.backward(inputs=list(parameters))
                optimizer.step()
                schedule.step()
                step(n + 1, self.steps)

    def batches(self, prepared: Prepared) -> Iterator[Prepared]:
        """The examples in another order in each epoch."""
        rng, order = random.Random(self.seed), list(range(len(prepared)))
        for _ in range(self.epochs):
            rng.shuffle(order)
            for a in range(0, len(order), self.batch):
                at = order[a : a + self.batch]
                parts = (prepared.examples, prepared.prompts, prepared.options)
                yield Prepared(*(tuple(part[i] for i in at) for part in parts))  # type: ignore[arg-type]


def grouped(heads: Sequence[Head]) -> dict[int, list[int]]:
    """Heads by layer."""
    found: dict[int, list[int]] = {}
    for layer, head in sorted(heads):
        found.setdefault(layer, []).append(head)
    return found
