"""A folder, a GGUF file, the hub: three ways to one call of transformers."""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download

from foveate.core.converting import KEY, register, restore
from foveate.core.errors import FoveateError, LoadError
from foveate.models import checks

__all__ = ["Options", "open_folder", "open_gguf", "open_hub", "quiet"]

HUB_SECONDS = 10


@dataclass(frozen=True)
class Options:
    """What the caller of `load` asked for.

    Args:
        name: What was asked for, as it was written.
        dtype: Of the weights.
        trust_remote_code: Whether code that comes with a model may run.
        tokenizer: Whether a tokenizer is wanted too.
    """

    name: str
    dtype: torch.dtype
    trust_remote_code: bool = False
    tokenizer: bool = True


def open_folder(folder: Path, options: Options) -> tuple[Any, Any]:
    """Opens a folder as `save_pretrained` writes it."""
    checks.check_folder(folder, options.name)
    model, tokenizer = open_pretrained(options, folder, local_files_only=True)
    if tokenizer is not None:
        checks.check_vocabulary(tokenizer, folder, options.name)
    return model, tokenizer


def open_gguf(file: Path, options: Options) -> tuple[Any, Any]:
    """Opens a GGUF file; its weights become plain floats."""
    checks.check_gguf(file, options.name)
    # The reader draws a bar that no setting of transformers turns off.
    with contextlib.redirect_stderr(io.StringIO()), read_once():
        return open_pretrained(options, file.parent, gguf_file=file.name, local_files_only=True)


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """A GGUF file is parsed once in here, where transformers does it for configuration, weights and tokenizer each.

    It takes most of the time of opening one; the map of names, which transformers makes for every module, the rest.
    """
    import gguf

    own = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, made in own.items():
            setattr(gguf, name, functools.cache(made))
        yield
    finally:
        for name, made in own.items():
            setattr(gguf, name, made)


def open_hub(name: str, revision: str | None, options: Options) -> tuple[Any, Any]:
    """Opens a model from the hub, or from the hub's cache on this machine when there is no network."""
    reached = checks.check_hub(name, revision, seconds=HUB_SECONDS)
    return open_pretrained(options, name, revision=revision or "main", local_files_only=not reached)


def open_pretrained(options: Options, source: str | Path, **where: Any) -> tuple[Any, Any]:
    """Configuration, model and tokenizer from wherever `source` is.

    Raises:
        LoadError: transformers could not open one of them; its own error is the cause.
    """
    from transformers import AutoConfig, AutoTokenizer

    where |= {"trust_remote_code": options.trust_remote_code}
    with quiet():
        with told_in_one_line(f"cannot open {options.name!r}"):
            config = AutoConfig.from_pretrained(source, **where)
            weights = {} if "gguf_file" in where else {"use_safetensors": True}
            if said := getattr(config, KEY, None):
                register()
            model, info = auto_class(config).from_pretrained(
                source, config=config, dtype=options.dtype, output_loading_info=True, **weights, **where
            )
            if said:
                gone = restore(model, weight_files(source, where))
                info["missing_keys"] = set(info["missing_keys"]) - set(gone)
        checks.check_weights(model, info, options.name)
        tokenizer = None
        if options.tokenizer:
            hint = (
                "; add the tokenizer's files (tokenizer.json and tokenizer_config.json), or load with tokenizer=False."
            )
            with told_in_one_line(f"{options.name!r} has no tokenizer that can be opened", hint):
                tokenizer = AutoTokenizer.from_pretrained(source, **where)
    return model.eval(), tokenizer


def weight_files(source: str | Path, where: dict[str, Any]) -> list[Path]:
    """The safetensors files that a model was opened from: those of its folder, or of its snapshot of the hub."""
    folder = Path(source)
    if not folder.is_dir():
        options = {k: where[k] for k in ("revision", "local_files_only") if k in where}
        folder = Path(hf_hub_download(str(source), "config.json", **options)).parent
    return sorted(folder.glob("*.safetensors"))


def auto_class(config: Any) -> Any:
    """The auto class for a configuration: the one whose head the saved architecture has, else the bare model."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    heads = {
        "AutoModelForCausalLM": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForSeq2SeqLM": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForSpeechSeq2Seq": auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        "AutoModelForImageTextToText": auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        "AutoModelForTextEncoding": auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
    }
    saved = set(getattr(config, "architectures", None) or ())
    own_code = getattr(config, "auto_map", None) or {}
    for name, models in heads.items():
        classes = models.get(config.model_type, ())
        if name in own_code or saved & {*([classes] if isinstance(classes, str) else classes)}:
            return getattr(transformers, name)
    # A GGUF file names no architecture. Masked language models have a causal class, too, so they are left out.
    if not saved and config.is_encoder_decoder:
        return transformers.AutoModelForSeq2SeqLM
    causal = config.model_type in heads["AutoModelForCausalLM"]
    if not saved and causal and config.model_type not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModel


@contextlib.contextmanager
def told_in_one_line(what: str, hint: str = "") -> Iterator[None]:
    """Turns any failure of a reader into a `LoadError`.

    Readers raise every kind of exception on damaged files, so no narrower class will do.
    """
    try:
        yield
    except FoveateError:
        raise
    except Exception as error:
        raise LoadError(f"{what}: {checks.first_line(error)}{hint}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' bars, logs and warnings, and restores them."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    downloads = not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if downloads:
        # A download can take minutes: its bar stays.
        enable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        if not downloads:
            disable_progress_bars()
