r"""Emphasis: some tokens count for more, in all heads or in those that answer to it.

    s'_ij = s_ij + b [j in the span]        p'_ij = p_ij e^{b [j in the span]} / D_i        D_i = 1 + (e^b - 1) m_i

m_i is the weight that row i had on the span. A bias of b on the scores is exactly a multiplication of the weights by
e^b, and of the rows' sums back to one. The proportions inside of the span and outside of it stay.

Which heads are worth it is measured: the derivative of an answer's loss by the b of each head, at b = 0, one backward
pass per example for all heads at once. `fit` takes the heads where it is most consistently negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from foveate import tasks
from foveate.core.card import Card, Needs
from foveate.core.errors import BadInput
from foveate.core.mechanism import Edit, Tilt
from foveate.core.params import bounded
from foveate.core.places import Head, Span, some_heads, some_spans
from foveate.core.rows import View
from foveate.finding.responding import responses
from foveate.locating import locate
from foveate.steer._acting import acting
from foveate.tasks import prepare

__all__ = ["Emphasis"]

Example = tuple[str, str, str]


@dataclass(frozen=True)
class Emphasis(Edit):
    """Adds a bias to the scores of a span's keys, for all rows that see them.

    Args:
        span: (first token, one past the last), one for the batch or one per batch row, as `foveate.locate` gives them.
        strength: b in nats; 0 changes nothing, a negative one makes the span count for less.
        heads: (layer, head) of those that it acts in; () is all.

    Example:
        The head that looks at all tokens alike: the last of five gives the others 8 / 9 in place of 4 / 5, each of
        them twice what it keeps.

        >>> import math, foveate
        >>> from foveate.measure import SpanMass
        >>> from foveate.steer import Emphasis
        >>> from foveate.testing import handmade
        >>> model, spans = handmade.model(), SpanMass((("abc", 0, 4), ("d", 4, 5)))
        >>> twice = Emphasis(((0, 4),), strength=math.log(2))
        >>> with foveate.attach(model, twice, spans) as attached:
        ...     _ = model(handmade.ids("abcd"))
        >>> handmade.named(attached.results.heads, "span_mass:d>abc")
        {'first': 1.0, 'previous': 1.0, 'self': 0.0, 'average': 0.89}
    """

    span: tuple[Span, ...] = some_spans()
    strength: float = bounded(1.0, -20.0, 20.0, grid=(-4.0, -2.0, -1.0, 0.5, 1.0, 2.0, 3.0, 4.0))
    heads: tuple[Head, ...] = some_heads()

    card: ClassVar = Card(
        title="Emphasis of a span by an additive bias on its scores",
        year=2023,
        family="emphasis",
        needs=Needs.WEIGHTS,
        equation="s'_ij = s_ij + b [j in the span]; p'_ij = p_ij e^(b [j in the span]) / (1 + (e^b - 1) m_i)",
        differs="no single paper is behind it: an additive bias is an exact re-weighting, p'_ij in proportion to "
        "p_ij e^b, so that nothing has to be normalised afterwards. In layers with learned sinks the sink takes part "
        "in the new sum",
        use="to have an instruction or a fact followed that the model passes over among much other text",
        misleads="what is emphasised is weighed more, not believed more: strong biases in all heads break the text "
        "that comes out before they help",
        claims=("emphasis",),
    )
    identity: ClassVar = {"strength": 0.0}
    test_params: ClassVar = (
        {"span": ((2, 6),)},
        {"span": ((2, 6),), "strength": 0.0},
        {"span": ((0, 3),), "strength": -2.5},
        {"span": ((1, 5),), "strength": 2.0, "heads": ((1, 0), (0, 3), (1, 3))},
    )

    def miniature(self) -> Emphasis:
        """On tokens 1 to 3."""
        return replace(self, span=((1, 4),))

    def on(self, span: tuple[Span, ...]) -> Emphasis:
        """The same for another text: strength and heads stay."""
        return replace(self, span=span)

    def tilt(self, view: View) -> Tilt | None:
        heads = acting(self.heads, view)
        if heads is None:
            return None
        inside = view.inside(self.span, view.mask.key_place)
        return Tilt(bias=torch.where(inside[:, None] & heads[:, None], self.strength, 0.0))

    @classmethod
    def fit(
        cls, model: Any, tokenizer: Any, examples: Sequence[Example], strength: float = 1.0, count: int = 8
    ) -> Emphasis:
        """Finds the heads in which emphasis makes right answers likelier, most consistently over the examples.

        Heads are ranked by the mean of their response over its standard error. Judge what comes out on examples that
        were not among these.

        Args:
            model: A causal language model.
            tokenizer: Its fast tokenizer.
            examples: (prompt, right answer, part of the prompt to emphasise); the answer as it goes on behind the
                prompt, with its blank in front where one belongs.
            strength: Of the emphasis; where it is negative, heads are sought in which less weight helps.
            count: How many heads at most.

        Returns:
            The emphasis for these examples, one span each; `on` takes it to other texts.

        Raises:
            BadInput: fewer than two examples, one that cannot be used, or no head that helps.
        """
        if len(examples) < 2:
            raise BadInput(f"{len(examples)} examples: at least 2 are needed to tell which heads respond consistently")
        if count < 1:
            raise BadInput(f"count={count} heads: at least 1 is needed")
        found = cls(spans_in(tokenizer, examples), strength)
        gain = gains(model, tokenizer, found, examples)
        error = gain.std(0) / len(examples) ** 0.5
        order = (gain.mean(0) / error.clamp_min(1e-300)).flatten()
        best = order.nan_to_num(-torch.inf).topk(min(count, order.numel())).indices
        heads = [(int(n) // gain.shape[2], int(n) % gain.shape[2]) for n in best if order[n] > 0]
        if not heads:
            less = "more" if strength >= 0 else "less"
            raise BadInput(f"{less} weight on these parts helps the {len(examples)} answers in no head of the model")
        return replace(found, heads=tuple(sorted(heads)))


def gains(
    model: Any, tokenizer: Any, edit: Emphasis, examples: Sequence[Example]
) -> Float[Tensor, "examples layers heads"]:
    """What the edit is worth to each answer in each head, to first order: nats of its loss per token."""
    prepared = prepare(tokenizer, [tasks.Example(prompt, answer=answer) for prompt, answer, _ in examples])
    lose = partial(tasks.loss, normalise=True)
    made = [
        responses(model, [(edit.on((span,)), prepared[n : n + 1])], lose).double() for n, span in enumerate(edit.span)
    ]
    return torch.stack(made)


def spans_in(tokenizer: Any, examples: Sequence[Example]) -> tuple[Span, ...]:
    """Where the part of each example stands among the tokens of its prompt.

    Raises:
        BadInput: an example is no prompt, answer and part, or its part is not in its prompt, or more than once.
    """
    found: list[Span] = []
    for n, example in enumerate(examples):
        if isinstance(example, str) or len(example) != 3 or not all(isinstance(x, str) and x for x in example):
            raise BadInput(f"example {n} must be (prompt, answer, part of the prompt), three texts; got {example!r}")
        try:
            found += locate(tokenizer, example[0], example[2])
        except BadInput as error:
            raise BadInput(f"example {n}: {error}") from None
    return tuple(found)
