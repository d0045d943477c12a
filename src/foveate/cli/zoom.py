"""`foveate zoom`: the single weights of one head, for some rows and keys of a profiled text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveate.core.errors import BadInput

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from foveate.opened import Window

ENDINGS = (".csv", ".npz", ".png", ".pdf", ".svg")
WIDE, HIGH = 64, 32
STRONGEST = 10
SHADES = " ░▒▓█"


def command(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved profile.")],
    layer: Annotated[int, typer.Option(help="Number of the layer, from 0.")],
    head: Annotated[int, typer.Option(help="Number of the head, from 0.")],
    rows: Annotated[str, typer.Option(help="Rows (tokens that look) as START:STOP; the last one is not in it.")],
    keys: Annotated[str, typer.Option(help="Keys (tokens looked at) as START:STOP.")],
    text: Annotated[str, typer.Option(help="profile, or needle for the prompt of the retrieval probe.")] = "profile",
    model: Annotated[str | None, typer.Option(help="The model, where it is not found again by itself.")] = None,
    out: Annotated[Path | None, typer.Option(help=f"File for the weights: {', '.join(ENDINGS)}.")] = None,
) -> None:
    """Show the exact weights of one head in a window of a profile, and keep the window for `foveate report`."""
    from rich.console import Console

    from foveate.core.errors import BadInput

    spans = span(rows, "--rows"), span(keys, "--keys")
    if out is not None and out.suffix not in ENDINGS:
        raise BadInput(f"--out {out}: weights can be written as {', '.join(ENDINGS)}")
    screen = Console(highlight=False)
    with screen.status("looking …"):
        from foveate.zooming import zoom

        window = zoom(folder, layer, head, *spans, text=text, model=model)
    screen.print(f"layer {layer}, head {head}: rows {rows} on keys {keys} of the {text} text\n")
    screen.print(picture(window))
    screen.print(strongest(window))
    if out is not None:
        write(window, folder, out)
    screen.print(f"written: {folder}/opened.npz, opened.json" + (f", {out}" if out else ""), soft_wrap=True)


def span(text: str, option: str) -> tuple[int, int]:
    """`START:STOP` as two numbers."""
    start, colon, stop = text.partition(":")
    if not (colon and start.strip().isdecimal() and stop.strip().isdecimal()):
        raise BadInput(f"{option} {text}: write START:STOP, two whole numbers, for instance {option} 100:160")
    return int(start), int(stop)


def picture(window: Window) -> Text:
    """The window as shades, several weights to a character where it is larger than the screen."""
    import numpy as np
    from rich.text import Text

    weights = window.weights.astype(float)
    for axis, most in enumerate((HIGH, WIDE)):
        cuts = np.linspace(0, weights.shape[axis], min(most, weights.shape[axis]), endpoint=False).astype(int)
        weights = np.maximum.reduceat(weights, cuts, axis=axis)
    # the root: weights differ by orders of magnitude
    shade = np.sqrt(weights / max(weights.max(), 1e-9)) * (len(SHADES) - 1)
    lines = ("".join(SHADES[round(x)] * (2 if weights.shape[1] <= WIDE // 2 else 1) for x in row) for row in shade)
    return Text("\n".join(f"  │{line}│" for line in lines) + "\n")


def strongest(window: Window) -> Table:
    """The pairs of tokens with the largest weights."""
    import numpy as np
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="strongest pairs", title_justify="left")
    for name in ("row", "token", "looks at key", "token", "weight"):
        table.add_column(name, justify="left" if name == "token" else "right")
    order = np.argsort(-window.weights.astype(float), axis=None, kind="stable")[:STRONGEST]
    for row, key in zip(*np.unravel_index(order, window.weights.shape), strict=True):
        weight = float(window.weights[row, key])
        if weight > 0:
            table.add_row(
                str(window.rows[0] + row),
                # tokens as text: what looks like markup, or moves the cursor, is neither
                Text(repr(window.row_tokens[row])),
                str(window.keys[0] + key),
                Text(repr(window.key_tokens[key])),
                f"{weight:.3f}",
            )
    return table


def write(window: Window, folder: Path, out: Path) -> None:
    """The weights as a table of pairs, as arrays, or as a figure."""
    import numpy as np

    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npz":
        rows, keys = (np.arange(*s) for s in (window.rows, window.keys))
        tokens: dict[str, Any] = {"row_tokens": np.array(window.row_tokens), "key_tokens": np.array(window.key_tokens)}
        np.savez_compressed(out, weights=window.weights, rows=rows, keys=keys, **tokens)
    elif out.suffix == ".csv":
        import pandas as pd

        at = [(r, k) for r in range(len(window.row_tokens)) for k in range(len(window.key_tokens))]
        pd.DataFrame(
            {
                "row": [window.rows[0] + r for r, _ in at],
                "key": [window.keys[0] + k for _, k in at],
                "row_token": [window.row_tokens[r] for r, _ in at],
                "key_token": [window.key_tokens[k] for _, k in at],
                "weight": window.weights.astype(np.float32).flatten(),
            }
        ).to_csv(out, index=False)
    else:
        from foveate.profiling import Profile

        profile = Profile.load(folder)
        profile.plot("window", index=len(profile.windows) - 1).figure.savefig(out, dpi=150)
