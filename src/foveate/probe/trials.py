"""Many caches on the same prompts: each prompt is read once, whatever the number of policies that are tried on it.

Policies act when a text has been read. What comes behind it, the question and the answer, or the next tokens of the
text, stays whole: they are a few dozen tokens, and so nothing depends on when the next round of dropping is due.
Entries that are read by choice are chosen at each token, as always, where tokens come one by one: those of an answer
and those of the next stretch of text; a question comes at once and sees everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from foveate.core.attach import attach
from foveate.core.branches import Branched, Whole, branch, bytes_held, joined, model_bytes
from foveate.core.errors import BadInput
from foveate.core.mechanism import Policy
from foveate.core.own_cache import own_bytes
from foveate.core.policy import Policies
from foveate.probe.ledger import Ledger, circumstances
from foveate.probe.run import ProbeResult, Record, fits, graded, limit, stop_tokens
from foveate.probe.sample import Task

__all__ = ["FULL", "Continued", "Settings", "Tried", "continuations", "trials"]

FULL = "full"
"""The name of the cache that keeps everything; it is always tried."""
TOGETHER = 32
"""Caches that go on in one batch."""
IN_MEMORY, EACH = 0.3, 0.25
"""The share of the free memory that caches may take, and what share of a full cache one of them is taken to be."""
PIECE = 32
"""Tokens of a text whose logits are held at once."""

Settings = Mapping[str, Sequence[Policy]]
Progress = Callable[[int, int], None]
GoOn = Callable[[DynamicCache, Tensor, int], Sequence[Any]]
"""Goes on behind a text, from its cache and its last logits; so many tokens that are known may come in one call."""


@dataclass(frozen=True)
class Tried:
    """What came of one set of policies on the prompts of a task.

    Args:
        result: The answers.
        share: Bytes of the cache behind the text, as a share of the full one's, mean over the prompts.
    """

    result: ProbeResult
    share: float


@dataclass(frozen=True)
class Continued:
    """How well a text is predicted behind a compressed context.

    Args:
        losses: Mean loss per token of each stretch of text, in nats.
        share: Bytes of the cache behind the context, as a share of the full one's, mean over the stretches.
    """

    losses: tuple[float, ...]
    share: float


def trials(
    model: Any,
    tokenizer: Any,
    task: Task,
    settings: Settings,
    count: int = 50,
    seed: int = 0,
    *,
    unseen: bool = True,
    file: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Tried]:
    """Puts prompts of a task to a model under each of many sets of policies, and with the full cache.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        task: The task.
        settings: The sets of policies, by name.
        count: Number of prompts.
        seed: The same seed gives the same prompts.
        unseen: Whether policies act before the question is read.
        file: Where results are kept as they come; what is there from an interrupted run is not done again.
        progress: Called after each prompt with how many are done and how many there are.

    Returns:
        What came of each by name, the full cache as `FULL`.

    Raises:
        BadInput: prompts longer than the model can read; two policies of a set do the same.
    """
    samples = task.samples(tokenizer, count, seed)
    fits(model, samples)
    prompts = [tuple(sample.ids) for sample in samples]
    asked = Ledger.key(circumstances(model, tokenizer), task, seed, count, unseen, prompts)
    stop = stop_tokens(model, tokenizer)

    def one(n: int, todo: Settings) -> Iterator[tuple[str, dict[str, Any]]]:
        sample = samples[n]
        at = sample.question_start if unseen else len(sample.ids)
        text, rest = sample.ids[:at], sample.ids[at:]

        def answers(cache: DynamicCache, logits: Tensor, _: int) -> list[list[int]]:
            return spoken(model, cache, logits, rest, limit(sample), stop)

        for name, said, held in each(model, text, todo, answers):
            yield name, asdict(graded(sample, tokenizer.decode(said))) | {"share_held": held}

    found = kept(settings, len(samples), asked, one, file, progress)
    tried = {}
    for name, entries in found.items():
        shares = [entry.pop("share_held") for entry in entries]
        tried[name] = Tried(ProbeResult.of(task, [Record(**e) for e in entries]), sum(shares) / len(shares))
    return tried


def continuations(
    model: Any,
    texts: Sequence[Sequence[int]],
    settings: Settings,
    follow: int = 128,
    *,
    file: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Continued]:
    """How well the last `follow` tokens of each text are predicted when what stands before them is compressed.

    Args:
        model: A causal language model.
        texts: Token ids of stretches of text.
        settings: The sets of policies, by name.
        follow: Tokens of each stretch that are predicted.
        file: Where results are kept as they come.
        progress: Called after each stretch with how many are done and how many there are.

    Returns:
        What came of each by name, the full cache as `FULL`.

    Raises:
        BadInput: a stretch with nothing before the tokens that are predicted.
    """
    if follow < 1 or not texts or min(map(len, texts)) <= follow:
        shortest = min(map(len, texts), default=0)
        raise BadInput(f"follow={follow}: give stretches of text with tokens before these; the shortest has {shortest}")
    asked = Ledger.key(circumstances(model), follow, [tuple(text) for text in texts])

    def one(n: int, todo: Settings) -> Iterator[tuple[str, dict[str, Any]]]:
        ids = list(texts[n])

        def losses(cache: DynamicCache, logits: Tensor, piece: int) -> list[float]:
            return surprise(model, cache, logits, ids[-follow:], piece)

        for name, loss, held in each(model, ids[:-follow], todo, losses):
            yield name, {"loss": loss, "share_held": held}

    found = kept(settings, len(texts), asked, one, file, progress)
    return {
        name: Continued(tuple(e["loss"] for e in entries), sum(e["share_held"] for e in entries) / len(entries))
        for name, entries in found.items()
    }


def kept(
    settings: Settings,
    count: int,
    asked: str,
    one: Callable[[int, Settings], Iterator[tuple[str, dict[str, Any]]]],
    file: str | Path | None,
    progress: Progress | None,
) -> dict[str, list[dict[str, Any]]]:
    """Results of every setting on every text; those that a file has already are taken from it."""
    everything: dict[str, Sequence[Policy]] = {FULL: (), **settings}
    ledger = Ledger(file)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in everything}
    for n in range(count):
        keys = {name: ledger.key(asked, n, tuple(policies)) for name, policies in everything.items()}
        todo = {name: policies for name, policies in everything.items() if keys[name] not in ledger}
        if todo:
            for name, entry in one(n, todo):
                ledger.add(keys[name], entry)
        for name, key in keys.items():
            found[name].append(dict(ledger[key]))
        if progress is not None:
            progress(n + 1, count)
    return found


def each(model: Any, text: Sequence[int], settings: Settings, go_on: GoOn) -> Iterator[tuple[str, Any, float]]:
    """What comes of going on behind a text with each cache: name, result, and the share of bytes held.

    A text is read once, or as often as it takes for the caches to fit in memory.
    """
    if not text:
        raise BadInput("there is no text before the question; a policy would have nothing to act on")
    names, most = list(settings), at_once(model, len(text))
    for start in range(0, len(names), most):
        yield from these(model, text, {name: settings[name] for name in names[start : start + most]}, go_on)


def at_once(model: Any, tokens: int) -> int:
    """How many caches of so many tokens may be there at once."""
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
    else:
        free = psutil.virtual_memory().available
    return max(1, int(IN_MEMORY * free / (EACH * own_bytes(model, tokens))))


def these(model: Any, text: Sequence[int], settings: Settings, go_on: GoOn) -> Iterator[tuple[str, Any, float]]:
    """The same for caches that are all there at once."""
    ids = torch.tensor([list(text)], device=model.device)
    names = [name for name in settings if settings[name]]
    made = branch(model, ids, [settings[name] for name in names])
    whole = model_bytes(made.full)
    caches = dict(zip(names, made.caches, strict=True))
    held = {name: bytes_held(cache) / whole for name, cache in caches.items()}
    # what is kept whole is what the model's own cache would be
    caches |= {name: made.full for name in settings if name not in caches}
    held |= {name: 1.0 for name in settings if name not in held}
    parts = {name: Policies.of(settings[name]) for name in caches}
    reading = [name for name in caches if parts[name].read]
    for store in dict.fromkeys(parts[name].store for name in caches):
        alike = [name for name in caches if name not in reading and parts[name].store == store]
        for start in range(0, len(alike), TOGETHER):
            some = alike[start : start + TOGETHER]
            batch = joined([caches.pop(name) for name in some], model.config)
            for name, result in zip(some, under(model, (), batch, made, len(some), go_on), strict=True):
                yield name, result, held[name]
    for name in reading:
        (result,) = under(model, settings[name], caches.pop(name), made, 1, go_on)
        yield name, result, held[name]


@torch.no_grad()
def under(
    model: Any,
    policies: Sequence[Policy],
    cache: DynamicCache,
    made: Branched,
    rows: int,
    go_on: GoOn,
) -> Sequence[Any]:
    """Goes on with a cache under policies, or under none of them."""
    # what is read is chosen for tokens that come alone
    piece = 1 if Policies.of(policies).read else PIECE
    with attach(model, *(policies or (Whole(),)), trial=False):
        return go_on(cache, made.logits.expand(rows, -1), piece)


def spoken(
    model: Any,
    cache: DynamicCache,
    logits: Float[Tensor, "rows vocabulary"],
    rest: Sequence[int],
    limit: int,
    stop: Sequence[int] | set[int],
) -> list[list[int]]:
    """What each row of a cache says, greedily, behind the rest of a prompt."""
    rows = len(logits)
    if rest:
        ids = torch.tensor([list(rest)], device=model.device).expand(rows, -1)
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    said: list[list[int]] = [[] for _ in range(rows)]
    going = [True] * rows
    for step in range(limit):
        tokens = logits.argmax(-1)
        for row, token in enumerate(tokens.tolist()):
            going[row] &= token not in stop
            if going[row]:
                said[row].append(token)
        if step == limit - 1 or not any(going):
            break
        logits = model(input_ids=tokens[:, None], past_key_values=cache, use_cache=True).logits[:, -1]
    return said


def surprise(
    model: Any, cache: DynamicCache, logits: Float[Tensor, "rows vocabulary"], ids: Sequence[int], piece: int
) -> list[float]:
    """The mean loss of the tokens that follow, given so many at a time, for each row of a cache."""
    rows = len(logits)
    true: Int[Tensor, " tokens"] = torch.tensor(list(ids), device=model.device)
    total = nn.functional.cross_entropy(logits.float(), true[:1].expand(rows), reduction="none").double()
    for start in range(0, len(ids) - 1, piece):
        stop = min(start + piece, len(ids) - 1)
        some = true[None, start:stop].expand(rows, -1)
        given = model(input_ids=some, past_key_values=cache, use_cache=True).logits.float()
        wanted = true[None, start + 1 : stop + 1].expand(rows, -1)
        total += nn.functional.cross_entropy(given.transpose(1, 2), wanted, reduction="none").double().sum(-1)
    return (total / len(ids)).tolist()
