r"""Constant bandwidth: units that work side by side begin one key after the other, and share every key that is loaded.

    with P units and N keys, step t loads key t mod N and its value, for all units
    row b P + u is loaded into unit u at step b N + u and meets keys u, ..., N - 1, 0, ..., u - 1
    s = scale q k^T,    m' = max(m, s),    l' = e^{m - m'} l + e^{s - m'},    o' = e^{m - m'} o + e^{s - m'} v

Units that share one row need P keys a step. Units that begin P rows at the same key need one key a step, but P queries
in the first. Begun one step apart, they never need more than one key, its value and one query. For N rows that makes
N^2 / P + P - 1 steps and as many keys, in place of N^2 / P steps and N^2 keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from foveate.core import tiled
from foveate.core.card import Card, Needs
from foveate.core.mechanism import Schedule
from foveate.core.params import bounded
from foveate.core.rows import View
from foveate.core.traffic import Shape, Traffic

__all__ = ["ConstantBandwidth", "stream"]

# steps that PyTorch takes in one product, and bytes of scores that one product makes
STEPS = 128
STEP_BYTES = 4 << 20


@dataclass(frozen=True)
class ConstantBandwidth(Schedule):
    """Compute attention in an order that loads one key, its value and at most one query a step, for any parallelism.

    Args:
        units: Rows that are computed side by side. At most as many as there are rows, and keys, are put to work.

    Example:
        Vectors in the busiest step, in this order and with the units side by side along the keys of one row; and a
        model that gives what it gave.

        >>> import torch, foveate
        >>> from foveate.compress import ConstantBandwidth
        >>> from foveate.testing import handmade
        >>> for units in (1, 4, 16):
        ...     m = ConstantBandwidth(units)
        ...     print(units, int(m.loads(64, 64).max()), int(m.naive(64, 64).max()))
        1 3 3
        4 3 9
        16 3 33
        >>> model, ids = handmade.model(), handmade.ids("abcabcab")
        >>> plain = model(ids).logits
        >>> with foveate.attach(model, ConstantBandwidth()):
        ...     torch.allclose(model(ids).logits, plain, atol=1e-5)
        True
    """

    units: int = bounded(4, 1, 4096, grid=(1, 4, 16, 64))

    card: ClassVar = Card(
        title="Edge-MoE: Memory-Efficient Multi-Task Vision Transformer Architecture with Task-level Sparsity via "
        "Mixture-of-Experts",
        year=2023,
        family="exact",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES,
        equation="step t loads key t mod N for all P units; row b P + u goes to unit u at step b N + u and meets keys "
        "u, ..., N - 1, 0, ..., u - 1",
        differs="keys and values stream by together under the ordinary online softmax, where the paper's code sweeps "
        "twice and writes all scores in between; floating point instead of 32 bits of fixed point (its approximations "
        "are in core/approximate.py); the paper has no masks: hidden keys are loaded as all others and their scores "
        "dropped; more units than rows or keys are left idle, which the paper's code forbids; a step is one token of "
        "one KV head, the paper's all heads of a token; PyTorch takes many steps and passes in one product",
        use="to plan hardware whose units share one narrow channel to memory",
        misleads="what it saves is the width of the channel; on a CPU or GPU it is no faster, and under a causal mask "
        "half of what it loads is for nobody",
        claims=("edge_approximations",),
    )
    test_params: ClassVar = ({}, {"units": 1}, {"units": 16})

    def refuses(self, view: View) -> str:
        return tiled.refuses(view)

    def run(
        self, view: View
    ) -> tuple[Float[Tensor, "batch heads query value_dim"], Float[Tensor, "batch heads query"]]:
        units = working(self.units, view.queries, view.keys)

        # the leaves are arguments: `checkpoint` then recomputes from them and keeps no scores
        def some(index: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
            return attended(view, index, units)

        parts = []
        for index in torch.arange(view.queries, device=view.q.device).split(at_once(view)):
            if view.needs_grad:
                parts.append(checkpoint(some, index, view.q, view.k, view.v, use_reentrant=False))
            else:
                parts.append(some(index))
        out, lse = (torch.cat(part, 2) for part in zip(*parts, strict=True))
        return out.to(view.q.dtype), lse

    def traffic(self, shape: Shape, fast: int) -> Traffic:
        """What moves for a call of this shape.

        A fast memory too small for all units holds as many as fit, and never less than one.
        """
        values = shape.dim if shape.value_dim is None else shape.value_dim
        # a unit holds a query of each head that shares the keys, its output, its largest score and its mass
        held = shape.heads // shape.kv_heads * (shape.dim + values + 2)
        fits = max(1, (fast - shape.dim - values) // held)
        steps = length(shape.queries, shape.keys, working(min(self.units, fits), shape.queries, shape.keys))
        loaded = {
            "queries": shape.batch * shape.heads * shape.queries * shape.dim,
            "keys": shape.batch * shape.kv_heads * steps * shape.dim,
            "values": shape.batch * shape.kv_heads * steps * values,
        }
        return Traffic(sum(loaded.values()), shape.outputs(), loaded | {"outputs": shape.outputs()})

    def loads(self, queries: int, keys: int) -> Int[Tensor, " steps"]:
        """Vectors that each step loads: a key and its value, and a query where a row begins."""
        units = working(self.units, queries, keys)
        row = torch.arange(queries)
        begins = row // units * keys + row % units
        return 2 + torch.bincount(begins, minlength=length(queries, keys, units))

    def naive(self, queries: int, keys: int) -> Int[Tensor, " steps"]:
        """The same with all units side by side along the keys of one row, as the paper's form without reordering."""
        found = 2 * torch.tensor([len(part) for part in torch.arange(keys).split(self.units)])
        found[0] += 1
        return found.repeat(queries)


def working(units: int, queries: int, keys: int) -> int:
    """Units that are put to work: a second query in one step would be needed for more than there are keys."""
    return max(1, min(units, queries, keys))


def length(queries: int, keys: int, units: int) -> int:
    """Steps until the last row is done."""
    last = queries - 1
    return last // units * keys + last % units + keys


def stream(
    keys: int, units: int, steps: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[Int[Tensor, " steps"], Bool[Tensor, "units steps"]]]:
    """The steps in which the rows of one pass are computed, some at a time.

    Args:
        keys: Keys that each row meets.
        units: Rows of the pass.
        steps: Steps at a time.
        device: Where the tensors are.

    Yields:
        The key of each step, and which units take it: those that have begun, and not met it before.
    """
    unit = torch.arange(units, device=device)[:, None]
    for step in torch.arange(keys + units - 1, device=device).split(steps):
        yield step % keys, (step >= unit) & (step < unit + keys)


def at_once(view: View) -> int:
    """Rows that make few scores at a time; for gradients all their scores exist at once."""
    wide = view.keys if view.needs_grad else STEPS
    rows = STEP_BYTES // (4 * view.batch * view.heads * max(1, wide))
    return max(1, rows)


def attended(
    view: View, index: Int[Tensor, " rows"], units: int
) -> tuple[Float[Tensor, "batch heads rows value_dim"], Float[Tensor, "batch heads rows"]]:
    """Outputs and log-sum-exps of some rows, of one pass or of many, in the precision of the scores."""
    kind, split = tiled.working(view.q), (view.kv_heads, view.grouped)
    low, high = (t[:, index, None] for t in (view.mask.low, view.mask.high))
    sees = (high > low)[:, None, None]
    q = torch.where(sees, view.q[:, :, index].to(kind).unflatten(1, split), 0.0)
    if view.sinks is None:
        peak = q.new_full((*q.shape[:4], 1), torch.finfo(kind).min)
        mass = torch.zeros_like(peak)
    else:
        sink = view.sinks.to(kind).reshape(*split, 1, 1)
        peak, mass = (t.expand(*q.shape[:4], 1) for t in (sink.detach(), torch.exp(sink - sink.detach())))
    mixed = q.new_zeros(*q.shape[:4], view.v.shape[3])
    for key, takes in stream(view.keys, units, STEPS, q.device):
        allowed = takes[index % units] & (key >= low) & (key < high)
        if not allowed.any():
            continue
        # what none of these rows may see is zero, whatever stands there: 0 x NaN is NaN
        used = allowed.any(1)[:, None, :, None]
        k, v = (torch.where(used, x[:, :, key].to(kind), 0.0) for x in (view.k, view.v))
        s = (view.scale * q.flatten(2, 3) @ k.transpose(2, 3)).unflatten(2, (view.grouped, -1))
        s = s if view.softcap is None else view.softcap * torch.tanh(s / view.softcap)
        s = torch.where(allowed[:, None, None], s, -torch.inf)
        higher = torch.maximum(peak, s.detach().amax(-1, keepdim=True))
        fade, e = torch.exp(peak - higher), torch.exp(s - higher)
        mass = fade * mass + e.sum(-1, keepdim=True)
        mixed = fade * mixed + (e.flatten(2, 3) @ v).unflatten(2, (view.grouped, -1))
        peak = higher
    mass = torch.where(sees, mass, 1.0)
    lse = torch.where(sees, peak + torch.log(mass), -torch.inf)
    return (mixed / mass).flatten(1, 2), lse.flatten(1, 2)[..., 0]
