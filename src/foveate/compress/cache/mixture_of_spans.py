r"""Mixture of spans: each head keeps the first tokens and as many recent ones as its own line says.

    S_h = \alpha_h + \beta_h N
    keep j  if  j < sinks  or  j >= N - S_h

N is the length of the text. A head with beta = 0 keeps a window of fixed size, one with alpha = 0 a share of the text.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.compress.cache._kv_heads import KVHeads, names_kv_heads
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
        >>> from foveate.testing import handmade
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
    """

    budget: Amount = SPANS_ALONE
    spans: tuple[Line, ...] = some_lines()
    alpha: float = bounded(0.0, -MOST, MOST)
    beta: float = bounded(0.5, 0.0, 1.0)

    card: ClassVar = Card(
        title="MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression",
        year=2024,
        family="kv cache",
        needs=Needs.KEYS,
        equation="S_h = alpha_h + beta_h N; keep the sinks and the last S_h tokens",
        differs="the lines are given; the paper searches them by profiling gradients and a solver. A prompt that comes "
        "at once attends to all of itself before entries are dropped, where the paper's rows see their span only; N "
        "grows with the tokens that are decoded, where published code stays with the spans of the prompt; spans are "
        "counted in tokens, not in blocks of 64. In decoding entries are dropped every few tokens, and a KV head holds "
        "up to so many fewer than its span in between",
        use="where it is known how far each head has to look, and how that grows with the text",
        misleads="lines found at one length say little of texts that are much longer",
    )
    test_params: ClassVar = (
        {},
        {"alpha": 6.0, "beta": 0.0, "spans": ((0, 1, 0.0, 1.0), (1, 0, -4.0, 0.4))},
    )

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
        alpha, beta = seen.new_tensor(lines, dtype=torch.float64).unbind(1)
        span = (alpha + beta * seen[:, None].double() + 1e-9).floor().to(seen.dtype)
        least = seen.clamp_max(self.limits.least)[:, None]
        return torch.minimum(most, torch.maximum(span + self.limits.sinks, least))

    def score(self, held: Held) -> Float[Tensor, "batch kv_heads key"]:
        return held.position.to(held.before.dtype)
