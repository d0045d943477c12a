"""Those that compute attention exactly, in an order of their own."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch

from foveate.core.mechanism import Schedule
from foveate.core.rows import attend as attend_rows
from foveate.core.traffic import Shape
from foveate.testing import views
from foveate.testing.checks.measuring import grid, same
from foveate.testing.checks.running import check, expect

# what models call most; a schedule that leaves these to others stands for nothing
PLAIN = ["causal", "full", "left_padded", "right_padded", "multi_query", "odd_length", "length_1", "decode_padded"]
FAST = (1 << 8, 1 << 12, 1 << 16, 1 << 22)


@check(Schedule)
def stands(m: Schedule) -> None:
    """It takes at least one of the calls that models make most, and gives their outputs and log-sum-exps."""
    taken = 0
    for name, view in grid(m, views.situations(without="bias scattered")):
        if m.refuses(view):
            continue
        taken += name in PLAIN
        out, lse = m.run(view)
        wide = replace(view, q=view.q.double(), k=view.k.double(), v=view.v.double())
        want = attend_rows(wide, engine="reference", dtype=torch.float64)
        loose = 0.03 if view.q.dtype == torch.bfloat16 else 3e-4
        same({"head outputs": out}, {"head outputs": want.out}, f"{name}, by its `run`", loose)
        same({"lse": lse}, {"lse": truth(wide)}, f"{name}, by its `run`", loose)
    expect(taken > 0, f"it refuses all of {', '.join(PLAIN)}: {m.refuses(views.view('causal'))}")


def truth(view: views.View) -> torch.Tensor:
    """Log-sum-exps by their definition."""
    q = view.q.unflatten(1, (view.kv_heads, -1))
    s = (q @ view.k[:, :, None].transpose(-1, -2) * view.scale).flatten(1, 2)
    s = s if view.softcap is None else view.softcap * torch.tanh(s / view.softcap)
    s = s + view.mask.additive(torch.arange(view.queries), 0, view.keys)
    lse = s.logsumexp(-1)
    if view.sinks is not None:
        lse = torch.where(lse == -torch.inf, lse, torch.logaddexp(lse, view.sinks.double()[:, None]))
    return lse


@check(Schedule)
def accounts(m: Schedule) -> None:
    """Its traffic covers reading what there is and writing what comes out, and never grows with the fast memory."""
    for shape in (Shape(queries=256, keys=256, dim=16), Shape(queries=1, keys=4096, dim=64, heads=4, kv_heads=2)):
        moved = [m.traffic(shape, fast) for fast in FAST]
        for fast, one in zip(FAST, moved, strict=True):
            where = f"{shape}, fast memory of {fast} numbers"
            expect(one.read >= shape.inputs(), f"{where}: {one.read} numbers read, the inputs are {shape.inputs()}")
            expect(one.written >= shape.outputs(), f"{where}: {one.written} written, the outputs are {shape.outputs()}")
        for (a, x), (b, y) in pairwise(zip(FAST, moved, strict=True)):
            expect(y.total <= x.total, f"{shape}: {y.total} numbers with {b} of fast memory, {x.total} with {a}")
