"""Figures that follow the page: matplotlib draws, and text and lines take the page's own colour and font."""

from __future__ import annotations

import hashlib
import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

__all__ = ["BLUE", "GREEN", "INK", "ORANGE", "RED", "bare", "drawing", "figure_element", "shade", "svg"]

# Drawn in this colour, shown in the page's: light and dark pages have one figure.
INK = "#010203"
# Legible on white and on the dark page alike.
BLUE, ORANGE, GREEN, RED = "#3d85c6", "#d9772b", "#2f9e6e", "#cc5a5a"

STYLE = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 8.5,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "savefig.facecolor": "none",
    # the same figure has the same bytes
    "svg.fonttype": "none",
    "svg.hashsalt": "foveate",
    "text.color": INK,
    "xtick.color": INK,
    "xtick.labelsize": 8,
    "xtick.major.width": 0.6,
    "ytick.color": INK,
    "ytick.labelsize": 8,
    "ytick.major.width": 0.6,
}


@contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches, in the style of the site."""
    with matplotlib.rc_context(STYLE):
        # no pyplot: a build draws many figures, and pyplot would keep all of them
        yield Figure(figsize=(width, height))


def svg(figure: Figure) -> str:
    """The figure as an SVG element that can stand inside a page."""
    out = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(out, format="svg", dpi=144, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = numbered(text.replace(INK, "currentColor"))
    text = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", text)
    width = float(re.search(r'width="([\d.]+)pt"', text)[1])
    text = re.sub(r'<svg ([^>]*?)height="[\d.]+pt" ([^>]*?)width="[\d.]+pt"', r"<svg \1\2", text, count=1)
    # 1 pt of the figure is 1.4 px of the page: 8.5 pt read as small print does
    return text.replace("<svg ", f'<svg style="width: {1.4 * width:.0f}px" ', 1)


def numbered(text: str) -> str:
    """The clip paths by number and the figure's own name; matplotlib names them by addresses in memory."""
    ids = list(dict.fromkeys(re.findall(r'<clipPath id="(\w+)"', text)))
    if not ids:
        return text
    pattern = re.compile("|".join(ids))
    figure = hashlib.sha256(pattern.sub("", text).encode()).hexdigest()[:8]
    return pattern.sub(lambda found: f"c{figure}-{ids.index(found[0])}", text)


def figure_element(drawn: str, caption: str) -> str:
    """The drawing with its caption; the caption is also what a screen reader reads."""
    label = html.escape(html.unescape(caption), quote=True)
    drawn = drawn.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    # no page that is scrolled sideways: the figure scrolls in its own box
    scroll = f'<div class="scroll" tabindex="0">{drawn}</div>'
    return f'<figure class="drawn">{scroll}<figcaption>{caption}</figcaption></figure>'


def shade(ax: Axes, values: np.ndarray, colour: str = BLUE, most: float | None = None) -> None:
    """A matrix as opacity of one colour, so that zero is the page itself, light or dark; NaN stays empty."""
    values = np.asarray(values, dtype=float)
    most = float(np.nanmax(values, initial=0.0)) if most is None else most
    pixels = np.zeros((*values.shape, 4))
    pixels[..., :3] = to_rgb(colour)
    pixels[..., 3] = np.nan_to_num(np.clip(values / most if most > 0 else values * 0, 0, 1))
    ax.imshow(pixels, interpolation="nearest", aspect="auto")


def bare(ax: Axes) -> None:
    """Axes without ticks, in a thin frame."""
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(True)
        spine.set_alpha(0.5)
