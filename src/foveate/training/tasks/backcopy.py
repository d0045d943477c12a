r"""Bigram-backcopy: a text of pairs, in which some tokens call for the token before them.

    x_{n+1} = x_{n-1}                where x_n is a trigger
    x_{n+1} \sim P(. | x_n)          elsewhere

Behind a trigger, a head must look one token back; elsewhere no head has anything to add to what the token itself says
of the next. Softmax must put its weight somewhere even so: it goes to the first token, whose value shrinks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core.errors import BadInput
from foveate.core.params import bounded
from foveate.core.reductions import Last
from foveate.core.rows import attend
from foveate.core.rule import Rule
from foveate.training.model import Decoder
from foveate.training.run import Optimisation, Size, Usual
from foveate.training.task import Batch, Column, Measure, Plot, TrainingTask
from foveate.training.tasks.characters import encoded

__all__ = ["Backcopy"]


@dataclass(frozen=True)
class Backcopy(TrainingTask):
    """Bigrams of a text's characters, and triggers that copy from behind.

    Three measures are of the head with the largest `sink`, its share of weight on the first token in rows that are no
    trigger: that, `sink_at_triggers`, the same at triggers, and `value_drain`, the norm of the value at the first token
    over the mean of the others. `residual_peak` is that ratio for the residual stream behind the last layer, `excess`
    the loss outside of triggers less that of the true bigrams, `copy_loss` the loss at triggers.

    Args:
        length: Tokens of a sequence, the first being its begin.
        triggers: The most frequent characters, so many, are triggers.
        tokens: The most frequent characters that are used, the begin not counted.
        text: The text whose bigrams count; None takes `default_text()`.

    Source: Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs. There the text
    is Shakespeare's, the length 256, the width 256, with positions that are learnt. Weights that do not sum to 1, as
    those of ReLU, are measured as shares of their row; a row without any weight counts as 0.
    """

    length: int = bounded(64, 4, 1 << 14)
    triggers: int = bounded(3, 1, 64)
    tokens: int = bounded(64, 4, 255)
    text: str | None = None

    title: ClassVar[str] = "bigram-backcopy"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("sink", "weight on the first token", share=True),
        Column("sink_at_triggers", "the same, at triggers", share=True),
        Column("value_drain", "norm of its value / others"),
        Column("residual_peak", "norm of its residual / others"),
        Column("copy_loss", "loss at triggers"),
        Column("excess", "loss above the best elsewhere"),
    )
    plots: ClassVar[tuple[Plot, ...]] = (
        Plot(
            ("sink", "sink_at_triggers"),
            "step",
            "share of weight on the first token: elsewhere, at triggers",
            share=True,
        ),
        Plot(("value_drain",), "step", "norm of the value at the first token, over the mean of the others"),
        Plot(("residual_peak",), "step", "norm of the residual stream there, over the mean of the others"),
        Plot(("copy_loss", "excess"), "step", "loss at triggers; excess over the bigrams' own loss elsewhere"),
    )

    @property
    def vocabulary(self) -> int:
        return self.tokens + 1

    @property
    def longest(self) -> int:
        return self.length

    @property
    def law(self) -> tuple[Float[Tensor, "before next"], Int[Tensor, " triggers"]]:
        """P(next | before), where the begin comes last, and the triggers."""
        return bigrams(self.text, self.tokens, self.triggers)

    def batch(self, draw: torch.Generator, count: int) -> Batch:
        p, triggers = self.law
        copies = torch.isin(torch.arange(self.vocabulary), triggers)
        x = [torch.full((count,), self.tokens)]
        for n in range(self.length):
            drawn = torch.multinomial(p[x[-1]], 1, generator=draw)[:, 0]
            x.append(torch.where(copies[x[-1]], x[n - 1], drawn) if n else drawn)
        whole = torch.stack(x, 1)
        return Batch(whole[:, :-1], whole[:, 1:])

    def judge(self, model: Decoder, draw: torch.Generator, count: int) -> list[Measure]:
        p, triggers = self.law
        batch = self.batch(draw, count)
        at = torch.isin(batch.inputs, triggers)
        others = ~at
        others[:, 0] = False
        loss = model.answers(batch)[0].view_as(at).double()
        best = -p[batch.inputs, batch.targets].log()
        found = {"copy_loss": loss[at].mean().item(), "excess": (loss - best)[others].mean().item()}
        states = dict(model.stages(batch.inputs))
        found["residual_peak"] = peak(list(states.values())[-2].norm(dim=-1)).mean().item()
        heads = [head for n in range(model.size.layers) for head in self.heads(model, states, n, at, others)]
        if heads:
            sink, active, drain = max(heads)
            found |= {"sink": sink, "sink_at_triggers": active, "value_drain": drain}
        return [Measure(name, value) for name, value in found.items()]

    def heads(
        self,
        model: Decoder,
        states: dict[str, Tensor],
        layer: int,
        at: Bool[Tensor, "batch row"],
        others: Bool[Tensor, "batch row"],
    ) -> list[tuple[float, float, float]]:
        """Share on the first token elsewhere and at triggers, and value there over the others', of each head."""
        names, block = list(states), model.layer(layer)
        before = states[names[names.index(f"layer {layer}, attention") - 1]]
        rule = block.attention.rule
        if rule is not None and not isinstance(rule.operator, Rule):
            return []
        every = Last(before.shape[1])
        seen = attend(block.attention.view(block.read(before)), (every,))
        weights, values = seen[every].weights, seen.view.v
        share = weights[..., 0].abs() / weights.abs().sum(-1).clamp_min(torch.finfo(weights.dtype).tiny)
        drains = peak(values.norm(dim=-1)).mean(0).repeat_interleave(weights.shape[1] // values.shape[1])
        rows = [share[:, h] for h in range(share.shape[1])]
        return [(s[others].mean().item(), s[at].mean().item(), d.item()) for s, d in zip(rows, drains, strict=True)]

    @classmethod
    def usual(cls, quick: bool) -> Usual:
        mixers = ("softmax", "relu")
        if quick:
            size = Size(width=32, layers=1, feed_forward=4)
            trained = Optimisation(steps=250, batch=32, rate=0.005, decay=1e-4)
            return Usual(cls(length=32), (size,), trained, mixers, judged=64, every=50)
        size = Size(width=64, layers=1, feed_forward=4)
        return Usual(cls(), (size,), Optimisation(steps=1000, batch=32, decay=1e-4), mixers, judged=128, every=100)


def peak(norms: Float[Tensor, "*rows position"]) -> Float[Tensor, "*rows"]:
    """The norm at the first token over the mean of the others."""
    return norms[..., 0] / norms[..., 1:].mean(-1)


@cache
def bigrams(
    text: str | None, tokens: int, triggers: int
) -> tuple[Float[Tensor, "before next"], Int[Tensor, " triggers"]]:
    """P(next | before) among the most frequent characters, the begin behind them, and the most frequent of all.

    The begin is followed by what is no trigger, as often as it occurs.
    """
    ids, many = encoded(text, tokens)
    rare = many - 1
    if rare <= triggers:
        raise BadInput(f"the text has {rare} different characters; {triggers} triggers need a text with more")
    ids = ids[ids != rare]
    counts = torch.zeros(rare, rare, dtype=torch.float64)
    counts.index_put_((ids[:-1], ids[1:]), torch.ones(len(ids) - 1, dtype=torch.float64), accumulate=True)
    often = torch.bincount(ids, minlength=rare).double()
    most = often.argsort(descending=True, stable=True)[:triggers]
    first = often.clone()
    first[most] = 0
    p = torch.zeros(tokens + 1, tokens + 1, dtype=torch.float64)
    p[:rare, :rare] = torch.where(counts.sum(1, keepdim=True) > 0, counts, often)
    p[tokens, :rare] = first
    # characters that the text does not have are never drawn
    p[rare:tokens, :rare] = first
    return p / p.sum(1, keepdim=True), most
