"""Whole tiny models under a KV policy: a prompt, at once or in chunks, and then token by token."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from foveate.core.attach import attach
from foveate.core.budget import Amount, Budget
from foveate.core.cache import RaggedLayer, ragged_layers
from foveate.core.card import Card, Needs
from foveate.core.mechanism import Edit, Policy
from foveate.core.policy import Held, Reading
from foveate.core.ragged import EMPTY
from foveate.testing import tiny

__all__ = [
    "Everything",
    "HideDropped",
    "Run",
    "Witness",
    "chooses",
    "company",
    "decoded",
    "ids_of",
    "left_padded",
    "padded_ids",
    "positions",
    "run",
    "run_masked",
    "tight",
    "whole",
]

PROMPT = 41
STEPS = 9
# room for a choice: 41 tokens, of which about 16 stay
SMALL: dict[str, Any] = {"keep": 0.4, "sinks": 2, "recent": 3, "every": 3}


LITTLE = Budget(**SMALL)


def tight(m: Policy, **changed: Any) -> Policy:
    """The policy with a budget that leaves it something to choose at the length of the checks."""
    return m.within(replace(m.limits, **(SMALL | changed))) if chooses(m) else m


def whole(m: Policy) -> Policy:
    """The policy with a budget that keeps everything."""
    return m.within(Budget(1.0, every=m.limits.every)) if chooses(m) else m


def chooses(m: Policy) -> bool:
    """Whether a budget says how much of the cache it keeps or reads."""
    return bool(m.parts & {"score", "read"})


@dataclass(frozen=True)
class Oldest(Policy):
    """Drops old entries: for what acts on entries that go, and chooses none itself.

    Args:
        budget: How many entries each KV head keeps.
    """

    budget: Amount = LITTLE

    card: ClassVar = Card("a test", 2026, "test", Needs.KEYS, "none", "nothing known", "in tests")

    def score(self, held: Held) -> Tensor:
        return held.position.float()


@dataclass(frozen=True)
class Everything(Oldest):
    """Keeps all, as it comes.

    Args:
        budget: All.
    """

    budget: Amount = 1.0


def company(m: Policy) -> tuple[Policy, ...]:
    """The policy, behind one that drops entries where it does nothing without."""
    return (Oldest(), m) if "merge" in m.parts and "score" not in m.parts else (m,)


@dataclass(eq=False)
class Run:
    """What a model said, and what its cache held after each call.

    Args:
        logits: Of the last token of each call, and of all decoded ones.
        lengths: Entries per layer after each call.
        layers: The cache's layers at the end.
        reported: What the attachment says that the cache holds, in bytes, after each call.
    """

    logits: Tensor
    lengths: list[list[Tensor]]
    layers: list[RaggedLayer]
    reported: list[int]


def fed(
    model: Any, ids: Tensor, padding: Tensor | None, chunks: Sequence[int], steps: int, cache: DynamicCache
) -> Iterator[Tensor]:
    """Feeds ids as `run` says, and gives the logits of the last token of each call."""
    prompt = ids.shape[1] - steps
    mask = torch.ones_like(ids) if padding is None else torch.cat([padding, torch.ones_like(ids[:, prompt:])], 1)
    for a, b in itertools.pairwise([0, *chunks, *range(prompt, ids.shape[1] + 1)]):
        place = (mask[:, :b].cumsum(1) - 1).clamp_min(0)[:, a:b]
        out = model(
            input_ids=ids[:, a:b],
            attention_mask=mask[:, :b],
            position_ids=place,
            past_key_values=cache,
            use_cache=True,
        )
        yield out.logits[:, -1]


@torch.no_grad()
def run(
    model: Any,
    ids: Tensor,
    policy: Policy | None,
    padding: Tensor | None = None,
    chunks: Sequence[int] = (),
    steps: int = STEPS,
    after: Callable[[list[RaggedLayer]], None] | None = None,
) -> Run:
    """Feeds a prompt, at once or in chunks, and then the rest of the ids token by token.

    Args:
        model: A tiny decoder.
        ids: [batch, prompt + steps].
        policy: What to attach; None: nothing.
        padding: [batch, prompt], 0 where the prompt is padded.
        chunks: Where the prompt is cut.
        steps: How many of the ids are decoded one by one.
        after: Called with the layers after each call.
    """
    cache = DynamicCache(config=model.config)
    said, lengths, reported = [], [], []

    def feed() -> None:
        for logits in fed(model, ids, padding, chunks, steps, cache):
            said.append(logits)
            if policy is not None:
                layers = ragged_layers(cache)
                lengths.append([one.store.length.clone() for one in layers])
                reported.append(attached.bytes_held())
                if after is not None:
                    after(layers)

    if policy is None:
        feed()
    else:
        with attach(model, *company(policy)) as attached:
            feed()
    return Run(torch.stack(said, 1), lengths, ragged_layers(cache), reported)


def ids_of(batch: int = 2, length: int = PROMPT + STEPS, seed: int = 0) -> Tensor:
    """Random token ids."""
    return torch.randint(4, tiny.VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(batch: int = 2, prompt: int = PROMPT, cut: int = 11) -> Tensor:
    """A padding mask in which all rows but the first are padded on the left."""
    mask = torch.ones(batch, prompt, dtype=torch.long)
    mask[1:, :cut] = 0
    return mask


def padded_ids(ids: Tensor, padding: Tensor) -> Tensor:
    """The ids with 0 where they are padded."""
    return ids * torch.cat([padding, torch.ones_like(ids[:, padding.shape[1] :])], 1)


def decoded(r: Run) -> Tensor:
    """The logits after the whole prompt, and of each decoded token."""
    return r.logits[:, -STEPS - 1 :]


def positions(r: Run) -> list[list[list[list[int]]]]:
    """Per layer, batch row and KV head: which positions are held at the end."""
    return [
        [[sorted(p for p in head.tolist() if p != EMPTY) for head in row] for row in one.store.positions()]
        for one in r.layers
    ]


@dataclass(frozen=True)
class HideDropped(Edit):
    """Masks the keys that a policy had dropped before the call that runs now, or that it does not read in it.

    Args:
        kept: Positions held after each call, per layer, and a list of one number: the calls so far.
        reading: Whether they are those that are read in the call behind it, its own among them.
    """

    kept: tuple = ()
    reading: bool = False

    def edit_scores(self, block: Any, scores: Tensor) -> Tensor:
        view, (calls, now) = block.view, self.kept
        if now[0] == 0:
            return scores
        at = calls[now[0] - 1][view.layer.index]
        if at is None:
            return scores
        there = torch.zeros(*at.shape[:2], view.keys + 1, dtype=torch.bool)
        there.scatter_(2, at.clamp_max(view.keys).long(), True)
        if not self.reading:
            # what came with this call is always seen
            there[..., view.keys - view.queries :] = True
        there = there[..., block.first : block.last].repeat_interleave(view.grouped, 1)
        return scores.masked_fill(~there[:, :, None], -torch.inf)


@torch.no_grad()
def run_masked(
    model: Any, ids: Tensor, padding: Tensor, chunks: Sequence[int], kept: list, reading: bool = False
) -> Tensor:
    """The logits of `run` from a full cache, what `kept` has not after each call being masked."""
    now, said = [0], []
    # without windows in the cache, so that positions count from the first token
    cache = DynamicCache()
    # a dozen tokens hide nothing
    with attach(model, HideDropped((kept, now), reading), trial=False):
        for logits in fed(model, ids, padding, chunks, ids.shape[1] - padding.shape[1], cache):
            said.append(logits)
            now[0] += 1
    return torch.stack(said, 1)[:, -STEPS - 1 :]


@dataclass(frozen=True)
class Witness(Policy):
    """A policy that chooses what is read, and a record of what it chose.

    Args:
        inner: The policy.
        seen: Positions that were read, a list per layer and call is added to it; of a call that read all, None.
        budget: Its budget.
    """

    inner: Policy
    seen: list
    budget: Any = 1.0

    @property
    def parts(self) -> frozenset[str]:
        return self.inner.parts

    def read(self, reading: Reading) -> Tensor | None:
        only = self.inner.read(reading)
        at, room = None, reading.room
        if only is not None:
            at = reading.position.gather(-1, only.clamp_min(0)).masked_fill(only < 0, EMPTY)
            # a row may read everything beside rows that choose
            held = reading.store.length
            room = torch.where((only >= 0).sum(-1) == held, held, room)
        self.seen.append((reading.at, at, room))
        return only
