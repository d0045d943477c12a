"""What the small models are trained on: sequences with known answers, drawn from a generator."""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from foveate.core.errors import unknown
from foveate.core.params import check_bounds
from foveate.core.registry import camel

if TYPE_CHECKING:
    from foveate.training.model import Decoder
    from foveate.training.run import Usual

__all__ = [
    "NOT_ASKED",
    "Batch",
    "Column",
    "Measure",
    "Plot",
    "TrainingTask",
    "doubled",
    "find_task",
    "task_names",
]

NOT_ASKED = -100
"""The target of a position whose answer does not count; what `cross_entropy` ignores."""
LONGEST_SHOWN = 40


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences, and what should be said behind each position.

    Args:
        inputs: Token ids.
        targets: The right answers; `NOT_ASKED` where none counts.
    """

    inputs: Int[Tensor, "batch position"]
    targets: Int[Tensor, "batch position"]


@dataclass(frozen=True)
class Measure:
    """One number about a model.

    Args:
        name: What was measured.
        value: The number.
        at: The length of the sequences it was measured on; None: that of the training.
        step: After how many steps of training.
    """

    name: str
    value: float
    at: int | None = None
    step: int = 0


@dataclass(frozen=True)
class Plot:
    """One figure of a task.

    Args:
        measures: What is drawn.
        across: What it is drawn against: "bytes" of state, "length" of the sequences, or "step" of the training.
        title: What the figure shows, in words.
        share: Whether the numbers are shares, from 0 to 1.
    """

    measures: tuple[str, ...]
    across: str
    title: str
    share: bool = False


@dataclass(frozen=True)
class Column:
    """One column of a task's table.

    Args:
        measure: The measure.
        title: What it is called there.
        share: Whether it is a share, from 0 to 1.
    """

    measure: str
    title: str
    share: bool = False


@dataclass(frozen=True)
class TrainingTask:
    """A family of sequences with known answers. Concrete tasks are frozen dataclasses, and final."""

    title: ClassVar[str]
    plots: ClassVar[tuple[Plot, ...]]
    columns: ClassVar[tuple[Column, ...]]

    def __post_init__(self) -> None:
        check_bounds(self)

    @property
    def name(self) -> str:
        """The file's name."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        raise NotImplementedError

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that is trained on."""
        raise NotImplementedError

    def batch(self, draw: torch.Generator, count: int) -> Batch:
        """Draws `count` sequences to train on."""
        raise NotImplementedError

    def judge(self, model: Decoder, draw: torch.Generator, count: int) -> list[Measure]:
        """Measures a model on `count` sequences that it has not seen."""
        raise NotImplementedError

    @classmethod
    def usual(cls, quick: bool) -> Usual:
        """What the command line trains when nothing else is said."""
        raise NotImplementedError

    def described(self) -> dict[str, Any]:
        """The parameters, for JSON; a long text by its hash."""
        return {"task": self.name} | {f.name: brief(getattr(self, f.name)) for f in fields(self)}


def doubled(first: int, times: int) -> list[int]:
    """first, twice that, and so on up to `times` as much."""
    return [first << n for n in range(times.bit_length())]


def brief(value: Any) -> Any:
    """A parameter as JSON has it."""
    if isinstance(value, str) and len(value) > LONGEST_SHOWN:
        return f"sha256:{hashlib.sha256(value.encode('utf-8', 'surrogatepass')).hexdigest()}"
    return list(value) if isinstance(value, tuple) else value


def task_names() -> list[str]:
    """Names of all tasks, from the files alone."""
    folder = Path(__file__).with_name("tasks")
    return sorted(info.name for info in pkgutil.iter_modules([str(folder)]) if not info.name.startswith("_"))


def find_task(name: str) -> type[TrainingTask]:
    """The class of a task.

    Raises:
        UnknownName: no task is called so.
    """
    if name not in task_names():
        raise unknown("training probe", name, task_names())
    return getattr(importlib.import_module(f"foveate.training.tasks.{name}"), camel(name))
