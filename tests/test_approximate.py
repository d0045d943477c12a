"""Softmax and GELU in fixed point: against float64, against a slow form in whole numbers, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.core.approximate import gelu, gelu_table, single_pass_softmax
from foveate.core.errors import BadInput

BIT = 2**-22
# |delta''| at 0, where linear interpolation is worst
CURVATURE = 2 / math.sqrt(2 * math.pi)


def rows(kind: str, keys: int = 120) -> torch.Tensor:
    x = 3 * torch.randn(7, keys, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return {"random": x, "rising": x.sort(-1).values, "falling": -(-x).sort(-1).values, "flat": 0 * x + 5}[kind]


def slow(x: list[float], bits: int) -> list[float]:
    """The same row in whole numbers, as a circuit holds them."""
    one = 2**bits

    def power(n: int) -> int:
        return math.floor(math.exp(n / one) * one)

    held = [math.floor(v * one) for v in x]
    total, bias = 0, None
    for v in held:
        if bias is None or v > bias:
            total, bias = (0 if bias is None else total * power(bias - v) // one) + one, v
        else:
            total += power(v - bias)
    share = one * one // total
    return [power(v - bias) * share // one / one for v in held]


@pytest.mark.parametrize("kind", ["random", "rising", "falling", "flat"])
def test_without_a_cut_one_pass_gives_the_softmax(kind):
    x = rows(kind)
    assert (single_pass_softmax(x, fraction=None) - x.softmax(-1)).abs().max() < 1e-15


@pytest.mark.parametrize("kind", ["random", "rising", "falling", "flat"])
@pytest.mark.parametrize("bits", [6, 14, 22])
def test_it_is_what_whole_numbers_give(kind, bits):
    x = rows(kind, keys=20)
    assert single_pass_softmax(x, bits).tolist() == [slow(row, bits) for row in x.tolist()]


@pytest.mark.parametrize("kind", ["random", "rising", "falling", "flat"])
def test_the_softmax_is_off_by_few_bits_and_by_more_with_fewer(kind):
    x = rows(kind)
    errors = [float((single_pass_softmax(x, bits) - x.softmax(-1)).abs().max()) for bits in (22, 14, 6)]
    assert 0 < errors[0] <= x.shape[-1] * BIT
    assert errors[0] < errors[1] < errors[2]


def test_hidden_keys_get_nothing_and_change_nothing():
    x = rows("random")
    hidden = torch.arange(x.shape[-1]) % 3 == 0
    found = single_pass_softmax(x.masked_fill(hidden, -torch.inf))
    assert found[:, hidden].eq(0).all()
    assert torch.equal(found[:, ~hidden], single_pass_softmax(x[:, ~hidden]))
    assert single_pass_softmax(torch.full((2, 3), -torch.inf)).eq(0).all()


def test_what_the_format_cannot_hold_is_refused():
    x = torch.zeros(2, 511)
    assert single_pass_softmax(x).isfinite().all()
    with pytest.raises(BadInput, match=r"512 keys .* whole=11"):
        single_pass_softmax(torch.zeros(2, 512))
    assert single_pass_softmax(torch.zeros(2, 512), whole=11).isfinite().all()
    x[0, 3] = -600
    with pytest.raises(BadInput, match=r"size 600 .* whole=11"):
        single_pass_softmax(x)
    assert single_pass_softmax(x, whole=11)[0, 3] == 0
    # as far apart as the format allows: the least exponential is 0, and nothing wraps around
    assert single_pass_softmax(torch.tensor([511.0, -511.0])).tolist() == [1, 0]
    for bits in (0, 27):
        with pytest.raises(BadInput, match=f"^{bits} bits"):
            single_pass_softmax(torch.zeros(3), bits)


def test_the_table_is_relu_minus_gelu_to_the_first_entry_that_is_nothing():
    table = torch.tensor(gelu_table(), dtype=torch.float64)
    x = torch.arange(len(table), dtype=torch.float64) / 32
    assert len(table) == 177
    assert x[-1] == 5.5
    assert (table - (x.relu() - torch.nn.functional.gelu(x))).abs().max() <= BIT / 2
    assert (table * 2**22).frac().eq(0).all()
    assert table[-1] == 0 < table[-2] == BIT
    # by hand: delta(3 / 4) = 3 / 4 (1 - Phi(3 / 4)), and Phi(0.75) is 0.77337 in tables
    assert float(table[24]) == pytest.approx(0.75 * (1 - 0.77337), abs=1e-5)


@pytest.mark.parametrize("step", [2**-6, 2**-5, 2**-4, 2**-3])
def test_gelu_is_off_by_what_linear_interpolation_is_off(step):
    x = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    for fraction, slack in ((22, 3 * BIT), (None, 1e-12)):
        worst = float((gelu(x, step, fraction=fraction) - torch.nn.functional.gelu(x)).abs().max())
        assert 0.9 * step**2 * CURVATURE / 8 < worst < step**2 * CURVATURE / 8 + slack


def test_gelu_is_on_the_grid_and_off_by_an_even_function():
    x = torch.arange(-6 * 4096, 6 * 4096, dtype=torch.float64) / 4096
    found = gelu(x)
    assert (found * 2**22).frac().eq(0).all()
    assert torch.equal(gelu(x) - x.relu(), gelu(-x) - (-x).relu())
    # entries are hit exactly
    at = torch.arange(177, dtype=torch.float64) / 32
    assert torch.equal(gelu(at), at - torch.tensor(gelu_table(), dtype=torch.float64))


def test_behind_the_table_gelu_is_relu():
    x = torch.tensor([-1e6, -9.0, -5.5, 5.5, 9.0, 1e6])
    assert torch.equal(gelu(x), x.relu())
    short = gelu(torch.tensor([0.99, 1.0, 3.0, -3.0]), step=0.5, size=3)
    assert short[0] < 0.9
    assert short[1:].tolist() == [1, 3, 0]
    assert gelu(torch.tensor([math.nan])).isnan().all()


@pytest.mark.parametrize(("step", "size"), [(0.0, None), (-0.5, None), (5.0, None), (0.5, 1)])
def test_what_makes_no_table_is_refused(step, size):
    with pytest.raises(BadInput, match="step"):
        gelu(torch.zeros(3), step, size)


def test_without_rounding_the_table_ends_when_float64_does():
    assert gelu_table(1.0, fraction=None)[-2] > 0 == gelu_table(1.0, fraction=None)[-1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [gelu, single_pass_softmax])
def test_dtypes_stay_and_no_gradient_is_promised(function, dtype):
    x = torch.randn(3, 5, dtype=dtype, requires_grad=True)
    assert function(x).dtype == dtype
    assert not function(x).requires_grad
