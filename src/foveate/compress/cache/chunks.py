r"""Chunks: what is said in one place is kept or dropped as one.

S_c = \sum_{j in c} 1/w \sum_{i > N - w} p_ij        c: `size` consecutive tokens, counted from the first of the text
s_j = S_c of the chunk that j stands in

Keys that are kept one by one leave words without their neighbours; a chunk keeps subject, verb and object together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core.budget import Amount
from foveate.core.card import Card, Needs
from foveate.core.mechanism import Policy
from foveate.core.params import bounded
from foveate.core.policy import Held
from foveate.core.reductions import Last, Reduction

__all__ = ["Chunks"]


@dataclass(frozen=True)
class Chunks(Policy):
    """Score all keys of a chunk by the weight that the last rows give the chunk.

    Room in which no whole chunk fits any more takes the last tokens of the next best one; it alone is cut, and as a
    chunk counts for what is left of it, the rest of it goes before others later.

    Args:
        budget: How many entries each KV head keeps.
        size: Tokens of a chunk.
        window: How many last rows vote; they stay themselves as the budget's recent tokens.

    Example:
        The last rows look at full stops; the two chunks of four in which one stands stay whole.

        >>> import foveate
        >>> from foveate.compress import Chunks
        >>> from foveate.testing import handmade
        >>> text = "To be. Or not to be. Ask."
        >>> budget = foveate.Budget(11, sinks=1, recent=2, every=0)
        >>> policy = Chunks(budget, size=4, window=2)
        >>> with foveate.attach(handmade.model(), policy) as attached:
        ...     cache = attached.model(handmade.ids(text)).past_key_values
        >>> handmade.kept(cache, text, layer=1)["stop"]
        '···be. ············. Ask.'
    """

    budget: Amount = 0.25
    size: int = bounded(10, 1, 4096)
    window: int = bounded(32, 1, 4096)

    card: ClassVar = Card(
        title="ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context LLM Inference",
        year=2025,
        family="kv cache",
        needs=Needs.QUERIES | Needs.KEYS | Needs.WEIGHTS,
        equation="s_j = sum over the keys l of the chunk of j of the mean over the last w rows of p_il",
        differs="each KV head of each layer chooses its own chunks, the paper takes over those of one layer in the "
        "next ones; it keeps whole chunks only, here the room that they leave takes the end of one more; the "
        "budget's sinks and recent tokens stay, and the first token always; in decoding the rows since the last round "
        "vote, the paper compresses the prompt only (that is Budget(every=0))",
        use="when what is looked for is a sentence and not a word, and the prompt ends with the question",
        misleads="chunks are cut at every so many tokens and not where sentences end; the chunk of an attention sink "
        "stays for the sink's sake",
    )
    test_params: ClassVar = ({}, {"size": 4, "window": 4})

    def needs(self) -> tuple[Reduction, ...]:
        return (Last(self.window),)

    def score(self, held: Held) -> Float[Tensor, "batch kv_heads key"]:
        begin = held.position.amin((1, 2), keepdim=True)
        # what is no entry gets a chunk of its own, in front
        chunk = ((held.position - begin) // self.size + 1).masked_fill(~held.there, 0).long()
        weight = held.window(self.window).masked_fill(~held.there, 0.0)
        sums = weight.new_zeros(*chunk.shape[:2], int(chunk.max()) + 1).scatter_add_(2, chunk, weight)
        return sums.gather(2, chunk)

    def pinned(self, held: Held) -> Bool[Tensor, "batch kv_heads key"]:
        # without it nobody knows later where the chunks begin
        return held.there & (held.there.cumsum(-1) == 1)
