r"""Prefix linear attention: the first tokens are read twice, once by all that follows and by each other.

o_t = phi(q_t)^T (E + S_t) / phi(q_t)^T (e + z_t),   S_t = \sum_{j <= t} phi(k_j) v_j^T,   z_t = \sum_{j <= t} phi(k_j),
E = \sum_{j < M} phi(k'_j) v'_j^T,   e = \sum_{j < M} phi(k'_j),   phi(x) . phi(y) = 1 + s + s^2 / 2
with s = x . y / sqrt(f) of queries and keys that are projected to f numbers
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foveate.core.card import Card, Needs
from foveate.core.errors import NotSupported
from foveate.core.mixer import State
from foveate.core.params import bounded
from foveate.core.recurrence import Heads, Recurrence
from foveate.core.rule import Sizes
from foveate.core.states import Form, run
from foveate.replace.linear._taylor import Narrow, second_order

__all__ = ["PrefixLinear"]


@dataclass(frozen=True)
class PrefixLinear(Recurrence):
    """Linear attention that has read the whole prefix before its first token is answered.

    The tokens of a prefix see each other, so they cannot be trained to foretell one another: the authors mask some and
    train the model to name them, and to go on behind the prefix. A prefix must come in one call; what the first call
    of a text does not hold of it is read once. `scan` describes the second reading, which is causal.

    Example:
        The first token knows the fourth, and not the fifth.

        >>> import torch, foveate
        >>> from foveate.replace import PrefixLinear
        >>> rule = PrefixLinear(length=4)
        >>> attention = foveate.nn.Attention(32, heads=4, rule=rule)
        >>> x = torch.randn(1, 6, 32)
        >>> other = [x.clone(), x.clone()]
        >>> other[0][:, 3] += 1
        >>> other[1][:, 4] += 1
        >>> [bool(attention(y)[0, 0].equal(attention(x)[0, 0])) for y in other]
        [False, True]

    Args:
        length: Tokens of the prefix, M, the first ones of each text that are no padding; all of a shorter text.
        feature_dim: Width f of a projected query or key; a state has 1 + f + f (f + 1) / 2 rows.
    """

    length: int = bounded(1024, 1, 2**20)
    feature_dim: int = bounded(16, 1, 256)

    normalised: ClassVar[bool] = True
    full: ClassVar[bool] = False

    one_scan: ClassVar[bool] = False

    card: ClassVar = Card(
        title="Just read twice: closing the recall gap for recurrent language models",
        year=2024,
        family="linear",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES | Needs.TRAINING,
        equation="o_t = phi(q_t).(E + S_t) / phi(q_t).(e + z_t), E and e summed over the prefix, S_t and z_t up to t",
        differs="queries and the keys of the second reading are projections of the layer's own, positions in them; "
        "those of the first reading are made from the layer's input, as in the paper; padding is left out behind the "
        "features (the authors' code leaves it out before, where it still counts); the windows and convolutions of "
        "the authors' models are other layers; nothing is added to the sum of the weights",
        use="to train models that answer about a text known before they begin to write",
        misleads="the loss on tokens of the prefix means nothing, they have seen what follows; a text that comes in "
        "pieces smaller than the prefix is read twice only as far as the first one goes",
        claims=("reading_twice",),
    )
    test_params: ClassVar = ({"length": 3}, {"length": 2, "feature_dim": 3})

    def learned(self, sizes: Sizes) -> nn.Module:
        return Twice(self.feature_dim, sizes)

    def queries(self, heads: Heads) -> Float[Tensor, "batch heads time key"]:
        assert isinstance(heads.learned, Twice)
        return heads.learned.narrow.queries(heads.q)

    def keys(self, heads: Heads) -> Float[Tensor, "batch kv_heads time key"]:
        assert isinstance(heads.learned, Twice)
        return heads.learned.narrow.keys(heads.k)

    def flow(
        self, heads: Heads, state: State | None, form: Form = "auto"
    ) -> tuple[Float[Tensor, "batch heads time value_dim"], State]:
        tokens, scan = heads.tokens, self.scan(heads)
        if tokens.opens is not None:
            raise NotSupported("of packed texts only the first has its prefix read twice; give one text per row")
        assert isinstance(heads.learned, Twice)
        # a text that an earlier call began had its prefix there
        begins = (tokens.real & (tokens.place == 0)).any(1, keepdim=True)
        early = tokens.real & (tokens.place < self.length) & begins
        before = scan.empty() if not state else state["state"]
        out, after = run(scan, before + heads.learned.first(tokens.x, early).to(before), form)
        return out, {"state": after}


class Twice(nn.Module):
    """What the two readings learn in one layer.

    Args:
        dim: Width of a projected query or key.
        sizes: Sizes of the layer.
    """

    def __init__(self, dim: int, sizes: Sizes) -> None:
        super().__init__()
        self.narrow, self.kv_heads = Narrow(dim, sizes), sizes.kv_heads
        self.k_proj = nn.Linear(sizes.width, sizes.kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(sizes.width, sizes.kv_heads * sizes.value_dim, bias=False)

    def first(
        self, x: Float[Tensor, "batch time width"], early: Bool[Tensor, "batch time"]
    ) -> Float[Tensor, "batch kv_heads key written"]:
        """E, with e as its last column, of the tokens that are in a prefix."""
        k, v = (p(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2) for p in (self.k_proj, self.v_proj))
        k = second_order(k) * early[:, None, :, None]
        return k.transpose(2, 3) @ torch.cat([v, torch.ones_like(v[..., :1])], -1).to(k)
