"""MkDocs hooks: adds the generated pages, fills in the generated parts, and puts the figures into the pages."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pages
from figures import FIGURES
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from svg import figure_element

PARTS: dict[str, Callable[[], str]] = {
    "benchmarks": pages.benchmarks,
    "claims": pages.claims,
    "errors": pages.errors,
    "metrics": pages.metrics,
    "needs": pages.needs,
    "reductions": pages.reductions,
}
# what a browser fetches by itself; links that a reader clicks may lead anywhere
LOADS = re.compile(
    r"""<(?:script|img|iframe|source|video|audio)\b[^>]*\ssrc=["']?(?:https?:)?//"""
    r"""|<link\b(?![^>]*\brel=["']?canonical)[^>]*\shref=["']?(?:https?:)?//"""
    r"""|url\(["']?(?:https?:)?//|@import"""
)
IMAGE = re.compile(r'<p><img alt="([^"]*)" src="[^"]*figures/(\w+)\.svg"\s*/?></p>')


def on_config(config: Any) -> Any:
    """Puts the mechanisms where the navigation says `mechanisms`."""
    for item in config.nav:
        if item.get("Mechanisms") == "mechanisms":
            item["Mechanisms"] = [
                "mechanisms/index.md",
                *({verb: verb_nav(verb)} for verb in pages.present_verbs()),
                {"Families": "mechanisms/families.md"},
            ]
        if item.get("Decisions") == "decisions":
            notes = sorted((pages.ROOT / "docs" / "decisions").glob("[0-9]*.md"))
            item["Decisions"] = ["decisions/index.md", *(f"decisions/{f.name}" for f in notes)]
    return config


def verb_nav(verb: str) -> list[str]:
    names = [f"mechanisms/{verb}/{e['name']}.md" for e in pages.entries() if e["verb"] == verb]
    return [f"mechanisms/{verb}/index.md", *names]


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated pages and figures."""
    made = {
        "changelog.md": pages.changelog(),
        "contributing.md": (pages.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
        "decisions/index.md": pages.decisions(),
        "mechanisms/index.md": pages.mechanisms(),
        "mechanisms/families.md": pages.families(),
    }
    made |= {f"mechanisms/{verb}/index.md": pages.verb_page(verb) for verb in pages.present_verbs()}
    made |= {f"mechanisms/{e['verb']}/{e['name']}.md": pages.mechanism(e) for e in pages.entries()}
    made |= {f"figures/{name}.svg": draw() for name, draw in FIGURES.items()}
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fills in `<!-- generated: NAME -->`."""

    def fill(found: re.Match[str]) -> str:
        if found[1] not in PARTS:
            raise PluginError(f"{page.file.src_uri}: nothing generates {found[1]!r}; there are {', '.join(PARTS)}")
        return PARTS[found[1]]()

    return re.sub(r"<!-- generated: ([\w-]+) -->", fill, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Puts figures into the page itself, so that they take its colours and make no request."""
    return IMAGE.sub(lambda found: figure_element(FIGURES[found[2]](), html.escape(html.unescape(found[1]))), content)


def on_post_build(config: Any) -> None:
    """Raises when a built page would load something from another host."""
    for file in Path(config.site_dir).rglob("*"):
        if file.suffix in (".html", ".css") and (found := LOADS.search(file.read_text(encoding="utf-8"))):
            raise PluginError(f"{file.name} loads from elsewhere: {found[0]}; put the file into docs/ instead")
