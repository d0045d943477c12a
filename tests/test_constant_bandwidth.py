"""Constant bandwidth: the order itself, what it loads, and that nothing but the order changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from foveate.compress import ConstantBandwidth
from foveate.compress.exact import constant_bandwidth
from foveate.compress.exact.constant_bandwidth import stream
from foveate.core.attach import attach
from foveate.core.rows import View, attend
from foveate.core.traffic import Shape
from foveate.testing import tiny, views
from foveate.testing.checks.exact import truth

UNITS = [1, 2, 4, 7, 64]


# ---------------------------------------------------------------- the order


@pytest.mark.parametrize("at_once", [1, 3, 8, 100])
@pytest.mark.parametrize(("keys", "units"), [(8, 1), (8, 3), (8, 8), (1, 1), (13, 4)])
def test_units_share_one_key_a_step_and_begin_one_after_the_other(keys, units, at_once):
    steps = [(int(k), t) for key, takes in stream(keys, units, at_once) for k, t in zip(key, takes.T, strict=True)]
    assert [key for key, _ in steps] == [n % keys for n in range(keys + units - 1)]
    for unit in range(units):
        met = [key for key, takes in steps if takes[unit]]
        assert met == [(unit + n) % keys for n in range(keys)]


@pytest.mark.parametrize(("queries", "keys"), [(64, 64), (129, 129), (50, 64), (1, 64), (200, 70), (50, 3)])
def test_the_busiest_step_loads_the_same_whatever_the_parallelism(queries, keys):
    for units in UNITS:
        found = ConstantBandwidth(units).loads(queries, keys)
        assert found.max() == 3
        assert found.min() == (3 if units == keys == queries == 1 else 2)
        # each query once, a key and a value in every step
        assert int(found.sum()) == 2 * len(found) + queries


def test_side_by_side_along_the_keys_of_a_row_the_busiest_step_grows_with_the_parallelism():
    for units in UNITS:
        found = ConstantBandwidth(units).naive(129, 129)
        assert found.max() == 2 * units + 1
        assert int(found.sum()) == 129 * (2 * 129 + 1)
        assert len(found) == 129 * -(-129 // units)


@pytest.mark.parametrize(("n", "p"), [(64, 4), (64, 16), (128, 2)])
def test_steps_and_loads_are_those_of_the_paper(n, p):
    m = ConstantBandwidth(p)
    steps = n * n // p + p - 1
    assert len(m.loads(n, n)) == steps
    assert len(m.naive(n, n)) == n * n // p
    # the paper counts the keys and queries of q k^T
    assert int(m.loads(n, n).sum()) - steps == n * n // p + n + p - 1
    assert int(m.naive(n, n).sum()) - n * n == n * n + n


def test_a_row_begins_in_the_step_in_which_its_query_is_loaded():
    found = ConstantBandwidth(4).loads(10, 6)
    assert (found == 3).nonzero()[:, 0].tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 12, 13]
    # the last row meets all six keys
    assert len(found) == 13 + 6


# ---------------------------------------------------------------- what comes out


def attended(view: View, units: int, steps: int, monkeypatch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Its outputs, in so few steps and rows at a time that every pass is in several pieces."""
    monkeypatch.setattr(constant_bandwidth, "STEPS", steps)
    monkeypatch.setattr(constant_bandwidth, "STEP_BYTES", 1)
    return ConstantBandwidth(units).run(view)


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("name", ["causal", "full", "left_padded_window", "cross", "sinks_empty_rows", "soft_cap"])
def test_in_whatever_pieces_it_is_attention(name, units, monkeypatch):
    view = views.view(name)
    view = replace(view, q=view.q.double(), k=view.k.double(), v=view.v.double())
    assert not ConstantBandwidth().refuses(view)
    out, lse = attended(view, units, 5, monkeypatch)
    want = attend(view, engine="reference", dtype=torch.float64).out
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, truth(view), rtol=0, atol=1e-12)


def dense_lse(view: View) -> torch.Tensor:
    """Log-sum-exps whose derivative is finite also where a row sees nothing; the value there means nothing."""
    k = view.k.repeat_interleave(view.grouped, 1)
    s = view.scale * view.q @ k.transpose(2, 3)
    s = s if view.softcap is None else view.softcap * torch.tanh(s / view.softcap)
    hidden = view.mask.additive(torch.arange(view.queries), 0, view.keys) == -torch.inf
    lse = s.masked_fill(hidden, -1e30).logsumexp(-1)
    return lse if view.sinks is None else torch.logaddexp(lse, view.sinks[:, None])


@pytest.mark.parametrize("name", ["causal", "right_padded", "sinks_window_padded", "sinks_empty_rows", "soft_cap"])
def test_gradients_are_those_of_the_dense_form(name, monkeypatch):
    base, found = views.view(name), []
    empty = (base.mask.high <= base.mask.low)[:, None]
    rng = torch.Generator()
    for way in ("order", "reference"):
        leaves = {n: getattr(base, n).double().requires_grad_() for n in ("q", "k", "v")}
        if base.sinks is not None:
            leaves["sinks"] = base.sinks.double().requires_grad_()
        view = replace(base, **leaves)
        if way == "order":
            out, lse = attended(view, 4, 5, monkeypatch)
        else:
            out, lse = attend(view, engine="reference", dtype=torch.float64).out, dense_lse(view)
        lse = lse.masked_fill(empty, 0.0)
        weigh = [torch.randn(t.shape, generator=rng.manual_seed(2), dtype=t.dtype) for t in (out, lse)]
        loss = sum((t * w).sum() for t, w in zip((out, lse), weigh, strict=True))
        found.append(torch.autograd.grad(loss, list(leaves.values())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["left_padded", "full_right_padded", "empty_rows", "sinks_empty_rows", "cross"])
def test_nan_behind_the_mask_stays_there(name, grad):
    clean = views.view(name)
    dirty = views.poisoned(clean)
    assert dirty.k.isnan().any() or dirty.q.isnan().any()
    leaves = [t.requires_grad_(grad) for t in (dirty.q, dirty.k, dirty.v)]
    out, lse = ConstantBandwidth().run(dirty)
    real = clean.mask.rows[:, None].expand(lse.shape)
    want_out, want_lse = ConstantBandwidth().run(clean)
    torch.testing.assert_close(out.detach()[real], want_out[real])
    torch.testing.assert_close(lse.detach()[real], want_lse[real])
    assert out.isfinite().all()
    if grad:
        for g in torch.autograd.grad(out.square().sum(), leaves):
            assert g.isfinite().all()


def test_rows_that_see_nothing_weigh_nothing():
    out, lse = ConstantBandwidth().run(views.view("all_masked"))
    assert out.eq(0).all()
    assert lse.eq(-torch.inf).all()


def test_a_model_gives_the_same_with_it():
    model, batch = tiny.model("llama"), tiny.inputs("llama", padding="left", length=24)
    with torch.no_grad():
        plain = model(**batch).logits
        with attach(model, ConstantBandwidth(units=5)):
            ordered = model(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(ordered[real], plain[real], rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", ["bias", "scattered"])
def test_what_is_no_interval_of_keys_is_refused(name):
    assert "interval" in ConstantBandwidth().refuses(views.view(name))


# ---------------------------------------------------------------- what it costs


class Largest(TorchDispatchMode):
    """Remembers the most numbers that one tensor had."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                self.numbers = max(self.numbers, t.numel())
        return out


@pytest.mark.parametrize("grad", [False, True])
def test_no_tensor_grows_with_the_square_of_the_length(grad, monkeypatch):
    monkeypatch.setattr(constant_bandwidth, "STEP_BYTES", 1 << 14)
    found = []
    for length in (256, 512):
        view = views.view("causal", batch=1, queries=length, keys=length, heads=2, kv_heads=1)
        view.q.requires_grad_(grad)
        with Largest() as largest:
            out, _ = ConstantBandwidth().run(view)
            if grad:
                out.sum().backward()
        found.append(largest.numbers)
    assert found[1] <= 2 * found[0] < 2 * 256 * 256


def test_what_moves_is_what_the_steps_load():
    shape = Shape(queries=50, keys=64, dim=8, value_dim=6, batch=2, heads=6, kv_heads=3)
    moved = ConstantBandwidth(4).traffic(shape, 1 << 20)
    steps = len(ConstantBandwidth(4).loads(50, 64))
    assert moved.terms == {
        "queries": 2 * 6 * 50 * 8,
        "keys": 2 * 3 * steps * 8,
        "values": 2 * 3 * steps * 6,
        "outputs": 2 * 6 * 50 * 6,
    }
    assert moved.read + moved.written == sum(moved.terms.values())
    assert moved.written == shape.outputs()


def test_a_fast_memory_too_small_for_all_units_holds_fewer():
    shape = Shape(queries=64, keys=64, dim=8)
    # a key and a value, and for each unit a query, an output and two numbers
    room = {units: 16 + 18 * units for units in (1, 4, 16)}
    whole = ConstantBandwidth(16)
    for units, fast in room.items():
        assert whole.traffic(shape, fast) == ConstantBandwidth(units).traffic(shape, 1 << 20)
        assert whole.traffic(shape, fast - 1).read >= whole.traffic(shape, fast).read
    assert whole.traffic(shape, room[4] - 1) == ConstantBandwidth(3).traffic(shape, 1 << 20)
    assert whole.traffic(shape, 1) == ConstantBandwidth(1).traffic(shape, 1 << 20)
