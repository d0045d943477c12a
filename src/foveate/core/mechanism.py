"""The kinds of mechanism, each with its one method. Concrete mechanisms are frozen dataclasses, and final."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core.accumulate import Cells, Estimate
from foveate.core.card import Card
from foveate.core.params import check_bounds
from foveate.core.reductions import Reduction

if TYPE_CHECKING:
    import pandas as pd

    from foveate.core.rows import Layer, RowBlock, Rows, View

__all__ = ["Edit", "HeadEdit", "Mechanism", "Metric", "ModelMetric", "Pattern", "RowMetric", "Visits"]


@dataclass(frozen=True)
class Mechanism:
    """Something that can be attached to a model or run on it; checked against its bounds at construction.

    `card` says what a reader must know; `test_params` are the settings under which the common checks run,
    `known_failures` names the checks that it cannot pass, each with the reason, and `identity` the parameters at which
    it changes nothing.
    """

    card: ClassVar[Card]
    test_params: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    known_failures: ClassVar[dict[str, str]] = {}
    identity: ClassVar[dict[str, Any] | None] = None

    def __post_init__(self) -> None:
        check_bounds(self)

    @property
    def name(self) -> str:
        """Registry key: the file's name, or the class's own name in snake case outside of the package."""
        module = type(self).__module__.split(".")
        if module[0] == "foveate" and len(module) > 2:
            return module[-1]
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()


class Metric(Mechanism):
    """Reads rows as they stream by. State lives outside of the metric: one per layer, made by `start`."""

    def needs(self) -> tuple[Reduction, ...]:
        """The reductions that `update` reads."""
        raise NotImplementedError

    def start(self, layer: Layer) -> Any:
        """The state before the first row of a layer."""
        raise NotImplementedError

    def update(self, state: Any, rows: Rows) -> Any:
        """The state after these rows. May change `state` in place; returns it."""
        raise NotImplementedError

    def result(self, state: Any) -> dict[str, Estimate]:
        """One estimate per label, each over the heads of the layer; labels begin with the metric's name."""
        raise NotImplementedError

    def per_key(self, state: Any) -> dict[str, Float[Tensor, "heads keys"]]:
        """Numbers per key, for those that have them."""
        return {}

    def arrays(self, state: Any) -> dict[str, Float[Tensor, "heads ..."]]:
        """Pictures per head that are more than a number: a map, a course over the text."""
        return {}


class RowMetric(Metric):
    """A metric that is the mean over rows of one number (or several) per row."""

    def per_row(self, rows: Rows) -> dict[str, Float[Tensor, "batch heads query"]]:
        """The numbers of each row, by label."""
        raise NotImplementedError

    def start(self, layer: Layer) -> Any:
        return {}

    def update(self, state: Any, rows: Rows) -> Any:
        mask = rows.view.mask
        for label, values in self.per_row(rows).items():
            state.setdefault(label, Cells()).add(values, self.counted(rows), mask.position + mask.key_offset)
        return state

    def counted(self, rows: Rows) -> Bool[Tensor, "#batch query"]:
        """The rows that the mean runs over: the real ones, unless a metric says less."""
        return rows.view.mask.rows

    def result(self, state: Any) -> dict[str, Estimate]:
        return {label: cells.mean() for label, cells in state.items()}


class ModelMetric(Mechanism):
    """Measures a model by running it on inputs of its own making, or from its weights alone."""

    def measure(self, model: torch.nn.Module, tokenizer: Any) -> pd.DataFrame:
        """A table with the columns layer, head, metric, value, low, high."""
        raise NotImplementedError


class Edit(Mechanism):
    """Changes the rows of a running model."""

    def needs(self) -> tuple[Reduction, ...]:
        """Reductions of the unedited rows that the edit must know first; the engine runs a first pass for them."""
        return ()

    def edit_scores(
        self, block: RowBlock, scores: Float[Tensor, "batch heads rows keys"]
    ) -> Float[Tensor, "batch heads rows keys"]:
        """Scores before masking and normalisation."""
        return scores

    def edit(
        self, block: RowBlock, weights: Float[Tensor, "batch heads rows keys"]
    ) -> Float[Tensor, "batch heads rows keys"]:
        """Weights after normalisation."""
        return weights


class HeadEdit(Mechanism):
    """Changes head outputs before the output projection."""

    def edit(
        self, rows: Rows, out: Float[Tensor, "batch heads query value_dim"]
    ) -> Float[Tensor, "batch heads query value_dim"]:
        """The new head outputs."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Visits:
    """Which key blocks each row block visits.

    Args:
        table: True where a row block visits a key block.
        rows: Rows per row block.
        keys: Keys per key block.
    """

    table: Bool[Tensor, "#batch #heads row_blocks key_blocks"]
    rows: int
    keys: int

    def block(self, index: Tensor, first: int, last: int) -> Bool[Tensor, "#batch #heads rows keys"]:
        """The visits of single rows to keys first..last."""
        at = torch.arange(first, last, device=index.device)
        return self.table[:, :, index // self.rows][..., at // self.keys]


class Pattern(Mechanism):
    """Says which key blocks a row block visits; blocks that nobody visits get no weight."""

    def select(self, view: View) -> Visits:
        """The visits of this layer."""
        raise NotImplementedError
