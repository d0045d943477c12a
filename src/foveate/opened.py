"""One head opened: a fine map of it, a window of its single weights, and both on disk.

A profile's folder holds them in two files: `opened.npz` with the numbers and `opened.json` with what they are of.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foveate.core.errors import BadInput

__all__ = ["FILES", "Map", "Window", "add_window", "read", "write", "write_arrays"]

FILES = ("opened.npz", "opened.json")


@dataclass(frozen=True, eq=False)
class Map:
    """The mass that the rows of each stretch of a text give to the keys of each stretch.

    Args:
        layer: Number of the layer.
        head: Number of the head.
        edges: Where the stretches begin, and where the last one ends.
        mass: Sum of the weights, rows x keys; a row sums to the number of its tokens.
        why: What makes this head worth a look.
    """

    layer: int
    head: int
    edges: list[int]
    mass: np.ndarray
    why: str

    def __post_init__(self) -> None:
        if self.mass.shape != (len(self.edges) - 1,) * 2:
            raise BadInput(f"a map of {self.mass.shape} cells with {len(self.edges)} edges")


@dataclass(frozen=True, eq=False)
class Window:
    """The weights of some rows of one head on some keys, each of them.

    Args:
        layer: Number of the layer.
        head: Number of the head.
        text: Which text: "profile", or "needle" for the prompt of the retrieval probe.
        rows: First row and one past the last.
        keys: First key and one past the last.
        row_tokens: The text of each row's token.
        key_tokens: The text of each key's token.
        weights: Rows x keys.
        why: What there is to see.
    """

    layer: int
    head: int
    text: str
    rows: tuple[int, int]
    keys: tuple[int, int]
    row_tokens: list[str]
    key_tokens: list[str]
    weights: np.ndarray
    why: str

    def __post_init__(self) -> None:
        shape = (self.rows[1] - self.rows[0], self.keys[1] - self.keys[0])
        if not shape == self.weights.shape == (len(self.row_tokens), len(self.key_tokens)):
            raise BadInput(
                f"a window of rows {self.rows} and keys {self.keys} with {self.weights.shape} weights, "
                f"{len(self.row_tokens)} and {len(self.key_tokens)} tokens"
            )

    @property
    def name(self) -> str:
        """What tells it from other windows of the same profile."""
        return name_of(fields(self, "weights"))


def name_of(about: dict[str, Any]) -> str:
    parts = (about["text"], about["layer"], about["head"], *about["rows"], *about["keys"])
    return "_".join(map(str, ("window", *parts)))


def fields(one: Map | Window, without: str) -> dict[str, Any]:
    return {f.name: getattr(one, f.name) for f in dataclasses.fields(one) if f.name != without}


def write(folder: Path, maps: Sequence[Map], windows: Sequence[Window], pieces: Sequence[str]) -> None:
    """Writes both files, each at once, the numbers first: what the other file names is then always there."""
    numbers: dict[str, np.ndarray] = {f"map_{n}": m.mass for n, m in enumerate(maps)} | {
        w.name: w.weights for w in windows
    }
    about = {
        "maps": [fields(m, "mass") for m in maps],
        "windows": [fields(w, "weights") for w in windows],
        "pieces": list(pieces),
    }
    write_arrays(folder / "opened.npz", numbers)
    temporary = folder / ".opened.json"
    temporary.write_text(json.dumps(about) + "\n", encoding="utf-8")
    temporary.replace(folder / "opened.json")


def write_arrays(file: Path, arrays: dict[str, Any]) -> None:
    """A compressed npz file, there whole or not at all."""
    temporary = file.with_name(f".{file.name}")
    try:
        np.savez_compressed(temporary, **arrays)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def read(folder: Path) -> tuple[list[Map], list[Window], list[str]]:
    """What `write` wrote; all empty where there is nothing."""
    if not (folder / "opened.json").is_file():
        return [], [], []
    about = json.loads((folder / "opened.json").read_text(encoding="utf-8"))
    # a shape that does not fit is, in a file, damage like any other
    with told_as_damage(), np.load(folder / "opened.npz", allow_pickle=False) as numbers:
        maps = [Map(**m, mass=numbers[f"map_{n}"]) for n, m in enumerate(about["maps"])]
        windows = [
            Window(**(w | {axis: tuple(w[axis]) for axis in ("rows", "keys")}), weights=numbers[name_of(w)])
            for w in about["windows"]
        ]
    return maps, windows, about["pieces"]


@contextmanager
def told_as_damage() -> Iterator[None]:
    try:
        yield
    except BadInput as e:
        raise ValueError(str(e)) from e


def add_window(folder: Path, window: Window) -> None:
    """Puts a window into a saved profile, in the place of an earlier one of the same rows and keys."""
    maps, windows, pieces = read(folder)
    write(folder, maps, [*(w for w in windows if w.name != window.name), window], pieces)
