"""The figures: Bokeh draws them, the page's scripts fill in the data of what is chosen.

Bokeh rather than Altair: its `image` glyph draws a map of 512 x 512 bins as one picture, where Vega makes a mark of
each bin; and its script is part of the package, where Altair's offline bundle comes through a compiled extension.
See `docs/decisions/`.
"""

from __future__ import annotations

from typing import Any

from bokeh.core.properties import value
from bokeh.document import Document
from bokeh.models import (
    BasicTicker,
    BoxSelectTool,
    ColorMapper,
    ColumnDataSource,
    DataRange1d,
    FactorRange,
    FixedTicker,
    HoverTool,
    LinearColorMapper,
    LogColorMapper,
    LogTicker,
    NumeralTickFormatter,
    Range1d,
)
from bokeh.models.annotations import ColorBar, Legend, LegendItem, Title
from bokeh.models.glyphs import Image
from bokeh.palettes import RdBu11, Viridis256
from bokeh.plotting import figure
from bokeh.settings import settings

from foveate.report.compare import Comparison, Table
from foveate.report.pack import FLOOR

__all__ = ["figures", "script"]

Data = dict[str, Any]
# both are told apart by colour-blind readers, and legible on white and on black
COLOURS = ("#3a7fc4", "#d9822b")
GREY = "#8a8f98"
FONT = "system-ui, sans-serif"
CELL = 17


def script() -> str:
    """BokehJS itself, without its widgets."""
    return (settings.bokehjs_path() / "js" / "bokeh.min.js").read_text(encoding="utf-8")


def figures(tables: list[Table], profiles: list[Data], compared: Comparison | None) -> Data:
    """The document, and the element that each figure goes into."""
    slots = "ab"[: len(profiles)]
    plots = [grid("grid_a", tables[0]), grid("grid_b", tables[-1])]
    if compared is not None and compared.matched:
        plots.append(grid("grid_d", tables[0], diverging=True))
    if compared is None or compared.matched:
        plots.append(scatter())
    plots.append(layers(len(profiles), compared))
    for slot, data in zip(slots, profiles, strict=True):
        if "map" in data or data["maps"]:
            plots.append(image(f"map_{slot}", "key", "row", 460))
        if data["windows"]:
            plots.append(image(f"window_{slot}", "key", "row", 400))
        if "map" in data or data["spans"]:
            plots += [spans(f"spans_{slot}"), spans(f"spans_all_{slot}")]
        if data.get("entropy"):
            plots.append(positions(f"position_{slot}", data["tokens"]))
        if agreement_metrics(data):
            plots.append(agreement(f"agreement_{slot}", data))
    document = Document()
    # otherwise the document looks through all of its models once per figure
    with document.models.freeze():
        for plot in plots:
            document.add_root(plot)
    return {"doc": document.to_json(deferred=False), "roots": {plot.id: plot.name for plot in plots}}


def plain(name: str, height: int, **more: Any) -> figure:
    """An empty figure without a frame: its colours come from the page."""
    plot = figure(
        name=name, height=height, sizing_mode="stretch_width", toolbar_location=None, tools="", min_border=4, **more
    )
    plot.background_fill_color = plot.border_fill_color = plot.outline_line_color = None
    plot.grid.grid_line_color = None
    plot.axis.minor_tick_line_color = None
    plot.axis.axis_label_text_font_style = "normal"
    plot.axis.axis_label_text_font = plot.axis.major_label_text_font = FONT
    plot.axis.axis_label_text_font_size = plot.axis.major_label_text_font_size = "12px"
    return plot


def bar(plot: figure, mapper: ColorMapper, title: str = "", **more: Any) -> None:
    """The legend of the colours."""
    plot.add_layout(
        ColorBar(
            color_mapper=mapper,
            width=10,
            padding=4,
            title=title,
            title_text_font_style="normal",
            title_text_font_size="12px",
            title_text_font=FONT,
            major_label_text_font_size="11px",
            major_label_text_font=FONT,
            background_fill_color=None,
            bar_line_color=None,
            major_tick_line_color=None,
            **more,
        ),
        "right",
    )


def grid(name: str, table: Table, diverging: bool = False) -> figure:
    """Layers x heads, one cell per head."""
    layer = max(n for n, _ in table.heads) + 1
    width = max(h for _, h in table.heads) + 1
    height = min(max(layer * CELL, 120), 900) + 70
    plot = plain(
        name,
        height,
        x_range=Range1d(start=-0.5, end=width - 0.5),
        y_range=Range1d(start=layer - 0.5, end=-0.5),
        x_axis_label="head",
        y_axis_label="layer",
    )
    step = max(1, -(-width // 12))
    plot.xaxis.ticker = FixedTicker(ticks=list(range(0, width, step)))
    plot.yaxis.ticker = whole()
    plot.add_layout(Title(text="", name=f"{name}_title", text_font_size="13px", text_font=FONT), "above")
    columns = ("x", "y", "v", "alpha", "head", "text", "kind")
    source = ColumnDataSource({c: [] for c in columns}, name=f"{name}_source")
    # the middle of a diverging palette is 0
    mapper = LinearColorMapper(
        palette=list(RdBu11) if diverging else Viridis256,
        low=0,
        high=1,
        nan_color="rgba(128,128,128,0.25)",
        name=f"{name}_mapper",
    )
    cells = plot.rect(
        "x",
        "y",
        0.94,
        0.9,
        source=source,
        line_color=None,
        fill_alpha="alpha",
        fill_color={"field": "v", "transform": mapper},
        name=f"{name}_cells",
    )
    mark = ColumnDataSource({"x": [], "y": []}, name=f"{name}_selected")
    plot.rect("x", "y", 0.94, 0.9, source=mark, fill_color=None, line_color=COLOURS[1], line_width=2.5)
    cursor = ColumnDataSource({"x": [], "y": []}, name=f"{name}_cursor")
    plot.rect("x", "y", 1, 1, source=cursor, fill_color=None, line_color=GREY, line_width=2.5, name=f"{name}_ink")
    tips = [("head", "@head"), ("value", "@text"), ("kind", "@kind")]
    plot.add_tools(HoverTool(renderers=[cells], tooltips=tips, attachment="right"), BoxSelectTool(renderers=[]))
    bar(plot, mapper, formatter=NumeralTickFormatter(format="0.[00]a"))
    return plot


def whole() -> BasicTicker:
    """Ticks at whole numbers only: there is no layer 2.5."""
    return BasicTicker(min_interval=1, desired_num_ticks=8)


def scatter() -> figure:
    """Two metrics, or the same metric of two profiles: one dot per head."""
    plot = plain("scatter", 420)
    source = ColumnDataSource({c: [] for c in ("x", "y", "head", "tx", "ty", "colour")}, name="scatter_source")
    dots = plot.scatter("x", "y", source=source, size=7, fill_color="colour", line_color=None, fill_alpha=0.75)
    diagonal = ColumnDataSource({"x": [], "y": []}, name="scatter_diagonal")
    plot.line("x", "y", source=diagonal, line_color=GREY, line_dash="dotted")
    plot.add_tools(HoverTool(renderers=[dots], tooltips=[("head", "@head"), ("across", "@tx"), ("up", "@ty")]))
    return plot


def layers(count: int, compared: Comparison | None) -> figure:
    """The distribution of a metric over layers: all heads, the middle half, the median."""
    plot = plain("layers", 320, x_axis_label="layer" if compared is None else "depth, % of the layers")
    plot.xaxis.ticker = whole()
    items = []
    for n in range(count):
        slot, colour = "ab"[n], COLOURS[n]
        band = ColumnDataSource({c: [] for c in ("x", "low", "mid", "high", "text")}, name=f"layers_{slot}_band")
        area = plot.varea("x", "low", "high", source=band, fill_color=colour, fill_alpha=0.2)
        line = plot.line("x", "mid", source=band, line_color=colour, line_width=2)
        dots = ColumnDataSource({c: [] for c in ("x", "y", "head", "text")}, name=f"layers_{slot}_dots")
        points = plot.scatter("x", "y", source=dots, size=5, fill_color=colour, line_color=None, fill_alpha=0.6)
        tips = [("head", "@head"), ("value", "@text")]
        plot.add_tools(HoverTool(renderers=[points], tooltips=tips))
        who = "" if compared is None else f" ({slot.upper()})"
        items += [
            LegendItem(label=f"a head{who}", renderers=[points]),
            LegendItem(label=f"median{who}", renderers=[line]),
            LegendItem(label=f"middle half{who}", renderers=[area]),
        ]
    legend(plot, items)
    return plot


def legend(plot: figure, items: list[LegendItem]) -> None:
    plot.add_layout(
        Legend(
            items=items,
            orientation="horizontal",
            border_line_color=None,
            background_fill_color=None,
            label_text_font_size="12px",
            label_text_font=FONT,
            padding=0,
            margin=2,
            glyph_height=12,
            spacing=12,
            nrows="auto",
            ncols="auto" if len(items) < 4 else 3,
        ),
        "above",
    )


def image(name: str, across: str, down: str, height: int) -> figure:
    """Rows x keys as one picture, on a log scale."""
    plot = plain(
        name,
        height,
        x_range=Range1d(start=0, end=1),
        y_range=Range1d(start=1, end=0),
        x_axis_label=across,
        y_axis_label=down,
    )
    source = ColumnDataSource({"image": [], "x": [], "y": [], "dw": [], "dh": []}, name=f"{name}_source")
    mapper = LogColorMapper(palette=Viridis256, low=FLOOR, high=1, low_color="rgba(0,0,0,0)", nan_color="rgba(0,0,0,0)")
    picture = plot.add_glyph(source, Image(image="image", x="x", y="y", dw="dw", dh="dh", color_mapper=mapper))
    cursor = ColumnDataSource({"x": [], "y": [], "w": [], "h": []}, name=f"{name}_cursor")
    plot.rect("x", "y", "w", "h", source=cursor, fill_color=None, line_color=GREY, line_width=2, name=f"{name}_ink")
    tips = [(down, "$y{0,0}"), (across, "$x{0,0}"), ("share of a row", "@image{0.000%}")]
    plot.add_tools(HoverTool(renderers=[picture], tooltips=tips, attachment="right"))
    plot.axis.formatter = NumeralTickFormatter(format="0,0")
    bar(plot, mapper, ticker=LogTicker(mantissas=[1]), formatter=NumeralTickFormatter(format="0.[000]%"))
    return plot


def spans(name: str) -> figure:
    """A small matrix: which part of the text looks at which."""
    plot = plain(
        name,
        330,
        x_range=FactorRange(),
        y_range=FactorRange(),
        x_axis_label="keys in",
        y_axis_label="rows in",
        x_axis_location="above",
    )
    source = ColumnDataSource({c: [] for c in ("x", "y", "v", "text", "ink")}, name=f"{name}_source")
    mapper = LinearColorMapper(palette=Viridis256, low=0, high=1, nan_color="rgba(0,0,0,0)", name=f"{name}_mapper")
    cells = plot.rect(
        "x", "y", 0.96, 0.94, source=source, line_color=None, fill_color={"field": "v", "transform": mapper}
    )
    plot.text(
        "x",
        "y",
        "text",
        source=source,
        text_align="center",
        text_baseline="middle",
        text_font_size="11px",
        text_color="ink",
        text_font=value(FONT),
    )
    tips = [("rows", "@y"), ("keys", "@x"), ("share", "@text%")]
    plot.add_tools(HoverTool(renderers=[cells], tooltips=tips))
    return plot


def positions(name: str, tokens: int) -> figure:
    """Entropy by position: the opened head, its layer, and the most that is possible."""
    plot = plain(name, 280, x_axis_label="position, tokens", y_axis_label="entropy, nats", y_range=DataRange1d(start=0))
    plot.x_range = Range1d(start=0, end=tokens)
    plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
    items = []
    for part, label, style in (
        ("most", "most that is possible: ln of the keys", {"line_color": GREY, "line_dash": "dotted"}),
        ("layer", "mean of its layer", {"line_color": COLOURS[1], "line_dash": "dashed", "line_width": 2}),
        ("head", "this head", {"line_color": COLOURS[0], "line_width": 2.5}),
    ):
        source = ColumnDataSource({"x": [], "y": []}, name=f"{name}_{part}")
        line = plot.line("x", "y", source=source, **style)
        items.append(LegendItem(label=label, renderers=[line]))
        if part == "head":
            plot.add_tools(
                HoverTool(renderers=[line], tooltips=[("position", "@x{0,0}"), ("entropy", "@y{0.00} nats")])
            )
    legend(plot, items[::-1])
    return plot


AGREEMENT = {
    "head_similarity": "heads of a layer",
    "top_k_overlap_layers": "with the layer before",
    "top_k_overlap_rows": "with the row before",
}


def agreement_metrics(data: Data) -> list[str]:
    return [m["name"] for m in data["metrics"] if m["name"] in AGREEMENT]


def agreement(name: str, data: Data) -> figure:
    """How far layers, and the heads within them, look at the same keys."""
    plot = plain(name, 280, x_axis_label="layer", y_axis_label="mean over heads")
    plot.xaxis.ticker = whole()
    plot.y_range = Range1d(start=0, end=1.02)
    items: list[LegendItem] = []
    for metric, dash in zip(agreement_metrics(data), ("solid", "dashed", "dotted"), strict=False):
        source = ColumnDataSource({"x": [], "y": []}, name=f"{name}_{metric}")
        colour = COLOURS[len(items) % 2] if len(items) < 2 else GREY
        line = plot.line("x", "y", source=source, line_color=colour, line_dash=dash, line_width=2)
        items.append(LegendItem(label=AGREEMENT[metric], renderers=[line]))
        tips = [("layer", "@x"), (AGREEMENT[metric], "@y{0.000}")]
        plot.add_tools(HoverTool(renderers=[line], tooltips=tips))
    legend(plot, items)
    return plot
