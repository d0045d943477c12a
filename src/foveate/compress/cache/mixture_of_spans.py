r"""Mixture of spans: each head keeps the first tokens and as many recent ones as its own line says.

    S_h = \alpha_h + \beta_h N
    keep j  if  j < sinks  or  j >= N - S_h

N is the length of the text. A head with beta = 0 keeps a window of fixed size, one with alpha = 0 a share of the text.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.compress.cache._kv_heads import KVHeads, names_kv_heads
from foveate.compress.cache._spans import Search, entries
from foveate.core.budget import Amount, Budget
from foveate.core.card import Card, Needs
from foveate.core.mechanism import Policy
from foveate.core.params import bounded
from foveate.core.policy import Held

__all__ = ["Line", "Lines", "MixtureOfSpans", "some_lines"]

Line = tuple[int, int, float, float]
MOST = float(1 << 24)
# no cap that any text reaches: the spans say how many
SPANS_ALONE = Budget(1 << 24, sinks=64, recent=1)


@dataclass(frozen=True)
class Lines(KVHeads):
    """Lines alpha + beta N for single KV heads."""

    entry: ClassVar = "(layer, KV head, alpha, beta)"
    example: ClassVar[Any] = (0, 0, 0.0, 0.5)
    empty: ClassVar = "() leaves all KV heads to the common line"

    def __str__(self) -> str:
        return f"{self.entry} each, alpha within {MOST:g}, beta from 0 to 1; {self.empty}"

    def fits(self, entry: Any) -> bool:
        if not isinstance(entry, tuple) or len(entry) != 4 or not KVHeads.fits(self, entry[:2]):
            return False
        numbers = all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in entry[2:])
        return numbers and abs(entry[2]) <= MOST and 0 <= entry[3] <= 1

    def key(self, entry: Any) -> Any:
        return entry[:2]

    def wrong(self, default: Any) -> Any:
        yield from KVHeads.wrong(self, default)
        yield from (((0, 0, 0.5),), ((0, 0, 0.0, 1.5),), ((0, 0, 0.0, -0.1),), ((0, -1, 0.0, 0.5),))
        yield (self.example, (0, 0, 1.0, 0.0))


def some_lines() -> Any:
    """A dataclass field with lines for single KV heads, in place of the common one."""
    return dataclasses.field(default=(), metadata={"bounds": Lines()})


@dataclass(frozen=True)
class MixtureOfSpans(Policy):
    """Keeps the budget's sinks and the last alpha + beta N tokens of a text of N, by a line for each KV head.

    A span that is longer than the text keeps all of it; one of nothing keeps the recent tokens that the budget pins,
    with its room for new ones.

    Args:
        budget: The most that any KV head keeps, whatever its span says; 1.0 keeps everything, as everywhere. Heads do
            not compete.
        spans: (layer, KV head, alpha, beta) for single KV heads.
        alpha: Of all others: tokens that they keep of any text.
        beta: Of all others: share of the text that they keep besides.

    Example:
        One head keeps three tokens of any text, the other two and half of it.

        >>> import foveate
        >>> from foveate.compress import MixtureOfSpans
        >>> from foveate.testing import handmade, tiny
        >>> text = "To be. Or not to be. Ask."
        >>> budget = foveate.Budget(64, sinks=1, recent=1, every=0)
        >>> spans = ((1, 1, 3, 0.0), (1, 3, 2, 0.5))
        >>> policy = MixtureOfSpans(budget, spans, alpha=0, beta=1.0)
        >>> with foveate.attach(handmade.model(), policy) as attached:
        ...     cache = attached.model(handmade.ids(text)).past_key_values
        >>> handmade.kept(cache, text, layer=1)["same"]
        '······················sk.'
        >>> handmade.kept(cache, text, layer=1)["stop"]
        '··········not to be. Ask.'
        >>> handmade.kept(cache, text, layer=1)["first"]
        'To be. Or not to be. Ask.'

        `fit` finds the head that looks back 16 letters, in a text that repeats.

        >>> again, model = 16 * "qwertyuiopasdfgh", handmade.model()
        >>> few = {"lengths": (24,), "unseen": 48, "samples": 1, "sinks": 1}
        >>> few |= {"every": 1, "keep": 0.3, "spans": ((0, 0.0), (20, 0.0))}
        >>> found = MixtureOfSpans.fit(model, tiny.tokenizer(), again, **few)
        >>> [handmade.HEADS[a][h] for a, h, alpha, _ in found.spans if alpha]
        ['induction']
    """

    budget: Amount = SPANS_ALONE
    spans: tuple[Line, ...] = some_lines()
    alpha: float = bounded(0.0, -MOST, MOST)
    beta: float = bounded(0.5, 0.0, 1.0)

    card: ClassVar = Card(
        title="MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression",
        year=2024,
        family="kv cache",
        needs=Needs.KEYS | Needs.MODEL | Needs.GRADIENTS,
        equation="S_h = alpha_h + beta_h N; keep the sinks and the last S_h tokens",
        differs="a prompt that comes at once attends to all of itself before entries are dropped, where the paper's "
        "rows see their span only; N grows with the tokens that are decoded, where published code stays with the "
        "spans of the prompt; spans are counted in tokens, not in blocks of 64, with 4 sinks, not a block. In "
        "decoding entries are dropped every few tokens, and a KV head holds up to so many fewer than its span in "
        "between. `fit` profiles the rows behind a prompt; the loss of a span is half the square of the first-order "
        "change that all it drops make together, with tokens drawn from the model's own predictions, which estimates "
        "the divergence from them; published code sums the sizes of single entries' changes, for the model's own "
        "answers. The query heads of a KV head are added up before the square; published code takes the largest. "
        "Losses are extrapolated to one longer length by a power of N for each line. HiGHS solves for the mean of "
        "the profiled lengths and for that length, and the real loss there decides; published code has Gurobi trace "
        "a Pareto front over the profiled lengths, with at most two lines in a layer",
        use="where it is known how far each head has to look, and how that grows with the text, or a few minutes are "
        "there to search it",
        misleads="lines found at one length, or on one kind of text, say little of others: what nothing in the text "
        "makes a head look back for is not seen. The losses of heads are added up, and are more together",
        claims=("mixture_of_spans",),
    )
    test_params: ClassVar = (
        {},
        {"alpha": 6.0, "beta": 0.0, "spans": ((0, 1, 0.0, 1.0), (1, 0, -4.0, 0.4))},
    )

    @classmethod
    def fit(
        cls,
        model: Any,
        tokenizer: Any,
        text: str,
        *,
        keep: float = 0.25,
        lengths: tuple[int, ...] = (512, 1024),
        at: tuple[int, ...] | None = None,
        spans: tuple[tuple[float, float], ...] | None = None,
        samples: int = 8,
        unseen: int | None = None,
        sinks: int = 4,
        every: int = 16,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> MixtureOfSpans:
        """Searches a line for each KV head: `Search(...).run(...)` of `_spans.py` without its evidence.

        Args:
            model: A causal language model. It comes out as it went in.
            tokenizer: Its tokenizer.
            text: What it reads. Heads that nothing in it makes look back are given short spans.
            keep: Mean share of the cache over the KV heads.
            lengths: Lengths, in tokens, of the texts that are profiled.
            at: Lengths that the budget must hold at; None: all of `lengths`, and `unseen`.
            spans: (alpha, beta) to choose from; None: a grid of about a hundred.
            samples: Texts of each length.
            unseen: Length, not among `lengths`, at which the solver's answers are tried; None: twice the longest.
            sinks: First tokens that every head keeps.
            every: In decoding, entries are dropped after so many new tokens.
            seed: The same seed gives the same lines.
            progress: Called with the texts done and all texts.

        Raises:
            BadInput: a number that cannot be, a text that is too short, or a budget that no lines meet.
        """
        search = Search(keep, lengths, at, spans, samples, unseen, sinks, every, seed)
        return cls(search.budget, search.run(model, tokenizer, text, progress).lines)

    @cached_property
    def limits(self) -> Budget:
        """The budget, in which heads do not compete."""
        budget = Budget.of(self.budget)
        return budget if budget.whole or isinstance(budget.heads, tuple) else dataclasses.replace(budget, heads=())

    def counts(
        self, seen: Int[Tensor, " batch"], layer: int, layers: int, kv_heads: int, entry_bytes: int
    ) -> Int[Tensor, "batch kv_heads"]:
        named = (line[:2] for line in self.spans)
        names_kv_heads("MixtureOfSpans(spans=…)", named, layer, layers, kv_heads)
        most = self.limits.counts(seen, layer, layers, kv_heads, entry_bytes)
        if self.limits.whole:
            return most
        own = {head: (alpha, beta) for at, head, alpha, beta in self.spans if at == layer}
        lines = [own.get(head, (self.alpha, self.beta)) for head in range(kv_heads)]
        return torch.minimum(most, entries(seen.new_tensor(lines, dtype=torch.float64), seen, self.limits))

    def score(self, held: Held) -> Float[Tensor, "batch kv_heads key"]:
        return held.position.to(held.before.dtype)
