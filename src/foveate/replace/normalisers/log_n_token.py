r"""Log-n scaling of the special token: what reads the whole text stays as choosy as it was on shorter ones.

    s'_0j = (ln n / ln N) s_0j

n is the number of keys that the special token (the first of its text, [CLS]) sees and N the number that it saw in
training. The scores of all other tokens stay, for they look at windows whose length never changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate.core.card import Card, Needs
from foveate.core.params import bounded
from foveate.core.rows import View
from foveate.core.rule import Rule
from foveate.replace.normalisers._counts import keys_seen

__all__ = ["LogNToken"]


@dataclass(frozen=True)
class LogNToken(Rule):
    """Softmax attention in which the first tokens of a text have scores in proportion to the logarithm of its length.

    Args:
        trained: N, the number of keys at which nothing changes: the length of the texts in training.
        tokens: How many first tokens are special; 0 changes nothing.

    Example:
        On a text of 12 tokens, the first output of an encoder changes, and the others with it from the second layer on.

        >>> import foveate
        >>> from foveate.replace import LogNToken
        >>> from foveate.testing import tiny
        >>> model, inputs = tiny.model("bert"), tiny.inputs("bert", length=12)
        >>> before = model(**inputs)[0]
        >>> model = foveate.convert(model, LogNToken(trained=512))
        >>> after = model(**inputs)[0]
        >>> bool((after - before)[:, 0].abs().max() > 1e-6)
        True
    """

    trained: int = bounded(512, 2, 1 << 30)
    tokens: int = bounded(1, 0, 64)

    card: ClassVar = Card(
        title="Small Language Model Makes an Effective Long Text Extractor",
        year=2025,
        family="normalisers",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES,
        equation="s'_0j = (ln n / ln N) s_0j",
        differs="n counts the keys that the token sees; the paper's code counts the padding to whole windows with "
        "them. The windows of the other tokens, with which the paper has it, are a pattern of their own",
        use="to embed long texts by their first token with an encoder of short ones",
        misleads="on texts shorter than N it flattens the row of the special token",
    )
    # in a decoder the first token sees only itself
    causal: ClassVar = False
    identity: ClassVar = {"tokens": 0}
    test_params: ClassVar = ({}, {"trained": 8, "tokens": 2}, {"tokens": 0})

    def prepare(self, view: View) -> View:
        mask = view.mask
        if not self.tokens or view.layer.cross:
            return view
        place = mask.position - mask.starts
        special = (mask.starts >= 0) & (place >= 0) & (place < self.tokens)
        n = keys_seen(mask).clamp_min(1).to(torch.promote_types(view.q.dtype, torch.float32))
        factor = torch.where(special[:, None], n.log() / math.log(self.trained), 1.0)[..., None]
        # a bias of the model, by relative position as in the paper's encoder, is part of the score
        bias = view.bias
        if bias is not None:
            bias = torch.where(bias == -torch.inf, bias, bias * factor.to(bias.dtype))
        return view.but(q=view.q * factor.to(view.q.dtype), bias=bias)
