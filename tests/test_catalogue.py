"""What the catalogue says of each mechanism, and the examples in it, which run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from dataclasses import dataclass
from typing import ClassVar

import pytest

import foveate
from foveate import catalogue
from foveate.core.errors import BadInput, UnknownName
from foveate.core.mechanism import HeadEdit, PromptEdit
from foveate.core.registry import find, names

# an example stands two columns in from the edge of a terminal
WIDTH = 78


def failures(name: str, text: str) -> list[str]:
    """What the doctests of a text print instead of what they say."""
    runner, said = doctest.DocTestRunner(verbose=False), []
    runner.run(doctest.DocTestParser().get_doctest(text, {}, name, None, 0), out=said.append)
    return said


@pytest.mark.parametrize("name", names())
def test_every_mechanism_has_an_example_that_runs(name: str) -> None:
    text = catalogue.read(find(name)).example
    examples = doctest.DocTestParser().get_examples(text)
    assert examples, f"{name} has no section `Example:` with a doctest in its docstring"
    assert any(e.want for e in examples), "an example shows what comes out"
    doors = (
        "foveate.attach(",
        ".measure(",
        "foveate.convert(",
        "foveate.nn.Attention(",
        *([").edit("] if issubclass(find(name), PromptEdit) else []),
    )
    assert any(door in text for door in doors), "an example goes through the public door"
    assert f"import {find(name).__name__}" in text, "an example can be copied as it stands"
    assert max(map(len, text.splitlines())) <= WIDTH
    assert catalogue.read(find(name)).example_shows.endswith("."), "an example says what there is to see"
    assert failures(name, text) == []


def modules() -> list[str]:
    """All modules of the package but those of mechanisms, whose examples run above."""
    found = pkgutil.walk_packages(foveate.__path__, "foveate.")
    mechanisms = {find(name).__module__ for name in names()}
    return [m.name for m in found if m.name not in mechanisms]


@pytest.mark.parametrize("module", modules())
def test_doctests_elsewhere_run(module: str) -> None:
    for test in doctest.DocTestFinder().find(importlib.import_module(module)):
        if test.examples:
            assert failures(test.name, test.docstring) == []


def test_an_example_with_another_result_is_caught() -> None:
    assert failures("right", ">>> 1 + 1\n2\n") == []
    assert "Expected" in "".join(failures("wrong", ">>> 1 + 1\n3\n"))
    assert "ZeroDivisionError" in "".join(failures("raises", ">>> 1 / 0\n"))


# ---------------------------------------------------------------- what an entry is made of


@dataclass(frozen=True)
class Halved(HeadEdit):
    """Halves what heads write.

    A second paragraph,
    of two lines.

    Args:
        by: What to divide by,
            and why.

    Example:
        Some words.

        >>> 1 + 1
        2

    Raises:
        Nothing: never.
    """

    by: float = 2.0
    card: ClassVar = find("entropy").card


def test_the_example_is_cut_out_of_the_docstring() -> None:
    doc = catalogue.read(Halved)
    assert (doc.example, doc.example_shows) == (">>> 1 + 1\n2", "Some words.")
    silent = catalogue.read(type("Silent", (), {}))
    assert (silent.example, silent.example_shows, silent.text) == ("", "", "")


def test_an_entry_says_what_parameters_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue.registry, "find", lambda name: Halved)
    e = catalogue.entry("steer", "halved")
    assert e["kind"] == "HeadEdit"
    assert e["summary"] == "Halves what heads write."
    assert "A second paragraph" in e["details"]
    assert "by:" not in e["details"]
    assert e["params"] == [{"name": "by", "default": 2.0, "bounds": "any", "meaning": "What to divide by, and why."}]


@pytest.mark.parametrize("entry", catalogue.entries(), ids=lambda e: e["name"])
def test_entries_are_complete(entry: dict) -> None:
    for key in ("summary", "title", "equation", "use", "misleads", "differs", "example"):
        assert entry[key].strip(), f"{key} is empty"
    for param in entry["params"]:
        assert param["meaning"], f"{param['name']} is not in the section `Args:`"
    for claim in entry["claims"]:
        assert claim["verdict"] in ("holds", "partly", "fails", "not testable here", "not run")
    assert [c["name"] for c in entry["claims"]] == list(find(entry["name"]).card.claims)


def test_claims_come_with_their_verdicts(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    claim = catalogue.claim("heavy_hitters")
    assert claim["verdict"] == "partly"
    assert claim["claim"].startswith("A small portion of the tokens")
    assert claim["command"] == "python bench/claims/heavy_hitters.py"
    monkeypatch.setattr(catalogue, "CLAIMS", tmp_path)
    assert catalogue.claim("heavy_hitters")["verdict"] == "not run"
    monkeypatch.setattr(catalogue, "CLAIMS", tmp_path / "none")
    with pytest.raises(BadInput, match="in a checkout"):
        catalogue.generate()


def test_verdicts_stand_beside_the_scripts_and_in_the_readme(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """What GitHub shows in the folder of the claims, and the excerpt of it, say what the results say."""
    assert catalogue.VERDICTS.read_text() == catalogue.verdicts(), "run python -m foveate.catalogue"
    readme = (catalogue.CLAIMS.parents[2] / "README.md").read_text()
    assert catalogue.verdicts().splitlines()[2].rstrip(".") in readme
    excerpt = re.findall(r"^\| (.+) \[(\w+)\]\(bench/claims/results/\2\.json\) \| (.+) \|$", readme, re.M)
    assert len(excerpt) > 5
    for words, name, verdict in excerpt:
        found = catalogue.claim(name)
        assert (words, verdict) == (found["claim"], found["verdict"])
    (tmp_path / "one.json").write_text('{"claim": "It is so.", "verdict": "not testable here", "title": "On it"}')
    monkeypatch.setattr(catalogue, "CLAIMS", tmp_path)
    assert "Of 1 claims 0 hold, 0 hold in part and 0 fail. 1 cannot be tested here." in catalogue.verdicts()
    assert "| It is so. [one](results/one.json) | not testable here | On it |" in catalogue.verdicts()


def test_finding_an_entry() -> None:
    assert catalogue.find("entropy")["class"] == "foveate.measure.entropy.Entropy"
    with pytest.raises(UnknownName, match="did you mean 'entropy'"):
        catalogue.find("entropi")


def test_kinds_are_the_classes_under_mechanism() -> None:
    assert {catalogue.kind(find(name)) for name in names("measure")} == {"Metric", "ModelMetric"}
    assert catalogue.kind(Halved) == "HeadEdit"
