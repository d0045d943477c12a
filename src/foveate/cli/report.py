"""`foveate report`: a saved profile, or two side by side, as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate.core.errors import BadInput


def command(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved profile.")],
    other: Annotated[
        Path | None, typer.Argument(help="A second one, to compare: another text, another model, before and after.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write; default: report.html in the folder, or compare-A-B.html here.")
    ] = None,
) -> None:
    """Draw a saved profile as one HTML file that needs no network; two are drawn side by side."""
    from rich.console import Console

    screen = Console(highlight=False)
    target = out or default(folder, other)
    if target.is_dir():
        raise BadInput(f"--out {target} is a folder; name a file, for instance {target / 'report.html'}")
    with screen.status("drawing …"):
        from foveate.profiling import Profile
        from foveate.report import report, write

        profiles = [Profile.load(f) for f in (folder, other) if f is not None]
        write(report(*profiles), target)
    screen.print(str(target), soft_wrap=True)


def default(folder: Path, other: Path | None) -> Path:
    """Beside one profile; two belong to neither folder."""
    if other is None:
        return folder / "report.html"
    names = [f.absolute().name for f in (folder, other)]
    if names[0] == names[1]:
        names = [f"{f.absolute().parent.name}-{f.absolute().name}" for f in (folder, other)]
    return Path(f"compare-{names[0]}-{names[1]}.html")
