"""Figures of a profile for papers, with matplotlib (the extra `plot`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm, PowerNorm

from foveate.core.errors import BadInput

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from foveate.profiling import Profile

__all__ = ["draw"]

# more labels than these on one axis cannot be read
LABELS = 72


def draw(
    profile: Profile,
    name: str,
    ax: Axes | None = None,
    *,
    layer: int | None = None,
    head: int | None = None,
    index: int = 0,
    by: str = "head",
) -> Axes:
    """One figure of a profile; what there is, `Profile.plot` says."""
    if by not in ("head", "layer"):
        raise BadInput(f"by={by!r}: a metric is drawn by 'head' (layers x heads) or by 'layer' (its distribution)")
    if name == "attention_map":
        return attention_map(profile, ax, layer, head)
    if name == "window":
        return window(profile, ax, index)
    if name == "entropy_by_position":
        return entropy_by_position(profile, ax, layer)
    return distribution(profile, name, ax) if by == "layer" else grid(profile, name, ax)


def new(ax: Axes | None, width: float, height: float) -> Axes:
    return ax if ax is not None else plt.subplots(figsize=(width, height), layout="constrained")[1]


def titled(profile: Profile, text: str) -> str:
    return f"{text}\n{profile.info['model']}, {profile.info['tokens']:,} tokens"


def grid(profile: Profile, name: str, ax: Axes | None) -> Axes:
    """Layers x heads of one metric."""
    table = profile.metric(name)
    layers, heads = table.shape
    ax = new(ax, 2.2 + 0.32 * heads, 1.4 + 0.2 * layers)
    image = ax.imshow(table.to_numpy(), aspect="auto", cmap="viridis", interpolation="nearest")
    ax.set(xlabel="head", ylabel="layer", title=titled(profile, name))
    ax.set_xticks(range(0, heads, max(1, heads // 10)))
    ax.figure.colorbar(image, ax=ax)
    return ax


def distribution(profile: Profile, name: str, ax: Axes | None) -> Axes:
    """The heads of each layer as a box, and each head as a point."""
    table = profile.metric(name)
    ax = new(ax, 1.6 + 0.22 * len(table), 3.2)
    values = [row[~np.isnan(row)] for row in table.to_numpy()]
    ax.boxplot(values, positions=list(table.index), widths=0.6, showfliers=False, medianprops={"color": "C1"})
    for layer, heads in zip(table.index, values, strict=True):
        ax.plot([layer] * len(heads), heads, ".", color="C0", alpha=0.5, markersize=4)
    places = list(table.index)[:: max(1, len(table) // 15)]
    ax.set_xticks(places, [str(n) for n in places])
    ax.set(xlabel="layer", ylabel=name, title=titled(profile, f"{name} over the layers"))
    return ax


def attention_map(profile: Profile, ax: Axes | None, layer: int | None, head: int | None) -> Axes:
    """Where a head looks: mean mass per row, the fine map where there is one."""
    if layer is None or head is None:
        raise BadInput("attention_map is of one head: give layer= and head=")
    fine = [m for m in profile.maps if (m.layer, m.head) == (layer, head)]
    if fine:
        edges, mass = fine[0].edges, fine[0].mass
    else:
        edges, mass = profile.info.get("map_edges", []), of_head(profile, "attention_map", layer, head)
    rows = np.maximum(1, np.diff(edges))
    ax = new(ax, 5.2, 4.4)
    # per row and per key: bins of unequal length then have the colours of their weights
    weight = mass / rows[:, None] / rows
    seen = weight[weight > 0]
    top = float(seen.max()) if len(seen) else 1.0
    image = ax.pcolormesh(edges, edges, weight, cmap="magma", norm=LogNorm(top * 1e-5, top, clip=True))
    ax.invert_yaxis()
    ax.set(xlabel="key", ylabel="row", aspect="equal", title=titled(profile, f"attention, layer {layer}, head {head}"))
    ax.figure.colorbar(image, ax=ax, label="mean weight of a cell")
    return ax


def of_head(profile: Profile, label: str, layer: int, head: int) -> np.ndarray:
    """The picture of one head.

    Raises:
        BadInput: the profile has none, or no such head.
    """
    if label not in profile.arrays:
        raise BadInput(f"the profile has no {label}; it has {', '.join(profile.arrays) or 'no pictures'}")
    layers, heads = profile.arrays[label].shape[:2]
    if not (0 <= layer < layers and 0 <= head < heads):
        raise BadInput(f"no layer {layer}, head {head}: the profile has {layers} layers of {heads} heads")
    return profile.arrays[label][layer, head]


def window(profile: Profile, ax: Axes | None, index: int) -> Axes:
    """Single weights, with the tokens beside them where there is room."""
    if not 0 <= index < len(profile.windows):
        raise BadInput(f"there is no window {index}; the profile has {len(profile.windows)}, counted from 0")
    w = profile.windows[index]
    rows, keys = w.weights.shape
    ax = new(ax, 2.5 + min(9.0, 0.13 * keys), 1.8 + min(9.0, 0.13 * rows))
    extent = (w.keys[0] - 0.5, w.keys[1] - 0.5, w.rows[1] - 0.5, w.rows[0] - 0.5)
    image = ax.imshow(
        w.weights.astype(np.float32), extent=extent, aspect="auto", cmap="magma", norm=PowerNorm(0.5, vmin=0.0)
    )
    for axis, (first, last), tokens in ((ax.xaxis, w.keys, w.key_tokens), (ax.yaxis, w.rows, w.row_tokens)):
        if len(tokens) <= LABELS:
            axis.set_ticks(range(first, last), plain(tokens), fontsize=6)
    ax.tick_params(axis="x", rotation=90)
    ax.set(xlabel="key", ylabel="row", title=f"layer {w.layer}, head {w.head}, text {w.text!r}\n{w.why}")
    ax.figure.colorbar(image, ax=ax, label="weight")
    return ax


def plain(tokens: Sequence[str]) -> list[str]:
    """Tokens as labels: one line each, nothing that matplotlib would read as a formula."""
    shown = ("".join(c if c.isprintable() else "·" for c in t).strip() or "␣" for t in tokens)
    return [t.replace("$", r"\$")[:16] for t in shown]


def entropy_by_position(profile: Profile, ax: Axes | None, layer: int | None) -> Axes:
    """Entropy over the course of the text: the mean of each layer, or the heads of one."""
    whole = profile.arrays.get("entropy_by_position")
    if layer is not None or whole is None:
        of_head(profile, "entropy_by_position", layer or 0, 0)
    assert whole is not None
    edges = np.array(profile.info["position_edges"])
    middles = (edges[:-1] + edges[1:]) / 2
    ax = new(ax, 5.2, 3.4)
    lines = np.nanmean(whole, 1) if layer is None else whole[layer]
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.95, len(lines)))
    for n, (line, colour) in enumerate(zip(lines, colours, strict=True)):
        ax.plot(middles[: len(line)], line[: len(middles)], color=colour, linewidth=1, label=str(n))
    what = "mean of each layer" if layer is None else f"heads of layer {layer}"
    ax.set(xlabel="token", ylabel="entropy (nats)", title=titled(profile, f"entropy by position, {what}"))
    ax.legend(title="layer" if layer is None else "head", fontsize=6, ncols=2, loc="upper left", bbox_to_anchor=(1, 1))
    return ax
