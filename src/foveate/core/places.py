"""The places in a model and in a text that mechanisms name: layers, heads, stretches of tokens, and numbers for them.

They are declared as fields, so that one piece of code checks their form, and another one, where a model is at hand,
that the model has them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from foveate.core.errors import BadInput
from foveate.core.params import Bounds, bounds_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "Experts",
    "Head",
    "Heads",
    "Indices",
    "Layers",
    "Listed",
    "Span",
    "Spans",
    "Value",
    "Values",
    "Vectors",
    "check_places",
    "each_head",
    "each_layer",
    "factors",
    "heads_of",
    "named_layer",
    "placed",
    "some_experts",
    "some_heads",
    "some_indices",
    "some_spans",
    "spans_of",
    "values_of",
    "within",
]

Head = tuple[int, int]
Value = tuple[int, int, float]
Span = tuple[int, int]


class Listed(Bounds):
    """A tuple of entries, none of them twice; what one entry is, is said by `entry` and `fits`."""

    entry: ClassVar[str]
    example: ClassVar[Any]
    empty: ClassVar[str] = ""

    def __str__(self) -> str:
        within = f", numbers {self.low:g} to {self.high:g}" if self.low is not None else ""
        return f"{self.entry} each{within}{f'; {self.empty}' if self.empty else ''}"

    def kind(self, default: Any) -> str:
        return "a tuple of"

    def fits(self, entry: Any) -> bool:
        """Whether this is an entry."""
        raise NotImplementedError

    def admits(self, value: Any, like: Any) -> bool:
        if not isinstance(value, tuple) or not all(self.fits(v) for v in value):
            return False
        keys = [self.key(v) for v in value]
        return len(set(keys)) == len(keys) and (bool(value) or bool(self.empty))

    def key(self, entry: Any) -> Any:
        """What may not be there twice."""
        return entry

    def wrong(self, default: Any) -> Iterator[Any]:
        yield from ("?", None, 3, float("nan"), (self.example, "?"), (self.example, None), ((),))
        if self.key(self.example) is not None:
            yield (self.example, self.example)
        if not self.empty:
            yield ()


def counts(*numbers: Any) -> bool:
    """Whether all of these are whole numbers from 0."""
    return all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers)


@dataclasses.dataclass(frozen=True)
class Heads(Listed):
    """Pairs of layer and head."""

    entry: ClassVar = "(layer, head)"
    example: ClassVar = (0, 0)
    empty: ClassVar = "() is all heads"

    def fits(self, entry: Any) -> bool:
        return isinstance(entry, tuple) and len(entry) == 2 and counts(*entry)


@dataclasses.dataclass(frozen=True)
class Values(Listed):
    """Triples of layer, head and a number for that head."""

    entry: ClassVar = "(layer, head, number)"
    empty: ClassVar = "() leaves all heads to the common value"

    @property
    def example(self) -> Value:
        """The lowest number, for the first head."""
        return (0, 0, self.low or 0.0)

    def fits(self, entry: Any) -> bool:
        if not isinstance(entry, tuple) or len(entry) != 3 or not counts(*entry[:2]):
            return False
        number = entry[2]
        return isinstance(number, int | float) and not isinstance(number, bool) and self.low <= number <= self.high

    def key(self, entry: Any) -> Any:
        return entry[:2]

    def wrong(self, default: Any) -> Iterator[Any]:
        yield from super().wrong(default)
        yield from (((0, 0, self.low - 1),), ((0, 0, self.high + 1),), ((0, -1, self.low),))


@dataclasses.dataclass(frozen=True)
class Vectors(Listed):
    """Places with a vector each: (layer, vector), or (layer, head, vector).

    Args:
        places: Numbers that name a place: 1 for a layer, 2 for a head.
    """

    places: int = 1
    empty: ClassVar = ""

    @property
    def entry(self) -> str:  # type: ignore[override]
        """What an entry is called."""
        return "(layer, vector)" if self.places == 1 else "(layer, head, vector)"

    @property
    def example(self) -> Any:
        """A vector of one number at the first place."""
        return (*(0,) * self.places, (0.0,))

    def fits(self, entry: Any) -> bool:
        if not isinstance(entry, tuple) or len(entry) != self.places + 1 or not counts(*entry[:-1]):
            return False
        vector = entry[-1]
        return (
            isinstance(vector, tuple)
            and bool(vector)
            and all(isinstance(x, int | float) and math.isfinite(x) for x in vector)
        )

    def key(self, entry: Any) -> Any:
        return entry[:-1]


@dataclasses.dataclass(frozen=True)
class Indices(Listed):
    """Whole numbers from 0: layers, experts.

    Args:
        what: What is counted.
    """

    what: str = "layer"
    empty: ClassVar = "() is all"
    example: ClassVar = 0

    @property
    def entry(self) -> str:  # type: ignore[override]
        """What an entry is called."""
        return self.what

    def fits(self, entry: Any) -> bool:
        return counts(entry)


@dataclasses.dataclass(frozen=True)
class Layers(Indices):
    """Layers, none unless they are named."""

    empty: ClassVar = "() is none"


@dataclasses.dataclass(frozen=True)
class Spans(Listed):
    """Stretches of tokens, one for the whole batch or one per batch row: (first, one past the last).

    Args:
        none: What it means to give no span; "": one must be given.
    """

    none: str = ""
    entry: ClassVar = "(first token, one past the last)"
    example: ClassVar = (0, 1)

    @property
    def empty(self) -> str:  # type: ignore[override]
        """What () means."""
        return self.none and f"() is {self.none}"

    def fits(self, entry: Any) -> bool:
        return isinstance(entry, tuple) and len(entry) == 2 and counts(*entry) and entry[0] < entry[1]

    def key(self, entry: Any) -> Any:
        return None

    def admits(self, value: Any, like: Any) -> bool:
        return isinstance(value, tuple) and (bool(value) or bool(self.none)) and all(self.fits(v) for v in value)

    def wrong(self, default: Any) -> Iterator[Any]:
        yield from super().wrong(default)
        yield from (((3, 3),), ((4, 2),), ((-1, 2),))


@dataclasses.dataclass(frozen=True)
class Experts(Listed):
    """Pairs of layer and expert."""

    entry: ClassVar = "(layer, expert)"
    example: ClassVar = (0, 0)
    empty: ClassVar = "() is none"

    def fits(self, entry: Any) -> bool:
        return isinstance(entry, tuple) and len(entry) == 2 and counts(*entry)


def some_heads() -> Any:
    """A dataclass field that names heads; all of them, unless it is given."""
    return dataclasses.field(default=(), metadata={"bounds": Heads()})


def some_indices(what: str = "layer") -> Any:
    """A dataclass field that names layers (or what else is counted); all of them, unless it is given."""
    return dataclasses.field(default=(), metadata={"bounds": Indices(what=what)})


def some_experts() -> Any:
    """A dataclass field that names experts; none, unless it is given."""
    return dataclasses.field(default=(), metadata={"bounds": Experts()})


def some_spans(none: str = "") -> Any:
    """A dataclass field that names a stretch of tokens, for all rows of a batch or one for each.

    `none` says what it means when no span is given; without it one must be.
    """
    default: Any = () if none else dataclasses.MISSING
    return dataclasses.field(default=default, metadata={"bounds": Spans(none=none)})


def values_of(low: float, high: float, grid: tuple[Any, ...] = ()) -> Any:
    """A dataclass field with numbers for single heads, in place of the common one."""
    return dataclasses.field(default=(), metadata={"bounds": Values(low, high, grid=grid)})


def each_layer() -> Any:
    """A dataclass field with a vector for some layers."""
    return dataclasses.field(metadata={"bounds": Vectors(places=1)})


def each_head() -> Any:
    """A dataclass field with a vector for some heads."""
    return dataclasses.field(metadata={"bounds": Vectors(places=2)})


# ---------------------------------------------------------------- where a model is at hand


def check_places(mechanism: Any, layers: int, heads: Sequence[int | None], model: str) -> None:
    """Raises `BadInput` for the first layer or head that a mechanism names and a model has not.

    Args:
        mechanism: Its declared fields are looked at.
        layers: How many layers the model has.
        heads: How many heads each of its layers has; None where that is not known before it runs.
        model: The model's name, for the message.
    """
    for name, (_, bounds) in bounds_of(type(mechanism)).items():
        counts_layers = isinstance(bounds, Heads | Values | Vectors | Experts) or (
            isinstance(bounds, Indices) and bounds.what == "layer"
        )
        for entry in getattr(mechanism, name) if counts_layers else ():
            layer, *rest = entry if isinstance(entry, tuple) else (entry,)
            where = f"{type(mechanism).__name__}({name}=…)"
            if layer >= layers:
                raise BadInput(f"{where}: {model} has no layer {layer}; its {layers} layers are 0 to {layers - 1}")
            most = heads[layer] if layer < len(heads) else None
            names_head = getattr(bounds, "places", 2) == 2 and not isinstance(bounds, Indices | Experts)
            if names_head and most is not None and rest[0] >= most:
                raise BadInput(
                    f"{where}: layer {layer} of {model} has no head {rest[0]}; its {most} heads are 0 to {most - 1}"
                )


def spans_of(mechanism: Any) -> list[str]:
    """The fields of a mechanism, or of its class, that name stretches of tokens."""
    cls = mechanism if isinstance(mechanism, type) else type(mechanism)
    return [name for name, (_, bounds) in bounds_of(cls).items() if isinstance(bounds, Spans)]


def placed(mechanism: Any, spans: tuple[Span, ...] | None) -> Any:
    """A mechanism with its spans on these tokens; those that were left open stay open."""
    set_ones = [name for name in spans_of(mechanism) if getattr(mechanism, name)]
    return mechanism if spans is None else dataclasses.replace(mechanism, **dict.fromkeys(set_ones, spans))


def within(spans: tuple[Span, ...], place: Tensor, batch: int) -> Tensor:
    """Which places in a text lie in a span, [batch or 1, tokens].

    Args:
        spans: One for all rows of a batch, or one for each; of a batch that was expanded (beams, samples), one for
            each text, whose rows lie side by side.
        place: Places in the text, [batch or 1, tokens].
        batch: Rows of the batch.

    Raises:
        BadInput: neither one span nor as many as there are rows, or a divisor of that.
    """
    if len(spans) > 1 and batch % len(spans):
        raise BadInput(f"{len(spans)} spans on a batch of {batch} rows: give one for all of them, or one for each")
    edges = place.new_tensor(spans)
    if len(spans) > 1:
        edges = edges.repeat_interleave(batch // len(spans), 0)
    return (place >= edges[:, :1]) & (place < edges[:, 1:])


def named_layer(layer: int, layers: tuple[int, ...], heads: tuple[Head, ...]) -> bool:
    """Whether something that acts in these layers and heads (() is all) acts in a layer at all."""
    return (not layers or layer in layers) and (not heads or any(at == layer for at, _ in heads))


def heads_of(heads: tuple[Head, ...], layer: int, count: int) -> list[int] | None:
    """Which of a layer's `count` heads are named; None where all are, since none is named anywhere."""
    return [head for at, head in heads if at == layer and head < count] if heads else None


def factors(common: float, values: tuple[Value, ...], layer: int, heads: int, like: Tensor) -> Tensor:
    """One number per head of a layer: the common one, unless a head has its own. [heads], on the device of `like`.

    Not to be changed in place: what is asked for again is the same tensor.
    """
    own = tuple((head, value) for at, head, value in values if at == layer and head < heads)
    return factors_of(common, own, heads, like.dtype, like.device)


@lru_cache(maxsize=4096)
def factors_of(
    common: float, own: tuple[tuple[int, float], ...], heads: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The same, made once: decoding asks for it in every layer and at every token."""
    # what only lists mechanisms does not wait for torch
    import torch

    # a tensor of inference mode could take no part in a backward pass later
    with torch.inference_mode(False):
        made = torch.full((heads,), common, dtype=dtype, device=device)
        for head, value in own:
            made[head] = value
        return made
