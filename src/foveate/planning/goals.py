"""What a plan is to reach: a size, or a quality."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from foveate.core.budget import in_bytes
from foveate.core.errors import BadInput, unknown

__all__ = ["PERPLEXITY", "PROBES", "Goal", "parse_quality"]

PERPLEXITY = "ppl"
"""Perplexity of a text, as a multiple of that with the full cache."""
PROBES = ("passkey", "key_value", "needles", "variable_tracking", "common_words", "planted_facts")
"""Probes by name; a target is a share of what the full cache recalls."""


@dataclass(frozen=True)
class Goal:
    """One of three: a share of the cache, its bytes, or what must stay right.

    Args:
        keep: Largest share of the cache's bytes.
        bytes: Most bytes at the length that is planned for, as "200MB".
        quality: (what, target): `ppl`, at most so many times the full cache's perplexity; a probe, at least this share
            of the full cache's recall.

    Raises:
        BadInput: none of them, several, or one that nothing can meet.
    """

    keep: float | None = None
    bytes: str | None = None
    quality: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        given = [n for n, v in (("--keep", self.keep), ("--bytes", self.bytes), ("--quality", self.quality)) if v]
        if self.keep is not None and not (math.isfinite(self.keep) and 0 < self.keep < 1):
            raise BadInput(f"--keep {self.keep}: give a share of the cache above 0 and below 1, for instance 0.25")
        if len(given) != 1:
            what = "and ".join(f"{n} " for n in given) + "contradict each other" if given else "there is no goal"
            raise BadInput(f"{what}: give one of --keep 0.25, --bytes 200MB and --quality ppl=1.01,passkey=0.99")
        if self.bytes is not None:
            in_bytes(self.bytes)
        names = [name for name, _ in self.quality]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise BadInput(f"--quality names {twice[0]} twice; give one target for it")
        for name, target in self.quality:
            if name != PERPLEXITY and name not in PROBES:
                raise unknown("quality", name, (PERPLEXITY, *PROBES))
            if name == PERPLEXITY and not 1 <= target < math.inf:
                raise BadInput(
                    f"--quality ppl={target:g}: give how many times the full cache's perplexity it may be, 1.01 say; "
                    "no smaller cache is asked to be below 1"
                )
            if name != PERPLEXITY and not 0 < target <= 1:
                raise BadInput(
                    f"--quality {name}={target:g}: give a share of the full cache's recall, above 0 and at most 1"
                )

    def share(self, full: int, tokens: int) -> float | None:
        """The largest share of the full cache's bytes; None where quality decides.

        Args:
            full: Bytes of the full cache at the length that is planned for.
            tokens: That length.

        Raises:
            BadInput: the full cache is no larger than the bytes that it may take.
        """
        if self.bytes is None:
            return self.keep
        allowed = in_bytes(self.bytes)
        if allowed >= full:
            raise BadInput(
                f"--bytes {self.bytes}: the full cache of {tokens:,} tokens takes {full / 1e6:.1f} MB, which fits "
                "already; give less, or a longer text with --tokens"
            )
        return allowed / full

    def __str__(self) -> str:
        """As it was asked for."""
        if self.quality:
            return ", ".join(
                f"perplexity at most {t:g} x" if n == PERPLEXITY else f"{n} at least {t:g} of the full cache's recall"
                for n, t in self.quality
            )
        return f"{self.keep:.0%} of the bytes" if self.keep is not None else f"{self.bytes}"


def parse_quality(text: str) -> tuple[tuple[str, float], ...]:
    """`ppl=1.01,passkey=0.99` as pairs.

    Raises:
        BadInput: something else.
    """

    def pairs() -> Iterable[tuple[str, float]]:
        for part in text.split(","):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            try:
                yield name, float(value)
            except ValueError:
                equals = ""
            if not name or not equals:
                raise BadInput(f"--quality {text!r}: {part.strip()!r} is no target; write ppl=1.01,passkey=0.99")

    return tuple(pairs())
