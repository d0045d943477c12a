"""One picture per mechanism, drawn by running it: one drawing function per kind, none per mechanism."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import patterns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from svg import BLUE, GREEN, INK, ORANGE, bare, drawing, shade, svg

from foveate.compress import Streaming
from foveate.core import traffic
from foveate.core.attach import attach
from foveate.core.budget import Budget
from foveate.core.errors import FoveateError
from foveate.core.mechanism import (
    Edit,
    ExpertEdit,
    HeadEdit,
    Mechanism,
    Metric,
    ModelMetric,
    Pattern,
    Policy,
    PromptEdit,
    Pruner,
    ResidualEdit,
    Schedule,
)
from foveate.core.params import bounds_of
from foveate.core.places import Heads, Indices, Values, Vectors
from foveate.core.recording import residual_streams
from foveate.core.rows import View, attend
from foveate.core.rule import Operator, Rule
from foveate.measure._watch import Watch, seen
from foveate.steer.expert_switch import choice_rates
from foveate.testing import handmade, tiny
from foveate.testing.checks import replacing
from foveate.testing.checks.steering import for_row
from foveate.testing.policies import Witness

__all__ = ["measured", "numbers", "picture", "setting"]

MEASURED = Path(__file__).parent.parent / "data" / "smollm2.csv"
MOST_LABELS = 8
MOST_MAPS = 4
LONGEST = 80


def picture(cls: type[Mechanism]) -> tuple[str, str] | None:
    """An SVG and its caption; None for kinds that have no drawing."""
    for kind, draw in DRAWINGS.items():
        if issubclass(cls, kind):
            return draw(setting(cls))
    return None


def setting(cls: type[Mechanism]) -> Mechanism:
    """The mechanism with its first small setting: windows of thousands of tokens say nothing about 32."""
    # what acts on prompts is shown as it stands: a prompt is short anyhow
    made = [cls(**p) for p in cls.test_params if p or issubclass(cls, PromptEdit)]
    small = [m for m in made if not m.nothing]
    # a picture shows one text
    return for_row((small or made or [cls()])[0], 0)


def layer_of(m: Mechanism) -> int:
    """The first layer that a mechanism names."""
    for name, (_, bounds) in bounds_of(type(m)).items():
        entries = getattr(m, name)
        if isinstance(bounds, Heads | Values | Vectors) and entries:
            return entries[0][0]
        if isinstance(bounds, Indices) and bounds.what == "layer" and entries:
            return entries[0]
    return 0


def heads_in_a_row(figure: Figure, names: Sequence[str], rows: int, bottom: float) -> np.ndarray:
    """Axes for the heads of a row, with names above and room below."""
    axes = figure.subplots(rows, len(names), squeeze=False)
    figure.get_layout_engine().set(rect=(0.2, bottom, 0.8, 1 - bottom), w_pad=0.03)
    for ax, name in zip(axes[0], names, strict=True):
        ax.set_title(name, fontsize=8)
    return axes


# ---------------------------------------------------------------- metrics


def numbers(metric: Metric) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
    """What the metric says of each pattern, by label: its numbers, and its pictures where it has some.

    It is read at the second of two equal layers, as some metrics look at the first.
    """
    before, state = None, None
    for layer in (0, 1):
        view = patterns.view(layer)
        rows = attend(view, metric.needs())
        rows.before = before
        state = metric.update(metric.start(view.layer), rows)
        before = rows.samples()
    found = {label: e.value.tolist() for label, e in metric.result(state).items()}
    return found, {label: values.numpy() for label, values in metric.arrays(state).items()}


def draw_metric(metric: Metric) -> tuple[str, str]:
    found, arrays = numbers(metric)
    drawn = with_numbers({n: p.numpy() for n, p in patterns.patterns().items()}, found, arrays)
    return drawn, (
        f"Seven attention patterns made by hand over {patterns.TOKENS} tokens, a text of 16 tokens said twice (rows "
        f"downwards, keys to the right), and what <code>{spelled(metric)}</code> says of each{left_out(found)}."
    )


def draw_model_metric(metric: ModelMetric) -> tuple[str, str]:
    """Runs the metric on a transformer whose heads were written by hand, and shows them on a short text."""
    model, text = handmade.model(positions=320), "a dog. a cat. a dog."
    with attach(model, Watch(lambda rows: rows[patterns.Weights()][0], (patterns.Weights(),))) as attached:
        model(handmade.ids(text))
        weights = [calls[0].detach().numpy() for calls in seen(attached).values()]
    heads = {
        f"{layer}: {name}": weights[layer][n]
        for layer, names in enumerate(handmade.HEADS)
        for n, name in enumerate(names)
    }
    table = metric.measure(model, tiny.tokenizer())
    found: dict[str, list[float]] = {}
    for label, part in table.groupby("metric", sort=False):
        at = part.set_index(["layer", "head"])["value"]
        found[label] = [at.get((n // 4, n % 4), math.nan) for n in range(len(heads))]
    return with_numbers(heads, found, {}), (
        "The eight heads of a transformer of two layers that was written by hand (<code>foveate.testing.handmade</code>"
        f"; layer and name), on the text “{text}”, and what <code>{spelled(metric)}</code> says of each"
        f"{left_out(found)}."
    )


def left_out(found: dict[str, list[float]]) -> str:
    return f" ({len(found) - MOST_LABELS} more numbers are not shown)" if len(found) > MOST_LABELS else ""


def with_numbers(heads: dict[str, np.ndarray], found: dict[str, list[float]], arrays: dict[str, np.ndarray]) -> str:
    """The weights of some heads, the pictures that a metric makes of them, and below them its numbers."""
    labels = list(found)[:MOST_LABELS]
    line, panel = 0.19, 1.05
    height = panel * (1 + len(arrays)) + 0.25 + line * len(labels)
    with drawing(8.6, height) as figure:
        axes = heads_in_a_row(figure, list(heads), 1 + len(arrays), (line * len(labels) + 0.05) / height)
        for ax, pattern in zip(axes[0], heads.values(), strict=True):
            shade(ax, pattern, most=1.0)
            bare(ax)
        for row, (label, pictures) in zip(axes[1:], arrays.items(), strict=True):
            for ax, values in zip(row, pictures, strict=True):
                if values.ndim == 2:
                    shade(ax, values, GREEN)
                else:
                    ax.plot(values, color=GREEN, drawstyle="steps-mid")
                    ax.set_ylim(0, 1.05 * float(np.nanmax(pictures)))
                bare(ax)
            under(row[0], label, (-0.1, 30), ha="right", fontsize=8)
        for n, label in enumerate(labels):
            below = -72 * line * (n + 0.6)
            under(axes[-1][0], label, (-0.1, below), ha="right", fontsize=8)
            for ax, value in zip(axes[-1], found[label], strict=True):
                under(ax, number(value), (0.5, below), ha="center", fontsize=8.5)
        return svg(figure)


def under(ax: Axes, text: str, at: tuple[float, float], **style: Any) -> None:
    """Text below a panel: a share of its width, and points downwards. The layout does not make room for it."""
    points = {"xycoords": "axes fraction", "textcoords": "offset points"}
    ax.annotate(text, (at[0], 0), (0, at[1]), va="center", **points, **style).set_in_layout(False)


def number(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.2f}" if 0.01 <= abs(value) < 100 or value == 0 else f"{value:.3g}"


def spelled(m: Mechanism) -> str:
    """The constructor call, without what is left at its default."""
    given = {n: repr(getattr(m, n)) for n, (default, _) in bounds_of(type(m)).items() if getattr(m, n) != default}
    # a vector fills pages
    short = [f"{n}={html.escape(text, quote=False) if len(text) <= LONGEST else '…'}" for n, text in given.items()]
    return f"{type(m).__name__}({', '.join(short)})"


# ---------------------------------------------------------------- what acts on rows


def weights_and_outputs(layer: int = 0, **acting: Any) -> tuple[torch.Tensor, torch.Tensor]:
    view = patterns.view(layer)
    rows = attend(view, (patterns.Weights(),), **acting)
    return rows[patterns.Weights()][0], rows.out[0]


def before_and_after(m: Mechanism, after: torch.Tensor) -> tuple[str, str]:
    before, _ = weights_and_outputs()
    with drawing(8.6, 2.5) as figure:
        axes = heads_in_a_row(figure, list(patterns.patterns()), 2, 0.02)
        for line, colour, weights in zip(axes, (BLUE, ORANGE), (before, after), strict=True):
            for ax, pattern in zip(line, weights, strict=True):
                shade(ax, pattern.numpy(), colour, most=1.0)
                bare(ax)
        for line, word in zip(axes, ("before", "after"), strict=True):
            line[0].set_ylabel(word)
        return svg(figure), (
            f"The same seven patterns before (blue) and after (orange) <code>{spelled(m)}</code>; rows downwards, keys "
            "to the right."
        )


def draw_edit(edit: Edit) -> tuple[str, str]:
    return before_and_after(edit, weights_and_outputs(layer_of(edit), edits=(edit,))[0])


def draw_pattern(pattern: Pattern) -> tuple[str, str]:
    return before_and_after(pattern, weights_and_outputs(pattern=pattern.select)[0])


def draw_head_edit(edit: HeadEdit) -> tuple[str, str]:
    view: View = patterns.view(layer_of(edit))
    rows = attend(view)
    norms = [t.float().norm(dim=-1).mean(-1)[0].numpy() for t in (rows.out, edit.edit(rows, rows.out))]
    with drawing(8.6, 1.9) as figure:
        ax = figure.subplots()
        at = np.arange(len(norms[0]))
        for shift, colour, word, norm in zip((-0.2, 0.2), (BLUE, ORANGE), ("before", "after"), norms, strict=True):
            ax.bar(at + shift, norm, 0.36, color=colour, label=word)
        ax.set_xticks(at, list(patterns.patterns()))
        ax.set_ylabel("mean norm of the output")
        ax.set_ylim(0, 1.3 * max(float(norm.max()) for norm in norms))
        ax.legend(ncols=2, loc="upper right")
        return svg(figure), f"Outputs of the seven patterns before and after <code>{spelled(edit)}</code>."


def draw_residual_edit(edit: ResidualEdit) -> tuple[str, str]:
    """How far each token's hidden state is moved, and what the model's later layers make of it."""
    model, text = tiny.model("llama"), "To be, or not to be"
    inputs = tiny.tokenizer()(text, return_tensors="pt", return_token_type_ids=False)
    before, _ = residual_streams(model, **inputs)
    with attach(model, edit):
        after, _ = residual_streams(model, **inputs)
    at = np.arange(len(text))
    with drawing(8.6, 2.2) as figure:
        axes = figure.subplots(1, len(before), sharey=True)
        for ax, layer in zip(axes, before, strict=True):
            norms = [h[0].norm(dim=-1).numpy() for h in (before[layer], after[layer] - before[layer])]
            for shift, colour, word, norm in zip(
                (-0.2, 0.2), (BLUE, ORANGE), ("hidden state", "its change"), norms, strict=True
            ):
                ax.bar(at + shift, norm, 0.36, color=colour, label=word)
            ax.set_xticks(at, [c if c != " " else "␣" for c in text], family="monospace")
            ax.set_title(f"behind layer {layer}")
        axes[0].set_ylabel("norm")
        axes[0].legend(ncols=2, loc="upper left", bbox_to_anchor=(0, 1.0))
        axes[0].set_ylim(0, 1.3 * max(float(h[0].norm(dim=-1).max()) for h in before.values()))
        return svg(figure), (
            f"The residual stream of a small random model on “{text}”: its norm, and the norm of what "
            f"<code>{spelled(edit)}</code> changes in it, layer by layer."
        )


def draw_expert_edit(edit: ExpertEdit) -> tuple[str, str]:
    """Which share of the tokens goes to each expert, before and after."""
    model, tokenizer, text = tiny.model("mixtral"), tiny.tokenizer(), SAYING
    before = choice_rates(model, tokenizer, [text])
    with attach(model, edit):
        after = choice_rates(model, tokenizer, [text])
    with drawing(8.6, 1.9) as figure:
        axes = figure.subplots(1, len(before), sharey=True)
        for ax, layer in zip(axes, before, strict=True):
            at = np.arange(len(before[layer]))
            for shift, colour, word, rates in zip(
                (-0.2, 0.2), (BLUE, ORANGE), ("before", "after"), (before[layer], after[layer]), strict=True
            ):
                ax.bar(at + shift, rates.numpy(), 0.36, color=colour, label=word)
            ax.set_xticks(at, [f"expert {n}" for n in at])
            ax.set_title(f"layer {layer}")
        axes[0].set(ylabel="share of the tokens", ylim=(0, 1.3))
        axes[0].legend(ncols=2, loc="upper left")
        return svg(figure), (
            "A small random mixture of experts, two of which each token goes to, on a short text before and after "
            f"<code>{spelled(edit)}</code>."
        )


PROMPT = "Ann has the key. Bob has the box.\nQuestion: Who has the key?"


def draw_prompt_edit(edit: PromptEdit) -> tuple[str, str]:
    """A prompt as it was and as it is; what the edit puts around it has another colour."""
    made, width = edit.edit(PROMPT), 52
    begin = made.rfind(PROMPT)
    parts = ((made[:begin], ORANGE), (PROMPT, INK), (made[begin + len(PROMPT) :], ORANGE))
    sides = [
        [(line, colour) for text, colour in side for whole in text.splitlines() for line in wrapped(whole, width)]
        for side in (((PROMPT, INK),), parts)
    ]
    lines = max(map(len, sides))
    with drawing(8.6, 0.55 + 0.17 * lines) as figure:
        for ax, word, side in zip(figure.subplots(1, 2), ("before", "after"), sides, strict=True):
            bare(ax)
            ax.set_title(word)
            ax.set(xlim=(0, 1), ylim=(lines + 0.5, -0.5))
            for n, (line, colour) in enumerate(side):
                ax.text(0.03, n + 0.5, line, color=colour, va="center", family="monospace", fontsize=7.5)
        return svg(figure), f"A prompt before and after <code>{spelled(edit)}</code>; what is new has another colour."


def wrapped(line: str, width: int) -> list[str]:
    """The lines of a paragraph; an empty one stays."""
    return textwrap.wrap(line, width) or [""]


SAYING = "To be, or not to be. That is 1 of 2 questions. To be, or"


def draw_policy(policy: Policy) -> tuple[str, str]:
    """What a policy does to the cache of the hand-made model behind a saying."""
    if "store" in policy.parts:
        return draw_stored(policy)
    ids, read, small = handmade.ids(SAYING), list[Any](), Budget(0.4, sinks=1, recent=3, every=0)
    name, mine = type(policy).__name__, (policy,)
    if "score" in policy.parts:
        mine = (policy.within(small),)
        said = f"which tokens of a text they still have under <code>{name}</code> when 40 % may stay"
    elif "merge" in policy.parts:
        mine = (Streaming(small), policy)
        said = f"how many tokens each entry stands for under <code>{name}</code>, when the first and the last 40 % stay"
    else:
        mine = (Witness(policy.within(small), read, small),)
        said = f"which tokens of a text its last one reads under <code>{name}</code> when 40 % may be read"
    with attach(handmade.model(), *mine) as attached:
        # what reads all at its first token does not at its fourth
        cache = attached.model(ids[:, :-4]).past_key_values
        for token in ids[:, -4:].split(1, 1):
            attached.model(token, past_key_values=cache)
    read = read[-len(cache.layers) :]
    names = [f"{name}, layer {n}" for n, heads in enumerate(handmade.HEADS) for name in heads]
    held = np.zeros((len(names), ids.shape[1]))
    for n, layer in enumerate(cache.layers):
        position, store = layer.store.positions()[0], layer.store
        mass = torch.ones(position.shape) if store.mass is None else store.spread(store.mass)[0].log2() + 1
        if read and read[n][1] is not None:
            position, mass = read[n][1][0], torch.ones(read[n][1][0].shape)
        for head, (at, weight) in enumerate(zip(position.tolist(), mass.tolist(), strict=True)):
            for where, amount in zip(at, weight, strict=True):
                if where < ids.shape[1]:
                    held[n * len(handmade.HEADS[0]) + head, where] = amount
    with drawing(8.6, 2.4) as figure:
        ax = figure.subplots()
        shade(ax, held, ORANGE, most=1.6 * max(1.0, held.max()))
        ax.set_yticks(range(len(names)), names, fontsize=8)
        ax.set_xticks(range(ids.shape[1]), ["^", *SAYING], fontsize=7, family="monospace")
        ax.tick_params(length=0)
        ax.set_xticks(np.arange(ids.shape[1]) + 0.5, minor=True)
        return svg(figure), f"Eight heads that do what their names say, and {said}; ^ is the start of the text."


def draw_stored(policy: Policy) -> tuple[str, str]:
    """Keys of the hand-made model as they are, as they are stored, and the difference."""
    ids = handmade.ids(SAYING)
    found = []
    for one in (Streaming(1.0), policy):
        with attach(handmade.model(), one) as attached:
            store = attached.model(ids).past_key_values.layers[1].store
        found.append(store.spread(store.keys)[0, 1, : ids.shape[1]].float().T.numpy())
    sides = {"as they are": found[0], "as they are stored": found[1], "the difference": abs(found[1] - found[0])}
    with drawing(8.6, 1.9) as figure:
        for ax, (title, rows) in zip(figure.subplots(1, 3), sides.items(), strict=True):
            shade(ax, abs(rows), ORANGE, most=abs(found[0]).max())
            ax.set_title(title, fontsize=8)
            ax.set_xlabel("token", fontsize=8)
            ax.tick_params(labelsize=6)
        figure.axes[0].set_ylabel("channel", fontsize=8)
        return svg(figure), f"Sizes of the keys of one head under <code>{spelled(policy)}</code>."


@torch.no_grad()
def draw_pruner(pruner: Pruner) -> tuple[str, str]:
    """How likely the hand-made model finds what comes next, whole and without the parts."""
    model, said = handmade.model(), "abcabcabcabc"
    ids = handmade.ids(said)
    likely = [model(ids).logits]
    with attach(model, pruner):
        likely.append(model(ids).logits)
        left = sum(p.numel() for p in model.parameters())
    share = 1 - left / sum(p.numel() for p in model.parameters())
    with drawing(7.4, 1.9) as figure:
        ax = figure.subplots()
        at = np.arange(len(said))
        for shift, colour, word, logits in zip((-0.2, 0.2), (BLUE, ORANGE), ("whole", "pruned"), likely, strict=True):
            right = logits[0, :-1].softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            ax.bar(at + shift, right.numpy(), 0.36, color=colour, label=word)
        ax.set_xticks(at, list(said))
        ax.set_ylim(0, 1.35)
        ax.set_ylabel("probability of each letter")
        ax.legend(ncols=2, loc="upper left")
        return svg(figure), (
            f"The hand-made model reads a text, whole and under <code>{spelled(pruner)}</code>, which takes out "
            f"{share:.0%} of its weights."
        )


def draw_schedule(schedule: Schedule) -> tuple[str, str]:
    """What it moves by the size of the fast memory, between the naive form and the bound."""
    # not the small setting: it would be as small beside this shape as it is large beside the other pictures' texts
    m, shape = type(schedule)(), traffic.Shape(queries=8192, keys=8192, dim=64)
    sizes = [round(2 ** (n / 4)) for n in range(4 * 6, 4 * 22 + 1)]

    def course(moved: Callable[[traffic.Shape, int], Any]) -> list[float]:
        """Numbers moved at each size; none where nothing fits."""
        found = []
        for fast in sizes:
            try:
                found.append(getattr(made := moved(shape, fast), "total", made))
            except FoveateError:
                found.append(math.nan)
        return found

    with drawing(7.4, 2.4) as figure:
        ax = figure.subplots()
        ax.loglog(sizes, course(traffic.naive), color=INK, lw=0.7, ls=":", label="naive")
        ax.loglog(sizes, course(traffic.lower_bound), color=INK, lw=0.7, label="least possible")
        ax.loglog(sizes, course(m.traffic), color=ORANGE, lw=1.8, label=type(m).__name__)
        ax.axvline(shape.dim**2, color=INK, lw=0.4)
        ax.annotate("d²", (shape.dim**2, 1), (3, -3), xycoords=("data", "axes fraction"), textcoords="offset points")
        ax.set(xlabel="numbers that the fast memory holds", ylabel="numbers moved")
        ax.legend(loc="upper right")
        return svg(figure), (
            f"What moves between slow and fast memory under <code>{spelled(m)}</code>: {shape.queries:,} queries and "
            f"keys of width {shape.dim}, one head."
        )


@torch.no_grad()
def draw_operator(operator: Operator) -> tuple[str, str]:
    """How far each output moves when another token stands in the place of one, beside softmax."""
    length = 24
    with drawing(7.4, 3.0) as figure:
        for ax, m in zip(figure.subplots(1, 2), (Rule(), operator), strict=True):
            # a rule that has no causal form is drawn without one, and softmax beside it, too
            module = replacing.layer(m if m is operator or operator.causal else Full())
            x, other = replacing.texts(1, length)[0], replacing.texts(1, length, seed=1)[0]
            at = torch.arange(length)
            changed = torch.where((at[:, None] == at)[..., None], other, x)
            moved = (module(changed) - module(x[None])).norm(dim=-1).T
            shade(ax, moved.numpy(), BLUE if m is not operator else ORANGE, most=float(moved.max()))
            ax.set(title="softmax" if m is not operator else type(m).__name__, xlabel="token that is another one")
        figure.axes[0].set_ylabel("output that moves")
        return svg(figure), (
            f"How far the outputs of a random layer move when one of its {length} inputs is another one: under "
            f"softmax, and "
            f"under <code>{spelled(operator)}</code>. Each map is shaded by its own largest number."
        )


class Full(Rule):
    """Softmax where all see all."""

    causal = False


DRAWINGS: dict[type, Callable[[Any], tuple[str, str]]] = {
    Metric: draw_metric,
    ModelMetric: draw_model_metric,
    Edit: draw_edit,
    Pattern: draw_pattern,
    HeadEdit: draw_head_edit,
    ResidualEdit: draw_residual_edit,
    ExpertEdit: draw_expert_edit,
    PromptEdit: draw_prompt_edit,
    Policy: draw_policy,
    Pruner: draw_pruner,
    Schedule: draw_schedule,
    Operator: draw_operator,
}


# ---------------------------------------------------------------- a real model


def measured(name: str) -> tuple[str, str] | None:
    """Maps of a metric's labels over the heads of smollm2, from `data/smollm2.csv`; None where it has none there."""
    table = pd.read_csv(MEASURED, comment="#")
    labels = [c for c in table.columns if c == name or c.startswith((f"{name}_", f"{name}:"))]
    # one number for all heads is no map
    labels = [c for c in labels if table[c].nunique() > 1 and owner(c, table) == name][:MOST_MAPS]
    if not labels:
        return None
    with drawing(1.0 + 1.9 * len(labels), 3.3) as figure:
        axes = figure.subplots(1, len(labels), squeeze=False, sharey=True)[0]
        for ax, label in zip(axes, labels, strict=True):
            grid = table.pivot(index="layer", columns="head", values=label).to_numpy()
            low = min(0.0, float(pd.Series(grid.ravel()).min()))
            shade(ax, grid - low, GREEN)
            bare(ax)
            ax.set_title(label, fontsize=8)
            ax.set_xlabel(f"head; strongest: {number(float(pd.Series(grid.ravel()).max()))}", fontsize=8)
        axes[0].set_yticks(range(0, len(grid), 5))
        axes[0].set_ylabel("layer")
        caption = (
            "On a real model: the 270 heads of smollm2 over 4,096 tokens of Python's documentation, layers downwards. "
            "Empty is the smallest value (0, or below where there are negative ones); gaps were not measured."
        )
        return svg(figure), caption


def owner(label: str, table: pd.DataFrame) -> str:
    """The mechanism that a label belongs to: the longest name that it begins with."""
    from foveate.core.registry import names

    return max((n for n in names("measure") if label == n or label.startswith((f"{n}_", f"{n}:"))), key=len, default="")
