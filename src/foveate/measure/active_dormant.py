r"""Active and dormant heads: sinks on one kind of text and at work on another.

    m_d            = mean over the rows of texts of kind d of p_{i, first}
    active_dormant = \max_{d, e} (m_d - m_e)

A head that parks its weight on the first token is dormant there: it adds next to nothing to the residual stream.
"""

from __future__ import annotations

import argparse
import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor, nn

from foveate.core.accumulate import Estimate, batch_means
from foveate.core.attach import attach
from foveate.core.card import Card, Needs
from foveate.core.errors import BadInput
from foveate.core.mechanism import ModelMetric
from foveate.core.params import bounded
from foveate.core.reductions import Match
from foveate.core.results import HEAD_COLUMNS
from foveate.core.rows import Rows
from foveate.measure._watch import Watch, seen

__all__ = ["KINDS", "ActiveDormant", "largest_difference", "pieces_of", "sink_mass"]


def prose() -> str:
    from pydoc_data.topics import topics

    return "\n".join(" ".join(topics[name].split()) for name in sorted(topics))


def code() -> str:
    return inspect.getsource(argparse)


def numbers() -> str:
    draw = random.Random(0)
    return "\n".join("\t".join(f"{draw.gauss(50, 20):.2f}" for _ in range(8)) for _ in range(8000))


def shuffled() -> str:
    words = prose().split()
    random.Random(0).shuffle(words)
    return " ".join(words)


KINDS: dict[str, Callable[[], str]] = {f.__name__: f for f in (prose, code, numbers, shuffled)}


@dataclass(frozen=True)
class ActiveDormant(ModelMetric):
    """How much a head's mass on the first token depends on the kind of text.

    `active_dormant` is the largest difference between two kinds. The mass on each of them is in
    `active_dormant_prose`, `active_dormant_code` (a module of Python's library), `active_dormant_numbers` (a table) and
    `active_dormant_shuffled` (the prose's words in random order).

    Args:
        length: Tokens per piece of text.
        pieces: Pieces per kind, each from another place.
        seed: Where the pieces begin.

    Raises:
        BadInput: a kind of text gives fewer tokens than are asked for, or the model has fewer positions.

    Example:
        The head `stop` looks at full stops, and waits at the first token while there is none: a table of numbers
        wakes it, prose mostly does not. No other head minds what kind of text it is.

        >>> from foveate.measure import ActiveDormant
        >>> from foveate.testing import handmade, tiny
        >>> model, tokenizer = handmade.model(), tiny.tokenizer()
        >>> table = ActiveDormant(length=24, pieces=2).measure(model, tokenizer)
        >>> found = handmade.named(table, "active_dormant", layer=1)
        >>> [name for name, difference in found.items() if difference > 0.5]
        ['stop']
        >>> handmade.named(table, "active_dormant_numbers", layer=1)["stop"]
        0.02
    """

    length: int = bounded(384, 16, 1 << 17)
    pieces: int = bounded(4, 2, 1000)
    seed: int = bounded(0, 0, (1 << 31) - 1)

    card: ClassVar = Card(
        title="Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs",
        year=2024,
        family="sinks",
        needs=Needs.MODEL | Needs.WEIGHTS,
        equation="max over kinds d, e of m_d - m_e, m_d = mean over rows of texts of kind d of p_{i,first}",
        differs="other texts (Python's documentation, source, a table, shuffled words) than Wikipedia and GitHub; the "
        "first token is what the tokenizer puts there, and no <bos> is forced on models that have none",
        use="to find heads that look useless on one kind of text and carry another",
        misleads="the largest of several differences is above 0 if nothing differs too: compare two halves of one kind",
        claims=("active_dormant",),
    )
    test_params: ClassVar = ({"length": 16, "pieces": 2}, {"length": 40, "pieces": 3, "seed": 3})

    def measure(self, model: nn.Module, tokenizer: Any) -> pd.DataFrame:
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and self.length > most:
            raise BadInput(f"pieces of {self.length} tokens; the model has {most} positions: lower length")
        mass = {
            kind: torch.stack(
                [
                    sink_mass(model, ids)
                    for ids in pieces_of(text(), tokenizer, self.length, self.pieces, self.seed, kind)
                ]
            )
            for kind, text in KINDS.items()
        }
        values = {"active_dormant": largest_difference(list(mass.values()))}
        for kind, m in mass.items():
            heads = m.flatten(1).T
            e = batch_means(heads, heads.new_ones(self.pieces), batches=self.pieces)
            values[f"active_dormant_{kind}"] = Estimate(e.value, e.low.clamp_min(0), e.high.clamp_max(1))
        at = torch.ones(next(iter(mass.values())).shape[1:]).nonzero()
        place = {"layer": at[:, 0].numpy(), "head": at[:, 1].numpy()}
        tables = [
            pd.DataFrame(place | {"metric": k, "value": e.value.numpy(), "low": e.low.numpy(), "high": e.high.numpy()})
            for k, e in values.items()
        ]
        return pd.concat(tables, ignore_index=True)[HEAD_COLUMNS]


def pieces_of(text: str, tokenizer: Any, length: int, pieces: int, seed: int, kind: str = "text") -> list[Tensor]:
    """Token ids [1, length] of pieces from different places, with what the tokenizer puts in front of a text.

    Raises:
        BadInput: the text is too short.
    """
    draw = random.Random(seed)
    lines = text.split("\n") if text.count("\n") > 100 else text.split(" ")
    glue = "\n" if text.count("\n") > 100 else " "
    found = []
    for n in range(pieces):
        # one piece from each stretch of the text, so that none overlaps
        first, last = n * len(lines) // pieces, (n + 1) * len(lines) // pieces
        start = draw.randrange(first, max(first + 1, first + (last - first) // 2))
        # 12 characters are more than any tokenizer here packs into a token of running text
        part = glue.join(lines[start:last])[: 12 * length]
        ids = tokenizer(part)["input_ids"][:length]
        if len(ids) < length:
            raise BadInput(f"{kind}: a piece has {len(ids)} tokens, {length} are asked for; lower length or pieces")
        found.append(torch.tensor([ids]))
    return found


@torch.no_grad()
def sink_mass(model: Any, ids: Tensor) -> Float[Tensor, "layers heads"]:
    """Mean mass on the first token over the rows of one text, without the first row, which has no choice."""

    def read(rows: Rows) -> Tensor | None:
        return None if rows.layer.cross else rows[Match("first")][0, :, 1:].double().mean(1).cpu()

    with attach(model, Watch(read, (Match("first"),))) as attached:
        model.base_model(input_ids=ids.to(next(model.parameters()).device))
        return torch.stack([calls[0] for calls in seen(attached).values() if calls[0] is not None])


def largest_difference(mass: list[Float[Tensor, "_ layers heads"]]) -> Estimate:
    """The largest difference of means between two kinds, with Welch's interval over pieces for that pair."""
    x = [m.flatten(1) for m in mass]
    mean, error = torch.stack([m.mean(0) for m in x]), torch.stack([m.var(0) / len(m) for m in x])
    top, bottom = mean.argmax(0, keepdim=True), mean.argmin(0, keepdim=True)
    value = (mean.gather(0, top) - mean.gather(0, bottom))[0]
    e = torch.cat([error.gather(0, top), error.gather(0, bottom)])
    free = torch.tensor([len(m) - 1 for m in x], dtype=torch.float64)[torch.cat([top, bottom])]
    freedom = e.sum(0).square() / (e.square() / free).sum(0).clamp_min(1e-300)
    half = torch.from_numpy(stats.t.ppf(0.975, freedom.clamp_min(1).numpy())) * e.sum(0).sqrt()
    return Estimate(value, value - half, value + half)
