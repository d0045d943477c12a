"""The figures of the concept pages, by name. What can be drawn by the library's own code is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import patterns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from svg import BLUE, GREEN, INK, ORANGE, RED, bare, drawing, shade, svg

from foveate.core.accumulate import batch_means
from foveate.core.mask import Mask
from foveate.core.reductions import Distance, RowEntropy, labels
from foveate.core.rows import RowBlock, attend
from foveate.testing.views import with_mask

__all__ = ["FIGURES"]

RESULTS = Path(__file__).parents[2] / "bench" / "results"
FRONTIER = 8.8, 2.7
"""Inches of a figure that the README has as well."""
FIGURES: dict[str, Callable[[], str]] = {}


def figure(draw: Callable[[], str]) -> Callable[[], str]:
    """Registers a figure under the name of its function."""
    FIGURES[draw.__name__] = draw
    return draw


@figure
def rows() -> str:
    """The weights of one head, a row of it, and a block of rows."""
    weights = 0.5 * patterns.patterns()["local"] + 0.5 * patterns.patterns()["first token"]
    n, row, first, last = patterns.TOKENS, 22, 8, 14
    with drawing(6.6, 2.9) as f:
        left, right = f.subplots(1, 2, width_ratios=(1, 1.25))
        shade(left, weights.numpy(), BLUE, most=0.6)
        bare(left)
        left.set(xlabel="keys", ylabel="rows (queries)")
        left.add_patch(Rectangle((-0.5, row - 0.5), n, 1, fill=False, edgecolor=ORANGE, linewidth=1.4))
        left.add_patch(Rectangle((-0.5, first - 0.5), n, last - first, fill=False, edgecolor=GREEN, linewidth=1.4))
        left.text(n - 1, row - 1.2, f"row {row}", color=ORANGE, ha="right")
        left.text(n - 1, first - 1.2, "a block of 6 rows", color=GREEN, ha="right")
        right.bar(range(n), weights[row].numpy(), color=[ORANGE if k <= row else "none" for k in range(n)])
        right.set(xlabel="key", ylabel=f"weight in row {row}", xlim=(-1, n))
        right.annotate(
            "keys after the row:\nit may not see them",
            (row + 4.5, 0.02),
            (row + 4.5, 0.2),
            ha="center",
            arrowprops={"arrowstyle": "-", "color": INK, "alpha": 0.4},
        )
        return svg(f)


@figure
def masks() -> str:
    """Intervals of keys per row for the masks that models make."""
    n = 16
    made: dict[str, Mask] = {
        "causal": Mask.causal_of(n),
        "window of 5": Mask.causal_of(n, window=5),
        "left padding of 4": with_mask(left=(4,))(1, n, n),
        "packed: 5, 4 and 7": with_mask(sequences=(5, 4, 7))(1, n, n),
        "chunk of 6 rows": Mask.causal_of(6, n),
    }
    with drawing(8.0, 2.0) as f:
        for ax, (name, mask) in zip(f.subplots(1, len(made)), made.items(), strict=True):
            index = torch.arange(mask.queries)
            allowed = mask.allowed(index, 0, mask.keys)[0, 0].float()
            pixels = torch.full((n, n), float("nan"))
            pixels[n - mask.queries :] = allowed
            shade(ax, pixels.numpy(), BLUE, most=2.2)
            bare(ax)
            ax.set_title(name)
            row = mask.queries - 2
            low, high = int(mask.low[0, row]), int(mask.high[0, row])
            y = n - mask.queries + row
            ax.add_patch(Rectangle((low - 0.5, y - 0.5), high - low, 1, color=ORANGE, linewidth=0))
            ax.set_xlabel(f"row {y}: keys [{low}, {high})", color=ORANGE)
        return svg(f)


def box(ax: Axes, x: float, y: float, width: float, text: str, colour: str = INK, height: float = 0.5) -> None:
    """A named stage, its middle at x, y."""
    shape = FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, "round,pad=0.02,rounding_size=0.08", fill=False
    )
    shape.set(edgecolor=colour, linewidth=1.1)
    ax.add_patch(shape)
    ax.text(x, y, text, ha="center", va="center", color=colour)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=8, color=colour, linewidth=0.9))


@figure
def rule() -> str:
    """The stages, and which kind of mechanism acts where."""
    stages = ["select", "score", "mask", "normalise", "edit", "observe", "mix"]
    kinds = {
        "select": ("Pattern", GREEN),
        "score": ("Rule\nEdit.edit_scores", ORANGE),
        "normalise": ("Rule", ORANGE),
        "edit": ("Edit.edit", ORANGE),
        "observe": ("Metric", BLUE),
        "mix": ("then HeadEdit", ORANGE),
    }
    step = 1.25
    with drawing(8.4, 1.6) as f:
        ax = f.subplots()
        ax.set(xlim=(-0.6, step * (len(stages) - 1) + 0.6), ylim=(-1.35, 0.4))
        ax.axis("off")
        for n, stage in enumerate(stages):
            word, colour = kinds.get(stage, ("", INK))
            box(ax, n * step, 0, 0.95, stage)
            if n:
                arrow(ax, (n * step - 0.74, 0), (n * step - 0.51, 0))
            if word:
                arrow(ax, (n * step, -0.72), (n * step, -0.3), colour)
                ax.text(n * step, -0.8, word, ha="center", va="top", color=colour)
        return svg(f)


@figure
def engines() -> str:
    """Five ways from one call to the same numbers."""
    ways = {
        "sdpa": "nothing is asked: the framework's own call",
        "native": "one pass of the C++ kernel, on the CPU",
        "fused": "closed forms from the log-sum-exp, any device",
        "blocks": "rows in PyTorch: edits, patterns, gradients",
        "reference": "all rows at once, float64: says what is right",
    }
    with drawing(7.4, 2.5) as f:
        ax = f.subplots()
        ax.set(xlim=(0, 10.4), ylim=(-0.4, 4.5))
        ax.axis("off")
        box(ax, 0.85, 2, 1.5, "q, k, v\nmask, scale", height=1.1)
        box(ax, 9.4, 2, 1.7, "head outputs\nreductions", height=1.1)
        for n, (name, what) in enumerate(ways.items()):
            y, colour = 4 - n, GREEN if name == "reference" else BLUE
            box(ax, 5.1, y, 5.4, f"{name}: {what}", colour)
            arrow(ax, (1.65, 2), (2.35, y))
            arrow(ax, (7.85, y), (8.5, 2))
        return svg(f)


@figure
def reductions() -> str:
    """Which weights of a row each reduction adds up."""
    view = patterns.view()
    n = patterns.TOKENS
    seen = view.mask.allowed(torch.arange(n), 0, n)[0, 0]
    block = RowBlock(view, torch.arange(n), 0, n, torch.float32)
    sets = {"Within(3)": block.distance <= 3}
    for link in ("previous", "first", "token", "follower"):
        of_rows, of_keys = labels(view, link)
        sets[f'Match("{link}")'] = (of_rows[0, :, None] == of_keys[0]) & seen
    with drawing(8.0, 1.9) as f:
        for ax, (name, chosen) in zip(f.subplots(1, len(sets)), sets.items(), strict=True):
            shade(ax, seen.float().numpy(), BLUE, most=6)
            shade(ax, (chosen & seen).float().numpy(), ORANGE)
            bare(ax)
            ax.set_title(name)
        return svg(f)


@figure
def intervals() -> str:
    """Neighbouring rows are alike: the mean of batches tells it, the mean of rows does not."""
    rng = torch.Generator().manual_seed(3)
    n, keep, size = 2048, 0.985, 64
    noise = torch.randn(n, generator=rng, dtype=torch.float64)
    x = torch.empty(n, dtype=torch.float64)
    x[0] = noise[0]
    for i in range(1, n):
        x[i] = keep * x[i - 1] + (1 - keep**2) ** 0.5 * noise[i]
    x = 0.5 + 0.1 * x
    sums = x.reshape(1, -1, size).sum(-1)
    e = batch_means(sums, torch.full((n // size,), float(size), dtype=torch.float64))
    naive = 1.96 * float(x.std()) / n**0.5
    with drawing(7.6, 2.4) as f:
        left, right = f.subplots(1, 2, width_ratios=(3, 2), sharey=True)
        left.plot(x.numpy(), color=BLUE, linewidth=0.6, alpha=0.8)
        left.step(range(0, n, size), (sums[0] / size).numpy(), where="post", color=ORANGE, linewidth=1.4)
        left.set(xlabel="row", ylabel="number of the row")
        middle = float(e.value)
        for at, half, word, colour in (
            (0, naive, "rows taken\nas independent", RED),
            (1, float(e.high - e.value), "batch means\n(what we report)", ORANGE),
        ):
            right.errorbar([at], [middle], yerr=[half], fmt="o", color=colour, capsize=4, markersize=4)
            right.text(at, 0.24, word, ha="center", va="bottom", color=colour)
        right.axhline(0.5, color=INK, linewidth=0.6, alpha=0.6)
        right.text(1.7, 0.505, "truth", ha="right", va="bottom")
        right.set(xlim=(-0.7, 1.7))
        right.set_xticks([])
        right.spines["bottom"].set_visible(False)
        return svg(f)


@figure
def entropy() -> str:
    """The same entropy from different patterns."""
    rows = attend(patterns.view(), (RowEntropy(), Distance()))
    entropy, distance = (rows[r][0].mean(-1).tolist() for r in (RowEntropy(), Distance()))
    with drawing(6.2, 2.6) as f:
        ax = f.subplots()
        ax.scatter(entropy, distance, color=BLUE, s=26)
        for x, y, name in zip(entropy, distance, patterns.patterns(), strict=True):
            ax.annotate(name, (x, y), (5, 4), textcoords="offset points")
        ax.set(xlabel="mean entropy of the rows (nats)", ylabel="mean distance (tokens)", xlim=(0, 3.2), ylim=(0, 15))
        return svg(f)


@figure
def edits() -> str:
    """Where attached mechanisms stand between the model and its attention."""
    with drawing(7.4, 2.3) as f:
        ax = f.subplots()
        ax.set(xlim=(0, 10.6), ylim=(0, 3.3))
        ax.axis("off")
        box(ax, 1.1, 2.6, 2.0, "attention module\nof the model", height=0.9)
        box(ax, 9.4, 2.6, 2.1, "its output\nprojection", height=0.9)
        box(ax, 5.2, 2.6, 2.6, "row engine", BLUE, height=0.9)
        box(ax, 3.1, 0.6, 2.2, "Pattern, Edit", ORANGE, height=0.6)
        box(ax, 5.7, 0.6, 1.7, "Metric", GREEN, height=0.6)
        box(ax, 7.9, 0.6, 1.9, "HeadEdit", ORANGE, height=0.6)
        arrow(ax, (2.15, 2.6), (3.85, 2.6))
        ax.text(3.0, 2.7, "q, k, v, mask", ha="center", va="bottom")
        arrow(ax, (6.55, 2.6), (8.3, 2.6))
        ax.text(7.4, 2.7, "head outputs", ha="center", va="bottom")
        arrow(ax, (3.1, 0.95), (4.4, 2.1), ORANGE)
        arrow(ax, (5.5, 2.1), (5.7, 0.95), GREEN)
        arrow(ax, (7.9, 0.95), (7.5, 2.5), ORANGE)
        ax.text(3.1, 0.2, "change the weights", ha="center", va="top", color=ORANGE)
        ax.text(5.7, 0.2, "reads", ha="center", va="top", color=GREEN)
        ax.text(7.9, 0.2, "changes the outputs", ha="center", va="top", color=ORANGE)
        return svg(f)


@figure
def memory() -> str:
    """Peak memory over what was there before, from bench/results/profile.json."""
    rounds = json.loads((RESULTS / "profile.json").read_text())["rounds"]
    names = {
        "plain": ("plain forward", INK),
        "all": ("foveate, all streamed metrics", BLUE),
        "output_attentions": ("output_attentions", ORANGE),
        "lens": ("TransformerLens run_with_cache", RED),
    }
    with drawing(6.4, 2.7) as f:
        ax = f.subplots()
        for key, (label, colour) in names.items():
            points = []
            for tokens, runs in sorted(rounds.items(), key=lambda item: int(item[0])):
                fine = [r[key] for r in runs if "peak_bytes" in r.get(key, {})]
                over = [(one["peak_bytes"] - one["before_bytes"]) / 1e9 for one in fine]
                if over:
                    points.append((int(tokens), sum(over) / len(over)))
            ax.plot(*zip(*points, strict=True), "o-", color=colour, label=label, linewidth=1.2, markersize=3.5)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ticks = sorted(map(int, rounds))
        ax.set_xticks(ticks, [f"{t:,}" for t in ticks])
        ax.minorticks_off()
        values = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
        ax.set_yticks(values, [f"{v:g}" for v in values])
        ax.set(xlabel="tokens", ylabel="GB added at the peak")
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return svg(f)


@figure
def frontier() -> str:
    """Quality against the bytes of the cache, from bench/results/frontier.json."""
    with drawing(*FRONTIER) as f:
        draw_frontier(f)
        return svg(f)


def draw_frontier(f: Figure) -> None:
    """Four panels of 4,096 tokens, the question not seen; of each kind the best at a size, for each panel anew."""
    results = json.loads((RESULTS / "frontier.json").read_text())
    probes = {
        "passkey": "passkey",
        "key_value": "key-value recall",
        "planted_facts": "facts in real text",
        "perplexity": "perplexity x full",
    }
    # a row is of the first kind that has one of its words in the name
    kinds = {
        "full cache": (INK, "", ("full",)),
        "kvpress": (RED, "D:", ("kvpress",)),
        "at random": (INK, ".:", ("random",)),
        "more for few heads": (BLUE, "o-", ("heads + ", "_heads", "mixture_of_spans")),
        "everything, in fewer bits": (GREEN, "s-", ("bits",)),
        "one policy for all heads": (ORANGE, "^-", (" @ ",)),
    }
    axes = f.subplots(1, len(probes))
    for ax, (probe, title) in zip(axes, probes.items(), strict=True):
        measured = results[f"unseen 4096 {probe}"]
        better = min if probe == "perplexity" else max
        ax.axhline(measured["full"]["value"], color=INK, linewidth=0.8, linestyle=(0, (4, 3)), label="full cache")
        found: dict[str, dict[float, float]] = {label: {} for label in kinds}
        for name, row in measured.items():
            kind = next((label for label, (_, _, words) in kinds.items() if any(w in name for w in words)), None)
            if kind and "(reads)" not in name:
                asked = name.partition(" @ ")[2]
                at = float(asked) if asked else round(row["share"], 3)
                found[kind][at] = better(found[kind].get(at, row["value"]), row["value"])
        for label, (colour, style, _) in kinds.items():
            if style:
                x, y = zip(*sorted(found[label].items()), strict=True)
                ax.plot(x, y, style, color=colour, label=label, linewidth=1.2, markersize=4)
        ax.set(title=title, xlabel="share of the bytes", xlim=(0.085, 0.6))
        ax.set_ylim(*((0.98, 1.18) if probe == "perplexity" else (-0.03, 1.03)))
        ax.set_xscale("log")
        ax.set_xticks((0.1, 0.25, 0.5), ("10 %", "25 %", "50 %"))
        ax.minorticks_off()
    axes[0].set_ylabel("right answers")
    lines, names = axes[0].get_legend_handles_labels()
    f.legend(lines, names, loc="outside lower center", ncols=6, columnspacing=1.2, handlelength=1.7)
