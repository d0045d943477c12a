"""The catalogue: `catalog.json`, generated from cards, docstrings and claims, so that listing does not wait for torch.

`python -m foveate.catalogue` writes it again, and the table of verdicts beside the claims' scripts; a test fails when
either is stale.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections import Counter
from pathlib import Path
from typing import Any

from foveate.core import registry
from foveate.core.errors import BadInput, unknown

__all__ = ["FILE", "VERDICTS", "Doc", "entries", "find", "generate", "read", "verdicts"]

FILE = Path(__file__).with_name("catalog.json")
# only in a checkout: an installed package has what stood there when the catalogue was written
CLAIMS = Path(__file__).parents[2] / "bench" / "claims" / "results"
VERDICTS = CLAIMS.with_name("README.md")
# what schedules give an account of: one head in float32, with 32 KB, 1 MB and 32 MB of fast memory
LENGTH, WIDTH, ITEMSIZE = 8192, 64, 4
MEMORIES = (32 << 10, 1 << 20, 32 << 20)


def entries() -> list[dict[str, Any]]:
    """One object per mechanism, ordered by verb and name."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def find(name: str) -> dict[str, Any]:
    """The object of one mechanism.

    Raises:
        UnknownName: no mechanism is called so.
    """
    known = {e["name"]: e for e in entries()}
    if name not in known:
        raise unknown("mechanism", name, known, "See `foveate list`.")
    return known[name]


def generate() -> list[dict[str, Any]]:
    """The entries, from the classes themselves.

    Raises:
        BadInput: the results of the claims are not there.
    """
    if not CLAIMS.is_dir():
        raise BadInput(f"no folder {'/'.join(CLAIMS.parts[-3:])}: the catalogue is generated in a checkout of foveate")
    return [entry(verb, name) for verb in registry.VERBS for name in registry.names(verb)]


def entry(verb: str, name: str) -> dict[str, Any]:
    cls = registry.find(name)
    card, doc = cls.card, read(cls)
    summary, _, details = doc.text.partition("\n\n")
    return {
        "name": name,
        "verb": verb,
        "kind": kind(cls),
        "family": card.family,
        "title": card.title,
        "year": card.year,
        "needs": card.needs.names(),
        "equation": card.equation,
        "differs": card.differs,
        "claims": [claim(c) for c in card.claims],
        "summary": " ".join(summary.split()),
        "details": details,
        "use": card.use,
        "misleads": card.misleads,
        "known_failures": cls.known_failures,
        "sampled": card.sampled,
        "class": f"{cls.__module__}.{cls.__name__}",
        "params": [param(f, doc.args.get(f.name, "")) for f in dataclasses.fields(cls)],
        "example": doc.example,
        "example_shows": doc.example_shows,
    } | account(cls)


@dataclasses.dataclass(frozen=True)
class Doc:
    """The sections of a docstring.

    Args:
        text: What stands before the sections, and between them.
        args: What each argument means.
        example: The doctest of the section `Example:`.
        example_shows: The words before it.
    """

    text: str
    args: dict[str, str]
    example: str
    example_shows: str


def read(thing: Any) -> Doc:
    """The docstring of a class or function, taken apart."""
    from griffe import Docstring, DocstringSectionKind

    text: list[str] = []
    args: dict[str, str] = {}
    example = ""
    for section in Docstring(inspect.cleandoc(thing.__doc__ or ""), parser="google").parse(warnings=False):
        if section.kind is DocstringSectionKind.text:
            text.append(section.value)
        elif section.kind is DocstringSectionKind.parameters:
            args |= {p.name: " ".join(p.description.split()) for p in section.value}
        elif section.kind is DocstringSectionKind.admonition and section.value.kind == "example":
            example = section.value.contents
    words, mark, code = example.partition(">>>")
    return Doc("\n\n".join(text), args, f"{mark}{code}".strip(), " ".join(words.split()))


def kind(cls: type) -> str:
    """The kind as the vocabulary has it, for instance `Metric` or `Rule`: what stands right under `Mechanism`.

    Operators are of three kinds, which stand one step lower.
    """
    from foveate.core.mechanism import Mechanism
    from foveate.core.rule import Operator

    return next(c.__name__ for c in cls.__mro__ if {Mechanism, Operator} & {*c.__bases__} and c is not Operator)


def param(field: dataclasses.Field, meaning: str) -> dict[str, Any]:
    """A parameter: its default (None where one must be given), what it may be, and what it means."""
    from foveate.core.budget import Budget

    default = None if field.default is dataclasses.MISSING else field.default
    if isinstance(default, Budget):
        default = {"code": repr(default)}
    bounds = field.metadata.get("bounds")
    return {"name": field.name, "default": default, "bounds": str(bounds) if bounds else "any", "meaning": meaning}


def claim(name: str) -> dict[str, str]:
    """What was found when a claim was tested."""
    file = CLAIMS / f"{name}.json"
    if not file.is_file():
        return {"name": name, "verdict": "not run", "claim": "", "title": "", "command": ""}
    result = json.loads(file.read_text(encoding="utf-8"))
    return {"name": name} | {key: result[key] for key in ("verdict", "claim", "title", "command")}


def verdicts() -> str:
    """The claims that were tested, as the Markdown of `VERDICTS`: their number by verdict, then a line for each."""
    found = [(file.stem, json.loads(file.read_text(encoding="utf-8"))) for file in sorted(CLAIMS.glob("*.json"))]
    count = Counter(result["verdict"] for _, result in found)
    counts = f"Of {len(found)} claims {count['holds']} hold, {count['partly']} hold in part and {count['fails']} fail."
    if others := len(found) - count["holds"] - count["partly"] - count["fails"]:
        counts += f" {others} cannot be tested here."
    return "\n".join(
        [
            "# Claims of papers, tested",
            "",
            counts,
            "[What the verdicts mean](../../docs/claims.md). `python bench/claims/NAME.py` tests a claim again.",
            "",
            "| claim | verdict | paper |",
            "|---|---|---|",
            *(
                f"| {result['claim']} [{name}](results/{name}.json) | {result['verdict']} | {result['title']} |"
                for name, result in found
            ),
            "",
        ]
    )


def account(cls: type) -> dict[str, list[dict[str, Any]]]:
    """What a schedule moves with some sizes of fast memory, in bytes; nothing for the other kinds."""
    from foveate.core.errors import FoveateError
    from foveate.core.mechanism import Schedule
    from foveate.core.traffic import Shape, lower_bound, regime

    if not issubclass(cls, Schedule):
        return {}
    shape, found = Shape(LENGTH, LENGTH, WIDTH), []
    for memory in MEMORIES:
        fast = memory // ITEMSIZE
        one = {"memory": memory, "least": lower_bound(shape, fast) * ITEMSIZE, "regime": regime(shape, fast)}
        try:
            one["moved"] = cls().traffic(shape, fast).bytes(ITEMSIZE)
        except FoveateError as why:
            one["why"] = str(why)
        found.append(one)
    return {"traffic": found}


if __name__ == "__main__":
    FILE.write_text(json.dumps(generate(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{FILE.name}: {len(entries())} mechanisms")
    VERDICTS.write_text(verdicts(), encoding="utf-8")
