r"""Head offsets: a task learned as one vector for each of a few heads.

    o'_h = o_h + v_h

    first:   o'_h = (1 + A_h) o_h for all heads, A by gradient descent on loss + l1 sum |A|; the heads with the largest
             ||A_h||_2 are chosen, and A is thrown away
    then:    v_h of the chosen heads by gradient descent on the loss

o_h is what head h gives before the output projection, the loss is that of the right answers, the model is frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.card import Card, Needs
from foveate.core.errors import BadInput
from foveate.core.mechanism import HeadEdit
from foveate.core.places import Head, each_head
from foveate.core.recording import frozen, head_outputs
from foveate.core.rows import Rows
from foveate.steer._heads import vectors_in
from foveate.steer._learning import Lesson, Scaled, Shifted, as_example, grouped, started

__all__ = ["HeadOffsets"]

FEW = 0.03


@dataclass(frozen=True)
class HeadOffsets(HeadEdit):
    """Adds a vector to the outputs of some heads; `fit` learns them from prompts and their answers.

    Args:
        offsets: (layer, head, vector) for each head; a vector of one number stands for all of its numbers.

    Example:
        Taught one answer, the model gives it: the vector of its induction head says "?" whatever they read.

        >>> import foveate
        >>> from foveate.steer import HeadOffsets
        >>> from foveate.testing import handmade, tiny
        >>> model, tokenizer = handmade.model(), tiny.tokenizer()
        >>> how = {"heads": ((1, 2),), "epochs": 30, "rates": (0.1, 0.1)}
        >>> made = HeadOffsets.fit(model, tokenizer, [("abcab", "?")], **how)
        >>> with foveate.attach(model, made):
        ...     tokenizer.decode(model(handmade.ids("abcab")).logits[0, -1].argmax())
        '?'
    """

    offsets: tuple[tuple[int, int, tuple[float, ...]], ...] = each_head()

    card: ClassVar = Card(
        title="LoFiT: Localized Fine-tuning on LLM Representations",
        year=2024,
        family="heads",
        needs=Needs.VALUES | Needs.MODEL | Needs.GRADIENTS | Needs.TRAINING,
        equation="o'_h = o_h + v_h for few heads h, chosen by ||A_h|| of o'_h = (1 + A_h) o_h learned under L1",
        differs="the loss of a step is the mean over its answers of their loss per token; the paper's is the mean over "
        "all tokens of a batch, and for truthfulness one of preferences between answers. The rates, epochs, batch and "
        "number of heads (3 %) are those of its 7B model on question answering",
        use="to teach a model a task from a few hundred answers by something small that comes off again",
        misleads="offsets found on a handful of examples are fitted to them: judge them on held-out ones, and beside "
        "as many random heads",
    )
    identity: ClassVar = {"offsets": ((0, 0, (0.0,)),)}
    test_params: ClassVar = (
        {"offsets": ((1, 0, (0.3,)), (0, 1, (-0.2,)))},
        {"offsets": ((0, 0, (0.0,)),)},
        {"offsets": ((1, 1, (1.0,)), (1, 0, (-1.0,)))},
    )

    @classmethod
    def fit(
        cls,
        model: Any,
        tokenizer: Any,
        examples: Sequence[Any],
        heads: tuple[Head, ...] | int = (),
        *,
        epochs: int = 5,
        rates: tuple[float, float] = (5e-3, 1e-2),
        l1: float = 5e-4,
        batch: int = 8,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> HeadOffsets:
        """Chooses heads and learns their offsets. The model is frozen meanwhile, and comes out as it went in.

        Args:
            model: A causal language model.
            tokenizer: Its tokenizer.
            examples: Examples of `foveate.tasks`, or pairs of a prompt and its right answer; an answer that follows a
                space begins with it.
            heads: (layer, head) of those to learn offsets for, or how many to choose; () chooses 3 %.
            epochs: How often each example is seen, in each of the two steps.
            rates: Learning rates of the factors that heads are chosen by, and of the offsets.
            l1: Weight of the sum of the absolute factors, beside the loss.
            batch: Examples per step.
            seed: Of the numbers near zero to begin with, and of the order of the examples.
            progress: Called with the steps done and all steps.

        Raises:
            BadInput: no examples, or one that cannot be used; a head that the model has not, or more of them than it
                has; a number that cannot be; a loss that is no number any more.
        """
        for name, number in {"epochs": epochs, "batch": batch}.items():
            if number < 1:
                raise BadInput(f"HeadOffsets.fit({name}={number}): give at least 1")
        if min(*rates, l1) < 0:
            raise BadInput(f"HeadOffsets.fit(rates={rates}, l1={l1}): these must not be negative")
        lesson = Lesson(model, tokenizer, tuple(map(as_example, examples)), epochs, batch, seed)
        if not lesson.examples:
            raise BadInput("HeadOffsets.fit: there are no examples to learn from; give at least one")
        rng = torch.Generator().manual_seed(seed)
        with frozen(model):
            ids = tokenizer(lesson.examples[0].prompt, return_tensors="pt")["input_ids"]
            shapes = {layer: (o.shape[1], o.shape[3]) for layer, o in head_outputs(model, input_ids=ids).items()}
            every = [(layer, head) for layer, (count, _) in shapes.items() for head in range(count)]
            given = heads if isinstance(heads, tuple) else ()
            if missing := [at for at in given if at not in every]:
                raise BadInput(f"HeadOffsets.fit(heads={missing}): {type(model).__name__} has no such heads")
            count = heads if isinstance(heads, int) else max(1, round(FEW * len(every)))
            if not 1 <= count <= len(every):
                raise BadInput(f"HeadOffsets.fit(heads={count}): {type(model).__name__} has 1 to {len(every)} heads")
            total = lesson.steps * (1 if given else 2)

            def told(done: int) -> None:
                if progress is not None:
                    progress(done, total)

            chosen = given or choose(lesson, shapes, count, rates[0], l1, rng, told)
            before = total - lesson.steps
            offsets = {
                layer: (
                    torch.tensor(own, device=model.device),
                    started((len(own), 1, shapes[layer][1]), rng, model.device),
                )
                for layer, own in grouped(chosen).items()
            }
            lesson.learn(
                Shifted(offsets), [v for _, v in offsets.values()], rates[1], 0.0, lambda n, _: told(before + n)
            )
        return cls(
            tuple(
                (layer, int(head), tuple(vector[0].tolist()))
                for layer, (own, v) in offsets.items()
                for head, vector in zip(own, v.detach(), strict=True)
            )
        )

    def edit(
        self, rows: Rows, out: Float[Tensor, "batch heads query value_dim"]
    ) -> Float[Tensor, "batch heads query value_dim"]:
        found = vectors_in("HeadOffsets(offsets=…)", self.offsets, rows.layer, out)
        if found is None:
            return out
        heads, v = found
        new = out.clone()
        # rows that see nothing go on giving nothing
        new[:, heads] += torch.where(rows.view.mask.rows[:, None, :, None], v, 0.0)
        return new


def choose(
    lesson: Lesson,
    shapes: dict[int, tuple[int, int]],
    count: int,
    rate: float,
    l1: float,
    rng: torch.Generator,
    told: Callable[[int], None],
) -> tuple[Head, ...]:
    """The heads whose outputs the task wants scaled most."""
    device = lesson.model.device
    factors = {layer: started((heads, 1, dim), rng, device) for layer, (heads, dim) in shapes.items()}
    lesson.learn(Scaled(factors), list(factors.values()), rate, l1, lambda n, _: told(n))
    size = {(layer, head): float(a.norm()) for layer, all_a in factors.items() for head, a in enumerate(all_a.detach())}
    return tuple(sorted(sorted(size, key=lambda at: -size[at])[:count]))
