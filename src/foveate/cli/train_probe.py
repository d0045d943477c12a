"""`foveate train-probe`: small models around several rules, trained on a task with known answers, compared."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from foveate.training.run import Run


CORES = 2


def command(
    task: Annotated[str, typer.Argument(help="mqar, backcopy, copying, induction or characters.")],
    rule: Annotated[
        list[str] | None,
        typer.Option(help="A rule, parameters as sigmoid:length=64, or gated_convolution; may be given again."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Models of each rule and width.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller models and fewer steps: under a minute.")] = False,
    width: Annotated[list[int] | None, typer.Option(help="Width of the models; may be given again.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of each training.")] = None,
    workers: Annotated[int | None, typer.Option(help="Models trained at a time, a core each; default 2.")] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text files for characters and backcopy, joined; default: Python's documentation."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for everything; default: trained/TASK.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in the folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON, nothing else.")] = False,
) -> None:
    """Train small models that differ in their attention only, and draw what each of them learns."""
    import json

    from rich.console import Console

    from foveate.cli._searching import folder, resumable
    from foveate.cli.profile import read_texts

    screen = Console(stderr=as_json, highlight=False)
    target = out or Path("trained") / task
    content = read_texts(text) if text else None
    with screen.status("loading …"):
        from foveate.report.page import write
        from foveate.report.training import page
        from foveate.training.experiment import to_json, usual
        from foveate.training.task import find_task

        experiment = usual(
            find_task(task), rule or (), seeds, quick=quick, widths=width or (), steps=steps, text=content
        )
    folder(target)
    done = experiment.open(target, resume)
    left = len(experiment.left(done))
    workers = max(1, min(workers or CORES, left))
    with screen.status("timing a few steps …"):
        seconds = experiment.seconds(done, workers)
    count = len(experiment.runs)
    models = f"{count} models" if left == count else f"{count} models, {count - left} of them trained"
    if left:
        models += f"; training takes about {duration(seconds)}, {workers} at a time"
    screen.print(f"{experiment.task.title}: {models}", soft_wrap=True)
    with resumable("trained", target, "the same command with --resume goes on"), Bars(screen, left) as bars:
        outcomes = experiment.carry_out(target, done, bars.tell, workers)
    results = to_json(experiment, outcomes)
    (target / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    write(page(results), target / "report.html")
    if as_json:
        json.dump(results, sys.stdout, indent=1)
        print()
    else:
        show(screen, results)
        screen.print(f"written: {target / 'results.json'}, {target / 'report.html'}", soft_wrap=True)
    failed = [o.result["failed"] for o in outcomes if o.result["failed"]]
    for why in failed:
        print(f"foveate: {why}", file=sys.stderr)
    if failed:
        raise SystemExit(1)


def duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


class Bars:
    """A bar for all models, and one for each that is being trained."""

    def __init__(self, screen: Console, count: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.progress = Progress(
            TextColumn("{task.description:<34}"),
            BarColumn(24),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            TextColumn("{task.fields[loss]:>10}"),
            TimeElapsedColumn(),
            console=screen,
            transient=True,
        )
        self.all = self.progress.add_task("models", total=count, loss="")
        self.bars: dict[Run, Any] = {}
        self.ended: set[Run] = set()

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def tell(self, run: Run, step: int, loss: float) -> None:
        """Moves the bar of one model; it goes when the model is done."""
        if run in self.ended:
            return
        if run not in self.bars:
            name = f"{run.mixer}, width {run.size.width}, seed {run.seed}"
            self.bars[run] = self.progress.add_task(name, total=run.optimisation.steps, loss="")
        self.progress.update(self.bars[run], completed=step, loss=f"loss {loss:.3f}")
        if step == run.optimisation.steps:
            self.ended.add(run)
            self.progress.remove_task(self.bars[run])
            self.progress.advance(self.all)


# ---------------------------------------------------------------- what a person sees


def show(screen: Console, results: dict[str, Any]) -> None:
    """The models, a line each, and below them what was measured, so that rules stand under each other."""
    rows = results["rows"]
    screen.print(models(rows))
    screen.print(measures(rows, results["columns"]))
    seeds = max((c["seeds"] for r in rows for c in r["cells"]), default=0)
    screen.print(
        f"[dim]state: what a sequence of {results['trained_at']:,} tokens leaves behind for the next"
        + ("; in brackets 95 % t-intervals over seeds" if seeds > 1 else "; one seed, so no interval")
        + "[/]"
    )


def models(rows: list[dict[str, Any]]) -> Table:
    """What each model costs."""
    from foveate.cli.cost import size

    table = headed("rule", "width", "parameters", "state", "a run")
    for r in rows:
        table.add_row(
            r["mixer"] + (f" ({r['failed']} failed)" if r["failed"] else ""),
            str(r["width"]),
            f"{r['parameters']:,}",
            size(r["state_bytes"]),
            f"{r['seconds']:.0f} s",
        )
    return table


def measures(rows: list[dict[str, Any]], columns: list[dict[str, Any]]) -> Table:
    """What each model can do, measure by measure."""
    table = headed("measure", "rule", "width", "mean", "")
    for column in columns:
        for at in ends(rows, column["measure"]):
            title = column["title"] + ("" if at is None else f" @ {at:,}")
            for r in rows:
                cells = {(c["measure"], c["at"]): c for c in r["cells"]}
                mean, interval = number(cells.get((column["measure"], at)), column["share"])
                table.add_row(title, r["mixer"], str(r["width"]), mean, interval)
                title = ""
            table.add_section()
    return table


def headed(*titles: str) -> Table:
    """An empty table whose rules may be long, and whose numbers stay whole."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in titles:
        word = title in ("rule", "measure")
        table.add_column(title, justify="left" if word else "right", overflow="fold", no_wrap=not word)
    return table


def ends(rows: list[dict[str, Any]], measure: str) -> list[int | None]:
    """The lengths that a measure is shown at: the shortest and the longest."""
    found = list(dict.fromkeys(c["at"] for r in rows for c in r["cells"] if c["measure"] == measure))
    return found if len(found) < 3 else [found[0], found[-1]]


def number(cell: dict[str, Any] | None, share: bool) -> tuple[str, str]:
    """A mean, and its interval where it has one."""
    if cell is None or cell["value"] is None:
        return "–", ""
    form = "{:.0%}" if share else "{:.3f}"
    if cell["low"] is None:
        return form.format(cell["value"]), ""
    low, high = (min(1.0, max(0.0, v)) if share else v for v in (cell["low"], cell["high"]))
    return form.format(cell["value"]), f"({form.format(low)} to {form.format(high)})"
