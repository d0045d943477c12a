"""`foveate cost`: what attention moves between a slow memory and a fast one, order by order, without running it."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveate.core import traffic
from foveate.core.errors import BadInput, unknown

if TYPE_CHECKING:
    from rich.table import Table

# powers of 1,024, as caches are counted
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
ITEMSIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}
MEMORIES = ("32KB", "1MB", "32MB")
# memories side by side in a table of 80 columns
SIDE_BY_SIDE = 3
# whole and exact: the others change what is computed, or for whom
PLAIN = ("naive", "tiled", "small_memory", "split")


def command(
    n: Annotated[int, typer.Option(help="Keys: the length of the text.")] = 8192,
    queries: Annotated[int | None, typer.Option(help="Rows; 1 is a decoded token. Default: as many as keys.")] = None,
    d: Annotated[int, typer.Option(help="Width of a head.")] = 64,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 9,
    kv_heads: Annotated[int, typer.Option(help="Key-value heads.")] = 3,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    memory: Annotated[
        list[str] | None,
        typer.Option(help="Fast memory, as 32KB or 1MB (1 KB is 1,024 bytes); may be repeated."),
    ] = None,
    density: Annotated[float, typer.Option(help="Share of the key blocks that block_sparse visits.")] = 0.1,
    prefix: Annotated[
        int | None, typer.Option(help="First keys that all sequences share, for shared_prefix. Default: a quarter.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(ITEMSIZES)}.")] = "float32",
    causal: Annotated[bool, typer.Option("--causal", help="No row sees a key behind itself.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the account as JSON, in bytes.")] = False,
) -> None:
    """Show the bytes that exact attention moves between slow and fast memory, beside the least that any order can."""
    if dtype not in ITEMSIZES:
        raise unknown("dtype", dtype, ITEMSIZES)
    positive = {"n": n, "queries": n if queries is None else queries, "d": d, "heads": heads, "batch": batch}
    for option, value in (positive | {"kv-heads": kv_heads}).items():
        if value < 1:
            raise BadInput(f"--{option} {value}: must be 1 or more")
    plain = traffic.Shape(positive["queries"], n, d, None, batch, heads, kv_heads, causal)
    shapes = dict.fromkeys(PLAIN, plain)
    shapes["block_sparse"] = dataclasses.replace(plain, density=density)
    shapes["shared_prefix"] = dataclasses.replace(plain, prefix=n // 4 if prefix is None else prefix)
    found = [account(shapes, in_bytes(text), ITEMSIZES[dtype]) for text in memory or MEMORIES]
    if as_json:
        print(json.dumps({"shape": dataclasses.asdict(plain), "dtype": dtype, "memory": found}, indent=2))
        return
    from rich.console import Console

    screen = Console(highlight=False)
    screen.print(
        f"queries {plain.queries:,}, keys {n:,}, width {d}, heads {heads}, KV heads {kv_heads}, batch {batch}, {dtype}"
        f"{', causal' if causal else ''}: bytes moved, and how many times the least that any order can move"
    )
    for first in range(0, len(found), SIDE_BY_SIDE):
        screen.print(table(found[first : first + SIDE_BY_SIDE]))
    for line in meaning(found, d * d * ITEMSIZES[dtype]):
        screen.print(line)


def account(shapes: dict[str, traffic.Shape], memory: int, itemsize: int) -> dict[str, Any]:
    """What each order moves with so many bytes of fast memory, and the bound for what it computes."""
    fast, plain = memory // itemsize, shapes[PLAIN[0]]
    if not fast:
        raise BadInput(f"--memory: {memory} bytes do not hold one number of {itemsize} bytes")
    orders: dict[str, Any] = {}
    for name, shape in shapes.items():
        try:
            moved = getattr(traffic, name)(shape, fast)
        except BadInput as why:
            orders[name] = {"why": str(why)}
            continue
        least = traffic.lower_bound(shape, fast) * itemsize
        terms = {term: count * itemsize for term, count in moved.terms.items()}
        orders[name] = {"bytes": moved.bytes(itemsize), "least": least, "terms": terms}
    least, form = traffic.lower_bound(plain, fast) * itemsize, traffic.regime(plain, fast)
    return {"bytes": memory, "numbers": fast, "least": least, "regime": form, "orders": orders}


def table(found: list[dict[str, Any]]) -> Table:
    """One row per order, one column per memory."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("order", no_wrap=True)
    for one in found:
        made.add_column(f"{size(one['bytes'])} fast", justify="right", no_wrap=True)
    for name in found[0]["orders"]:
        cells = [one["orders"][name] for one in found]
        made.add_row(name, *(moved(c) for c in cells), end_section=name == list(found[0]["orders"])[-1])
    made.add_row("least possible", *(f"{size(one['least'])}       " for one in found))
    made.add_row("which grows as", *(one["regime"] for one in found))
    return made


def moved(cell: dict[str, Any]) -> str:
    """Bytes and their ratio to the bound, or a dash."""
    if "why" in cell:
        return "–"
    ratio = cell["bytes"] / cell["least"]
    return f"{size(cell['bytes'])} {ratio:5.{1 if ratio < 99.95 else 0}f}x"


def meaning(found: list[dict[str, Any]], square: int) -> list[str]:
    """What the table says, in words, and why an order is missing."""
    best: dict[str, list[str]] = {}
    for one in found:
        there = {name: one["orders"][name]["bytes"] for name in PLAIN if "bytes" in one["orders"][name]}
        if there:
            name = min(there, key=lambda n: there[n])
            share = "" if name == "naive" else f" (1/{there['naive'] / there[name]:.3g} of naive)"
            best.setdefault(name, []).append(size(one["bytes"]) + share)
    said = "; ".join(f"{name} with {', '.join(where)}" for name, where in best.items())
    lines = [f"Of the orders that compute all scores, least is moved by {said}."] if said else []
    lines.append(
        f"The bound falls as N^2 d^2 / M where the fast memory holds d^2 numbers ({size(square)}) or more, as N^2 d / "
        "sqrt(M) where it holds fewer, and never below N d: inputs and outputs once."
    )
    missing: dict[str, list[str]] = {}
    for one in found:
        for name, cell in one["orders"].items():
            if "why" in cell and name not in missing.setdefault(cell["why"], []):
                missing[cell["why"]].append(name)
    return lines + [f"– {', '.join(orders)}: {why}" for why, orders in missing.items()]


def in_bytes(text: str) -> int:
    """`32KB` as a number of bytes.

    Raises:
        BadInput: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, flags=re.I)
    if not match or float(match[1]) == 0:
        raise BadInput(f"--memory {text}: write a size as 32KB, 1.5MB or 512B")
    return int(float(match[1]) * UNITS[match[2].upper()])


def size(count: int) -> str:
    """Bytes as a person reads them, in three figures: `1.5 MB`."""
    unit = max((u for u in UNITS if UNITS[u] <= max(count, 1)), key=lambda u: UNITS[u])
    value = count / UNITS[unit]
    return f"{value:.3g} {unit}B" if value < 999.5 else f"{value:.0f} {unit}B"
