"""How many numbers move between a slow memory and a fast one, for each order in which attention is computed."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Shape", "Traffic"]


@dataclass(frozen=True)
class Shape:
    """The shape of an attention call.

    Args:
        queries: Rows.
        keys: Keys.
        dim: Width of a query and of a key.
        value_dim: Width of a value; None: as a key.
        batch: Sequences.
        heads: Query heads.
        kv_heads: Key-value heads.
        causal: Whether a row sees no key behind itself.
    """

    queries: int
    keys: int
    dim: int
    value_dim: int | None = None
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    causal: bool = False

    def inputs(self) -> int:
        """Numbers that must be read at least once."""
        values = self.dim if self.value_dim is None else self.value_dim
        q = self.heads * self.queries * self.dim
        return self.batch * (q + self.kv_heads * self.keys * (self.dim + values))

    def outputs(self) -> int:
        """Numbers that must be written at least once."""
        values = self.dim if self.value_dim is None else self.value_dim
        return self.batch * self.heads * self.queries * values


@dataclass(frozen=True)
class Traffic:
    """What moves.

    Args:
        read: Numbers read from slow memory.
        written: Numbers written to it.
        terms: The same by what they are; their sum is the total.
    """

    read: int
    written: int
    terms: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.read + self.written
