r"""Pages: read only the stretches of the cache in which some key may match the query.

    M_p = max_{j in p} k_j,    m_p = min_{j in p} k_j                  element by element, per page and KV head
    u_p = sum_d max(q_d M_pd, q_d m_pd)  >=  q . k_j                   for every key j of page p
    read the pages of largest u_p

The two corners of a page are kept and only the growing page is looked at again, so that far keys are not touched
before they are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.budget import Amount, Budget
from foveate.core.card import Card, Needs
from foveate.core.mechanism import Policy
from foveate.core.params import bounded
from foveate.core.policy import Reading
from foveate.core.ragged import numbers

__all__ = ["Pages"]

# room for pages to come, in pages
SPARE = 32


@dataclass(frozen=True)
class Pages(Policy):
    """Read the pages of keys whose upper bound of the score is largest; all entries stay.

    Args:
        budget: How many entries each KV head reads.
        page: Entries per page.
        first: How many of the first layers read everything.

    Example:
        The page of the first token and those of the last two are read in any case. There is room for one more, and
        the head that looks for copies of its letter takes the one with the other k.

        >>> import foveate
        >>> from foveate.compress import Pages
        >>> from foveate.testing import handmade
        >>> from foveate.testing.policies import Witness
        >>> text, seen = "Look, to be or not to be. Ask", []
        >>> ids = handmade.ids(text)
        >>> budget = foveate.Budget(9, sinks=1, recent=2, every=0)
        >>> policy = Witness(Pages(budget, page=3, first=1), seen, budget)
        >>> with foveate.attach(handmade.model(), policy) as attached:
        ...     cache = attached.model(ids[:, :-1]).past_key_values
        ...     out = attached.model(ids[:, -1:], past_key_values=cache)
        >>> layer, position, room = seen[-1]
        >>> same = position[0, 1].tolist()
        >>> "".join(c if n + 1 in same else "·" for n, c in enumerate(text))
        'Look,·····················Ask'
    """

    budget: Amount = 0.25
    page: int = bounded(16, 1, 4096)
    first: int = bounded(2, 0, 1024)

    card: ClassVar = Card(
        title="Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
        year=2024,
        family="kv cache",
        needs=Needs.QUERIES | Needs.KEYS,
        equation="u_p = sum over d of max(q_d max_{j in p} k_jd, q_d min_{j in p} k_jd); read the pages of largest u_p",
        differs="query heads that share a KV head read the same pages, those of the largest u_p over them; the paper's "
        "code chooses for each. Sinks and recent tokens, which the paper does not pin, and what else is in their pages "
        "are read first, and of the last page only what is left of the room. The mass of merged entries takes no part "
        "in the bound",
        use="when what is needed changes from token to token and memory suffices for the whole cache",
        misleads="the bound says that a page may hold a matching key, not that it does: where keys of a page point in "
        "different directions it is loose",
    )
    test_params: ClassVar = ({"first": 0, "page": 4}, {"first": 1, "page": 3})

    def read(self, reading: Reading) -> Int[Tensor, "batch kv_heads chosen"] | None:
        if reading.at < self.first or bool((reading.store.length <= reading.room).all()):
            return None
        corners = self.corners(reading)
        q = reading.q.float()
        # where q_d is positive the largest k_d counts, elsewhere the smallest
        bound = torch.cat([q.clamp_min(0), q.clamp_max(0)], -1) @ corners.float().transpose(-1, -2)
        return self.filled(reading, bound.amax(2))

    def corners(self, reading: Reading) -> Float[Tensor, "batch kv_heads page two_dims"]:
        """Largest and smallest keys of each page, element by element; anything behind the last page of a head."""
        store, state = reading.store, reading.state
        length, dim = store.length, store.keys.shape[1]
        behind = -(-length // self.page)
        # a page that was not full may have grown
        begin = state["covered"] // self.page if "covered" in state else torch.zeros_like(length)
        new = int((behind - begin).max())
        pages = begin[..., None] + torch.arange(new, device=length.device)
        # the last entry of a stretch once more, where there is none: the corners stay what they are
        entry = (pages[..., None] * self.page + torch.arange(self.page, device=length.device)).minimum(
            length[..., None, None] - 1
        )
        low, high = numbers(store.keys[store.start[..., None, None] + entry]).aminmax(dim=-2)
        fresh = torch.cat([high, low], -1)
        total = int(begin.max()) + new
        held = state.get("corners")
        if held is None or held.shape[2] < total:
            grown = fresh.new_zeros(*length.shape, total + SPARE, 2 * dim)
            if held is not None:
                grown[:, :, : held.shape[2]] = held
            held = grown
        held.scatter_(2, pages[..., None].expand(-1, -1, -1, 2 * dim), fresh)
        state["corners"], state["covered"] = held, length.clone()
        return held[:, :, : int(behind.max())]

    def filled(
        self, reading: Reading, bound: Float[Tensor, "batch kv_heads page"]
    ) -> Int[Tensor, "batch kv_heads chosen"]:
        """Entries by page, stretch by stretch; those of one length, which are most often all, at once."""
        store, room = reading.store, reading.room
        # what a token sees ends with itself, so that a sliding window takes from the front only
        unseen = 0 if store.sees_all(reading.mask) else store.length - reading.there.sum(-1)
        shapes = torch.stack([torch.zeros_like(room) + unseen, store.length, room], -1).flatten(0, 1).tolist()
        alike: dict[tuple[int, ...], list[int]] = {}
        for n, shape in enumerate(shapes):
            alike.setdefault(tuple(shape), []).append(n)
        flat = bound.flatten(0, 1)
        made = torch.full((len(flat), int(room.max())), -1, device=bound.device)
        for (begin, end, most), stretches in alike.items():
            entries = self.paged(flat[stretches], begin, end, most, reading.budget)
            made[stretches, : entries.shape[-1]] = entries
        return made.unflatten(0, room.shape)

    def paged(
        self, bound: Float[Tensor, "stretches page"], begin: int, end: int, room: int, budget: Budget
    ) -> Int[Tensor, "stretches chosen"]:
        """Sinks and recent tokens, what else is in their pages, and the best pages between, as far as there is room."""
        page, device = self.page, bound.device
        sinks = min(max(begin, budget.sinks), end)
        recent = max(end - budget.recent, sinks)
        low = min(-(-sinks // page) * page, recent)
        high = max(recent // page * page, low)
        parts = ((begin, sinks), (recent, end), (sinks, low), (high, recent))
        fixed = torch.cat([torch.arange(*part, device=device) for part in parts])[:room]
        count = min((high - low) // page, -(-(room - len(fixed)) // page))
        best = low // page + bound[:, low // page : high // page].topk(count, -1).indices
        inside = (best[..., None] * page + torch.arange(page, device=device)).flatten(1)
        return torch.cat([fixed.expand(len(bound), -1), inside], -1)[:, :room]
