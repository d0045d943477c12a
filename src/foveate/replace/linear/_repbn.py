r"""PRepBN: a LayerNorm that turns into a BatchNorm with a shortcut while it trains, and is no more than a scale then.

    RepBN(x) = BN(x) + eta x
    y = l LN(x) + (1 - l) RepBN(x),    l = 1 in the first W calls, then (T - t) / T in call t behind them, 0 from T on

In evaluation y = RepBN(x) whatever l is: scale x + shift, which a linear layer on either side can take in.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from foveate.core.states import exact

__all__ = ["PRepBN"]

EPS = 1e-5
MOMENTUM = 0.1


class PRepBN(nn.Module):
    """Progressive re-parameterised BatchNorm, its statistics over all tokens that are no padding.

    Differs from the authors' code: its LayerNorm has no weights, which nothing would use in the end.

    Args:
        width: Channels.
        steps: T, the calls in training in which it turns.
        warm: W, the calls in training before.
    """

    running_mean: Tensor
    running_var: Tensor
    calls: Tensor

    def __init__(self, width: int, steps: int = 300_000, warm: int = 0) -> None:
        super().__init__()
        self.steps, self.warm = steps, warm
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.eta = nn.Parameter(torch.ones(()))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    @property
    def share(self) -> float:
        """The share l of LayerNorm in the next call in training."""
        return min(1.0, max(0.0, 1 - (int(self.calls) - self.warm) / self.steps))

    def forward(
        self, x: Float[Tensor, "batch time width"], real: Bool[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time width"]:
        """The normed tokens; what stands at padding is normed as the others, and counts for nothing."""
        wide = exact(x)
        scale, shift = self.affine(wide)
        if not self.training:
            return (x.to(wide) * scale + shift).to(x.dtype)
        rows = x[real].to(wide)
        # one token has no variance: it is normed by those before
        if len(rows) > 1:
            var, mean = torch.var_mean(rows, 0, correction=0)
            self.remember(mean.detach(), var.detach() * len(rows) / (len(rows) - 1))
            scale, shift = self.affine(wide, mean, var)
        share = self.share
        self.calls += 1
        y = share * layer_norm(x.to(wide), x.shape[-1:], eps=EPS) + (1 - share) * (x.to(wide) * scale + shift)
        return y.to(x.dtype)

    @torch.no_grad()
    def remember(self, mean: Float[Tensor, " width"], var: Float[Tensor, " width"]) -> None:
        """Moves the statistics towards those of one call."""
        for held, new in ((self.running_mean, mean), (self.running_var, var)):
            held.lerp_(new.to(held), MOMENTUM)

    def affine(
        self, dtype: torch.dtype, mean: Tensor | None = None, var: Tensor | None = None
    ) -> tuple[Float[Tensor, " width"], Float[Tensor, " width"]]:
        """RepBN as scale and shift, by these statistics or by those that it has seen."""
        mean = (self.running_mean if mean is None else mean).to(dtype)
        var = (self.running_var if var is None else var).to(dtype)
        by = self.weight.to(dtype) * (var + EPS).rsqrt()
        return by + self.eta.to(dtype), self.bias.to(dtype) - mean * by

    @torch.no_grad()
    def before(self, linear: nn.Linear) -> nn.Linear:
        """One linear layer for this norm, as it is in evaluation, and the linear layer that reads it."""
        scale, shift = self.affine(linear.weight.dtype)
        added = linear.weight @ shift
        return folded(linear.weight * scale, added if linear.bias is None else linear.bias + added)

    @torch.no_grad()
    def behind(self, linear: nn.Linear) -> nn.Linear:
        """One linear layer for a linear layer and this norm, as it is in evaluation, of its output."""
        scale, shift = self.affine(linear.weight.dtype)
        return folded(linear.weight * scale[:, None], shift if linear.bias is None else linear.bias * scale + shift)


def folded(weight: Float[Tensor, "out width"], bias: Float[Tensor, " out"]) -> nn.Linear:
    """A linear layer with these weights."""
    made = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    made.weight.copy_(weight)
    made.bias.copy_(bias)
    return made
