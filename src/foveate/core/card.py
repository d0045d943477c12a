"""The facts about a mechanism, beside its code. Everything that lists mechanisms is derived from cards."""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = ["BLANK", "Card", "Needs"]

# what `foveate new` writes, with a colon and a hint, where a person must; the common check `form` finds it
BLANK = "to be written"


class Needs(enum.Flag):
    """What a mechanism reads."""

    QUERIES = enum.auto()
    KEYS = enum.auto()
    VALUES = enum.auto()
    WEIGHTS = enum.auto()
    MODEL = enum.auto()
    TOKENS = enum.auto()
    GRADIENTS = enum.auto()
    TRAINING = enum.auto()

    def names(self) -> list[str]:
        """Lower-case names of the single needs, in declaration order."""
        return [n.name.lower() for n in type(self) if n in self]


@dataclass(frozen=True)
class Card:
    """What a reader must know of a mechanism before using it.

    Args:
        title: Title of the paper, to the letter, or a plain description where no paper is behind it.
        year: Year of the paper.
        family: Short name of the group that it belongs to.
        needs: What it reads.
        equation: The equation as one line of text.
        differs: Where it departs from the paper. "nothing known" is allowed, silence is not.
        use: When to use it, in one sentence.
        misleads: When its number misleads, in one sentence.
        claims: Names of the claims tested under `bench/claims/`.
        sampled: True when it looks at a stated sample of rows instead of all of them.
    """

    title: str
    year: int
    family: str
    needs: Needs
    equation: str
    differs: str
    use: str
    misleads: str = ""
    claims: tuple[str, ...] = ()
    sampled: bool = False

    def __post_init__(self) -> None:
        for name in ("title", "family", "equation", "differs", "use"):
            if not getattr(self, name).strip():
                raise ValueError(f"Card({self.title!r}): {name} is empty; say it, if only 'nothing known'")
