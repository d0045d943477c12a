"""From a model, a text and a goal to a plan with its evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from foveate.core.attach import attach
from foveate.core.errors import BadInput, NotSupported
from foveate.core.mechanism import Policy
from foveate.core.own_cache import entries_of, lengths, own_bytes
from foveate.core.places import Value as Gate
from foveate.core.plan import Plan, read, written
from foveate.core.ragged import ENTRY_BYTES, SIDES
from foveate.finding.reporting import Spread, spread, timed
from foveate.planning.examining import Exam, Tell, split
from foveate.planning.goals import PERPLEXITY, PROBES, Goal
from foveate.planning.heads import answer_mass
from foveate.planning.proposals import families, fitted
from foveate.planning.searching import Searched, Verdict, prove, search
from foveate.probe.ledger import Ledger, circumstances
from foveate.probe.run import fits
from foveate.probe.sample import Task
from foveate.probe.text import tokenised

__all__ = ["Compressed", "Cost", "askable", "compress", "task"]

SEARCH, PROOF, MEASURED = 0, 1, 2
"""Seeds of the prompts that are searched on, proved on, and that heads are measured on."""
SEARCH_COUNT = 16
HEADS_COUNT = 8
ON_HEADS = 768
"""Longest prompts that heads are measured on."""
LEAST_TOKENS = 128
ROOM = 256
"""Tokens behind the texts that are planned for: answers, and what is predicted."""
REPEATS = 5


@dataclass(frozen=True)
class Cost:
    """Bytes and time at the length that was planned for.

    Args:
        tokens: That length.
        bytes_before: Bytes of the model's own cache.
        bytes_after: Bytes held under the plan.
        decode_before: Seconds per decoded token, median and quartiles.
        decode_after: The same under the plan.
        prompt_before: Seconds of the prompt.
        prompt_after: The same under the plan.
    """

    tokens: int
    bytes_before: int
    bytes_after: int
    decode_before: Spread
    decode_after: Spread
    prompt_before: Spread
    prompt_after: Spread


@dataclass(frozen=True)
class Compressed:
    """What came of planning.

    Args:
        plan: The plan; where nothing met the goal, the nearest to it.
        goal: What was to be reached.
        searched: Everything that was tried.
        verdict: The plan on prompts and texts that the search has not seen.
        cost: Bytes and time.
    """

    plan: Plan
    goal: Goal
    searched: Searched
    verdict: Verdict
    cost: Cost

    @property
    def met(self) -> bool:
        """Whether the goal was met."""
        return not self.missed

    @property
    def missed(self) -> tuple[str, ...]:
        """What the plan misses of the goal, in words."""
        cost = self.cost
        share = self.goal.share(cost.bytes_before, cost.tokens)
        if share is None or cost.bytes_after <= share * cost.bytes_before:
            return self.verdict.missed
        held = f"{cost.bytes_after:,} bytes held, {cost.bytes_after / cost.bytes_before:.1%} of the cache"
        return (*self.verdict.missed, f"{held}, above {share:.1%}")

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {
            "goal": asdict(self.goal),
            "met": self.met,
            "missed": list(self.missed),
            "candidates": [c.to_json() for c in self.searched.candidates],
            "impossible": [list(pair) for pair in self.searched.impossible],
            "search_full": self.searched.full.to_json(),
            "proof": self.verdict.to_json(),
            "cost": asdict(self.cost),
        }


def task(name: str, tokens: int) -> Any:
    """A probe by name, at a length."""
    from foveate import probe

    return getattr(probe, "".join(word.capitalize() for word in name.split("_")))(tokens)


def compress(
    model: Any,
    tokenizer: Any,
    text: str,
    goal: Goal,
    policies: Sequence[Policy],
    *,
    tokens: int = 1024,
    probes: Sequence[str] = PROBES[:2],
    count: int = 50,
    unseen: bool = True,
    file: Path | None = None,
    name: str = "",
    tell: Tell | None = None,
) -> Compressed:
    """Finds a plan for a model's cache on a text, and proves it on what it was not found on.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        text: The text: one half is searched on, the other held out.
        goal: What is to be reached.
        policies: What may be proposed, as `proposals.named` gives it.
        tokens: Length that is planned for.
        probes: Probes by name; those that the goal speaks of are added.
        count: Prompts of each probe for the proof; the search takes at most 16.
        unseen: Whether policies act before a question is read.
        file: Where results are kept as they come: an interrupted search goes on from it.
        name: What the user calls the model.
        tell: Called with what is done, how much of it, and how much there is.

    Raises:
        BadInput: a text too short to hold some out, a length that the model cannot read or that has no room for a
            probe, a goal that is met by the full cache or by nothing that could be proposed.
        NotSupported: the model is no causal language model.
    """
    readable(model, tokens)
    with TemporaryDirectory() as folder:
        # what one share measured another one takes from the file, also where nobody wants to keep it
        file = file or Path(folder) / "results.jsonl"
        probes = [*dict.fromkeys([*probes, *(n for n, _ in goal.quality if n != PERPLEXITY)])]
        tasks = {one: task(one, tokens) for one in probes}
        # a length that cannot be is told before anything is measured
        askable(model, tokenizer, tasks, tokens, (min(count, SEARCH_COUNT), SEARCH), (count, PROOF))
        if tokens <= ON_HEADS:
            askable(model, tokenizer, on_heads(tokens), tokens, (HEADS_COUNT, MEASURED))
        ids, front = tokenised(tokenizer, text)
        searched_on, held_out = split(ids, tokens, front)
        # what a policy's own fit reads must not be what it is judged on either
        half = tokenizer.decode(ids[: len(ids) // 2])
        before, per_head = cache_bytes(model, tokens)
        share = goal.share(before, tokens)
        gates = heads_of(model, tokenizer, min(tokens, ON_HEADS), file, tell)
        fitting = cache(partial(fit, model, tokenizer, half, tokens, len(gates), file, tell=tell))
        parts = families(policies, gates, tokens, per_head, fitting, lengths(model, tokens))
        first = Exam(tasks, searched_on, min(count, SEARCH_COUNT), SEARCH, unseen)
        found = search(model, tokenizer, first, goal, parts, share, file, tell)
        proof = Exam(tasks, held_out, count, PROOF, unseen)
        verdict = prove(model, tokenizer, proof, goal, found, file, tell)
        chosen = verdict.candidate.policies
        cost = costs(model, chosen, tokens, before, tell)
        evidence = {
            "goal": asdict(goal),
            "tokens": tokens,
            "count": count,
            "unseen": unseen,
            "proof": verdict.to_json(),
        }
        plan = Plan.of(model, *chosen, evidence=evidence, name=name)
        return Compressed(plan, goal, found, verdict, cost)


def readable(model: Any, tokens: int) -> None:
    """Raises for a model that no plan can be made for, or not for texts so long: answers come behind them."""
    name = type(model).__name__
    if not getattr(model, "can_generate", lambda: False)() or getattr(model.config, "is_encoder_decoder", False):
        raise NotSupported(f"{name} is no causal language model, so nothing can be planned for it; give one that is")
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if most is None or tokens <= most - ROOM:
        return
    if most < LEAST_TOKENS + ROOM:
        raise BadInput(
            f"{name} reads {most} tokens, too few to plan for: texts take at least {LEAST_TOKENS}, and what comes "
            f"behind them {ROOM}; give a model that reads {LEAST_TOKENS + ROOM} or more"
        )
    raise BadInput(f"--tokens {tokens}: {name} reads {most}; plan for at most {most - ROOM}")


def askable(model: Any, tokenizer: Any, tasks: Mapping[str, Task], tokens: int, *asked: tuple[int, int]) -> None:
    """Raises `BadInput` for the first probe that has no prompts of the length that was asked for.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        tasks: Probes by name.
        tokens: Their length.
        asked: How many prompts, and their seed.
    """
    for name, one in tasks.items():
        for count, seed in asked:
            try:
                fits(model, one.samples(tokenizer, count, seed))
            except BadInput as e:
                raise BadInput(f"--tokens {tokens}, probe {name}: {e}") from None


def on_heads(tokens: int) -> dict[str, Task]:
    """The probes that heads are measured on."""
    return {name: task(name, tokens) for name in PROBES[:2]}


def heads_of(model: Any, tokenizer: Any, tokens: int, file: Path | None, tell: Tell | None) -> tuple[Gate, ...]:
    """How much each KV head finds answers, measured once."""
    ledger, key = Ledger(file), Ledger.key("answer_mass", circumstances(model, tokenizer), tokens)
    if key not in ledger:

        def progress(done: int, of: int) -> None:
            if tell:
                tell("heads", done, of)

        ledger.add(key, answer_mass(model, tokenizer, [*on_heads(tokens).values()], HEADS_COUNT, MEASURED, progress))
    return tuple((int(layer), int(head), float(gate)) for layer, head, gate in ledger[key])


def fit(
    model: Any,
    tokenizer: Any,
    text: str,
    tokens: int,
    kv_heads: int,
    file: Path | None,
    name: str,
    share: float,
    tell: Tell | None = None,
) -> Policy:
    """A policy whose own `fit` finds its parameters, found once for each share."""

    def progress(done: int, of: int) -> None:
        if tell:
            tell(name, done, of)

    ledger, key = Ledger(file), Ledger.key("fit", circumstances(model, tokenizer), text, tokens, name, share)
    if key not in ledger:
        ledger.add(key, written(fitted(name, model, tokenizer, text, tokens, share, kv_heads, file, progress)))
    policy = read(ledger[key])
    assert isinstance(policy, Policy)
    return policy


def cache_bytes(model: Any, tokens: int) -> tuple[int, Any]:
    """Bytes of the model's own cache of a text, and mean bytes of one entry of a head under a policy that stores."""
    layers, size = entries_of(model), model.dtype.itemsize

    def per_head(store: Policy | None) -> float:
        if store is None:
            return sum(one.key + one.value for one in layers) * size / len(layers)
        widths = [(side, n, one.key if side == "keys" else one.value) for n, one in enumerate(layers) for side in SIDES]
        total = sum(store.row_bytes(width, model.dtype, side, n) for side, n, width in widths)
        return total / len(layers) + ENTRY_BYTES

    return own_bytes(model, tokens), per_head


@torch.no_grad()
def costs(model: Any, policies: Sequence[Policy], tokens: int, before: int, tell: Tell | None) -> Cost:
    """Bytes and time of a text and of decoded tokens, with policies and without, measured in turn."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0)).to(model.device)
    plain, mine, held = [], [], 0
    for n in range(REPEATS + 1):
        rounds = timed(model, ids, ()), timed(model, ids, policies)
        # the first round warms everything up
        if n:
            plain.append(rounds[0])
            mine.append(rounds[1])
        if tell:
            tell("time", n + 1, REPEATS + 1)
    with attach(model, *policies, trial=False) if policies else nullcontext() as attached:
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
        held = attached.bytes_held() if policies else before
    columns = [[r[at] for r in rounds] for at in (1, 0) for rounds in (plain, mine)]
    return Cost(tokens, before, held, *(spread(c) for c in columns))
