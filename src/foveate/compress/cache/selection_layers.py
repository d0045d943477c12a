r"""Selection layers: a few layers look at everything, those above read where they looked.

    layer s chooses:               P = the positions of the K largest max_h p_hj,  h over the heads that share j
    layers s + 1, ... up to the next that chooses:   read P

What a token looks at changes little from layer to layer, so one choice serves many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from foveate.core.budget import Amount
from foveate.core.cache import RaggedLayer
from foveate.core.card import Card, Needs
from foveate.core.errors import NotSupported
from foveate.core.mechanism import Policy
from foveate.core.params import bounded
from foveate.core.policy import Reading
from foveate.core.ragged import EMPTY

__all__ = ["SelectionLayers"]

# what a layer finds in its state from the layer below
SELECTED = "selected"


@dataclass(frozen=True)
class SelectionLayers(Policy):
    """Read at the positions that the last selection layer below gave the largest weights; all entries stay.

    Args:
        budget: How many entries each KV head reads in the layers that do not choose.
        first: The layer that chooses first; it and those below read everything.
        again: The layers that choose anew, as shares of the number of layers.

    Example:
        Layer 0 chooses and layer 1 reads, head by head. In layer 0 the first head looks at the first token and the
        second at the token before.

        >>> import foveate
        >>> from foveate.compress import SelectionLayers
        >>> from foveate.testing import handmade
        >>> from foveate.testing.policies import Witness
        >>> text, seen = "To be. Ask", []
        >>> ids = handmade.ids(text)
        >>> budget = foveate.Budget(2, sinks=0, recent=1, every=0)
        >>> policy = SelectionLayers(budget, first=0, again=())
        >>> policy = Witness(policy, seen, budget)
        >>> with foveate.attach(handmade.model(), policy) as attached:
        ...     cache = attached.model(ids[:, :-1]).past_key_values
        ...     out = attached.model(ids[:, -1:], past_key_values=cache)
        >>> [position is None for layer, position, room in seen]
        [True, False]
        >>> seen[-1][1][0, :2].tolist()
        [[10, 0], [10, 9]]
    """

    budget: Amount = 0.25
    first: int = bounded(2, 0, 1024)
    again: tuple[float, ...] = bounded((0.4,), 0.0, 1.0)

    card: ClassVar = Card(
        title="TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention",
        year=2024,
        family="kv cache",
        needs=Needs.QUERIES | Needs.KEYS | Needs.WEIGHTS,
        equation="P = positions of the K largest max over the heads that share a key of p_j in the last selection "
        "layer below; the layers between read P",
        differs="chosen per KV head by the largest weight over the query heads that share it; the paper's code chooses "
        "per query head. The budget's sinks and recent tokens are read first, the paper's code pins none. The "
        "layer that chooses anew is 13 of 32 in the paper's runs, here that share of the depth. In models with both "
        "kinds of layers those with a sliding window neither choose nor follow, and read their window",
        use="for long caches of deep models: no layer but the few that choose touches more than the budget",
        misleads="heads are matched by number, from layer to layer, though they need not do the same",
        claims=("layer_overlap",),
    )
    test_params: ClassVar = ({"first": 0, "again": ()}, {"first": 0, "again": (0.1,)})

    def read(self, reading: Reading) -> Int[Tensor, "batch kv_heads chosen"] | None:
        at, layers = reading.at, reading.layers
        choosing, position = self.choosing(layers), reading.state.pop(SELECTED, None)
        if at in choosing:
            best = reading.best(reading.weights().amax(2))
            position = reading.position.gather(-1, best.clamp_min(0)).masked_fill(best < 0, EMPTY)
        if position is not None and at + 1 < len(layers) and at + 1 not in choosing:
            # handed from layer to layer, so that nothing of it is left between two tokens
            layers[at + 1].state[SELECTED] = position
        if at in choosing or position is None or aside(layers, at):
            return None
        return None if bool((reading.store.length <= reading.room).all()) else entries(reading, position)

    def choosing(self, layers: Sequence[RaggedLayer]) -> set[int]:
        """The layers that choose: the named ones, or the next that can."""
        named = [self.first, *(round(share * len(layers)) for share in self.again)]
        able = [n for n in range(len(layers)) if n >= self.first and not aside(layers, n)]
        return {next((n for n in able if n >= name), -1) for name in named}


def aside(layers: Sequence[RaggedLayer], at: int) -> bool:
    """Whether a layer has a sliding window where others see everything."""
    return layers[at].is_sliding and not all(layer.is_sliding for layer in layers)


def entries(reading: Reading, position: Int[Tensor, "batch kv_heads best"]) -> Int[Tensor, "batch kv_heads chosen"]:
    """The entries of a layer that stand at positions, which come best first, as many as there is room for.

    Raises:
        NotSupported: the layer has another number of KV heads than the one that chose.
    """
    store, room = reading.store, reading.room
    if position.shape[:2] != room.shape:
        raise NotSupported(
            f"SelectionLayers: layer {reading.at} has {room.shape[1]} KV heads and the layer that chose for it "
            f"{position.shape[1]}; heads are matched by number, so take a policy that chooses in each layer, like Pages"
        )
    begin, end = store.position[store.start], store.position[store.start + store.length - 1]
    rank = torch.arange(position.shape[-1], device=position.device)
    if bool((end - begin + 1 == store.length).all()):
        # nothing is missing between the first entry and the last
        entry = (position - begin[..., None]).long()
        there = (position >= begin[..., None]) & (position <= end[..., None])
        if bool((there | (position == EMPTY)).all()):
            beyond = ~there | (rank >= room[..., None])
            return entry.masked_fill(beyond, -1)[..., : int(room.max())]
    else:
        held = reading.position.contiguous()
        entry = torch.searchsorted(held, position.contiguous()).clamp_max(held.shape[-1] - 1)
        there = (held.gather(-1, entry) == position) & (position != EMPTY)
    score = torch.full((*room.shape, store.longest + 1), -torch.inf, device=position.device)
    score.scatter_(-1, entry.where(there, store.longest), -rank.float().expand_as(entry))
    return reading.best(score[..., :-1])
