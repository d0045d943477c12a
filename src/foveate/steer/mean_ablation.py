r"""Mean ablation: a head says what it says on average, whatever the text.

    o'_ih = m_h        m_h = mean over the tokens of reference texts of o_ih

What the head tells about this text is gone; what it adds to every text stays, as the layers behind it expect.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.card import Card, Needs
from foveate.core.errors import NothingObserved
from foveate.core.mechanism import HeadEdit
from foveate.core.places import Head, each_head
from foveate.core.rows import Rows
from foveate.steer._heads import Inputs, Seen, run, vectors_in

__all__ = ["MeanAblation"]


@dataclass(frozen=True)
class MeanAblation(HeadEdit):
    """Puts in place of a head's outputs their mean over reference texts.

    Args:
        means: (layer, head, vector) for each head to ablate; a vector of one number stands for all of its numbers.

    Example:
        A head that looks at the first token says the same everywhere, so nothing is lost; one that looks at its own
        token loses what told the tokens apart.

        >>> import foveate
        >>> from foveate.core.recording import head_outputs
        >>> from foveate.steer import MeanAblation
        >>> from foveate.testing import handmade
        >>> model, text = handmade.model(), handmade.ids("hello world")
        >>> heads = ((0, 0), (0, 2))
        >>> made = MeanAblation.fit(model, {"input_ids": text}, heads=heads)
        >>> before = head_outputs(model, input_ids=text)[0]
        >>> with foveate.attach(model, made, trial=False):
        ...     after = head_outputs(model, input_ids=text)[0]
        >>> gap = (before - after)[0].abs().amax((1, 2)).tolist()
        >>> [round(by, 2) + 0.0 for by in gap]
        [0.0, 0.0, 0.92, 0.0]
    """

    means: tuple[tuple[int, int, tuple[float, ...]], ...] = each_head()

    card: ClassVar = Card(
        title="Mean ablation of head outputs",
        year=2022,
        family="heads",
        needs=Needs.VALUES | Needs.MODEL,
        equation="o'_ih = m_h; m_h = mean_i o_ih over the tokens of reference texts",
        differs="no single paper is behind it. One mean for all places of a text, as most do; means for each place of "
        "a template are resample_ablation's business",
        use="to see what a head is worth to a task, with less harm by the unusual than from zeros",
        misleads="a mean over all places is that of a token in the middle of a text: where the first token is a sink, "
        "its own outputs are far from it; and a head can be needed for what it always says, which stays",
    )
    test_params: ClassVar = (
        {"means": ((1, 0, (0.4,)), (0, 1, (-0.2,)))},
        {"means": ((1, 1, (0.0,)),)},
        {"means": ((1, 0, (1.5,)), (1, 1, (-1.0,)))},
    )

    @classmethod
    def fit(cls, model: Any, inputs: Inputs, heads: tuple[Head, ...] = ()) -> MeanAblation:
        """Ablates heads by their means over some texts, the padding of batches left out.

        Args:
            model: The model.
            inputs: Arguments of the model by name, as a tokenizer gives them, or a list of these.
            heads: (layer, head) of those to ablate; () is all.

        Raises:
            BadInput: no inputs; a layer or head that the model has not.
            NothingObserved: a head of the list gave nothing on these inputs.
        """
        seen = Seen(heads)
        run(model, seen, inputs)
        for at in heads or ((0, 0),):
            if not sum(map(len, seen.found.get(at, ()))):
                raise NothingObserved(
                    f"layer {at[0]}, head {at[1]} of {type(model).__name__} gave nothing on these inputs; are they all "
                    "padding, or for another part of the model?"
                )
        return cls(
            tuple((*at, tuple(torch.cat(texts).double().mean(0).tolist())) for at, texts in sorted(seen.found.items()))
        )

    def sets(self) -> frozenset[tuple]:
        return frozenset(("layer", layer, "head", head) for layer, head, _ in self.means)

    def edit(
        self, rows: Rows, out: Float[Tensor, "batch heads query value_dim"]
    ) -> Float[Tensor, "batch heads query value_dim"]:
        found = vectors_in("MeanAblation(means=…)", self.means, rows.layer, out)
        if found is None:
            return out
        heads, m = found
        new = out.clone()
        # rows that see nothing go on giving nothing
        new[:, heads] = torch.where(rows.view.mask.rows[:, None, :, None], m, 0.0)
        return new
