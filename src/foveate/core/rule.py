r"""The stages that every row passes: select -> score -> mask -> normalise -> edit -> observe -> mix.

A `Rule` says how scores are made and how they become weights; one that says nothing is softmax attention. Select,
mask, observe and mix belong to the engine (`core/rows.py`), edits to the stack that is attached.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.mechanism import Mechanism
from foveate.core.reductions import Reduction

if TYPE_CHECKING:
    from foveate.core.rows import RowBlock, Rows, View

__all__ = ["Operator", "Rule", "Sizes"]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the attention layer that an operator stands in.

    Args:
        width: Width of the layer's input and output.
        heads: Query heads.
        kv_heads: Key-value heads.
        head_dim: Width of a query and of a key.
        layer: Number of the layer in its model, from 0.
        value_dim: Width of a value; 0: as wide as a key.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    layer: int = 0
    value_dim: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "value_dim", self.value_dim or self.head_dim)


class Operator(Mechanism):
    """What can stand in a model as its attention: a rule, a recurrence, or a mixer.

    `causal` and `full` say which forms it has: one in which no token sees a later one, and one in which all see all.
    """

    causal: ClassVar[bool] = True
    full: ClassVar[bool] = True


@dataclass(frozen=True)
class Rule(Operator):
    r"""Attention by rows: p_ij = exp(s_ij - lse_i) with lse_i = ln(\sum_j exp s_ij + exp sink_h), unless it says else.

    Each method is one stage, and changes nothing unless a rule has it. `view` is the attention call (`core/rows.py`):
    `view.learned` holds the rule's own parameters, `view.hidden` the layer's input at the queries, and `view.mask`
    which keys each row may see. Whatever depends on a place or a length must come from `view.mask`, so that padding
    does not matter.
    """

    def learned(self, sizes: Sizes) -> torch.nn.Module | None:
        """Fresh parameters of its own for one layer; None: it has none."""
        return None

    def write(
        self,
        learned: torch.nn.Module | None,
        v: Float[Tensor, "batch kv_heads new value_dim"],
        hidden: Float[Tensor, "batch new width"],
    ) -> Float[Tensor, "batch kv_heads new value_dim"]:
        """Values of new tokens as they come into the cache."""
        return v

    def prepare(self, view: View) -> View:
        """The call as the rows are made from it: other queries, another scale, a bias."""
        return view

    def score(self, block: RowBlock) -> Float[Tensor, "batch heads rows keys"]:
        r"""s_ij = scale * q_i . k_j, capped by c tanh(s / c) where the model asks for it; not yet masked."""
        view = block.view
        q = block.q * view.scale
        k = view.k[:, :, block.first : block.last].to(q.dtype)
        batch, heads, rows, dim = q.shape
        # The query heads of one key-value head are rows of one product: nothing is repeated
        grouped = q.reshape(batch, view.kv_heads, view.grouped * rows, dim)
        s = (grouped @ k.transpose(-1, -2)).reshape(batch, heads, rows, k.shape[2])
        return s if view.softcap is None else view.softcap * torch.tanh(s / view.softcap)

    def normalise(
        self, block: RowBlock, scores: Float[Tensor, "batch heads rows keys"]
    ) -> Float[Tensor, "batch heads rows keys"]:
        """Masked scores (-inf where a row may not look) to weights; a row that sees nothing gives zeros."""
        # the fused form knows no sink and gives NaN for rows that see nothing; float64 is for the reference
        if block.simple and block.view.sinks is None and scores.dtype != torch.float64:
            return torch.softmax(scores, -1)
        return torch.exp(scores - lse_of(block, scores)[..., None].clamp_min(torch.finfo(scores.dtype).min))

    def finish(
        self, view: View, out: Float[Tensor, "batch heads query value_dim"]
    ) -> Float[Tensor, "batch heads query value_dim"]:
        """The head outputs as they go to the output projection."""
        return out

    def shortcut(self, view: View) -> Float[Tensor, "batch heads query value_dim"] | None:
        """The mixed values (before `finish`) in memory linear in N by a way that forms no rows, where nobody looks.

        None where it has no such way for this call. `view` is what `prepare` gave.
        """
        return None

    def needs(self) -> tuple[Reduction, ...]:
        """The reductions that `loss` reads."""
        return ()

    def loss(self, rows: Rows) -> Float[Tensor, ""]:
        """What it adds to the loss of a model in training; `foveate.nn.auxiliary_loss` collects it."""
        raise NotImplementedError

    @property
    def default(self) -> bool:
        """Whether it is softmax attention and nothing else."""
        stages = ("learned", "write", "prepare", "score", "normalise", "finish", "shortcut", "loss")
        return all(getattr(type(self), stage) is getattr(Rule, stage) for stage in stages)

    @property
    def trains(self) -> bool:
        """Whether it has a loss of its own."""
        return type(self).loss is not Rule.loss

    @property
    def plain(self) -> bool:
        """Whether its weights are those of softmax attention, so that every engine can make them."""
        return type(self).score is Rule.score and type(self).normalise is Rule.normalise


def lse_of(block: RowBlock, scores: Float[Tensor, "batch heads rows keys"]) -> Float[Tensor, "batch heads rows"]:
    """Log-sum-exp of masked scores, with the learned sink of the head where there is one."""
    lse = torch.logsumexp(scores, -1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -torch.inf)
    sinks = block.view.sinks
    # a row that sees nothing stays empty: its sink has nothing to weigh against
    return lse if sinks is None else torch.where(lse == -torch.inf, lse, torch.logaddexp(lse, sinks.to(lse)[:, None]))
