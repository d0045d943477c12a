"""What moves: the models against counted runs, the bound, `foveate cost`, and squares of scores."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import foveate
from commands import here
from foveate import catalogue
from foveate.cli.cost import in_bytes, size
from foveate.compress import SmallMemory
from foveate.core import counting, traffic
from foveate.core.counting import FastMemory, counted
from foveate.core.errors import BadInput, NotSupported, TooBig, UnknownName
from foveate.core.traffic import Shape, Traffic, lower_bound, regime
from foveate.testing import views

# queries, keys, width, value width, heads, KV heads
SIZES = [
    (7, 7, 3, 3, 1, 1),
    (16, 16, 8, 8, 1, 1),
    (5, 13, 4, 2, 4, 2),
    (1, 19, 4, 4, 6, 2),
    (12, 9, 2, 5, 2, 1),
    (23, 23, 5, 3, 1, 1),
]
FAST = (6, 17, 43, 150, 1000)
ORDERS: dict[str, dict[str, int]] = {"naive": {}, "tiled": {}, "tiled, keys by threes": {"keys": 3}, "small_memory": {}}


def shapes(causal: bool) -> list[Shape]:
    found = [Shape(q, k, d, v, 2 if h > 1 else 1, h, g) for q, k, d, v, h, g in SIZES]
    return [replace(s, causal=True) for s in found if s.queries <= s.keys] if causal else found


def tensors(s: Shape) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(s.queries)
    sizes = ((s.heads, s.queries, s.dim), (s.kv_heads, s.keys, s.dim), (s.kv_heads, s.keys, s.width))
    return tuple(torch.randn(s.batch, *size, generator=rng, dtype=torch.float64) for size in sizes)


def visible(s: Shape) -> torch.Tensor:
    seen = torch.ones(s.queries, s.keys, dtype=torch.bool)
    return seen.tril(s.keys - s.queries) if s.causal else seen


# ---------------------------------------------------------------- models and counts


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ORDERS)
def test_models_are_the_counts(name: str, causal: bool) -> None:
    order, options, ran = name.partition(",")[0], ORDERS[name], 0
    for s in shapes(causal):
        q, k, v = tensors(s)
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible(s), enable_gqa=True)
        for fast in FAST:
            try:
                model = getattr(traffic, order)(s, fast, **options)
            except BadInput:
                with pytest.raises(BadInput, match=f"fast memory of {fast} numbers"):
                    counted(order, q, k, v, fast, causal=causal, **options)
                continue
            found = counted(order, q, k, v, fast, causal=causal, **options)
            assert found.traffic == model, (s, fast)
            assert sum(model.terms.values()) == model.total
            assert found.peak <= fast
            assert model.read >= s.inputs()
            assert model.written >= s.outputs()
            assert model.total >= lower_bound(s, fast)
            torch.testing.assert_close(found.out, want)
            ran += 1
    assert ran > 10


def test_blocks_fill_the_fast_memory() -> None:
    q, k, v = tensors(Shape(23, 23, 5))
    for fast in (50, 77, 100):
        rows = traffic.rows_that_fit(Shape(23, 23, 5), fast)
        # one row more takes 2 d + 4 numbers more
        assert counted("tiled", q, k, v, fast).peak <= fast < (rows + 1) * 14 + 5
        side = traffic.side_that_fits(fast)
        assert side * side + 5 * side <= fast < (side + 1) ** 2 + 5 * (side + 1)


def test_a_fast_memory_holds_no_more_than_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = FastMemory(10)
    held = memory.load(torch.ones(7), "queries")
    with pytest.raises(TooBig, match="of 10 numbers holds 7, and 4 more do not fit"):
        memory.load(torch.ones(4), "queries")
    with pytest.raises(BadInput, match="were not in the fast memory"):
        memory.store(torch.ones(2), torch.ones(2), "outputs")
    memory.free(held)
    memory.load(torch.ones(10), "queries")
    assert memory.traffic() == Traffic(17, 0, {"queries": 17})
    assert memory.peak == 10
    # an order with one row too many is caught, and so is one that cleans nothing up
    q, k, v = tensors(Shape(23, 23, 5))
    fit, free = counting.rows_that_fit, FastMemory.free
    monkeypatch.setattr(counting, "rows_that_fit", lambda *given: fit(*given) + 1)
    with pytest.raises(TooBig):
        counted("tiled", q, k, v, 75)
    monkeypatch.setattr(counting, "rows_that_fit", fit)
    monkeypatch.setattr(FastMemory, "free", lambda self, *held: free(self, *held[1:]))
    with pytest.raises(TooBig):
        counted("tiled", q, k, v, 75)


@pytest.mark.usefixtures("unchecked")
def test_counted_refuses() -> None:
    q, k, v = tensors(Shape(5, 5, 3))
    with pytest.raises(UnknownName, match="did you mean 'tiled'"):
        counted("tilde", q, k, v, 100)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="do not fit; give"):
        counted("tiled", q, k, v[:, :, 1:], 100)


# ---------------------------------------------------------------- the orders that are not counted


@pytest.mark.parametrize("causal", [False, True])
def test_split_is_the_sum_over_its_parts(causal: bool) -> None:
    for s, parts, fast in itertools.product(shapes(causal), (1, 2, 3, 8), (30, 77)):
        if parts == 1:
            assert traffic.split(s, fast, 1) == traffic.tiled(s, fast)
        if len(cut := list(range(0, s.keys, -(-s.keys // -(-s.keys // -(-s.keys // parts)))))) == 1:
            continue
        step, read, partial = cut[1], 0, 0
        rows = traffic.even(s.rows, traffic.rows_that_fit(s, fast))
        for first, start in itertools.product(cut, range(0, s.rows, rows)):
            at = torch.arange(start, min(start + rows, s.rows)) // s.group
            reach = visible(s)[at][:, first : first + step].any(0)
            if reach.any():
                read += int(reach.sum()) * (s.dim + s.width) + len(at) * s.dim
                partial += len(at) * (s.width + 1)
        found, heads = traffic.split(s, fast, parts), s.batch * s.kv_heads
        assert (found.read, found.written) == (heads * (read + partial), heads * partial + s.outputs())
    with pytest.raises(BadInput, match="parts must be a whole number"):
        traffic.split(Shape(4, 4, 4), 100, 0)


def test_block_sparse_reads_what_is_visited() -> None:
    s = Shape(256, 256, 16, heads=4, kv_heads=2, causal=True)
    every = traffic.block_sparse(s, 1 << 14)
    # four row blocks that see one to four key blocks, for each query head
    assert every.terms["list of blocks"] == 4 * 10
    assert every.terms["keys and values"] == 4 * 10 * 64 * 32
    assert traffic.block_sparse(s, 1 << 14, visited=5).terms["keys and values"] == 4 * 5 * 64 * 32
    sparse = replace(s, density=0.3)
    assert traffic.block_sparse(sparse, 1 << 14).terms["list of blocks"] == 4 * 3
    # a fast memory of half a row block: what is visited passes by twice
    half = traffic.rows_that_fit(Shape(1, 1, 16), 1168)
    assert half == 32
    assert traffic.block_sparse(s, 1168, visited=5).terms["keys and values"] == 2 * 4 * 5 * 64 * 32
    ragged = traffic.block_sparse(Shape(100, 70, 16), 1 << 14)
    assert ragged.terms["keys and values"] == 2 * 70 * 32
    with pytest.raises(BadInput, match="there are 10 pairs"):
        traffic.block_sparse(s, 1 << 14, visited=11)


def test_a_shared_prefix_passes_by_once() -> None:
    s = Shape(1, 2112, 64, batch=32, heads=9, kv_heads=3, causal=True, prefix=2048)
    shared, apart = traffic.shared_prefix(s, 1 << 18), traffic.tiled(replace(s, prefix=0), 1 << 18)
    assert shared.terms["keys and values"] == 3 * (2048 + 32 * 64) * 128
    assert apart.terms["keys and values"] == 3 * 32 * 2112 * 128
    # two partial outputs of each row, written and read
    assert shared.terms["partial outputs"] == 2 * 2 * 32 * 9 * 65
    assert shared.total < apart.total / 10
    assert shared.total >= lower_bound(s, 1 << 18)
    assert traffic.shared_prefix(replace(s, prefix=0), 1 << 18) == apart
    alone = replace(s, prefix=2112)
    assert traffic.shared_prefix(alone, 1 << 18).terms == {
        "queries": 32 * 9 * 64,
        "keys and values": 3 * 2112 * 128,
        "outputs": 32 * 9 * 64,
    }
    with pytest.raises(BadInput, match=r"65 causal rows on 2112 keys.*give at most 64 queries"):
        traffic.shared_prefix(replace(s, queries=65), 1 << 18)


# ---------------------------------------------------------------- what holds for all of them


@pytest.mark.parametrize("name", ["naive", "tiled", "small_memory", "split", "block_sparse", "shared_prefix"])
def test_more_fast_memory_never_moves_more(name: str) -> None:
    # blocks of products are squares, which are not always the best that fit
    loose = 1.03 if name == "naive" else 1.0
    for s in (Shape(97, 97, 8), Shape(64, 200, 4, 7, 2, 6, 2, prefix=40), Shape(1, 64, 16, heads=2)):
        moved = [getattr(traffic, name)(s, fast).total for fast in range(60, 2500, 7)]
        assert all(b <= loose * a for a, b in pairwise(moved)), s
        assert moved[-1] < moved[0] or s.queries == 1
    # behind a causal mask, rows of a larger block are there in more parts of a split
    loose = 1.25 if name == "split" else 1.0
    causal = [getattr(traffic, name)(Shape(97, 97, 8, causal=True), fast).total for fast in range(60, 2500, 7)]
    assert all(b <= loose * a for a, b in pairwise(causal))


@pytest.mark.parametrize("causal", [False, True])
def test_leading_orders(causal: bool) -> None:
    n, d = 1 << 16, 128
    s, share = Shape(n, n, d, causal=causal), 0.5 if causal else 1.0
    for fast in (d * d, 16 * d * d):
        tiles = 4 * share * n * n * d * d / fast
        assert traffic.tiled(s, fast).total == pytest.approx(tiles, rel=0.1)
        assert 1 <= traffic.tiled(s, fast).total / lower_bound(s, fast) < 9
    for fast in (d * d // 16, d * d // 4):
        squares = 5 * share * n * n * d / math.sqrt(fast)
        assert traffic.small_memory(s, fast).total == pytest.approx(squares, rel=0.12)
        assert 1 <= traffic.small_memory(s, fast).total / lower_bound(s, fast) < 10
        assert traffic.small_memory(s, fast).total < traffic.tiled(s, fast).total
    assert traffic.naive(s, 16 * d * d).total > 4 * n * n


def test_the_bound_has_three_forms() -> None:
    s = Shape(8192, 8192, 64)
    assert [regime(s, fast) for fast in (1024, 4095, 4096, 1 << 14, 1 << 22)] == [
        "N^2 d / sqrt(M)",
        "N^2 d / sqrt(M)",
        "N^2 d^2 / M",
        "N^2 d^2 / M",
        "N d",
    ]
    assert lower_bound(s, 1 << 22) == s.inputs() + s.outputs() == 4 * 8192 * 64
    assert lower_bound(s, 4096) == 8192**2 * 64 // 128 - 4096


def test_a_shape_counts_what_there_is() -> None:
    for s in (*shapes(False), *shapes(True)):
        assert s.scores() == int(visible(s).sum()) * s.batch * s.heads
        q, k, v = tensors(s)
        assert s.inputs() == q.numel() + k.numel() + v.numel()
        assert s.outputs() == s.batch * s.heads * s.queries * s.width
    assert Shape(1, 100, 4, density=0.1).inputs() == 4 + 10 * 8
    assert Shape(1, 100, 4, batch=3, prefix=90).inputs() == 3 * 4 + (90 + 3 * 10) * 8


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"queries": 0}, "queries must be a whole number, 1 or more"),
        ({"dim": 2.5}, "dim must be a whole number"),
        ({"keys": True}, "keys must be a whole number"),
        ({"value_dim": 0}, "value_dim must be"),
        ({"prefix": -1}, "prefix must be a whole number, 0 or more"),
        ({"prefix": 5}, "there are 4 keys"),
        ({"density": 0.0}, "density must be above 0"),
        ({"density": "all"}, "density must be above 0"),
        ({"heads": 3, "kv_heads": 2}, "heads must be a multiple of kv_heads"),
        ({"queries": 5, "causal": True}, "at least as many keys as queries"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_shapes_that_cannot_be(given: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        Shape(**{"queries": 4, "keys": 4, "dim": 4} | given)


def test_traffic_adds_up() -> None:
    one = Traffic.of({"queries": 3, "partial outputs": 2}, {"partial outputs": 2, "outputs": 0})
    assert one == Traffic(5, 2, {"queries": 3, "partial outputs": 4})
    assert one.times(2) + one == Traffic(15, 6, {"queries": 9, "partial outputs": 12})
    assert one.bytes() == 28
    assert one.bytes(2) == 14


@pytest.mark.parametrize("order", [traffic.naive, traffic.tiled, traffic.small_memory])
@pytest.mark.parametrize("fast", [0, -4, 2, 10.5, True])
@pytest.mark.usefixtures("unchecked")
def test_a_memory_that_holds_nothing_is_told(order: Any, fast: Any) -> None:
    with pytest.raises(BadInput, match=f"fast memory of {fast} numbers: .* or more"):
        order(Shape(4, 4, 4), fast)


# ---------------------------------------------------------------- the command line


def test_the_account_imports_no_torch() -> None:
    code = """
import sys
from foveate.cli import main
sys.argv = ["foveate", "cost", "--memory", "32KB"]
try:
    main()
finally:
    print([m for m in ("torch", "numpy", "pandas", "transformers") if m in sys.modules], file=sys.stderr)
"""
    path = os.pathsep.join([str(Path(foveate.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_cost_shows_every_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(here.__globals__["ENVIRONMENT"], "COLUMNS", "80")
    many = [f"--memory={m}" for m in ("16KB", "32KB", "1MB", "32MB")]
    for given in ([], many, ["--queries=1", "--batch=32", "--memory=256B"], ["--causal", "--n=200000"]):
        said = here("cost", *given)
        assert said.returncode == 0, said.stderr
        assert max(map(len, said.stdout.splitlines())) <= 80
        for name in ("naive", "tiled", "small_memory", "split", "block_sparse", "shared_prefix", "least possible"):
            assert name in said.stdout
    flat = " ".join(here("cost", "--memory=1MB").stdout.split())
    moved = traffic.tiled(Shape(8192, 8192, 64, heads=9, kv_heads=3), 1 << 18)
    assert f"tiled {size(moved.bytes())} 4.0x" in flat
    assert "least is moved by tiled with 1 MB (1/51.3 of naive)" in flat
    small = " ".join(here("cost", "--queries=1", "--memory=256B").stdout.split())
    assert "tiled – " in small
    assert "– tiled, split, block_sparse, shared_prefix: fast memory of 64 numbers" in small


def test_cost_as_json() -> None:
    said = json.loads(here("cost", "--n=4096", "--d=128", "--dtype=bfloat16", "--memory=64KB", "--json").stdout)
    (one,) = said["memory"]
    assert (one["bytes"], one["numbers"], one["regime"]) == (65536, 32768, "N^2 d^2 / M")
    shape = Shape(4096, 4096, 128, heads=9, kv_heads=3)
    assert said["shape"] == vars(shape)
    for name in ("naive", "tiled", "small_memory", "split"):
        cell, model = one["orders"][name], getattr(traffic, name)(shape, 32768)
        assert cell["bytes"] == model.bytes(2) == sum(cell["terms"].values())
        assert cell["least"] == 2 * lower_bound(shape, 32768)
    assert one["orders"]["block_sparse"]["least"] < one["least"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--n", "0"], "--n 0: must be 1 or more"),
        (["--kv-heads", "0"], "--kv-heads 0: must be 1 or more"),
        (["--heads", "8"], "heads must be a multiple of kv_heads"),
        (["--memory", "much"], "--memory much: write a size as 32KB"),
        (["--memory", "0KB"], "--memory 0KB: write a size"),
        (["--memory", "3B"], "3 bytes do not hold one number of 4 bytes"),
        (["--density", "1.5"], "density must be above 0 and at most 1"),
        (["--prefix", "9000"], "there are 8192 keys; prefix must be at most that"),
        (["--dtype", "float31"], "did you mean 'float32'"),
        (["--causal", "--queries", "9000"], "at least as many keys as queries"),
    ],
)
def test_cost_complains_in_one_line(given: list[str], says: str) -> None:
    said = here("cost", *given)
    assert said.returncode == 2
    assert said.stderr.startswith("foveate: ")
    assert said.stderr.count("\n") == 1
    assert says in said.stderr


def test_sizes() -> None:
    assert [in_bytes(t) for t in ("32KB", "1.5 MB", "2g", "512", "1MiB")] == [32768, 3 << 19, 2 << 30, 512, 1 << 20]
    assert [size(n) for n in (1, 1023, 1024, 1 << 20, 1023 << 10, 3 << 29)] == [
        "1 B",
        "1023 B",
        "1 KB",
        "1 MB",
        "1023 KB",
        "1.5 GB",
    ]


def test_show_gives_the_account(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = " ".join(here("show", "small_memory").stdout.split())
    shape = Shape(8192, 8192, 64)
    for memory in (32 << 10, 1 << 20, 32 << 20):
        moved = SmallMemory().traffic(shape, memory // 4)
        times = moved.total / lower_bound(shape, memory // 4)
        assert f"{size(moved.bytes())} with {size(memory)} of fast memory, {times:.1f} times the least possible" in flat
    assert "of fast memory" not in here("show", "entropy").stdout
    e = catalogue.find("small_memory")
    broken = {"memory": 1024, "least": 1, "regime": "N d", "why": "too small"}
    monkeypatch.setattr(catalogue, "entries", lambda: [e | {"traffic": [broken]}])
    assert "with 1 KB of fast memory nothing: too small" in " ".join(here("show", "small_memory").stdout.split())


# ---------------------------------------------------------------- squares of scores


@pytest.mark.parametrize("name", ["causal", "sinks_window_padded", "soft_cap", "empty_rows", "cross"])
def test_squares_of_any_side_are_attention(name: str) -> None:
    view = views.view(name)
    want = SmallMemory(fast=1 << 20).run(view)
    for fast in (6, 14, 60, 400):
        for got, right in zip(SmallMemory(fast=fast).run(view), want, strict=True):
            torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-4)


def test_squares_are_made_again_for_the_derivative() -> None:
    for n in (100, 200):
        view = views.view("causal", batch=1, heads=1, kv_heads=1, queries=n, keys=n)
        leaves = {x: getattr(view, x).double().requires_grad_() for x in "qkv"}
        call = replace(view, **leaves)
        sizes: dict[int, int] = {}

        def keep(t: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[t.data_ptr()] = t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out, lse = SmallMemory(fast=400).run(call)
        # of the squares nothing is kept, there are n^2 / 2 scores in them
        assert sum(sizes.values()) < n
        got = torch.autograd.grad(out.square().sum() + lse.sum(), list(leaves.values()))
        s = (leaves["q"] @ leaves["k"].transpose(-1, -2) * view.scale)[0, 0]
        s = s.masked_fill(~torch.ones(n, n).tril().bool(), -torch.inf)
        loss = (s.softmax(-1) @ leaves["v"][0, 0]).square().sum() + s.logsumexp(-1).sum()
        for g, w in zip(got, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            torch.testing.assert_close(g, w)


def test_what_squares_cannot_do_is_told() -> None:
    with pytest.raises(NotSupported, match="small_memory: an additive bias"):
        SmallMemory().run(views.view("bias"))
