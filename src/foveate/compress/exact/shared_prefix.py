r"""Shared prefix: keys that all rows of a batch have in common are read once, by the queries of all of them together.

    out_P, lse_P = attention([q_1; …; q_B], K_P, V_P)       one product: the prefix is read once
    out_b, lse_b = attention(q_b, K_b, V_b)                 what each sequence has of its own
    lse = \ln(e^{lse_P} + e^{lse_b}),    out = e^{lse_P - lse} out_P + e^{lse_b - lse} out_b

P are the keys of the prefix, b those of one sequence. `core/prefix.py` does the same with any number of levels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core import tiled, traffic
from foveate.core.card import Card, Needs
from foveate.core.mask import Mask
from foveate.core.mechanism import Schedule
from foveate.core.params import bounded
from foveate.core.prefix import Level, Reach, attend_levels
from foveate.core.rows import View
from foveate.core.traffic import Shape, Traffic

__all__ = ["SharedPrefix"]


@dataclass(frozen=True)
class SharedPrefix(Schedule):
    """Attend the first keys of a batch once for all of its sequences, and the others for each.

    Args:
        prefix: How many keys the sequences have in common.

    Example:
        Three texts begin alike, and the model says of each what it said.

        >>> import torch, foveate
        >>> from foveate.compress import SharedPrefix
        >>> from foveate.testing import handmade
        >>> model = handmade.model()
        >>> texts = ["a1 b2 a", "a1 b2 b", "a1 b2 1"]
        >>> ids = torch.cat([handmade.ids(text) for text in texts])
        >>> plain = model.generate(ids, max_new_tokens=1)
        >>> with foveate.attach(model, SharedPrefix(6)):
        ...     torch.equal(model.generate(ids, max_new_tokens=1), plain)
        True
    """

    prefix: int = bounded(1, 1, 1 << 24)

    card: ClassVar = Card(
        title="Hydragen: High-Throughput LLM Inference with Shared Prefixes",
        year=2024,
        family="exact",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES,
        equation="out = merge(attention([q_1; …; q_B], K_P, V_P), attention(q_b, K_b, V_b))",
        differs="The paper's cache holds the prefix once and is told who shares it; a schedule sees the keys "
        "of each sequence and compares them, unless the batch was expanded from one. `foveate.share_prefix` is that "
        "cache, with trees of prefixes: any number of sequences below a node where the paper's code has equally many, "
        "and rows padded in front, so that the model's own masks hold. Learned sinks and soft caps are added.",
        use="For batches whose sequences have long prompts in common: few-shot examples, many answers to one question.",
        misleads="Where the keys must be compared, that reads them as often as plain attention does; and a single "
        "sequence gains nothing.",
        claims=("shared_prefix",),
    )

    def refuses(self, view: View) -> str:
        if reason := tiled.refuses(view):
            return reason
        if view.keys < self.prefix:
            return f"there are {view.keys} keys, fewer than a prefix of {self.prefix}"
        if bool((view.mask.low > 0).any()) or bool((view.mask.high < self.prefix).any()):
            return f"a row does not see the whole prefix of {self.prefix} keys"
        if not (self.common(view.k) and self.common(view.v)):
            return f"the sequences do not have their first {self.prefix} keys and values in common"
        return ""

    def common(self, x: Float[Tensor, "batch kv_heads key dim"]) -> bool:
        """Whether all sequences have the same prefix."""
        if len(x) == 1 or x.stride(0) == 0:
            return True
        first = x[:, :, : self.prefix]
        return torch.equal(first, first[:1].expand_as(first))

    def run(
        self, view: View
    ) -> tuple[Float[Tensor, "batch heads query value_dim"], Float[Tensor, "batch heads query"]]:
        p, mask = self.prefix, view.mask
        rest = Mask.full(view.queries, view.keys - p, view.q.device)
        own = view.but(k=view.k[:, :, p:], v=view.v[:, :, p:], mask=rest, tokens=None)
        # each sequence has a gradient of its own, which keys that are taken from one of them would not give it
        folded = not view.needs_grad
        k, v = (t[: 1 if folded else None, :, :p] for t in (view.k, view.v))
        low, high = (t.expand(view.batch, -1).int() for t in (mask.low, mask.high))
        seen = torch.full((1, view.batch * view.queries), p, dtype=torch.int32, device=view.q.device)
        reach = Reach(((torch.zeros_like(seen), seen),), ((low - p).clamp_min(0), high - p))
        return attend_levels(own, [Level(k, v, 0, view.batch)], reach, folded)

    def traffic(self, shape: Shape, fast: int) -> Traffic:
        return traffic.shared_prefix(replace(shape, prefix=min(self.prefix, shape.keys)), fast)
