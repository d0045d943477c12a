r"""Expected attention: what queries like the last ones will look at, times how much it says.

    mu, Sigma = mean and covariance of the last queries
    a_j = softmax_j( scale mu' k_j + 1/2 scale^2 k_j' Sigma k_j )        mean over the heads that share a key
    s_j = (a_j + epsilon) ||v_j||_2

For a normal query q what stands in the softmax is ln E exp(scale q' k_j): a key is worth something when the mean
query points to it, and also when only some queries do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core.budget import Amount
from foveate.core.card import Card, Needs
from foveate.core.mechanism import Policy
from foveate.core.params import bounded
from foveate.core.policy import Held
from foveate.core.reductions import Last

__all__ = ["ExpectedAttention"]


@dataclass(frozen=True)
class ExpectedAttention(Policy):
    """Score each key by the weight that a normal distribution of queries gives it, times the L2 norm of its value.

    Args:
        budget: How many entries each KV head keeps; its `sinks` stay, and neither their queries nor their keys count.
        window: How many last queries the distribution is fitted to; those far back stand at other positions.
        epsilon: What is added to each expected weight, so that large values stay where no weight is expected.

    Example:
        Queries to come are expected to look for full stops in the head that always does; in the head that looks for
        copies of a letter, for the letter that came twice among the last rows, which is the full stop here.

        >>> import foveate
        >>> from foveate.compress import ExpectedAttention
        >>> from foveate.testing import handmade
        >>> text = "To be. Or not to be. Ask."
        >>> budget = foveate.Budget(8, sinks=1, recent=2, every=0)
        >>> policy = ExpectedAttention(budget, window=8)
        >>> with foveate.attach(handmade.model(), policy) as attached:
        ...     cache = attached.model(handmade.ids(text)).past_key_values
        >>> handmade.kept(cache, text, layer=1)["stop"]
        '·····.·············. Ask.'
        >>> handmade.kept(cache, text, layer=1)["same"]
        '·····.·············. Ask.'
    """

    budget: Amount = 0.25
    window: int = bounded(128, 1, 1 << 16)
    epsilon: float = bounded(0.0, 0.0, 1.0)

    card: ClassVar = Card(
        title="Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
        year=2025,
        family="kv cache",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES,
        equation="a_j = softmax of scale mu' k_j + scale^2 k_j' Sigma k_j / 2; s_j = (a_j + epsilon) ||v_j||_2",
        differs="fitted to the last `window` queries as attention was given them, positions applied, so that their "
        "spread over positions is in Sigma; the paper fits all queries of the text without positions and turns mu and "
        "Sigma by the mean rotation of the next 512 positions. ||v_j|| for the paper's ||W_o v_j||, as in its code. "
        "Keys that a sliding window has left get nothing; a soft cap acts on the sum in the softmax, which is exact "
        "for equal queries only; learned sinks take no part. In decoding the distribution is fitted to the queries "
        "since the last round. The paper's budgets per head are Budget(heads='layer')",
        use="when the question comes later, and the last rows are text like what will come",
        misleads="an `epsilon` far above one over the number of tokens leaves only the norms of the values; a text "
        "whose end is unlike what follows is compressed for the wrong queries",
    )
    test_params: ClassVar = ({}, {"window": 6, "epsilon": 0.02})

    def score(self, held: Held) -> Float[Tensor, "batch kv_heads key"]:
        view = held.rows.view
        mu, sigma = self.queries(held)
        k, v = held.k.float(), held.v.float()
        if not bool(held.there.all()):
            # what is no entry may be anything, NaN too
            k, v = (torch.where(held.there[..., None], x, 0.0) for x in (k, v))
        mean = view.scale * (k @ mu.transpose(-1, -2)).transpose(-1, -2)
        # all heads that share a key in one product, which is far faster than one for each
        turned = (k @ sigma.transpose(2, 3).flatten(3)).unflatten(-1, (sigma.shape[2], -1))
        variance = view.scale**2 * turned.mul_(k[:, :, :, None]).sum(-1).transpose(-1, -2)
        s = mean + variance / 2
        if view.softcap is not None:
            s = view.softcap * torch.tanh(s / view.softcap)
        if held.mass is not None:
            s = s + held.mass.log()[:, :, None]
        reach = self.reach(held)
        a = torch.where(reach, s.masked_fill(~reach, -torch.inf).softmax(-1), 0.0).mean(2)
        return torch.where(reach.any(2), (a + self.epsilon) * v.norm(dim=-1), 0.0)

    def queries(
        self, held: Held
    ) -> tuple[Float[Tensor, "batch kv_heads share dim"], Float[Tensor, "batch kv_heads share dim dim"]]:
        """Mean and covariance of the last queries of each text, those of its sinks left out."""
        view = held.rows.view
        begin = held.position.amin((1, 2))
        member = Last(self.window).members(view) & (view.mask.position - begin[:, None] >= self.limits.sinks)
        index = member.any(0).nonzero()[:, 0]
        member = member[:, index]
        count = member.sum(-1).clamp_min(1)[:, None, None, None]
        mine = member[:, None, None, :, None]
        q = torch.where(mine, held.by_kv_head(view.q[:, :, index].float()), 0.0)
        mu = q.sum(3) / count
        apart = torch.where(mine, q - mu[:, :, :, None], 0.0)
        return mu, apart.transpose(-1, -2) @ apart / count[..., None]

    def reach(self, held: Held) -> Bool[Tensor, "batch kv_heads share key"]:
        """The entries that queries to come may look at, sinks left out: a sliding window never comes back."""
        view = held.rows.view
        newest = Last(1).members(view)
        index = newest.any(0).nonzero()[:, 0]
        seen = view.mask.additive(index, 0, view.keys) > -torch.inf
        seen = (seen & newest[:, None, index, None]).any(2).expand(view.batch, view.heads, -1)
        counted = held.there & (held.there.cumsum(-1) > self.limits.sinks)
        return seen.unflatten(1, (view.kv_heads, -1)) & counted[:, :, None]
