"""Scans of single numbers and causal convolutions against loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.core import convolve, native, scans
from foveate.core.convolve import ShortConvolution, convolved, latest
from foveate.core.scans import by_stretches, scan, selective


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


# ---------------------------------------------------------------- the selective scan

KERNEL = pytest.mark.skipif(not native.available(), reason="the kernel was not built")


def steps(length: int, states: int, inner: int = 70, batch: int = 2) -> list[Tensor]:
    """Steps, inputs, rates, B, C and the states before."""
    dt = torch.nn.functional.softplus(random(batch, length, inner) - 2)
    rate = -random(inner, states, seed=1).exp()
    x, b, c = (random(batch, length, size, seed=n) for n, size in enumerate((inner, states, states), 2))
    return [dt, x, rate, b, c, random(batch, inner, states, seed=5)]


def single(inputs: list[Tensor]) -> list[Tensor]:
    return [t.float() for t in inputs]


def by_definition(dt: Tensor, x: Tensor, rate: Tensor, b: Tensor, c: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x)
    for t in range(x.shape[1]):
        h = (dt[:, t, :, None] * rate).exp() * h + (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
        y[:, t] = (h * c[:, t, None]).sum(-1)
    return y, h


def both_ways(inputs: list[Tensor]) -> list[Tensor]:
    """Outputs, the last states, and the gradients of all inputs."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    y, last = selective(*leaves)
    weights = random(*y.shape, seed=6).to(y.dtype), random(*last.shape, seed=7).to(y.dtype)
    loss = (y * weights[0]).sum() + (last * weights[1]).sum()
    return [y.detach(), last.detach(), *torch.autograd.grad(loss, leaves)]


def close(got: list[Tensor], want: list[Tensor]) -> None:
    """To float32, of the largest number."""
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        most = 1e-5 * float(b.abs().max())
        torch.testing.assert_close(a.double(), b.double(), atol=most, rtol=0, msg=lambda m, n=number: f"{n}: {m}")


@pytest.mark.parametrize("length", [1, 2, 65])
@pytest.mark.parametrize("states", [1, 3, 16])
def test_a_selective_scan_is_its_loop(length: int, states: int) -> None:
    inputs = steps(length, states)
    for got, want in zip(selective(*inputs), by_definition(*inputs), strict=True):
        torch.testing.assert_close(got, want)


def test_gradients_of_a_selective_scan() -> None:
    inputs = [t.requires_grad_() for t in steps(5, 3, inner=2, batch=1)]
    assert torch.autograd.gradcheck(selective, inputs)


@KERNEL
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 1000])
@pytest.mark.parametrize("states", [1, 3, 16, 64])
def test_the_kernel_is_the_plain_form(length: int, states: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = steps(length, states, inner=70 if length < 1000 else 17)
    got, exact = both_ways(single(inputs)), both_ways(inputs)
    monkeypatch.setattr(native, "available", lambda: False)
    plain = both_ways(single(inputs))
    close(got, exact)
    close(got, plain)
    assert all(a.dtype == torch.float32 and a.shape == b.shape for a, b in zip(got, exact, strict=True))


@KERNEL
@pytest.mark.parametrize("inner", [1, 15, 16, 17, 64, 130])
@pytest.mark.parametrize("batch", [1, 3, 9])
def test_the_kernel_takes_any_number_of_channels(inner: int, batch: int) -> None:
    inputs = steps(70, 5, inner, batch)
    close(both_ways(single(inputs)), both_ways(inputs))


@KERNEL
def test_the_kernel_takes_inputs_that_lie_elsewhere() -> None:
    inputs = single(steps(70, 5))
    apart = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in inputs]
    assert not any(t.is_contiguous() for t in apart)
    for a, b in zip(both_ways(apart), both_ways(inputs), strict=True):
        assert torch.equal(a, b)


@KERNEL
def test_only_float32_is_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(native, "selective", lambda *inputs, **options: called.append(len(inputs)))
    selective(*steps(5, 3))
    assert not called
    with pytest.raises(TypeError):
        selective(*single(steps(5, 3)))
    assert called == [6]


@KERNEL
def test_nothing_as_large_as_all_states_is_kept() -> None:
    inputs = single(steps(640, 16, inner=64, batch=1))
    assert native.selective(*inputs)[2] is None
    assert native.selective(*inputs, keep=True)[2].numel() == 640 // 64 * 64 * 16


WAYS = [pytest.param(True, marks=KERNEL, id="kernel"), pytest.param(False, id="plain")]


@pytest.mark.parametrize("kernel", WAYS)
def test_a_step_of_0_leaves_the_states(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: kernel)
    inputs = single(steps(80, 3))
    real = torch.ones(80, dtype=torch.bool)
    real[:7] = real[60:66] = real[-3:] = False
    whole = both_ways([inputs[0] * real[:, None], *inputs[1:]])
    dt, x, rate, b, c, first = inputs
    part = selective(dt[:, real], x[:, real], rate, b[:, real], c[:, real], first)
    torch.testing.assert_close(whole[0][:, real], part[0])
    torch.testing.assert_close(whole[1], part[1])
    # what stands there is not taken in, and states are read as they are
    assert not whole[3][:, ~real].any() and not whole[5][:, ~real].any()
    torch.testing.assert_close(whole[0][:, 6], (first @ c[:, 6, :, None])[..., 0])


@pytest.mark.parametrize("kernel", WAYS)
@pytest.mark.parametrize("cut", [1, 40, 64, 99])
def test_a_selective_scan_goes_on(kernel: bool, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: kernel)
    leaves = [t.requires_grad_() for t in single(steps(100, 5))]
    dt, x, rate, b, c, first = leaves
    y, last = selective(*leaves)
    head, state = selective(dt[:, :cut], x[:, :cut], rate, b[:, :cut], c[:, :cut], first)
    tail, end = selective(dt[:, cut:], x[:, cut:], rate, b[:, cut:], c[:, cut:], state)
    torch.testing.assert_close(torch.cat([head, tail], 1), y)
    torch.testing.assert_close(end, last)
    want = torch.autograd.grad(y.square().sum() + last.sum(), leaves)
    got = torch.autograd.grad(head.square().sum() + tail.square().sum() + end.sum(), leaves)
    close(list(got), list(want))


@KERNEL
@pytest.mark.parametrize("batch", [1, 3])
def test_threads_and_repetition_do_not_change_a_bit(batch: int) -> None:
    *inputs, first = single(steps(150, 16, inner=700, batch=batch))
    dy, dlast = random(*inputs[0].shape, seed=6).float(), random(*first.shape, seed=7).float()

    def found(threads: int) -> list[Tensor]:
        y, last, marks = native.selective(*inputs, first, keep=True, threads=threads)
        return [y, last, *native.derive_selective((*inputs, first), marks, dy, dlast, threads=threads)]

    want = found(1)
    for threads in (1, 2, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(found(threads), want, strict=True))


@KERNEL
def test_without_gradients_the_numbers_are_the_same() -> None:
    learned = [t.requires_grad_() for t in single(steps(70, 5))]
    with torch.no_grad():
        plain = selective(*learned)
    for a, b in zip(selective(*learned), plain, strict=True):
        assert a.requires_grad and not b.requires_grad
        assert torch.equal(a, b)


@pytest.mark.parametrize("kernel", WAYS)
def test_a_selective_scan_is_differentiated_once(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: kernel)
    leaves = [t.requires_grad_() for t in single(steps(5, 3))]
    got = torch.autograd.grad(selective(*leaves)[0].square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        got[0].sum().backward()


@KERNEL
def test_what_is_forgotten_at_once_is_forgotten() -> None:
    inputs = single(steps(70, 5))
    inputs[2] = inputs[2] * 1e30
    y, last = selective(*inputs)
    dt, x, _, b, c, _ = inputs
    torch.testing.assert_close(last, (dt * x)[:, -1, :, None] * b[:, -1, None])
    torch.testing.assert_close(y, dt * x * (b * c).sum(-1, keepdim=True))
    assert all(t.isfinite().all() for t in both_ways(inputs))


@KERNEL
def test_nan_stays_in_its_channel() -> None:
    inputs = single(steps(70, 5))
    want = selective(*inputs)[0]
    inputs[1][0, 30, 3] = torch.nan
    got = selective(*inputs)[0]
    hit = torch.zeros_like(got, dtype=torch.bool)
    hit[0, 30:, 3] = True
    assert got[hit].isnan().all() and torch.equal(got[~hit], want[~hit])


@KERNEL
@pytest.mark.parametrize(
    ("which", "change", "sentence"),
    [
        (0, torch.zeros(2, 9), "dt must have 3 dimensions"),
        (1, torch.zeros(2, 9, 3), r"x must be float32 \(2, 9, 4\) on the CPU, got float32 \(2, 9, 3\) on cpu"),
        (2, torch.zeros(4, 3).double(), r"rate must be float32 .* got float64"),
        (3, torch.zeros(2, 8, 3), "b must be"),
        (4, torch.zeros(2, 9, 2), "c must be"),
        (5, torch.zeros(2, 3, 4), "first must be"),
    ],
)
def test_the_kernel_refuses_what_does_not_fit(which: int, change: Tensor, sentence: str) -> None:
    inputs = single(steps(9, 3, inner=4))
    inputs[which] = change
    with pytest.raises(ValueError, match=sentence):
        native.selective(*inputs)


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


@pytest.mark.parametrize("opens", [None, [2], [1, 4, 5]])
@pytest.mark.parametrize("width", [1, 3, 4])
def test_gradients_of_a_short_convolution(opens: list[int] | None, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # in stretches of 2 tokens
    monkeypatch.setattr(convolve, "CACHED", 12)
    made, x, past = ShortConvolution(3, width, bias=True).double(), random(2, 7, 3), random(2, width - 1, 3, seed=1)
    real, at = torch.ones(2, 7, dtype=torch.bool), None
    if opens is not None:
        at = torch.zeros(2, 7, dtype=torch.bool)
        at[0, opens] = True
    names = [name for name, _ in made.named_parameters()]

    def out(x: Tensor, past: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.functional_call(made, dict(zip(names, weights, strict=True)), (x, real, past, at))

    leaves = [t.detach().clone().requires_grad_() for t in (x, past, *made.parameters())]
    assert torch.autograd.gradcheck(out, leaves)
    assert torch.autograd.gradgradcheck(out, leaves)
