"""The settings of one run: everything that its numbers depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from foveate.core.errors import BadParameter
from foveate.core.params import bounded, check_bounds
from foveate.training.task import TrainingTask

__all__ = ["Optimisation", "Run", "Size", "Usual", "differences"]


@dataclass(frozen=True)
class Size:
    """The shape of a model.

    Args:
        width: Width of the residual stream.
        layers: Number of layers.
        heads: Query heads of each layer.
        kv_heads: Key-value heads of each layer; 0: as many as query heads.
        feed_forward: Width of the feed-forward parts in units of `width`; 0: there are none.
        rope: Base of the rotary positions; 0: there are none.
        taps: Tokens that a short convolution before each attention reaches over; 0: there is none. With 2 or more,
            attention need not learn first to look one token back.
        places: Number of positions that are learnt and added to the tokens; 0: there are none.
    """

    width: int = bounded(64, 2, 4096)
    layers: int = bounded(2, 1, 64)
    heads: int = bounded(1, 1, 256)
    kv_heads: int = bounded(0, 0, 256)
    feed_forward: int = bounded(0, 0, 16)
    rope: float = bounded(10_000.0, 0.0, 1e9)
    taps: int = bounded(0, 0, 64)
    places: int = bounded(0, 0, 1 << 16)

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.width % self.heads:
            raise BadParameter(f"Size(width={self.width}, heads={self.heads}): width must be a multiple of heads")
        if self.heads % (self.kv_heads or self.heads):
            raise BadParameter(
                f"Size(heads={self.heads}, kv_heads={self.kv_heads}): heads must be a multiple of kv_heads"
            )


@dataclass(frozen=True)
class Optimisation:
    """AdamW, with a linear warm-up and a cosine to 0 behind it.

    Args:
        steps: Number of updates.
        batch: Sequences of each.
        rate: The highest learning rate.
        warmup: Share of the steps over which the rate rises.
        decay: Weight decay.
        clip: The gradient is scaled down to this norm where it is longer.
    """

    steps: int = bounded(1000, 1, 1 << 24)
    batch: int = bounded(64, 1, 1 << 16)
    rate: float = bounded(0.003, 0.0, 10.0)
    warmup: float = bounded(0.05, 0.0, 1.0)
    decay: float = bounded(0.1, 0.0, 10.0)
    clip: float = bounded(1.0, 1e-6, 1e6)

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True)
class Run:
    """One training: a task, a model, a seed.

    Args:
        task: What is learnt.
        mixer: What stands where attention does: a rule, as `sigmoid` or `sigmoid:length=64`, or `gated_convolution`.
        size: The shape of the model.
        optimisation: How it is trained.
        seed: Draws the first weights, the sequences, and what is random in between.
        judged: Sequences that it is measured on.
        every: Steps between two measurements; 0: only at the end.
        threads: Threads that it runs on; sums come out a little different with another number.
    """

    task: TrainingTask
    mixer: str = "softmax"
    size: Size = field(default_factory=Size)
    optimisation: Optimisation = field(default_factory=Optimisation)
    seed: int = bounded(0, 0, 1 << 31)
    judged: int = bounded(512, 1, 1 << 20)
    every: int = bounded(0, 0, 1 << 24)
    threads: int = bounded(1, 1, 1024)

    def __post_init__(self) -> None:
        check_bounds(self)

    def described(self) -> dict[str, Any]:
        """All settings in one flat table, for JSON."""
        own = {name: getattr(self, name) for name in ("mixer", "seed", "judged", "every", "threads")}
        return self.task.described() | own | asdict(self.size) | asdict(self.optimisation)


@dataclass(frozen=True)
class Usual:
    """What is trained when nothing else is said.

    Args:
        task: The task.
        sizes: The shapes of model.
        optimisation: How they are trained.
        mixers: What stands where attention does.
        judged: Sequences that each is measured on.
        every: Steps between two measurements; 0: only at the end.
    """

    task: TrainingTask
    sizes: tuple[Size, ...]
    optimisation: Optimisation
    mixers: tuple[str, ...] = ("softmax", "gated_convolution")
    judged: int = 512
    every: int = 0


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Which settings differ, each as `name: before, now`."""
    missing = "nothing"
    return [
        f"{name} was {before.get(name, missing)!r} and is {now.get(name, missing)!r}"
        for name in sorted({*before, *now})
        if before.get(name, missing) != now.get(name, missing)
    ]
