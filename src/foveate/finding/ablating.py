"""What single heads are worth to a task: ablation and activation patching, with other heads of the same layers beside.

All heads get an estimate from one backward pass (attribution patching: the derivative along the step from what a head
says to what it says when ablated). Those with the largest estimates are then ablated for real, one by one and together,
and so are as many random others of their layers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from foveate.core.attach import attach
from foveate.core.errors import BadInput
from foveate.core.mechanism import HeadEdit
from foveate.core.places import Head
from foveate.finding.judging import Judge
from foveate.finding.responding import responses
from foveate.steer.head_scale import HeadScale
from foveate.steer.mean_ablation import MeanAblation
from foveate.steer.resample_ablation import Donor, ResampleAblation
from foveate.tasks import Comparison, Prepared, Scores, compare, log_likelihoods, prepare, score

__all__ = ["WAYS", "Evidence", "Workbench", "ablate", "ablated_together", "heads_in"]

WAYS = {
    "resample": "what the head says in the corrupted prompt, or in another prompt of the task",
    "mean": "the head's mean output over the prompts",
    "zero": "nothing",
    "patch": "in the corrupted prompt, what the head says in the clean one",
}
DRAWS = 4


@dataclass(eq=False)
class Workbench:
    """A task's examples in batches, with what takes the place of heads ready for each.

    Args:
        judge: The model and the examples.
        to: What a head is replaced by: a key of `WAYS`.
        seed: Which other prompt an example is resampled from, where it has no corrupted one.

    Raises:
        BadInput: an unknown way, patching without corrupted prompts, or a single example.
    """

    judge: Judge
    to: str = "resample"
    seed: int = 0
    batches: list[tuple[Prepared, Callable[[tuple[Head, ...]], HeadEdit]]] = field(default_factory=list, init=False)
    examples: tuple = field(default=(), init=False)

    def __post_init__(self) -> None:
        given, j = self.judge.examples, self.judge
        if self.to not in WAYS:
            raise BadInput(f"to={self.to!r}: a head can be replaced by {', '.join(WAYS)}")
        if self.to == "patch" and not all(e.corrupted for e in given):
            raise BadInput('activation patching needs a corrupted prompt with every example; give "corrupted": …')
        if len(given) < 2:
            raise BadInput(f"{len(given)} example: a head is ablated on at least 2")
        clean = [e.prompt for e in given]
        others = [e.corrupted for e in given]
        if self.to == "patch":
            given = tuple(replace(e, prompt=e.corrupted, corrupted=e.prompt) for e in given)
            others = clean
        elif not all(others):
            turn = random.Random(self.seed).randrange(1, len(given))
            others = [o or clean[(n + turn) % len(clean)] for n, o in enumerate(others)]
        self.examples = given
        prepared = prepare(j.tokenizer, given, chat=j.chat)
        donors = prepare(
            j.tokenizer, [replace(e, prompt=o, corrupted="") for e, o in zip(given, others, strict=True)], chat=j.chat
        )
        mean = self.means(prepared) if self.to == "mean" else None
        for start in range(0, len(prepared), j.batch):
            part, others_part = (p[start : start + j.batch] for p in (prepared, donors))
            self.batches.append((part, self.maker(part, others_part, mean)))

    def means(self, prepared: Prepared) -> MeanAblation:
        """Mean outputs of all heads over the prompts."""
        inputs = [{"input_ids": torch.tensor([ids], device=self.judge.model.device)} for ids in prepared.prompts]
        return MeanAblation.fit(self.judge.model, inputs)

    def maker(
        self, part: Prepared, others: Prepared, mean: MeanAblation | None
    ) -> Callable[[tuple[Head, ...]], HeadEdit]:
        """What makes the ablation of some heads for one batch."""
        if self.to == "zero":
            return lambda heads: HeadScale(1.0, heads=tuple((*h, 0.0) for h in heads))
        if mean is not None:
            return lambda heads: MeanAblation(tuple(v for v in mean.means if (v[0], v[1]) in heads))
        donor = Donor.of(self.judge.model, padded(donor_sequences(part, others), self.judge.model.device))
        return lambda heads: ResampleAblation(donor, heads=heads, align="end")

    def scores(self, heads: tuple[Head, ...] = ()) -> Scores:
        """Scores of all examples with these heads ablated."""
        parts = []
        for part, make in self.batches:
            options: dict[str, Any] = {"normalise": self.judge.normalise, "batch": len(part.layout.sequences)}
            if not heads:
                parts.append(score(self.judge.model, self.judge.tokenizer, part, **options))
                continue
            with attach(self.judge.model, make(heads), trial=False):
                parts.append(score(self.judge.model, self.judge.tokenizer, part, **options))
        arrays: dict[str, Any] = {
            name: np.concatenate([getattr(p, name) for p in parts])
            for name in ("predicted", "right", "margin", "log_likelihood", "probability", "entropy")
        }
        choices = tuple(c for p in parts for c in p.by_choice)
        return replace(parts[0], examples=self.examples, by_choice=choices, **arrays)

    def estimates(self) -> Tensor:
        """The change of the mean margin when a head is ablated, to first order, [layers, heads]."""
        everyone = self.all_heads()
        groups: list[tuple[Any, Prepared]] = [(make(everyone), part) for part, make in self.batches]
        width = max(len(part) for part, _ in self.batches)
        return responses(self.judge.model, groups, self.less_margin, batch=width)

    def less_margin(self, model: Any, part: Prepared) -> Tensor:
        """Minus the mean margin of the right answer, with a graph."""
        found = []
        options = log_likelihoods(model, part, normalise=self.judge.normalise, batch=len(part.layout.sequences))
        for example, by in zip(part.examples, options, strict=True):
            right = by[example.right]
            if example.choices:
                right = right - torch.cat([by[: example.right], by[example.right + 1 :]]).max()
            found.append(right)
        return -torch.stack(found).mean()

    def all_heads(self) -> tuple[Head, ...]:
        """Every head of the model."""
        part, _ = self.batches[0]
        ids = torch.tensor([part.prompts[0]], device=self.judge.model.device)
        donor = Donor.of(self.judge.model, {"input_ids": ids})
        return tuple(donor.outputs)


def donor_sequences(part: Prepared, others: Prepared) -> list[tuple[int, ...]]:
    """For each sequence of a batch the same one with another prompt in front, in the same order."""
    found = []
    for sequence in part.layout.sequences:
        n = next(n for n, prompt in enumerate(part.prompts) if sequence[: len(prompt)] == prompt)
        found.append((*others.prompts[n], *sequence[len(part.prompts[n]) :]))
    return found


def padded(sequences: Sequence[tuple[int, ...]], device: Any) -> dict[str, Tensor]:
    """Sequences as one batch, padded behind."""
    rows = [torch.tensor(s) for s in sequences]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


@dataclass(frozen=True, eq=False)
class Evidence:
    """What was found about the heads of a model on a task.

    Args:
        table: One row per head that was ablated: layer, head, role ("found" or "control"), estimate, effect on the
            margin of the right answer in nats with its 95 % interval (low, high) and p.
        estimates: The first-order estimate of every head, [layers, heads].
        heads: The heads that matter: those that were given, or those found whose interval does not hold 0.
        together: Those heads ablated together, and as many random others of the same layers, on one task or more.
        to: What they were replaced by.
    """

    table: pd.DataFrame
    estimates: Tensor
    heads: tuple[Head, ...]
    together: dict[str, dict[str, Any]]
    to: str

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {
            "to": self.to,
            "heads": [list(h) for h in self.heads],
            "table": json.loads(self.table.to_json(orient="records")),
            "together": self.together,
            "estimates": [[None if x != x else round(x, 6) for x in row] for row in self.estimates.tolist()],
        }

    def save(self, path: str | Path) -> Path:
        """Writes it as JSON, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.unfinished")
        unfinished.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)
        return path


def heads_in(path: str | Path) -> tuple[Head, ...]:
    """The heads that a file of `Evidence.save` names, or a list of [layer, head] pairs.

    Raises:
        BadInput: there is no such file, or nothing of the kind in it.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        pairs = found["heads"] if isinstance(found, dict) else found
        heads = tuple((int(at), int(h)) for at, h in pairs)
    except OSError as e:
        raise BadInput(f"cannot read {path}: {e.strerror or e}") from None
    except (ValueError, TypeError, KeyError):
        raise BadInput(
            f'{path} names no heads; it must hold "heads": [[layer, head], …], as `foveate ablate` writes'
        ) from None
    if not heads:
        raise BadInput(f"{path} names no head at all; ablate with a larger --top, or on more examples")
    return heads


def ablate(
    bench: Workbench,
    top: int = 10,
    candidates: Sequence[Head] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Evidence:
    """Which heads matter to a task.

    Args:
        bench: The examples, ready for ablation.
        top: How many heads to ablate for real: those with the largest estimates.
        candidates: Ablate these, instead of those with the largest estimates.
        seed: Which other heads of the same layers are the controls; of intervals and p-values.
        progress: Called with how many heads are done and how many there are.
    """
    estimates = bench.estimates()
    everyone = [h for h in bench.all_heads() if not estimates[h].isnan()]
    ranked = sorted(everyone, key=lambda h: -abs(float(estimates[h])))
    chosen = list(candidates) if candidates is not None else ranked[:top]
    controls = list(others_of_layers(chosen, everyone, random.Random(seed)))
    before = bench.scores()
    rows, total = [], len(chosen) + len(controls)
    for n, (head, role) in enumerate([*((h, "found") for h in chosen), *((h, "control") for h in controls)]):
        c = compare(before, bench.scores((head,)), seed, "margin")
        rows.append((*head, role, float(estimates[head]), c.difference, c.low, c.high, c.p))
        if progress is not None:
            progress(n + 1, total)
    table = pd.DataFrame(rows, columns=["layer", "head", "role", "estimate", "effect", "low", "high", "p"])
    sure = table[(table.role == "found") & ((table.high < 0) | (table.low > 0))]
    # a head whose ablation lowers the margin is one that the task stands on; patched in, it raises it
    needed = sure[sure.effect > 0] if bench.to == "patch" else sure[sure.effect < 0]
    heads = tuple((int(a), int(h)) for a, h in zip(needed.layer, needed["head"], strict=True))
    heads = heads if candidates is None else tuple(candidates)
    together = {"this task": ablated_together(bench, heads, seed)} if heads else {}
    return Evidence(table, estimates, heads, together, bench.to)


def others_of_layers(chosen: Sequence[Head], everyone: Sequence[Head], rng: random.Random) -> Iterator[Head]:
    """As many other heads, drawn from the same layers; from any layer where one has none left."""
    left = [h for h in everyone if h not in chosen]
    for layer, _ in chosen:
        here = [h for h in left if h[0] == layer] or left
        if here:
            drawn = rng.choice(here)
            left.remove(drawn)
            yield drawn


def ablated_together(bench: Workbench, heads: tuple[Head, ...], seed: int = 0, draws: int = DRAWS) -> dict[str, Any]:
    """Some heads ablated together on a task, and as many random others of the same layers, several times.

    Args:
        bench: The examples; they need not be those that the heads were found on.
        heads: The heads.
        seed: Of the draws, intervals and p-values.
        draws: How many control sets.
    """
    everyone, before = bench.all_heads(), bench.scores()
    rng = random.Random(seed)
    found: dict[str, Any] = {"heads": len(heads), "found": told(before, bench.scores(heads), seed), "controls": []}
    for _ in range(draws):
        other = tuple(others_of_layers(heads, everyone, rng))
        found["controls"].append(told(before, bench.scores(other), seed))
    return found


def told(before: Scores, after: Scores, seed: int) -> dict[str, dict[str, float]]:
    """Right answers and margins before and after, as JSON."""

    def plain(c: Comparison) -> dict[str, float]:
        return {k: getattr(c, k) for k in ("before", "after", "difference", "low", "high", "p", "n")}

    return {"right": plain(compare(before, after, seed)), "margin": plain(compare(before, after, seed, "margin"))}
