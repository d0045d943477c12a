r"""Head reinforcement: the heads that a stretch of the text matters to count for more.

    VHD_h = || o_h(with the span) - o_h(without it) ||_2        at the last token of the prompt
    VHD_h = 0 where VHD_h > mu + sigma and || o_h(without it) ||^2 > mu' + sigma' (over the heads of the layer)
    o'_h  = factor o_h                                          where VHD_h > median over the heads of the layer

o_h is what head h gives before the output projection. A head whose output surges when the span is taken away is not
one that reads it, so its large divergence does not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core.card import Card, Needs
from foveate.core.errors import BadInput
from foveate.core.mechanism import HeadEdit
from foveate.core.params import bounded
from foveate.core.places import Head, Span, heads_of, some_heads
from foveate.core.recording import head_outputs
from foveate.core.rows import Rows
from foveate.steer._heads import Inputs, batches

__all__ = ["HeadReinforcement", "divergence", "sensitive"]


@dataclass(frozen=True)
class HeadReinforcement(HeadEdit):
    """Multiplies the outputs of heads that are sensitive to a span; `fit` finds them.

    Args:
        factor: alpha, on the outputs of each of the heads; 1 changes nothing.
        heads: (layer, head) of those to reinforce; () is all.

    Example:
        Behind the last "b" of "ab?ab", two heads would give something else without the "?": the one that looks at all
        tokens alike, and the induction head, which repeats it.

        >>> import foveate
        >>> from foveate.steer import HeadReinforcement
        >>> from foveate.testing import handmade
        >>> model, text = handmade.model(), handmade.ids("ab?ab")
        >>> made = HeadReinforcement.fit(model, {"input_ids": text}, span=((3, 4),))
        >>> [handmade.HEADS[layer][head] for layer, head in made.heads]
        ['average', 'induction']
        >>> plain = model(text).logits[0, -1].max()
        >>> with foveate.attach(model, made):
        ...     bool(model(text).logits[0, -1].max() > plain)
        True
    """

    factor: float = bounded(2.0, 0.0, 100.0, grid=(1.25, 1.5, 2.0, 3.0))
    heads: tuple[Head, ...] = some_heads()

    card: ClassVar = Card(
        title="Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence",
        year=2024,
        family="multimodal",
        needs=Needs.VALUES | Needs.MODEL,
        equation="o'_h = factor o_h for heads with VHD_h > median; VHD_h = ||o_h(with) - o_h(without)||_2",
        differs="the span is any stretch of the text, an image's tokens being one case. The heads are found once, on "
        "the texts given to `fit`, by two plain passes each; the paper finds them anew for each text, layer by layer, "
        "with the lower layers already reinforced. All layers unless some are named; the paper takes the second and "
        "the last 14 of 32",
        use="to make a model rely more on a part of its prompt (an image, a document) than on what it knows of itself",
        misleads="heads found on one text carry over to another one only in part: the paper loses most of its gain so",
    )
    identity: ClassVar = {"factor": 1.0}
    test_params: ClassVar = (
        {"factor": 2.0, "heads": ((1, 0), (0, 1))},
        {"factor": 1.0},
        {"factor": 3.0, "heads": ((1, 0), (1, 1), (0, 2))},
        {"factor": 0.5, "heads": ((1, 1),)},
    )

    @classmethod
    def fit(
        cls,
        model: Any,
        inputs: Inputs,
        span: tuple[Span, ...],
        factor: float = 2.0,
        share: float = 0.5,
        layers: tuple[int, ...] = (),
    ) -> HeadReinforcement:
        """Finds the heads whose outputs depend most on a span, at the last token of each text.

        Args:
            model: The model.
            inputs: Arguments of the model by name, as a tokenizer gives them, or a list of these. What is no shape of
                `input_ids` (an image's pixels) belongs to the span, and is left out with it.
            span: The span, as tokens of each text: one for all of them, or one for each.
            factor: alpha.
            share: How many of a layer's heads to reinforce; more than that are never, fewer where others are as good.
            layers: Layers in which heads are reinforced; () is all.

        Raises:
            BadInput: a span that is all of a text or none of it; inputs that cannot be cut; a layer that the model has
                not.
        """
        texts = [text for call in batches(inputs) for text in single(call)]
        if len(span) not in (1, len(texts)):
            raise BadInput(
                f"HeadReinforcement.fit(span=…): {len(span)} spans for {len(texts)} texts; give one for all of them, "
                "or one for each"
            )
        if not 0 < share < 1:
            raise BadInput(f"HeadReinforcement.fit(share={share}): give a share between 0 and 1, such as 0.5")
        total: dict[int, Tensor] = {}
        for n, text in enumerate(texts):
            for layer, by in divergence(model, text, span[n % len(span)]).items():
                total[layer] = total.get(layer, 0.0) + by
        if missing := [layer for layer in layers if layer not in total]:
            raise BadInput(
                f"HeadReinforcement.fit(layers={missing}): {type(model).__name__} has the layers {min(total)} to "
                f"{max(total)}"
            )
        heads = [
            (layer, head)
            for layer, by in sorted(total.items())
            if not layers or layer in layers
            for head in sensitive(by, share).nonzero()[:, 0].tolist()
        ]
        if not heads:
            raise BadInput(
                "no head's output depends on the span at the last token; choose another span, or other texts"
            )
        return cls(factor, tuple(heads))

    def edit(
        self, rows: Rows, out: Float[Tensor, "batch heads query value_dim"]
    ) -> Float[Tensor, "batch heads query value_dim"]:
        named = heads_of(self.heads, rows.layer.index, out.shape[1])
        if named is None:
            return self.factor * out
        if not named:
            return out
        alpha = out.new_ones(out.shape[1], 1, 1)
        alpha[named] = self.factor
        return alpha * out


def divergence(model: Any, text: Mapping[str, Tensor], span: Span) -> dict[int, Float[Tensor, " heads"]]:
    """VHD of each head, by layer, outliers set to 0.

    Args:
        model: The model.
        text: Arguments of the model for one text without padding.
        span: The tokens to take away.

    Raises:
        BadInput: there is nothing to take away, or nothing left.
    """
    apart, outputs = {}, (head_outputs(model, **text), head_outputs(model, **without(text, span)))
    for layer, given in outputs[0].items():
        if layer in outputs[1]:
            there, gone = (o[0, :, -1].float() for o in (given, outputs[1][layer]))
            by, alone = (there - gone).norm(dim=-1), gone.square().sum(-1)
            apart[layer] = torch.where(stands_out(by) & stands_out(alone), 0.0, by)
    return apart


def stands_out(x: Float[Tensor, " heads"]) -> Bool[Tensor, " heads"]:
    """More than a standard deviation above the mean of the layer."""
    return x > x.mean() + x.std(correction=0)


def sensitive(by: Float[Tensor, " heads"], share: float = 0.5) -> Bool[Tensor, " heads"]:
    """The heads of a layer whose divergence is above that of the others: at a share of a half, above the median."""
    # where most heads do not look at the span at all, the median is a rounding error
    return (by > by.quantile(1 - share)) & (by > 1e-5 * by.max())


def single(call: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each text of a call by itself, without its padding."""
    ids = call.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise BadInput("HeadReinforcement.fit: the inputs have no `input_ids` [texts, tokens], so no token can be cut")
    other = [name for name, x in call.items() if not (isinstance(x, Tensor) and x.shape == ids.shape)]
    if other and len(ids) > 1:
        raise BadInput(
            f"HeadReinforcement.fit: {', '.join(other)} cannot be cut into {len(ids)} texts; give the texts one by "
            "one, as a list of inputs"
        )
    mask = call.get("attention_mask")
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    # of one text the model counts positions itself
    skipped = ("attention_mask", "position_ids")
    return [
        {name: x if name in other else x[n : n + 1, real[n]] for name, x in call.items() if name not in skipped}
        for n in range(len(ids))
    ]


def without(text: Mapping[str, Any], span: Span) -> dict[str, Any]:
    """A text without the tokens of a span, and without what is no token at all."""
    ids, (first, last) = text["input_ids"], span
    length = ids.shape[1]
    if first >= length or (first == 0 and last >= length) or last >= length:
        raise BadInput(
            f"HeadReinforcement.fit(span={span}): of a text of {length} tokens a span must leave the last token, which "
            f"is compared; it may be ({min(first, length - 2)}, {length - 1}) at most"
        )
    kept = [n for n in range(length) if not first <= n < last]
    return {name: x[:, kept] for name, x in text.items() if isinstance(x, Tensor) and x.shape == ids.shape}
