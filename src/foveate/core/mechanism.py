"""The kinds of mechanism, each with its one method. Concrete mechanisms are frozen dataclasses, and final."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core.accumulate import Cells, Estimate
from foveate.core.budget import Amount, Budget
from foveate.core.card import Card
from foveate.core.errors import BadInput
from foveate.core.params import check_bounds
from foveate.core.places import Head, within
from foveate.core.reductions import Reduction

if TYPE_CHECKING:
    import pandas as pd

    from foveate.core.passes import Passes
    from foveate.core.policy import Held, Merged, Reading
    from foveate.core.ragged import Packed, Side
    from foveate.core.rows import Layer, RowBlock, Rows, View
    from foveate.core.traffic import Shape, Traffic

__all__ = [
    "Edit",
    "ExpertEdit",
    "HeadEdit",
    "Mechanism",
    "Metric",
    "ModelMetric",
    "Parts",
    "Pattern",
    "Policy",
    "PromptEdit",
    "Pruner",
    "ResidualEdit",
    "RowMetric",
    "Schedule",
    "Stream",
    "Tilt",
    "Visits",
]


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

    def acts(self, layer: int) -> bool:
        """Whether it changes anything in this layer: where none does, nothing is laid out for it."""
        return True

    def miniature(self) -> Mechanism:
        """The same on a text of a dozen tokens, which `attach` tries it on: spans near the start, low thresholds."""
        return self

    def sets(self) -> frozenset[tuple]:
        """What it puts a value of its own in the place of, whatever stood there; two that set the same contradict."""
        return frozenset()

    @property
    def nothing(self) -> bool:
        """Whether this is the setting at which it changes nothing."""
        return self.identity is not None and all(getattr(self, k) == v for k, v in self.identity.items())


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


@dataclass(frozen=True, eq=False)
class Tilt:
    r"""What an edit does to scores in closed form: s'_ij = factor_i s_ij + bias_j.

    The factor is on scale * q . k, before a soft cap; the bias is added after it, so that the order of edits does not
    matter. A bias of ln c makes the weight of key j c times as large against those of the other keys.

    Args:
        factor: On the scores of each row; None: 1.
        bias: On the score of each key; None: 0. Minus infinity takes a key out.
        rows: The rows that the bias is for; None: all.
    """

    factor: Float[Tensor, "#batch #heads #query"] | None = None
    bias: Float[Tensor, "#batch #heads key"] | None = None
    rows: Bool[Tensor, "#batch query"] | None = None


class Edit(Mechanism):
    """Changes the rows of a running model.

    Of the three methods that change something, `tilt` costs least: the CPU kernel adds it to the scores on the way, row
    blocks do where that kernel is not at hand; `edit_scores` and `edit` see whole rows. They act in this order: tilts,
    scores, weights; in each, the edits in the order in which they are attached. `through` says what comes of `edit`
    without the rows.
    """

    def needs(self) -> tuple[Reduction, ...]:
        """Reductions of the unedited rows that the edit must know first; the engine runs a first pass for them."""
        return ()

    def tilt(self, view: View) -> Tilt | None:
        """A factor on the scores of each row and a bias on each key; None where this call is left alone."""
        return None

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

    def through(self, passes: Passes) -> Float[Tensor, "batch heads query value_dim"] | None:
        """Head outputs of `edit` without the rows, where passes over the keys can say them; None: it needs the rows.

        Asked where it is the only edit of rows and nobody looks at them.
        """
        return None

    @property
    def whole_rows(self) -> bool:
        """Whether it must see whole rows: it changes scores or weights in a way that is no tilt."""
        return type(self).edit_scores is not Edit.edit_scores or type(self).edit is not Edit.edit


class HeadEdit(Mechanism):
    """Changes head outputs before the output projection."""

    def edit(
        self, rows: Rows, out: Float[Tensor, "batch heads query value_dim"]
    ) -> Float[Tensor, "batch heads query value_dim"]:
        """The new head outputs."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Stream:
    """The residual stream behind one layer, as the next layer reads it.

    Args:
        hidden: The hidden states.
        place: Which token of its text each row is, from 0; negative for padding in front.
        real: Which rows are no padding.
        layer: Number of the layer that has just been added.
    """

    hidden: Float[Tensor, "batch query width"]
    place: Int[Tensor, "#batch query"]
    real: Bool[Tensor, "#batch query"]
    layer: int

    def inside(self, spans: tuple[tuple[int, int], ...]) -> Bool[Tensor, "#batch query"]:
        """Which rows lie in a span: one for all rows of the batch, or one for each."""
        return within(spans, self.place, len(self.hidden))


class ResidualEdit(Mechanism):
    """Changes the residual stream behind a layer."""

    def edit(self, stream: Stream) -> Float[Tensor, "batch query width"]:
        """The new hidden states."""
        raise NotImplementedError


class ExpertEdit(Mechanism):
    """Changes which experts of a mixture-of-experts layer a token goes to."""

    def edit(self, layer: int, logits: Float[Tensor, "tokens experts"]) -> Float[Tensor, "tokens experts"]:
        """The new logits of the router; the model chooses and weighs its experts from them as always."""
        raise NotImplementedError


class PromptEdit(Mechanism):
    """Changes the text that a model is given. It acts before there are tokens: call `edit`, or use it in a plan."""

    def edit(self, text: str) -> str:
        """The new text."""
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


class Policy(Mechanism):
    """What is done with a KV cache: one or more of four things; each changes nothing unless a policy has it.

        score, pinned    which entries stay; the budget says how many, the others are freed
        merge            what those that go leave behind in those that stay
        store            in which form entries are kept
        read             which entries a decoded token looks at, all others staying; the budget says how many

    Policies with different ones may be attached together.
    """

    budget: Amount = 1.0

    def __post_init__(self) -> None:
        check_bounds(self)
        Budget.of(self.budget)

    @cached_property
    def parts(self) -> frozenset[str]:
        """Which of the four it has."""
        every = ("score", "merge", "store", "read")
        return frozenset(part for part in every if getattr(type(self), part) is not getattr(Policy, part))

    @cached_property
    def limits(self) -> Budget:
        """The budget in full."""
        return Budget.of(self.budget)

    def within(self, budget: Amount) -> Policy:
        """The same policy with another budget.

        Raises:
            BadInput: it has none.
        """
        if "budget" not in {f.name for f in fields(self)}:
            raise BadInput(
                f"{type(self).__name__} drops nothing and has no budget; attach it beside a policy that says what stays"
            )
        return replace(self, budget=budget)  # type: ignore[call-arg]

    def counts(
        self, seen: Int[Tensor, " batch"], layer: int, layers: int, kv_heads: int, entry_bytes: int
    ) -> Int[Tensor, "batch kv_heads"]:
        """Entries that each KV head of a layer may hold, or read; by default what the budget says."""
        return self.limits.counts(seen, layer, layers, kv_heads, entry_bytes)

    def needs(self) -> tuple[Reduction, ...]:
        """Reductions over the rows since the last round of dropping that `score` reads."""
        return ()

    def score(self, held: Held) -> Float[Tensor, "batch kv_heads key"]:
        """How much each entry is worth; the lowest are dropped. What `held` marks as no entry may be anything."""
        raise NotImplementedError

    def pinned(self, held: Held) -> Bool[Tensor, "batch kv_heads key"]:
        """Entries that stay before all others, besides those that the budget pins."""
        return torch.zeros_like(held.there)

    def merge(self, held: Held, keep: Bool[Tensor, "batch kv_heads key"]) -> Merged:
        """What the entries that stay are to be, now that the others go: new keys, values and masses."""
        raise NotImplementedError

    def store(self, rows: Float[Tensor, "entries width"], slots: int, side: Side, layer: int) -> Packed:
        """Empty storage of so many slots for rows like these, the `keys` or the `values` of entries of a layer."""
        raise NotImplementedError

    def row_bytes(self, width: int, dtype: torch.dtype, side: Side, layer: int) -> int:
        """Bytes of one row of the stored `keys` or `values` of a layer, for budgets in bytes."""
        return width * dtype.itemsize

    def read(self, reading: Reading) -> Int[Tensor, "batch kv_heads chosen"] | None:
        """Which entries each KV head looks at, without one twice, -1 behind the last; None: all."""
        raise NotImplementedError


class Pattern(Mechanism):
    """Says which key blocks a row block visits; blocks that nobody visits get no weight."""

    def select(self, view: View) -> Visits:
        """The visits of this layer."""
        raise NotImplementedError


class Schedule(Mechanism):
    """An order in which attention is computed exactly: what comes out is the same, what it costs is not."""

    def refuses(self, view: View) -> str:
        """Why it cannot stand for this call, or ""; the row engine computes what it refuses."""
        return ""

    def run(
        self, view: View
    ) -> tuple[Float[Tensor, "batch heads query value_dim"], Float[Tensor, "batch heads query"]]:
        """Head outputs and the log-sum-exp of each row, -inf for a row that sees nothing; differentiable."""
        raise NotImplementedError

    def traffic(self, shape: Shape, fast: int) -> Traffic:
        """What moves between slow memory and a fast one of `fast` numbers, for a call of this shape."""
        raise NotImplementedError


@dataclass(frozen=True)
class Parts:
    """Parts of a model, as the whole model counts its layers and heads.

    Args:
        attention: Layers whose attention is meant.
        feed_forward: Layers whose feed-forward is meant.
        heads: (layer, head) of single heads.
    """

    attention: tuple[int, ...] = ()
    feed_forward: tuple[int, ...] = ()
    heads: tuple[Head, ...] = ()


class Pruner(Mechanism):
    """Says which parts of a model are taken out: `attach` does it for a `with` block, `apply` for good."""

    def parts(self) -> Parts:
        """The parts that go."""
        raise NotImplementedError
