"""Dynamical systems: scans and softmax as (A, B, C, D), what they remember, and when two are the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.core.errors import BadInput, TooBig
from foveate.core.mask import Mask
from foveate.core.rows import View, attend
from foveate.core.states import Scan, run, weights
from foveate.core.systems import System, coincide, memory, softmax_system, system


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scan(**said: object) -> Scan:
    k = torch.nn.functional.normalize(random(1, 2, 9, 4, seed=1), dim=-1)
    return Scan(random(1, 4, 9, 4), k, random(1, 2, 9, 3, seed=2), **said)


HEAD, CHANNEL = -random(1, 2, 9, 1, seed=3).abs(), -random(1, 2, 9, 4, seed=4).abs()
BETA = random(1, 2, 9, seed=5).sigmoid()


@pytest.mark.parametrize(
    "said",
    [{}, {"decay": HEAD}, {"decay": CHANNEL}, {"beta": BETA}, {"decay": CHANNEL, "beta": BETA}, {"normalised": True}],
)
def test_a_scan_is_its_system(said):
    one = scan(**said)
    found = system(one)
    want, _ = run(one)
    torch.testing.assert_close(found.run(one.v.repeat_interleave(2, 1)), want)
    torch.testing.assert_close(found.influence(), weights(one))


def test_what_stands_beside_the_state_goes_straight_through():
    one = system(scan())
    v = random(1, 4, 9, 3, seed=6)
    through = System(one.a, one.b, one.c, torch.full_like(one.d, 0.5))
    torch.testing.assert_close(through.run(v), one.run(v) + 0.5 * v)


def test_softmax_cut_off_later_and_later_becomes_softmax():
    q, k = 0.5 * random(1, 2, 7, 3), random(1, 1, 7, 3, seed=1)
    view = View(q, k, random(1, 1, 7, 2, seed=2), Mask.causal_of(7))
    want = attend(view).out
    apart = [
        float((softmax_system(view, order).run(view.v.repeat_interleave(2, 1)) - want).abs().max())
        for order in (1, 4, 10)
    ]
    assert apart[0] > 3 * apart[1] > 1000 * apart[2]
    assert apart[2] < 1e-3


def test_reach_and_rank_of_known_influences():
    eye, below = torch.eye(8)[None, None], torch.eye(8).roll(3, 0).tril()[None, None]
    assert memory(eye).reach.item() == 0
    assert memory(eye).rank.item() == 0
    # each of the last five outputs is the input three before; the first four have none, or one within their half
    assert memory(below).reach.item() == pytest.approx(3 * 5 / 8)
    assert memory(below).rank.item() == pytest.approx(3)
    # one number per value passes the middle, whatever the length
    assert memory(torch.ones(8, 8).tril()[None, None]).rank.item() == pytest.approx(1, abs=1e-4)


def test_conditions_under_which_two_coincide():
    plain = weights(scan())
    gates = random(1, 4, 9, seed=7).abs() + 0.1
    assert coincide(plain, plain).condition == "none needed"
    found = coincide(gates[..., None] * plain, plain)
    assert found.condition == "reads scaled"
    torch.testing.assert_close(found.reads, gates)
    assert coincide(plain * gates[..., None, :], plain).condition == "writes scaled"
    # normalised linear attention is linear attention with its reads scaled
    assert coincide(weights(scan(normalised=True)), plain).condition == "reads scaled"
    # a decay of one number per head is factors on reads and writes
    assert coincide(weights(scan(decay=HEAD)), plain).condition == "reads and writes scaled"
    # and these are not
    for other in ({"decay": CHANNEL}, {"beta": BETA}):
        found = coincide(weights(scan(**other)), plain)
        assert not found
        assert found.apart > 1e-3


def test_what_is_no_system_is_refused(unchecked):
    with pytest.raises(BadInput, match="later ones"):
        system(scan(causal=False))
    view = View(random(1, 2, 7, 3), random(1, 1, 7, 3), random(1, 1, 7, 2), Mask.full(7, 7))
    with pytest.raises(BadInput, match="causal order"):
        softmax_system(view, 2)
    view.mask = Mask.causal_of(7)
    with pytest.raises(TooBig, match="lower order"):
        softmax_system(view, 20)
    with pytest.raises(BadInput, match="not of the same texts"):
        coincide(torch.eye(3)[None, None], torch.eye(4)[None, None])
