r"""Temperature: sharper rows below one, flatter rows above.

    p'_ij = softmax_j(s_ij / tau_h)        so that        p'_ij / p'_ik = (p_ij / p_ik)^{1 / tau_h}

Over a long text softmax spreads, attention averages, and what comes out of it is nearly the same for every text; a
temperature below one makes it choose again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.core.card import Card, Needs
from foveate.core.mechanism import Edit, Tilt
from foveate.core.params import bounded
from foveate.core.places import Value, factors, some_indices, values_of
from foveate.core.rows import View

__all__ = ["Temperature"]

GRID = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.05, 1.1, 1.25, 1.5)


@dataclass(frozen=True)
class Temperature(Edit):
    """Divides the scores by a temperature, the same for all heads or each head's own.

    Args:
        temperature: tau, for all heads without one of their own; 1 changes nothing.
        heads: (layer, head, tau) for single heads, in whichever layer.
        layers: The layers that the common temperature is for; () is all.

    Example:
        Heads that choose by 250 nats choose by 2.5 at a temperature of 100, and look at the rest, too. The one that
        looks at all tokens alike has nothing to lose.

        >>> import foveate
        >>> from foveate.measure import FirstTokenMass
        >>> from foveate.steer import Temperature
        >>> from foveate.testing import handmade
        >>> model = handmade.model()
        >>> both = Temperature(100.0), FirstTokenMass()
        >>> with foveate.attach(model, *both) as attached:
        ...     _ = model(handmade.ids("ab"))
        >>> handmade.named(attached.results.heads, "first_token_mass")
        {'first': 0.93, 'previous': 0.66, 'self': 0.38, 'average': 0.61}
    """

    temperature: float = bounded(0.8, 0.01, 100.0, grid=GRID)
    heads: tuple[Value, ...] = values_of(0.01, 100.0, grid=GRID)
    layers: tuple[int, ...] = some_indices()

    card: ClassVar = Card(
        title="Length-Induced Embedding Collapse in Transformer-based Models",
        year=2024,
        family="temperature",
        needs=Needs.WEIGHTS,
        equation="p'_ij = softmax_j(s_ij / tau_h)",
        differs="the paper has one temperature for all layers and heads of an encoder; here heads may have their own, "
        "and decoders are treated alike. What is divided is scale q . k: a soft cap, an additive position bias (T5, "
        "where the published code divides it too) and learned sinks come after it. Cross-attention is left alone",
        use="below 1 to make embeddings of long texts differ again, or to sharpen single heads that a task needs",
        misleads="a model was trained at temperature 1: far from it every text gets worse, whatever one of them gains",
        claims=("temperature_long_texts",),
    )
    identity: ClassVar = {"temperature": 1.0, "heads": ()}
    test_params: ClassVar = (
        {},
        {"temperature": 1.0},
        {"temperature": 2.5, "layers": (1,)},
        {"temperature": 1.0, "heads": ((1, 0, 0.5), (0, 1, 2.0))},
        {"temperature": 0.5, "layers": (0,), "heads": ((1, 3, 3.0),)},
    )

    def tilt(self, view: View) -> Tilt | None:
        if view.layer.cross:
            return None
        common = self.temperature if not self.layers or view.layer.index in self.layers else 1.0
        tau = factors(common, self.heads, view.layer.index, view.heads, view.q.float())
        return Tilt(factor=1 / tau[None, :, None])
