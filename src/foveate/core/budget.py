"""How many tokens a KV cache may keep: one vocabulary for all policies."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core.errors import BadParameter

__all__ = ["Amount", "Budget", "newest"]

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
# share of the even budget that no head falls below when heads compete
FLOOR = 0.2
# PyramidKV's beta: the last layer keeps 1 / 20 of the mean budget, the first as much above it
BETA = 20


@dataclass(frozen=True)
class Budget:
    """How many entries each KV head keeps.

    Args:
        keep: A share of the tokens seen (0.25), a number of tokens per head (512), or bytes of the whole cache
            ("200MB").
        sinks: First tokens of each text that always stay.
        recent: Last tokens that always stay.
        layers: "uniform", or "pyramid" (lower layers keep more).
        heads: "uniform"; "layer" (the heads of a layer compete, none falls below a fifth of the even share); "model"
            (all heads compete; nothing is dropped before the last layer has run); or a plan: triples
            (layer, kv_head, keep), the others keep `keep`.
        every: In decoding, entries are dropped after so many new tokens; 0: only the prompt is compressed, and what
            comes after it stays.

    Raises:
        BadParameter: a share outside of 0 to 1, fewer tokens than are pinned, or a word that is not known.
    """

    keep: float | int | str = 0.25
    sinks: int = 4
    recent: int = 32
    layers: str = "uniform"
    heads: Any = "uniform"
    every: int = 16

    def __post_init__(self) -> None:
        for name, low, high in (("sinks", 0, 1 << 20), ("recent", 1, 1 << 20), ("every", 0, 1 << 20)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise BadParameter(f"Budget({name}={value!r}): {name} must be a whole number from {low} to {high}")
        if self.layers not in ("uniform", "pyramid"):
            raise BadParameter(f"Budget(layers={self.layers!r}): must be 'uniform' or 'pyramid'")
        plan = self.heads if isinstance(self.heads, tuple) else ()
        if not isinstance(self.heads, tuple) and self.heads not in ("uniform", "layer", "model"):
            raise BadParameter(
                f"Budget(heads={self.heads!r}): must be 'uniform', 'layer', 'model' or triples (layer, kv_head, keep)"
            )
        if any(not isinstance(t, tuple) or len(t) != 3 for t in plan):
            raise BadParameter(f"Budget(heads={self.heads!r}): a plan is a tuple of triples (layer, kv_head, keep)")
        for keep in (self.keep, *(t[2] for t in plan)):
            self.check(keep)

    def check(self, keep: Any) -> None:
        """Raises `BadParameter` for an amount that says nothing, or less than what is pinned."""
        if isinstance(keep, str):
            in_bytes(keep)
        elif isinstance(keep, float):
            if not 0 < keep <= 1:
                raise BadParameter(
                    f"budget {keep!r}: a share must be above 0 and at most 1.0; whole numbers count tokens per head"
                )
        elif isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise BadParameter(f"budget {keep!r}: give a share (0.25), tokens per head (512) or bytes ('200MB')")
        elif keep == 1:
            raise BadParameter("budget 1: write 1.0 to keep everything, or a number of tokens per head above 1")
        elif keep < self.least:
            raise BadParameter(
                f"budget of {keep} tokens is below the {self.sinks} sinks, {self.recent} recent tokens and room for "
                f"{self.waiting} new ones that always stay: keep {self.least} or more, or say "
                f"Budget({keep}, sinks=…, recent=…, every=…)"
            )

    def __repr__(self) -> str:
        """As it is written: what has its usual value is left out."""
        changed = [f for f in fields(self)[1:] if getattr(self, f.name) != f.default]
        return f"Budget({', '.join([repr(self.keep), *(f'{f.name}={getattr(self, f.name)!r}' for f in changed)])})"

    @classmethod
    def of(cls, given: Amount) -> Budget:
        """A budget from what a user writes: 0.25, 512, "200MB", or a budget."""
        return given if isinstance(given, cls) else cls(given)  # type: ignore[arg-type]

    @property
    def waiting(self) -> int:
        """New tokens that must find room before entries are dropped again."""
        return max(0, self.every - 1)

    @property
    def least(self) -> int:
        """What any head holds, of texts that are long enough: the pinned tokens and the room for new ones."""
        return self.sinks + self.recent + self.waiting

    @property
    def whole(self) -> bool:
        """Whether it keeps everything."""
        return self.keep == 1.0 and not isinstance(self.heads, tuple)

    def counts(
        self, seen: Int[Tensor, " batch"], layer: int, layers: int, kv_heads: int, entry_bytes: int
    ) -> Int[Tensor, "batch kv_heads"]:
        """Entries that each KV head of a layer may hold.

        Args:
            seen: Real tokens of each batch row so far.
            layer: Which of the layers with a cache this is.
            layers: How many there are.
            kv_heads: KV heads of this layer.
            entry_bytes: What one entry of one head takes.
        """
        factor = 1.0
        if self.layers == "pyramid" and layers > 1:
            # a layer cannot keep more than everything; what it cannot take goes to the last ones
            top = min(2 - 1 / BETA, 1 / self.keep if isinstance(self.keep, float) else 2.0)
            factor = top + (2 - 2 * top) * layer / (layers - 1)
        named = {(at, h): keep for at, h, keep in self.heads} if isinstance(self.heads, tuple) else {}
        columns = []
        for h in range(kv_heads):
            keep = named.get((layer, h), self.keep)
            # what a plan says of a head is meant as it stands
            own = 1.0 if (layer, h) in named else factor
            if isinstance(keep, str):
                heads = layers * kv_heads * len(seen)
                count = torch.full_like(seen, int(own * in_bytes(keep) / (heads * entry_bytes)))
            elif isinstance(keep, int):
                count = torch.full_like(seen, int(own * keep))
            else:
                count = (seen.double() * keep * own + 1e-9).floor().to(seen)
            columns.append(count)
        least = seen.clamp_max(self.least)[:, None]
        return torch.minimum(torch.maximum(torch.stack(columns, 1), least), seen[:, None])

    def pinned(self, there: Bool[Tensor, "batch kv_heads key"]) -> Bool[Tensor, "batch kv_heads key"]:
        """Which of the entries that are there always stay: the first and the last of each head.

        Both have always stayed, so the first entries are the first tokens of the text.
        """
        return there & ((there.cumsum(-1) <= self.sinks) | newest(there, self.recent))

    def compete(
        self, score: Float[Tensor, "batch heads key"], counts: Int[Tensor, "batch heads"]
    ) -> Int[Tensor, "batch heads"]:
        """New counts when the heads of a row share the sum of their counts by score; -inf stands for no entry."""
        held = (score > -torch.inf).sum(-1)
        floor = torch.minimum((counts.double() * FLOOR).to(counts), held)
        order = score.argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(
            -1, order, torch.arange(score.shape[-1], device=score.device).expand_as(order)
        )
        open_to_all = score.masked_fill(rank < floor[..., None], torch.inf).flatten(1)
        left = counts.sum(-1)
        best = open_to_all.argsort(dim=-1, descending=True, stable=True)
        place = torch.empty_like(best).scatter_(
            -1, best, torch.arange(best.shape[-1], device=score.device).expand_as(best)
        )
        taken = (place < left[:, None]).view_as(score) & (score > -torch.inf)
        return taken.sum(-1)


def newest(there: Bool[Tensor, "batch kv_heads key"], count: int | Tensor) -> Bool[Tensor, "batch kv_heads key"]:
    """The last `count` of the entries that are there."""
    return there & (there.flip(-1).cumsum(-1).flip(-1) <= count)


def in_bytes(text: str) -> int:
    """`200MB` as a number of bytes (powers of ten)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgG]?)[bB]?\s*", text)
    if not match or float(match[1]) == 0:
        raise BadParameter(f"budget {text!r}: bytes are written 200MB, 1.5GB or 800kB")
    return int(float(match[1]) * UNITS[match[2].lower()])


Amount = Budget | float | int | str
