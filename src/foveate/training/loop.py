"""Training one model, so that an interruption changes nothing about it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core.errors import Diverged
from foveate.nn import auxiliary_loss
from foveate.training.checkpoint import Checkpoint, read, restore, tensors, write
from foveate.training.mixers import operator
from foveate.training.model import Decoder
from foveate.training.run import Optimisation, Run
from foveate.training.task import Batch, Measure

__all__ = ["Trained", "Training", "settled", "train"]

Tell = Callable[[int, float], None]
PARTS = 10
"""A run is kept, and its mean loss noted, so many times."""
TIMED = 3
# weights, sequences to train on and sequences to judge by come from seeds far apart
TRAINED, JUDGED = 1 << 40, 1 << 41


@dataclass(frozen=True, eq=False)
class Trained:
    """What came of a run.

    Args:
        model: The model.
        measures: What was measured, in order.
        losses: Mean loss in training, part by part: a tenth of the steps each.
        seconds: Time that training took; interruptions do not count.
    """

    model: Decoder
    measures: tuple[Measure, ...]
    losses: tuple[float, ...]
    seconds: float


def train(run: Run, folder: Path | None = None, tell: Tell | None = None) -> Trained:
    """Trains a model, or goes on where an interrupted run of the same settings stopped.

    The numbers are the same either way, bit for bit. The caller's random numbers and threads are left as they were.

    Args:
        run: The settings.
        folder: Where checkpoints are kept; None: nowhere.
        tell: Called after each step with how many are done and the loss.

    Raises:
        Diverged: a loss or gradient is no number.
        BadInput: the folder holds a run with other settings.
    """
    with settled(run):
        return Training(run).carry_out(folder, tell)


@contextmanager
def settled(run: Run) -> Iterator[None]:
    """Random numbers and threads as a run wants them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(run.threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            yield
    finally:
        torch.set_num_threads(threads)


class Training:
    """A run on its way.

    Args:
        run: Its settings. To be made inside of `settled`.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.model = Decoder(run.task.vocabulary, run.size, operator(run.mixer, run.task))
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=run.optimisation.rate, weight_decay=run.optimisation.decay
        )
        self.draw = torch.Generator().manual_seed(run.seed + TRAINED)
        self.measures: list[Measure] = []
        self.losses: list[float] = []
        self.done, self.seconds, self.kept = 0, 0.0, ""

    def carry_out(self, folder: Path | None, tell: Tell | None) -> Trained:
        """All steps that are left."""
        run, steps = self.run, self.run.optimisation.steps
        settings = run.described() | {"torch": torch.__version__}
        part = math.ceil(steps / PARTS)
        found = None if folder is None else read(folder, settings)
        if found is not None:
            self.go_back_to(found)
            self.kept = kept(self.done, folder)
        began, sums = time.perf_counter(), 0.0
        while self.done < steps:
            loss = self.step()
            self.done, sums = self.done + 1, sums + loss
            if tell is not None:
                tell(self.done, loss)
            last = self.done == steps
            if last or (run.every and self.done % run.every == 0):
                self.measures += self.judged()
            if last or self.done % part == 0:
                self.losses.append(sums / (self.done - part * len(self.losses)))
                self.seconds, began, sums = self.seconds + time.perf_counter() - began, time.perf_counter(), 0.0
                if folder is not None:
                    write(folder, Checkpoint(self.done, settings, self.tensors(last), self.notes()))
                    self.kept = kept(self.done, folder)
        return Trained(self.model, tuple(self.measures), tuple(self.losses), self.seconds)

    def step(self) -> float:
        """One update; gives the loss before it.

        Raises:
            Diverged: the loss or a gradient is no number; the weights are as they were.
        """
        run, model = self.run, self.model
        batch, random = run.task.batch(self.draw, run.optimisation.batch), torch.get_rng_state()
        model.train()
        loss = model.loss(batch)
        whole = loss + auxiliary_loss(model)
        self.optimiser.zero_grad()
        whole.backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if not (whole.isfinite() and norm.isfinite()):
            raise self.diverged(batch, random, whole)
        nn.utils.clip_grads_with_norm_(model.parameters(), run.optimisation.clip, norm)
        for group in self.optimiser.param_groups:
            group["lr"] = rate(run.optimisation, self.done)
        self.optimiser.step()
        return loss.item()

    @torch.no_grad()
    def judged(self) -> list[Measure]:
        """What the task measures, on sequences that training does not see; nothing of the run moves by it."""
        run = self.run
        self.model.eval()
        draw = torch.Generator().manual_seed(run.seed + JUDGED)
        with torch.random.fork_rng(devices=[]):
            found = run.task.judge(self.model, draw, run.judged)
        return [Measure(m.name, m.value, m.at, self.done) for m in found]

    # ---------------------------------------------------------------- checkpoints

    def tensors(self, last: bool) -> dict[str, Tensor]:
        """What a checkpoint keeps; of a run that has ended the model alone."""
        found = tensors(self.model, self.optimiser, self.draw)
        return {name: t for name, t in found.items() if not last or name.startswith("model.")}

    def notes(self) -> dict[str, Any]:
        return {"measures": [asdict(m) for m in self.measures], "losses": self.losses, "seconds": self.seconds}

    def go_back_to(self, found: Checkpoint) -> None:
        """Stands where a checkpoint stood."""
        restore(found.tensors, self.model, self.optimiser, self.draw)
        self.done = found.step
        self.measures = [Measure(**m) for m in found.notes["measures"]]
        self.losses, self.seconds = list(found.notes["losses"]), found.notes["seconds"]

    # ---------------------------------------------------------------- trouble

    def diverged(self, batch: Batch, random: Tensor, loss: Tensor) -> Diverged:
        """The error, with where it was seen first."""
        run = self.run
        what = "the gradient is no number" if loss.isfinite() else f"the loss is {loss.item()}"
        where = self.first_wrong(batch, random)
        kept = self.kept or "no checkpoint had been kept"
        return Diverged(
            f"{run.mixer} (width {run.size.width}, seed {run.seed}) stopped at step {self.done + 1}: {what}, first in "
            f"{where}; {kept}. A lower learning rate than {run.optimisation.rate} may help"
        )

    def first_wrong(self, batch: Batch, random: Tensor) -> str:
        """The first part of the model whose output is no number, or else whose gradient is none."""
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            # what a rule draws is drawn again
            torch.set_rng_state(random)
            for part, x in self.model.stages(batch.inputs):
                if not x.isfinite().all():
                    return part
            if not self.model.logits(x).isfinite().all():
                return "the logits"
        # it runs from the output back to the embedding, which has part in both ends
        for name, p in reversed(list(self.model.named_parameters())):
            if p.grad is not None and not p.grad.isfinite().all():
                layer, _, rest = name.removeprefix("blocks.").partition(".")
                return f"layer {layer}, gradient of {rest}" if rest.count(".") else f"the gradient of {name}"
        return "what the rule adds to the loss"


def kept(step: int, folder: Path | None) -> str:
    return f"the last good checkpoint, of step {step}, is in {folder}"


def rate(o: Optimisation, step: int) -> float:
    """The learning rate of one step."""
    rising = o.warmup * o.steps
    if step < rising:
        return o.rate * (step + 1) / (rising + 1)
    return o.rate * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1.0, o.steps - rising)))


def cost(run: Run) -> float:
    """Seconds that a run will take, from a few of its steps and a small part of a measurement."""
    with settled(run):
        training = Training(run)
        training.step()
        began = time.perf_counter()
        for _ in range(TIMED):
            training.step()
        step = (time.perf_counter() - began) / TIMED
        few = max(1, run.judged // 4)
        began = time.perf_counter()
        with torch.no_grad():
            run.task.judge(training.model.eval(), torch.Generator(), few)
        judging = (time.perf_counter() - began) * run.judged / few
    steps = run.optimisation.steps
    return steps * step + judging * (1 + (steps // run.every if run.every else 0))
