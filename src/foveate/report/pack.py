"""Making numbers and text small and safe to stand in an HTML file."""

from __future__ import annotations

import base64
import gzip
import json
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped, UInt8

__all__ = ["ERROR", "FLOOR", "Pack", "clean", "coarsen", "grade", "quantise", "script_json", "zipped"]

# Shares of attention from FLOOR to 1 in LEVELS equal steps of the logarithm; what is below is drawn as nothing.
FLOOR, LEVELS = 1e-5, 254
ERROR = FLOOR ** (-0.5 / LEVELS) - 1
GRADES = 9

# Invisible, or able to turn the text around them: they are shown by their number. Joiners are part of emoji and words.
BIDI = {0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x061C, 0x2028, 0x2029, 0xFEFF}


def quantise(share: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Shares as 8 bits on a log scale: 0 is less than `FLOOR` (or unknown), 255 is 1.

    The relative error of the others is at most `ERROR`.
    """
    share = np.nan_to_num(np.asarray(share, np.float32))
    step = np.log(np.maximum(share, FLOOR) / FLOOR) * (LEVELS / -np.log(FLOOR))
    return np.where(share < FLOOR, 0, 1 + np.clip(np.rint(step), 0, LEVELS)).astype(np.uint8)


def grade(mass: Float[np.ndarray, "heads keys"]) -> UInt8[np.ndarray, "heads keys"]:
    """What can be seen of a mass by shading text: how often it doubles the mean of its head.

    0 is below the mean, 1 is one to two times the mean, 2 is two to four times, ..., 9 is 256 times and more.
    """
    mass = np.nan_to_num(np.asarray(mass, np.float32))
    mean = np.maximum(mass.mean(-1, keepdims=True), np.finfo(np.float32).tiny)
    return np.clip(np.floor(np.log2(np.maximum(mass / mean, 0.5))) + 1, 0, GRADES).astype(np.uint8)


def coarsen(
    mass: Float[np.ndarray, "*lead rows columns"], edges: list[int], bins: int
) -> tuple[Float[np.ndarray, "*lead new_rows new_columns"], list[int]]:
    """The same mass in at most so many bins: neighbours are added up, so none is lost."""
    factor = -(-(len(edges) - 1) // bins)
    if factor <= 1:
        return mass, edges
    first = np.arange(0, len(edges) - 1, factor)
    summed = np.add.reduceat(np.add.reduceat(mass, first, axis=-1), first, axis=-2)
    return summed, [*(edges[n] for n in first), edges[-1]]


def zipped(data: bytes | str) -> str:
    """Base64 of gzip, the same for the same data: what the page's own script unpacks."""
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogatepass")
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode("ascii")


class Pack:
    """Arrays behind one another in one buffer; the page gets where each one lies."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.size = 0

    def add(self, array: Shaped[np.ndarray, "*shape"]) -> dict[str, Any]:
        """Appends an array; returns its place, shape and type."""
        array = np.ascontiguousarray(array)
        if array.dtype not in (np.uint8, np.int32, np.float32):
            array = array.astype(np.float32 if array.dtype.kind == "f" else np.int32)
        place = {"at": self.size, "shape": list(array.shape), "type": str(array.dtype)}
        data = array.tobytes()
        # typed arrays in the browser begin at multiples of their width
        data += bytes(-len(data) % 4)
        self.parts.append(data)
        self.size += len(data)
        return place

    def zipped(self) -> str:
        return zipped(b"".join(self.parts))


def clean(text: Any) -> str:
    """Text that cannot break a page: control and direction characters become visible, halves of characters too."""
    return str(text).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").translate(VISIBLE)


def visible() -> dict[int, str]:
    """What stands for each character that does not show, by its number."""
    # the pictures of control characters stand in their order; many fonts lack that of the end of a line
    pictures = {n: chr(0x2400 + n) for n in range(0x20)} | {ord("\n"): "\u23ce", 0x7F: "\u2421"}
    return pictures | {n: f"\u2039U+{n:04X}\u203a" for n in (*range(0x80, 0xA0), *BIDI)}


VISIBLE = visible()


def script_json(data: Any) -> str:
    """JSON that may stand inside of a script element."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
