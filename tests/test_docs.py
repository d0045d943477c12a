"""The documentation: its code runs and prints what the pages say, and its generated pages are whole."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

import foveate
from foveate import catalogue
from foveate.core.mechanism import Edit, HeadEdit, Metric, Pattern, Visits
from foveate.core.registry import find, names
from foveate.probe import default_text
from foveate.testing import tiny

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path[:0] = [str(DOCS), str(DOCS / "hooks")]

import pages  # noqa: E402
import patterns  # noqa: E402
import pictures  # noqa: E402
import refresh  # noqa: E402
import site_hooks as site  # noqa: E402
from figures import FIGURES  # noqa: E402

WRITTEN = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
WITH_CODE = [f for f in WRITTEN if any(b.language == "python" for b in refresh.blocks(f.read_text()))]
# the numbers there are those of the real model; `python docs/refresh.py` runs these
REAL = {"README.md", "adding.md", "tutorial.md"}
TINY = {"max_position_embeddings": 8192}


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved profile of a tiny model, where the tutorial looks for one."""
    folder = tmp_path_factory.mktemp("docs")
    model, metrics = tiny.model("llama", **TINY), ["first_token_mass", "retrieval_score:samples=2"]
    found = foveate.profile(model, tiny.tokenizer(), default_text(), tokens=64, metrics=metrics, name="smollm2")
    found.save(folder / "profiles" / "smollm2")
    return folder


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, profiled: Path) -> Iterator[dict[str, Any]]:
    """What a page finds around it: a tiny model under the name of the real one, and the names that README assumes."""
    model, tokenizer = tiny.model("llama", **TINY), tiny.tokenizer()
    monkeypatch.setattr(foveate, "load", lambda name: (model, tokenizer), raising=False)
    monkeypatch.chdir(profiled)
    inputs = tokenizer("a quick brown fox", return_tensors="pt")
    with refresh.namespace(text=default_text()[:4200], inputs=inputs) as names:
        yield names


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_code_of_a_page_runs(page: Path, stand_in: dict[str, Any]) -> None:
    for block in refresh.blocks(page.read_text()):
        if block.language != "python":
            continue
        printed = refresh.execute(block, stand_in, str(page))
        if page.name not in REAL:
            assert printed == (block.output or ""), f"{page.name}:{block.line + 1} prints something else"
        else:
            assert bool(printed) == (block.output is not None), f"{page.name}:{block.line + 1}"


def test_pages_with_code_were_found() -> None:
    assert {"README.md", "index.md", "tutorial.md", "adding.md", "edits.md"} <= {f.name for f in WITH_CODE}


def test_refresh_writes_outputs(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 2\nprint(x)\nprint()\nprint(x + 1)\n```\n\n```text\nold\n```\n\nEnd.\n")
    refresh.main(str(page))
    assert page.read_text().endswith("```text\n2\n\n3\n```\n\nEnd.\n")


# ---------------------------------------------------------------- generated pages


@pytest.mark.parametrize("entry", catalogue.entries(), ids=lambda e: e["name"])
def test_a_mechanism_has_its_page(entry: dict[str, Any]) -> None:
    text = pages.mechanism(entry)
    found = re.findall(r"^## (.*)$", text, flags=re.M)
    assert found == list(pages.HEADINGS)
    sections = re.split(r"^## .*$", text, flags=re.M)[1:]
    assert all(s.strip() for s in sections), "an empty section"
    assert "<svg" in sections[0], "no picture"
    for p in entry["params"]:
        assert re.search(rf"\| `{p['name']}` \|.*\| [^|]*\w[^|]* \|$", text, flags=re.M), (
            f"{p['name']} is not described"
        )
    for claim in entry["claims"]:
        name = claim if isinstance(claim, str) else claim["name"]
        assert (name in pages.results()) == (f"claims.md#{name.replace('_', '-')}" in text)


@pytest.mark.parametrize("name", names("measure"))
def test_the_pictures_numbers_are_the_metrics_own(name: str) -> None:
    drawn, _ = pictures.picture(find(name))
    assert re.search(r">(0|[1-9]\d*)\.\d\d</text>", drawn), "no number under the heads"
    if issubclass(find(name), Metric):
        found, _ = pictures.numbers(pictures.setting(find(name)))
        said = {f">{pictures.number(v)}</text>" for values in list(found.values())[:8] for v in values}
        assert all(number in drawn for number in said)


def test_made_patterns_are_what_they_are_called() -> None:
    heads = list(patterns.patterns())
    rows, _ = pictures.weights_and_outputs()
    torch.testing.assert_close(rows, torch.stack(list(patterns.patterns().values())))
    torch.testing.assert_close(rows.sum(-1), torch.ones(len(heads), patterns.TOKENS))
    said = {
        "previous_token": "previous token",
        "first_token_mass": "first token",
        "induction": "induction",
        "duplicate_token": "same token",
        "entropy": "uniform",
    }
    for metric, pattern in said.items():
        values = pictures.numbers(find(metric)())[0][metric]
        assert heads[values.index(max(values))] == pattern


@dataclass(frozen=True)
class Later(Edit):
    """Moves all weight to the row's own key."""

    identity: ClassVar = None

    def edit(self, block: Any, weights: torch.Tensor) -> torch.Tensor:
        return torch.eye(weights.shape[-1])[block.index].expand_as(weights)


@dataclass(frozen=True)
class Silent(HeadEdit):
    """No output."""

    def edit(self, rows: Any, out: torch.Tensor) -> torch.Tensor:
        return 0 * out


@dataclass(frozen=True)
class Near(Pattern):
    """Only the own block of eight."""

    def select(self, view: Any) -> Visits:
        return Visits(torch.eye(4, dtype=torch.bool)[None, None], 8, 8)


@pytest.mark.parametrize("cls", [Later, Silent, Near])
def test_what_acts_is_drawn_before_and_after(cls: type) -> None:
    drawn, caption = pictures.picture(cls)
    assert "<svg" in drawn
    assert f"<code>{cls.__name__}()</code>" in caption
    if cls is Silent:
        return
    weights, blocks = torch.stack(list(patterns.patterns().values())), torch.arange(patterns.TOKENS) // 8
    if cls is Later:
        after, _ = pictures.weights_and_outputs(edits=(cls(),))
        wanted = torch.eye(patterns.TOKENS).expand_as(weights)
    else:
        after, _ = pictures.weights_and_outputs(pattern=cls().select)
        wanted = weights * (blocks[:, None] == blocks)
        wanted = wanted / wanted.sum(-1, keepdim=True)
    torch.testing.assert_close(after, wanted)
    assert drawn == pictures.before_and_after(cls(), after)[0]


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_takes_the_pages_colour(name: str) -> None:
    drawn = FIGURES[name]()
    assert drawn.startswith("<svg")
    assert "currentColor" in drawn
    assert "#000000" not in drawn
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", drawn)
    assert drawn == FIGURES[name](), "two builds differ"


def test_every_claim_is_told_with_its_verdict() -> None:
    text = pages.claims()
    for name, result in pages.results().items():
        section = text.split(f"{{ #{name.replace('_', '-')} }}")[1].split("\n## ")[0]
        assert f"{result['verdict']}.**" in section
        assert result["command"] in section


# ---------------------------------------------------------------- the site


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://cdn.example/x.js"></script>',
        "<img alt=a src=//cdn.example/x.png>",
        '<link rel="stylesheet" href="https://fonts.example/css">',
        "body { background: url(https://cdn.example/x.png) }",
        '@import "x.css"',
    ],
)
def test_a_page_that_loads_from_elsewhere_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(f"<p>good</p>{text}")
    with pytest.raises(Exception, match="loads from elsewhere"):
        site.on_post_build(SimpleNamespace(site_dir=tmp_path))


def test_a_page_of_ours_is_not(tmp_path: Path) -> None:
    fine = '<a href="https://example.org">x</a><link rel="canonical" href="https://x.org/"><img src="data:image/png,">'
    (tmp_path / "page.html").write_text(fine + '<script src="assets/x.js"></script>')
    site.on_post_build(SimpleNamespace(site_dir=tmp_path))


def test_figures_stand_in_the_page() -> None:
    content = site.on_page_content('<p>a</p><p><img alt="x &amp; y" src="../figures/rows.svg" /></p>')
    assert content.startswith('<p>a</p><figure class="drawn">')
    assert "<figcaption>x &amp; y</figcaption>" in content
    assert "<img" not in content


def test_a_part_that_nothing_generates_is_told() -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="x.md"))
    assert site.on_page_markdown("<!-- generated: needs -->", page).startswith("`Needs.")
    with pytest.raises(Exception, match="nothing generates 'neds'"):
        site.on_page_markdown("<!-- generated: neds -->", page)
