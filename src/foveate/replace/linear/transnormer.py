r"""TransNormerLLM: linear attention whose heads forget at rates of their own, normalised and gated over all heads.

    S_t = a S_{t-1} + f(silu k_t, t) v_t^T,    O_t = concat_h f(silu q_t, t)^T S_t
    out_t = W_o (W_u x_t * O_t / sqrt(mean(O_t^2) + 1e-6))
    a = exp(-s_h (1 - l / (L - 1) + 1e-5)),    s_h = 2^(-8 h / H) for h = 1 .. H, in layer l = 0 .. L - 1

f are linearised relative positions (`_lrpe.py`) in the first layers, and nothing in the others. Lightning Attention and
Lightning Attention-2 compute the same in blocks, the products of tokens within a block beside those with a state from
block to block: the chunked form of the states engine, which every recurrence here goes through.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

from foveate.core.card import Card, Needs
from foveate.core.errors import BadInput
from foveate.core.params import bounded
from foveate.core.recurrence import Heads, Recurrence
from foveate.core.rule import Sizes
from foveate.core.states import exact
from foveate.replace.linear._lrpe import first_theta, placed, turned

__all__ = ["Transnormer"]

EPS = 1e-6
# keeps the last layer from remembering everything
LAST = 1e-5


@dataclass(frozen=True)
class Transnormer(Recurrence):
    """Decays by head and layer, linearised relative positions, a norm over all heads, and a gate.

    Where no token sees a later one, weights decay with the distance to the past; where all see all, to both sides.

    Example:
        The first layer forgets, the last one hardly does.

        >>> import foveate
        >>> from foveate.replace import Transnormer
        >>> rule = Transnormer(layers=24)
        >>> for n in (0, 12, 23):
        ...     layer = foveate.nn.Attention(64, heads=8, rule=rule, layer=n)
        ...     print(round(float(rule.rates(layer.sizes)[0].neg().exp()), 3))
        0.607
        0.787
        1.0

    Args:
        layers: L, the attention layers of the model.
        lrpe: How many of the first layers have relative positions; the others know places by their decays alone.
    """

    layers: int = bounded(32, 1, 1024)
    lrpe: int = bounded(1, 0, 1024)

    card: ClassVar[Card] = Card(
        title="Scaling TransNormer to 175 Billion Parameters",
        year=2023,
        family="linear",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES | Needs.TRAINING,
        equation="O_t = f(silu q_t)^T S_t, S_t = a S_{t-1} + f(silu k_t) v_t^T; out = W_o (W_u x * SRMSNorm(O))",
        differs="Equations and constants are those of the released model code. The norm before the layer and the gated "
        "feed-forward part belong to the model. Rotary positions of a loaded model stand before silu and are not "
        "relative any more: make new layers without rope. Where key-value heads are shared, each query head still has "
        "its own decay, and so its own state. The form in which all see all is ours.",
        use="Train a decoder whose memory is constant, with decays spread over heads and layers.",
        misleads="The weights of a loaded model mean nothing under it before training; its last layers hardly forget, "
        "and nothing divides by the sum of the weights, so only the norm keeps outputs in range.",
        claims=("constant_speed",),
    )
    test_params: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"layers": 2, "lrpe": 0}, {"layers": 5, "lrpe": 5})

    def learned(self, sizes: Sizes) -> nn.Module:
        if sizes.layer >= self.layers:
            raise BadInput(
                f"layer {sizes.layer} of a model with {self.layers} layers: decays go by the layer, so give "
                f"Transnormer(layers={sizes.layer + 1}) or as many as the model has"
            )
        return Gate(sizes, sizes.layer < self.lrpe)

    def rates(self, sizes: Sizes) -> Float[Tensor, " heads"]:
        """-log a of each head in a layer."""
        share = 1 - sizes.layer / max(1, self.layers - 1) + LAST
        return torch.tensor(slopes(sizes.heads), dtype=torch.float64) * share

    def queries(self, heads: Heads) -> Float[Tensor, "batch heads time key"]:
        return positioned(silu(heads.q), heads)

    def keys(self, heads: Heads) -> Float[Tensor, "batch heads time key"]:
        return positioned(heads.every_head(silu(heads.k)), heads)

    def values(self, heads: Heads) -> Float[Tensor, "batch heads time value_dim"]:
        return heads.every_head(heads.v)

    def decay(self, heads: Heads) -> Float[Tensor, "1 heads 1 1"]:
        return -self.rates(heads.sizes).to(heads.q.device, exact(heads.q)).view(1, -1, 1, 1)

    def finish(
        self, heads: Heads, out: Float[Tensor, "batch heads time value_dim"]
    ) -> Float[Tensor, "batch heads time value_dim"]:
        own: Any = heads.learned
        out = out.to(exact(out))
        normed = out * (out.square().mean((1, 3), keepdim=True) + EPS).rsqrt()
        return normed * own.gate(heads.tokens.x).unflatten(-1, (out.shape[1], -1)).transpose(1, 2)


class Gate(nn.Module):
    """W_u and the angles of one layer.

    Args:
        sizes: Sizes of the layer.
        lrpe: Whether it has relative positions.
    """

    def __init__(self, sizes: Sizes, lrpe: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(sizes.width, sizes.heads * sizes.value_dim, bias=False)
        theta = nn.Parameter(first_theta(sizes.heads, sizes.head_dim)) if lrpe else None
        self.register_parameter("theta", theta)


def positioned(x: Float[Tensor, "batch heads time dim"], heads: Heads) -> Float[Tensor, "batch heads time key"]:
    """f(x, n), or x in a layer without positions."""
    own: Any = heads.learned
    if own.theta is None:
        return x
    wide = exact(x)
    return turned(x.to(wide), placed(heads.tokens)[:, None, :, None] * own.theta.to(wide)[:, None])


def slopes(heads: int) -> list[float]:
    """The rates s_h of ALiBi; where H is no power of 2, those of the one below and every second of the one above."""
    power = 1 << (heads.bit_length() - 1)
    above = [2 ** (-8 * h / (2 * power)) for h in range(1, 2 * power + 1, 2)]
    return [2 ** (-8 * h / power) for h in range(1, power + 1)] + above[: heads - power]
