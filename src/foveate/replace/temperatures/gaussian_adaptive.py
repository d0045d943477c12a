r"""Gaussian adaptive attention: each feature weighted by a Gaussian about the mean that the text has had so far."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core.card import Card, Needs
from foveate.core.errors import BadInput
from foveate.core.mixer import Mixer, State, Tokens
from foveate.core.params import bounded, choice
from foveate.core.rule import Sizes

__all__ = ["GaussianAdaptive"]

EPSILON = 1e-5


@dataclass(frozen=True)
class GaussianAdaptive(Mixer):
    r"""Features weighted by how near they are to a learned offset from their mean: no queries, no keys.

    out = x * g,    g = exp(-y^2 / 2c),    y = (x - mean - offset) / sqrt(var + 1e-5)

    Mean and variance are those of each channel over the tokens of the text, or of each token over the channels of a
    head. A causal text has running ones, over the tokens up to each, and so a state of three numbers per channel.

    Example:
        Which features matter, from 0 to 1.

        >>> import torch, foveate
        >>> from foveate.replace import GaussianAdaptive
        >>> rule = GaussianAdaptive()
        >>> attention = foveate.nn.Attention(8, heads=2, rule=rule)
        >>> x = torch.randn(2, 5, 8)
        >>> attention(x).shape, attention.rule.learned.importance(x).shape
        (torch.Size([2, 5, 8]), torch.Size([8]))

    Args:
        axis: What mean and variance are taken over: the tokens of each channel, or the features of each token and head.
        spread: c where training begins.
    """

    axis: str = choice("tokens", "tokens", "features")
    spread: float = bounded(2.0, 0.01, 1000.0)

    card: ClassVar[Card] = Card(
        title=(
            "Gaussian Adaptive Attention is All You Need: Robust Contextual Representations Across Multiple Modalities"
        ),
        year=2024,
        family="temperatures",
        needs=Needs.VALUES,
        equation="out = x exp(-y^2 / 2c), y = (x - mean - offset) / sqrt(var + 1e-5)",
        differs=(
            "causal texts have the moments of the tokens so far, where the paper takes those of the whole; c is kept "
            "as its logarithm, so above 0; not the later product of Gaussians divided by its sum, which no running "
            "state can hold; padding does not count, in its code it counts as zeros"
        ),
        use="Weigh features of a frozen model in a few thousand parameters, and see which of them matter.",
        misleads="The first token of a causal text has no variance yet, and an offset takes it out.",
    )
    test_params: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"axis": "features"})

    def module(self, sizes: Sizes) -> torch.nn.Module:
        if self.axis == "features" and sizes.width % sizes.heads:
            raise BadInput(f"a width of {sizes.width} is no multiple of {sizes.heads} heads; take axis='tokens'")
        return Density(sizes, self)


class Density(torch.nn.Module):
    """The Gaussians of one layer: an offset and a spread per channel."""

    def __init__(self, sizes: Sizes, mixer: GaussianAdaptive) -> None:
        super().__init__()
        self.heads, self.axis = sizes.heads, mixer.axis
        self.offset = torch.nn.Parameter(torch.zeros(sizes.width))
        self.log_spread = torch.nn.Parameter(torch.full((sizes.width,), math.log(mixer.spread)))

    def forward(self, tokens: Tokens, state: State | None) -> tuple[Float[Tensor, "batch query width"], State]:
        """The weighted features, and the moments so far."""
        g, state = self.weights(tokens, state)
        return tokens.x.to(g.dtype) * g, state

    def weights(self, tokens: Tokens, state: State | None) -> tuple[Float[Tensor, "batch query width"], State]:
        """The weight of each feature of each token, from 0 to 1, and the moments so far."""
        wide = torch.promote_types(tokens.x.dtype, torch.float32)
        x = tokens.x.to(wide)
        if self.axis == "features":
            sliced = x.unflatten(-1, (self.heads, -1))
            var, mean = torch.var_mean(sliced, -1, correction=0, keepdim=True)
            near, var, state = (sliced - mean).flatten(-2), var.expand_as(sliced).flatten(-2), {}
        else:
            near, var, state = running(x, tokens.real, tokens.causal, state)
        y = (near - self.offset.to(wide)) / torch.sqrt(var + EPSILON)
        return torch.exp(-y.square() / (2 * self.log_spread.to(wide).exp())), state

    @torch.no_grad()
    def importance(
        self,
        x: Float[Tensor, "batch query width"],
        real: Bool[Tensor, "batch query"] | None = None,
        causal: bool = True,
    ) -> Float[Tensor, " width"]:
        """The importance factor of each feature: its mean weight, stretched so that the least is 0, the largest 1."""
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if real is None else real
        place = real.cumsum(-1) - 1
        g, _ = self.weights(Tokens(torch.where(real[..., None], x, 0.0), real, causal, place), None)
        mean = g[real].mean(0)
        low, high = mean.aminmax()
        return (mean - low) / (high - low).clamp_min(torch.finfo(mean.dtype).tiny)


def running(
    x: Float[Tensor, "batch query width"], real: Bool[Tensor, "batch query"], causal: bool, state: State | None
) -> tuple[Float[Tensor, "batch query width"], Float[Tensor, "batch moments width"], State]:
    """X minus the mean, the variance, and the sums behind them; of the tokens so far, or of all."""
    is_real = real[..., None].to(x.dtype)
    opening = x.gather(1, real.to(torch.uint8).argmax(-1)[:, None, None].expand(-1, 1, x.shape[2]))
    if state:
        # sums of differences to a token of the text: sums of squares alone would cancel
        shift = torch.where(state["count"] > 0, state["shift"], opening)
        sums = [state[name] for name in ("count", "total", "square")]
    else:
        shift, sums = opening, [torch.zeros_like(opening[..., :1])] + [torch.zeros_like(opening)] * 2
    d = (x - shift) * is_real
    parts = (is_real, d, d.square())
    if causal:
        count, total, square = (before + part.cumsum(1) for before, part in zip(sums, parts, strict=True))
    else:
        count, total, square = (before + part.sum(1, keepdim=True) for before, part in zip(sums, parts, strict=True))
    mean = total / count.clamp_min(1)
    var = (square / count.clamp_min(1) - mean.square()).clamp_min(0)
    # slices would keep the whole text
    last = {n: t[:, -1:].clone() for n, t in (("count", count), ("total", total), ("square", square))}
    return x - shift - mean, var, {"shift": shift} | last
