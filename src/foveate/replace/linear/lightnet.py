r"""LightNet: an additive recurrence, which is a softmax over time in each channel of the keys.

    g_t = g_{t-1} + exp(k_t)
    S_t = diag(g_{t-1} / g_t) S_{t-1} + (exp(k_t) / g_t) v_t^T = softmax_{s <= t}(k_s)^T v_s
    out = W_o (RMSNorm(concat_h silu(q_t)^T S_t) * silu(W_b W_a x_t))

With P_s = exp(k_s - m) and m the largest k of each channel, S_t = diag(1 / sum_{s <= t} P_s) sum_{s <= t} P_s v_s^T, in
which nothing decays; that is how it is computed where no channel spans more than float32 has digits for.

Nothing decays in S_t = diag(1 / r_t) sum_{s <= t} exp(k_s - m) v_s^T, r_t = sum_{s <= t} exp(k_s - m), m the largest k
of a channel: so it is computed unless a channel spans more than float32 has room for.

What decays is the share of a token in a sum, not its weight with the distance. Where all see all, every order of the
tokens gives the same S: a grid needs no more than one scan, and its places come from relative positions alone
(MD-LRPE): with M axes, group i of the channels is turned by n_i theta, n_i the place on axis i, as `_lrpe.py` has it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

from foveate.core.card import Card, Needs
from foveate.core.errors import NotSupported
from foveate.core.mixer import State, Tokens
from foveate.core.params import bounded
from foveate.core.recurrence import Heads, Recurrence
from foveate.core.rule import Sizes
from foveate.core.states import Form, Scan, exact, run
from foveate.replace.linear._lrpe import first_theta, placed, turned

__all__ = ["Lightnet"]

EPS = 1e-5
# the log of no sum at all; -inf less -inf would be NaN
NOTHING = -1e30
# the widest range of the logits of a channel of which float32 can sum exponentials, and divide by the sums
SPAN = 60.0
# the widest range of the logits of a channel whose exponentials, and their reciprocals, float32 can sum
SPAN = 60.0


@dataclass(frozen=True)
class Lightnet(Recurrence):
    """Linear attention whose decay is the growth of a sum, for texts and for grids in one scan.

    Example:
        An image of 8 x 8 patches, row by row, in one scan.

        >>> import torch, foveate
        >>> from foveate.replace import Lightnet
        >>> rule = Lightnet(rank=8, inner=(8,))
        >>> layer = foveate.nn.Attention(32, heads=2, rule=rule, causal=False)
        >>> layer(torch.randn(1, 64, 32)).shape
        torch.Size([1, 64, 32])

    Args:
        rank: Width between W_a and W_b of the gate.
        inner: Sizes of all axes of a grid but the first, whose cells are the tokens, row by row; (): a text.
    """

    rank: int = bounded(128, 1, 4096)
    inner: tuple[int, ...] = bounded((), 1, 1 << 20)

    card: ClassVar[Card] = Card(
        title="You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet",
        year=2024,
        family="linear",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES | Needs.TRAINING,
        equation="o_t = silu(q_t)^T S_t, S_t = diag(g_{t-1} / g_t) S_{t-1} + (exp(k_t) / g_t) v_t^T, "
        "g_t = g_{t-1} + exp(k_t)",
        differs="Norm, gate and the empty sum at the start are those of flash-linear-attention; the first author's "
        "later code begins at g = 1, gates by a sigmoid, and norms behind it. MD-TPE, a learned exponential filter of "
        "the whole network's input, is no part of a layer and left out. The angles are learned, one row per key-value "
        "head, and all axes share them. Rotary positions of a loaded model would turn the logits of the keys: make new "
        "layers without rope.",
        use="For images and grids in one pass, and for texts in a state of fixed size, with the same layer.",
        misleads="There is no recency: one large logit keeps its channel for good, and a late token weighs 1 / t.",
        claims=("one_scan",),
    )
    test_params: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"rank": 3, "inner": (4,)}, {"rank": 3, "inner": (3, 2)})

    def learned(self, sizes: Sizes) -> nn.Module:
        return Gate(sizes, self.rank, -(-sizes.head_dim // (len(self.inner) + 1)))

    def scan(self, heads: Heads, first: bool = True) -> Scan:
        return self.shared(heads, {})[0]

    def flow(
        self, heads: Heads, state: State | None, form: Form = "auto"
    ) -> tuple[Float[Tensor, "batch heads time value_dim"], State]:
        if state and not heads.tokens.causal:
            raise NotSupported("a softmax over all tokens needs them all at once; call it without a cache")
        scan, total, top = self.shared(heads, state or {})
        held = None
        if state:
            held = state["state"]
            held = held if top is None else held * twice((state["total"] - top).exp())[..., None]
        out, last = run(scan, held, form)
        if top is not None:
            last = last * twice((top - total).exp())[..., None]
        return self.finish(heads, out), {"state": last, "total": total}

    def shared(self, heads: Heads, before: State) -> tuple[Scan, Tensor, Tensor | None]:
        """The scan, and log g behind its last token; `before` has the one before its first.

        Third, m, where nothing decays in the scan; its state is then exp(log g - m) times the one that is kept.
        """
        tokens, wide = heads.tokens, exact(heads.q)
        gap = ~tokens.real[:, None, :, None]
        k = heads.k.to(wide).masked_fill(gap, NOTHING)
        start = before["total"][:, :, None] if before else torch.full_like(k[:, :, :1], NOTHING)
        top = None
        if tokens.causal and tokens.opens is None:
            highest, lowest = k.detach().amax(2, True), k.detach().masked_fill(gap, torch.inf).amin(2, True)
            top = highest.maximum(start)
            top = top if bool((top - lowest.maximum(start) <= SPAN).all()) else None
        angle = self.angle(heads)
        groups = heads.q.shape[1] // k.shape[1]
        q, decay = turned(silu(heads.q.to(wide)), angle.repeat_interleave(groups, 1)), None
        if top is not None:
            share = (k - top).exp()
            sums = (start - top).exp() + share.cumsum(2)
            total = top[:, :, 0] + sums[:, :, -1].log()
            # of padding in front, which reads nothing, anything finite
            q = q * twice(sums.clamp_min(math.exp(-SPAN - 1)).reciprocal()).repeat_interleave(groups, 1)
        else:
            logs = log_sums(k, tokens, start)
            share, total = (k - logs).exp(), logs[:, :, -1].clone()
            if tokens.causal:
                decay = twice((torch.cat([start, logs[:, :, :-1]], 2) - logs).clamp_max(0))
        scan = Scan(
            q,
            turned(share, angle),
            heads.v.to(wide),
            decay,
            real=tokens.real,
            opens=tokens.opens,
            causal=tokens.causal,
        )
        return scan, total, None if top is None else top[:, :, 0]

    def angle(self, heads: Heads) -> Float[Tensor, "batch kv_heads time dim"]:
        """n_i theta of each channel."""
        own: Any = heads.learned
        wide, place = exact(heads.q), placed(heads.tokens)
        # cells that one step along each axis passes over
        steps = [math.prod(self.inner[i:]) for i in range(len(self.inner) + 1)]
        places = [place // step for step in steps]
        axes = torch.stack([places[0], *(n % size for n, size in zip(places[1:], self.inner, strict=True))], -1)
        # the same angles for each axis, the last group of channels cut off where they do not divide
        return (axes[:, None, :, :, None] * own.theta.to(wide)[:, None, None]).flatten(3)[..., : heads.k.shape[3]]

    def finish(
        self, heads: Heads, out: Float[Tensor, "batch heads time value_dim"]
    ) -> Float[Tensor, "batch heads time value_dim"]:
        own: Any = heads.learned
        flat = out.transpose(1, 2).flatten(2)
        normed = rms_norm(flat, flat.shape[-1:], own.weight.to(flat), EPS)
        gated = normed * silu(own.up(own.down(heads.tokens.x)))
        return gated.unflatten(-1, (out.shape[1], -1)).transpose(1, 2)


class Gate(nn.Module):
    """W_a, W_b, the weight of the norm and the angles of one layer.

    Args:
        sizes: Sizes of the layer.
        rank: Width between W_a and W_b.
        channels: Channels of a head that know of one axis.
    """

    def __init__(self, sizes: Sizes, rank: int, channels: int) -> None:
        super().__init__()
        inner = sizes.heads * sizes.value_dim
        self.down, self.up = nn.Linear(sizes.width, rank, bias=False), nn.Linear(rank, inner, bias=False)
        self.weight = nn.Parameter(torch.ones(inner))
        self.theta = nn.Parameter(first_theta(sizes.kv_heads, channels))


def twice(x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch twice"]:
    """The numbers of channels beside each of their two features."""
    return torch.cat([x, x], -1)


def log_sums(
    logits: Float[Tensor, "batch heads time dim"], tokens: Tokens, start: Float[Tensor, "batch heads 1 dim"]
) -> Float[Tensor, "batch heads time dim"]:
    """Log of the sum of exp(logits) over the tokens that each one sees, in texts that are packed text by text."""
    number = torch.zeros_like(tokens.place) if tokens.opens is None else tokens.opens.cumsum(1)
    total = torch.zeros_like(logits)
    for text in range(int(number.max()) + 1):
        own = (number == text)[:, None, :, None]
        part = torch.cat(
            [start if text == 0 else torch.full_like(start, NOTHING), logits.masked_fill(~own, NOTHING)], 2
        )
        found = part.logcumsumexp(2)[:, :, 1:] if tokens.causal else part.logsumexp(2, keepdim=True)
        total = torch.where(own, found, total)
    return total
