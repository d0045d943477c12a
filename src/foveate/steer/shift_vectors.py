r"""Representation shift vectors: the way from one kind of text to another, added to the residual stream.

    v_l = mean_{t in A} h_l(t) - mean_{t in B} h_l(t)        h'_l = h_l + strength v_l

A are texts (or answers) as they are wanted, B as they are not; h_l is what layer l leaves in the residual stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.card import Card, Needs
from foveate.core.errors import BadInput
from foveate.core.mechanism import ResidualEdit, Stream
from foveate.core.params import bounded
from foveate.core.places import Span, each_layer, some_spans
from foveate.core.recording import residual_streams
from foveate.steer._texts import encoded

__all__ = ["ShiftVectors", "collect"]

# two of the width of the tiny models, for the common checks
SHORT = tuple((layer, tuple(0.5 * ((7 * n + layer) % 5 - 2) for n in range(32))) for layer in (0, 1))

At = Literal["all", "last"]


@dataclass(frozen=True)
class ShiftVectors(ResidualEdit):
    """Adds a vector to the residual stream behind some layers.

    Args:
        vectors: (layer, vector) for each layer that is shifted; `fit` finds them.
        strength: How often each vector is added; negative goes the other way, 0 changes nothing.
        span: The tokens that are shifted, (first, one past the last) counted from the beginning of the text, generated
            ones included; one for all rows of the batch or one for each. The whole text, unless it is given.

    Raises:
        BadInput: when it acts, for a vector that is not as wide as the residual stream.

    Example:
        In a transformer written by hand, one column of the residual stream is read as "say z".

        >>> import foveate
        >>> from foveate.steer import ShiftVectors
        >>> from foveate.testing import handmade, tiny
        >>> model, tokenizer = handmade.model(), tiny.tokenizer()
        >>> column = handmade.SAID.start + tokenizer.get_vocab()["z"]
        >>> say_z = tuple(float(n == column) for n in range(model.config.n_embd))
        >>> shift = ShiftVectors(((1, say_z),), strength=5.0, span=((3, 6),))
        >>> with foveate.attach(model, shift):
        ...     said = model(handmade.ids("hello")).logits.argmax(-1)[0]
        >>> letters = tokenizer.convert_ids_to_tokens(said)
        >>> "".join(c if c == "z" else "." for c in letters)
        '...zzz'
    """

    vectors: tuple[tuple[int, tuple[float, ...]], ...] = each_layer()
    strength: float = bounded(1.0, -1000.0, 1000.0, grid=(-2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 4.0))
    span: tuple[Span, ...] = some_spans(none="the whole text")

    card: ClassVar = Card(
        title="Analyzing Fine-tuning Representation Shift for Multimodal LLMs Steering alignment",
        year=2025,
        family="representations",
        needs=Needs.MODEL,
        equation="v_l = mean_{t in A} h_l(t) - mean_{t in B} h_l(t); h'_l = h_l + strength v_l",
        differs="the paper takes the states of generated answer tokens, or of words of interest, at one layer; here "
        "`fit` takes all tokens of given texts but the first (whose state is huge in most models), or the last one, at "
        "any number of layers, and each text counts alike. Directions between single concepts, found by decomposing "
        "the states, are not built in",
        use="to move answers towards a type or style of which there are examples with and without it",
        misleads="the difference of two means holds all that the two sets of texts differ in, their length and topic "
        "too; pair the texts, and shift by a vector between two random halves as a control",
    )
    identity: ClassVar = {"strength": 0.0}
    test_params: ClassVar = (
        {"vectors": SHORT, "span": ((4, 9),)},
        {"vectors": SHORT, "strength": 0.0},
        {"vectors": SHORT[1:], "strength": -2.0},
        {"vectors": SHORT[:1], "span": ((0, 5), (3, 7))},
    )

    def edit(self, stream: Stream) -> Float[Tensor, "batch query width"]:
        v, width = self.tensors.get(stream.layer), stream.hidden.shape[-1]
        if v is None:
            return stream.hidden
        if len(v) != width:
            raise BadInput(
                f"ShiftVectors(vectors=…): the vector of layer {stream.layer} has {len(v)} numbers, the residual "
                f"stream of this model {width}; fit it on this model"
            )
        named = stream.inside(self.span) if self.span else torch.ones_like(stream.real)
        shifted = stream.hidden + (self.strength * v).to(stream.hidden)
        return torch.where((named & stream.real)[..., None], shifted, stream.hidden)

    @cached_property
    def tensors(self) -> dict[int, Float[Tensor, " width"]]:
        """The vectors by layer."""
        return {layer: torch.tensor(vector) for layer, vector in self.vectors}

    def miniature(self) -> ShiftVectors:
        return ShiftVectors(self.vectors, self.strength)

    @classmethod
    def fit(
        cls,
        model: Any,
        tokenizer: Any,
        texts_with: Sequence[str],
        texts_without: Sequence[str],
        *,
        layers: Sequence[int] = (),
        at: At = "all",
    ) -> ShiftVectors:
        """The vectors from texts without something to texts with it.

        Args:
            model: The model.
            tokenizer: Its tokenizer.
            texts_with: Texts as they are wanted.
            texts_without: Texts as they are not; best one for each of the others, alike in all else.
            layers: The layers to shift; the middle one, unless they are given.
            at: Whose states are averaged: of all tokens but the first, or of the last one.

        Raises:
            BadInput: no texts, or a layer that the model has not.
            NotSupported: the model has no residual stream that can be reached.
        """
        sides = (("texts_with", texts_with), ("texts_without", texts_without))
        a, b = (collect(model, tokenizer, texts, at=at, what=what) for what, texts in sides)
        known = sorted(a)
        layers = layers or (known[len(known) // 2],)
        for layer in layers:
            if layer not in a:
                raise BadInput(
                    f"{type(model).__name__} has no residual stream behind a layer {layer}; its layers are "
                    f"{', '.join(map(str, known))}"
                )
        return cls(tuple((layer, tuple((a[layer].mean(0) - b[layer].mean(0)).tolist())) for layer in layers))


def collect(
    model: Any, tokenizer: Any, texts: Sequence[str], *, at: At = "all", what: str = "texts"
) -> dict[int, Float[Tensor, "texts width"]]:
    """The mean residual stream of each text behind each layer.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        texts: The texts.
        at: Whose states are averaged: of all tokens but the first, or of the last one.
        what: What the texts are called in messages.

    Raises:
        BadInput: no texts.
        NotSupported: the model has no residual stream that can be reached.
    """
    found: dict[int, list[Tensor]] = {}
    for inputs in encoded(model, tokenizer, texts, what):
        streams, _ = residual_streams(model, **inputs)
        first = inputs["input_ids"].shape[1] - 1 if at == "last" else min(1, inputs["input_ids"].shape[1] - 1)
        for layer, hidden in streams.items():
            found.setdefault(layer, []).append(hidden[0, first:].float().mean(0).cpu())
    return {layer: torch.stack(means) for layer, means in found.items()}
