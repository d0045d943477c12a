r"""Key bias: one more key that no token stands behind, for what a row has no use for.

    p_ij = exp(s_ij) / (exp(s*_i) + \sum_k exp(s_ik)),    s*_i = scale q_i . k*
    o_i  = \sum_j p_ij v_j + (1 - \sum_j p_ij) v*

Where attention rests on the first token it rests there as on a bias: the sink stores scores and gives no value. A key
k* of its own with v* = 0 takes that place; s*_i = 0 is softmax "off by one", which may attend to nothing. In other
words, each output of softmax is multiplied by the sigmoid of lse_i - s*_i.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core import tiled
from foveate.core.card import Card, Needs
from foveate.core.params import choice
from foveate.core.rows import RowBlock, View
from foveate.core.rule import Rule, Sizes, lse_of

__all__ = ["Extra", "KeyBias"]

DEVIATION = 0.02


class Extra(torch.nn.Module):
    """The extra key of each query head, or its score, and its value.

    Args:
        sizes: Sizes of the layer.
        key: As of `KeyBias`.
        value: As of `KeyBias`.
    """

    def __init__(self, sizes: Sizes, key: str, value: bool) -> None:
        super().__init__()
        if key == "learned":
            self.key = torch.nn.Parameter(torch.randn(sizes.heads, sizes.head_dim) * DEVIATION)
        if key == "score":
            self.score = torch.nn.Parameter(torch.zeros(sizes.heads))
        if value:
            self.value = torch.nn.Parameter(torch.randn(sizes.heads, sizes.value_dim) * DEVIATION)


@dataclass(frozen=True)
class KeyBias(Rule):
    """Softmax over the keys and one more key per head, which has no token.

    Args:
        key: What the extra key is: a `learned` vector; a learned `score`, the same for all rows; `zero`, a score of 0
            that nothing learns (softmax off by one); or `none`.
        value: Whether a value is learned for it; otherwise it is zero. Without a key, it is added to each output.

    Example:
        Softmax off by one halves a row that agrees with its one key as little as with nothing.

        >>> import torch, foveate
        >>> from foveate.replace import KeyBias
        >>> plain = foveate.nn.Attention(8, heads=2)
        >>> other = foveate.nn.Attention(8, heads=2, rule=KeyBias(key="zero"))
        >>> other.load_state_dict(plain.state_dict(), strict=False).missing_keys
        ['rule._extra_state']
        >>> for module in (plain, other):
        ...     _ = torch.nn.init.zeros_(module.q_proj.weight)
        >>> x = torch.randn(1, 1, 8)
        >>> bool(torch.allclose(other(x), plain(x) / 2))
        True
    """

    key: str = choice("learned", "learned", "score", "zero", "none")
    value: bool = choice(False, False, True)

    card: ClassVar = Card(
        title="When Attention Sink Emerges in Language Models: An Empirical View",
        year=2024,
        family="normalisers",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES,
        equation="p_ij = exp(s_ij) / (exp(scale q_i . k*) + sum_k exp(s_ik))",
        differs="nothing known with a learned key, a learned value, or both, each query head having its own. A score "
        "is learned in gpt-oss, here from 0 on; a score of 0 is Attention Is Off By One (Miller, 2023). A sink that "
        "the model has already stays beside it, and what it takes gives the learned value too. A row that sees no "
        "token gives zeros, not the value",
        use="to train a model whose sink is no token, so that the first one can be dropped or mean something",
        misleads="with rotary positions the score of a learned key depends on where in the text a query stands; and a "
        "loaded model that rests on its first token goes on doing so until it is trained",
    )
    identity: ClassVar = {"key": "none", "value": False}
    test_params: ClassVar = (
        {},
        {"value": True},
        {"key": "score"},
        {"key": "zero"},
        {"key": "none", "value": True},
        {"key": "none"},
    )

    def learned(self, sizes: Sizes) -> torch.nn.Module | None:
        return Extra(sizes, self.key, self.value) if self.value or self.key in ("learned", "score") else None

    def prepare(self, view: View) -> View:
        if not self.value or self.key == "none":
            return view
        # sum_j p_ij v_j + (1 - sum_j p_ij) v* = sum_j p_ij (v_j - v*) + v*: no row need know what the extra key takes
        k, v = (t.repeat_interleave(view.grouped, 1) for t in (view.k, view.v))
        return view.but(k=k, v=v - self.added(view).to(v.dtype))

    def finish(
        self, view: View, out: Float[Tensor, "batch heads query value_dim"]
    ) -> Float[Tensor, "batch heads query value_dim"]:
        if not self.value:
            return out
        sees = (view.mask.high > view.mask.low)[:, None, :, None]
        return out + torch.where(sees, self.added(view).to(out.dtype), 0.0)

    def normalise(
        self, block: RowBlock, scores: Float[Tensor, "batch heads rows keys"]
    ) -> Float[Tensor, "batch heads rows keys"]:
        if self.key == "none":
            return Rule.normalise(self, block, scores)
        lse = lse_of(block, scores)
        whole = torch.logaddexp(lse, self.score_beside(block.view, block.q, lse))
        return torch.exp(scores - whole[..., None])

    def shortcut(self, view: View) -> Float[Tensor, "batch heads query value_dim"] | None:
        if tiled.refuses(view):
            return None
        out, lse = tiled.attend(view)
        if self.key == "none":
            return out
        share = torch.sigmoid(lse - self.score_beside(view, view.q.to(lse.dtype), lse))
        return (out * share[..., None]).to(out.dtype)

    def added(self, view: View) -> Float[Tensor, "heads 1 value_dim"]:
        """v* of each head."""
        assert view.learned is not None
        return view.learned.get_parameter("value")[:, None]

    def score_beside(
        self, view: View, q: Float[Tensor, "batch heads rows dim"], lse: Float[Tensor, "batch heads rows"]
    ) -> Float[Tensor, "#batch #heads #rows"]:
        """s*_i, the score of the extra key in rows that have the log-sum-exp `lse` without it."""
        if self.key == "zero":
            return lse.new_zeros(1, 1, 1)
        assert view.learned is not None
        if self.key == "score":
            return view.learned.get_parameter("score").to(lse.dtype)[None, :, None]
        # a query that sees nothing may be NaN
        q = torch.where((lse == -torch.inf)[..., None], 0.0, q)
        s = view.scale * (q * view.learned.get_parameter("key").to(q.dtype)[:, None]).sum(-1)
        return s if view.softcap is None else view.softcap * torch.tanh(s / view.softcap)
