"""Whether linear attention, selective state spaces and gated recurrences are one map where their conditions are met.

Two forms are compared by their influence, what every output takes of every input, on random queries, keys, steps and
gates in float64: one is a plain formula or the layer's own scan, the other a system of `foveate.core.systems`. The
conditions are worked out from the recurrences; the control breaks each of them. Softmax attention is compared with its
expansion in powers of q . k, cut off later and later, and where scores are too large for the last power.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from _claim import mean, write
from torch import Generator, Tensor
from torch.nn.functional import elu, logsigmoid, softplus

from foveate.core.mask import Mask
from foveate.core.rows import View
from foveate.core.scans import selective as scanned_by
from foveate.core.states import Scan
from foveate.core.systems import System, coincide, memory, softmax_system, system

SEEDS = (0, 1, 2)
TIME, HEADS, STATES, CHANNELS = 48, 2, 4, 5
# largest difference, relative to the largest influence, of what is the same; least of what is not
SAME, OTHER = 1e-9, 1e-2
# for softmax: width, tokens, powers, how near the last one must be, and the largest scores of the claim and the control
WIDTH, TOKENS, ORDERS, NEAR, SCORE, STEEP = 3, 24, (2, 4, 6, 8, 10), 1e-3, 2.0, 8.0

# influences of two forms, [1, heads, time, time] each
Forms = tuple[Tensor, Tensor]


def drawn(rng: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def apart(forms: Forms) -> float:
    one, other = forms
    return float((one - other).abs().max() / one.abs().max())


def features(rng: Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features of queries and keys, the sum that divides each row, and the rows of linear attention by its formula."""
    q, k = (elu(drawn(rng, 1, HEADS, TIME, STATES)) + 1 for _ in range(2))
    met = (q @ k.mT).tril()
    total = met.sum(-1, keepdim=True)
    return q, k, total, met / total


def with_decay(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return System(a.expand_as(b), b, c, torch.zeros_like(b[..., 0])).influence()


def selective(rate: Tensor, step: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Influence [time, time] in one channel of S6, by its own scan: every token is a channel with one impulse.

    Args:
        rate: A of each state.
        step: D_t, [time].
        b: B_t, [time, states].
        c: C_t, the same.
    """
    impulses = torch.eye(len(step), dtype=step.dtype)[None]
    rates, steps = rate.expand(len(step), -1), step[None, :, None].expand(1, -1, len(step))
    y, _ = scanned_by(steps, impulses, rates, b[None], c[None], step.new_zeros(1, *rates.shape))
    return y[0]


def no_decay(rng: Generator) -> tuple[Forms, Forms]:
    q, k, total, rows = features(rng)
    one = torch.ones(1, dtype=q.dtype)
    return (rows, with_decay(one, k, q / total)), (rows, with_decay(0.9 * one, k, q / total))


def divided_state(rng: Generator) -> tuple[Forms, Forms]:
    q, k, total, rows = features(rng)
    # what is left of the empty state before the first token does not matter
    a = torch.cat([torch.ones_like(total[:, :, :1]), total[:, :, :-1] / total[:, :, 1:]], 2)
    return (rows, with_decay(a, k / total, q)), (rows, with_decay(a, k, q))


def growing_sum(rng: Generator) -> tuple[Forms, Forms]:
    q, k, with_query, rows = (x[:, :1] for x in features(rng))
    without = k.sum(-1, keepdim=True).cumsum(2)

    def by_steps(total: Tensor) -> Tensor:
        """A = -1 and D_t = ln(total_t / total_{t-1}), as far as that is a step: it cannot be below 0."""
        ratio = torch.cat([total.new_full((1,), math.e), total[1:] / total[:-1]])
        step = ratio.log().clamp_min(1e-9)
        write = k[0, 0] / (total * step)[:, None]
        return selective(-torch.ones(STATES, dtype=q.dtype), step, write, q[0, 0])[None, None]

    kept = ((q @ k.mT).tril() / without, by_steps(without[0, 0, :, 0]))
    return kept, (rows, by_steps(with_query[0, 0, :, 0]))


def gated(rng: Generator, by_channel: bool) -> tuple[Forms, Forms]:
    """S6, channel by channel, beside linear attention whose decays all channels share.

    Args:
        by_channel: Whether these are one per channel of the keys; or one for all of them.
    """
    b, c = (drawn(rng, TIME, STATES) for _ in range(2))
    rates = -torch.arange(1, STATES + 1, dtype=b.dtype) / STATES
    steps = softplus(drawn(rng, TIME, CHANNELS) - 1)
    one_step = steps[:, :1].expand_as(steps)

    def forms(rate: Tensor, step: Tensor) -> Forms:
        channels = torch.stack([selective(rate, own, b, c) for own in step.T])[None]
        decay = step.mean(1, keepdim=True) * (rate if by_channel else rate.mean())
        scan = Scan(c[None, None], b[None, None], torch.zeros_like(b)[None, None], decay[None, None])
        return channels, system(scan).influence() * step.T[None, :, None]

    if by_channel:
        return forms(rates, one_step), forms(rates, steps)
    return forms(rates.mean().expand(STATES), one_step), forms(rates, one_step)


def reversed_gate(rng: Generator) -> tuple[Forms, Forms]:
    """One state per channel that sigmoid(-f)^r leaves, token by token, beside a scan with the decay -r softplus(f)."""
    forget, write, read = (drawn(rng, TIME, CHANNELS) for _ in range(3))
    rate = float(drawn(rng, 1).exp())
    state, outs = torch.zeros(CHANNELS, TIME, dtype=forget.dtype), []
    for t in range(TIME):
        state = (-forget[t]).sigmoid()[:, None] ** rate * state
        state[:, t] += write[t].sigmoid()
        outs.append(read[t].sigmoid()[:, None] * state)
    by_gates = torch.stack(outs, 1)[None]

    def scanned(decay: Tensor) -> Tensor:
        q, k, a = (x.T[None, :, :, None] for x in (read.sigmoid(), write.sigmoid(), decay))
        return system(Scan(q, k, torch.zeros_like(k), a)).influence()

    return (by_gates, scanned(-rate * softplus(forget))), (by_gates, scanned(logsigmoid(forget)))


# what is the same under a condition, and what breaks that
PAIRS: dict[str, tuple[str, Callable[[Generator], tuple[Forms, Forms]]]] = {
    "linear attention, a system without decay": ("a decay of 0.9", no_decay),
    "linear attention, a system that decays by the ratio of its sums": ("writes not divided", divided_state),
    "linear attention over a sum that grows, S6": ("a sum that falls, too", growing_sum),
    "S6 with one step for all channels, a decay per channel of the keys": (
        "a step per channel",
        lambda rng: gated(rng, True),
    ),
    "S6 with one step and one rate, a decay per head": ("a rate per state", lambda rng: gated(rng, False)),
    "a gate sigmoid(-f)^r, S6 with one state": ("a gate sigmoid(f)", reversed_gate),
}


def expanded(seed: int) -> dict[str, Any]:
    """How far softmax is from its expansion, power by power, and how much of the past either holds."""
    rng = torch.Generator().manual_seed(seed)
    q, k = (drawn(rng, 1, 1, TOKENS, WIDTH) for _ in range(2))
    behind = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)

    def up_to(largest: float) -> tuple[View, Tensor]:
        """Queries whose largest score is this, and the rows of softmax."""
        to = q * largest / (q @ k.mT).abs().max()
        rows = (to @ k.mT).masked_fill(behind, -torch.inf).softmax(-1)
        return View(to, k, torch.zeros_like(k), Mask.causal_of(TOKENS), 1.0), rows

    (small, rows), (large, steep) = up_to(SCORE), up_to(STEEP)
    cut = [softmax_system(small, order).influence() for order in ORDERS]
    return {
        "apart": [apart((rows, c)) for c in cut],
        "steep": apart((steep, softmax_system(large, ORDERS[-1]).influence())),
        "ranks": [float(memory(c).rank) for c in cut],
        "rank": float(memory(rows).rank),
    }


def main() -> None:
    numbers: dict[str, Any] = {}
    control: dict[str, Any] = {}
    holding = []
    for name, (breaks, make) in PAIRS.items():
        kept, broken = zip(*(make(torch.Generator().manual_seed(seed)) for seed in SEEDS), strict=True)
        same, other = [apart(forms) for forms in kept], [apart(forms) for forms in broken]
        holding.append(max(same) <= SAME and min(other) >= OTHER)
        numbers[f"{name}: apart"] = mean(same)
        found = [coincide(*forms) for forms in broken]
        control[f"{name}; with {breaks}"] = {
            "apart": mean(other),
            "apart with the best factors per token": mean([f.apart for f in found]),
            "factors that mend it": ", ".join(sorted({f.condition or "none" for f in found})),
        }
    series = [expanded(seed) for seed in SEEDS]
    for n, order in enumerate(ORDERS):
        numbers[f"softmax, its expansion up to power {order}: apart"] = mean([s["apart"][n] for s in series])
    ranks = {f"expansion up to power {order}": mean([s["ranks"][n] for s in series]) for n, order in enumerate(ORDERS)}
    numbers["numbers about the first half that reach the second"] = ranks | {
        "softmax": mean([s["rank"] for s in series])
    }
    steep = [s["steep"] for s in series]
    control[f"softmax, its expansion up to power {ORDERS[-1]}; with scores up to {STEEP:g}"] = {"apart": mean(steep)}
    falls = all(s["apart"] == sorted(s["apart"], reverse=True) and s["apart"][-1] <= NEAR for s in series)
    holding.append(falls and min(steep) >= OTHER)
    write(
        title="Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent Neural "
        "Networks",
        claim="Linear attention, selective state spaces and gated recurrences are the same map under conditions on "
        "their decays and writes, and softmax attention is linear attention whose state has no end.",
        verdict="holds" if all(holding) else "partly" if any(holding) else "fails",
        numbers=numbers,
        control=control,
        seeds=list(SEEDS),
        rule=f"two forms hold when in every seed their influences are at most {SAME:g} of the largest one apart under "
        f"the condition, and at least {OTHER:g} without it; softmax when the distance falls from power to power, to at "
        f"most {NEAR:g}, and is at least {OTHER:g} with large scores. Holds: all; partly: some; fails: none",
        setting=f"{TIME} tokens, {STATES} states, {CHANNELS} channels, float64; softmax: {TOKENS} tokens, width "
        f"{WIDTH}, scores up to {SCORE:g}",
        note="the conditions are worked out from the recurrences, for the paper's own wording could not be read; a "
        "decay of one number per head can be mended by factors per token, since coordinates of a state mean nothing",
        encoder="none: random queries, keys, steps and gates",
    )


if __name__ == "__main__":
    main()
