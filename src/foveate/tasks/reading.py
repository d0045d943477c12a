"""Files of examples: JSON lines, the JSON of BIG-Bench Hard, and tables with a template."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.core.errors import BadInput
from foveate.tasks.examples import Example, check_choices, shown

__all__ = ["parse_columns", "parse_labels", "parse_template", "read"]

BBH_TEMPLATE = "Q: {input}\nA: {target}"
BBH_COLUMNS = {"input", "target"}
MOST_TARGETS = 10
"""A file whose targets are so few texts asks to choose among them; one with more asks for free answers."""
SHOWN_FAULTS = 5
OPTION = re.compile(r"^(\([A-Z]\)) ", re.MULTILINE)

Row = tuple[str, dict[str, Any] | str]
"""Where in the file, and what stands there by column; or, as a text, what is wrong with it."""


def read(
    path: str | os.PathLike[str],
    template: str | None = None,
    columns: Sequence[str] | None = None,
    labels: Mapping[str, str] | None = None,
    limit: int | None = None,
    seed: int | None = None,
) -> tuple[Example, ...]:
    r"""Reads a file of prompts with known answers; every line of it counts, or none.

    - `.jsonl`: lines `{"prompt": …, "choices": […], "answer": i}` or `{"prompt": …, "answer": "…"}`, where wanted with
      `"corrupted": …`; other keys are left alone. With a template: lines with any keys that the template uses.
    - `.json`: a list of the same objects, or the files of BIG-Bench Hard, `{"examples": [{"input", "target"}]}`. Their
      choices are the options of the input, "(A)" and so on, or else the targets of the whole file, if they are few.
      A template that opens the parenthesis, `"Q: {input}\nA: ({target}"`, has the bare letters as choices: mostly one
      token each, so that the model reads a prompt once and not once for each option.
    - `.csv`, and `.tsv`, in which quotation marks are like any other character: tables, with a template.

    Args:
        path: The file.
        template: How a prompt is made of the columns, for instance `"Review: {sentence}\nSentiment: {label}"`. It ends
            with the column that holds the answer. A space before that column goes to the answer, as most tokenizers
            want it, unless the answer brings its own.
        columns: Names of a table's columns; default: its first line has them.
        labels: The text for each value of the last column, for instance `{"0": "negative", "1": "positive"}`. These
            become the choices, in this order; without them the column's own text is a free answer.
        limit: At most so many examples.
        seed: Shuffles the examples before the limit, always in the same way; default: the order of the file.

    Raises:
        BadInput: the file cannot be read, a line is broken (the message has its number and the reason), or the
            template, columns and labels do not fit to it.
    """
    file = Path(path)
    if limit is not None and limit < 1:
        raise BadInput(f"limit={limit}: at least one example is needed.")
    rows, make = interpreted(file, template, columns, labels)
    examples, faults = [], []
    for place, row in rows:
        try:
            if isinstance(row, str):
                raise BadInput(row)
            examples.append(make(row))
        except BadInput as e:
            faults.append(f"{place}: {str(e).rstrip('.')}")
    if faults:
        some = f" (the first {SHOWN_FAULTS})" if len(faults) > SHOWN_FAULTS else ""
        raise BadInput(
            f"{file} cannot be read at {len(faults)} of {len(rows)} places{some}: {'; '.join(faults[:SHOWN_FAULTS])}. "
            "Mend or delete them; no example is left out silently."
        )
    if not examples:
        raise BadInput(f"{file} holds no examples.")
    if seed is not None:
        random.Random(seed).shuffle(examples)
    return tuple(examples[:limit])


def interpreted(
    file: Path, template: str | None, columns: Sequence[str] | None, labels: Mapping[str, str] | None
) -> tuple[list[Row], Callable[[dict[str, Any]], Example]]:
    """The rows of a file, and what makes an example of one."""
    kind = file.suffix.lower()
    if kind not in READERS:
        raise BadInput(f"{file}: a file of examples ends with {', '.join(READERS)}, not with {kind or 'nothing'!r}.")
    table = kind in (".csv", ".tsv")
    if columns is not None and not table:
        raise BadInput(f"{file}: its keys name the columns; columns={shown(list(columns))} is for .csv and .tsv.")
    rows = list(READERS[kind](file, text_of(file), columns))
    seen: set[str] = set().union(*(row for _, row in rows if not isinstance(row, str)))
    bbh = kind == ".json" and seen >= BBH_COLUMNS
    if template is None and bbh:
        template = BBH_TEMPLATE
    if template is None and labels is not None:
        raise BadInput(f"{file}: labels are for the last column of a template; give one, or leave the labels out.")
    if template is None and table:
        raise BadInput(
            f"{file}: a table needs a template that ends with the column of the answer, such as "
            f'"Review: {{sentence}}\\nSentiment: {{label}}"; its columns are {", ".join(sorted(seen))}.'
        )
    if template is None:
        return rows, from_object
    form = Template.parse(template)
    missing = sorted(form.columns - seen)
    if rows and seen and missing:
        hint = "; for a file without a line of names give columns" if table and columns is None else ""
        raise BadInput(
            f"{file} has no column {', '.join(map(repr, missing))}, which the template names; it has "
            f"{', '.join(shown(name) for name in sorted(seen))}{hint}."
        )
    if labels is not None:
        check_labels(labels)
        return rows, lambda row: form.choosing(row, labels)
    if bbh:
        few = few_targets(rows, form.answer)
        return rows, lambda row: form.choosing(row, options_in(row, form.opens) or few)
    return rows, lambda row: form.choosing(row, {})


def text_of(file: Path) -> str:
    """All of a file's text."""
    try:
        data = file.read_bytes()
        return data.decode("utf-8-sig")
    except OSError as e:
        raise BadInput(f"cannot read {file}: {e.strerror or e}.") from e
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise BadInput(f"{file}, line {line}: not UTF-8 ({e.reason}); save it as UTF-8.") from e


def json_lines(file: Path, text: str, columns: Sequence[str] | None) -> Iterator[Row]:
    """The objects of a file with one on each line; empty lines hold nothing."""
    # not splitlines: a JSON string may hold other line separators as they are
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"line {number}", an_object(json.loads(line))
            except json.JSONDecodeError as e:
                yield f"line {number}", f"no JSON, {e.msg} at column {e.colno}"
            except RecursionError:
                yield f"line {number}", "nested too deeply"


def json_whole(file: Path, text: str, columns: Sequence[str] | None) -> Iterator[Row]:
    """The objects of a list, which may stand under the name `examples`."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as e:
        hint = "; a file with one object on each line must be called .jsonl" if e.msg == "Extra data" else ""
        raise BadInput(f"{file}, line {e.lineno}: no JSON, {e.msg} at column {e.colno}{hint}.") from e
    except RecursionError as e:
        raise BadInput(f"{file} is nested too deeply.") from e
    listed = found.get("examples") if isinstance(found, dict) else found
    if not isinstance(listed, list):
        raise BadInput(f'{file} must hold a list of examples, or an object with such a list as "examples".')
    for number, value in enumerate(listed, start=1):
        yield f"example {number}", an_object(value)


def an_object(value: Any) -> dict[str, Any] | str:
    """The value if it is a JSON object, else what is wrong with it."""
    return value if isinstance(value, dict) else f"must be an object in braces, got {shown(value)}"


def comma_table(file: Path, text: str, columns: Sequence[str] | None) -> Iterator[Row]:
    """The rows of a table between commas, with quotation marks around a cell that holds commas or line ends."""
    yield from table(file, csv.reader(io.StringIO(text, newline=""), strict=True), columns)


def tab_table(file: Path, text: str, columns: Sequence[str] | None) -> Iterator[Row]:
    """The rows of a table between tabs, which know no quotation marks."""
    yield from table(file, csv.reader(io.StringIO(text, newline=""), csv.excel_tab, quoting=csv.QUOTE_NONE), columns)


def table(file: Path, reader: Any, columns: Sequence[str] | None) -> Iterator[Row]:
    """Rows by column; `reader` is one of the csv module."""
    names = None if columns is None else list(columns)
    while True:
        # a quoted cell may span lines: a row is where it starts
        place = f"line {reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            # behind a broken quotation the rest of the file cannot be told apart
            yield place, f"{e}; look for a quotation mark that is not closed or not doubled"
            return
        if names is None:
            names = cells
        elif cells:
            right = len(cells) == len(names)
            yield place, dict(zip(names, cells, strict=True)) if right else misfit(cells, names)
        if len(set(names)) < len(names) or not all(names):
            raise BadInput(
                f"{file}: columns must have different names, got {shown(names)}; "
                "for a file without a line of names give columns."
            )


def misfit(cells: list[str], names: list[str]) -> str:
    """What is wrong with a row of the wrong width."""
    return f"{len(cells)} cells instead of {len(names)} ({', '.join(names)})"


READERS: dict[str, Callable[[Path, str, Sequence[str] | None], Iterator[Row]]] = {
    ".jsonl": json_lines,
    ".json": json_whole,
    ".csv": comma_table,
    ".tsv": tab_table,
}


def from_object(row: dict[str, Any]) -> Example:
    """The example that an object of our own form holds."""
    missing = [key for key in ("prompt", "answer") if key not in row]
    if missing:
        raise BadInput(f"has no {' and no '.join(map(repr, missing))}, only {shown(sorted(row))}")
    choices = row.get("choices", [])
    if not isinstance(choices, list):
        raise BadInput(f"choices must be a list of texts, got {shown(choices)}")
    return Example(row["prompt"], tuple(choices), row["answer"], row.get("corrupted", ""))


@dataclass(frozen=True)
class Template:
    """How a prompt and its answer are made of the columns of a row.

    Args:
        parts: Literal texts, each with the column that follows it.
        gap: The spaces before the answer, which go to it.
        answer: The column that holds the answer.
    """

    parts: tuple[tuple[str, str | None], ...]
    gap: str
    answer: str

    @classmethod
    def parse(cls, text: str) -> Template:
        """Reads a template; doubled braces stand for themselves.

        Raises:
            BadInput: a brace is left open, the last thing is no column, or the column of the answer occurs before.
        """
        try:
            parsed = list(string.Formatter().parse(text))
        except ValueError as e:
            raise BadInput(f"template {shown(text)}: {e}; a brace that is meant to be one is doubled.") from e
        for _, column, form, conversion in parsed:
            if column == "" or form or conversion:
                raise BadInput(f"template {shown(text)}: write a column as its name in braces and no more.")
        answer = parsed[-1][1] if parsed else None
        if answer is None:
            raise BadInput(f"template {shown(text)} must end with the column of the answer, such as {{label}}.")
        if any(column == answer for _, column, _, _ in parsed[:-1]):
            raise BadInput(f"template {shown(text)} gives the answer away: {{{answer}}} may only stand at its end.")
        last = parsed[-1][0]
        parts = [(literal, column) for literal, column, _, _ in parsed[:-1]] + [(last.rstrip(" "), None)]
        return cls(tuple(parts), last[len(last.rstrip(" ")) :], answer)

    @property
    def opens(self) -> bool:
        """Whether the answer stands behind an open parenthesis."""
        return self.parts[-1][0].endswith("(")

    @property
    def columns(self) -> set[str]:
        """All columns that are used."""
        return {self.answer, *(column for _, column in self.parts if column is not None)}

    def choosing(self, row: dict[str, Any], labels: Mapping[str, str]) -> Example:
        """The example of a row: a choice among the labels, or a free answer where there are none."""
        filled = [literal + ("" if column is None else cell(row, column)) for literal, column in self.parts]
        prompt, value = "".join(filled), cell(row, self.answer)
        if not labels:
            return Example(prompt, (), self.spaced(value))
        if value not in labels:
            raise BadInput(f"{self.answer} is {shown(value)}, which is none of {', '.join(map(repr, labels))}")
        return Example(prompt, tuple(map(self.spaced, labels.values())), list(labels).index(value))

    def spaced(self, text: str) -> str:
        """The answer with the template's spaces before it, unless it brings its own."""
        return text if text[:1].isspace() else self.gap + text


def cell(row: dict[str, Any], column: str) -> str:
    """The text in a column of a row."""
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadInput(f"{column} must be a text or a number, got {shown(value) if column in row else 'nothing'}")
    return str(value)


def options_in(row: dict[str, Any], opened: bool) -> dict[str, str]:
    """The options, "(A)" and so on, that an input of BIG-Bench Hard lists; bare letters behind an open parenthesis."""
    _, _, listed = str(row.get("input")).partition("\nOptions:\n")
    return {option: option.strip("()") if opened else option for option in OPTION.findall(listed)}


def few_targets(rows: Sequence[Row], column: str) -> dict[str, str]:
    """The targets of a whole file, if they are so few and come so often that they are meant to be chosen from."""
    found = [str(row.get(column)) for _, row in rows if not isinstance(row, str)]
    different = sorted(set(found))
    few = 2 <= len(different) <= min(MOST_TARGETS, len(found) // 2)
    return {text: text for text in different} if few else {}


def parse_labels(text: str) -> dict[str, str]:
    """Labels as they are typed: `"0=negative,1=positive"`.

    A part that holds a comma stands in quotation marks: `'0=no,"1=yes, of course"'`.

    Raises:
        BadInput: a part has no `=`, a value comes twice, or the texts are not two or more that differ.
    """
    labels: dict[str, str] = {}
    for part in parts_of(text, "labels"):
        value, equals, label = part.partition("=")
        if not equals or value.strip() in labels:
            reason = "comes twice" if equals else "has no '='"
            raise BadInput(f"labels {shown(text)}: {shown(part)} {reason}; write them as 0=negative,1=positive.")
        labels[value.strip()] = label
    check_labels(labels)
    return labels


def check_labels(labels: Mapping[str, str]) -> None:
    """Raises unless there is something to choose from."""
    try:
        if not labels:
            raise BadInput("there are none.")
        check_choices(list(labels.values()))
    except BadInput as e:
        raise BadInput(f"labels {shown(dict(labels))}: {e}") from e


def parse_columns(text: str) -> list[str]:
    """Columns as they are typed: `"label,sentence"`."""
    return [part.strip() for part in parts_of(text, "columns")]


def parse_template(text: str) -> str:
    r"""A template as it is typed, in which `\n` and `\t` are written with a backslash."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def parts_of(text: str, what: str) -> list[str]:
    """The parts of a text between commas."""
    try:
        return next(csv.reader([text], strict=True), [])
    except csv.Error as e:
        raise BadInput(f"{what} {shown(text)}: {e}.") from e
