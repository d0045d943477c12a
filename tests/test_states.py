"""The states engine: every form against the definition, token by token in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from foveate.core import states
from foveate.core.errors import BadInput, NotSupported
from foveate.core.states import Scan, chunk_for, run, weights

KEY, VALUE = 5, 3


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logs(kind: str, heads: int, length: int) -> Tensor | None:
    """Decays of every kind, as logs."""
    shape = {"head": (2, heads, length, 1), "channel": (2, heads, length, KEY), "constant": (1, heads, 1, KEY)}
    if kind == "none":
        return None
    found = -random(*shape.get(kind, shape["channel"]), seed=7).abs()
    if kind == "zeros":
        found[random(*found.shape, seed=8) > 1.2] = -torch.inf
    if kind == "ones":
        found[random(*found.shape, seed=8) > 0] = 0.0
    return found * 3 if kind == "channel" else found


def call(
    length: int, decay: str = "none", delta: bool = False, groups: int = 1, padded: bool = False, packed: bool = False
):
    heads = 2
    k = torch.nn.functional.normalize(random(2, heads, length, KEY, seed=1), dim=-1)
    real = opens = None
    if padded:
        real = torch.ones(2, length, dtype=torch.bool)
        real[0, : length // 3], real[1, length - length // 4 :] = False, False
    if packed:
        opens = random(2, length, seed=3) > 1.2
    beta = random(2, heads, length, seed=4).sigmoid() if delta else None
    q = random(2, heads * groups, length, KEY)
    return Scan(q, k, random(2, heads, length, VALUE, seed=2), logs(decay, heads, length), beta, real=real, opens=opens)


def defined(scan: Scan, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What the head of the engine's file says, one token after the other."""
    batch, heads, length, _ = scan.q.shape
    kv_heads = scan.k.shape[1]
    decay = None if scan.decay is None else scan.decay.expand(batch, -1, length, -1).exp()
    kept = random(batch, kv_heads, KEY, VALUE) * 0 if state is None else state
    outs = random(batch, heads, length, VALUE) * 0
    rows = []
    for b, h in itertools.product(range(batch), range(kv_heads)):
        s = kept[b, h]
        for t in range(length):
            if scan.opens is not None and scan.opens[b, t]:
                s = s * 0
            if scan.real is None or scan.real[b, t]:
                s = s if decay is None else decay[b, h, t][:, None] * s
                v = scan.v[b, h, t]
                if scan.beta is not None:
                    v = scan.beta[b, h, t] * (v - scan.k[b, h, t] @ s)
                s = s + torch.outer(scan.k[b, h, t], v)
                for n in range(h * heads // kv_heads, (h + 1) * heads // kv_heads):
                    outs = outs.index_put(tuple(torch.tensor(i) for i in (b, n, t)), scan.q[b, n, t] @ s)
        rows.append(s)
    return outs, torch.stack(rows).view(batch, kv_heads, KEY, VALUE)


CASES = [
    (length, decay, delta, groups, padded, packed)
    for length, decay, delta in itertools.product(
        (1, 2, 21), ("none", "head", "channel", "constant", "zeros", "ones"), (False, True)
    )
    for groups, padded, packed in ((1, False, False), (2, True, False), (2, False, True), (1, True, True))
]


@pytest.mark.parametrize(("length", "decay", "delta", "groups", "padded", "packed"), CASES)
def test_forms_and_gradients_are_those_of_the_definition(length, decay, delta, groups, padded, packed, monkeypatch):
    scan = call(length, decay, delta, groups, padded, packed)
    state = random(2, 2, KEY, VALUE, seed=5)
    leaves = [t.requires_grad_() for t in (scan.q, scan.k, scan.v, scan.decay, scan.beta, state) if t is not None]
    want, left = defined(scan, state)
    weigh = random(*want.shape, seed=6), random(*left.shape, seed=9)
    grads = torch.autograd.grad((want * weigh[0]).sum() + (left * weigh[1]).sum(), leaves, allow_unused=True)
    together = states.BLOCK_NUMBERS
    # 1: every chunk of every text by itself
    for form, chunk, numbers in (
        *(("chunked", 0, together), ("chunked", 8, together), ("chunked", 8, 1), ("chunked", 64, together)),
        *(("recurrent", 0, together), ("quadratic", 0, together)),
    ):
        monkeypatch.setattr(states, "BLOCK_NUMBERS", numbers)
        out, last = run(scan, state, form, chunk)
        torch.testing.assert_close(out, want, msg=lambda m, form=form: f"{form}: {m}")
        torch.testing.assert_close(last, left)
        if form == "chunked":
            found = torch.autograd.grad((out * weigh[0]).sum() + (last * weigh[1]).sum(), leaves, allow_unused=True)
            for got, wanted in zip(found, grads, strict=True):
                # the logarithm of 0 has no derivative; ours is 0
                torch.testing.assert_close(got, torch.zeros_like(got) if wanted is None else wanted.nan_to_num())


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("decay", ["none", "head", "channel", "zeros"])
def test_weights_give_the_outputs(decay: str, delta: bool):
    scan = call(13, decay, delta, groups=2)
    want, _ = defined(scan)
    torch.testing.assert_close(weights(scan) @ scan.v.repeat_interleave(2, 1), want)


@pytest.mark.parametrize("form", ["chunked", "recurrent"])
def test_a_text_in_parts_is_the_text(form: str):
    scan = call(23, "channel", delta=True)
    want, left = run(scan, None, form)
    state, outs = None, []
    for a, b in ((0, 9), (9, 10), (10, 23)):
        q, k, v, decay = (t[:, :, a:b] for t in (scan.q, scan.k, scan.v, scan.decay))
        out, state = run(Scan(q, k, v, decay, scan.beta[:, :, a:b]), state, form)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), want)
    torch.testing.assert_close(state, left)


def softmaxed(allowed: Tensor, scan: Scan) -> Tensor:
    """Rows of weights, each with sum 1, of what may be seen."""
    groups = scan.q.shape[1] // scan.k.shape[1]
    met = scan.q @ scan.k.repeat_interleave(groups, 1).transpose(2, 3) * allowed
    return met / met.sum(-1, keepdim=True).where(met.sum(-1, keepdim=True) != 0, 1.0)


@pytest.mark.parametrize("length", [3, 17, 40])
def test_prefix_full_and_packed_orders(length: int):
    q, k, v = (random(2, 4 if n == 0 else 2, length, 6, seed=n).abs() for n in range(3))
    values = v.repeat_interleave(2, 1)
    real = torch.ones(2, length, dtype=torch.bool)
    real[0, : length // 3] = False
    at, place, prefix = torch.arange(length), real.cumsum(1) - 1, torch.tensor([2, 1])
    early = (place < prefix[:, None]) & real
    both = real[:, None] & real[:, :, None]
    seen = (at[:, None] >= at) | (early[:, None] & early[:, :, None])
    for scan, allowed in (
        (Scan(q, k, v, normalised=True, real=real, prefix=prefix), (seen & both)[:, None]),
        (Scan(q, k, v, normalised=True, real=real, causal=False), both[:, None]),
    ):
        want = softmaxed(allowed, scan)
        rows = real[:, None, :, None]
        torch.testing.assert_close(weights(scan) * rows, want)
        torch.testing.assert_close(run(scan)[0] * rows, want @ values)
    opens = random(2, length, seed=8) > 1
    decay = -random(2, 2, length, 1, seed=9).abs()
    far = decay.repeat_interleave(2, 1)[..., 0].cumsum(-1)
    text = opens.cumsum(1)
    scan = Scan(q, k, v, decay, normalised=True, causal=False, opens=opens)
    within = (text[:, :, None] == text[:, None])[:, None] * (-(far[..., None] - far[..., None, :]).abs()).exp()
    want = softmaxed(within, scan)
    torch.testing.assert_close(weights(scan), want)
    torch.testing.assert_close(run(scan)[0], want @ values)


def test_a_hundred_thousand_tokens_in_bfloat16_neither_overflow_nor_vanish():
    length = 100_000
    ones = torch.ones(1, 1, length, 2, dtype=torch.bfloat16)
    # what stays of a state of 1 / (1 - a) at its balance, and a sum of as many ones
    decay = torch.tensor([[[[-1e-3, 0.0]]]])
    out, state = run(Scan(ones, ones, ones[..., :1], decay))
    assert out.isfinite().all()
    assert state[0, 0, 0, 0].item() == pytest.approx(1 / (1 - torch.tensor(-1e-3).exp().item()), rel=1e-3)
    assert state[0, 0, 1, 0].item() == pytest.approx(length, rel=1e-6)
    for strong in (-30.0, -1e4, -torch.inf):
        out, _ = run(Scan(ones, ones, ones[..., :1], torch.full((1, 1, length, 2), strong)))
        assert torch.equal(out, torch.full_like(out, 2.0))


def test_a_decay_of_zero_cuts_exactly_and_one_of_one_not_at_all():
    scan = call(40, "none")
    cut = torch.zeros(1, 2, 40, 1, dtype=torch.float64)
    cut[:, :, 20] = -torch.inf
    tail, _ = run(Scan(scan.q[:, :, 20:], scan.k[:, :, 20:], scan.v[:, :, 20:]))
    out, _ = run(Scan(scan.q, scan.k, scan.v, cut.expand(2, -1, -1, -1)), form="chunked", chunk=16)
    torch.testing.assert_close(out[:, :, 20:], tail, rtol=0, atol=1e-14)
    plain, _ = run(scan)
    torch.testing.assert_close(out[:, :, :20], plain[:, :, :20])


def test_memory_of_the_backward_pass_is_that_of_inputs_and_outputs():
    saved = []
    for length in (256, 2048):
        scan = Scan(*(torch.randn(1, 1, length, 16, requires_grad=True) for _ in range(3)))
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, held=held: held.append(t.numel()) or t, lambda t: t):
            run(scan, form="chunked", chunk=32)
        saved.append(sum(held))
    # q, k and v, and one state for each stretch of thousands of tokens
    assert saved[0] - 256 * 48 == saved[1] - 2048 * 48 <= 2 * 16 * 16


def test_an_empty_text_leaves_the_state_as_it_is():
    state = random(2, 2, KEY, VALUE)
    out, after = run(call(0), state)
    assert out.shape == (2, 2, 0, VALUE)
    assert torch.equal(after, state)


def test_an_empty_packed_segment_is_none():
    scan = call(6)
    opens = torch.zeros(2, 6, dtype=torch.bool)
    opens[0, 2], opens[1, 5] = True, True
    out, _ = run(Scan(scan.q, scan.k, scan.v, opens=opens))
    alone, _ = run(Scan(scan.q[1:, :, 5:], scan.k[1:, :, 5:], scan.v[1:, :, 5:]))
    torch.testing.assert_close(out[1:, :, 5:], alone)


def test_chunks_fit_the_work():
    assert chunk_for(10_000, 64, 64) == 64
    assert chunk_for(10_000, 273, 64) == 128
    assert chunk_for(5, 64, 64) == 8
    assert chunk_for(1, 64, 64) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 2, 4, 6)}, BadInput, "do not fit"),
        ({"q": torch.zeros(2, 3, 4, 5)}, BadInput, "multiple of the key-value heads"),
        ({"q": torch.zeros(2, 2, 7, 5)}, BadInput, "7 queries and 4 keys"),
        ({"beta": torch.zeros(2, 2, 4), "normalised": True}, NotSupported, "no sum of weights"),
        ({"beta": torch.zeros(2, 2, 4), "causal": False}, NotSupported, "causal"),
        (
            {"decay": torch.zeros(2, 2, 4, 1), "prefix": torch.ones(2, dtype=torch.int64)},
            NotSupported,
            "without decays",
        ),
    ],
)
def test_what_does_not_fit_is_refused(unchecked, change, error, message):
    plain = {"q": torch.zeros(2, 2, 4, 5), "k": torch.zeros(2, 2, 4, 5), "v": torch.zeros(2, 2, 4, 3)}
    with pytest.raises(error, match=message):
        Scan(**(plain | change))


def test_wrong_states_chunks_and_decays_are_refused(unchecked):
    scan = call(4)
    with pytest.raises(BadInput, match="from another layer"):
        run(scan, random(2, 2, KEY + 1, VALUE))
    with pytest.raises(BadInput, match="power of two"):
        run(scan, chunk=24)
    with pytest.raises(BadInput, match="lets the state grow"):
        run(Scan(scan.q, scan.k, scan.v, torch.full((1, 2, 1, 1), 0.1)))
