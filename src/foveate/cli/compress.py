"""`foveate compress`: find the smallest cache that keeps a model right on a text, prove it, and save it as a plan."""

from __future__ import annotations

import sys
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from foveate.finding.reporting import Spread
    from foveate.planning.compressing import Compressed
    from foveate.planning.examining import Value


def command(
    model: Annotated[str, typer.Argument(help="smollm2 (embedded), a folder, a .gguf file or a hub id.")],
    text: Annotated[
        list[Path] | None, typer.Option(help="Text files, joined in order; default: Python's documentation.")
    ] = None,
    keep: Annotated[float | None, typer.Option(help="Share of the cache's bytes, 0.25 say.")] = None,
    size: Annotated[str | None, typer.Option("--bytes", help="Bytes of the cache at --tokens, as 200MB.")] = None,
    quality: Annotated[
        str | None,
        typer.Option(help="What must stay right, as ppl=1.01,passkey=0.99: the smallest such cache is looked for."),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="A KV policy to propose, parameters as observation_window:window=16; may be given again."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Length of the texts that are planned for.")] = 1024,
    probe: Annotated[
        list[str] | None, typer.Option(help="A probe to judge by; may be given again. Default: passkey and key_value.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Prompts of each probe for the proof.")] = 50,
    seen: Annotated[bool, typer.Option("--seen", help="Compress when the question has been read, not before.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for plan.json, report.html and the results so far.")] = Path("plan"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON, nothing else.")] = False,
) -> None:
    """Search a plan for a model's KV cache on one half of a text, and prove it on the other half and on new prompts."""
    import json

    from rich.console import Console

    from foveate.cli._searching import at_least, folder, going_on, known, resumable
    from foveate.cli.profile import Bar, read_texts
    from foveate.planning.goals import PROBES, Goal, parse_quality

    screen = Console(stderr=as_json, highlight=False)
    goal = Goal(keep, size, parse_quality(quality) if quality is not None else ())
    known("probe", probe or (), PROBES)
    at_least(("--tokens", tokens, 128), ("--samples", samples, 2))
    folder(out)
    given = read_texts(text)
    with screen.status(f"opening {model} …"):
        from foveate.planning.compressing import compress
        from foveate.planning.proposals import USUAL, named
        from foveate.report.compression import page
        from foveate.report.page import write

        policies = named(policy or USUAL)
        from foveate.models import load

        network, tokenizer = load(model)
    ledger = out / "results.jsonl"
    screen.print(f"{model}: a cache of {goal}, for texts of {tokens:,} tokens{going_on(ledger)}", soft_wrap=True)
    with resumable("measured", ledger), Bar(screen) as progress:
        found = compress(
            network,
            tokenizer,
            given,
            goal,
            policies,
            tokens=tokens,
            probes=probe or PROBES[:2],
            count=samples,
            unseen=not seen,
            file=ledger,
            name=Path(model).name,
            tell=progress,
        )
    name = "plan.json" if found.met else "nearest.json"
    # an older plan must not be taken for what this run found
    (out / ("nearest.json" if found.met else "plan.json")).unlink(missing_ok=True)
    found.plan.save(out / name)
    write(page(found, model), out / "report.html")
    if as_json:
        json.dump(found.to_json(), sys.stdout, indent=1)
        print()
    else:
        show(screen, found)
        screen.print(
            f"\nwritten: {out / name} and {out / 'report.html'}; use the plan with `foveate generate {model} --plan "
            f"{out / name}`",
            soft_wrap=True,
        )
    if not found.met:
        print(
            f"foveate: nothing that was tried meets the goal; {name} comes nearest "
            f"({'; '.join(found.missed)}). "
            "Lower the target, or name other policies with --policy",
            file=sys.stderr,
        )
        raise SystemExit(1)


# ---------------------------------------------------------------- what a person sees


def show(screen: Console, found: Compressed) -> None:
    """What was found, and what it is worth."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    probes = list(found.searched.full.recall)
    for column in ("tried (best first)", "bytes", "perplexity", *probes):
        table.add_column(column, justify="left" if column.startswith("tried") else "right")
    candidates = found.searched.candidates
    # the share is in a name where it tells two apart
    alike = len({c.asked for c in candidates}) == 1
    called = attrgetter("family" if alike else "name")
    for c in candidates[:8]:
        s = c.standing
        recalls = (f"{s.recall[p].value:.0%}" for p in probes)
        table.add_row(called(c), f"{s.share:.1%}", f"x {s.perplexity.value:.3f}", *recalls)
    full = found.searched.full
    table.add_row("full cache", "100.0%", "x 1.000", *(f"{full.recall[p].value:.0%}" for p in probes), style="dim")
    screen.print(table)
    for name, why in found.searched.impossible:
        screen.print(f"[dim]not tried: {name}: {why}[/]", soft_wrap=True)
    mine, whole, cost = found.verdict.standing, found.verdict.full, found.cost
    screen.print(
        f"[bold]{called(found.verdict.candidate)}[/], on prompts and text that the search has not seen:",
        soft_wrap=True,
    )
    proof = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("held out", "full cache", "plan"):
        proof.add_column(column, justify="left" if column == "held out" else "right")
    proof.add_row("perplexity (95 % interval)", "x 1", times(mine.perplexity))
    for p in mine.recall:
        proof.add_row(f"{p} (95 % interval)", percent(whole.recall[p]), percent(mine.recall[p]))
    proof.add_row("bytes of the cache", f"{cost.bytes_before / 1e6:.1f} MB", f"{cost.bytes_after / 1e6:.1f} MB")
    for what, before, after in (
        ("a decoded token", cost.decode_before, cost.decode_after),
        ("the prompt", cost.prompt_before, cost.prompt_after),
    ):
        proof.add_row(what, milliseconds(before), milliseconds(after))
    screen.print(proof)
    if found.verdict.attempts:
        screen.print(f"[dim]failed the proof: {', '.join(found.verdict.attempts)}[/]", soft_wrap=True)


def percent(v: Value) -> str:
    """A share with its interval."""
    return f"{v.value:.1%} ({v.low:.1%}-{v.high:.1%})"


def times(v: Value) -> str:
    """A multiple with its interval."""
    return f"x {v.value:.4f} ({v.low:.4f}-{v.high:.4f})"


def milliseconds(s: Spread) -> str:
    """A time with its quartiles."""
    return f"{1e3 * s.value:.0f} ms ({1e3 * s.low:.0f}-{1e3 * s.high:.0f})"
