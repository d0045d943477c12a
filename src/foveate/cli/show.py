"""`foveate show`: one mechanism, whole."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

MARKS = {"holds": "green", "partly": "yellow", "fails": "red"}
# longer lines are hard to read, however wide the terminal is
WIDEST = 110


def command(
    name: Annotated[str, typer.Argument(help="Name of a mechanism, as `foveate list` has it.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the catalogue's entry as JSON.")] = False,
) -> None:
    """Show a mechanism: equation, paper, parameters, when to use it, when it misleads, its claims, an example."""
    from foveate.catalogue import find

    e = find(name)
    if as_json:
        import json

        print(json.dumps(e, indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    screen = Console(highlight=False)
    screen.width = min(screen.width, WIDEST)
    screen.print(f"[bold]{e['name']}[/]  [dim]{e['verb']} · {e['kind']} · {e['family']}[/]")
    screen.print(f"{escape(e['summary'])}\n")
    if e["details"]:
        screen.print(f"{escape(reflowed(e['details']))}\n")
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    rows = {
        "equation": [escape(part) for part in e["equation"].split("; ")],
        "paper": [f"{escape(e['title'])} ({e['year']})"],
        "parameters": parameters(e["params"]),
        "reads": [", ".join(e["needs"]) + (" (of a sample of rows)" if e["sampled"] else "")],
        "when to use": [escape(e["use"])],
        "misleads": [escape(e["misleads"]) or "nothing known"],
        "differs": [escape(e["differs"])],
        "moves": traffic(e),
        "limits": [f"{check}: {escape(why)}" for check, why in e["known_failures"].items()],
        "claims": claims(e) or ["none tested"],
        "example": [escape(e["example_shows"])],
    }
    for key, lines in rows.items():
        if lines:
            table.add_row(key, stacked(lines))
    screen.print(table)
    screen.print()
    # not wrapped: a person copies it
    screen.print(textwrap.indent(e["example"], "  "), markup=False, soft_wrap=True)


def reflowed(text: str) -> str:
    """Paragraphs on one line each, for the terminal to wrap; the items of a list keep theirs."""
    lines: list[str] = []
    for line in text.splitlines():
        fresh = not line.strip() or line.startswith("- ") or not lines or not lines[-1]
        if fresh:
            lines.append(line.strip())
        else:
            lines[-1] += f" {line.strip()}"
    return "\n".join(lines)


def parameters(params: list[dict[str, Any]]) -> list[str]:
    """One entry per parameter: how it is written, its bounds, what it means."""
    from rich.markup import escape

    found = []
    for p in params:
        default = tuple(p["default"]) if isinstance(p["default"], list) else p["default"]
        shown = default["code"] if isinstance(default, dict) else repr(default)
        bounds = "" if p["bounds"] == "any" else f"  [dim]{escape(p['bounds'])}[/]"
        found.append(f"[bold]{p['name']}[/] = {escape(shown)}{bounds}\n  {escape(p['meaning'])}")
    return found


def claims(e: dict[str, Any]) -> list[str]:
    """One entry per claim: verdict, sentence, whose it is, and how to run it again."""
    from rich.markup import escape

    found = []
    for c in e["claims"]:
        if c["verdict"] == "not run":
            found.append(f"[dim]not run[/]  {escape(c['name'])}")
            continue
        colour = MARKS.get(c["verdict"], "dim")
        paper = "" if c["title"] == e["title"] else f"\n  [dim]in[/] {escape(c['title'])}"
        found.append(
            f"[{colour}]{c['verdict']}[/]  {escape(c['claim'])}{paper}\n  [dim]again:[/] {escape(c['command'])}"
        )
    return found


def traffic(e: dict[str, Any]) -> list[str]:
    """What a schedule moves with some sizes of fast memory, as the catalogue has it; nothing for the other kinds."""
    from rich.markup import escape

    from foveate.catalogue import LENGTH, WIDTH
    from foveate.cli.cost import size

    found = [f"[dim]one head of width {WIDTH} in float32, {LENGTH:,} queries and keys:[/]"] if "traffic" in e else []
    for one in e.get("traffic", ()):
        where = f"with {size(one['memory'])} of fast memory"
        if "why" in one:
            found.append(f"{where} nothing: {escape(one['why'])}")
        else:
            found.append(f"{size(one['moved'])} {where}, {one['moved'] / one['least']:.1f} times the least possible")
    return found


def stacked(lines: list[str]) -> RenderableType:
    """Entries below each other, what wraps and what follows a line break being indented."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    parts: list[RenderableType] = []
    for entry in lines:
        first, *rest = entry.split("\n")
        parts.append(Text.from_markup(first))
        parts += [Padding(Text.from_markup(line.strip()), (0, 0, 0, 2)) for line in rest if line.strip()]
    return Group(*parts)
