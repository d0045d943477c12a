"""The page about a plan for a cache: what was tried, what was chosen, and what it is worth where nobody looked."""

from __future__ import annotations

from pathlib import Path

import jinja2
from bokeh.embed import json_item
from bokeh.models import ColumnDataSource, HoverTool, Legend, NumeralTickFormatter, Span
from bokeh.plotting import figure
from markupsafe import Markup

from foveate.planning.compressing import Compressed
from foveate.planning.searching import Candidate
from foveate.report import charts
from foveate.report.pack import clean, script_json

__all__ = ["page"]

PAGE = Path(__file__).with_name("page")
PALETTE = ("#3a7fc4", "#d9822b", "#4c9f70", "#8a5ab5", "#c2504d", "#7a8794", "#b59a2f", "#2f9aa8", "#a35c8f", "#5f6bb0")
MOST_KINDS = len(PALETTE)


def page(found: Compressed, model: str) -> str:
    """One HTML file about what came of planning, with everything that it needs in it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    probes = list(found.searched.full.recall)
    plots = [frontier(found, probe) for probe in (*probes, None)]
    items = {f"figure_{n}": json_item(plot, f"figure_{n}") for n, plot in enumerate(plots)}
    return environment.get_template("compression.html").render(
        found=found,
        model=clean(model),
        probes=probes,
        figures=list(items),
        items=Markup(script_json(items)),
        bokeh=Markup(charts.script().replace("</script", "<\\/script")),
        style=Markup((PAGE / "report.css").read_text(encoding="utf-8")),
        theme=Markup((PAGE / "theme.js").read_text(encoding="utf-8")),
        policies=[repr(p) for p in found.verdict.candidate.policies],
    )


def frontier(found: Compressed, probe: str | None) -> figure:
    """Quality against bytes, a line for each kind of policy."""
    title = "perplexity, times the full cache's" if probe is None else f"{probe}: share of the answers given"
    plot = figure(
        title=title,
        width=620,
        height=360,
        x_axis_label="share of the cache's bytes",
        x_range=(0.0, 1.08 * max(c.standing.share for c in found.searched.candidates)),
        y_axis_type="log" if probe is None else "linear",
        **({} if probe is None else {"y_range": (0.0, 1.05)}),
        tools="pan,wheel_zoom,box_zoom,reset",
        toolbar_location="above",
        sizing_mode="scale_width",
        max_width=760,
    )
    plot.toolbar.logo = None
    kinds: dict[str, list[Candidate]] = {}
    for c in found.searched.candidates:
        kinds.setdefault(c.family, []).append(c)
    chosen = found.verdict.candidate
    shown = list(kinds)[:MOST_KINDS]
    if chosen.family not in shown:
        shown[-1] = chosen.family
    items = []
    for colour, kind in zip(PALETTE, shown, strict=False):
        row = sorted(kinds[kind], key=lambda c: c.standing.share)
        values = [c.standing.perplexity if probe is None else c.standing.recall[probe] for c in row]
        source = ColumnDataSource(
            {
                "share": [c.standing.share for c in row],
                "value": [v.value for v in values],
                "low": [v.low for v in values],
                "high": [v.high for v in values],
                "name": [c.name for c in row],
            }
        )
        line = plot.line("share", "value", source=source, color=colour, alpha=0.6)
        dots = plot.scatter("share", "value", source=source, color=colour, size=7)
        items.append((kind, [line, dots]))
    mine = chosen.standing.perplexity if probe is None else chosen.standing.recall[probe]
    ring = plot.scatter(
        [chosen.standing.share], [mine.value], size=16, fill_alpha=0, line_color="#d02f2f", line_width=2
    )
    items.append(("chosen", [ring]))
    level = 1.0 if probe is None else found.searched.full.recall[probe].value
    plot.add_layout(Span(location=level, dimension="width", line_dash="dashed", line_color=charts.GREY))
    told = [("", "@name"), ("bytes", "@share{0.0%}"), ("", "@value{0.000} (@low{0.000} to @high{0.000})")]
    plot.add_tools(HoverTool(tooltips=told))
    plot.xaxis.formatter = NumeralTickFormatter(format="0%")
    legend = Legend(items=items, ncols=2, label_text_font_size="9pt", spacing=0, padding=4, click_policy="hide")
    plot.add_layout(legend, "below")
    return plot
