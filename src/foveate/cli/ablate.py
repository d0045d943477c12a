"""`foveate ablate`: which heads a task stands on, by taking their outputs away."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveate.core.errors import BadInput, unknown

if TYPE_CHECKING:
    from rich.console import Console

    from foveate.finding.ablating import Evidence
    from foveate.tasks import Example

PROBES = ("indirect_object", "coloured_objects", "arithmetic", "factual_recall")


def command(
    model: Annotated[str, typer.Argument(help="smollm2 (embedded), a folder, a .gguf file or a hub id.")],
    task: Annotated[
        str, typer.Option(help=f"A file of examples (.jsonl, .json), or generated prompts: {', '.join(PROBES)}.")
    ],
    then: Annotated[
        list[str] | None, typer.Option(help="Another task to try the same heads on (may be repeated).")
    ] = None,
    to: Annotated[
        str, typer.Option(help="What a head is replaced by: resample, mean, zero; or patch (clean into corrupted).")
    ] = "resample",
    top: Annotated[int, typer.Option(help="How many heads to ablate for real, those with the largest estimates.")] = 10,
    count: Annotated[int, typer.Option(help="How many examples to use.")] = 40,
    heads: Annotated[Path | None, typer.Option(help="Ablate the heads in this file, as --out wrote it.")] = None,
    chat: Annotated[bool, typer.Option(help="Put prompts through the model's chat template.")] = False,
    normalise: Annotated[bool, typer.Option(help="Compare choices by their log-likelihood per token.")] = False,
    seed: Annotated[int, typer.Option(help="Of prompts, controls, intervals and p-values.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write everything that was found to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON, nothing else.")] = False,
) -> None:
    """Score heads by what their removal does to a task, beside random heads of the same layers."""
    from rich.console import Console

    from foveate.cli.profile import Bar
    from foveate.cli.steer import a_file

    screen = Console(stderr=as_json, highlight=False)
    if top < 1 or count < 2:
        raise BadInput(f"--top {top}, --count {count}: at least 1 head and 2 examples are needed")
    if out is not None:
        a_file(out, "heads.json")
    with screen.status("making prompts …"):
        from foveate.finding.ablating import WAYS, Workbench, ablate, ablated_together, heads_in

        if to not in WAYS:
            raise unknown("way to ablate", to, WAYS)
        tasks = {name: examples(name, count, seed) for name in (task, *(then or ()))}
        candidates = None if heads is None else heads_in(heads)
    with screen.status(f"opening {model} …"):
        from foveate.finding.judging import Judge
        from foveate.models import load

        network, tokenizer = load(model)

    def bench(name: str) -> Any:
        return Workbench(Judge(network, tokenizer, tasks[name], normalise=normalise, chat=chat), to, seed)

    screen.print(f"{model}: {len(tasks[task])} examples of {task}; a head is replaced by {WAYS[to]}", soft_wrap=True)
    with screen.status("estimates for all heads, from one backward pass …"):
        first = bench(task)
        missing = sorted(set(candidates or ()) - set(first.all_heads()))
        if missing:
            raise BadInput(f"{heads} names layer {missing[0][0]}, head {missing[0][1]}, which {model} has not")
    with Bar(screen) as progress:
        found = ablate(first, top, candidates, seed, lambda done, of: progress("ablating", done, of))
        for n, other in enumerate(then or ()):
            if found.heads:
                progress("other tasks", n, len(then or ()))
                found.together[other] = ablated_together(bench(other), found.heads, seed)
    if out is not None:
        found.save(out)
    if as_json:
        json.dump(found.to_json(), sys.stdout, indent=1)
        print()
        return
    show(screen, found)
    if out is not None:
        screen.print(f"\nwritten: {out}", soft_wrap=True)


def examples(name: str, count: int, seed: int) -> tuple[Example, ...]:
    """Examples of a file, or generated ones."""
    from foveate import probe
    from foveate.core.registry import camel
    from foveate.tasks import read

    if name in PROBES:
        return getattr(probe, camel(name))().examples(count, seed)
    if not Path(name).exists() and "." not in name:
        raise unknown("task", name, PROBES, "A file ends with .jsonl or .json.")
    return read(name, limit=count, seed=seed)


# ---------------------------------------------------------------- what a person sees


def show(screen: Console, found: Evidence) -> None:
    """The heads with their effects, and what they do together."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("head", "", "estimate", "effect on the margin (95 % interval)", "p"):
        table.add_column(column, justify="left" if column in ("head", "") else "right")
    for role in ("found", "control"):
        part = found.table[found.table.role == role].sort_values("effect", key=abs, ascending=False)
        for row in part.itertuples():
            style = "bold" if (row.layer, row.head) in found.heads else "dim" if role == "control" else ""
            effect = f"{row.effect:+.3f} ({row.low:+.3f} to {row.high:+.3f})"
            what = "" if role == "found" else "control"
            table.add_row(f"L{row.layer}H{row.head}", what, f"{row.estimate:+.3f}", effect, f"{row.p:.3g}", style=style)
        table.add_section()
    screen.print(table)
    if not found.heads:
        screen.print("No head that the task stands on: no interval of a head that was found lies on one side of 0.")
        return
    verb = "restores" if found.to == "patch" else "needs"
    names = ", ".join(f"L{a}H{h}" for a, h in found.heads)
    screen.print(f"The task {verb} {len(found.heads)} of them: {names}", soft_wrap=True)
    for task, told in found.together.items():
        own, controls = told["found"]["right"], [c["right"]["after"] for c in told["controls"]]
        screen.print(
            f"• {task}: {own['before']:.0%} right; {own['after']:.0%} with these {told['heads']} heads ablated, "
            f"{min(controls):.0%} to {max(controls):.0%} with as many random others of the same layers "
            f"({len(controls)} draws)",
            soft_wrap=True,
        )
