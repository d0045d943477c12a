r"""Stochastic subsampling: in training a layer looks at a part of the keys, drawn anew each time.

Information runs through a transformer on many paths; training a random part of them at a time costs less and
regularises. At test time all are open, or several such parts vote.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.core import tiled
from foveate.core.card import Card, Needs
from foveate.core.errors import BadInput
from foveate.core.params import bounded
from foveate.core.rows import RowBlock, View
from foveate.core.rule import Rule, lse_of
from foveate.core.standing import Standing

__all__ = ["Subsampled", "ensemble"]

DRAWS = 2**31 - 1


@dataclass(frozen=True)
class Subsampled(Rule):
    r"""Softmax attention over a random part of the keys, the same for all heads of a layer.

        p_ij = softmax_j(s_ij)  over  S_i = {j : |i - j| < window, or j is drawn}

    Of each `every` keys in a row one is drawn, the first of a text always; keys nearer than `window` need not be. What
    is drawn depends on the draw, the layer and the place of the key in its text, so that padding, chunks and decoding
    change nothing.

    Args:
        every: One key of so many is looked at; attention costs that much less.
        window: Keys to either side, the token's own among them, that are looked at in any case.
        draw: 0: a new draw at each call in training, none at test time. Other numbers: this draw, always.

    Example:
        In training two calls look at different keys; at test time all are seen, or the mean of several draws is taken.

        >>> import torch, foveate
        >>> from foveate.replace import Subsampled
        >>> from foveate.replace.training.subsampled import ensemble
        >>> from foveate.testing import tiny
        >>> model, inputs = tiny.model("llama"), tiny.inputs("llama", length=24)
        >>> before = model(**inputs).logits
        >>> model = foveate.convert(model, Subsampled(every=4))
        >>> bool(torch.allclose(model(**inputs).logits, before, atol=1e-5))
        True
        >>> _ = model.train()
        >>> bool(torch.equal(model(**inputs).logits, model(**inputs).logits))
        False
        >>> tuple(ensemble(model.eval(), **inputs, samples=3).shape)
        (2, 24, 99)
    """

    every: int = bounded(4, 1, 64, grid=(2, 4, 8))
    window: int = bounded(0, 0, 1 << 20)
    draw: int = bounded(0, 0, DRAWS)

    card: ClassVar[Card] = Card(
        title="The Information Pathways Hypothesis: Transformers are Dynamic Self-Ensembles",
        year=2023,
        family="training",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES | Needs.TRAINING,
        equation="p_ij = softmax_j(s_ij) over j in a random S_i in training, over all j at test time",
        differs="the authors have published no code, and only what the abstract and their page say could be "
        "checked: that parts are drawn anew at each step, with a bias to near keys, and that a short dense tuning "
        "and an ensemble follow. How keys are drawn is ours: one of every few neighbours, not any few of the text, "
        "and near ones always. A draw is a function of the place, so that a decoded text meets the keys of its "
        "prefill. The first key of a text is always drawn, or early rows would see nothing. Cross-attention is left "
        "alone",
        use="Train on long texts for less, with less overfitting; then tune the last steps with every=1.",
        misleads="under a sliding window of the model's own shorter than 2 every - 1 a row may see nothing and give "
        "zeros",
        claims=("subsampled_training",),
    )
    identity: ClassVar[dict[str, Any] | None] = {"every": 1}
    test_params: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"draw": 1},
        {"every": 2, "draw": 5},
        {"every": 2, "window": 3, "draw": 2},
    )

    def prepare(self, view: View) -> View:
        draw = self.draw
        if not draw and view.training:
            draw = 1 + int(torch.randint(DRAWS - 1, ()))
        if not draw or view.layer.cross or self.every == 1:
            return view.but(rule=Rule())
        drawn = replace(self, draw=draw)
        if not self.window and tiled.refuses(view):
            return replace(drawn.thinned(view), rule=Rule())
        return view.but(rule=drawn)

    def score(self, block: RowBlock) -> Float[Tensor, "batch heads rows keys"]:
        mask = block.view.mask
        place = mask.key_place[:, block.first : block.last].long()
        n = place.div(self.every, rounding_mode="floor")
        drawn = (place == n * self.every + self.offset(n, block.view)) & (n >= 0)
        seen = drawn[:, None] | (block.distance < self.window)
        return torch.where(seen[:, None], Rule.score(self, block), -torch.inf)

    def normalise(
        self, block: RowBlock, scores: Float[Tensor, "batch heads rows keys"]
    ) -> Float[Tensor, "batch heads rows keys"]:
        # a row none of whose keys is drawn gives zeros, which the engine cannot know of
        return torch.exp(scores - lse_of(block, scores)[..., None].clamp_min(torch.finfo(scores.dtype).min))

    def shortcut(self, view: View) -> Float[Tensor, "batch heads query value_dim"] | None:
        """Near keys and drawn ones apart, each an interval, put together by their log-sum-exps."""
        if tiled.refuses(view):
            return None
        if not self.window:
            return tiled.attend(self.thinned(view))[0]
        mask, at = view.mask, view.mask.position.to(view.mask.low.dtype)
        low, high = mask.low, mask.high
        a, b = at - self.window + 1, at + self.window
        first, last = torch.maximum(low, a), torch.minimum(high, b)
        parts = [view.but(mask=replace(mask, low=torch.minimum(first, high), high=torch.maximum(last, low)))]
        for low_, high_ in ((low, torch.minimum(high, a)), (torch.maximum(low, b), high)):
            if bool((high_ > low_).any()):
                far = replace(mask, low=low_, high=torch.maximum(low_, high_), begin=mask.text_begin)
                parts.append(self.thinned(view.but(mask=far)))
        out, lse = merged([tiled.attend(replace(part, sinks=None)) for part in parts])
        return (out if view.sinks is None else tiled.with_sinks(out, lse, view.sinks)[0]).to(view.q.dtype)

    def offset(self, n: Int[Tensor, "*some"], view: View) -> Int[Tensor, "*some"]:
        """Which of its `every` keys the n-th stretch of a text gives."""
        drawn = noise(n, self.draw * 1_000_003 + view.layer.index) * self.every
        return drawn.long().masked_fill(n == 0, 0)

    def thinned(self, view: View) -> View:
        """The call with the drawn keys alone, so that all that follows costs less."""
        mask, keys = view.mask, view.keys
        begin = mask.text_begin.long()[:, None]
        n = torch.arange(max(1, -(-(keys - int(begin.min())) // self.every)), device=view.q.device)
        # ascending, so that the keys that a row may see are consecutive here, too
        at = begin + n * self.every + self.offset(n, view)
        take, there = at.clamp(0, keys - 1), (at >= 0) & (at < keys)
        entries = max(len(at), len(mask.low))
        low, high = (
            torch.searchsorted(*(x.expand(entries, -1).contiguous() for x in (at, t.long()))).to(t.dtype)
            for t in (mask.low, mask.high)
        )

        def dense(a: int, b: int, i: int, j: int) -> Tensor:
            assert mask.dense is not None
            shown = taken(mask.dense(a, b, 0, keys), take[:, i:j], 3)
            return torch.where(there[:, None, None, i:j], shown, -torch.inf)

        return replace(
            view,
            k=taken(view.k, take, 2),
            v=taken(view.v, take, 2),
            bias=None if view.bias is None else taken(view.bias, take, 3),
            tokens=None if view.tokens is None else taken(view.tokens, take, 1),
            mask=replace(
                mask,
                low=low,
                high=high,
                keys=len(n),
                begin=mask.text_begin,
                dense=None if mask.dense is None else dense,
            ),
        )


def taken(x: Tensor, take: Int[Tensor, "#batch some"], dim: int) -> Tensor:
    """These places of a dimension, for each entry of the batch its own."""
    if len(take) == 1:
        return x.index_select(dim, take[0])
    shape = [1] * x.ndim
    shape[0], shape[dim] = take.shape
    return torch.take_along_dim(x, take.reshape(shape), dim)


def merged(
    parts: Sequence[tuple[Float[Tensor, "batch heads query value_dim"], Float[Tensor, "batch heads query"]]],
) -> tuple[Float[Tensor, "batch heads query value_dim"], Float[Tensor, "batch heads query"]]:
    """Attention over all keys, from that over some of them each: outputs and log-sum-exps."""
    lses = torch.stack([lse for _, lse in parts])
    whole = torch.logsumexp(lses, 0)
    # a row that sees nothing has nothing to be put together
    shares = torch.exp(lses - whole.masked_fill(whole == -torch.inf, 0.0))
    out = sum(share[..., None] * part for share, (part, _) in zip(shares, parts, strict=True))
    assert isinstance(out, Tensor)
    return out, whole


def noise(n: Int[Tensor, "*some"], key: int) -> Float[Tensor, "*some"]:
    """A number from 0 to below 1 for each whole number, by scrambling its bits (SplitMix64), without a state."""
    x = (n.long() + key) * -7046029254386353131
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * -4658895280553007687
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * -7723592293110705685
    x = x ^ (x >> 31 & (1 << 33) - 1)
    # 24 bits are what float32 holds
    return (x >> 40 & (1 << 24) - 1).float() / (1 << 24)


def ensemble(model: nn.Module, *args: Any, samples: int = 8, **inputs: Any) -> Float[Tensor, "*batch vocabulary"]:
    """Logarithms of the mean probabilities that a model gives under so many draws of its keys.

    Args:
        model: A model with `Subsampled` in its attention layers; its output is logits, or has them as `logits`.
        args: What it is called with, in order.
        samples: How many draws.
        inputs: What it is called with, by name.

    Raises:
        BadInput: no layer of it subsamples; no draws.
    """
    standing = [m for m in model.modules() if isinstance(m, Standing) and isinstance(m.operator, Subsampled)]
    if not standing:
        raise BadInput(f"no attention of {type(model).__name__} subsamples; foveate.convert(model, 'subsampled') first")
    if samples < 1:
        raise BadInput(f"samples={samples}: an ensemble has 1 or more")
    total: Tensor | None = None
    for draw in range(1, samples + 1):
        with drawn(standing, draw):
            out = model(*args, **inputs)
        scores = torch.log_softmax(getattr(out, "logits", out).float(), -1)
        total = scores if total is None else torch.logaddexp(total, scores)
    assert total is not None
    return total - math.log(samples)


@contextmanager
def drawn(standing: list[Standing], draw: int) -> Iterator[None]:
    """All of these under one draw."""
    before = [m.operator for m in standing]
    try:
        for m in standing:
            m.operator = replace(m.operator, draw=draw)  # type: ignore[call-arg]
        yield
    finally:
        for m, operator in zip(standing, before, strict=True):
            m.operator = operator
