"""`foveate check`: the common checks on one mechanism, ours or the user's own."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveate.core.errors import BadInput, unknown

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from foveate.core.mechanism import Mechanism
    from foveate.testing.checks import Outcome

MARKS = {"passed": "[green]✓[/]", "skipped": "[dim]–[/]", "known failure": "[yellow]~[/]", "failed": "[red]✗[/]"}


def command(
    target: Annotated[
        str, typer.Argument(help="A registered name, a class of yours as pkg.mod:MyEdit, or path/to/file.py[:MyEdit].")
    ],
    only: Annotated[list[str] | None, typer.Option(help="Only this check (may be repeated).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcomes as JSON.")] = False,
) -> None:
    """Run the common checks on a mechanism, at all its `test_params`; exit code 1 when one fails."""
    from rich.console import Console

    screen = Console(stderr=as_json, highlight=False)
    with screen.status(f"looking for {target} …"):
        cls = located(target)
        from foveate.testing.checks import CHECKS, chosen, examine

        names = chosen(cls, only)
    if not as_json:
        settings = f"{len(cls.test_params)} settings" if len(cls.test_params) > 1 else "1 setting"
        screen.print(f"[bold]{cls.__name__}[/]  [dim]{len(names)} checks, {settings}[/]")
    found: list[Outcome] = []
    for name in names:
        with screen.status(f"{name} …"):
            found.append(examine(cls, name))
        if not as_json:
            screen.print(line(found[-1], CHECKS[name].promise(cls)))
    if as_json:
        import json

        keys = ("check", "verdict", "why", "setting", "seconds")
        print(json.dumps([{k: getattr(o, k) for k in keys} for o in found], indent=2, ensure_ascii=False))
    else:
        unfit = [] if only else [c for c in CHECKS.values() if c.name not in names]
        close(screen, cls, found, unfit)
    if any(o.verdict == "failed" for o in found):
        raise typer.Exit(1)


def line(o: Outcome, promise: str) -> RenderableType:
    """Mark, name, and the promise that was kept, or what is wrong."""
    from rich.markup import escape
    from rich.table import Table

    words = {
        "passed": f"[dim]{escape(promise)}[/]",
        "skipped": f"[dim]skipped: {escape(o.why)}[/]",
        "known failure": f"known failure: {escape(o.why)}",
        "failed": f"{escape(o.why)} [dim]({escape(o.setting)})[/]",
    }
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(width=1)
    table.add_column(width=10, no_wrap=True)
    table.add_column(ratio=1)
    table.add_row(MARKS[o.verdict], o.check, words[o.verdict])
    return table


def close(screen: Console, cls: type[Mechanism], found: list[Outcome], unfit: list[Any]) -> None:
    """What does not fit this kind, and the sum of it all."""
    if unfit:
        screen.print(f"[dim]– not for a mechanism of this kind: {', '.join(c.name for c in unfit)}[/]")
    counts = {v: sum(o.verdict == v for o in found) for v in MARKS}
    parts = [f"{n} {verdict}{'s' if n > 1 and verdict == 'known failure' else ''}" for verdict, n in counts.items()]
    said = ", ".join(part for part, n in zip(parts, counts.values(), strict=True) if n)
    screen.print(f"{said} in {sum(o.seconds for o in found):.1f} s")
    failed = [o.check for o in found if o.verdict == "failed"]
    if failed:
        screen.print(f"one of them again: --only {failed[0]}")
    # what a mechanism says of itself can always be mended
    if set(failed) - {"form", "bounds", "table"}:
        screen.print(
            "what it cannot pass by its nature is declared on the class, with the reason: "
            f'known_failures: ClassVar = {{"{failed[-1]}": "…"}}',
            markup=False,
        )


# ---------------------------------------------------------------- finding the class


def located(target: str) -> type[Mechanism]:
    """The class that a target names.

    Raises:
        UnknownName: no mechanism or class of that name.
        BadInput: no such module, or what is there is no mechanism that can be checked.
    """
    where, _, name = target.partition(":")
    if not name and not where.endswith(".py") and "." not in where:
        from foveate.core import registry

        return registry.find(where)
    module = from_file(Path(where)) if where.endswith(".py") else from_name(where)
    from foveate.core.mechanism import Mechanism

    own = {
        n: c
        for n, c in inspect.getmembers(module, inspect.isclass)
        if issubclass(c, Mechanism) and c.__module__ == module.__name__
    }
    if not name:
        if len(own) != 1:
            raise BadInput(f"{where} defines {len(own)} mechanisms ({', '.join(own) or 'none'}); write {where}:CLASS")
        name = next(iter(own))
    if not hasattr(module, name):
        raise unknown(f"class of {where}", name, own or {"none"})
    return checkable(getattr(module, name), name)


def from_name(where: str) -> ModuleType:
    """A module by its dotted name, also from the current folder.

    Raises:
        BadInput: there is none, or it cannot be imported.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is not None and (where == error.name or where.startswith(f"{error.name}.")):
            raise BadInput(
                f"no module {where!r}, here or installed; write pkg.mod:MyEdit or path/to/file.py:MyEdit"
            ) from None
        raise not_imported(where, error) from error
    except Exception as error:
        raise not_imported(where, error) from error


def from_file(path: Path) -> ModuleType:
    """A module from a file; what stands beside it can be imported by it.

    Raises:
        BadInput: there is no such file, or it cannot be imported.
    """
    if not path.is_file():
        raise BadInput(f"no such file: {path}; check the path (now in {Path.cwd().name}/)")
    for folder in (str(Path.cwd()), str(path.resolve().parent)):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    # not under its own name: a file called like a module of somebody else must not take its place
    spec = importlib.util.spec_from_file_location(f"checked_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise not_imported(str(path), error) from error
    return module


def not_imported(where: str, error: Exception) -> BadInput:
    """The error for a module that raises one itself, with the place in it."""
    frames = traceback.extract_tb(error.__traceback__)
    # what it calls may be anybody's; the user's own line is the last one in a file of the user's
    at = [f for f in frames if Path.cwd() in Path(f.filename).parents or f is frames[0]][-1]
    hint = ": write @dataclass(frozen=True)" if "non-frozen dataclass" in str(error) else ""
    return BadInput(
        f"importing {where} fails with {type(error).__name__}: {error}{hint} (line {at.lineno} of "
        f"{Path(at.filename).name}; --debug shows the way there)"
    )


def checkable(cls: Any, name: str) -> type[Mechanism]:
    """The class, if it is a mechanism whose form lets the checks begin.

    Raises:
        BadInput: it is not; says what to add.
    """
    from foveate.core import mechanism
    from foveate.core.card import Card

    kinds = [c for c in vars(mechanism).values() if inspect.isclass(c) and issubclass(c, mechanism.Mechanism)]
    if not inspect.isclass(cls) or not issubclass(cls, mechanism.Mechanism):
        known = ", ".join(c.__name__ for c in kinds if c is not mechanism.Mechanism)
        raise BadInput(f"{name} is no mechanism; derive it from one of {known} (`foveate new` writes a beginning)")
    if cls in kinds:
        raise BadInput(f"{name} is a kind of mechanism and not one; name a class that is derived from it")
    params = vars(cls).get("__dataclass_params__")
    if params is None or not params.frozen:
        raise BadInput(f"{name} is no frozen dataclass; put @dataclass(frozen=True) above it")
    if not isinstance(getattr(cls, "card", None), Card):
        raise BadInput(f"{name} has no card; add `card: ClassVar = Card(...)`, as `foveate new` writes it")
    return cls
