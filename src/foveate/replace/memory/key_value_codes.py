r"""Discrete key-value codes: a token fetches the value codes whose keys are nearest to it, and nothing else.

    z_c = x R_c,    n_c = argmin_j |z_c - k_cj|^2,    out = mean_c v_{c, n_c}

R is random and fixed. Keys follow the tokens without gradients, by moving averages over those that chose them:

    size_cj <- g size_cj + (1 - g) |{z : n_c = j}|,    sum_cj <- g sum_cj + (1 - g) sum_{z : n_c = j} z,
    k_cj = sum_cj / size'_cj,    size' = (size + eps) / (S + J eps) S,    S = sum_j size_j

and then stand still; gradients reach the values that were fetched, and no others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.card import Card, Needs
from foveate.core.mixer import Mixer, Tokens
from foveate.core.params import bounded
from foveate.core.rule import Sizes

__all__ = ["Codes", "KeyValueCodes"]

# Laplace smoothing of the sizes
EPSILON = 1e-5


@dataclass(frozen=True)
class KeyValueCodes(Mixer):
    r"""A bottleneck of discrete codes in the place of attention: each token is looked up by itself.

    out = mean_c v_{c, n_c},    n_c = argmin_j |x R_c - k_cj|^2

    A token's gradient changes only the values that it fetched, so what other tokens have learned stays. No token reads
    another one, and none reaches the layers before: the choice of a code has no gradient.

    Departures: in the paper keys are made ready first, with values at rest, on the output of a frozen encoder; here
    they move in the first `steps` calls in training, values learning beside them. A key that is taken out takes its
    moving averages with it, as in later codebooks. At test time all pairs can be fetched, not only those that were in
    training. The values are as wide as the layer, and the paper's 256 codebooks of 4,096 pairs are not the default.

    Example:
        A token's output is made of what its codes have learned, nothing at first.

        >>> import torch, foveate
        >>> from foveate.replace import KeyValueCodes
        >>> rule = KeyValueCodes(codebooks=4, pairs=32)
        >>> layer = foveate.nn.Attention(16, heads=2, rule=rule)
        >>> out = layer(torch.randn(2, 5, 16))
        >>> out.shape, bool((out == 0).all())
        (torch.Size([2, 5, 16]), True)

    Args:
        codebooks: Codebooks, each with a projection of its own.
        pairs: Keys and values of a codebook.
        key_dim: Width of a key.
        decay: g, the share of the past in the moving averages.
        steps: Calls in training in which the keys move; later they stand still.
        expire: A key goes, for one of the tokens at hand, when its size falls below this share of an even one.
    """

    codebooks: int = bounded(16, 1, 1024, grid=(8, 16, 64))
    pairs: int = bounded(256, 2, 1 << 16, grid=(64, 256, 1024))
    key_dim: int = bounded(14, 1, 256, grid=(8, 14))
    decay: float = bounded(0.95, 0.0, 0.9999)
    steps: int = bounded(1000, 0, 1 << 30)
    expire: float = bounded(0.1, 0.001, 1.0)

    card: ClassVar[Card] = Card(
        title="Discrete Key-Value Bottleneck",
        year=2023,
        family="memory",
        needs=Needs.TRAINING,
        equation="out = mean_c v_{c, n_c}, n_c = argmin_j |x R_c - k_cj|^2; keys by moving averages",
        differs="Keys move in the first `steps` calls in training while values learn; the paper makes them ready "
        "before. A key that is taken out takes its averages with it. Pairs never fetched in training stay in play. "
        "Values are as wide as the layer (the paper: as the classes); 16 codebooks of 256 pairs, not 256 of 4,096. "
        "Distances are in float32 whatever the dtype.",
        use="Learn a stream of tasks on frozen features without forgetting the earlier ones.",
        misleads="No token reads another and the input gets no gradient: in the middle of a model it looks things up, "
        "and does not replace what attention carries between tokens.",
        claims=("key_value_codes",),
    )
    test_params: ClassVar[tuple[dict[str, Any], ...]] = (
        {"codebooks": 3, "pairs": 8, "key_dim": 4},
        {"codebooks": 1, "pairs": 2, "key_dim": 1, "steps": 0},
        {},
    )
    known_failures: ClassVar[dict[str, str]] = {
        "trains": "the choice of a code has no gradient, so the input gets none; the paper asks for just that",
    }

    def module(self, sizes: Sizes) -> Codes:
        return Codes(self, sizes.width, sizes.width)


class Codes(torch.nn.Module):
    """The codebooks, and the values that they lead to.

    Args:
        options: Their sizes and how the keys move.
        width: Width of the input.
        value_dim: Width of a value, and so of the output.
    """

    projection: Tensor
    keys: Tensor
    size: Tensor
    total: Tensor
    calls: Tensor

    def __init__(self, options: KeyValueCodes, width: int, value_dim: int) -> None:
        super().__init__()
        self.options = options
        books, pairs = options.codebooks, options.pairs
        self.values = torch.nn.Parameter(torch.zeros(books, pairs, value_dim))
        projection = torch.nn.functional.normalize(torch.randn(books, width, options.key_dim), dim=1)
        self.register_buffer("projection", projection)
        self.register_buffer("keys", torch.randn(books, pairs, options.key_dim))
        self.register_buffer("size", torch.zeros(books, pairs))
        self.register_buffer("total", self.keys.clone())
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(
        self, tokens: Tokens, state: dict[str, Tensor] | None
    ) -> tuple[Float[Tensor, "batch query value_dim"], dict[str, Tensor] | None]:
        """The mean of the values that each token fetches. Nothing is kept between calls."""
        z, fetched = self.fetched(tokens.x.flatten(0, 1))
        if tokens.training and int(self.calls) < self.options.steps:
            real = tokens.real.flatten()
            self.move(z[:, real], fetched[:, real])
        return self.read(fetched).unflatten(0, tokens.x.shape[:2]), state

    def fetched(
        self, x: Float[Tensor, "tokens width"]
    ) -> tuple[Float[Tensor, "books tokens key_dim"], Int[Tensor, "books tokens"]]:
        """z, and the number of the nearest key in each codebook."""
        # half precision would let rounding choose between near keys
        z, keys = x.detach().float() @ self.projection.float(), self.keys.float()
        away = (keys**2).sum(-1)[:, None] - 2 * z @ keys.transpose(-1, -2)
        return z, away.argmin(-1)

    def read(self, fetched: Int[Tensor, "books tokens"]) -> Float[Tensor, "tokens value_dim"]:
        """The mean over the codebooks of the fetched values."""
        books, pairs = self.values.shape[:2]
        rows = fetched + pairs * torch.arange(books, device=fetched.device)[:, None]
        return torch.nn.functional.embedding_bag(rows.T, self.values.flatten(0, 1), mode="mean")

    @torch.no_grad()
    def move(self, z: Float[Tensor, "books tokens key_dim"], fetched: Int[Tensor, "books tokens"]) -> None:
        """Moves the keys towards the tokens that fetched them; one that hardly any token fetches becomes a token's."""
        tokens, g, pairs = z.shape[1], self.options.decay, self.options.pairs
        self.calls += 1
        if not tokens:
            return
        count = torch.zeros_like(self.size, dtype=z.dtype).scatter_add(1, fetched, torch.ones_like(z[..., 0]))
        added = torch.zeros_like(self.total, dtype=z.dtype).scatter_add(1, fetched[..., None].expand_as(z), z)
        size = g * self.size.float() + (1 - g) * count
        total = g * self.total.float() + (1 - g) * added
        whole = size.sum(-1, keepdim=True)
        keys = total / ((size + EPSILON) / (whole + pairs * EPSILON) * whole)[..., None]
        least = self.options.expire * tokens / pairs
        dead = size < least
        drawn = torch.randint(tokens, dead.shape, device=z.device)
        taken = z.gather(1, drawn[..., None].expand(-1, -1, z.shape[2]))
        self.keys.copy_(torch.where(dead[..., None], taken, keys))
        self.total.copy_(torch.where(dead[..., None], taken * least, total))
        self.size.copy_(torch.where(dead, least, size))
