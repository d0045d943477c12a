"""From a model, a text and a goal to a plan with its evidence."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from foveate.core.attach import attach
from foveate.core.errors import BadInput
from foveate.core.mechanism import Policy
from foveate.core.places import Value as Gate
from foveate.core.plan import Plan, fingerprint, read, written
from foveate.core.ragged import SIDES
from foveate.finding.reporting import Spread, spread, timed
from foveate.planning.examining import Exam, Tell, split
from foveate.planning.goals import PERPLEXITY, PROBES, Goal
from foveate.planning.heads import answer_mass
from foveate.planning.proposals import families, fitted
from foveate.planning.searching import Searched, Verdict, prove, search
from foveate.probe.ledger import Ledger

__all__ = ["Compressed", "Cost", "compress", "task"]

SEARCH, PROOF, MEASURED = 0, 1, 2
"""Seeds of the prompts that are searched on, proved on, and that heads are measured on."""
SEARCH_COUNT = 16
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
        return not self.verdict.missed

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {
            "goal": asdict(self.goal),
            "met": self.met,
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
        BadInput: a text too short to hold some out, a length that the model cannot read, a goal that is met by the full
            cache or by nothing that could be proposed.
    """
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if most is not None and tokens > most - 256:
        raise BadInput(f"--tokens {tokens}: {type(model).__name__} reads {most}; plan for at most {most - 256}")
    with TemporaryDirectory() as folder:
        # what one share measured another one takes from the file, also where nobody wants to keep it
        file = file or Path(folder) / "results.jsonl"
        probes = [*dict.fromkeys([*probes, *(n for n, _ in goal.quality if n != PERPLEXITY)])]
        tasks = {one: task(one, tokens) for one in probes}
        ids = tokenizer(text, verbose=False)["input_ids"]
        searched_on, held_out = split(ids, tokens)
        # what a policy's own fit reads must not be what it is judged on either
        half = tokenizer.decode(ids[: len(ids) // 2])
        before, per_head = cache_bytes(model, tokens)
        share = goal.share(before, tokens)
        gates = heads_of(model, tokenizer, min(tokens, 768), file, tell)
        fits = cache(partial(fit, model, tokenizer, half, tokens, len(gates), file, tell=tell))
        parts = families(policies, gates, tokens, per_head, fits)
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


def heads_of(model: Any, tokenizer: Any, tokens: int, file: Path | None, tell: Tell | None) -> tuple[Gate, ...]:
    """How much each KV head finds answers, measured once."""
    ledger, key = Ledger(file), Ledger.key("answer_mass", fingerprint(model), tokens)
    if key not in ledger:
        tasks = task("passkey", tokens), task("key_value", tokens)

        def progress(done: int, of: int) -> None:
            if tell:
                tell("heads", done, of)

        ledger.add(key, answer_mass(model, tokenizer, tasks, 8, MEASURED, progress))
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

    ledger, key = Ledger(file), Ledger.key("fit", fingerprint(model), text, tokens, name, share)
    if key not in ledger:
        ledger.add(key, written(fitted(name, model, tokenizer, text, tokens, share, kv_heads, file, progress)))
    policy = read(ledger[key])
    assert isinstance(policy, Policy)
    return policy


def cache_bytes(model: Any, tokens: int) -> tuple[int, Any]:
    """Bytes of the model's own cache of a text, and mean bytes of one entry of a head under a policy that stores."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    full = 2 * config.num_hidden_layers * heads * width * tokens * model.dtype.itemsize

    def per_head(store: Policy | None) -> float:
        if store is None:
            return 2 * width * model.dtype.itemsize
        layers = range(config.num_hidden_layers)
        total = sum(store.row_bytes(width, model.dtype, side, layer) for side in SIDES for layer in layers)
        # and with each entry its position and its score
        return total / len(layers) + 8

    return full, per_head


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
