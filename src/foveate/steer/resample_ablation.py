r"""Resample ablation: a head says what it said in another text. With the clean text as donor it is activation patching.

    o'_ih = o_jh(donor)        j = i (align "start"), or as far from the end as i (align "end")

What the head tells about this text is gone, and what comes in its place is something that the model does see from it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.card import Card, Needs
from foveate.core.errors import BadInput, NothingObserved
from foveate.core.mechanism import HeadEdit
from foveate.core.params import check_bounds, choice
from foveate.core.places import Head, some_heads
from foveate.core.rows import Rows
from foveate.steer._heads import Inputs, Seen, refuse_width, run

__all__ = ["Donor", "ResampleAblation"]


@dataclass(frozen=True, eq=False, repr=False)
class Donor:
    """Head outputs of another run, each text from its first token on.

    Args:
        outputs: By (layer, head): [texts, tokens, value_dim], where shorter texts are filled up with anything.
        lengths: Tokens of each text.
    """

    outputs: dict[Head, Float[Tensor, "texts tokens value_dim"]]
    lengths: tuple[int, ...]

    def __repr__(self) -> str:
        return f"Donor({len(self.outputs)} heads, texts of {', '.join(map(str, self.lengths))} tokens)"

    @classmethod
    def of(cls, model: Any, inputs: Inputs, heads: tuple[Head, ...] = ()) -> Donor:
        """What heads give on some texts; one call's texts are a batch, those of several calls stand one after another.

        Args:
            model: The model.
            inputs: Arguments of the model by name, as a tokenizer gives them, or a list of these. Padding is left out.
            heads: (layer, head) of those to keep; () is all.

        Raises:
            BadInput: no inputs; a layer or head that the model has not.
            NothingObserved: a text is all padding.
        """
        seen = Seen(heads)
        run(model, seen, inputs)
        lengths = {tuple(map(len, texts)) for texts in seen.found.values()}
        if len(lengths) != 1:
            raise BadInput(
                f"the heads to take outputs from read texts of {len(lengths)} different lengths (an encoder's beside a "
                "decoder's?); name heads of one kind, or run them one after another"
            )
        (sizes,) = lengths
        if not all(sizes):
            raise NothingObserved(f"text {sizes.index(0)} of the donor's inputs is all padding; leave it out")
        padded = torch.nn.utils.rnn.pad_sequence
        return cls({at: padded(texts, batch_first=True) for at, texts in sorted(seen.found.items())}, sizes)

    @classmethod
    def constant(cls, *heads: Head, value: float = 0.0) -> Donor:
        """A donor of one token whose outputs are all the same number."""
        return cls({head: torch.full((1, 1, 1), value) for head in heads}, (1,))


@dataclass(frozen=True, eq=False)
class ResampleAblation(HeadEdit):
    """Puts in place of a head's outputs those of another run.

    It holds tensors, so no plan can hold it.

    Args:
        donor: The other run: one text for all rows of the batch, or one for each.
        heads: (layer, head) of those to replace; () is all that the donor has.
        align: Whether the tokens of the donor's texts are counted from the first one or from the last one.

    Example:
        In "abab?ab" the induction head says "a"; patched from a run on "acac?ac" it says what it said there.

        >>> import foveate
        >>> from foveate.steer import ResampleAblation
        >>> from foveate.testing import handmade, tiny
        >>> model, says = handmade.model(), tiny.tokenizer().decode
        >>> clean, other = handmade.ids("xyzxy"), handmade.ids("xywxy")
        >>> for text in (clean, other):
        ...     says(model(text).logits[0, -1].argmax())
        'z'
        'w'
        >>> patch = ResampleAblation.fit(model, {"input_ids": other}, heads=((1, 2),))
        >>> with foveate.attach(model, patch):
        ...     says(model(clean).logits[0, -1].argmax())
        'w'
    """

    donor: Donor
    heads: tuple[Head, ...] = some_heads()
    align: str = choice("start", "start", "end")

    card: ClassVar = Card(
        title="Resample ablation and activation patching of head outputs",
        year=2022,
        family="heads",
        needs=Needs.VALUES | Needs.MODEL,
        equation="o'_ih = o_jh(donor); j = i from the start, or from the end",
        differs="no single paper is behind it. Tokens of the text that have no token of the donor's text to take from "
        "(beyond its end while answering, or before its beginning) take from its nearest one. The end is that of each "
        "call: with align='end' a prompt must come in one call, and every token decoded after it takes from the "
        "donor's last one",
        use="to see what a head tells about a text: replace it from a text without that (resample ablation), or from "
        "the clean text in a corrupted one (activation patching)",
        misleads="texts that are not parallel word for word differ in more than what is asked about; and other heads "
        "may take over what a replaced one no longer does",
    )
    test_params: ClassVar = (
        {"donor": Donor.constant((1, 0), (0, 1), value=0.4)},
        {"donor": Donor.constant((1, 0), (1, 1), (0, 1), value=-0.3), "heads": ((1, 0),)},
        {"donor": Donor({(1, 0): torch.linspace(-1, 1, 12)[None, :, None]}, (12,))},
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if missing := [at for at in self.heads if at not in self.donor.outputs]:
            raise BadInput(f"ResampleAblation(heads={missing}): {self.donor!r} has no outputs of these; name others")

    @classmethod
    def fit(cls, model: Any, inputs: Inputs, heads: tuple[Head, ...] = (), align: str = "start") -> ResampleAblation:
        """Replaces heads by what they give on other texts.

        Args:
            model: The model.
            inputs: The donor's texts, as arguments of the model by name, or a list of these.
            heads: (layer, head) of those to replace; () is all.
            align: Whether tokens are counted from the start of the texts or from their end.

        Raises:
            BadInput: no inputs; a layer or head that the model has not.
        """
        return cls(Donor.of(model, inputs, heads), heads, align)

    def miniature(self) -> ResampleAblation:
        """The same from the donor's first text."""
        first = {at: outputs[:1] for at, outputs in self.donor.outputs.items()}
        return replace(self, donor=Donor(first, self.donor.lengths[:1]))

    def sets(self) -> frozenset[tuple]:
        return frozenset(("layer", layer, "head", head) for layer, head in self.heads or self.donor.outputs)

    def edit(
        self, rows: Rows, out: Float[Tensor, "batch heads query value_dim"]
    ) -> Float[Tensor, "batch heads query value_dim"]:
        layer, mask, texts = rows.layer, rows.view.mask, len(self.donor.lengths)
        named = [head for at, head in self.heads or self.donor.outputs if at == layer.index and head < out.shape[1]]
        if not named:
            return out
        if out.shape[0] % texts:
            raise BadInput(
                f"ResampleAblation(donor=…): {texts} texts of the donor for a batch of {out.shape[0]} rows; give one "
                "for all of them, or one for each"
            )
        # a batch that beam search has expanded holds each text several times in a row
        which = torch.arange(texts, device=out.device).repeat_interleave(out.shape[0] // texts)
        last = torch.tensor(self.donor.lengths, device=out.device)[which, None] - 1
        index = mask.place
        if self.align == "end":
            # padding behind a text is not its end
            index = index + last - torch.where(mask.rows, index, -1).amax(-1, keepdim=True)
        index = torch.minimum(index.clamp_min(0), last)
        new = out.clone()
        for head in named:
            given = self.donor.outputs[layer.index, head].to(out)
            refuse_width("ResampleAblation(donor=…)", layer, head, given.shape[2], out.shape[3])
            # rows that see nothing go on giving nothing
            new[:, head] = torch.where(mask.rows[..., None], given[which[:, None], index], 0.0)
        return new
