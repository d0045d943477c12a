"""Checkpoints: tensors in safetensors, everything else in JSON, nothing that runs code when it is read.

The tensors are written first, under a name with their step; the JSON that names them takes the place of the one before
in one move. Whenever a run is interrupted, what the JSON says is there and whole.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from foveate.core.errors import BadInput
from foveate.training.run import differences

__all__ = ["Checkpoint", "clear", "read", "restore", "tensors", "write"]

INDEX = "checkpoint.json"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Where a run stands.

    Args:
        step: Updates that are done.
        settings: The settings of the run, and the version of torch.
        tensors: Weights, buffers, moments of the optimiser, states of the generators.
        notes: What has been measured so far.
    """

    step: int
    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    notes: dict[str, Any]


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Puts a checkpoint in the place of the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step-{checkpoint.step}.safetensors"
    save_file({n: t.contiguous() for n, t in checkpoint.tensors.items()}, folder / name)
    index = {"step": checkpoint.step, "tensors": name, "settings": checkpoint.settings, "notes": checkpoint.notes}
    fresh = folder / f"{INDEX}.part"
    fresh.write_text(json.dumps(index, indent=1), encoding="utf-8")
    fresh.replace(folder / INDEX)
    for old in folder.glob("step-*.safetensors"):
        if old.name != name:
            old.unlink()


def read(folder: Path, settings: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint of a folder; None where there is none.

    Raises:
        BadInput: it belongs to a run with other settings, or is damaged.
    """
    file = folder / INDEX
    if not file.exists():
        return None
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        step, name, before, notes = (index[key] for key in ("step", "tensors", "settings", "notes"))
        found = load_file(folder / name)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as e:
        raise BadInput(f"{file} is no whole checkpoint ({e}); delete {folder} to start that run again") from None
    wrong = differences(before, settings)
    if wrong:
        raise BadInput(
            f"{folder} holds a run with other settings: {'; '.join(wrong)}. Give the same settings, or another folder"
        )
    return Checkpoint(step, before, found, notes)


def clear(folder: Path) -> None:
    """Takes a checkpoint away."""
    (folder / INDEX).unlink(missing_ok=True)
    for file in folder.glob("step-*.safetensors"):
        file.unlink()


def tensors(model: nn.Module, optimiser: torch.optim.Optimizer, draw: torch.Generator) -> dict[str, Tensor]:
    """All of a run that is a tensor, by name."""
    found = {f"model.{name}": t for name, t in model.state_dict().items()}
    for name, p in model.named_parameters():
        found |= {f"optimiser.{name}.{key}": t for key, t in optimiser.state.get(p, {}).items()}
    return found | {"generator.task": draw.get_state(), "generator.torch": torch.get_rng_state()}


def restore(
    found: dict[str, Tensor], model: nn.Module, optimiser: torch.optim.Optimizer, draw: torch.Generator
) -> None:
    """Puts a run back to where it stood; one that had ended has its model only."""
    model.load_state_dict({n.removeprefix("model."): t for n, t in found.items() if n.startswith("model.")})
    if "generator.task" not in found:
        return
    for name, p in model.named_parameters():
        own = f"optimiser.{name}."
        # copied, so that moments lie in memory as they did
        optimiser.state[p] = {n.removeprefix(own): t.clone() for n, t in found.items() if n.startswith(own)}
    draw.set_state(found["generator.task"])
    torch.set_rng_state(found["generator.torch"])
