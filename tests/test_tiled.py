"""Tiled attention: the CPU kernel against plain PyTorch against the reference, under patterns, and its derivatives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.compress import BlockSparse, SplitKeys, Tiled
from foveate.core import native, tiled
from foveate.core.errors import BadInput, NotSupported
from foveate.core.mask import Mask
from foveate.core.mechanism import Pattern, Visits
from foveate.core.rows import View, attend
from foveate.measure import Entropy
from foveate.testing import tiny, views

# one of each trait
KINDS = [
    "causal", "full", "window", "left_padded", "right_padded", "packed_window", "empty_rows", "all_masked",
    "decode_padded", "cross", "multi_query", "wide_values", "narrow_values", "soft_cap", "sinks_window_padded",
    "bfloat16", "length_1", "odd_length", "long",
]  # fmt: skip
# rows and keys per block, and whether each head has its own
BLOCKS = [None, (4, 3, True), (1, 5, False), (130, 70, True)]
SHIFT = -2.0


@contextmanager
def without_kernel() -> Iterator[None]:
    """Plain PyTorch, whatever was built."""
    patch = pytest.MonkeyPatch()
    patch.setattr(tiled, "by_kernel", lambda *_: False)
    try:
        yield
    finally:
        patch.undo()


def random_visits(view: View, rows: int, keys: int, per_head: bool, seed: int = 0) -> Visits:
    rng = torch.Generator().manual_seed(seed)
    size = (view.batch, view.heads if per_head else 1, -(-view.queries // rows), -(-view.keys // keys))
    return Visits(torch.rand(size, generator=rng) < 0.5, rows, keys)


def visits_of(view: View, blocks: Any) -> Visits | None:
    return None if blocks is None else random_visits(view, *blocks)


def derived(view: View, visits: Visits | None, activation: str | None) -> dict[str, Tensor]:
    """Outputs, log-sum-exps, and the derivatives of a number that both of them make."""
    leaves = [x.clone().requires_grad_() for x in (view.q, view.k, view.v)]
    call = replace(view, **dict(zip("qkv", leaves, strict=True)))
    out, lse = tiled.attend(call, visits, activation=activation, shift=SHIFT if activation else 0.0)
    weigh = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    number = (out * weigh).sum() + (lse.masked_fill(lse == -torch.inf, 0.0) * weigh[..., 0]).sum()
    grads = torch.autograd.grad(number, leaves)
    return {"out": out, "lse": lse} | dict(zip(("dq", "dk", "dv"), grads, strict=True))


def near(a: Tensor, b: Tensor, what: str, tolerance: float = 3e-5) -> None:
    assert a.shape == b.shape and a.dtype == b.dtype
    a, b = a.detach().double(), b.detach().double()
    apart = (a - b).masked_fill(a == b, 0.0).abs()
    assert bool((apart <= tolerance * max(1.0, float(b.masked_fill(b.isinf(), 0.0).abs().max()))).all()), what


# ---------------------------------------------------------------- one truth


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("situation", KINDS)
def test_kernel_and_pytorch_agree_on_values_and_derivatives(situation: str, blocks: Any) -> None:
    view = views.view(situation)
    visits, loose = visits_of(view, blocks), 3e-2 if view.q.dtype == torch.bfloat16 else 3e-5
    for activation in (None,) if view.sinks is not None else (None, *native.ACTIVATIONS):
        got = derived(view, visits, activation)
        with without_kernel():
            want = derived(view, visits, activation)
        for name, x in want.items():
            near(got[name], x, f"{name}, activation {activation}", loose)


@pytest.mark.parametrize("blocks", BLOCKS[:2], ids=str)
@pytest.mark.parametrize("situation", ["left_padded", "packed_window", "soft_cap", "sinks_window_padded", "odd_length"])
def test_both_are_attention_by_its_definition(situation: str, blocks: Any) -> None:
    view = views.view(situation)
    visits = visits_of(view, blocks)
    seen = view.mask.additive(torch.arange(view.queries), 0, view.keys).expand(view.batch, view.heads, -1, -1)
    if visits is not None:
        seen = seen.masked_fill(~visits.block(torch.arange(view.queries), 0, view.keys), -torch.inf)
    want = dense(view, seen)
    loose = 3e-2 if view.q.dtype == torch.bfloat16 else 3e-5
    near(tiled.attend(view, visits)[0].double(), want, "by the kernel", loose)
    with without_kernel():
        near(tiled.attend(view, visits)[0].double(), want, "in PyTorch", loose)


def dense(view: View, seen: Tensor) -> Tensor:
    """Head outputs in float64, with the weights of all rows in memory."""
    q, k, v = (x.double() for x in (view.q, view.k, view.v))
    k, v = (x.repeat_interleave(view.grouped, 1) for x in (k, v))
    s = q @ k.transpose(-1, -2) * view.scale
    s = s if view.softcap is None else view.softcap * torch.tanh(s / view.softcap)
    s = s + seen.double()
    if view.sinks is not None:
        sink = view.sinks.double()[None, :, None, None].expand(*s.shape[:3], 1)
        return torch.cat([s, sink], -1).softmax(-1)[..., :-1] @ v
    return s.softmax(-1).nan_to_num(0.0) @ v


DEFINED = {
    "sigmoid": lambda s: 1 / (1 + torch.exp(-s)),
    "relu": lambda s: s.clamp_min(0),
    "softplus": lambda s: torch.log1p(torch.exp(s)),
}


@pytest.mark.parametrize("spread", [1.5, 60.0])
@pytest.mark.parametrize("activation", native.ACTIVATIONS)
def test_activations_by_their_definition(activation: str, spread: float) -> None:
    view = views.view("left_padded", spread=spread)
    out, total = tiled.attend(view, activation=activation, shift=SHIFT)
    k, v = (x.repeat_interleave(view.grouped, 1).double() for x in (view.k, view.v))
    seen = view.mask.additive(torch.arange(view.queries), 0, view.keys) == 0
    weights = DEFINED[activation](view.q.double() @ k.transpose(-1, -2) * view.scale + SHIFT).masked_fill(~seen, 0.0)
    near(out.double(), weights @ v, activation)
    near(total.double(), weights.sum(-1), f"sum of {activation}")


def test_softplus_keeps_its_digits_far_below_zero() -> None:
    q = torch.linspace(-80, 80, 4001)[None, None, :, None]
    one = torch.ones(1, 1, 1, 1)
    got = tiled.attend(View(q, one, one, scale=1.0), activation="softplus")[0].flatten().double()
    want = torch.nn.functional.softplus(q.flatten().double())
    # a score of -80 in units of ln 2 has itself been rounded
    assert float(((got - want).abs() / want).max()) < 1e-5


@pytest.mark.parametrize("activation", [None, *native.ACTIVATIONS])
@pytest.mark.parametrize("blocks", [None, (4, 3, True)], ids=str)
def test_derivatives_are_those_of_finite_differences(blocks: Any, activation: str | None) -> None:
    small = {"batch": 1, "queries": 7, "keys": 7, "heads": 2, "kv_heads": 1, "dim": 3, "value_dim": 2}
    view = views.view("left_padded", softcap=2.0, mask=views.with_mask(left=(2,)), **small)
    leaves = [x.double().requires_grad_() for x in (view.q, view.k, view.v)]
    visits = visits_of(view, blocks)

    def numbers(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        shift = SHIFT if activation else 0.0
        out, lse = tiled.attend(replace(view, q=q, k=k, v=v), visits, activation=activation, shift=shift)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(numbers, leaves)


def test_a_learned_sink_has_a_derivative() -> None:
    view = views.view("sinks")
    sinks = view.sinks.clone().requires_grad_()
    tiled.attend(replace(view, sinks=sinks))[0].sum().backward()
    wide = view.sinks.double().requires_grad_()
    call = replace(view, sinks=wide, **{n: getattr(view, n).double() for n in "qkv"})
    attend(call, engine="reference").out.sum().backward()
    near(sinks.grad.double(), wide.grad, "derivative of the sinks")


@pytest.mark.parametrize("situation", ["left_padded", "right_padded", "empty_rows", "cross"])
@pytest.mark.parametrize("blocks", [None, (4, 3, True)], ids=str)
def test_what_nobody_sees_may_be_garbage_in_both_passes(situation: str, blocks: Any) -> None:
    view = views.view(situation)
    visits = visits_of(view, blocks)
    clean = derived(view, visits, None)
    for kernel in (True, False):
        if kernel:
            found = derived(views.poisoned(view), visits, None)
        else:
            with without_kernel():
                found = derived(views.poisoned(view), visits, None)
        for name, x in clean.items():
            near(found[name], x, name, 1e-4)


def test_numbers_do_not_depend_on_threads() -> None:
    view = views.view("long")
    low, high = view.mask.low.contiguous(), view.mask.high.contiguous()
    out, lse = tiled.attend(view)
    rest = {"scale": view.scale, "lo": low, "hi": high}
    found = [native.derive(view.q, view.k, view.v, out, lse, lse, threads=n, **rest) for n in (1, 2, 5)]
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


# ---------------------------------------------------------------- odd shapes


@pytest.mark.parametrize(("rows", "keys"), [(64, 64), (128, 128), (100, 1), (1, 1), (5, 300)])
def test_blocks_of_any_size_and_texts_of_any_length(rows: int, keys: int) -> None:
    for length in (1, 63, 65, 200):
        view = replace(views.view("causal", queries=length, keys=length, batch=1))
        visits = random_visits(view, rows, keys, True)
        visits.table.diagonal(dim1=-2, dim2=-1).fill_(True)
        visits = replace(visits, table=visits.table | (torch.arange(visits.table.shape[-1]) == 0))
        got = attend(view, pattern=lambda _, v=visits: v)
        want = attend(view, pattern=lambda _, v=visits: v, engine="reference", dtype=torch.float64)
        assert got.engine == "tiled"
        near(got.out.double(), want.out.double(), f"{length} tokens")


def test_many_keys_are_walked_over_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "STEP_BYTES", 4 * 64 * 64 * 3)
    view = views.view("long")
    with without_kernel():
        near(tiled.attend(view)[0], attend(view, engine="blocks").out, "in steps")


def test_no_rows_and_no_keys() -> None:
    nothing = View(torch.zeros(1, 2, 0, 4), torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))
    assert tiled.attend(nothing)[0].shape == (1, 2, 0, 4)
    blind = View(torch.ones(1, 2, 3, 4), torch.zeros(1, 2, 0, 4), torch.zeros(1, 2, 0, 4))
    out, lse = tiled.attend(blind)
    assert not out.any() and bool((lse == -torch.inf).all())


# ---------------------------------------------------------------- bad input


def visits(table: list[list[int]], rows: int = 4, keys: int = 4) -> Visits:
    return Visits(torch.tensor(table, dtype=torch.bool)[None, None], rows, keys)


def test_a_row_with_nothing_to_look_at_is_named() -> None:
    view = View(*(torch.randn(1, 2, 8, 4) for _ in range(3)), mask=Mask.causal_of(8))
    with pytest.raises(BadInput, match=r"none of the keys 0 to 0 that row 0 of batch entry 0 may see, in every head"):
        attend(view, pattern=lambda _: visits([[0, 0], [1, 1]]))
    per_head = torch.ones(1, 2, 2, 2, dtype=torch.bool)
    per_head[0, 1, 1] = False
    with pytest.raises(BadInput, match="row 4 of batch entry 0 may see, in head 1 of attention"):
        attend(view, pattern=lambda _: Visits(per_head, 4, 4))
    # the mask hides the one block that the pattern visits
    with pytest.raises(BadInput, match="row 0"):
        attend(view, pattern=lambda _: visits([[0, 1], [1, 1]]))


def test_density_zero_is_refused_and_padding_may_look_at_nothing() -> None:
    view = views.view("left_padded", batch=2)
    blocks = -(-view.queries // 4)
    with pytest.raises(BadInput, match="visits none of the keys"):
        attend(view, pattern=lambda _: Visits(torch.zeros(1, 1, blocks, blocks, dtype=torch.bool), 4, 4))


def test_a_table_of_another_size_is_refused() -> None:
    view = View(*(torch.randn(1, 2, 8, 4) for _ in range(3)))
    with pytest.raises(BadInput, match="3 x 2 blocks for 8 rows and 8 keys in blocks of 4 x 4: it must have 2 x 2"):
        attend(view, pattern=lambda _: visits([[1, 1]] * 3))


@pytest.mark.parametrize("situation", ["bias", "scattered"])
def test_what_tiles_cannot_do_is_said(situation: str) -> None:
    view = views.view(situation)
    assert Tiled().refuses(view)
    with pytest.raises(NotSupported, match="an additive bias, or a mask that is no interval of keys"):
        tiled.attend(view)


def test_a_sink_has_no_place_beside_activations() -> None:
    with pytest.raises(BadInput, match="no normaliser"):
        tiled.attend(views.view("sinks"), activation="sigmoid")


def test_head_counts_must_divide() -> None:
    with pytest.raises(BadInput, match="multiple of the key-value heads"):
        View(torch.randn(1, 3, 4, 8), torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8))


def test_the_kernel_refuses_what_it_cannot_do() -> None:
    view = views.view("causal")
    rest: dict[str, Any] = {"scale": 1.0, "lo": view.mask.low, "hi": view.mask.high}
    rest |= {"query_position": view.mask.position.int()[None], "key_position": view.mask.position.int()[None]}
    with pytest.raises(ValueError, match="only outputs"):
        native.attend(view.q, view.k, view.v, activation="sigmoid", want_entropy=True, **rest)
    with pytest.raises(ValueError, match="have no part"):
        native.attend(view.q, view.k, view.v, activation="sigmoid", sinks=torch.zeros(4), **rest)
    with pytest.raises(ValueError, match="at least 1"):
        native.attend(view.q, view.k, view.v, piece=0, **rest)
    ranges = tiled.Tiles.of(view, random_visits(view, 4, 4, True)).ranges
    with pytest.raises(ValueError, match="where each of 12 row blocks"):
        native.attend(view.q, view.k, view.v, ranges=replace(ranges, rows=2), **rest)
    with pytest.raises(ValueError, match=r"ranges for 3 x 4 heads in a call of 2 x 4"):
        native.attend(view.q, view.k, view.v, ranges=replace(ranges, batch=3), **rest)


# ---------------------------------------------------------------- few rows


@pytest.mark.parametrize("piece", [1, 7, 64, 1000])
@pytest.mark.parametrize(
    "situation", ["decode", "decode_padded", "multi_query", "sinks", "sliding_cache", "wide_values"]
)
def test_parts_of_the_keys_are_merged(situation: str, piece: int) -> None:
    view = views.view(situation, keys=301, queries=1)
    want = attend(view, engine="reference", dtype=torch.float64).out
    schedule = SplitKeys(piece=piece)
    near(schedule.run(view)[0].double(), want.double(), "by the kernel")
    with without_kernel():
        near(schedule.run(view)[0].double(), want.double(), "in PyTorch")


def test_a_long_text_and_a_short_one_in_one_batch() -> None:
    view = views.view("decode", keys=9000, mask=views.with_mask(left=(0, 8990)))
    want = attend(view, engine="blocks").out
    near(SplitKeys(piece=512).run(view)[0], want, "uneven")


def test_many_rows_are_left_alone() -> None:
    assert "more than 4" in SplitKeys().refuses(views.view("causal"))


# ---------------------------------------------------------------- in a model


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "qwen3", "opt"])
def test_models_give_the_same_with_any_schedule(family: str) -> None:
    model = tiny.model(family)
    ids = torch.randint(4, 60, (2, 19), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    want = model(**given).logits
    for schedule in (Tiled(), SplitKeys(rows=64, piece=4)):
        with foveate.attach(model, schedule):
            got = model(**given).logits
        assert torch.allclose(got[mask.bool()], want[mask.bool()], atol=2e-4)
    assert torch.equal(model(**given).logits, want)


def test_a_model_is_trained_through_tiles() -> None:
    model = tiny.model("llama")
    ids = torch.randint(4, 60, (2, 19), generator=torch.Generator().manual_seed(0))

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    want = gradients()
    for schedule in (Tiled(), BlockSparse(block=64)):
        with foveate.attach(model, schedule):
            got = gradients()
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want, strict=True))
    model.zero_grad()


def test_metrics_see_the_rows_beside_a_schedule() -> None:
    model = tiny.model("llama")
    ids = torch.arange(4, 20)[None]
    with foveate.attach(model, Entropy()) as alone:
        model(ids)
    with foveate.attach(model, Entropy(), Tiled()) as beside:
        model(ids)
    assert alone.results.heads.value.equals(beside.results.heads.value)


def test_two_schedules_are_one_too_many() -> None:
    model = tiny.model("llama")
    with pytest.raises(BadInput, match="one schedule at a time"), foveate.attach(model, Tiled(), SplitKeys()):
        pass


def test_a_schedule_that_is_wrong_does_not_land(monkeypatch: pytest.MonkeyPatch) -> None:
    right = tiled.attend
    monkeypatch.setattr(tiled, "attend", lambda *a, **k: (right(*a, **k)[0] * 1.1, right(*a, **k)[1]))
    model, said = tiny.model("llama"), "not what the dense reference says"
    with pytest.raises(foveate.FoveateError, match=said), foveate.attach(model, Tiled()):
        pass


def test_a_butterfly_visits_few_blocks_and_reaches_all_in_two_steps() -> None:
    view = View(*(torch.zeros(1, 1, 256, 2) for _ in range(3)))
    table = BlockSparse(block=4, first=0).select(view).table[0, 0]
    assert int(table.sum(1).max()) == 1 + 6
    reached = torch.linalg.matrix_power(table.double(), 6) > 0
    assert bool(reached.all()) and not bool(table.all())


def test_a_pattern_of_rows_is_kept_in_decoding() -> None:
    model = tiny.model("llama")
    ids = torch.randint(4, 60, (1, 12), generator=torch.Generator().manual_seed(0))
    pattern: Pattern = BlockSparse(block=4)
    with foveate.attach(model, pattern):
        whole = model(ids).logits
        cache = model(ids[:, :7], use_cache=True)
        rest = model(ids[:, 7:], past_key_values=cache.past_key_values).logits
    assert torch.allclose(rest, whole[:, 7:], atol=1e-4)
