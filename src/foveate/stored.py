"""Queries and keys of single layers, kept beside a profile: whole rows can then be had without the model.

One safetensors file per text and layer in the folder `states`. They keep the model's own dtype: in float16 a score of
several hundred would be off by tenths, and a weight by as many tens of per cent.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from foveate.core.errors import BadInput
from foveate.core.mask import Mask
from foveate.core.rows import Layer, View

__all__ = ["file_of", "layer_bytes", "mark_of", "read", "write"]

FORMAT = "1"


def mark_of(info: dict[str, Any], ids: Sequence[int] | None = None) -> str:
    """What states must be of to belong to a profile: its model, and these token ids or those of its own text."""
    about = [info["model"], info["architecture"], list(info["ids"] if ids is None else ids)]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def file_of(folder: Path, text: str, layer: int) -> Path:
    """Where the states of one layer on one text lie."""
    return folder / f"{text}-{layer:03d}.safetensors"


def layer_bytes(model: torch.nn.Module, tokens: int) -> int:
    """Bytes of all layers' states on a text of so many tokens."""
    config: Any = model.config.get_text_config()
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    both = heads + (getattr(config, "num_key_value_heads", None) or heads)
    element = torch.finfo(getattr(model, "dtype", torch.float32)).bits // 8
    return config.num_hidden_layers * both * dim * tokens * element


def write(view: View, folder: Path, text: str, mark: str) -> bool:
    """Keeps the states of a layer, whole or not at all; False where they would grow with N x N.

    Raises:
        BadInput: the folder cannot be written.
    """
    mask = view.mask
    if view.batch != 1 or view.bias is not None or mask.dense is not None:
        return False
    tensors = {"q": view.q[0], "k": view.k[0], "low": mask.low, "high": mask.high, "position": mask.position}
    tensors |= {n: t for n, t in (("sinks", view.sinks), ("begin", mask.begin), ("valid", mask.valid)) if t is not None}
    about = {
        "scale": view.scale,
        "softcap": view.softcap,
        "causal": mask.causal,
        "key_offset": mask.key_offset,
        "name": view.layer.name,
        "cross": view.layer.cross,
    }
    file = file_of(folder, text, view.layer.index)
    temporary = file.with_name(f".{file.name}-{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # clone: inference tensors may share memory, which safetensors refuses
        whole = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
        save_file(whole, temporary, {"format": FORMAT, "mark": mark, "about": json.dumps(about)})
        temporary.replace(file)
    except (OSError, SafetensorError) as e:
        reason = getattr(e, "strerror", None) or e
        raise BadInput(f"cannot write {file}: {reason}; make room there and try again") from e
    finally:
        temporary.unlink(missing_ok=True)
    return True


def read(folder: Path, text: str, layer: int, mark: str) -> View | None:
    """The attention call of a layer as far as its weights go (its values are not kept); None where it was not kept.

    Raises:
        BadInput: the states are damaged, of another version of foveate, or of another model or text.
    """
    file = file_of(folder, text, layer)
    if not file.is_file():
        return None
    again = f"delete {file} and try again"
    try:
        with safe_open(file, framework="pt") as found:
            said = found.metadata() or {}
            if said.get("format") != FORMAT:
                raise BadInput(
                    f"{file} holds states of format {said.get('format')}, not {FORMAT}, of another version of foveate; "
                    f"{again}"
                )
            if said.get("mark") != mark:
                raise BadInput(f"{file} holds states of another model or text than the profile; {again}")
            about = json.loads(said["about"])
            tensors = {n: found.get_tensor(n) for n in found.keys()}  # noqa: SIM118 - it is no dictionary
        mask = Mask(
            tensors["low"],
            tensors["high"],
            tensors["k"].shape[1],
            about["causal"],
            tensors["position"],
            tensors.get("valid"),
            about["key_offset"],
            tensors.get("begin"),
        )
        q, k = tensors["q"][None], tensors["k"][None]
        return View(
            q,
            k,
            k[..., :1],
            mask,
            about["scale"],
            about["softcap"],
            tensors.get("sinks"),
            layer=Layer(layer, about["name"], about["cross"]),
        )
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as e:
        if isinstance(e, BadInput):
            raise
        raise BadInput(f"{file} is damaged ({str(e).splitlines()[0]}); {again}") from e
