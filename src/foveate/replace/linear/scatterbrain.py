r"""Scatterbrain: exact softmax for what is near, random features for the rest, in one sum of weights.

o_i = \sum_j A_ij v_j / \sum_j A_ij,   A_ij = exp(q_i . k_j / sqrt(d)) in the window of i, phi(q_i)^T phi(k_j) else,
phi(x) = (2m)^(-1/2) exp(-|x'|^2 / 2) [exp(W x'), exp(-W x')],   x' = x / d^(1/4)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.card import Card, Needs
from foveate.core.mixer import State
from foveate.core.params import bounded
from foveate.core.recurrence import Heads, Recurrence
from foveate.core.rule import Sizes
from foveate.core.states import Form, Scan, run
from foveate.replace.linear._random import Draw, orthogonal
from foveate.replace.linear._window import Windows

__all__ = ["Scatterbrain"]


@dataclass(frozen=True)
class Scatterbrain(Recurrence):
    """Softmax attention, exact in a local window and estimated outside.

    A key is written into the state when it leaves the window, so that no pair is counted twice and nothing has to be
    subtracted. `scan` describes the estimate of all pairs, without the window.

    Example:
        A window as long as the text is softmax attention.

        >>> import torch, foveate
        >>> from foveate.replace import Scatterbrain
        >>> x, error = torch.randn(1, 50, 32), []
        >>> plain = foveate.nn.Attention(32, heads=4)
        >>> for window in (1, 50):
        ...     rule = Scatterbrain(window)
        ...     made = foveate.nn.Attention(32, heads=4, rule=rule)
        ...     _ = made.load_state_dict(plain.state_dict(), strict=False)
        ...     error.append((made(x) - plain(x)).abs().max())
        >>> bool(error[0] > 1e-3), bool(error[1] < 1e-5)
        (True, True)

    Args:
        window: Tokens that a token sees exactly, itself included; where all see all, on either side.
        directions: Random directions, m; each gives two features.
        seed: Which draw; each layer has its own part of it.
    """

    window: int = bounded(64, 1, 65536)
    directions: int = bounded(128, 1, 65536)
    seed: int = bounded(0, 0, 2**31 - 1)

    one_scan: ClassVar[bool] = False

    card: ClassVar = Card(
        title="Scatterbrain: Unifying Sparse and Low-rank Attention Approximation",
        year=2021,
        family="linear",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES,
        equation="o_i = sum_j A_ij v_j / sum_j A_ij, A_ij = exp(q_i.k_j / sqrt(d)) in the window, phi(q_i).phi(k_j) "
        "elsewhere",
        differs="the exact pairs are those of a local window, as in a module of the authors' code, not those that "
        "hashing finds, which would need all keys; estimates of the window's pairs are never written, where the "
        "authors subtract them; the causal window ends with its token; exponents of keys are lowered by a constant of "
        "the draw",
        use="to estimate softmax attention without training where what matters is near and the rest is diffuse",
        misleads="single keys of large weight outside the window are what random features estimate worst; compare "
        "with the window alone, and several seeds",
    )
    test_params: ClassVar = ({"window": 4}, {"window": 3, "directions": 5, "seed": 2}, {})

    def learned(self, sizes: Sizes) -> nn.Module:
        drawn = orthogonal(self.directions, sizes.head_dim, self.seed + sizes.layer * 2**31)
        return Draw(torch.cat([drawn, -drawn]))

    def queries(self, heads: Heads) -> Float[Tensor, "batch heads time key"]:
        assert isinstance(heads.learned, Draw)
        return heads.learned.queries(heads.q, heads.scale)[0]

    def keys(self, heads: Heads) -> Float[Tensor, "batch kv_heads time key"]:
        assert isinstance(heads.learned, Draw)
        return heads.learned.keys(heads.k, heads.scale)

    def flow(
        self, heads: Heads, state: State | None, form: Form = "auto"
    ) -> tuple[Float[Tensor, "batch heads time value_dim"], State]:
        windows = Windows.of(heads, self.window, state)
        near, lse = windows.attend()
        far, logs, after = estimated(windows, state["state"] if state else None, form)
        # the share of what is far in the sum of all weights
        share = torch.sigmoid(logs - lse)
        return windows.back(near + share * (far - near)), {"state": after, **windows.state()}


def estimated(
    windows: Windows, state: Tensor | None, form: Form
) -> tuple[Float[Tensor, "batch heads query value_dim"], Float[Tensor, "batch heads query 1"], Tensor]:
    """What is outside of the windows: means of values by estimated weights, logs of their sums, and the state."""
    heads, width, length = windows.heads, windows.window, windows.q.shape[2]
    draw = heads.learned
    assert isinstance(draw, Draw)
    q, most = draw.queries(windows.q, heads.scale)
    k = draw.keys(windows.k, heads.scale)
    v = torch.cat([windows.v, torch.ones_like(windows.v[..., :1])], -1).to(k)
    here = windows.text[:, width:]

    def known(v: Tensor, text: Tensor) -> Tensor:
        # of values and of what they are counted by, which are narrower than features of keys
        return v * ((text == here) & (here >= 0))[:, None, :, None]

    # beside each token stands the key that has just left its window, and in the other direction the one still to come
    before = torch.cat([torch.zeros_like(here[:, :1]), here[:, :-1]], 1)
    left = known(v[:, :, :length], windows.text[:, :length])
    out, after = run(Scan(q, k[:, :, :length], left, opens=here > before), state, form)
    if not heads.tokens.causal:
        more = min(width, length)
        k, v = (torch.nn.functional.pad(t[:, :, 2 * width :], (0, 0, 0, more)) for t in (k, v))
        ahead = known(v, torch.nn.functional.pad(windows.text[:, 2 * width :], (0, more), value=-1))
        ends = torch.cat([here[:, 1:] > here[:, :-1], torch.zeros_like(here[:, :1], dtype=torch.bool)], 1)
        turned = Scan(q.flip(2), k.flip(2), ahead.flip(2), opens=ends.flip(1))
        out = out + run(turned, None, form)[0].flip(2)
    total = out[..., -1:]
    some = total > 0
    safe = torch.where(some, total, 1.0)
    factor = most + draw.shift - math.log(len(draw.omega))
    return out[..., :-1] / safe, torch.where(some, safe.log() + factor, -torch.inf), after
