"""`foveate prune`: find which parts of a model can go, say what that costs, and save it as a plan."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from foveate.finding.reporting import Spread
    from foveate.planning.examining import Value
    from foveate.planning.pruning import Pruned


def command(
    model: Annotated[str, typer.Argument(help="smollm2 (embedded), a folder, a .gguf file or a hub id.")],
    text: Annotated[
        list[Path] | None, typer.Option(help="Text files, joined in order; default: Python's documentation.")
    ] = None,
    count: Annotated[int, typer.Option(help="How many parts go.")] = 4,
    among: Annotated[
        list[str] | None,
        typer.Option(help="What may go: attention or feed_forward; may be given again. Default: both."),
    ] = None,
    measure: Annotated[
        str, typer.Option(help="What is compared with the whole model: divergence, norm or angle.")
    ] = "divergence",
    first: Annotated[int, typer.Option(help="The first layer that may lose a part.")] = 0,
    tokens: Annotated[int, typer.Option(help="Length of the pieces of text, and of the prompts.")] = 512,
    pieces: Annotated[int, typer.Option(help="Pieces of text that the parts are chosen on.")] = 4,
    probe: Annotated[
        list[str] | None, typer.Option(help="A probe to judge by; may be given again. Default: passkey and key_value.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Prompts of each probe.")] = 50,
    out: Annotated[Path, typer.Option(help="Folder for plan.json and the results so far.")] = Path("pruned"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON, nothing else.")] = False,
) -> None:
    """Find the attention and feed-forward parts that a model misses least, and prove on held-out text what is lost."""
    import json

    from rich.console import Console

    from foveate.cli._searching import at_least, folder, going_on, known, resumable
    from foveate.cli.profile import Bar, read_texts
    from foveate.planning.goals import PROBES

    screen = Console(stderr=as_json, highlight=False)
    known("probe", probe or (), PROBES)
    at_least(
        ("--count", count, 1),
        ("--first", first, 0),
        ("--tokens", tokens, 128),
        ("--pieces", pieces, 1),
        ("--samples", samples, 2),
    )
    folder(out)
    given = read_texts(text)
    with screen.status(f"opening {model} …"):
        from foveate.compress.prune._greedy import DISTANCES
        from foveate.core.removing import KINDS
        from foveate.models import load
        from foveate.planning.pruning import prune

        known("kind of part", among or (), KINDS)
        known("measure", [measure], DISTANCES)
        network, tokenizer = load(model)
    kinds = [k for k in KINDS if k in among] if among else KINDS
    ledger = out / "results.jsonl"
    screen.print(
        f"{model}: taking {count} of its {' and '.join(k.replace('_', '-') for k in kinds)} parts out, chosen on "
        f"{pieces} x {tokens:,} tokens{going_on(ledger)}",
        soft_wrap=True,
    )
    with resumable("found", ledger), Bar(screen) as progress:
        found = prune(
            network,
            tokenizer,
            given,
            count,
            among=kinds,
            measure=measure,
            first=first,
            tokens=tokens,
            pieces=pieces,
            probes=probe or PROBES[:2],
            samples=samples,
            file=ledger,
            name=Path(model).name,
            tell=progress,
        )
    at = found.plan.save(out / "plan.json")
    if as_json:
        json.dump(found.to_json(), sys.stdout, indent=1)
        print()
        return
    show(screen, found)
    screen.print(f"written: {at}; use the plan with `foveate generate {model} --plan {at}`", soft_wrap=True)


# ---------------------------------------------------------------- what a person sees


def show(screen: Console, found: Pruned) -> None:
    """Which parts went, and what is lost at some points of the way."""
    from rich import box
    from rich.table import Table

    from foveate.planning.pruning import in_words

    whole, *later = found.points
    for point in later:
        screen.print(f"[bold]{point.gone} gone[/]: {in_words(point.mechanism)}", soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("held out", overflow="fold")
    for column in ("whole", *(f"{point.gone} gone" for point in later)):
        table.add_column(column, justify="right", overflow="fold", min_width=13)
    table.add_row("parameters", *(f"{p.parameters:,}" for p in found.points))
    table.add_row("weights", *(f"{p.bytes / 1e6:.1f} MB" for p in found.points))
    table.add_row("perplexity", *(digits(p.perplexity.value) for p in found.points))
    table.add_row("x the whole", "", *(multiple(p.times) for p in later))
    table.add_row("random parts", "", *(multiple(p.random) for p in later if p.random), style="dim")
    for name in whole.recall:
        table.add_row(name, *(share(p.recall[name]) for p in found.points))
    table.add_row("prompt, token", *(milliseconds(p.read) for p in found.points))
    table.add_row("decoded token", *(milliseconds(p.decoded) for p in found.points))
    screen.print(table)
    screen.print(
        "[dim]in brackets 95 % intervals, of times quartiles; random parts: x the whole with as many others, drawn at "
        "random[/]"
    )


# an interval must fit a column of five on 80, where it stands below its number
def digits(value: float) -> str:
    """A number to four digits, below 1 to three decimals."""
    return f"{value:,.{max(0, 3 - int(math.log10(max(value, 1.0))))}f}"


def share(v: Value) -> str:
    """A share with its interval."""
    return f"{v.value:.0%} ({v.low:.0%}-{v.high:.0%})"


def multiple(v: Value) -> str:
    """A multiple with its interval."""
    return f"{digits(v.value)} ({digits(v.low)}-{digits(v.high)})"


def milliseconds(s: Spread) -> str:
    """A time with its quartiles."""
    return f"{digits(1e3 * s.value)} ms ({digits(1e3 * s.low)}-{digits(1e3 * s.high)})"
