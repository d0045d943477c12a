"""The main job: one pass of a text through a model, and for every head where it looks."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import psutil
import pyarrow
import torch
import transformers

from foveate import opened, stored
from foveate.core import registry
from foveate.core.attach import attach
from foveate.core.errors import BadInput, FoveateError, NotSupported, TooBig
from foveate.core.mechanism import Mechanism, Metric, ModelMetric
from foveate.core.reductions import KeyBins
from foveate.core.results import HEAD_COLUMNS, KEY_COLUMNS, Results
from foveate.highlights import Drawn, Source, draw, pieces_of
from foveate.opened import Map, Window
from foveate.passes import Reader, forward
from foveate.summary import summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from foveate.core.rows import View

__all__ = ["Profile", "estimate_bytes", "profile"]

FORMAT = 1
DEFAULT_TOKENS = 4096
TRIM_LAYERS = 4
# what readers of json, parquet and npz raise on files that are cut or are something else
DAMAGED = (ValueError, TypeError, KeyError, AttributeError, OSError, EOFError, zipfile.BadZipFile, zlib.error)
Progress = Callable[[str, float, float], None]


@dataclass(frozen=True, eq=False)
class Profile:
    """The measured heads of one model on one text.

    Args:
        heads: One row per layer, head and metric: value, and the 95 % interval low to high.
        keys: One row per layer, head and key, for the metrics that speak of keys.
        info: Model, tokens, versions, wall time, peak bytes, summary, metrics that were skipped and why.
        arrays: Pictures per head by label, [layers, heads, ...], for instance `attention_map`; NaN where a layer has
            none. `info["map_edges"]` and `info["position_edges"]` say where their bins begin.
        maps: Finer maps of the heads that stand out.
        windows: Single weights of some rows and keys.
        pieces: The text of each token; empty where no tokenizer was there.
        states: Folder with the queries and keys of the layers, where they were kept.
    """

    heads: pd.DataFrame
    keys: pd.DataFrame
    info: dict[str, Any]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    maps: list[Map] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    states: Path | None = None

    @property
    def summary(self) -> dict[str, Any]:
        """Sink layers, local heads, retrieval heads, and what they mean for the KV cache."""
        return self.info["summary"]

    def metric(self, name: str) -> pd.DataFrame:
        """Layers x heads of one metric's values."""
        return Results(self.heads, self.keys, {}, self.info.get("skipped", {}))[name]

    def plot(self, name: str, ax: Axes | None = None, **what: Any) -> Axes:
        """A figure with matplotlib (the extra `plot`).

        Args:
            name: A metric, as a map of layers x heads; with `by="layer"`, its distribution over the layers.
                `"attention_map"` with `layer` and `head`: where a head looks over the whole text. `"window"` with
                `index`: one of `windows`. `"entropy_by_position"`, with or without `layer`: its course over the text.
            ax: Where to draw; default: a new figure.
            what: What the figure is of, as above.

        Raises:
            BadInput: the profile has no such head or window.
            UnknownName: it has no such metric.
            NotSupported: matplotlib is not installed.
        """
        try:
            from foveate import figures
        except ImportError:
            raise NotSupported("plots need matplotlib: pip install 'foveate[plot]'") from None
        return figures.draw(self, name, ax, **what)

    def save(self, folder: str | os.PathLike[str], report: str | None = None) -> Path:
        """Writes heads.parquet, keys.parquet, profile.json and the pictures; all of them or nothing.

        Args:
            folder: Where to; a profile that is there is replaced.
            report: What `foveate.report.report` made of this profile, to be written as report.html beside the others.

        Raises:
            BadInput: the folder holds something that is no profile, or cannot be written.
        """
        target = Path(folder)
        check_target(target)
        temporary = None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
            self.heads.to_parquet(temporary / "heads.parquet", index=False)
            self.keys.to_parquet(temporary / "keys.parquet", index=False, compression="zstd")
            pictures = self.write_pictures(temporary)
            about = self.info | {"files": pictures} if pictures else self.info
            (temporary / "profile.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            if report is not None:
                (temporary / "report.html").write_text(report, encoding="utf-8")
            temporary.chmod(0o755)
            if target.exists():
                old = target.with_name(f".{target.name}-{os.getpid()}-old")
                target.rename(old)
                temporary.rename(target)
                shutil.rmtree(old)
            else:
                temporary.rename(target)
        except OSError as e:
            raise BadInput(
                f"cannot write {target}: {e.strerror or e}; nothing was written. Choose another folder with --out"
            ) from e
        finally:
            if temporary is not None and temporary.exists():
                shutil.rmtree(temporary, ignore_errors=True)
        return target

    def write_pictures(self, folder: Path) -> list[str]:
        """Arrays, maps, windows and pieces, where there are any; gives the names of the files."""
        files = []
        if self.arrays:
            opened.write_arrays(folder / "arrays.npz", self.arrays)
            files.append("arrays.npz")
        if self.maps or self.windows or self.pieces:
            opened.write(folder, self.maps, self.windows, self.pieces)
            files += opened.FILES
        if self.states is not None and self.states.is_dir():
            shutil.copytree(self.states, folder / "states", copy_function=link_or_copy)
        return files

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Profile:
        """Reads what `save` wrote.

        Raises:
            BadInput: a file is missing or damaged, or another version of foveate wrote it.
        """
        folder = Path(folder)
        missing = [n for n in ("profile.json", "heads.parquet", "keys.parquet") if not (folder / n).is_file()]
        if missing:
            raise BadInput(
                f"{folder} is no saved profile: {', '.join(missing)} is missing; make one with `foveate profile`"
            )
        try:
            info = json.loads((folder / "profile.json").read_text(encoding="utf-8"))
            if info.get("format") != FORMAT:
                raise BadInput(
                    f"{folder} has profile format {info.get('format')}, not {FORMAT}; profile the text again"
                )
            # a profile without pictures, of an earlier version or of few metrics, names no such files
            missing = [n for n in info.pop("files", []) if not (folder / n).is_file()]
            if missing:
                raise BadInput(f"{folder} is incomplete: {', '.join(missing)} is missing; profile the text again")
            heads = pd.read_parquet(folder / "heads.parquet")
            keys = pd.read_parquet(folder / "keys.parquet")
            arrays: dict[str, np.ndarray] = {}
            if (folder / "arrays.npz").is_file():
                with np.load(folder / "arrays.npz", allow_pickle=False) as found:
                    arrays = dict(found)
            maps, windows, pieces = opened.read(folder)
        except (*DAMAGED, pyarrow.ArrowException) as e:
            if isinstance(e, FoveateError):
                raise
            reason = (str(e) or type(e).__name__).splitlines()[0]
            raise BadInput(f"{folder} holds a damaged profile ({reason}); profile the text again") from e
        for table, columns, name in ((heads, HEAD_COLUMNS, "heads"), (keys, KEY_COLUMNS, "keys")):
            if not set(columns) <= set(table.columns):
                raise BadInput(f"{folder}/{name}.parquet has columns {list(table.columns)}, not {columns}")
        states = folder / "states"
        return cls(heads, keys, info, arrays, maps, windows, pieces, states if states.is_dir() else None)


def link_or_copy(source: str, target: str) -> None:
    """A second name for the same bytes where the file system can, they are large; else a copy."""
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)


def check_target(folder: Path) -> None:
    """Raises `BadInput` unless a profile may be written to this folder."""
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file; choose another folder with --out")
    if folder.exists() and any(folder.iterdir()) and not (folder / "profile.json").is_file():
        raise BadInput(
            f"{folder} holds files that are no profile, and stays as it is; choose another folder with --out"
        )
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK):
        raise BadInput(f"no permission to write in {parent}; choose another folder with --out")


def profile(
    model: transformers.PreTrainedModel,
    tokenizer: Any,
    text: str | Sequence[int],
    *,
    tokens: int | None = None,
    metrics: Sequence[str | Mechanism] | None = None,
    max_memory: int | None = None,
    progress: Progress | None = None,
    name: str | None = None,
    source: str | None = None,
    states: str | os.PathLike[str] | None = None,
    maps: bool = True,
) -> Profile:
    """Runs a text through a model once and measures every attention head.

    Args:
        model: A transformers model on the attention interface, as `foveate.load` gives it.
        tokenizer: Its tokenizer; may be None when `text` is token ids and no metric makes texts of its own.
        text: The text, or its token ids.
        tokens: How many tokens of the text to use; default 4,096 or what the model has positions for.
        metrics: Names (`"entropy"`, `"local_mass:widths=1+16"`) or instances; default: all.
        max_memory: Bytes that the process may hold; default 90 % of what is free.
        progress: Called with (what is running, done, total).
        name: What to call the model; default: as it was loaded.
        source: What `foveate.load` is to be given to open the model again, for a later `foveate.zoom`.
        states: A folder to keep the queries and keys of all layers in, in the model's dtype.
        maps: Whether to draw fine maps and windows of the heads that stand out. Without `states` the text runs a second
            time for them, with nothing observed, as far as the last of their layers.

    Returns:
        The measured heads.

    Raises:
        BadInput: an empty text, or more tokens than the model has positions.
        TooBig: the run would not fit; nothing was started.
        UnknownName: no metric of this name.
    """
    chosen = choose_metrics(metrics)
    ids, total = encode(model, tokenizer, text, tokens)
    needed = estimate_bytes(model, ids.shape[1], chosen)
    check_memory(needed, max_memory, ids.shape[1])

    report = progress or (lambda *_: None)
    config = model.config.get_text_config()
    info: dict[str, Any] = {
        "format": FORMAT,
        "model": name or Path(model.config._name_or_path).name or type(model).__name__,
        "architecture": type(model).__name__,
        "source": source or model.config._name_or_path or None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "ids": ids[0].tolist(),
    }
    kept = None if states is None else Path(states)
    clock = time.perf_counter()
    with watched() as peak:
        keep = None if kept is None else partial(stored.write, folder=kept, text="profile", mark=stored.mark_of(info))
        results = stream(model, ids, [m for m in chosen if isinstance(m, Metric)], report, keep)
        pass_seconds = time.perf_counter() - clock
        tables, skipped = [results.heads], dict(results.skipped)
        notes: dict[str, Any] = {}
        seconds = {"pass": round(pass_seconds, 3)}
        for m in (m for m in chosen if isinstance(m, ModelMetric)):
            report(m.name, 0, 1)
            begun = time.perf_counter()
            try:
                table = m.measure(model, tokenizer)
            except FoveateError as e:
                skipped[m.name] = str(e)
            else:
                tables.append(table[HEAD_COLUMNS])
                notes |= {m.name: dict(table.attrs)} if table.attrs else {}
            seconds[m.name] = round(time.perf_counter() - begun, 3)
            report(m.name, 1, 1)
        heads = pd.concat([t for t in tables if len(t)], ignore_index=True)
        pieces = pieces_of(tokenizer, info["ids"])
        drawn = Drawn()
        if maps:
            report("maps", 0, 1)
            begun = time.perf_counter()
            try:
                drawn = draw(Source(model, info, kept), tokenizer, chosen, heads, results.keys, pieces)
            except FoveateError as e:
                skipped["maps"] = str(e)
            seconds["maps"] = round(time.perf_counter() - begun, 3)
            report("maps", 1, 1)
    info |= {
        "tokens": ids.shape[1],
        "text_tokens": total,
        "layers": {str(n): name for n, name in results.layers.items()},
        "query_heads": config.num_attention_heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "metrics": [repr(m) for m in chosen],
        "skipped": skipped,
        "notes": notes,
        "seconds": seconds,
        "wall_time": round(time.perf_counter() - clock, 3),
        "tokens_per_second": round(ids.numel() / pass_seconds, 1),
        "estimated_bytes": needed,
        "peak_bytes": peak["rss"],
        "versions": versions(),
    }
    info |= edges(chosen, ids.shape[1]) | ({"needle": drawn.needle} if drawn.needle else {})
    info["summary"] = summarise(heads, info)
    return Profile(heads, results.keys, info, results.arrays, drawn.maps, drawn.windows, pieces, kept)


def edges(metrics: Sequence[Mechanism], tokens: int) -> dict[str, list[int]]:
    """Where the bins of the maps and of the courses over the text begin, for the metrics that have them."""
    from foveate.measure.attention_map import AttentionMap
    from foveate.measure.entropy import Entropy

    found = {}
    for m in metrics:
        if isinstance(m, AttentionMap | Entropy):
            name = "map_edges" if isinstance(m, AttentionMap) else "position_edges"
            found[name] = KeyBins(m.bins).edges(tokens)
    return found


def choose_metrics(metrics: Sequence[str | Mechanism] | None) -> list[Mechanism]:
    """Instances of the named metrics; all that the registry has when none is named."""
    if metrics is None:
        metrics = registry.names("measure")
    chosen = [registry.make(m, "measure") if isinstance(m, str) else m for m in metrics]
    for m in chosen:
        if not isinstance(m, Metric | ModelMetric):
            raise BadInput(f"{m!r} is no metric; `foveate list --verb measure` names them")
    if not chosen:
        raise BadInput("no metric was named; leave `metrics` out for all of them")
    return chosen


def positions(model: transformers.PreTrainedModel) -> int | None:
    """How many tokens the model has positions for; None where there is no limit."""
    config = model.config.get_text_config()
    return next((n for key in ("max_position_embeddings", "n_positions") if (n := getattr(config, key, None))), None)


def encode(
    model: transformers.PreTrainedModel, tokenizer: Any, text: str | Sequence[int], tokens: int | None
) -> tuple[torch.Tensor, int]:
    """Token ids [1, N] of the first tokens of a text, and how many tokens the whole text has."""
    if isinstance(text, str):
        if not text.strip():
            raise BadInput("the text is empty; give one with --text FILE")
        if tokenizer is None:
            raise BadInput("a text needs a tokenizer; pass token ids instead, or a model folder that has one")
        # a tokenizer warns of every text longer than the model, which is cut below
        ids = tokenizer(text, verbose=False).input_ids
    else:
        ids = [int(i) for i in text]
    limit = positions(model)
    if not ids:
        raise BadInput("the text has no tokens; give a longer one with --text FILE")
    if tokens is not None and tokens < 2:
        raise BadInput(f"--tokens {tokens}: at least 2 tokens are needed to have something to look back at")
    if tokens is not None and limit is not None and min(tokens, len(ids)) > limit:
        raise BadInput(
            f"{min(tokens, len(ids)):,} tokens are more than the model's {limit:,} positions; use --tokens {limit}"
        )
    wanted = tokens or min(DEFAULT_TOKENS, limit or DEFAULT_TOKENS)
    return torch.tensor([ids[:wanted]], device=model.device), len(ids)


def stream(
    model: Any,
    ids: torch.Tensor,
    metrics: list[Metric],
    report: Progress,
    keep: Callable[[View], object] | None = None,
) -> Results:
    """The one pass: the model's own forward with the metrics attached, without the language-model head."""
    layers = [0]

    def look(view: View) -> None:
        if keep is not None:
            keep(view)
        report("pass", (view.layer.index + 1) / max(layers[0], 1) * ids.numel(), ids.numel())
        if view.layer.index % TRIM_LAYERS == 0:
            trim()

    with attach(model.base_model, *metrics, Reader(look)) as attached, torch.inference_mode():
        layers[0] = len(attached.layers)
        report("pass", 0, ids.numel())
        last = forward(model, ids)
    if not bool(torch.isfinite(last).all()):
        raise BadInput(
            "the model's output has NaN or infinite numbers on this text; its weights or its dtype are not sound"
        )
    return attached.results


# ---------------------------------------------------------------- memory


def trim() -> None:
    """Hands freed memory back to the system, where the C library can.

    What a metric keeps of a layer lies between the layer's large temporaries, so the heap would only ever grow.
    """
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if give_back is not None:
        give_back(0)


def estimate_bytes(model: torch.nn.Module, tokens: int, metrics: Sequence[Mechanism] = ()) -> int:
    """Peak bytes of the process while profiling: what it holds now and what the pass adds.

    The pass holds, per token: the residual stream and its norms, the widest hidden layer of the feed-forward block
    three times over, queries, keys and values with their rotated copies, and per head and key the column sums.
    """
    config = model.config.get_text_config()
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * width
    heads = config.num_attention_heads
    layers = config.num_hidden_layers
    streamed = [m for m in metrics if isinstance(m, Metric)]
    bins = sum(r.count for m in streamed for r in m.needs() if isinstance(r, KeyBins))
    per_token = ESTIMATE["stream"] * width + ESTIMATE["inner"] * inner
    per_key = ESTIMATE["keys"] * layers * heads * sum(type(m).per_key is not Metric.per_key for m in streamed)
    sampled = any(m.card.sampled for m in streamed)
    rows = ESTIMATE["rows"] * heads * (1 + 64 * sampled) + ESTIMATE["bins"] * heads * bins
    element = torch.finfo(getattr(model, "dtype", torch.float32)).bits // 8
    now = psutil.Process().memory_info().rss
    return int(now + tokens * (element * per_token + per_key + 4 * rows) + ESTIMATE["fixed"])


ESTIMATE = {"stream": 8, "inner": 3, "keys": 40, "rows": 4, "bins": 1, "fixed": 64 << 20}


def check_memory(needed: int, allowed: int | None, tokens: int) -> None:
    """Raises `TooBig` before anything runs."""
    limit = (
        allowed
        if allowed is not None
        else int(0.9 * psutil.virtual_memory().available) + psutil.Process().memory_info().rss
    )
    if needed > limit:
        raise TooBig(
            f"{tokens:,} tokens would need about {needed / 1e9:.1f} GB, and {limit / 1e9:.1f} GB are allowed; "
            "use fewer --tokens, fewer --metrics or a larger --max-memory"
        )


@contextmanager
def watched() -> Iterator[dict[str, int]]:
    """The largest resident memory of this process inside the block, looked at every 10 ms."""
    process, done = psutil.Process(), threading.Event()
    peak = {"rss": process.memory_info().rss}

    def look() -> None:
        while not done.wait(0.01):
            peak["rss"] = max(peak["rss"], process.memory_info().rss)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        peak["rss"] = max(peak["rss"], process.memory_info().rss)


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    from foveate import __version__
    from foveate.core import native

    return {
        "foveate": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "kernel": "native" if native.available() else "pytorch",
    }
