r"""Part removal: layers without their attention or without their feed-forward, and attention without some heads.

    x' = x + attention(norm(x))       x' = x       where the attention of a layer is gone
    x' = x + feed_forward(norm(x))    x' = x       where its feed-forward is gone

Which parts a model can do without is found greedily: of all parts P that are left, the one goes without which the
output is nearest to that of the whole model, \arg\min_P D(model, model without P and what has gone before), again and
again.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from foveate.compress.prune._greedy import DISTANCES, Greedy, Step, pieces
from foveate.core.card import Card, Needs
from foveate.core.errors import BadInput
from foveate.core.mechanism import Parts, Pruner
from foveate.core.places import Head, Heads, Indices, Layers
from foveate.core.removing import KINDS
from foveate.probe.ledger import Ledger, circumstances

__all__ = ["Course", "PartRemoval"]


@dataclass(frozen=True)
class SingleHeads(Heads):
    """Heads, none unless they are named."""

    empty: ClassVar = "() is none"


def some(bounds: Indices | Heads) -> Any:
    """A dataclass field that names what goes."""
    return dataclasses.field(default=(), metadata={"bounds": bounds})


@dataclass(frozen=True)
class PartRemoval(Pruner):
    """Takes parts of layers out: attached, for a `with` block; applied with a plan, for good, and their memory is free.

    The norm of a part goes with it, and so does the KV cache of a layer without attention. Layers keep their numbers,
    for all that is attached or planned beside it. The heads that are left in a layer are counted anew.

    Args:
        attention: Layers whose attention goes.
        feed_forward: Layers whose feed-forward goes.
        heads: (layer, head) of single heads that go, of models with a projection of their own for queries, keys and
            values; heads that share a key go together.

    Example:
        The two-layer model needs both of its attentions: the first tells each token what stood before it, the second
        looks that up. It has no use for its feed-forward parts.

        >>> import foveate
        >>> from foveate.compress import PartRemoval
        >>> from foveate.testing import handmade, tiny
        >>> model, text = handmade.model(), handmade.ids("abcabcab")
        >>> c = tiny.tokenizer().get_vocab()["c"]
        >>> with foveate.attach(model, PartRemoval(feed_forward=(0, 1))):
        ...     round(model(text).logits[0, -1].softmax(-1)[c].item(), 2)
        1.0
        >>> with foveate.attach(model, PartRemoval(attention=(0,))):
        ...     round(model(text).logits[0, -1].softmax(-1)[c].item(), 2)
        0.06

        `fit` finds what can go, and says what it costs.

        >>> found = PartRemoval.fit(model, text, count=3)
        >>> for step in found.steps:
        ...     print(step.kind, step.layer, round(step.distance, 2))
        feed_forward 0 0.0
        feed_forward 1 0.0
        attention 0 0.31
        >>> found.after(2)
        PartRemoval(attention=(), feed_forward=(0, 1), heads=())
    """

    attention: tuple[int, ...] = some(Layers())
    feed_forward: tuple[int, ...] = some(Layers())
    heads: tuple[Head, ...] = some(SingleHeads())

    card: ClassVar = Card(
        title="FinerCut: Finer-grained Interpretable Layer Pruning for Large Language Models",
        year=2024,
        family="prune",
        needs=Needs.MODEL,
        equation="x' = x instead of x + part(norm(x)); next to go: argmin_P D(model, model without P and those before)",
        differs="single heads are added, which are named and not searched. The Jensen-Shannon divergence is half of "
        "KL(p || m) + KL(q || m), m the mean of both; published code has KL(m || p) and KL(m || q). It is a mean over "
        "tokens, there over tokens and vocabulary. Published code measures on 10 texts of up to 256 tokens, here on "
        "what is given; it can spare a share of the first layers until as many others are gone, here `first` spares "
        "them for good. The last attention never goes: a KV cache counts its tokens there",
        use="to make a model smaller and faster without training, where a task's score says that it can still do it",
        misleads="the output on calibration texts tells little of a task: judge by the task's own score, on examples "
        "that were not used here; what is left out for one kind of text may be needed for another",
        claims=("part_removal",),
    )
    identity: ClassVar = {"attention": (), "feed_forward": (), "heads": ()}
    test_params: ClassVar = (
        {"attention": (0,)},
        {"feed_forward": (1,)},
        {"attention": (1,), "feed_forward": (0, 1)},
        {"heads": ((0, 0), (0, 1))},
        {"attention": (0,), "heads": ((1, 2), (1, 3))},
        {},
    )

    def sets(self) -> frozenset[tuple]:
        """Heads that are taken out."""
        return frozenset(("layer", layer, "head", head) for layer, head in self.heads)

    def parts(self) -> Parts:
        return Parts(self.attention, self.feed_forward, self.heads)

    @classmethod
    def fit(
        cls,
        model: Any,
        ids: Tensor | Sequence[Tensor],
        *,
        count: int,
        among: Sequence[str] = KINDS,
        measure: str = "divergence",
        first: int = 0,
        progress: Callable[[int, int], None] | None = None,
        file: str | Path | None = None,
    ) -> Course:
        """Takes out part after part, each time the one without which the output changes least.

        It tries every part that is left in each step: about count x parts runs of half the model. The logits of the
        whole model and the hidden states of all layers are held, so that a few thousand tokens are enough.

        Args:
            model: A causal language model; it comes out as it went in.
            ids: Calibration texts: token ids, [texts, tokens] without padding, or several of those.
            count: How many parts go.
            among: What may go: attention, feed_forward, or both.
            measure: What is compared with the whole model: "divergence" (Jensen-Shannon, of the next-token
                distributions), "norm" or "angle" (of the logits).
            first: The first layer that may lose a part.
            progress: Called with the tries done, and how many there are at most.
            file: Where steps are kept as they come (JSON lines); those that are there from an interrupted search, or
                from one for fewer parts, are not looked for again.

        Returns:
            The steps, and with them the mechanism.

        Raises:
            BadInput: more parts than there are, or a word or a text that cannot be.
            NotSupported: the model's parts cannot be told apart.
        """
        if measure not in DISTANCES:
            raise BadInput(f"PartRemoval.fit(measure={measure!r}): give one of {', '.join(DISTANCES)}")
        if not among or not set(among) <= set(KINDS):
            raise BadInput(f"PartRemoval.fit(among={among!r}): give attention, feed_forward, or both")
        texts = pieces(ids, model)
        search = Greedy(model, texts, measure)
        left = search.left(among, first)
        if not left:
            last = max(layer for _, layer in search.found)
            raise BadInput(f"PartRemoval.fit(first={first}): the last layer is {last}; give one that is there")
        # one attention of the model always stays
        most = len(left) - (sum(b.kind == "attention" for b in left) == len(search.attention))
        if not most:
            raise BadInput(
                f"PartRemoval.fit(among={among!r}): {type(model).__name__} has attention in one layer only, and the "
                "last attention never goes, as a KV cache counts its tokens there; let feed_forward parts go"
            )
        if not 1 <= count <= most:
            raise BadInput(f"PartRemoval.fit(count={count}): from 1 to {most} of these parts can go")
        ledger = Ledger(file)
        read = [one.tolist() for one in texts]
        asked = "part_removal", circumstances(model), read, sorted(set(among)), measure, first
        keys = [Ledger.key(*asked, n) for n in range(count)]
        done = [Step.read(ledger[key]) for key in itertools.takewhile(ledger.__contains__, keys)]
        total, ticks = sum(len(left) - n for n in range(len(done), count)) * len(texts), itertools.count(1)

        def tick() -> None:
            if progress is not None:
                progress(next(ticks), total)

        def keep(n: int, step: Step) -> None:
            ledger.add(keys[n], dataclasses.asdict(step))

        return Course(search.steps(count, left, tick, done, keep), measure, sum(one.numel() for one in texts))


@dataclass(frozen=True)
class Course:
    """What went, step by step.

    Args:
        steps: The steps.
        measure: What was compared.
        tokens: On how many tokens.
    """

    steps: tuple[Step, ...]
    measure: str
    tokens: int

    @property
    def mechanism(self) -> PartRemoval:
        """All of it."""
        return self.after(len(self.steps))

    def after(self, count: int) -> PartRemoval:
        """What is gone after the first steps."""
        attention, feed_forward = (
            tuple(sorted(s.layer for s in self.steps[:count] if s.kind == kind)) for kind in KINDS
        )
        return PartRemoval(attention, feed_forward)

    def evidence(self) -> dict[str, Any]:
        """The steps as a plan keeps them."""
        return {"measure": self.measure, "tokens": self.tokens, "steps": [dataclasses.asdict(s) for s in self.steps]}
