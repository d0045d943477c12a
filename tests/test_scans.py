"""Scans of single numbers and causal convolutions against loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.core import convolve, scans
from foveate.core.convolve import ShortConvolution, convolved, latest
from foveate.core.scans import by_stretches, scan


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- scans


@pytest.mark.parametrize("length", [1, 2, 7, 16, 61])
@pytest.mark.parametrize("parts", [0, 1, 3, 100])
def test_a_scan_is_its_loop(length: int, parts: int) -> None:
    a, x, first = random(2, length, 3, 2), random(2, length, 3, 2, seed=1), random(2, 3, 2, seed=2)
    # a state forgotten to the last digit
    a[:, length // 2] = 0.0
    h, got = first, scan(a, x, first, parts)
    for t in range(length):
        h = a[:, t] * h + x[:, t]
        torch.testing.assert_close(got[:, t], h)


@pytest.mark.parametrize("parts", [1, 3])
def test_gradients_of_a_scan(parts: int) -> None:
    inputs = [t.requires_grad_() for t in (random(2, 7, 3), random(2, 7, 3, seed=1), random(2, 3, seed=2))]
    assert torch.autograd.gradcheck(lambda a, x, first: scan(a, x, first, parts), inputs)


@pytest.mark.parametrize("cut", [1, 20, 33])
def test_a_scan_goes_on(cut: int) -> None:
    a, x, first = random(1, 34, 3), random(1, 34, 3, seed=1), random(1, 3, seed=2)
    head = scan(a[:, :cut], x[:, :cut], first)
    tail = scan(a[:, cut:], x[:, cut:], head[:, -1])
    torch.testing.assert_close(torch.cat([head, tail], 1), scan(a, x, first))


def test_wide_states_are_one_part() -> None:
    assert scans.parts_for(100, scans.WIDE) == 1
    assert scans.parts_for(100, 1) == 10


def test_stretches_keep_only_their_inputs() -> None:
    lengths, inputs = [], [t.requires_grad_() for t in (random(1, 10, 3), random(1, 10, 3, seed=1), random(1, 3))]

    def step(a: Tensor, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        lengths.append(a.shape[1])
        h = scan(a, x, state)
        return h.square(), h[:, -1]

    out, last = by_stretches(step, tuple(inputs[:2]), inputs[2], size=4)
    assert lengths == [4, 4, 2]
    whole = scan(*inputs)
    torch.testing.assert_close(out, whole.square())
    torch.testing.assert_close(last, whole[:, -1])
    got = torch.autograd.grad(out.sum() + last.sum(), inputs)
    # made again, from the last one to the first
    assert lengths == [4, 4, 2, 2, 4, 4]
    for a, b in zip(got, torch.autograd.grad(whole.square().sum() + whole[:, -1].sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------- convolutions


def looped(x: Tensor, kernel: Tensor) -> Tensor:
    """The sum of the definition."""
    out = torch.zeros_like(x)
    for t in range(x.shape[1]):
        for lag in range(min(t + 1, kernel.shape[1])):
            out[:, t] += kernel[:, lag] * x[:, t - lag]
    return out


@pytest.mark.parametrize("length", [1, 5, 8, 9, 31, 67])
@pytest.mark.parametrize("taps", [1, 2, 13, 31, 90])
def test_a_convolution_is_its_sum(length: int, taps: int) -> None:
    x, kernel = random(2, length, 3), random(3, taps, seed=1)
    torch.testing.assert_close(convolved(x, kernel), looped(x, kernel))


@pytest.mark.parametrize("cuts", [(1, 66), (30, 3, 34), (9, 1, 57)])
@pytest.mark.parametrize("taps", [1, 5, 40, 90])
def test_a_convolution_goes_on(cuts: tuple[int, ...], taps: int) -> None:
    x, kernel, past, outs = random(2, 67, 3), random(3, taps, seed=1), None, []
    for part in x.split(list(cuts), 1):
        outs.append(convolved(part, kernel, past))
        past = latest(part, torch.ones(part.shape[:2], dtype=torch.bool), past, taps - 1)
    torch.testing.assert_close(torch.cat(outs, 1), looped(x, kernel))


@pytest.mark.parametrize("length", [3, 20])
def test_a_kernel_may_serve_several_channels(length: int) -> None:
    x, kernel = random(2, length, 6), random(2, 13, seed=1)
    torch.testing.assert_close(convolved(x, kernel), looped(x, kernel.repeat_interleave(3, 0)))


@pytest.mark.parametrize("length", [6, 20])
def test_gradients_of_a_convolution(length: int) -> None:
    inputs = [t.requires_grad_() for t in (random(1, length, 2), random(2, 9, seed=1), random(1, 8, 2, seed=2))]
    assert torch.autograd.gradcheck(convolved, inputs)


def test_half_precision_is_float32_inside() -> None:
    x, kernel = random(1, 200, 2).bfloat16(), random(2, 200, seed=1).bfloat16()
    out = convolved(x, kernel)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, looped(x.double(), kernel.double()).bfloat16(), atol=0.02, rtol=0.01)


@pytest.mark.parametrize("length", [19, 67, 1000])
def test_transforms_have_lengths_that_are_fast(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, rfft = [], torch.fft.rfft
    monkeypatch.setattr(convolve.torch.fft, "rfft", lambda x, n: seen.append(n) or rfft(x, n))
    convolved(random(1, length, 1), random(1, length))
    for n in seen:
        assert 2 * length - 1 <= n <= 1.2 * 2 * length
        for prime in (2, 3, 5):
            while n % prime == 0:
                n //= prime
        assert n == 1


def test_latest_inputs_are_real_ones() -> None:
    x = torch.arange(1.0, 6)[None, :, None].repeat(3, 1, 1)
    real = torch.tensor([[True] * 5, [True, True, True, False, False], [False, False, False, False, True]])
    got = latest(x, real, None, 3)[..., 0]
    assert got.tolist() == [[3, 4, 5], [1, 2, 3], [0, 0, 5]]
    past = torch.tensor([7.0, 8, 9])[None, :, None].repeat(3, 1, 1)
    assert latest(x, real, past, 4)[..., 0].tolist() == [[2, 3, 4, 5], [9, 1, 2, 3], [7, 8, 9, 5]]
    assert latest(x, torch.zeros_like(real), past[:, :0], 2)[..., 0].tolist() == [[0, 0]] * 3
    assert latest(x[:1], real[:1], None, 0).shape == (1, 0, 1)
    # no view of the whole text
    assert latest(x[:1], real[:1], None, 3).untyped_storage().nbytes() == 12


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_a_short_convolution_is_that_of_torch(width: int, bias: bool) -> None:
    torch.manual_seed(0)
    made, theirs = ShortConvolution(3, width, bias).double(), torch.nn.Conv1d(3, 3, width, groups=3, bias=bias).double()
    theirs.weight.data = made.weight.data[:, None]
    if bias:
        theirs.bias.data = made.bias.data
    x = random(2, 9, 3)
    want = theirs(torch.nn.functional.pad(x, (0, 0, width - 1, 0)).transpose(1, 2)).transpose(1, 2)
    past, outs = None, []
    for part in x.split([1, 6, 2], 1):
        out, past = made(part, torch.ones(part.shape[:2], dtype=torch.bool), past)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), want)


def test_a_short_convolution_ends_where_a_text_opens() -> None:
    made, x = ShortConvolution(3, 4).double(), random(1, 9, 3)
    real, opens = torch.ones(1, 9, dtype=torch.bool), torch.tensor([[False] * 7 + [True, False]])
    past = random(1, 3, 3, seed=1)
    out, after = made(x, real, past, opens)
    torch.testing.assert_close(out[:, :7], made(x[:, :7], real[:, :7], past)[0])
    last, want = made(x[:, 7:], real[:, 7:])
    torch.testing.assert_close(out[:, 7:], last)
    torch.testing.assert_close(after, want)
