"""The generated pages, as Markdown: from the catalogue, the classes, the claims' results and the benchmarks."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import pictures
from griffe import Docstring, DocstringSectionKind
from svg import figure_element

from foveate import catalogue
from foveate.core.card import Needs

__all__ = [
    "HEADINGS",
    "benchmarks",
    "changelog",
    "claims",
    "decisions",
    "errors",
    "families",
    "mechanism",
    "mechanisms",
    "metrics",
    "needs",
    "reductions",
    "verb_page",
]

ROOT = Path(__file__).parents[2]
HEADINGS = (
    "What it does",
    "Equation",
    "Parameters",
    "When to use",
    "Known problems",
    "Differs from the paper",
    "Claims",
    "Example",
    "Reference",
)
VERBS = {
    "measure": "reads rows and returns a number per head or per key",
    "steer": "changes where a running model looks, what its heads, layers and experts give, or the text that it reads",
    "compress": "says which keys a head keeps, or visits",
    "replace": "stands in a model as its attention",
    "select": "chooses data with what heads know",
}
MARKS = {"holds": "●", "partly": "◐", "fails": "○", "not testable here": "–"}

Entry = dict[str, Any]


@cache
def entries() -> tuple[Entry, ...]:
    return tuple(catalogue.entries())


@cache
def results() -> dict[str, dict[str, Any]]:
    """What the claim scripts wrote, by the script's name."""
    folder = ROOT / "bench" / "claims" / "results"
    return {f.stem: json.loads(f.read_text(encoding="utf-8")) for f in sorted(folder.glob("*.json"))}


def class_of(entry: Entry) -> type:
    module, _, name = entry["class"].rpartition(".")
    return getattr(importlib.import_module(module), name)


def link(entry: Entry, up: str = "") -> str:
    return f"[`{entry['name']}`]({up}{entry['verb']}/{entry['name']}.md)"


def cell(text: str) -> str:
    """Text that may stand in a table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def plain(text: str) -> str:
    """Text from a card: brackets, stars and underscores in it are no Markdown, names with underscores are code."""

    def escaped(found: re.Match[str]) -> str:
        if found[1]:
            return found[1]
        return f"`{found[2]}`" if found[2] else f"\\{found[3]}"

    return re.sub(r"(`[^`]*`)|\b([a-z]+(?:_[a-z\d]+)+)\b|([\[\]*_<>])", escaped, cell(text))


def sentence(text: str) -> str:
    """A card's phrase as a sentence."""
    text = text.strip()
    text = text if re.match(r"[A-Z]?[a-z]*[_`A-Z0-9]", text) else text[:1].upper() + text[1:]
    return text if text.endswith(".") else f"{text}."


def table(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# ---------------------------------------------------------------- one mechanism


def mechanism(entry: Entry) -> str:
    """The page of one mechanism; its headings are always the same."""
    cls = class_of(entry)
    about, params, errors = documented(cls)
    sections = (
        what_it_does(cls, about),
        equation(entry),
        parameters(entry, params, errors),
        sentence(entry["use"]),
        problems(entry, cls),
        sentence(plain(entry["differs"])),
        claims_of(entry),
        example(entry),
        reference(entry, cls),
    )
    parts = [f"# {entry['name']}", f"{entry['verb']} · {entry['kind']} · {entry['family']} · reads {reads(entry)}"]
    parts += [f"## {heading}\n\n{text}" for heading, text in zip(HEADINGS, sections, strict=True)]
    return "\n\n".join(parts) + "\n"


def reads(entry: Entry) -> str:
    return ", ".join(entry["needs"]) + (" of a sample of rows" if entry["sampled"] else "")


def documented(cls: type) -> tuple[str, dict[str, str], list[tuple[str, str]]]:
    """The text of a class's docstring, what it says of each parameter, and what it raises."""
    about, params, errors = [], {}, []
    # read from the class, as `inspect.getdoc` would give a parent's text to a class without one
    for section in Docstring(cls.__doc__ or "", parser="google").parse(warnings=False):
        if section.kind is DocstringSectionKind.text:
            about.append(section.value)
        elif section.kind is DocstringSectionKind.parameters:
            params |= {p.name: p.description for p in section.value}
        elif section.kind is DocstringSectionKind.raises:
            errors += [(str(r.annotation), r.description) for r in section.value]
    return "\n\n".join(about), params, errors


def what_it_does(cls: type, about: str) -> str:
    parts = [about]
    for drawn in (pictures.picture(cls), pictures.measured(name_of(cls))):
        if drawn is not None:
            parts.append(figure_element(*drawn))
    return "\n\n".join(parts)


def name_of(cls: type) -> str:
    return cls.__module__.rpartition(".")[2]


def equation(entry: Entry) -> str:
    lines = re.split(r";\s+", entry["equation"])
    return "\n".join(["```text", *lines, "```"])


def parameters(entry: Entry, described: dict[str, str], errors: list[tuple[str, str]]) -> str:
    if not entry["params"]:
        text = "None."
    else:
        text = table(
            ["name", "default", "bounds", "meaning"],
            [
                [f"`{p['name']}`", default_of(p), cell(p["bounds"]), cell(described.get(p["name"], ""))]
                for p in entry["params"]
            ],
        )
    if errors:
        text += "\n\nRaises\n\n" + "\n".join(f"- `{kind}`: {cell(why)}" for kind, why in errors)
    return text


def default_of(param: Entry) -> str:
    """A parameter's default as code; a dash where it must be given."""
    default = param["default"]
    if isinstance(default, dict):
        return f"`{cell(default['code'])}`"
    if default is None:
        return "–"
    # a text may be empty, or begin with a line break
    return f"`{cell(repr(default) if isinstance(default, str) else default)}`"


def problems(entry: Entry, cls: type) -> str:
    """When it misleads, and the common checks that it cannot pass."""
    parts = [sentence(plain(entry["misleads"])) if entry["misleads"] else "Nothing known."]
    if cls.known_failures:
        lines = [f"- `{check}`: {plain(why)}" for check, why in cls.known_failures.items()]
        parts.append("Common checks that it cannot pass:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def claims_of(entry: Entry) -> str:
    lines = []
    for name in claim_names(entry):
        if name in results():
            r = results()[name]
            verdict = f"[{MARKS[r['verdict']]} {r['verdict']}](../../claims.md#{name.replace('_', '-')})"
            lines.append([plain(r["claim"]), verdict])
        else:
            lines.append([f"`{name}`", "not run"])
    return table(["claim", "verdict"], lines) if lines else "None tested yet."


def claim_names(entry: Entry) -> list[str]:
    """The claims of a card; their results are read from the files, which are never older than the catalogue."""
    return [c if isinstance(c, str) else c["name"] for c in entry["claims"]]


def example(entry: Entry) -> str:
    """The example of the docstring, which the tests run: what it shows, then the code with what it prints."""
    about, mark, code = entry["example"].partition(">>>")
    return f"{about.strip()}\n\n```pycon\n{mark}{code.rstrip()}\n```"


def reference(entry: Entry, cls: type) -> str:
    line = f"`{entry['class']}`, in `src/{cls.__module__.replace('.', '/')}.py`."
    lines = [f"*{plain(entry['title'])}* ({entry['year']}).", line]
    if entry["verb"] == "measure":
        lines.append(f"On the command line: `foveate profile MODEL --metrics {entry['name']}`.")
    return "\n\n".join(lines)


# ---------------------------------------------------------------- lists of mechanisms


def grouped(chosen: list[Entry], key: str) -> dict[str, list[Entry]]:
    groups: dict[str, list[Entry]] = defaultdict(list)
    for entry in chosen:
        groups[entry[key]].append(entry)
    return dict(sorted(groups.items()))


def listed(chosen: list[Entry], up: str = "") -> str:
    return table(["mechanism", "what it does"], [[link(e, up), cell(e["summary"])] for e in chosen])


def present_verbs() -> list[str]:
    """The verbs that have mechanisms, in the order of the vocabulary."""
    return [verb for verb in VERBS if any(e["verb"] == verb for e in entries())]


def mechanisms() -> str:
    """All mechanisms by verb."""
    parts = [
        "# Mechanisms",
        "Each mechanism is one file, and its page is made from that file: the equation, the bounds of the "
        "parameters, the places where it departs from its paper, and a picture that the mechanism draws by running on "
        "a fixed small input. By family: [families](families.md). On the command line: `foveate list` and "
        "`foveate show NAME`.",
    ]
    for verb in present_verbs():
        chosen = [e for e in entries() if e["verb"] == verb]
        parts += [f"## {verb}", f"A mechanism here {VERBS[verb]}.", listed(chosen)]
    return "\n\n".join(parts) + "\n"


def verb_page(verb: str) -> str:
    """The mechanisms of one verb, by family."""
    parts = [f"# {verb}", f"A mechanism here {VERBS[verb]}."]
    for family, chosen in grouped([e for e in entries() if e["verb"] == verb], "family").items():
        parts += [f"## {family}", listed(chosen, "../")]
    return "\n\n".join(parts) + "\n"


def families() -> str:
    """All mechanisms by family."""
    parts = ["# Families", "A family is a group of mechanisms that ask the same question."]
    for family, chosen in grouped(list(entries()), "family").items():
        parts += [f"## {family}", listed(chosen)]
    return "\n\n".join(parts) + "\n"


def metrics() -> str:
    """What each metric computes, and when its number misleads."""
    lines = [
        [
            f"[`{e['name']}`](mechanisms/measure/{e['name']}.md)",
            f"`{' '.join(e['equation'].split())}`",
            sentence(plain(e["misleads"])) if e["misleads"] else "Nothing known.",
        ]
        for e in entries()
        if e["verb"] == "measure"
    ]
    return table(["metric", "definition", "when it misleads"], lines)


def reductions() -> str:
    """The reductions, from their docstrings."""
    from foveate.core import reductions as module

    kinds = [getattr(module, n) for n in module.__all__]
    kinds = [k for k in kinds if isinstance(k, type) and issubclass(k, module.Reduction) and k is not module.Reduction]
    lines = []
    for k in kinds:
        about, _, _ = documented(k)
        shape = {"row": "per row", "column": "per key", "sample": "whole rows"}[k.axis]
        args = ", ".join(f.name for f in dataclasses.fields(k))
        lines.append([f"`{k.__name__}({args})`", shape, cell(about.split("\n\n")[0])])
    return table(["reduction", "gives", "what it is"], lines)


def errors() -> str:
    """The tree of exceptions, as its module draws it."""
    from foveate.core import errors as module

    about, _, tree = (module.__doc__ or "").strip().partition("\n\n")
    return f"{about}\n\n```text\n{tree}\n```"


def needs() -> str:
    """What a card may say that a mechanism reads."""
    return ", ".join(f"`Needs.{n.name}`" for n in Needs)


# ---------------------------------------------------------------- evidence


def claims() -> str:
    """All claims with their verdicts, then each with its numbers."""
    head = [
        [f"[{cell(r['claim'])}](#{name.replace('_', '-')})", f"{MARKS[r['verdict']]} {r['verdict']}"]
        for name, r in results().items()
    ]
    parts = [table(["claim", "verdict"], head)]
    for name, r in results().items():
        users = [e for e in entries() if name in claim_names(e)]
        of = ", ".join(link(e, "mechanisms/") for e in users) or "no mechanism's card"
        facts = [
            f"## {name.replace('_', ' ')} {{ #{name.replace('_', '-')} }}",
            f"**{MARKS[r['verdict']]} {r['verdict']}.** {plain(r['claim'])}",
            f"Paper: *{plain(r['title'])}*. Claimed by {of}.",
        ]
        if "rule" in r:
            facts.append(f"Rule for the verdict: {plain(r['rule'])}.")
        seeds = ", ".join(map(str, r["seeds"]))
        facts.append(f"Model {r.get('model', 'not named')}, seeds {seeds}. Run it again: `{r['command']}`.")
        for title, tree in (("Numbers", r["numbers"]), ("Control", r["control"])):
            body = "\n".join(
                f'<tr><td style="padding-left:{depth + 0.5}em">{k}</td><td>{v}</td></tr>'
                for depth, k, v in leaves(tree)
            )
            facts.append(
                f'??? note "{title}"\n\n    <table>\n' + re.sub("^", "    ", body, flags=re.M) + "\n    </table>"
            )
        parts.append("\n\n".join(facts))
    return "\n\n".join(parts) + "\n"


def leaves(tree: Any, depth: int = 0) -> list[tuple[int, str, str]]:
    """A result's numbers, line by line: depth, name, value with its interval."""
    found: list[tuple[int, str, str]] = []
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, dict) and "value" not in value:
            found += [(depth, text_of(key), ""), *leaves(value, depth + 1)]
        else:
            found.append((depth, text_of(key), text_of(shown(value))))
    return found


def shown(value: Any) -> str:
    if isinstance(value, dict):
        text = f"{value['value']:g}"
        if "low" in value:
            text += f" ({value['low']:g} to {value['high']:g})"
        count = f"{value['hits']} of {value['n']}" if "hits" in value else f"n = {value['n']}" if "n" in value else ""
        return f"{text}, {count}" if count else text
    if isinstance(value, list) and value and isinstance(value[0], list):
        return "; ".join(shown(v) for v in value)
    if isinstance(value, list):
        return ", ".join(shown(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def text_of(value: Any) -> str:
    return str(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def benchmarks() -> str:
    """The reports of the benchmark scripts, as they are in the repository."""
    files = sorted((ROOT / "bench" / "results").glob("*.md"))
    # each report becomes a section of one page
    return "\n\n".join(re.sub(r"^(#+) ", r"#\1 ", f.read_text(encoding="utf-8"), flags=re.M) for f in files)


def decisions() -> str:
    """The decisions with their dates, newest last."""
    lines = []
    for file in sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md")):
        title, _, rest = file.read_text(encoding="utf-8").partition("\n")
        date = re.search(r"\d{4}-\d\d-\d\d", rest)
        lines.append([f"[{title.lstrip('# ')}]({file.name})", date[0] if date else ""])
    about = "A decision that shapes the code is a note of half a page. Ideas that failed are written down, too."
    return f"# Decisions\n\n{about}\n\n{table(['decision', 'date'], lines)}\n"


def changelog() -> str:
    """The changelog, with what is not released yet."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    fragments = sorted((ROOT / "changelog.d").glob("[!.]*.md"))
    if not fragments:
        return text
    lines = "\n".join(f"- {f.suffixes[0][1:]}: {' '.join(f.read_text(encoding='utf-8').split())}" for f in fragments)
    head, mark, rest = text.partition("<!-- towncrier release notes start -->\n")
    return f"{head}{mark}\n## Not released yet\n\n{lines}\n{rest}"
