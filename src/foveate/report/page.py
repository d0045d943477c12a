"""Puts the file together."""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from foveate.core.errors import BadInput
from foveate.profiling import Profile
from foveate.report import charts
from foveate.report.compare import RULE, Comparison, Table, compare, table
from foveate.report.data import LADDER, Detail, page_data
from foveate.report.pack import ERROR, FLOOR, Pack, clean, script_json, zipped
from foveate.summary import findings, summarise

__all__ = ["LIMIT", "report", "write"]

LIMIT = 3_000_000
PAGE = Path(__file__).with_name("page")
# in the order in which they need each other
SCRIPTS = (
    "base.js",
    "figures.js",
    "heads.js",
    "table.js",
    "head.js",
    "text.js",
    "layers.js",
    "differences.js",
    "start.js",
)


def report(profile: Profile, other: Profile | None = None) -> str:
    """One HTML file about one profile, or about two side by side; at most `LIMIT` bytes.

    Maps, windows and shading become coarser until it is small enough, and the page says so. The numbers of the heads
    are never thinned.

    Raises:
        BadInput: a profile without heads.
    """
    profiles = [profile] if other is None else [profile, other]
    for p in profiles:
        if p.heads.empty:
            raise BadInput(f"the profile of {clean(p.info.get('model'))} has no heads; profile the text again")
    tables = [table(p) for p in profiles]
    compared = compare(*tables) if other is not None else None
    drawn: dict[str, Any] = {}
    for detail in LADDER:
        html = render(profiles, tables, compared, detail, drawn)
        if len(html.encode()) <= LIMIT:
            break
    return html


def write(html: str, file: str | os.PathLike[str]) -> Path:
    """Writes a report, whole or not at all.

    Raises:
        BadInput: the file cannot be written.
    """
    target = Path(file)
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        temporary.write_text(html, encoding="utf-8")
        temporary.chmod(0o644)
        temporary.replace(target)
    except OSError as e:
        raise BadInput(f"cannot write {target}: {e.strerror or e}; choose another file with --out") from e
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return target


def render(
    profiles: list[Profile], tables: list[Table], compared: Comparison | None, detail: Detail, drawn: dict[str, Any]
) -> str:
    """The page at one level of detail; `drawn` keeps the figures, which are the same at all of them."""
    pack, listed, notes = Pack(), [], set()
    for p, t in zip(profiles, tables, strict=True):
        embedded, coarser = page_data(p, t, detail, pack)
        listed.append(embedded)
        notes |= set(coarser)
    if "figures" not in drawn:
        drawn["figures"] = script_json(charts.figures(tables, listed, compared))
    # tokens are text of a stranger: they travel with the packed data, never as markup
    texts = {
        "pieces": [list(p.pieces) for p in profiles],
        "sinks": [d.pop("sinks") for d in listed],
        "windows": [d.pop("windows") for d in listed],
    }
    data: dict[str, Any] = {"profiles": listed, "floor": FLOOR}
    if compared is not None:
        data["compared"] = {
            "metrics": compared.metrics,
            "matched": compared.matched,
            "exceeds": pack.add(compared.exceeds.astype("uint8")),
        }
    blobs = {
        "bokeh": library(),
        "texts": zipped(script_json(texts)),
        "arrays": pack.zipped(),
    }
    scripts = "\n".join(part(name) for name in SCRIPTS)
    return template().render(
        title=title(profiles),
        heads=[head(p, t, places(s)) for p, t, s in zip(profiles, tables, texts["sinks"], strict=True)],
        compared=None if compared is None else words(compared, profiles),
        matched=compared is None or compared.matched,
        data=Markup(script_json(data)),
        figures=Markup(drawn["figures"]),
        blobs=blobs,
        style=Markup(part("report.css")),
        theme=Markup(part("theme.js")),
        scripts=Markup(scripts),
        # only scripts that carry this may run: a handler in injected markup could not know it
        nonce=hashlib.sha256("".join(blobs.values()).encode()).hexdigest()[:32],
        notes=sorted(notes),
        error=f"{ERROR:.1%}",
    )


@cache
def library() -> str:
    return zipped(charts.script())


@cache
def part(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


@cache
def template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    return environment.get_template("report.html")


def title(profiles: list[Profile]) -> str:
    return " and ".join(str(p.info["model"]) for p in profiles)


def head(profile: Profile, t: Table, sinks: dict[str, Any] | None) -> dict[str, Any]:
    """What the top and the bottom of the page say of a profile."""
    # said anew: a profile of an earlier version knew fewer sentences
    info = profile.info | {"summary": summarise(profile.heads, profile.info)}
    layers = len({n for n, _ in t.heads})
    return {
        "model": info["model"],
        "tokens": info["tokens"],
        "text_tokens": info.get("text_tokens", info["tokens"]),
        "layers": layers,
        "count": len(t.heads),
        "per_layer": len(t.heads) // layers,
        "kv_heads": info.get("kv_heads"),
        "findings": findings(info),
        "places": sinks,
        "skipped": info.get("skipped", {}),
        "metrics": len(t.metrics),
        "facts": facts(info),
    }


def places(sinks: dict[str, Any] | None) -> dict[str, Any] | None:
    """Where the sinks sit, the three of most heads by name."""
    if not sinks or not sinks["keys"]:
        return None
    listed = []
    for k in sinks["keys"][:3]:
        token = f" “{clean(k['token'].strip() or k['token'])}”" if "token" in k else ""
        listed.append(f"{k['key']:,}{token} in {k['heads']} head{'s' * (k['heads'] > 1)}")
    more = sinks["all"] - len(listed)
    if more:
        listed.append(f"{more} more")
    return {"count": f"{sinks['all']} token{'s' * (sinks['all'] > 1)}", "list": listed}


def facts(info: dict[str, Any]) -> list[tuple[str, str]]:
    """How and with what the profile was made."""
    found = [("model", f"{info['model']} ({info.get('architecture', 'unknown')})")]
    found.append(("text", f"{info['tokens']:,} of {info.get('text_tokens', info['tokens']):,} tokens"))
    if "wall_time" in info:
        found.append(("time", f"{info['wall_time']:.1f} s, one pass at {info['tokens_per_second']:,.0f} tokens/s"))
    if "peak_bytes" in info:
        found.append(("memory", f"{info['peak_bytes'] / 1e9:.2f} GB at most"))
    found += [(name, str(value)) for name, value in info.get("versions", {}).items()]
    return found


def words(compared: Comparison, profiles: list[Profile]) -> dict[str, Any]:
    """What two profiles have in common, in numbers."""
    a, b = (p.info for p in profiles)
    same = []
    same.append("the same model" if a["model"] == b["model"] else "two models")
    same.append("the same text" if a.get("ids") and a.get("ids") == b.get("ids") else "two texts")
    return {
        "what": " on ".join(same),
        "rule": RULE,
        "matched": compared.matched,
        "exceeds": int(compared.exceeds.sum()),
        "counted": compared.counted,
        "heads": int(compared.exceeds.any(0).sum()) if compared.matched else 0,
        "metrics": len(compared.metrics),
    }
