"""`foveate list`: what there is."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def command(
    verb: Annotated[str | None, typer.Option(help="Only measure, steer, compress, replace or select.")] = None,
    family: Annotated[str | None, typer.Option(help="Only this family, for instance sinks.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only this kind, for instance Metric or Edit.")] = None,
    needs: Annotated[
        list[str] | None, typer.Option(help="Only those that read this, for instance values (may be repeated).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the catalogue's entries as JSON.")] = False,
) -> None:
    """List the mechanisms."""
    from foveate.catalogue import entries

    chosen = entries()
    asked = [("verb", verb), ("family", family), ("kind", kind), *(("needs", n) for n in needs or ())]
    for key, value in asked:
        if value is not None:
            chosen = narrowed(chosen, key, value)
    if as_json:
        import json

        print(json.dumps(chosen, indent=2, ensure_ascii=False))
        return
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    # what is the same for all of them tells nothing, and takes the room of what they do
    telling = ["name", *(key for key in ("verb", "family") if len({e[key] for e in chosen}) > 1)]
    for column in (*telling, "what it does"):
        table.add_column(column, no_wrap=column != "what it does")
    for e in chosen:
        table.add_row(*(e[key] for key in telling), escape(e["summary"]))
    screen = Console(highlight=False)
    screen.print(table)
    screen.print(f"[dim]{len(chosen)} mechanisms; more about one: foveate show NAME[/]")


def narrowed(chosen: list[dict[str, Any]], key: str, value: str) -> list[dict[str, Any]]:
    """Those entries whose `key` is the value, or has it.

    Raises:
        UnknownName: there are none.
    """
    from foveate.core.errors import unknown

    def values(e: dict[str, Any]) -> list[str]:
        return e[key] if isinstance(e[key], list) else [e[key]]

    found = [e for e in chosen if value.lower() in [v.lower() for v in values(e)]]
    if not found:
        what = "thing that these mechanisms read" if key == "needs" else f"{key} of these mechanisms"
        raise unknown(what, value, {v for e in chosen for v in values(e)})
    return found
