"""`foveate profile`: open a model, run a text through it once, tell where every head looks."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveate.core.errors import BadInput

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from foveate.profiling import Profile


def command(
    model: Annotated[str, typer.Argument(help="smollm2 (embedded), a folder, a .gguf file or a hub id.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text files, joined in order (repeat the option); default: Python's own documentation."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="How many tokens of the text to use; default 4096.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; default: profiles/MODEL.")] = None,
    metrics: Annotated[
        str | None,
        typer.Option(help="Metrics by name, comma between; parameters as local_mass:widths=1+16. Default: all."),
    ] = None,
    max_memory: Annotated[float | None, typer.Option(help="GB that the process may hold.")] = None,
    keep_states: Annotated[
        bool,
        typer.Option("--keep-states", help="Keep the queries and keys of all layers, for `foveate zoom`."),
    ] = False,
    maps: Annotated[bool, typer.Option(help="Draw fine maps and windows of the heads that stand out.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print profile.json to stdout, nothing else.")] = False,
) -> None:
    """Measure every attention head of a model on a text, exactly, in memory that does not grow with N x N."""
    from rich.console import Console

    screen = Console(stderr=as_json, highlight=False)
    target = out or Path("profiles") / Path(model).name
    chosen = split_specs(metrics)
    content = read_texts(text)
    names_are_known(chosen)

    with screen.status(f"opening {model} …"):
        from foveate.models import load
        from foveate.profiling import check_target, choose_metrics, encode, estimate_bytes, profile
        from foveate.stored import layer_bytes

        check_target(target)
        network, tokenizer = load(model)
    instances = choose_metrics(chosen)
    ids, total = encode(network, tokenizer, content, tokens)
    needed = estimate_bytes(network, ids.shape[1], instances)
    used = f"{ids.shape[1]:,} tokens"
    if total > ids.shape[1]:
        used += f" (of {total:,}; --tokens for more)"
    screen.print(f"{model}: {used}, {len(instances)} metrics, about {needed / 1e9:.1f} GB")
    if keep_states:
        told = layer_bytes(network, ids.shape[1])
        screen.print(f"keeping queries and keys of all layers: {told / 1e9:.2f} GB in {target}/states")

    with Bar(screen) as progress, room(target, keep_states) as states:
        found = profile(
            network,
            tokenizer,
            content,
            tokens=tokens,
            metrics=instances,
            max_memory=None if max_memory is None else int(max_memory * 1e9),
            progress=progress,
            name=Path(model).name,
            source=str(Path(model).resolve()) if Path(model).exists() else model,
            states=states,
            maps=maps,
        )
        page = draw(found, screen, progress)
        folder = found.save(target, page)
    if as_json:
        json.dump({k: v for k, v in found.info.items() if k not in ("ids", "needle")}, sys.stdout, indent=2)
        print()
    else:
        show(found, screen)
    written = ", ".join(sorted(f"{p.name}/" if p.is_dir() else p.name for p in folder.iterdir()))
    screen.print(f"\nwritten: {folder}: {written}", soft_wrap=True)
    if page is not None:
        screen.print(f"{folder}/report.html", soft_wrap=True)


def draw(profile: Profile, screen: Console, progress: Bar) -> str | None:
    """The report; None when it cannot be made, for then the numbers must not be lost with it."""
    from rich.markup import escape

    from foveate.report import report

    progress("report", 0, 1)
    try:
        page = report(profile)
    except Exception as e:
        why = escape(f"{type(e).__name__}: {e}")
        screen.print(f"[yellow]no report.html[/]: {why}; try again with `foveate report`", soft_wrap=True)
        return None
    progress("report", 1, 1)
    return page


@contextmanager
def room(target: Path, wanted: bool) -> Iterator[Path | None]:
    """A folder beside the target that states can be written to, and moved from without a copy; gone afterwards."""
    if not wanted:
        yield None
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-states-", dir=target.parent) as folder:
        yield Path(folder)


def split_specs(metrics: str | None) -> list[str] | None:
    """`a,b:x=1,y=2,c` as `a`, `b:x=1,y=2`, `c`: a part with = but no : belongs to the metric before it."""
    if metrics is None:
        return None
    specs: list[str] = []
    for part in (p.strip() for p in metrics.split(",")):
        if "=" in part and ":" not in part and specs:
            specs[-1] += f",{part}"
        elif part:
            specs.append(part)
    return specs


def names_are_known(specs: list[str] | None) -> None:
    """A misspelt metric is told before a model is opened."""
    from foveate.core import registry
    from foveate.core.errors import unknown

    known = registry.names("measure")
    for spec in specs or []:
        if spec.partition(":")[0] not in known:
            raise unknown("metric", spec.partition(":")[0], known, "See `foveate list`.")


def read_texts(files: list[Path] | None) -> str:
    """The texts joined, or Python's own documentation."""
    if not files:
        from foveate.probe.text import default_text

        return default_text()
    parts = []
    for file in files:
        try:
            parts.append(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise BadInput(f"no such file: {file}; check the path given to --text") from None
        except IsADirectoryError:
            raise BadInput(f"{file} is a folder; give a text file with --text") from None
        except UnicodeDecodeError as e:
            raise BadInput(f"{file} is not UTF-8 (byte {e.start}); convert it, e.g. iconv -f latin1 -t utf-8") from None
        except OSError as e:
            raise BadInput(f"cannot read {file}: {e.strerror}; check the path given to --text") from None
        if not parts[-1].strip():
            raise BadInput(f"{file} is empty; give a text with words in it")
    return "\n\n".join(parts)


class Bar:
    """A progress bar with tokens per second, as the callback that `profile` wants."""

    def __init__(self, screen: Console) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.tasks: dict[str, Any] = {}
        self.progress = Progress(
            TextColumn("{task.description:<16}"),
            BarColumn(30),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[rate]:>14}"),
            TimeElapsedColumn(),
            console=screen,
            transient=True,
        )

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def __call__(self, what: str, done: float, total: float) -> None:
        if what not in self.tasks:
            self.tasks[what] = self.progress.add_task(what, total=total, rate="")
        task = next(t for t in self.progress.tasks if t.id == self.tasks[what])
        rate = f"{done / task.elapsed:,.0f} tokens/s" if what == "pass" and task.elapsed and done else ""
        self.progress.update(self.tasks[what], completed=done, rate=rate)


# ---------------------------------------------------------------- what a person sees


def show(profile: Profile, screen: Console) -> None:
    """The map of heads, and what it says in words."""
    from foveate.summary import sentences

    screen.print()
    screen.print(head_map(profile))
    screen.print(
        "  [red]S[/] first token takes over half   [blue]L[/] local: first token + last "
        f"{profile.summary['thresholds']['window']}   [bold green]R[/] retrieves   [dim]·[/] none of these"
    )
    screen.print()
    for sentence in sentences(profile.info):
        screen.print(f"• {sentence}")
    for name, why in profile.info["skipped"].items():
        screen.print(f"[yellow]skipped[/] {name}: {why}")
    info = profile.info
    screen.print(
        f"[dim]{info['tokens']:,} tokens in {info['seconds']['pass']:.1f} s ({info['tokens_per_second']:,.0f} per "
        f"second), all metrics {info['wall_time']:.1f} s, peak {info['peak_bytes'] / 1e9:.2f} GB[/]"
    )


def head_map(profile: Profile) -> Table:
    """One line per layer, one mark per head."""
    from rich import box
    from rich.table import Table

    columns = {
        "first_token_mass": ("first token", "{:.0%}"),
        "entropy": ("entropy (nats)", "{:.2f}"),
        "local_mass_distance": ("mean distance", "{:,.0f}"),
        "column_mass_top5": ("on top 5 % of keys", "{:.0%}"),
    }
    measured = {m: t.groupby("layer")["value"].mean() for m, t in profile.heads.groupby("metric") if m in columns}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", justify="right")
    table.add_column("heads", no_wrap=True)
    for name in columns:
        if name in measured:
            table.add_column(columns[name][0], justify="right")
    marks = marked(profile)
    for layer, group in profile.heads.groupby("layer"):
        line = " ".join(marks.get((layer, h), "[dim]·[/]") for h in sorted(group["head"].unique()))
        cells = [columns[m][1].format(measured[m].get(layer, float("nan"))) for m in columns if m in measured]
        table.add_row(str(layer), line, *cells)
    return table


def marked(profile: Profile) -> dict[tuple[int, int], str]:
    """The colour of each head; retrieval wins over local, local over sink."""
    marks: dict[tuple[int, int], str] = {}
    first = profile.heads[(profile.heads.metric == "first_token_mass") & (profile.heads.value > 0.5)]
    marks |= dict.fromkeys(zip(first.layer, first["head"], strict=True), "[red]S[/]")
    marks |= dict.fromkeys(map(tuple, profile.summary.get("local_heads", [])), "[blue]L[/]")
    marks |= {(n, h): "[bold green]R[/]" for n, h, _ in profile.summary.get("retrieval_heads", [])}
    return marks
