"""What layers with delta writes share: short convolutions, unit keys and queries, strengths, a norm at the end."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.convolve import ShortConvolution
from foveate.core.mixer import State
from foveate.core.params import bounded
from foveate.core.recurrence import Heads, Recurrence
from foveate.core.rule import Sizes
from foveate.core.states import Form, Scan, exact, run

__all__ = ["DeltaWrites", "Written", "unit"]

NAMES = ("q", "k", "v")


class Written(nn.Module):
    """Parameters of delta writes in one layer.

    Args:
        convolution: Taps of the convolutions; 0: there are none.
        sizes: Sizes of the layer.
    """

    def __init__(self, convolution: int, sizes: Sizes) -> None:
        super().__init__()
        widths = (sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim, sizes.kv_heads * sizes.value_dim)
        self.convolutions = nn.ModuleDict()
        for name, width in zip(NAMES, widths, strict=True) if convolution else ():
            made = ShortConvolution(width, convolution)
            with torch.no_grad():
                # each token as it is
                made.weight.zero_()[:, -1] = 1.0
            self.convolutions[name] = made
        self.strength = nn.Linear(sizes.width, sizes.kv_heads, bias=False)
        self.norm = nn.Parameter(torch.ones(sizes.value_dim))


@dataclass(frozen=True)
class DeltaWrites(Recurrence):
    """Delta writes of unit keys, with learned strengths."""

    convolution: int = bounded(4, 0, 16, grid=(0, 4))
    max_strength: float = bounded(1.0, 0.0, 2.0, grid=(1.0, 2.0))

    full: ClassVar[bool] = False

    def queries(self, heads: Heads) -> Float[Tensor, "batch heads time key"]:
        return unit(nn.functional.silu(heads.q)) * heads.scale

    def keys(self, heads: Heads) -> Float[Tensor, "batch kv_heads time key"]:
        return unit(nn.functional.silu(heads.k))

    def values(self, heads: Heads) -> Float[Tensor, "batch kv_heads time value_dim"]:
        return nn.functional.silu(heads.v)

    def strength(self, heads: Heads) -> Float[Tensor, "batch kv_heads time"]:
        assert isinstance(heads.learned, Written)
        x = heads.tokens.x
        return self.max_strength * heads.learned.strength(x).to(exact(x)).sigmoid().transpose(1, 2)

    def finish(
        self, heads: Heads, out: Float[Tensor, "batch heads time value_dim"]
    ) -> Float[Tensor, "batch heads time value_dim"]:
        assert isinstance(heads.learned, Written)
        out = out.to(exact(out))
        return out * (out.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * heads.learned.norm.to(out.dtype)

    def scan(self, heads: Heads, first: bool = True) -> Scan:
        return super().scan(convolved(heads, {})[0], first)

    def flow(
        self, heads: Heads, state: State | None, form: Form = "auto"
    ) -> tuple[Float[Tensor, "batch heads time value_dim"], State]:
        heads, after = convolved(heads, state or {})
        out, left = run(super().scan(heads, not state), state["state"] if state else None, form)
        return self.finish(heads, out), {"state": left} | after


def convolved(heads: Heads, before: State) -> tuple[Heads, State]:
    """Queries, keys and values after their convolutions, and the last inputs of these by name."""
    assert isinstance(heads.learned, Written)
    tokens, after = heads.tokens, dict[str, Tensor]()
    given = dict(zip(NAMES, (heads.q, heads.k, heads.v), strict=True))
    for name, convolution in heads.learned.convolutions.items():
        flat = given[name].transpose(1, 2).flatten(2)
        out, after[name] = convolution(flat, tokens.real, before.get(name), tokens.opens)
        given[name] = out.unflatten(2, (given[name].shape[1], -1)).transpose(1, 2)
    return replace(heads, q=given["q"], k=given["k"], v=given["v"]), after


def unit(x: Float[Tensor, "batch heads time dim"]) -> Float[Tensor, "batch heads time dim"]:
    """At length 1, in float32 or finer; what is 0 stays 0."""
    x = x.to(exact(x))
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
