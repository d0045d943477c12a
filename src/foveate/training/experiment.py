"""Several models on one task: mixers x sizes x seeds, their results kept as they come, and what they say together."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from scipy import stats

from foveate.core.errors import BadInput, Diverged
from foveate.probe.ledger import Ledger
from foveate.training.checkpoint import clear
from foveate.training.loop import Tell, cost, train
from foveate.training.mixers import operator
from foveate.training.run import Run, differences
from foveate.training.task import TrainingTask
from foveate.training.workers import Told, side_by_side

__all__ = ["Cell", "Experiment", "Outcome", "Row", "usual"]

SETTINGS, RESULTS, RUNS = "settings.json", "results.jsonl", "runs"


@dataclass(frozen=True)
class Outcome:
    """What came of one run.

    Args:
        run: Its settings.
        result: What was measured, as JSON has it: `parameters`, `state_bytes`, `seconds`, `losses`, `measures`, and
            `failed`, why it stopped, or "".
    """

    run: Run
    result: dict[str, Any]

    def last(self, measure: str) -> dict[int | None, float]:
        """The last values of a measure, by the length that it was taken at."""
        return {m["at"]: m["value"] for m in self.result["measures"] if m["name"] == measure}


@dataclass(frozen=True)
class Cell:
    """A mean over seeds with its 95 % t-interval, whose ends are NaN for a single seed.

    Args:
        measure: What was measured.
        at: The length that it was taken at; None: that of the training.
        value: The mean.
        low: Lower end of the interval.
        high: Upper end.
        seeds: Number of runs behind it.
    """

    measure: str
    at: int | None
    value: float
    low: float
    high: float
    seeds: int


@dataclass(frozen=True)
class Row:
    """What the seeds of one mixer at one size say together.

    Args:
        mixer: The mixer.
        width: Width of the model.
        parameters: Parameters of the model.
        state_bytes: Bytes of state that the longest training sequence leaves behind.
        seconds: Mean time of a run.
        failed: How many seeds stopped at a NaN.
        cells: The measures at the end of the training.
    """

    mixer: str
    width: int
    parameters: int
    state_bytes: int
    seconds: float
    failed: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Experiment:
    """Runs on one task.

    Args:
        runs: The runs.
    """

    runs: tuple[Run, ...]

    @property
    def task(self) -> TrainingTask:
        return self.runs[0].task

    def described(self) -> dict[str, Any]:
        """All settings: one value where the runs have one, a list where they differ."""
        tables = [run.described() for run in self.runs]
        found: dict[str, Any] = {"torch": torch.__version__}
        for name in tables[0]:
            values = list({json.dumps(t[name]): t[name] for t in tables}.values())
            found[name] = values[0] if len(values) == 1 else values
        return found

    def left(self, done: Ledger) -> list[Run]:
        """The runs that have not ended."""
        return [run for run in self.runs if done.key(run) not in done]

    def seconds(self, done: Ledger | None = None, workers: int = 1) -> float:
        """How long the runs that are left will take: a few steps of each kind are timed."""
        kinds: dict[Run, float] = {}
        each = []
        for run in self.left(Ledger() if done is None else done):
            kind = replace(run, seed=0)
            if kind not in kinds:
                kinds[kind] = timed(kind)
            each.append(kinds[kind])
        return max(math.fsum(each) / workers, *each, 0.0)

    def open(self, folder: Path, resume: bool = False) -> Ledger:
        """The folder of the results, ready for more.

        Args:
            folder: Where everything is kept.
            resume: Whether results may be there, of the same settings.

        Raises:
            BadInput: results are there that must not be, or of other settings.
        """
        file = folder / SETTINGS
        if file.exists():
            if not resume:
                raise BadInput(f"{folder} has results already; go on with --resume, or name another folder with --out")
            try:
                before = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as e:
                raise BadInput(f"{file} cannot be read ({e}); name another folder with --out") from None
            wrong = differences(before, self.described())
            if wrong:
                raise BadInput(
                    f"{folder} has results of other settings: {'; '.join(wrong)}. Give the same settings, or name "
                    "another folder with --out"
                )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(self.described(), indent=1), encoding="utf-8")
        return Ledger(folder / RESULTS)

    def carry_out(
        self,
        folder: Path | None = None,
        done: Ledger | None = None,
        tell: Told | None = None,
        workers: int = 1,
    ) -> list[Outcome]:
        """Trains and measures every model; what has ended is not done again, what was interrupted goes on.

        A run that diverges is noted as failed, and the others go on.

        Args:
            folder: Where checkpoints and models are kept; None: nowhere.
            done: What `open` gave.
            tell: Called with a run, its step and its loss: now and then, and when it has ended.
            workers: Processes that train side by side; more than one needs a script that is safe to import. The
                numbers do not depend on it.
        """
        done = Ledger() if done is None else done
        left = [(run, None if folder is None else folder / RUNS / label(run)) for run in self.left(done)]
        ended = side_by_side(one, left, workers, tell) if workers > 1 else in_turn(left, tell)
        for run, result in ended:
            done.add(done.key(run), result)
            if tell is not None:
                tell(run, run.optimisation.steps, (result["losses"] or [math.nan])[-1])
        return [Outcome(run, done[done.key(run)]) for run in self.runs]


def in_turn(runs: Sequence[tuple[Run, Path | None]], tell: Told | None) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Each run with what came of it, one after another."""
    for run, folder in runs:
        yield run, one(run, folder, None if tell is None else partial(tell, run))


def timed(run: Run) -> float:
    """Seconds that a run will take; what goes wrong at once takes none, and says so when it is run."""
    try:
        return cost(run)
    except Diverged:
        return 0.0


def one(run: Run, folder: Path | None, tell: Tell | None) -> dict[str, Any]:
    """Trains a model, and keeps its weights in place of its checkpoint."""
    try:
        trained = train(run, folder, tell)
    except Diverged as e:
        return {"failed": str(e), "parameters": 0, "state_bytes": 0, "seconds": 0.0, "losses": [], "measures": []}
    model = trained.model
    if folder is not None:
        save_file(model.state_dict(), folder / "model.safetensors")
        clear(folder)
    return {
        "failed": "",
        "parameters": model.parameter_count,
        "state_bytes": model.state_bytes(run.task.longest),
        "seconds": trained.seconds,
        "losses": list(trained.losses),
        "measures": [asdict(m) for m in trained.measures],
    }


def label(run: Run) -> str:
    """A folder's name for a run."""
    mixer = "".join(c if c.isalnum() or c in "_.=-" else "-" for c in run.mixer)
    return f"{mixer}-width-{run.size.width}-seed-{run.seed}"


def usual(
    task: type[TrainingTask],
    mixers: Sequence[str] = (),
    seeds: int = 3,
    *,
    quick: bool = False,
    widths: Sequence[int] = (),
    steps: int | None = None,
    text: str | None = None,
) -> Experiment:
    """The runs that the command line makes of its options.

    Args:
        task: The class of the task.
        mixers: What is compared; default: what the task thinks of.
        seeds: Runs of each, with seeds 0, 1, ….
        quick: Small enough to end within a minute.
        widths: Widths of the models; default: those of the task.
        steps: Steps of each; default: those of the task.
        text: The text, for tasks that have one.

    Raises:
        BadInput: a mixer without a causal form, no seed, a text for a task without.
    """
    plan = task.usual(quick)
    if seeds < 1:
        raise BadInput(f"{seeds} seeds: give at least 1")
    what = plan.task
    if text is not None:
        if "text" not in type(what).__dataclass_fields__:
            raise BadInput(f"{what.name} makes its own sequences and reads no text; leave the text out")
        what = replace(what, text=text)  # type: ignore[call-arg]
    names = tuple(dict.fromkeys(mixers)) or plan.mixers
    for name in names:
        operator(name, what)
    sizes = plan.sizes if not widths else tuple(replace(plan.sizes[-1], width=width) for width in dict.fromkeys(widths))
    trained = plan.optimisation if steps is None else replace(plan.optimisation, steps=steps)
    runs = (
        Run(what, name, size, trained, seed, plan.judged, plan.every)
        for seed in range(seeds)
        for size in sizes
        for name in names
    )
    return Experiment(tuple(runs))


def rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """The outcomes of each mixer and size together, in the order of mixers."""
    groups: dict[tuple[str, int], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.run.mixer, outcome.run.size.width), []).append(outcome)
    order = list(dict.fromkeys(mixer for mixer, _ in groups))
    return [row(groups[key]) for key in sorted(groups, key=lambda key: (order.index(key[0]), key[1]))]


def row(outcomes: Sequence[Outcome]) -> Row:
    """One mixer at one size."""
    run, good = outcomes[0].run, [o for o in outcomes if not o.result["failed"]]
    cells = []
    for column in run.task.columns:
        found = [o.last(column.measure) for o in good]
        for at in found[0] if found else ():
            cells.append(mean(column.measure, at, [values[at] for values in found]))
    first = good[0].result if good else outcomes[0].result
    seconds = sum(o.result["seconds"] for o in good) / max(1, len(good))
    return Row(
        run.mixer,
        run.size.width,
        first["parameters"],
        first["state_bytes"],
        seconds,
        len(outcomes) - len(good),
        tuple(cells),
    )


def mean(measure: str, at: int | None, values: Sequence[float]) -> Cell:
    """A mean with its t-interval."""
    n, middle = len(values), math.fsum(values) / len(values)
    if n < 2:
        return Cell(measure, at, middle, math.nan, math.nan, n)
    spread = math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (n - 1) / n)
    half = float(stats.t.ppf(0.975, n - 1)) * spread
    return Cell(measure, at, middle, middle - half, middle + half, n)


def to_json(experiment: Experiment, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """All that is known, as JSON; numbers that are none become null."""
    task = experiment.task
    found = {
        "task": task.name,
        "title": task.title,
        "settings": experiment.described(),
        "columns": [asdict(c) for c in task.columns],
        "plots": [asdict(p) for p in task.plots],
        "trained_at": task.longest,
        "rows": [asdict(r) for r in rows(outcomes)],
        "runs": [{"mixer": o.run.mixer, "width": o.run.size.width, "seed": o.run.seed} | o.result for o in outcomes],
    }
    return finite(found)


def finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
