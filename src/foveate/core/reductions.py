r"""What may be asked of the rows, and the dense definition of each: the vocabulary that metrics are written in.

With the scores s_ij, the log-sum-exp lse_i of a row and the weight p_ij = exp(s_ij - lse_i):

    RowEntropy()            H_i = -\sum_j p_ij ln p_ij
    Distance()              \sum_j p_ij |i - j|
    Within(w)               \sum_j p_ij [ |i - j| <= w ]
    Match(link)             \sum_j p_ij [ a_i = b_j ]        labels a on the rows, b on the keys
    OnKeys(columns)         \sum_j p_ij x_je                 columns x over the keys, the same for all heads
    KeyBins(count)          \sum_j p_ij [ j in bin e ]       the text cut into bins, wider as it gets longer
    ColumnMass()            \sum_i p_ij                      one number per key
    Sample(count)           p_i. whole, for a stated sample of rows
    Last(count)             p_i. whole, for the last rows of each text

`Match` is one idea for many questions: the labels "position" give a fixed offset, "first" the first token of the
text, "token" the same word before, "follower" the word after an earlier copy of this one (induction).

A mechanism names what it needs; the engine computes the union in one pass by whichever way is cheapest. A reduction
of one's own needs only `of_block`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core.errors import BadInput, BadParameter

if TYPE_CHECKING:
    from foveate.core.rows import RowBlock, View

__all__ = [
    "ColumnMass",
    "Distance",
    "KeyBins",
    "Last",
    "Match",
    "OnKeys",
    "Reduction",
    "RowEntropy",
    "Sample",
    "Sampled",
    "Within",
    "labels",
]


@dataclass(frozen=True)
class Reduction:
    """A number per row (`axis = "row"`, [batch, heads, rows, ...]) or per key ("column", [batch, heads, keys])."""

    axis: ClassVar[Literal["row", "column", "sample"]] = "row"

    @property
    def one_sequence(self) -> bool:
        """Whether it compares positions of rows and keys, which must then count the same sequence."""
        return False

    def rows(self, view: View) -> Int[Tensor, " sample"]:
        """For samples: which rows of the call are taken."""
        raise NotImplementedError

    def of_block(self, block: RowBlock) -> Tensor:
        """The dense definition, from the whole weights of one block of rows."""
        raise NotImplementedError


@dataclass(frozen=True)
class RowEntropy(Reduction):
    """Entropy of each row in nats; rows of a layer with learned sinks sum to less than one."""

    def of_block(self, block: RowBlock) -> Float[Tensor, "batch heads rows"]:
        p = block.weights
        # entr is infinitely steep at 0: a masked key would get a gradient of NaN
        return torch.special.entr(p.where(p > 0, 1.0)).sum(-1)


@dataclass(frozen=True)
class Distance(Reduction):
    """Mean distance in tokens between a query and what it looks at."""

    @property
    def one_sequence(self) -> bool:
        return True

    def of_block(self, block: RowBlock) -> Float[Tensor, "batch heads rows"]:
        return (block.weights * block.distance).sum(-1)


@dataclass(frozen=True)
class Within(Reduction):
    """Mass on the keys at most `width` tokens away, on either side.

    Args:
        width: Largest distance in tokens.
    """

    width: int

    def __post_init__(self) -> None:
        if self.width < 0:
            raise BadParameter(f"Within(width={self.width}): width must be 0 or more")

    @property
    def one_sequence(self) -> bool:
        return True

    def of_block(self, block: RowBlock) -> Float[Tensor, "batch heads rows"]:
        return (block.weights * (block.distance <= self.width)).sum(-1)


Link = Literal["self", "previous", "first", "token", "follower"]


@dataclass(frozen=True)
class Match(Reduction):
    """Mass on the keys whose label equals the row's.

    Args:
        link: "self" (the token itself), "previous" (the token before), "first" (the first token of the text), "token"
            (all keys that hold the same token, itself included), "follower" (keys that come right after the same
            token: induction).
    """

    link: Link

    def __post_init__(self) -> None:
        if self.link not in ("self", "previous", "first", "token", "follower"):
            raise BadParameter(f"Match(link={self.link!r}): must be self, previous, first, token or follower")

    @property
    def one_sequence(self) -> bool:
        return self.link != "first"

    def of_block(self, block: RowBlock) -> Float[Tensor, "batch heads rows"]:
        of_rows, of_keys = labels(block.view, self.link)
        same = of_rows[:, block.index, None] == of_keys[:, None, block.first : block.last]
        return (block.weights * same[:, None]).sum(-1)


def labels(view: View, link: Link) -> tuple[Int[Tensor, "#batch query"], Int[Tensor, "#batch key"]]:
    """The labels of rows and keys behind a `Match`; a row label of -1 matches nothing.

    Raises:
        BadInput: the link needs token ids and the view has none.
    """
    mask = view.mask
    at = torch.arange(mask.keys, device=mask.device, dtype=torch.int32)[None]
    position = mask.position.to(torch.int32)[None]
    if link == "self":
        return position, at
    if link == "previous":
        return position - 1, at
    if link == "first":
        return mask.starts.to(torch.int32), at
    if view.tokens is None:
        raise BadInput(f"Match({link!r}) needs the token ids; pass `tokens` or run the model on input_ids")
    of_keys = view.tokens.to(torch.int32)
    of_rows = of_keys.gather(1, position.clamp(0).long().expand(len(of_keys), -1))
    if link == "follower":
        of_keys = torch.cat([torch.full_like(of_keys[:, :1], -2), of_keys[:, :-1]], 1)
        # the first key of a text follows nothing: what stands before it is padding, or another text
        opens = mask.starts.clamp(0, mask.keys - 1).long()
        of_keys = of_keys.expand(max(len(of_keys), len(opens)), -1).contiguous()
        of_keys.scatter_(1, opens.expand(len(of_keys), -1), -2)
    return of_rows, of_keys


@dataclass(frozen=True)
class OnKeys(Reduction):
    """Sums of columns over the keys, weighted by the row: mass on spans, mass in bins.

    Args:
        spans: Half-open ranges of keys, one column each.
    """

    spans: tuple[tuple[int, int], ...]

    def columns(self, view: View) -> Float[Tensor, "1 key columns"]:
        """One indicator column per span."""
        at = torch.arange(view.mask.keys, device=view.mask.device)[:, None] + view.mask.key_offset
        edges = torch.tensor(self.spans, device=at.device).reshape(-1, 2)
        return ((at >= edges[:, 0]) & (at < edges[:, 1])).float()[None]

    def of_block(self, block: RowBlock) -> Float[Tensor, "batch heads rows columns"]:
        x = self.columns(block.view)[:, None, block.first : block.last]
        return block.weights @ x.to(block.weights.dtype)


@dataclass(frozen=True)
class KeyBins(Reduction):
    """Mass on each of at most `count` bins of keys, counted from the first token of the text.

    A bin is the smallest power of two of tokens with which the text, as far as it has come, fits into the bins: when
    a text outgrows them, two neighbours become one, so the sums of earlier calls can be kept.

    Args:
        count: Most bins.
    """

    count: int

    def __post_init__(self) -> None:
        if self.count < 2:
            raise BadParameter(f"KeyBins(count={self.count}): count must be 2 or more")

    @property
    def one_sequence(self) -> bool:
        return True

    def width(self, tokens: int) -> int:
        """Tokens per bin in a text of so many tokens."""
        return 1 << max(0, -(-tokens // self.count) - 1).bit_length()

    def edges(self, tokens: int) -> list[int]:
        """Where the bins of a text begin, and where the last one ends."""
        return [*range(0, tokens, self.width(tokens)), tokens]

    def of_view(self, view: View) -> tuple[int, Int[Tensor, "#batch query"]]:
        """How far the longest text of this call has come, and the place of each row in its text."""
        mask = view.mask
        begin = view.mask.text_begin[:, None]
        place = mask.position.to(torch.int32)[None] - begin
        ends = torch.maximum(place + 1, mask.high - begin)
        return int(torch.where(mask.rows, ends, 1).max()), place

    def columns(self, view: View) -> Float[Tensor, "#batch key columns"]:
        """One indicator column per bin."""
        tokens, _ = self.of_view(view)
        width = self.width(tokens)
        at = torch.arange(view.mask.keys, device=view.mask.device, dtype=torch.int32)[None]
        bins = (at - view.mask.text_begin[:, None]).div(width, rounding_mode="floor")
        return (bins[..., None] == torch.arange(-(-tokens // width), device=bins.device)).float()

    def of_block(self, block: RowBlock) -> Float[Tensor, "batch heads rows columns"]:
        x = self.columns(block.view)[:, None, block.first : block.last]
        return block.weights @ x.to(block.weights.dtype)


@dataclass(frozen=True)
class ColumnMass(Reduction):
    """Mass that each key receives from all real rows."""

    axis: ClassVar = "column"

    def of_block(self, block: RowBlock) -> Float[Tensor, "batch heads keys"]:
        real = block.view.mask.rows[:, None, block.index, None]
        # where, not times: padded queries may be NaN
        mass = torch.where(real, block.weights, 0.0).sum(2)
        return torch.nn.functional.pad(mass, (block.first, block.view.mask.keys - block.last))


@dataclass(frozen=True)
class Sampled:
    """Whole rows: their index among the queries of the call, and their weights.

    Args:
        index: Which queries of the call they are.
        weights: Their weights, over all keys.
    """

    index: Int[Tensor, " sample"]
    weights: Float[Tensor, "batch heads sample key"]


@dataclass(frozen=True)
class Last(Reduction):
    """Whole rows: the last real ones of each text.

    Args:
        count: How many; texts that are padded on the right add rows that are among the last of theirs only.
    """

    axis: ClassVar = "sample"
    count: int = 32

    def rows(self, view: View) -> Int[Tensor, " sample"]:
        return self.members(view).any(0).nonzero()[:, 0]

    def members(self, view: View) -> Bool[Tensor, "#batch query"]:
        """Which rows are among the last of their own text."""
        real = view.mask.rows
        return real & (real.flip(-1).cumsum(-1).flip(-1) <= self.count)

    def of_block(self, block: RowBlock) -> Float[Tensor, "batch heads rows keys"]:
        return torch.nn.functional.pad(block.weights, (block.first, block.view.mask.keys - block.last))


@dataclass(frozen=True)
class Sample(Reduction):
    """Whole rows at evenly spread places, as pairs of neighbours (i - 1, i), for what must sort or compare rows.

    Args:
        count: Number of pairs; fewer when the call has fewer rows.
        seed: Shifts the places; the same for all layers, so that layers can be compared.
    """

    axis: ClassVar = "sample"
    count: int = 32
    seed: int = 0

    def rows(self, view: View) -> Int[Tensor, " sample"]:
        return self.index(view.queries)

    def index(self, queries: int) -> Int[Tensor, " sample"]:
        """The sampled rows in order; the second of each pair stands at an odd place."""
        if queries == 1:
            return torch.zeros(1, dtype=torch.long)
        pairs = min(self.count, queries // 2)
        stride = queries / pairs
        shift = torch.rand(pairs, generator=torch.Generator().manual_seed(self.seed))
        # each pair inside a stretch of its own: no row is taken twice
        second = (torch.arange(pairs) * stride).long() + 1 + (shift * (int(stride) - 1)).long()
        return torch.stack([second - 1, second], 1).flatten()

    def of_block(self, block: RowBlock) -> Float[Tensor, "batch heads rows keys"]:
        return torch.nn.functional.pad(block.weights, (block.first, block.view.mask.keys - block.last))
