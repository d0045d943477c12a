"""Declared bounds for the parameters of mechanisms: one word, checked once, at construction."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from foveate.core.errors import BadParameter

__all__ = ["Bounds", "bounded", "bounds_of", "check_bounds", "choice"]


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What a parameter may be: a closed range of numbers, or one of a few values.

    Args:
        low: Least number allowed.
        high: Largest number allowed.
        choices: The values allowed, in place of a range.
        grid: Values that a search tries; the choices, where there are any.
    """

    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] = ()
    grid: tuple[Any, ...] = ()

    def __str__(self) -> str:
        if self.choices:
            return " | ".join(repr(c) for c in self.choices)
        return f"{self.low} to {self.high}"

    def admits(self, value: Any, like: Any) -> bool:
        """Whether `value` is inside; a tuple is inside when each of its items is."""
        if self.choices:
            return value in self.choices
        if isinstance(like, tuple):
            return isinstance(value, tuple) and all(self.admits(v, like[0] if like else v) for v in value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if isinstance(like, int) and not isinstance(value, int):
            return False
        return math.isfinite(value) and self.low <= value <= self.high

    def kind(self, default: Any) -> str:
        """How an error goes on after "must be"."""
        return "one of" if self.choices else "tuple of" if isinstance(default, tuple) else "from"

    def wrong(self, default: Any) -> Iterator[Any]:
        """Values that must not be admitted, of each wrong kind; the common check `bounds` tries them."""
        kinds: list[Any] = ["?", None, float("nan")]
        if not self.choices:
            kinds += [self.low - 1, self.high + 1, True]
        first = default[0] if isinstance(default, tuple) and default else default
        if isinstance(first, int) and not self.choices:
            kinds.append(self.low + 0.5)
        yield from kinds
        if isinstance(default, tuple):
            yield from ((*default, bad) for bad in kinds)


def bounded(default: Any, low: float, high: float, grid: tuple[Any, ...] = ()) -> Any:
    """A dataclass field whose value (or each of whose items) lies between `low` and `high`, both included.

    `grid` are the values that a search tries.
    """
    return dataclasses.field(default=default, metadata={"bounds": Bounds(low, high, grid=grid)})


def choice(default: Any, *choices: Any) -> Any:
    """A dataclass field that takes one of the named values."""
    return dataclasses.field(default=default, metadata={"bounds": Bounds(choices=choices)})


def bounds_of(cls: type) -> dict[str, tuple[Any, Bounds | None]]:
    """Each parameter's default and bounds, in the order of the constructor."""
    return {f.name: (f.default, f.metadata.get("bounds")) for f in dataclasses.fields(cls)}


def check_bounds(mechanism: Any) -> None:
    """Raises `BadParameter` for the first parameter outside of its bounds."""
    for f in dataclasses.fields(mechanism):
        bounds: Bounds | None = f.metadata.get("bounds")
        value = getattr(mechanism, f.name)
        if bounds is not None and not bounds.admits(value, f.default):
            kind = bounds.kind(f.default)
            raise BadParameter(
                f"{type(mechanism).__name__}({f.name}={value!r}): {f.name} must be {kind} {bounds}"
                + (" (a whole number)" if isinstance(f.default, int) and not bounds.choices else "")
            )
