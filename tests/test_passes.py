"""Passes over the keys against dense sums in float64, and edits that are said by them against their rows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.core import native
from foveate.core.mechanism import Edit
from foveate.core.passes import Passes
from foveate.core.reductions import RowEntropy, Sample
from foveate.core.rows import View, attend
from foveate.steer import AttentionCalibration, Sharpen, SinkRedistribution, Temperature
from foveate.testing import views

pytestmark = pytest.mark.skipif(
    not native.available(), reason="the native kernel is not built: python setup.py build_ext --inplace"
)

SITUATIONS = views.situations(without="bias scattered")
PLAIN = ("causal", "left_padded", "packed", "window", "sinks_window_padded", "soft_cap", "empty_rows", "decode_padded")


def scores(view: View) -> Tensor:
    """Scores by their definition, in float64."""
    q = view.q.double().unflatten(1, (view.kv_heads, -1))
    s = (q @ view.k.double()[:, :, None].mT * view.scale).flatten(1, 2)
    s = s if view.softcap is None else view.softcap * torch.tanh(s / view.softcap)
    return s + view.mask.additive(torch.arange(view.queries), 0, view.keys)


def values(view: View) -> Tensor:
    return view.v.double().repeat_interleave(view.grouped, 1)


def close(got: Tensor, want: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("situation", PLAIN)
def test_sums_of_what_is_up_to_a_cut(situation: str) -> None:
    view = views.view(situation)
    passes, s = Passes(view), scores(view)
    lse, cut = passes.softmax().lse, torch.rand(view.batch, view.heads, view.queries) * 0.3
    p = torch.where(s > -torch.inf, (s - lse.double()[..., None]).exp(), 0.0)
    p = torch.where(p > cut[..., None], 0.0, p)
    got = passes.up_to(lse, cut)
    close(got.mass, p.sum(-1))
    close(got.out, p @ values(view))
    assert passes.up_to(lse, cut, mixed=False).out is None
    # from a key on, and before another one
    low, high = torch.tensor([[2]], dtype=torch.int32), torch.tensor([[9]], dtype=torch.int32)
    close(passes.up_to(lse, cut, low, high).mass, p[..., 2:9].sum(-1))


@pytest.mark.parametrize("power", [1, 2, 5])
@pytest.mark.parametrize("situation", PLAIN)
def test_sums_of_what_is_above_a_cut(situation: str, power: int) -> None:
    view = views.view(situation)
    s, size = scores(view), (view.batch, view.heads, view.queries)
    shift, cut = torch.randn(size), torch.rand(size)
    f = ((s + shift.double()[..., None]).exp() - cut[..., None]).relu() ** power
    got = Passes(view).excess(shift, cut, power)
    # a power of something large loses digits of the whole sum
    for found, want in ((got.mass, f.sum(-1)), (got.out, f @ values(view))):
        torch.testing.assert_close(found.double(), want, rtol=0.0, atol=2e-5 * float(f.sum(-1).amax()))


@pytest.mark.parametrize("situation", PLAIN)
def test_softmax_over_a_part(situation: str) -> None:
    view = views.view(situation)
    s = scores(view)[..., 3:]
    got = Passes(view).softmax(low=torch.full((1, 1), 3, dtype=torch.int32), sinks=False)
    close(got.lse, s.logsumexp(-1))
    close(got.top, s.amax(-1))
    p = torch.where((s > -torch.inf).any(-1, keepdim=True), s.softmax(-1), 0.0)
    close(got.out, p @ values(view)[:, :, 3:])


EDITS: list[Edit] = [
    Sharpen(),
    Sharpen(3.0, sink=0),
    Sharpen(1.0, offset=0.4, sink=4),
    Sharpen(2.0, heads=((1, 1),)),
    Sharpen(64.0, sink=0),
    AttentionCalibration(threshold=0.08),
    AttentionCalibration(0.0, threshold=0.3, spared=0),
    AttentionCalibration(0.6, threshold=0.1, spared=3, heads=((1, 0), (1, 2))),
    SinkRedistribution(((2, 9),), centric=0.0, least=0.0, threshold=1.5),
    SinkRedistribution(((0, 4),), portion=1.0, centric=0.4, least=0.1, threshold=1.2, heads=((1, 1),)),
    SinkRedistribution(((1, 3), (2, 8)), centric=0.1, least=0.0, threshold=1.5),
]


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("edit", EDITS, ids=str)
def test_what_passes_say_is_what_rows_give(edit: Edit, situation: str) -> None:
    view = views.view(situation)
    if view.batch == 1 and len(getattr(edit, "span", ())) > 1:
        pytest.skip("one span for each of two texts")
    fast = attend(view, edits=[edit])
    assert fast.engine == "native"
    rows = attend(view, edits=[edit], engine="blocks").out
    real = view.mask.rows.expand(view.batch, -1)
    loose = 0.02 if view.q.dtype == torch.bfloat16 else 2e-4
    torch.testing.assert_close(fast.out.movedim(1, 2)[real], rows.movedim(1, 2)[real], rtol=loose, atol=loose)
    assert fast.out.dtype == view.q.dtype and fast.out.isfinite().all()


def test_the_rows_come_where_somebody_looks_or_passes_do_not_fit() -> None:
    view, edit = views.view("causal"), Sharpen()
    assert attend(view, [RowEntropy()], edits=[edit]).engine == "blocks"
    assert attend(view, edits=[edit, AttentionCalibration()]).engine == "blocks"
    assert attend(view, edits=[Sharpen(1.5)]).engine == "blocks"
    assert attend(views.view("bias"), edits=[edit]).engine == "blocks"
    assert attend(replace(view, q=view.q.clone().requires_grad_()), edits=[edit]).engine == "blocks"
    double = replace(view, q=view.q.double(), k=view.k.double(), v=view.v.double())
    assert attend(double, edits=[edit]).engine == "blocks"
    # samples are rows of their own, and see the edit
    looked = attend(view, [Sample(3)], edits=[edit])
    assert looked.engine == "native"
    index = looked[Sample(3)].index
    mixed = looked[Sample(3)].weights @ values(view).float()
    torch.testing.assert_close(mixed, looked.out[:, :, index], rtol=2e-4, atol=2e-4)


def test_tilts_come_first() -> None:
    view, edits = views.view("causal"), [Temperature(1.7), AttentionCalibration(threshold=0.08)]
    fast = attend(view, edits=edits)
    assert fast.engine == "native"
    torch.testing.assert_close(fast.out, attend(view, edits=edits, engine="blocks").out, rtol=2e-4, atol=2e-4)
    alone = attend(view, edits=edits[1:]).out
    assert float((fast.out - alone).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"activation": "up_to"}, "a shift and a cut for each row"),
        ({"cut": torch.zeros(1)}, "a shift and a cut for each row"),
        ({"activation": "excess", "shift": torch.zeros(()), "cut": torch.zeros(()), "power": 0}, "at least 1, got 0"),
    ],
)
def test_what_the_kernel_refuses(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Passes(views.view("causal")).run(None, None, **change)
    view = views.view("causal")
    lse = Passes(view).softmax().lse
    for activation, says in (("up_to", "up_to has no derivatives"), ("soft_excess", "takes a shift, a cut")):
        with pytest.raises(ValueError, match=says):
            native.derive(
                view.q, view.k, view.v, view.q, lse, lse,
                scale=1.0, lo=view.mask.low, hi=view.mask.high, activation=activation,
            )  # fmt: skip
    with pytest.raises(ValueError, match="distances need"):
        native.attend(view.q, view.k, view.v, scale=1.0, lo=view.mask.low, hi=view.mask.high, want_distance=True)
    assert math.isfinite(float(lse[0, 0, 0]))
