r"""Extractors: a sum of the tokens so far, weighted by their places, and multiplied by the token at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.core.card import Card, Needs
from foveate.core.errors import BadInput
from foveate.core.mixer import Mixer, Tokens
from foveate.core.params import bounded, choice
from foveate.core.rule import Sizes
from foveate.replace._groups import State

__all__ = ["Extractor"]


@dataclass(frozen=True)
class Extractor(Mixer):
    r"""A weighted sum of the tokens so far (extraction), times a projection of the current one (adjustment).

        out_t = adjust_t * extract_t,    extract_t = t^{-1/2} \sum_{j <= t} x_j W_j,    adjust_t = x_t A

    with one W_j for each place j, from 1: a matrix in the SHE, a number per channel in the HE, one number in the WE.
    The ME is the WE without adjustment. A decoded token costs the same however long the text is: the sum is the state.

    Example:
        One number for each of 64 places, and the matrix of the adjustment.

        >>> import torch, foveate
        >>> from foveate.replace import Extractor
        >>> rule = Extractor(kind="we", max_length=64)
        >>> mixer = foveate.nn.Attention(32, heads=4, rule=rule)
        >>> mixer(torch.randn(2, 5, 32)).shape
        torch.Size([2, 5, 32])
        >>> sum(p.numel() for p in mixer.parameters())
        1088

    Args:
        kind: "she", "he", "we" or "me".
        max_length: Places that have weights; a longer text is refused. The SHE has a width x width matrix for each.
    """

    kind: str = choice("she", "she", "he", "we", "me")
    max_length: int = bounded(256, 1, 65536)

    full: ClassVar[bool] = False
    card: ClassVar[Card] = Card(
        title="Attention Is Not All You Need Anymore",
        year=2023,
        family="mixers",
        needs=Needs.TRAINING,
        equation="out_t = (x_t A) * t^(-1/2) sum_{j<=t} x_j W_j",
        differs=(
            "Only the paper's abstract was at hand. The SHE follows a public implementation, which cites the author's "
            "later improvement (arXiv 2311.12678) too: the factor t^(-1/2) may be of that one. HE, WE and ME, the "
            "abstract's 'simplified versions', are our reading: a vector or a number in the place of each matrix, no "
            "adjustment in the ME, and weights of one to begin with. There is no form in which all tokens see all."
        ),
        use="Train a small model on short texts without attention.",
        misleads="The weight of a token depends on its place alone: it cannot look anything up.",
    )
    test_params: ClassVar = (
        {"max_length": 80},
        *({"kind": kind, "max_length": 80} for kind in ("he", "we", "me")),
    )

    def module(self, sizes: Sizes) -> nn.Module:
        return Extracting(self.kind, self.max_length, sizes.width)


class Extracting(nn.Module):
    """The parameters of an extractor in one layer.

    Args:
        kind: Kind of the extractor.
        places: Places that have weights.
        width: Width of the input and of the output.
    """

    def __init__(self, kind: str, places: int, width: int) -> None:
        super().__init__()
        self.matrices = kind == "she"
        each = {"she": (width, width), "he": (width,)}.get(kind, (1,))
        weight, adjust = torch.ones(places, *each), torch.randn(width, width) * width**-0.5
        if self.matrices:
            nn.init.normal_(weight, std=width**-0.5)
        self.weight = nn.Parameter(weight)
        self.adjust = None if kind == "me" else nn.Parameter(adjust)

    def forward(self, tokens: Tokens, state: State | None) -> tuple[Float[Tensor, "batch query width"], State]:
        x = tokens.x
        last = int(tokens.place.where(tokens.real, -1).max())
        if last >= len(self.weight):
            raise BadInput(
                f"a text of {last + 1} tokens for an extractor with weights for {len(self.weight)} places; make it "
                "with a larger max_length"
            )
        # a sum over the whole text keeps few digits in half precision
        total = self.written(x, tokens.place).to(torch.promote_types(x.dtype, torch.float32)).cumsum(1)
        if state:
            total = total + state["sum"][:, None]
        extract = total * (tokens.place + 1).clamp_min(1).to(total)[..., None].rsqrt()
        out = extract if self.adjust is None else extract * (x @ self.adjust)
        # a copy: a slice would keep the sums of all tokens in memory
        return out.to(x.dtype), {"sum": total[:, -1].clone()}

    def written(
        self, x: Float[Tensor, "batch query width"], place: Int[Tensor, "batch query"]
    ) -> Float[Tensor, "batch query width"]:
        """x_j W_j for each token; zeros at padding, whose x is zero."""
        out = torch.zeros_like(x)
        starts = place[:, 0]
        # texts that begin at the same place share a product with a slice of the weights
        for start in starts.unique().tolist():
            rows, skip = (starts == start).nonzero()[:, 0], max(0, -start)
            w = self.weight[start + skip : max(0, start + x.shape[1])]
            y = x[rows, skip : skip + len(w)]
            out[rows, skip : skip + len(w)] = torch.einsum("bjd,jde->bje", y, w) if self.matrices else y * w
        return out
