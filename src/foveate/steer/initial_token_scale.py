r"""Initial-token scaling: one token tunes how much the others are worth.

    p'_i0 = gamma_h p_i0 / D_i        p'_ij = p_ij / D_i        D_i = (gamma_h - 1) p_i0 + 1

The weight of the first token of the text is multiplied and the row made to sum to one again. That is a bias of
ln gamma_h on its score. More weight there flattens what is left for the other tokens, less sharpens it; their
proportions to each other stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate.core.card import Card, Needs
from foveate.core.mechanism import Edit, Tilt
from foveate.core.params import bounded
from foveate.core.places import Value, factors, values_of
from foveate.core.rows import View

__all__ = ["InitialTokenScale"]

GRID = (0.2, 0.4, 0.6, 0.8, 1.25, 1.6, 2.0, 3.0, 5.0)


@dataclass(frozen=True)
class InitialTokenScale(Edit):
    """Multiplies the weight of the first token of the text, in all heads or in each by its own factor.

    Args:
        factor: gamma, for all heads without one of their own; 1 changes nothing.
        heads: (layer, head, gamma) for single heads.

    Example:
        A head that looks at one token alone is past changing; the one that looks at all tokens alike gives the first
        one three times the weight of another.

        >>> import foveate
        >>> from foveate.measure import FirstTokenMass
        >>> from foveate.steer import InitialTokenScale
        >>> from foveate.testing import handmade
        >>> model = handmade.model()
        >>> both = InitialTokenScale(3.0), FirstTokenMass()
        >>> with foveate.attach(model, *both) as attached:
        ...     _ = model(handmade.ids("hello world"))
        >>> handmade.named(attached.results.heads, "first_token_mass")
        {'first': 1.0, 'previous': 0.17, 'self': 0.08, 'average': 0.44}
    """

    factor: float = bounded(1.6, 0.001, 1000.0, grid=GRID)
    heads: tuple[Value, ...] = values_of(0.001, 1000.0, grid=GRID)

    card: ClassVar = Card(
        title="ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models Without Training",
        year=2025,
        family="sinks",
        needs=Needs.WEIGHTS,
        equation="p'_i0 = gamma_h p_i0 / D_i; p'_ij = p_ij / D_i; D_i = (gamma_h - 1) p_i0 + 1",
        differs="the first token is that of each text, behind padding and in packed batches too; the published code "
        "takes the first key of the batch. In layers with learned sinks the sink takes part in the new sum",
        use="to tune a model on a task with a few labelled examples, or without labels by the entropy of its answers",
        misleads="a factor found on a handful of examples is fitted to them: judge it on held-out ones",
        claims=("initial_token_scaling",),
    )
    identity: ClassVar = {"factor": 1.0, "heads": ()}
    test_params: ClassVar = ({}, {"factor": 1.0}, {"factor": 0.3}, {"factor": 1.0, "heads": ((1, 0, 4.0), (0, 1, 2.0))})

    def tilt(self, view: View) -> Tilt | None:
        if view.layer.cross:
            return None
        gamma = factors(self.factor, self.heads, view.layer.index, view.heads, view.q.float())
        starts = view.mask.starts.long()
        # in a packed batch each row sees the beginning of its own text only; one that a cache has dropped is nowhere
        first = torch.zeros(len(starts), view.keys + 1, dtype=torch.bool, device=starts.device)
        first.scatter_(1, starts.where(starts >= 0, view.keys), True)
        return Tilt(bias=torch.where(first[:, None, :-1], gamma.log()[:, None], 0.0))
