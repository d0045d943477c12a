"""The page about a training probe: its figures, its numbers, and every run behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from bokeh.embed import json_item
from bokeh.models import ColumnDataSource, HoverTool, Legend, NumeralTickFormatter, Span
from bokeh.plotting import figure
from markupsafe import Markup

from foveate.report import charts
from foveate.report.compression import PALETTE
from foveate.report.pack import clean, script_json

__all__ = ["page", "plot"]

PAGE = Path(__file__).with_name("page")
DASHES = ("solid", "dashed", "dotted")
AXES = {"bytes": "bytes of state", "length": "length, tokens", "step": "step of the training"}


def page(results: dict[str, Any]) -> str:
    """One HTML file about what `foveate.training.experiment.to_json` gave, with everything that it needs in it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    items = {f"figure_{n}": json_item(plot(results, p), f"figure_{n}") for n, p in enumerate(results["plots"])}
    return environment.get_template("training.html").render(
        results=results,
        mixers=[clean(m) for m in dict.fromkeys(r["mixer"] for r in results["runs"])],
        settings={name: clean(value) for name, value in results["settings"].items()},
        figures=list(items),
        items=Markup(script_json(items)),
        bokeh=Markup(charts.script().replace("</script", "<\\/script")),
        style=Markup((PAGE / "report.css").read_text(encoding="utf-8")),
        theme=Markup((PAGE / "theme.js").read_text(encoding="utf-8")),
    )


def plot(results: dict[str, Any], about: dict[str, Any]) -> figure:
    """A line of means for each mixer and measure, and a dot for each run."""
    across, measures = about["across"], about["measures"]
    shown = figure(
        title=about["title"],
        width=620,
        height=360,
        x_axis_label=AXES[across],
        x_axis_type="linear" if across == "step" else "log",
        **({"y_range": (-0.02, 1.02)} if about["share"] else {}),
        tools="pan,wheel_zoom,box_zoom,reset",
        toolbar_location="above",
        sizing_mode="scale_width",
        max_width=760,
    )
    shown.toolbar.logo = None
    items = []
    mixers = list(dict.fromkeys(run["mixer"] for run in results["runs"]))
    for n, mixer in enumerate(mixers):
        for dash, measure in zip(DASHES, measures, strict=False):
            points = [p for run in results["runs"] if run["mixer"] == mixer for p in points_of(run, measure, across)]
            if not points:
                continue
            colour = PALETTE[n % len(PALETTE)]
            xs = sorted({x for x, _, _ in points})
            ys = [[y for x, y, _ in points if x == at] for at in xs]
            line = shown.line(xs, [sum(y) / len(y) for y in ys], color=colour, line_dash=dash, line_width=2, alpha=0.8)
            source = ColumnDataSource(
                {
                    "x": [x for x, _, _ in points],
                    "y": [y for _, y, _ in points],
                    "run": [run for _, _, run in points],
                }
            )
            dots = shown.scatter("x", "y", source=source, color=colour, size=6 if across != "step" else 3, alpha=0.6)
            tips = [("", "@run"), (AXES[across], "@x{0,0}"), (measure.replace("_", " "), "@y{0.000}")]
            shown.add_tools(HoverTool(renderers=[dots], tooltips=tips))
            name = mixer if len(measures) == 1 else f"{mixer}, {measure.replace('_', ' ')}"
            items.append((name, [line, dots]))
    if across == "length":
        trained = Span(location=results["trained_at"], dimension="height", line_dash="dashed", line_color=charts.GREY)
        shown.add_layout(trained)
    shown.xaxis.formatter = NumeralTickFormatter(format="0.[0]b" if across == "bytes" else "0,0")
    if about["share"]:
        shown.yaxis.formatter = NumeralTickFormatter(format="0%")
    legend = Legend(items=items, ncols=2, label_text_font_size="9pt", spacing=0, padding=4, click_policy="hide")
    shown.add_layout(legend, "below")
    return shown


def points_of(run: dict[str, Any], measure: str, across: str) -> list[tuple[float, float, str]]:
    """Where a run stands in a figure: place across, height, and what the run is called."""
    own = [m for m in run["measures"] if m["name"] == measure and m["value"] is not None]
    if across != "step" and own:
        # of a measure taken several times the last ones count
        own = [m for m in own if m["step"] == own[-1]["step"]]
    name = f"{run['mixer']}, width {run['width']}, seed {run['seed']}"
    at = {"bytes": lambda m: run["state_bytes"], "length": lambda m: m["at"], "step": lambda m: m["step"]}[across]
    return [(at(m), m["value"], name) for m in own]
