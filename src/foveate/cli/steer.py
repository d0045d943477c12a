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
    from foveate.finding.judging import Judge
    from foveate.finding.reporting import Report
    from foveate.finding.searching import Found
    from foveate.tasks import Comparison, Example


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
    if evaluations < 2:
        raise BadInput(f"--evaluations {evaluations}: at least 2 are needed, one without the edit and one with it")
    a_file(out, "plan.json")
    with screen.status("reading examples …"):
        from foveate.core.places import spans_of
        from foveate.finding.searching import OBJECTIVES
        from foveate.tasks import split

        if objective not in OBJECTIVES:
            raise unknown("objective", objective, OBJECTIVES)
        examples = given(task, template, columns, labels, limit, seed)
        training, held_out = split(examples, train, seed)
        mechanism = first_setting(edit)
        spanned = bool(spans_of(mechanism))
        says_where(type(mechanism).__name__, spanned, part, index)
        others = () if spanned else another(second, seed)
    with screen.status(f"opening {model} …"):
        from foveate.core.plan import Plan
        from foveate.finding.judging import Judge
        from foveate.finding.reporting import report
        from foveate.finding.searching import search
        from foveate.models import load
        from foveate.probe import default_text

        network, tokenizer = load(model)
    options: dict[str, Any] = {"normalise": normalise, "chat": chat, "part": part, "index": index}
    judges = [Judge(network, tokenizer, e, **options) for e in (training, held_out)]
    # where the words of a span are, only the first task says
    unrelated = Judge(network, tokenizer, others, normalise=normalise) if others else None
    with screen.status("preparing examples …"):
        made_ready([*judges, *([unrelated] if unrelated else [])], mechanism, spanned)
    screen.print(
        f"{model}: {type(mechanism).__name__} on {len(training)} examples, judged on {len(held_out)} others; at most "
        f"{evaluations} evaluations",
        soft_wrap=True,
    )
    with Bar(screen) as progress:
        found = search(
            judges[0],
            mechanism,
            evaluations,
            objective,
            seed,
            heads,
            lambda done, of, best: progress("searching", done, of),
        )
    with screen.status("judging …") as status:
        judged = report(
            judges[1],
            [found.mechanism],
            unrelated,
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
    # of an edit without spans neither is given
    name, words = Path(model).name, part or ""
    plan = Plan.of(network, found.mechanism, evidence=evidence, name=name, part=words, index=index)
    plan.save(out)
    if as_json:
        sys.stdout.write(out.read_text(encoding="utf-8"))
        return
    show(screen, found, judged, objective)
    hint = f", whose --prompt holds {part!r}" if spanned else ""
    screen.print(f"\nwritten: {out}; use it with `foveate generate {model} --plan {out}`{hint}", soft_wrap=True)


def named(edit: str) -> None:
    """A misspelt edit, or a mechanism that is none, is told before anything is opened."""
    from foveate.core.registry import names, where

    name = edit.partition(":")[0]
    if name in where() and where()[name][0] != "steer":
        raise BadInput(
            f"{name} is no edit but a mechanism to {where()[name][0]} with; `foveate list --verb steer` shows the edits"
        )
    if name not in where():
        raise unknown("edit", name, names("steer"), "See `foveate list --verb steer`.")


def a_file(out: Path, name: str) -> None:
    """Where nothing can be written is told before hours of work."""
    if out.is_dir():
        raise BadInput(f"{out} is a folder; give the file a name with --out, for instance {out / name}")
    above = next(p for p in out.absolute().parents if p.exists())
    if not above.is_dir():
        raise BadInput(f"--out {out}: {above} is a file, not a folder")


def says_where(edit: str, spanned: bool, part: str | None, index: int | None) -> None:
    """An edit of a span needs words to find, any other has no use for them."""
    if spanned and not part:
        raise BadInput(f"{edit} acts on a span: say which words of each prompt it is for, with --part TEXT")
    for option, value in (("--part", part), ("--index", index)):
        if not spanned and value is not None:
            raise BadInput(f"{option} {value}: {edit} acts on no span of a prompt; leave it out")


def made_ready(judges: list[Judge], mechanism: Mechanism, spanned: bool) -> None:
    """All prompts as tokens, with their spans; one that cannot be used is told before the search, not behind it."""
    from foveate.core.mechanism import PromptEdit

    for judge in judges:
        judge.groups((), spanned)
        if isinstance(mechanism, PromptEdit):
            judge.groups((mechanism,), spanned)


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
    from foveate.core.places import Experts, Spans, Vectors
    from foveate.core.registry import find, make

    cls = find(edit.partition(":")[0], "steer")
    needed = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.init}
    spans = {n for n, (_, bounds) in bounds_of(cls).items() if isinstance(bounds, Spans)}
    made = None if needed - spans else make(edit, "steer", **dict.fromkeys(needed, ((0, 1),)))
    if made is None or made.nothing:
        # what may be empty, and does nothing then
        needed |= {n for n, (_, bounds) in bounds_of(cls).items() if isinstance(bounds, Vectors | Experts)}
    if needed - spans or made is None:
        hint = f"make it in Python with {cls.__name__}.fit(…)" if hasattr(cls, "fit") else "make it in Python"
        raise BadInput(
            f"{cls.__name__} needs {', '.join(sorted(needed - spans))}, which no search over a grid can find; "
            f"{hint} and save it with foveate.Plan.of(model, …).save(…)"
        )
    return made


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
        screen.print("[yellow]It is no better than no edit on the examples that it was searched on.[/]")
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
    """The mechanism, with long lists counted instead of written; its spans differ from prompt to prompt."""
    import dataclasses

    from foveate.core.places import spans_of

    parts = []
    for f in dataclasses.fields(m):
        value = getattr(m, f.name)
        if value == f.default or f.name in spans_of(m):
            continue
        long = isinstance(value, tuple) and len(value) > 4
        parts.append(f"{f.name}=<{len(value)} entries>" if long else f"{f.name}={value!r}")
    return f"{type(m).__name__}({', '.join(parts)})"
