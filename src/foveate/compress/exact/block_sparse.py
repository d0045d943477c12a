r"""Block-sparse attention: row blocks visit the key blocks of a butterfly, and what is not visited is never computed.

    S_i = { j : j = i  or  j = i xor 2^n  or  j < first }

Row block i visits its own key block, those whose number differs in one binary digit, and the first ones. That are about
\log_2 of them, and two visits lead from any block to a great many others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate.core.card import Card, Needs
from foveate.core.mechanism import Pattern, Visits
from foveate.core.params import bounded
from foveate.core.rows import View

__all__ = ["BlockSparse"]


@dataclass(frozen=True)
class BlockSparse(Pattern):
    """Attention over a butterfly of blocks: of N keys a row sees about block times log2(N / block).

    Args:
        block: Keys per key block, and rows per row block.
        first: How many of the first key blocks every row visits.

    Example:
        Each letter sees its own block of four, the first one, and its neighbour in the butterfly.

        >>> import foveate
        >>> from foveate.compress import BlockSparse
        >>> from foveate.measure import LocalMass
        >>> from foveate.testing import handmade
        >>> model = handmade.model()
        >>> local = LocalMass(widths=(3,))
        >>> pattern = BlockSparse(block=4)
        >>> with foveate.attach(model, pattern, local) as attached:
        ...     _ = model(handmade.ids("hello world, hello"))
        >>> handmade.named(attached.results.heads, "local_mass_3")
        {'first': 0.21, 'previous': 0.92, 'self': 1.0, 'average': 0.53}
    """

    block: int = bounded(64, 1, 1 << 16)
    first: int = bounded(1, 0, 1 << 16)

    card: ClassVar = Card(
        title="FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness",
        year=2022,
        family="exact",
        needs=Needs.QUERIES | Needs.KEYS,
        equation="S_i = { j : j = i or j = i xor 2^n or j < first }, of blocks i of rows and j of keys",
        differs="the paper takes a fixed butterfly in training; the first blocks are added, because trained models put "
        "much of their weight there. Blocks count from the first key of the call",
        use="where a long text is read or trained on at a cost that grows with N log N, by a model that was or will be "
        "trained so",
        misleads="a model that was trained with dense attention is not made for it: measure what it loses",
        claims=("block_sparse",),
    )
    test_params: ClassVar = ({"block": 4}, {"block": 3, "first": 0}, {"block": 64})
    known_failures: ClassVar = {"padding": "blocks are counted from the first key of the call, padding included"}

    def select(self, view: View) -> Visits:
        blocks = torch.arange(-(-view.keys // self.block), device=view.q.device)
        # a cached row stands behind keys of earlier calls: single rows then, so that no block mixes two
        whole = view.queries == view.keys
        row = blocks if whole else view.mask.position // self.block
        apart = row[:, None] ^ blocks
        near = (apart & (apart - 1)) == 0
        return Visits((near | (blocks < self.first))[None, None], self.block if whole else 1, self.block)
