"""`foveate new`: the file of a new mechanism, with the parts to fill in.

The templates stand in `templates/` as VERB-ORDER-KIND; the first of a verb is taken where no kind is named. A new kind
needs one more file there and nothing else.
"""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from foveate.core.errors import BadInput, unknown

TEMPLATES = Path(__file__).with_name("templates")
NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


def command(
    verb: Annotated[str, typer.Argument(help="What it does: measure, steer, compress, …")],
    name: Annotated[str, typer.Argument(help="Its name in snake_case, which is also the file's.")],
    kind: Annotated[
        str | None, typer.Option(help="Which kind, for instance Metric or HeadEdit; default: the usual one.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--dir", help="Where to; default: src/foveate/VERB in a checkout, else here.")
    ] = None,
) -> None:
    """Write the file of a new mechanism: it runs as it stands, and its failing check says what to fill in."""
    template = chosen_template(verb, kind)
    check_name(name)
    checkout = Path("src", "foveate", verb)
    folder = folder or (checkout if checkout.is_dir() else Path())
    inside = folder.resolve().parts[-2:] == ("foveate", verb)
    file = folder / f"{name}.py"
    if not folder.is_dir():
        raise BadInput(f"no folder {folder}; make it, or give another one with --dir")
    if file.exists():
        raise BadInput(f"{file} is already there and is not overwritten; choose another name or --dir")
    module = f"foveate.{verb}" if inside else name
    file.write_text(written(template, name, module), encoding="utf-8")
    target = name if inside else file
    print(f"written: {file}")
    print(f"next:    fill in what is to be written there, then  foveate check {target}")
    if inside:
        print("then:    python -m foveate.catalogue, a changelog fragment, and make check")


def written(template: Path, name: str, module: str) -> str:
    """A template with its names filled in."""
    from foveate.core.registry import camel

    return Template(template.read_text(encoding="utf-8")).substitute(
        name=name, cls=camel(name), module=module, words=name.replace("_", " ").capitalize()
    )


def templates() -> dict[str, dict[str, Path]]:
    """The templates by verb and kind, the usual kind of each verb first."""
    found: dict[str, dict[str, Path]] = {}
    for file in sorted(TEMPLATES.glob("*-*-*.txt")):
        verb, _, kind = file.stem.split("-")
        found.setdefault(verb, {})[kind] = file
    return found


def chosen_template(verb: str, kind: str | None) -> Path:
    """The template of a kind.

    Raises:
        UnknownName: no such verb, or it has no such kind.
    """
    known = templates()
    if verb not in known:
        raise unknown("verb with templates", verb, known)
    kinds = known[verb]
    if kind is None:
        return next(iter(kinds.values()))
    for name, file in kinds.items():
        if name.lower() == kind.lower():
            return file
    raise unknown(f"kind of mechanism for {verb!r}", kind, kinds)


def check_name(name: str) -> None:
    """Whether a mechanism can be called so.

    Raises:
        BadInput: it is no snake_case name, or it is taken.
    """
    from foveate.core.registry import camel, where

    if not NAME.fullmatch(name):
        snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+", "_", name).strip("_").lower()
        guess = f"; did you mean {snake!r}?" if NAME.fullmatch(snake) else ", for instance value_drain"
        raise BadInput(f"{name!r} is no name for a mechanism: lower-case words with underscores between{guess}")
    if keyword.iskeyword(name) or name in where():
        what = "a word of Python" if keyword.iskeyword(name) else f"a mechanism of {where()[name][0]!r} already"
        raise BadInput(f"{name!r} is {what}; choose another name (see `foveate list`)")
    if any(camel(name) == kind for kinds in templates().values() for kind in kinds):
        raise BadInput(f"{name!r} would be the class {camel(name)}, which is a kind of mechanism; choose another name")
