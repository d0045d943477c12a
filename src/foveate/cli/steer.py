"""`foveate steer`: find the parameters of an edit on a task, judge it on held-out examples, and save it as a plan."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveate.core.errors import BadInput, unknown

if TYPE_CHECKING:
    from rich.console import Console

    from foveate.core.mechanism import Mechanism
    from foveate.finding.reporting import Report
    from foveate.finding.searching import Found
    from foveate.tasks import Comparison, Example

KINDS = ("Edit", "HeadEdit", "ResidualEdit", "ExpertEdit", "PromptEdit")


def command(
    model: Annotated[str, typer.Argument(help="smollm2 (embedded), a folder, a .gguf file or a hub id.")],
    task: Annotated[Path, typer.Option(help="Examples: .jsonl, .json, or a table (.csv, .tsv) with --template.")],
    edit: Annotated[str, typer.Option(help="An edit by name, parameters to begin with as name:factor=2.")],
    template: Annotated[
        str | None, typer.Option(help='The prompt of a table\'s row, as "Review: {sentence}\\nSentiment: {label}".')
    ] = None,
    columns: Annotated[str | None, typer.Option(help="Names of the columns of a table without a first line.")] = None,
    labels: Annotated[str | None, typer.Option(help='Words for labels, as "0=negative,1=positive".')] = None,
    limit: Annotated[int | None, typer.Option(help="Use so many examples of the file, drawn at random.")] = 400,
    train: Annotated[float, typer.Option(help="Share of the examples to search on; the rest is held out.")] = 0.5,
    evaluations: Annotated[int, typer.Option(help="How often all training examples may be scored.")] = 40,
    objective: Annotated[
        str, typer.Option(help="probability of the right choice, accuracy, or entropy (which needs no labels).")
    ] = "probability",
    heads: Annotated[bool, typer.Option(help="Search layers and heads, too, where the edit has them.")] = True,
    part: Annotated[str | None, typer.Option(help="Words of each prompt, for edits of a span.")] = None,
    index: Annotated[int | None, typer.Option(help="Which occurrence of --part, from 0.")] = None,
    chat: Annotated[bool, typer.Option(help="Put prompts through the model's chat template.")] = False,
    normalise: Annotated[bool, typer.Option(help="Compare choices by their log-likelihood per token.")] = False,
    second: Annotated[
        Path | None, typer.Option(help="An unrelated task (.jsonl, .json); default: recall of facts.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draw, the split, intervals and p-values.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the plan goes.")] = Path("plan.json"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON, nothing else.")] = False,
) -> None:
    """Search an edit's parameters on one half of a task, and say what they are worth on the other half."""
    from rich.console import Console

    from foveate.cli.profile import Bar

    screen = Console(stderr=as_json, highlight=False)
    named(edit)
    if out.is_dir():
        raise BadInput(f"{out} is a folder; give the plan a name with --out, for instance {out}/plan.json")
    with screen.status("reading examples …"):
        from foveate.finding.searching import OBJECTIVES
        from foveate.tasks import split

        if objective not in OBJECTIVES:
            raise unknown("objective", objective, OBJECTIVES)
        examples = given(task, template, columns, labels, limit, seed)
        training, held_out = split(examples, train, seed)
        mechanism = first_setting(edit)
        others = another(second, seed)
    with screen.status(f"opening {model} …"):
        from foveate.core.plan import Plan
        from foveate.finding.judging import Judge
        from foveate.finding.reporting import report
        from foveate.finding.searching import search
        from foveate.models import load
        from foveate.probe import default_text

        network, tokenizer = load(model)
    options: dict[str, Any] = {"normalise": normalise, "chat": chat, "part": part, "index": index}
    screen.print(
        f"{model}: {type(mechanism).__name__} on {len(training)} examples, judged on {len(held_out)} others; at most "
        f"{evaluations} evaluations"
    )
    with Bar(screen) as progress:
        found = search(
            Judge(network, tokenizer, training, **options),
            mechanism,
            evaluations,
            objective,
            seed,
            heads,
            lambda done, of, best: progress("searching", done, of),
        )
    with screen.status("judging …") as status:
        judged = report(
            Judge(network, tokenizer, held_out, **options),
            [found.mechanism],
            Judge(network, tokenizer, others, normalise=normalise),
            default_text(),
            seed=seed,
            progress=lambda what: status.update(f"{what} …"),
        )
    evidence = {
        "task": task.name,
        "objective": objective,
        "training_examples": len(training),
        "held_out_examples": len(held_out),
        "seed": seed,
        "training": {"without": found.plain, "with": found.objective},
        "tries": [{"what": t.what, "objective": t.objective, "best": t.kept} for t in found.tries],
        "held_out": judged.to_json(),
    }
    plan = Plan.of(network, found.mechanism, evidence=evidence, name=Path(model).name)
    plan.save(out)
    if as_json:
        sys.stdout.write(out.read_text(encoding="utf-8"))
        return
    show(screen, found, judged, objective)
    screen.print(f"\nwritten: {out}; use it with `foveate generate {model} --plan {out}`", soft_wrap=True)


def named(edit: str) -> None:
    """A misspelt edit, or a mechanism that is none, is told before anything is opened."""
    from foveate.catalogue import entries

    known = {e["name"] for e in entries() if e["kind"] in KINDS}
    if edit.partition(":")[0] not in known:
        raise unknown("edit", edit.partition(":")[0], known, "See `foveate list --verb steer`.")


def given(
    task: Path, template: str | None, columns: str | None, labels: str | None, limit: int | None, seed: int
) -> tuple[Example, ...]:
    """The examples of a file."""
    from foveate.tasks import parse_columns, parse_labels, parse_template, read

    return read(
        task,
        None if template is None else parse_template(template),
        None if columns is None else parse_columns(columns),
        None if labels is None else parse_labels(labels),
        limit,
        seed,
    )


def first_setting(edit: str) -> Mechanism:
    """The edit to begin with; a span is filled in for each prompt later.

    Raises:
        BadInput: it has parameters that only `fit` can find.
    """
    import dataclasses

    from foveate.core.params import bounds_of
    from foveate.core.places import Spans
    from foveate.core.registry import find, make

    cls = find(edit.partition(":")[0], "steer")
    needed = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.init}
    spans = {n for n, (_, bounds) in bounds_of(cls).items() if isinstance(bounds, Spans)}
    if needed - spans:
        hint = f"make it in Python with {cls.__name__}.fit(…)" if hasattr(cls, "fit") else "make it in Python"
        raise BadInput(
            f"{cls.__name__} needs {', '.join(sorted(needed - spans))}, which no search over a grid can find; "
            f"{hint} and save it with foveate.Plan.of(model, …).save(…)"
        )
    return make(edit, "steer", **dict.fromkeys(needed, ((0, 1),)))


def another(second: Path | None, seed: int) -> tuple[Example, ...]:
    """Examples of an unrelated task."""
    from foveate.probe import FactualRecall
    from foveate.tasks import read

    return read(second, limit=100, seed=seed) if second else FactualRecall().examples(60, seed)


# ---------------------------------------------------------------- what a person sees


def show(screen: Console, found: Found, judged: Report, objective: str) -> None:
    """What was found, and what it is worth."""
    from rich import box
    from rich.table import Table

    screen.print(f"\nbest of {len(found.tries)}: [bold]{brief(found.mechanism)}[/]")
    if objective != "entropy":
        screen.print(
            f"[dim]{objective} on the training examples: {found.plain:.3f} without it, {found.objective:.3f} with it[/]"
        )
    if not found.helps:
        screen.print("[yellow]It is worse than no edit on the examples that it was searched on.[/]")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("held out", "before", "after", "difference (95 % interval)", "p"):
        table.add_column(column, justify="left" if column == "held out" else "right")
    rows: list[tuple[str, Comparison]] = [
        ("right answers", judged.right),
        ("probability of the right one", judged.probability),
    ]
    if judged.second is not None:
        rows.append(("another task: right answers", judged.second))
    for name, c in rows:
        share = "{:.1%}" if c.what == "right" else "{:.3f}"
        gap = f"{c.difference:+.3f} ({c.low:+.3f} to {c.high:+.3f})"
        table.add_row(name, share.format(c.before), share.format(c.after), gap, f"{c.p:.3g}")
    if judged.perplexity is not None:
        before, after = judged.perplexity
        table.add_row(
            "perplexity of a text",
            f"{before.value:.2f}",
            f"{after.value:.2f}",
            f"x {after.value / before.value:.3f}",
            "",
        )
    screen.print(table)
    if judged.cost is not None:
        cost = judged.cost
        times = " and ".join(
            f"{what} x {part.value:.2f} ({part.low:.2f}-{part.high:.2f})"
            for what, part in ((f"a prompt of {cost.tokens} tokens", cost.prefill), ("a decoded token", cost.decode))
        )
        screen.print(f"[dim]time: {times}, {cost.repeats} repeats[/]")
    if judged.right.low <= 0 <= judged.right.high:
        screen.print(
            "The interval of the difference in right answers holds 0: on these examples it may as well be chance."
        )


def brief(m: Mechanism) -> str:
    """The mechanism, with long lists counted instead of written."""
    import dataclasses

    parts = []
    for f in dataclasses.fields(m):
        value = getattr(m, f.name)
        if value == f.default:
            continue
        long = isinstance(value, tuple) and len(value) > 4
        parts.append(f"{f.name}=<{len(value)} entries>" if long else f"{f.name}={value!r}")
    return f"{type(m).__name__}({', '.join(parts)})"
