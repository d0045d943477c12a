r"""Length temperature: scores grow with the logarithm of how many keys a row sees.

    s'_ij = max(least, ln n_i / ln N) s_ij

n_i is the number of keys that row i sees, N the length of the texts that the model knows. The entropy of a row of n
keys is about ln n less a term in proportion to the scores' scale, so a scale in proportion to ln n keeps it: a row of a
long text stays as choosy as one of N keys. It is a temperature of ln N / ln n_i for each row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from foveate.core.card import Card, Needs
from foveate.core.mechanism import Edit, Tilt
from foveate.core.params import bounded
from foveate.core.places import Head, some_heads
from foveate.core.rows import View
from foveate.steer._acting import acting

__all__ = ["LengthTemperature"]

LONGEST = 1 << 30


@dataclass(frozen=True)
class LengthTemperature(Edit):
    """Multiplies the scores of each row by the logarithm of the number of keys that it sees, to the base `trained`.

    Args:
        trained: N, the number of keys at which nothing changes: the length of the texts that the model was trained on.
        least: The factor never falls below it. 1 leaves rows of up to N keys as they are (the form in Qwen's code), 0
            also flattens short rows (ln n / ln N everywhere, as by the invariance of entropy).
        heads: (layer, head) of those that it acts in; () is all.

    Example:
        A head that chooses by 2.5 nats is less and less sure the more keys there are. Sharper with their number, it
        stays with its choice: rows of 4 keys choose by 2.5 ln 4 / ln 2 = 5 nats.

        >>> import foveate
        >>> from foveate.measure import FirstTokenMass
        >>> from foveate.steer import LengthTemperature, Temperature
        >>> from foveate.testing import handmade
        >>> model = handmade.model()
        >>> for more in ((), (LengthTemperature(trained=2),)):
        ...     edits = Temperature(100.0), *more, FirstTokenMass()
        ...     with foveate.attach(model, *edits) as attached:
        ...         _ = model(handmade.ids("abcdefghij"))
        ...     handmade.named(attached.results.heads, "first_token_mass")["first"]
        0.73
        0.98
    """

    trained: int = bounded(2048, 2, LONGEST, grid=(128, 256, 512, 1024, 2048, 4096, 8192))
    least: float = bounded(1.0, 0.0, 1.0, grid=(0.0, 1.0))
    heads: tuple[Head, ...] = some_heads()

    card: ClassVar = Card(
        title="Scores scaled by the logarithm of the number of keys (log-n attention)",
        year=2023,
        family="temperature",
        needs=Needs.WEIGHTS,
        equation="s'_ij = max(least, ln n_i / ln N) s_ij, n_i the number of keys that row i sees",
        differs="no single paper is behind it: with least = 1 it is the factor of the code of the first Qwen models, "
        "max(1, ln n / ln N) by the row's place in its text, with least = 0 the entropy-invariant scale ln n / ln N. "
        "n counts the keys that a row may see: those of its own text, not padding; in a window fewer than its place. "
        "Keys that a KV policy dropped are counted. Cross-attention is left alone",
        use="to read texts longer than those a model was trained on",
        misleads="models that scale their scores by length themselves (some long-context rotary schemes do) would get "
        "it twice",
    )
    identity: ClassVar = {"trained": LONGEST, "least": 1.0}
    test_params: ClassVar = (
        {"trained": 6},
        {"trained": LONGEST},
        {"trained": 12, "least": 0.0},
        {"trained": 4, "heads": ((1, 0), (0, 2), (1, 3))},
    )

    def miniature(self) -> LengthTemperature:
        """For a model of short texts."""
        return replace(self, trained=min(self.trained, 3))

    def tilt(self, view: View) -> Tilt | None:
        heads = acting(self.heads, view)
        if heads is None:
            return None
        n = (view.mask.high - view.mask.low).clamp_min(1).float()
        factor = (n.log() / math.log(self.trained)).clamp_min(self.least)[:, None]
        return Tilt(factor=torch.where(heads[:, None], factor, 1.0))
