"""Whether an additive recurrence sees a grid in one scan where recurrences that decay need several.

Layers with random weights on grids of 8 x 8 cells. Reach is the share of pairs of cells in which the output of the one
depends on the input of the other, by its gradient. The order in which cells are scanned is changed, each cell keeping
its place. The controls are recurrences that decay, in one scan, in two (to and fro) and in four (along columns, too),
whose outputs are averaged; the additive recurrence where no cell sees a later one; and one that never decays. Times are
of features and scans alone, in turns, their ratios inside each round.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from _claim import mean, number, write
from torch import Tensor

import foveate
from foveate.core.recurrence import Heads, Recurrence
from foveate.core.states import run
from foveate.replace import Elu, GatedDelta, Lightnet, Transnormer

SEEDS = (0, 1, 2)
SIDE, WIDTH, HEADS = 8, 32, 4
# largest change of outputs that is none, relative to the largest output, and the least that is one
NONE, SOME = 1e-9, 1e-2
# the timed grids, and how often
BATCH, TIMED_SIDE, TIMED_WIDTH, ROUNDS = 4, 32, 256, 15
SCANS = (1, 2, 4)


def decaying() -> dict[str, Recurrence]:
    # positions and convolutions would be other ways from cell to cell
    return {"transnormer": Transnormer(layers=2, lrpe=0), "gated_delta": GatedDelta(convolution=0)}


def orders(side: int) -> list[Tensor]:
    """Cells row by row, the same from the end, column by column, and that from the end."""
    rows = torch.arange(side * side)
    columns = rows.view(side, side).T.flatten()
    return [rows, rows.flip(0), columns, columns.flip(0)]


def scanned(layer: foveate.nn.Attention, x: Tensor, order: Tensor) -> Tensor:
    """Outputs by cell when the cells are scanned in this order, each at its own place."""
    heads = layer.heads(x[:, order])
    heads = replace(heads, tokens=replace(heads.tokens, place=order[None].expand(len(x), -1)))
    out, _ = layer.rule.operator.flow(heads, None)
    return layer.o_proj(out.transpose(1, 2).flatten(2))[:, order.argsort()]


def averaged(layer: foveate.nn.Attention, scans: int) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.stack([scanned(layer, x, order) for order in orders(SIDE)[:scans]]).mean(0)


def felt(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """How much each cell's output depends on each cell's input, [cells, cells]: gradients in a random direction."""
    x = x.clone().requires_grad_()
    out = call(x)[0]
    toward = (out * torch.randn_like(out)).sum(-1)
    return torch.stack([torch.autograd.grad(one, x, retain_graph=True)[0][0].norm(dim=-1) for one in toward])


def reach(found: Tensor) -> float:
    """Share of pairs of different cells in which the one depends on the other."""
    different = ~torch.eye(len(found), dtype=torch.bool)
    return float((found[different] > 0).double().mean())


def evenness(found: Tensor) -> float:
    """Dependence on the neighbours above and below over that on those at the sides."""
    row, column = torch.arange(SIDE * SIDE) // SIDE, torch.arange(SIDE * SIDE) % SIDE
    far_rows, far_columns = ((a[:, None] - a).abs() for a in (row, column))
    above, beside = (far_rows == 1) & (far_columns == 0), (far_rows == 0) & (far_columns == 1)
    return float(found[above].mean() / found[beside].mean())


@torch.no_grad()
def changed(layer: foveate.nn.Attention, x: Tensor) -> float:
    """Largest change of outputs, relative to the largest one, over orders of the cells, a random one included."""
    first, *others = orders(SIDE)
    base = scanned(layer, x, first)
    others = [*others, torch.randperm(SIDE * SIDE)]
    return max(float((scanned(layer, x, o) - base).abs().max() / base.abs().max()) for o in others)


def measured(seed: int) -> dict[str, dict[str, float]]:
    """Reach, evenness and what the order changes, by recurrence and number of scans."""
    torch.manual_seed(seed)
    x = torch.randn(1, SIDE * SIDE, WIDTH, dtype=torch.float64)
    additive = Lightnet(rank=8, inner=(SIDE,))

    def layer(rule: Recurrence, causal: bool = True) -> foveate.nn.Attention:
        return foveate.nn.Attention(WIDTH, HEADS, rule=rule, causal=causal).double()

    whole = layer(additive, causal=False)
    made = {"additive": whole, "additive, no cell sees a later one": layer(additive)}
    made["elu, all see all"] = layer(Elu(), causal=False)
    made |= {name: layer(rule) for name, rule in decaying().items()}
    found = {}
    for name, one in made.items():
        for scans in SCANS if name in decaying() else (1,):
            seen = felt(averaged(one, scans), x)
            found[f"{name}, {scans} scan{'s' * (scans > 1)}"] = {"reach": reach(seen), "evenness": evenness(seen)}
        found[f"{name}, 1 scan"]["changed"] = changed(one, x)
    return found


@torch.no_grad()
def seconds(heads: Heads, rule: Recurrence, scans: int) -> float:
    """One forward pass of features and scans in so many orders."""

    def ordered(order: Tensor) -> Heads:
        q, k, v = (t[:, :, order] for t in (heads.q, heads.k, heads.v))
        tokens = replace(heads.tokens, x=heads.tokens.x[:, order], place=heads.tokens.place[:, order])
        return replace(heads, q=q, k=k, v=v, tokens=tokens)

    begun = time.perf_counter()
    outs = []
    for n, order in enumerate(orders(TIMED_SIDE)[:scans]):
        # row by row is how cells come
        out, _ = run(rule.scan(ordered(order) if n else heads))
        outs.append(out[:, :, order.argsort()] if n else out)
    if scans > 1:
        torch.stack(outs).mean(0)
    return time.perf_counter() - begun


def timed() -> dict[str, list[float]]:
    """Seconds by recurrence and number of scans, round by round."""
    torch.manual_seed(SEEDS[0])
    x = torch.randn(BATCH, TIMED_SIDE**2, TIMED_WIDTH)
    calls: dict[str, tuple[Heads, Recurrence, int]] = {}
    rules: dict[str, Recurrence] = {"additive": Lightnet(inner=(TIMED_SIDE,))} | decaying()
    for name, rule in rules.items():
        layer = foveate.nn.Attention(TIMED_WIDTH, HEADS, rule=rule, causal=name != "additive")
        with torch.no_grad():
            heads = layer.heads(x)
        for scans in SCANS if name != "additive" else (1,):
            calls[f"{name}, {scans}"] = heads, rule, scans
    found: dict[str, list[float]] = {name: [] for name in calls}
    for n in range(ROUNDS + 1):
        for name in random.Random(n).sample(list(calls), len(calls)):
            took = seconds(*calls[name])
            # the first round warms up
            if n:
                found[name].append(took)
    return found


def spread(top: list[float], bottom: list[float]) -> dict[str, float]:
    """Median of the ratios inside rounds, with quartiles."""
    low, middle, high = np.percentile(np.divide(top, bottom), [25, 50, 75])
    return {"value": number(middle), "low": number(low), "high": number(high), "n": len(top)}


def main() -> None:
    runs, took = [measured(seed) for seed in SEEDS], timed()
    numbers: dict[str, Any] = {}
    control: dict[str, Any] = {}
    told = {
        "reach": "share of pairs of cells that are reached",
        "changed": "outputs changed by the order of cells",
        "evenness": "dependence on neighbours above and below / at the sides",
    }
    for name in runs[0]:
        into = numbers if name == "additive, 1 scan" else control
        into[name] = {told[what]: mean([one[name][what] for one in runs]) for what in told if what in runs[0][name]}
    one_scan = took["additive, 1"]
    for name in decaying():
        for scans in SCANS:
            numbers[f"time, additive in 1 scan / {name} in {scans}"] = spread(one_scan, took[f"{name}, {scans}"])
        for scans in SCANS[1:]:
            ratio = spread(took[f"{name}, {scans}"], took[f"{name}, 1"])
            control[f"time, {name} in {scans} scans / in 1"] = ratio
    free = all(r["additive, 1 scan"]["changed"] <= NONE and r["additive, 1 scan"]["reach"] == 1 for r in runs)
    bound = all(
        r[f"{name}, 1 scan"]["changed"] >= SOME
        and r[f"{name}, 1 scan"]["reach"] < 1
        and r[f"{name}, 2 scans"]["reach"] == 1
        for r in runs
        for name in decaying()
    )
    cheaper = all(numbers[f"time, additive in 1 scan / {name} in 2"]["high"] < 1 for name in decaying())
    write(
        title="You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet",
        claim="An additive recurrence handles a grid in a single scan, where recurrences that decay need several scans "
        "to see all of it, which takes longer.",
        verdict="fails" if not free else "holds" if bound and cheaper else "partly",
        numbers=numbers,
        control=control,
        seeds=list(SEEDS),
        rule=f"in every seed, the additive recurrence in one scan reaches every cell from every cell, and the order of "
        f"cells changes outputs by at most {NONE:g} of the largest (else it fails); those that decay reach less than "
        f"all in one scan and all in two, and the order changes theirs by at least {SOME:g}; and the additive one "
        "takes less time in one scan than each of them in two (upper quartile of the ratio). Holds: all three",
        setting=f"reach: {SIDE} x {SIDE} cells, width {WIDTH}, {HEADS} heads, float64; times: {BATCH} grids of "
        f"{TIMED_SIDE} x {TIMED_SIDE}, width {TIMED_WIDTH}, {HEADS} heads, forward",
        note="the additive recurrence is free of the order in the form in which all see all, one sum over all cells; "
        "where no cell sees a later one, it is as one-sided as the others; elu, which never decays, is as free",
        encoder="none: layers with random weights, random grids",
    )


if __name__ == "__main__":
    main()
