"""How the answers to prompts respond to a bias on a span, head by head, from one backward pass per example."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.attach import attach, attention_layers
from foveate.core.errors import BadInput, NotSupported
from foveate.core.mechanism import Edit, Tilt
from foveate.core.places import Span, some_spans
from foveate.core.rows import View
from foveate.locating import locate

__all__ = ["Example", "responses", "spans_in"]

Example = tuple[str, str, str]


@dataclass(frozen=True, eq=False)
class Dials(Edit):
    """A bias on the keys of a span, of nothing yet: one number per head that a derivative can be taken by."""

    span: tuple[Span, ...] = some_spans()
    of_layer: dict[int, Tensor] = field(default_factory=dict)

    def tilt(self, view: View) -> Tilt | None:
        if view.layer.cross:
            return None
        new = torch.zeros(view.heads, device=view.q.device, requires_grad=True)
        dial = self.of_layer.setdefault(view.layer.index, new)
        named = view.inside(self.span, view.mask.key_place)[:, None]
        return Tilt(bias=torch.where(named, dial[:, None], 0.0))


def responses(model: Any, tokenizer: Any, examples: Sequence[Example]) -> Float[Tensor, "examples layers heads"]:
    """The derivative of each example's loss by the bias on its span in each head, where there is no bias.

    The loss is the mean negative log-likelihood of the answer's tokens behind the prompt.

    Args:
        model: A causal language model.
        tokenizer: Its fast tokenizer.
        examples: Prompt, right answer, and the part of the prompt to weigh; the answer as it goes on, with its blank.

    Returns:
        In nats of loss per nat of bias; negative where more weight helps, NaN for heads that a layer has not.

    Raises:
        BadInput: an example that cannot be used; says which.
        NotSupported: the model does not go on with a text.
    """
    if getattr(model.config, "is_encoder_decoder", False) or not hasattr(model, "lm_head"):
        raise NotSupported(f"{type(model).__name__} does not go on with a text; load it as a causal language model")
    spans = spans_in(tokenizer, examples)
    made = []
    with frozen(model), torch.enable_grad():
        for n, (prompt, answer, _) in enumerate(examples):
            ids, begin = behind(tokenizer, prompt, answer)
            if begin == len(ids):
                raise BadInput(f"example {n}: the answer {answer!r} adds no token to its prompt; give it some text")
            dials = Dials(span=(spans[n],))
            with attach(model, dials, trial=False):
                logits = model(torch.tensor([ids], device=model.device), use_cache=False).logits[0, begin - 1 : -1]
            loss = torch.nn.functional.cross_entropy(logits.float(), torch.tensor(ids[begin:], device=logits.device))
            slopes = torch.autograd.grad(loss, list(dials.of_layer.values()), allow_unused=True)
            made.append(dict(zip(dials.of_layer, slopes, strict=True)))
    heads = max(len(slope) for one in made for slope in one.values() if slope is not None)
    table = torch.full((len(made), len(attention_layers(model)), heads), torch.nan)
    for n, one in enumerate(made):
        for layer, slope in one.items():
            if slope is not None:
                table[n, layer, : len(slope)] = slope
    return table


def spans_in(tokenizer: Any, examples: Sequence[Example]) -> tuple[Span, ...]:
    """Where the part of each example stands among the tokens of its prompt.

    Raises:
        BadInput: an example is no prompt, answer and part, or its part is not in its prompt, or more than once.
    """
    found: list[Span] = []
    for n, example in enumerate(examples):
        if isinstance(example, str) or len(example) != 3 or not all(isinstance(x, str) for x in example):
            raise BadInput(f"example {n} must be (prompt, answer, part of the prompt), three texts; got {example!r}")
        try:
            found += locate(tokenizer, example[0], example[2])
        except BadInput as error:
            raise BadInput(f"example {n}: {error}") from None
    return tuple(found)


def behind(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], int]:
    """The tokens of a prompt and its answer, and the number of the answer's first."""
    before, whole = (tokenizer(text, verbose=False)["input_ids"] for text in (prompt, prompt + answer))
    if whole[: len(before)] == before:
        return whole, len(before)
    # the two grow together where they meet: the answer is written by itself
    return before + tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"], len(before)


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """The model without dropout and without derivatives by its weights, which nobody asks for."""
    training = [m for m in model.modules() if m.training]
    weights = [p for p in model.parameters() if p.requires_grad]
    try:
        model.eval()
        for p in weights:
            p.requires_grad_(False)
        yield
    finally:
        for p in weights:
            p.requires_grad_(True)
        for m in training:
            m.training = True
