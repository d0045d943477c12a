"""What dropped entries leave behind, and how entries are stored: numbers by hand, and what is lost."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import pytest
import torch

import foveate
from foveate.compress import HeavyHitters, MergeDropped, MixedBits, Quantised, Streaming
from foveate.compress.cache import merge_dropped, mixed_bits
from foveate.core import native
from foveate.core.budget import Budget
from foveate.core.cache import ragged_layers
from foveate.core.errors import BadInput, BadParameter
from foveate.core.mask import Mask
from foveate.core.mechanism import Policy
from foveate.core.packed import IntegerRows, grouping, rotation
from foveate.core.policy import Held
from foveate.core.ragged import EMPTY, SIDES, Packed, Ragged
from foveate.core.rows import Rows, View
from foveate.testing import check_mechanism, tiny
from foveate.testing.policies import decoded, ids_of, left_padded, padded_ids, run

CPU = torch.device("cpu")
SMALL = Budget(0.4, sinks=2, recent=3, every=3)
KERNEL = pytest.mark.skipif(not native.available(), reason="the native kernel is not built")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def held(k: torch.Tensor, v: torch.Tensor, position: torch.Tensor | None = None, mass: Any = None) -> Held:
    """A cache with these entries, [batch, kv_heads, key, dim]."""
    q = torch.zeros(k.shape[0], k.shape[1], 1, k.shape[3])
    rows = Rows(View(q, k, v, Mask.full(1, k.shape[2], CPU)), q[:0], {}, "none")
    shape = k.shape[:3]
    position = torch.arange(shape[2]).expand(shape) if position is None else position
    return Held(rows, position, torch.zeros(shape), torch.full(shape[:2], 2), mass)


def rows_of(values: list[list[float]]) -> torch.Tensor:
    return torch.tensor(values)[None, None]


# ---------------------------------------------------------------- merging


def test_weights_are_those_of_the_equation():
    root = math.sqrt(0.5)
    k = rows_of([[2.0, 0.0], [1.0, 1.0], [0.0, 3.0], [-1.0, -1.0]])
    v = rows_of([[1.0], [5.0], [7.0], [9.0]])
    keep = torch.tensor([[[True, False, True, False]]])
    made = MergeDropped(least=0.5, mass=False).merge(held(k, v), keep)
    # the second entry lies between the kept ones, and the first of them has it; the last is like none
    e, w = math.e, math.exp(root)
    want = torch.tensor([(2 * e + w) / (e + w), w / (e + w)])
    torch.testing.assert_close(made.k[0, 0, 0], want)
    torch.testing.assert_close(made.v[0, 0, 0, 0], torch.tensor((e + 5 * w) / (e + w)))
    torch.testing.assert_close(made.k[0, 0, 2], k[0, 0, 2])
    assert made.mass[0, 0, [0, 2]].tolist() == [1, 1]


def test_masses_add_up_and_weigh():
    k = rows_of([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    v = rows_of([[0.0], [8.0], [1.0]])
    keep = torch.tensor([[[True, False, True]]])
    given = held(k, v, mass=torch.tensor([[[1.0, 3.0, 2.0]]]))
    made = MergeDropped(mass=True).merge(given, keep)
    assert made.mass[0, 0, [0, 2]].tolist() == [4, 2]
    torch.testing.assert_close(made.v[0, 0, :, 0][keep[0, 0]], torch.tensor([6.0, 1.0]))


def test_what_is_below_the_threshold_leaves_nothing():
    k, v = random(2, 3, 20, 8), random(2, 3, 20, 8, seed=1)
    keep = (torch.arange(20) % 3 == 0).expand(2, 3, 20)
    made = MergeDropped(least=1.0).merge(held(k, v), keep)
    torch.testing.assert_close(made.k[keep], k[keep])
    torch.testing.assert_close(made.v[keep], v[keep])
    assert made.mass[keep].eq(1).all()


def test_no_token_is_lost_where_all_merge():
    k, v = random(2, 3, 20, 8), random(2, 3, 20, 8, seed=1)
    keep = random(2, 3, 20, seed=2) > 0.5
    keep[..., 0], keep[..., -1] = False, True
    made = MergeDropped(least=-1.0).merge(held(k, v), keep)
    assert torch.where(keep, made.mass, 0).sum(-1).eq(20).all()


def test_blocks_make_no_difference(monkeypatch):
    k, v = random(2, 2, 60, 8), random(2, 2, 60, 8, seed=1)
    keep = random(2, 2, 60, seed=2) > 0.8
    keep[..., 0] = True
    whole = MergeDropped(least=0.2).merge(held(k, v), keep)
    monkeypatch.setattr(merge_dropped, "AT_ONCE", 1)
    some = MergeDropped(least=0.2).merge(held(k, v), keep)
    torch.testing.assert_close(some.k[keep], whole.k[keep])
    assert some.mass[keep].tolist() == whole.mass[keep].tolist()


def test_similarities_are_never_there_all_at_once(monkeypatch):
    seen = []
    matmul = torch.Tensor.__matmul__

    def watched(self, other):
        made = matmul(self, other)
        seen.append(made.nbytes)
        return made

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    k = random(1, 3, 8192, 8)
    keep = (torch.arange(8192) % 4 == 0).expand(1, 3, 8192)
    MergeDropped().merge(held(k, k), keep)
    assert sum(seen) == 4 * 3 * 6144 * 2048
    assert max(seen) <= 32 << 20


def test_nan_where_there_is_no_entry_stays_there():
    k, v = random(2, 2, 24, 8), random(2, 2, 24, 8, seed=1)
    position = torch.arange(24).expand(2, 2, 24).clone()
    position[1, :, :7] = EMPTY
    there = position != EMPTY
    keep = there & (torch.arange(24) % 2 == 0)
    clean = MergeDropped(least=-1.0).merge(held(k, v, position, torch.ones(2, 2, 24)), keep)
    spoilt = [torch.where(there[..., None], t, torch.nan) for t in (k, v)]
    made = MergeDropped(least=-1.0).merge(held(*spoilt, position, torch.where(there, 1.0, torch.nan)), keep)
    for name in ("k", "v", "mass"):
        assert torch.equal(getattr(made, name)[keep], getattr(clean, name)[keep])


def test_merging_keeps_the_mass_of_a_real_run():
    model, ids, padding = tiny.model("llama"), ids_of(), left_padded()
    with torch.no_grad(), foveate.attach(model, HeavyHitters(SMALL), MergeDropped(least=-1.0)) as attached:
        cache = attached.model(padded_ids(ids, padding)[:, :41], attention_mask=padding).past_key_values
    for layer in ragged_layers(cache):
        total = torch.where(layer.store.held, layer.store.spread(layer.store.mass), 0).sum(-1)
        torch.testing.assert_close(total, layer.real[:, None].expand_as(total).float())


def test_alone_it_has_no_budget():
    with pytest.raises(BadInput, match="MergeDropped drops nothing"):
        MergeDropped().within(0.5)


# ---------------------------------------------------------------- storing


@pytest.mark.parametrize("size", [1, 2, 7, 8, 20, 24, 32, 64])
def test_a_rotation_is_symmetric_and_its_own_inverse(size):
    made = rotation(size, CPU)
    torch.testing.assert_close(made @ made, torch.eye(size))
    torch.testing.assert_close(made, made.T)
    assert float(made.abs().max()) <= 2**0.5 / size**0.5 + 1e-6


@pytest.mark.parametrize(
    ("width", "bits", "group", "want"),
    [
        (64, 8, 32, (2, 32)),
        (8, 4, 32, (1, 8)),
        (80, 4, 32, (4, 20)),
        (112, 4, 32, (4, 28)),
        (7, 8, 32, (1, 7)),
        (7, 4, 32, (1, 8)),
        (34, 4, 32, (2, 18)),
    ],
)
def test_groups_are_of_one_size_and_fill_bytes(width, bits, group, want):
    assert grouping(width, bits, group) == want


def test_codes_by_hand():
    rows = torch.tensor([[3.0, 0.0], [0.0, -1.0]])
    made = IntegerRows.empty(2, 2, 8, 8, torch.float32, CPU)
    made[:] = rows
    # rotated by [[1, 1], [1, -1]] / sqrt 2: twice the same number, and two of opposite sign
    assert made.codes[1].tolist() == [0, 255]
    assert made.grid[1, 0].tolist() == [0]
    assert float(made.grid[1, 1]) == pytest.approx(2 * math.sqrt(0.5) / 255, rel=2**-8)
    torch.testing.assert_close(made.dense(), rows, atol=1e-2, rtol=0)


@pytest.mark.parametrize("width", [1, 7, 34, 64, 80])
@pytest.mark.parametrize(("bits", "most"), [(8, 0.01), (4, 0.13)])
def test_rows_come_back(width, bits, most):
    rows = random(50, width)
    made = IntegerRows.empty(50, width, bits, 32, torch.float32, CPU)
    made[:] = rows
    assert float((made.dense() - rows).norm() / rows.norm()) < most
    assert made[torch.tensor([[3, 4, 5], [0, 1, 2]])].dense().shape == (2, 3, width)
    assert torch.equal(made[3:5].dense(), made.dense()[3:5])


@KERNEL
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("width", "group"), [(1, 32), (7, 32), (34, 32), (64, 32), (80, 32), (96, 48), (256, 256)])
def test_the_kernel_packs_what_torch_packs(bits, width, group, monkeypatch):
    made = IntegerRows.empty(0, width, bits, group, torch.float32, CPU)
    for count in (0, 1, 5, 1030):
        rows = random(count, width) * torch.logspace(-3, 3, width)
        codes, grid = made.packed(rows)
        alone = native.pack(rows, rotation(made.form[1], CPU), made.form[0], bits, threads=1)
        assert torch.equal(alone[0], codes)
        assert torch.equal(alone[1], grid)
        with monkeypatch.context() as patch:
            patch.setattr(native, "available", lambda: False)
            want_codes, want_grid = made.packed(rows)
        assert codes.shape == want_codes.shape
        assert grid.shape == want_grid.shape
        # sums in another order put a number on the other side of an edge now and then
        assert float((codes != want_codes).sum()) <= 0.001 * max(1, codes.numel())
        off, want = (grid.float() - want_grid.float()).abs(), want_grid.float()
        assert (off <= 2**-7 * want.abs() + 0.01 * want[:, 1:]).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=KERNEL)])
def test_what_is_no_number_stays_none_in_its_group_alone(bad, kernel, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: kernel)
    rows = random(6, 64)
    rows[3, 40] = bad
    made = IntegerRows.empty(6, 64, 8, 32, torch.float32, CPU)
    made[:] = rows
    spoiled = made.dense().isfinite().logical_not()
    assert spoiled[3, 32:].all()
    assert int(spoiled.sum()) == 32


def test_one_large_channel_does_not_cost_the_others():
    rows = random(200, 64)
    rows[:, 5] = 40.0
    made = IntegerRows.empty(200, 64, 4, 32, torch.float32, CPU)
    made[:] = rows
    rotated = (made.dense() - rows)[:, :32].norm()
    low, high = rows[:, :32].aminmax(dim=-1, keepdim=True)
    plain = rows[:, :32].sub(low).div((high - low) / 15).round().mul((high - low) / 15).add(low)
    assert float(rotated) < 0.6 * float((plain - rows[:, :32]).norm())


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_any_size_of_numbers_and_rows_of_one_number(size):
    rows = torch.cat([random(5, 64) * size, torch.full((1, 64), 3.0) * size, torch.zeros(1, 64)])
    made = IntegerRows.empty(7, 64, 8, 32, torch.float32, CPU)
    made[:] = rows
    off, rows = (made.dense() - rows).double().norm(dim=-1), rows.double().norm(dim=-1)
    assert (off <= 0.01 * rows).all()


def test_a_slot_that_was_never_set_spoils_no_other():
    made = IntegerRows.empty(3, 16, 8, 16, torch.float32, CPU)
    made.grid.fill_(torch.nan)
    made[torch.tensor([1])] = torch.ones(1, 16)
    assert made.dense()[1].isfinite().all()
    assert made.dense()[[0, 2]].isnan().all()


@pytest.mark.parametrize(("bits", "most"), [(8, 0.30), (4, 0.18)])
@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
def test_bytes(bits, most, width):
    made = Quantised(bits).store(random(1, width), 1000, "keys", 0)
    held = sum(t.nbytes for t in vars(made).values() if isinstance(t, torch.Tensor))
    assert held == 1000 * Quantised(bits).row_bytes(width, torch.float32, "keys", 0)
    assert held <= most * 1000 * width * 4


@pytest.mark.parametrize(("bits", "want"), [((8, 4), (8, 4)), ((4, 8), (4, 8)), ((4, 0), (4, 4)), ((8,), (8, 8))])
def test_values_can_have_other_bits_than_keys(bits, want):
    made = Quantised(*bits)
    assert tuple(made.store(random(1, 64), 10, side, 0).bits for side in SIDES) == want
    with torch.no_grad(), foveate.attach(tiny.model("llama"), made, Streaming(SMALL)) as attached:
        cache = attached.model(ids_of()[:, :41]).past_key_values
        cache = attached.model(ids_of()[:, 41:44], past_key_values=cache).past_key_values
    for layer in ragged_layers(cache):
        layer.settle()
        assert (layer.store.keys.bits, layer.store.values.bits) == want


@KERNEL
@pytest.mark.parametrize("bits", [(8,), (4,), (8, 4)])
def test_decoded_tokens_read_codes_as_they_stand(bits, monkeypatch):
    model, ids = tiny.model("llama"), ids_of()
    with torch.no_grad(), foveate.attach(model, Quantised(*bits)) as attached:
        cache = attached.model(ids[:, :41]).past_key_values
        monkeypatch.setattr(native, "available", lambda: False)
        want = attached.model(ids[:, 41:42], past_key_values=cache).logits
        for layer in ragged_layers(cache):
            layer.crop(1)
        monkeypatch.undo()
        monkeypatch.setattr(IntegerRows, "dense", lambda self: pytest.fail("rows were laid out as numbers"))
        got = attached.model(ids[:, 41:42], past_key_values=cache).logits
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_rows_that_are_too_wide_as_they_are_stored_go_another_way():
    k = random(1, 1, 9, 253).expand(1, 2, 9, 253)
    for group, refused in ((9, True), (32, False)):
        quantised = Quantised(4, group=group)
        there = torch.ones(k.shape[:3], dtype=torch.bool)
        made = Ragged.of_call(k, k, there, torch.zeros(k.shape[:3]), store=partial(quantised.store, layer=0))
        assert made.keys.breadth == (290 if refused else 256)
        assert made.kernel_refuses(Mask.full(1, 9, CPU)) == (refused or not native.available())


@pytest.mark.parametrize("width", [7, 34, 64])
def test_products_of_rows_are_the_same_in_the_basis_that_is_read(width):
    made = IntegerRows.empty(5, width, 8, 32, torch.float32, CPU)
    one, two = random(5, width), random(5, width, seed=1)
    turned = made.turned(one)
    assert turned.shape == (5, made.breadth)
    torch.testing.assert_close(turned @ made.turned(two).T, one @ two.T, atol=1e-5, rtol=0)
    torch.testing.assert_close(made.turned(turned)[:, :width], one)


def test_other_packed_rows_are_taken_as_numbers():
    eight, four = (Quantised(bits).store(random(1, 64), 10, "keys", 0) for bits in (8, 4))
    eight[:] = random(10, 64)
    four[:] = eight
    assert float((four.dense() - eight.dense()).norm() / eight.dense().norm()) < 0.13


def test_the_common_checks_hold_at_4_bits_and_the_usual_group():
    # `stored_rows` asks more of the worst channel of a row than 4 bits can give behind a rotation
    names = ["free_slots", "half_precision"]
    assert check_mechanism(Quantised(4), only=names) == names


def test_4_bits_lose_more_than_8():
    model, ids = tiny.model("llama"), ids_of()
    plain = decoded(run(model, ids, Streaming(1.0)))
    lost = [float((decoded(run(model, ids, Quantised(bits))) - plain).norm() / plain.norm()) for bits in (8, 4)]
    assert 0 < lost[0] < 0.02
    assert 3 * lost[0] < lost[1] < 0.3


@pytest.mark.parametrize("bits", [8, 4])
def test_dropping_merging_and_storing_together(bits):
    model, ids, padding = tiny.model("llama"), ids_of(), left_padded()
    given = padded_ids(ids, padding)

    def said(*policies: Policy) -> torch.Tensor:
        with torch.no_grad(), foveate.attach(model, *policies) as attached:
            cache, out = None, []
            for a, b in ((0, 17), (17, 41), *((n, n + 1) for n in range(41, ids.shape[1]))):
                mask = torch.cat([padding, torch.ones_like(ids[:, 41:])], 1)[:, :b]
                place = (mask.cumsum(1) - 1).clamp_min(0)[:, a:b]
                made = attached.model(
                    given[:, a:b], attention_mask=mask, position_ids=place, past_key_values=cache, use_cache=True
                )
                cache = made.past_key_values
                out.append(made.logits[:, -1])
        store = cache.layers[0].store
        assert isinstance(store.keys, Packed) == any(isinstance(p, Quantised) for p in policies)
        return torch.stack(out, 1)

    plain = said(HeavyHitters(SMALL), MergeDropped())
    both = said(HeavyHitters(SMALL), MergeDropped(), Quantised(bits))
    assert 0 < float((both - plain).norm() / plain.norm()) < (0.03 if bits == 8 else 0.6)


def test_a_budget_in_bytes_knows_the_stored_form():
    model, ids = tiny.model("llama"), ids_of(length=200)
    budget = Budget("36kB", sinks=2, recent=3, every=0)

    def longest(*policies: Policy) -> tuple[int, int]:
        with torch.no_grad(), foveate.attach(model, *policies) as attached:
            cache = attached.model(ids).past_key_values
            return ragged_layers(cache)[0].store.longest, attached.bytes_held()

    (few, plain), (more, packed) = longest(Streaming(budget)), longest(Streaming(budget), Quantised(4))
    assert more > 2.5 * few
    # and some room for new tokens
    assert max(plain, packed) < 48_000


# ---------------------------------------------------------------- bits by layer


def test_layers_have_the_bits_that_are_named():
    made = MixedBits(keys=(1,), values=(0,))
    with torch.no_grad(), foveate.attach(tiny.model("llama"), made, Streaming(SMALL)) as attached:
        cache = attached.model(ids_of()[:, :41]).past_key_values
        cache = attached.model(ids_of()[:, 41:44], past_key_values=cache).past_key_values
    for layer in ragged_layers(cache):
        layer.settle()
    assert [(one.store.keys.bits, one.store.values.bits) for one in ragged_layers(cache)] == [(4, 8), (8, 4)]
    sizes = [[made.row_bytes(64, torch.float32, side, layer) for side in SIDES] for layer in range(3)]
    assert sizes == [[40, 72], [72, 40], [40, 40]]


def test_budgets_in_bytes_count_the_bits_of_each_layer():
    mine = MixedBits(keys=(0,), values=(0,)), Streaming(Budget("40KB", sinks=1, recent=1, every=0))
    with torch.no_grad(), foveate.attach(tiny.model("llama"), *mine) as attached:
        few, many = ragged_layers(attached.model(ids_of(length=400)).past_key_values)
    assert int(few.store.length[0, 0]) < int(many.store.length[0, 0]) < 400


def test_a_layer_that_is_not_there():
    with pytest.raises(BadInput, match="no layer 7"), foveate.attach(tiny.model("llama"), MixedBits(values=(7,))):
        pass


def fitted(monkeypatch, keep, **given):
    """What is found where it is known what 4 bits do to each part: 4 bits for one of them save 0.02 of the bytes."""
    apart = iter(([0.0, 0.5, 0.1, 0.4, 0.2], [0.0, 0.5, 0.3, 0.1, 0.1]))
    held = [0.30, 0.28, 0.28, 0.28, 0.28]

    def known(model, ids, follow, tried):
        assert [(p.keys, p.values) for p in tried] == [
            *(((0, 1), (0, 1)), ((1,), (0, 1)), ((0,), (0, 1)), ((0, 1), (1,)), ((0, 1), (0,)))
        ]
        assert (len(ids), follow) == (48, 8)
        return list(zip(next(apart), held, strict=True))

    monkeypatch.setattr(mixed_bits, "divergences", known)
    given = {"tokens": 40, "samples": 2, "follow": 8} | given
    return MixedBits.fit(tiny.model("llama"), tiny.tokenizer(), 10 * "The cat sat. ", keep=keep, **given)


@pytest.mark.parametrize(
    ("keep", "keys", "values"),
    [(0.3, (0, 1), (0, 1)), (0.28, (0, 1), (0,)), (0.26, (0,), (0,)), (0.24, (0,), ()), (0.221, (), ())],
)
def test_parts_that_change_least_get_4_bits_first(keep, keys, values, monkeypatch):
    found = fitted(monkeypatch, keep + 1e-6)
    assert (found.keys, found.values) == (keys, values)


def test_what_was_measured_serves_for_another_share(tmp_path, monkeypatch):
    file = tmp_path / "kept.jsonl"
    first = fitted(monkeypatch, 0.26, file=file)
    monkeypatch.setattr(mixed_bits, "divergences", lambda *given: pytest.fail("measured again"))
    given = {"tokens": 40, "samples": 2, "follow": 8, "file": file}
    model, tokenizer, text = tiny.model("llama"), tiny.tokenizer(), 10 * "The cat sat. "
    assert MixedBits.fit(model, tokenizer, text, keep=0.26, **given) == first
    assert len(MixedBits.fit(model, tokenizer, text, keep=0.28, **given).keys) == 2


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"keep": 0.2}, r"fit\(keep=0.2\): in 4 bits everything takes 0.220"),
        ({"keep": 0.3, "tokens": 200}, "130 tokens, and 2 stretches of 208 take 209"),
        ({"keep": 0.3, "samples": 0}, r"fit\(samples=0\): give at least 1"),
        ({"keep": 0.3, "follow": 0}, r"fit\(follow=0\): give at least 1"),
    ],
)
def test_bits_that_cannot_be_found(given, says, monkeypatch):
    with pytest.raises(BadInput, match=says):
        fitted(monkeypatch, **given)


def test_how_far_predictions_move():
    model = tiny.model("llama")
    ids = ids_of(length=48)[0].tolist()
    fine, coarse = MixedBits((0, 1), (0, 1)), MixedBits()
    (near, more), (far, less) = mixed_bits.divergences(model, ids, 8, [fine, coarse])
    assert 0 <= near < far
    assert more > less
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0, -8:].log_softmax(-1)
        with foveate.attach(model, coarse):
            cache = model(torch.tensor([ids[:-8]])).past_key_values
            got = model(torch.tensor([ids[-8:]]), past_key_values=cache).logits[0].log_softmax(-1)
    assert far == pytest.approx(float((want.exp() * (want - got)).sum(-1).mean()), rel=1e-3)


@pytest.mark.parametrize("bad", [{"bits": 3}, {"bits": True}, {"value_bits": 16}, {"group": 4}])
def test_what_it_cannot_be(bad, unchecked):
    with pytest.raises(BadParameter, match=re.escape(f"Quantised({next(iter(bad))}=")):
        Quantised(**bad)


@pytest.mark.parametrize("bad", [{"least": 1.5}, {"mass": "no"}])
def test_what_merging_cannot_be(bad, unchecked):
    with pytest.raises(BadParameter, match=re.escape(f"MergeDropped({next(iter(bad))}=")):
        MergeDropped(**bad)
