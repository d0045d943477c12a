"""What claims about trained rules share: small models, several seeds, kept as they come.

A run that was broken off goes on: what has been trained stands in build/claims, by the name of the script.
"""

from __future__ import annotations

import argparse
import math
import sys
from functools import cache
from pathlib import Path
from typing import Any

from foveate.training.experiment import Experiment, Outcome
from foveate.training.run import Optimisation, Run, Size
from foveate.training.task import TrainingTask
from foveate.training.tasks.characters import Characters

SEEDS = (0, 1, 2)
SIZE = Size(width=96, layers=2, heads=4, feed_forward=4)
TRAINING = Optimisation(steps=800, batch=32)
MODEL = "decoders of 2 layers, width 96, 4 heads, trained on characters of WikiText-2"


@cache
def options() -> argparse.Namespace:
    """What the script was called with."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder that has wikitext2-valid.txt")
    parser.add_argument("--workers", type=int, default=2, help="models trained at a time, a core each")
    return parser.parse_args()


def command(seeds: tuple[int, ...] = SEEDS) -> dict[str, Any]:
    """How to run the script again."""
    return {"command": f"python bench/claims/{Path(sys.argv[0]).stem}.py --data FOLDER", "seeds": list(seeds)}


def characters(length: int = 64, longer: int = 16) -> Characters:
    """The next character of the validation text of WikiText-2, whose last tenth is held out."""
    text = (options().data / "wikitext2-valid.txt").read_text(encoding="utf-8")
    return Characters(length=length, longer=longer, text=text)


def runs(
    task: TrainingTask,
    mixers: tuple[str, ...],
    size: Size = SIZE,
    training: Optimisation = TRAINING,
    judged: int = 64,
    every: int = 0,
    seeds: tuple[int, ...] = SEEDS,
) -> list[Run]:
    """Each mixer under each seed."""
    return [Run(task, mixer, size, training, seed, judged, every) for seed in seeds for mixer in mixers]


def home(part: str = "") -> Path:
    """Where the script keeps its models."""
    return Path("build/claims") / (Path(sys.argv[0]).stem + part)


def carried_out(planned: list[Run], part: str = "") -> dict[str, list[Outcome]]:
    """What came of the runs, by mixer, in the order of seeds."""
    experiment = Experiment(tuple(planned))
    done = experiment.open(home(part), resume=True)

    def tell(run: Run, step: int, loss: float) -> None:
        if step == run.optimisation.steps:
            print(f"{run.mixer}, width {run.size.width}, seed {run.seed}: loss {loss:.4f}", file=sys.stderr, flush=True)

    found: dict[str, list[Outcome]] = {}
    for outcome in experiment.carry_out(home(part), done, tell, options().workers):
        found.setdefault(outcome.run.mixer, []).append(outcome)
    return found


def last(outcomes: list[Outcome], measure: str, at: int | None = None) -> list[float]:
    """The last value of a measure under each seed; NaN where training broke off."""
    return [math.nan if o.result["failed"] else o.last(measure)[at] for o in outcomes]


def less(a: list[float], b: list[float]) -> list[float]:
    """a - b, seed by seed."""
    return [x - y for x, y in zip(a, b, strict=True)]
