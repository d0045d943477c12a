r"""Entropy-guided attention: a temperature per head and row, held to an entropy by a loss, and the block around it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core.card import Card, Needs
from foveate.core.params import bounded
from foveate.core.reductions import Reduction, RowEntropy
from foveate.core.rows import Rows, View
from foveate.core.rule import Rule, Sizes
from foveate.nn import Attention

__all__ = ["EntropyGuided", "EntropyGuidedBlock"]


@dataclass(frozen=True)
class EntropyGuided(Rule):
    r"""A learned temperature for each head and place, and in training a loss on entropies that are out of bounds.

    s_ij = scale q_i . k_j / t_hi

    loss = weight mean_h d_h^2 [ |d_h| > tolerance ln T ],    d_h = mean_i H_hi - threshold_h ln T

    with the entropies H_hi of the rows of one text of T tokens; the mean is also over the texts of the batch.

    Example:
        The loss comes from `foveate.nn.auxiliary_loss`.

        >>> import torch, foveate
        >>> from foveate.replace import EntropyGuided
        >>> rule = EntropyGuided(threshold=0.1, weight=1.0)
        >>> attention = foveate.nn.Attention(32, heads=4, rule=rule)
        >>> _ = attention(torch.randn(2, 9, 32))
        >>> bool(foveate.nn.auxiliary_loss(attention) > 0)
        True

    Args:
        positions: Places that have a temperature of their own; later ones take the last.
        temperature: t where training begins.
        threshold: Share of the largest entropy that a head is held to, where training begins.
        tolerance: How far off it may be, as a share of the largest entropy.
        weight: Factor on the loss of one layer.
    """

    positions: int = bounded(1024, 1, 1 << 20)
    temperature: float = bounded(1.0, 1e-3, 100.0)
    threshold: float = bounded(0.5, 0.0, 1.0)
    tolerance: float = bounded(0.2, 0.0, 1.0)
    weight: float = bounded(1e-5, 0.0, 10.0)

    card: ClassVar[Card] = Card(
        title="Entropy-Guided Attention for Private LLMs",
        year=2025,
        family="temperatures",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES | Needs.TRAINING,
        equation="s_ij = scale q_i . k_j / t_hi; loss = weight mean_h d_h^2 [|d_h| > tolerance ln T]",
        differs=(
            "t is kept as its logarithm, so above 0, and starts at 1, as a loaded model is (the paper: 0.01 and 0.1, "
            "in models without norms); losses of layers are summed, not averaged; the start of the thresholds is not "
            "published; T counts real tokens; the loss is as in its algorithm 1, its code sums over rows"
        ),
        use="Train small models with few nonlinearities, whose heads would look at everything or at one token.",
        misleads="The thresholds learn from the loss alone: without `auxiliary_loss` in the sum nothing holds a head.",
    )
    identity: ClassVar[dict[str, Any] | None] = {"temperature": 1.0}
    test_params: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"positions": 8, "temperature": 0.3})
    known_failures: ClassVar[dict[str, str]] = {
        "trains": "the thresholds act on the loss in training and have no influence on the output"
    }

    def learned(self, sizes: Sizes) -> torch.nn.Module:
        return Temperatures(sizes.heads, self)

    def prepare(self, view: View) -> View:
        wide = torch.promote_types(view.q.dtype, torch.float32)
        place = view.mask.place.clamp(0, self.positions - 1)
        t = view.learned.log_temperature.to(wide).exp()[:, place].movedim(0, 1)
        return view.but(q=(view.q / t[..., None]).to(view.q.dtype))

    def needs(self) -> tuple[Reduction, ...]:
        return (RowEntropy(),)

    def loss(self, rows: Rows) -> Float[Tensor, ""]:
        entropy, threshold = rows[RowEntropy()], rows.view.learned.threshold
        real = rows.view.mask.rows.expand(len(entropy), -1)[:, None]
        length = real.sum(-1).clamp_min(1).to(entropy.dtype)
        largest = length.log()
        mean = torch.where(real, entropy, 0.0).sum(-1) / length
        d = mean - threshold.to(mean.dtype) * largest
        return self.weight * (d.square() * (d.abs() > self.tolerance * largest)).mean()


class Temperatures(torch.nn.Module):
    """The logarithms of t, [heads, positions], and the thresholds, [heads], of one layer."""

    def __init__(self, heads: int, rule: EntropyGuided) -> None:
        super().__init__()
        self.log_temperature = torch.nn.Parameter(torch.full((heads, rule.positions), math.log(rule.temperature)))
        self.threshold = torch.nn.Parameter(torch.full((heads,), rule.threshold))


class EntropyGuidedBlock(torch.nn.Module):
    r"""A transformer block whose only nonlinearity is the softmax: no norms, no activations.

    y = x + attention(x),    out = beta y + W y / alpha

    The feed-forward part is one matrix of dim x dim, which is what its two are without an activation between them.
    Alpha and beta are learned numbers, both 1 where training begins; all matrices begin normal with deviation 0.02.

    Args:
        dim: Width of the input and of the output.
        heads: Query heads.
        kv_heads: Key-value heads; None: as many as query heads.
        rule: The attention; the temperatures of the paper begin at 0.01.
        rope: Base of the rotary positions; None: no positions.
        layer: Number of the layer, which is its place in a cache.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        rule: Rule | None = None,
        *,
        rope: float | None = None,
        layer: int = 0,
    ) -> None:
        super().__init__()
        rule = EntropyGuided(temperature=0.01) if rule is None else rule
        self.attention = Attention(dim, heads, kv_heads, rule, rope, layer=layer)
        self.feed_forward = torch.nn.Linear(dim, dim, bias=False)
        self.alpha = torch.nn.Parameter(torch.ones(()))
        self.beta = torch.nn.Parameter(torch.ones(()))
        for module in self.modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=0.02)

    def forward(
        self, x: Float[Tensor, "batch query dim"], *, mask: Bool[Tensor, "batch key"] | None = None, cache: Any = None
    ) -> Float[Tensor, "batch query dim"]:
        """The output for each token; `mask` and `cache` as of `foveate.nn.Attention`."""
        y = x + self.attention(x, mask=mask, cache=cache)
        return self.beta * y + self.feed_forward(y) / self.alpha
