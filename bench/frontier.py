"""Quality against bytes: every KV policy and plan, random eviction and the full cache on the same prompts; kvpress too.

    python bench/frontier.py [--tokens 2048 4096] [--keep 0.5 0.25 0.1] [--probes NAME ...] [--count 50]
        [--protocol unseen seen] [--only NAME ...] [--again]
    python bench/frontier.py kvpress PYTHON [--tokens 2048] [--keep 0.25] [--probes passkey key_value] [--count 20]

smollm2, float32. A prompt is read once and every cache made from it (foveate.probe.trials): `unseen`, the text is
compressed before the question comes; `seen`, text and question are compressed together. Question and answer stay whole.
`perplexity` is that of the 128 tokens behind a compressed text, as a multiple of the full cache's, over 8 stretches of
Python's documentation. Bytes are of all that a cache holds behind the text, positions and spare room included, as a
share of transformers' own cache.

Plans: `heads + POLICY`: the KV heads whose rows put most weight on the answer (measured on passkey and key-value
prompts of 700 tokens with another seed) keep everything, the others a twentieth of the text, chosen by the policy.
`8 bits + …`: the same with keys and values in 8 bits, which leaves room for more than three times as many; `8/4 bits`:
keys in 8 bits and values in 4; `4 bits`: both in 4; `mixed bits`: 8 bits for the keys and values of layers that need
them and 4 for the others, found on half of the documentation; alone, they drop nothing. Policies that choose what a
token reads hold everything; they are in the tables at the share that they read. Policies that find their own heads or
spans are there at the shares that these can hold.

`kvpress` runs its presses in an environment of its own (it needs transformers below 5.3) on the same prompts; with
`--only QuantizedCache` transformers' own cache of 4 bits (it needs optimum-quanto), which drops nothing.

What is done is kept in a file beside the results, prompt by prompt: a run that was broken off goes on. What stands in
the results for as many prompts is measured again only with --again, so that the matrix, which takes days, can grow.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

HERE = Path(__file__).resolve().parent
# this folder would hide Python's own module `profile`, which torch imports
sys.path = [p for p in sys.path if Path(p or ".").resolve() != HERE]
OUT = HERE / "results"
RESULTS, LEDGER = OUT / "frontier.json", OUT / "frontier.ledger.jsonl"
PROBES = ("passkey", "key_value", "needles", "variable_tracking", "common_words", "planted_facts")
PERPLEXITY = "perplexity"
FOLLOW, STRETCHES = 128, 8
MEASURED = {"length": 700, "count": 8, "seed": 1000}
PRESSES = (
    "KeyDiffPress",
    "TOVAPress",
    "KnormPress",
    "ExpectedAttentionPress",
    "SnapKVPress",
    "StreamingLLMPress",
    "RandomPress",
)


def settings(model, tokenizer, tokens: int, shares: list[float], only: list[str] | None) -> dict[str, tuple]:
    """Sets of policies by name and share; of those that have something to find, only what was asked for."""
    import torch
    from jaxtyping import Float
    from torch import Tensor

    import foveate
    from foveate.compress import HeavyHitters, KeyNorm, MergeDropped, MixedBits, Quantised
    from foveate.core.budget import Amount, Budget
    from foveate.core.errors import BadInput
    from foveate.core.mechanism import Policy
    from foveate.core.policy import Held
    from foveate.core.registry import make
    from foveate.planning import proposals
    from foveate.planning.compressing import cache_bytes, fit
    from foveate.probe import default_text

    @dataclass(frozen=True)
    class Random(Policy):
        """Drops entries at random."""

        budget: Amount = 0.25
        card: ClassVar = KeyNorm.card

        def score(self, held: Held) -> Float[Tensor, "batch kv_heads key"]:
            rng = torch.Generator().manual_seed(held.rows.view.layer.index)
            return torch.rand(held.before.shape, generator=rng)

    gates = measured(model, tokenizer)
    known = [n for n in foveate.names("compress") if issubclass(foveate.find(n), Policy)]
    fitted = [n for n in known if proposals.with_fit(make(n, "compress")) and n != "mixed_bits"]
    scored = [n for n in known if "score" in make(n, "compress").parts and n not in fitted]
    readers = [n for n in known if "read" in make(n, "compress").parts]
    half = (text := default_text())[: len(text) // 2]
    mixed = MixedBits.fit(model, tokenizer, half, keep=0.2, file=LEDGER)
    stores = {"8 bits": Quantised(), "8/4 bits": Quantised(value_bits=4), "4 bits": Quantised(bits=4)}
    stores["mixed bits"] = mixed
    _, entry_bytes = cache_bytes(model, tokens)
    packed = {n: entry_bytes(store) / entry_bytes(None) for n, store in stores.items()}

    def spared(name: str, share: float, part: float = 0.05) -> Policy:
        rest = max(68, round(part * tokens))
        return proposals.sparing(make(name, "compress"), gates, share, tokens, rest, every=0)

    found: dict[str, tuple] = {n: (store,) for n, store in stores.items()}
    for share in shares:

        def add(name: str, *policies: Policy, share: float = share) -> None:
            found[f"{name} @ {share:g}"] = policies

        whole = Budget(share / proposals.OVERHEAD, every=0)
        add("random", Random(whole))
        for name in scored:
            add(name, make(name, "compress").within(whole))
        add("heavy_hitters + merge_dropped", HeavyHitters(whole), MergeDropped())
        for name in ("key_diversity", "expected_attention"):
            one = make(name, "compress")
            add(f"{name}, heads compete", one.within(Budget(share / proposals.OVERHEAD, every=0, heads="model")))
        for name in ("streaming", "expected_attention", "key_diversity", "last_token"):
            add(f"heads + {name}", spared(name, share))
        for n, store in stores.items():
            if packed[n] * 0.3 < share < packed[n]:
                for name in ("expected_attention", "last_token"):
                    add(f"{n} + heads + {name}", spared(name, share / packed[n]), store)
        for name in fitted if only is None else set(fitted) & set(only):
            try:
                add(name, fit(model, tokenizer, half, tokens, len(gates), LEDGER, name, share))
            except BadInput as e:
                print(f"no {name} @ {share:g}: {e}")
        if share == 0.25:
            for name in readers:
                add(f"{name} (reads)", make(name, "compress").within(Budget(share, every=0)))
    return found


def measured(model, tokenizer) -> tuple:
    """How much of each KV head's weight lies on the answer."""
    from foveate.planning.heads import answer_mass
    from foveate.probe import KeyValue, Passkey
    from foveate.probe.ledger import Ledger

    ledger, key = Ledger(LEDGER), Ledger.key("answer_mass", MEASURED)
    if key not in ledger:
        tasks = Passkey(MEASURED["length"]), KeyValue(MEASURED["length"])
        ledger.add(key, answer_mass(model, tokenizer, tasks, MEASURED["count"], MEASURED["seed"]))
    return tuple(tuple(gate) for gate in ledger[key])


def stretches(tokenizer, tokens: int) -> list[list[int]]:
    """Stretches of Python's documentation, evenly spread."""
    from foveate.probe import default_text

    ids = tokenizer(default_text(), verbose=False).input_ids
    step = (len(ids) - tokens - FOLLOW) // (STRETCHES - 1)
    return [ids[n * step : n * step + tokens + FOLLOW] for n in range(STRETCHES)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", nargs="*", metavar="kvpress PYTHON", help="run kvpress's presses with this Python")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25, 0.1])
    parser.add_argument("--probes", nargs="+", default=[*PROBES[:2], PERPLEXITY, *PROBES[2:]], metavar="NAME")
    parser.add_argument("--protocol", nargs="+", default=["unseen", "seen"], choices=("unseen", "seen"))
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--only", nargs="+", default=None, metavar="NAME", help="policies and plans by name")
    parser.add_argument("--again", action="store_true", help="measure again what is in the results")
    args = parser.parse_args()
    if unknown := set(args.probes) - {*PROBES, PERPLEXITY}:
        parser.error(f"no such probe: {', '.join(sorted(unknown))}; there are {', '.join((*PROBES, PERPLEXITY))}")
    import foveate

    OUT.mkdir(exist_ok=True)
    model, tokenizer = foveate.load("smollm2")
    if args.peer:
        peers(model, tokenizer, args)
        return
    for protocol in args.protocol:
        for tokens in args.tokens:
            tried = settings(model, tokenizer, tokens, args.keep, args.only)
            tried = {n: p for n, p in tried.items() if not args.only or n.split(" @ ")[0] in args.only}
            for name in args.probes:
                if name == PERPLEXITY and protocol == "seen":
                    continue
                key = f"{protocol} {tokens} {name}"
                if left := {n: p for n, p in tried.items() if args.again or not is_done(key, n, args.count)}:
                    save(key, ours(model, tokenizer, name, tokens, left, args.count, protocol))


def ours(model, tokenizer, name: str, tokens: int, tried: dict, count: int, protocol: str) -> dict[str, dict]:
    """What came of each set of policies on one probe."""
    from foveate.planning.compressing import task
    from foveate.probe.trials import FULL, continuations, trials

    def progress(done: int, of: int) -> None:
        print(f"\r{protocol} {tokens} {name}: {done} of {of}", end="\n" if done == of else "", flush=True)

    if name != PERPLEXITY:
        found = trials(
            model,
            tokenizer,
            task(name, tokens),
            tried,
            count,
            unseen=protocol == "unseen",
            file=LEDGER,
            progress=progress,
        )
        return {
            n: {"value": t.result.recall, "low": t.result.low, "high": t.result.high, "count": count, "share": t.share}
            for n, t in found.items()
        }
    texts = stretches(tokenizer, tokens)
    continued = continuations(model, texts, tried, FOLLOW, file=LEDGER, progress=progress)
    full = continued[FULL].losses
    return {n: ratio(c.losses, full) | {"share": c.share} for n, c in continued.items()}


def ratio(losses: tuple[float, ...], full: tuple[float, ...]) -> dict[str, float]:
    """Perplexity as a multiple of the full cache's, with a t-interval over the stretches."""
    from foveate.planning import examining

    return asdict(examining.ratio(losses, full)) | {"count": len(losses)}


# ---------------------------------------------------------------- kvpress


def peers(model, tokenizer, args: argparse.Namespace) -> None:
    """kvpress's presses on the same prompts, in a process of its own environment."""
    from foveate.models.embedded import converted
    from foveate.probe.ledger import Ledger

    if len(args.peer) != 2 or args.peer[0] != "kvpress":
        raise SystemExit("say: python bench/frontier.py kvpress PYTHON")
    ledger = Ledger(OUT / "frontier.peers.jsonl")
    env = os.environ | {"SMOLLM2_FOLDER": str(converted("smollm2"))}
    env.pop("PYTHONPATH", None)
    command = [args.peer[1], str(HERE / "peers" / "kvpress_worker.py")]
    presses = args.only or PRESSES
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as worker:
        for tokens, name in [(t, n) for t in args.tokens for n in args.probes]:
            key = f"unseen {tokens} {name}"
            left = {row(p, k): (p, k) for p in presses for k in args.keep}
            left = {r: cache for r, cache in left.items() if args.again or not is_done(key, r, args.count)}
            if not left:
                continue
            jobs, graded = asked(model, tokenizer, name, tokens, args.count)
            entries: dict[str, list[dict]] = {r: [] for r in left}
            for n, job in enumerate(jobs):
                known = {r: Ledger.key("kvpress", press, share, job) for r, (press, share) in left.items()}
                if missing := [r for r in left if known[r] not in ledger]:
                    said = answered(worker, job | {"caches": [left[r] for r in missing]})
                    for r, entry in zip(missing, said, strict=True):
                        ledger.add(known[r], entry)
                for r in left:
                    entries[r].append(ledger[known[r]])
                print(f"\rkvpress {tokens} {name}: {n + 1} of {len(jobs)}", end="", flush=True)
            print()
            shares = {r: sum(e["share"] for e in found) / len(found) for r, found in entries.items()}
            save(key, {r: graded(found) | {"share": shares[r]} for r, found in entries.items()})
        assert worker.stdin
        worker.stdin.close()


def row(press: str, share: float) -> str:
    """What a press's row is called."""
    return f"transformers {press}" if press == "QuantizedCache" else f"kvpress {press} @ {share:g}"


def answered(worker: subprocess.Popen, question: dict) -> list[dict]:
    """What the other process says to one prompt, with each of the caches."""
    assert worker.stdin
    assert worker.stdout
    worker.stdin.write(json.dumps(question) + "\n")
    worker.stdin.flush()
    answer = worker.stdout.readline()
    if not answer:
        raise SystemExit("kvpress's process ended; see what it said above")
    return json.loads(answer)


def asked(model, tokenizer, name: str, tokens: int, count: int) -> tuple[list[dict], Callable[[list[dict]], dict]]:
    """The prompts of one probe as the other process takes them, and how its answers are judged."""
    from foveate.planning.compressing import task
    from foveate.probe.run import graded, limit, stop_tokens, wilson
    from foveate.probe.trials import FULL, continuations

    if name == PERPLEXITY:
        texts = stretches(tokenizer, tokens)

        def compared(entries: list[dict]) -> dict:
            full = continuations(model, texts, {}, FOLLOW, file=LEDGER)[FULL].losses
            return ratio(tuple(e["loss"] for e in entries), full)

        return [{"ids": text[:-FOLLOW], "rest": text[-FOLLOW:]} for text in texts], compared
    # every so many of the 50 prompts that ours are tried on, so that all depths are there
    samples = task(name, tokens).samples(tokenizer, 50, 0)[:: max(1, 50 // count)]
    stop = sorted(stop_tokens(model, tokenizer))

    def recalled(entries: list[dict]) -> dict:
        right = sum(graded(s, tokenizer.decode(e["said"])).share for s, e in zip(samples, entries, strict=True))
        low, high = wilson(right, len(entries))
        return {"value": right / len(entries), "low": low, "high": high, "count": len(entries)}

    return [
        {"ids": s.ids[: s.question_start], "rest": s.ids[s.question_start :], "limit": limit(s), "stop": stop}
        for s in samples
    ], recalled


# ---------------------------------------------------------------- what is written


def results() -> dict[str, dict]:
    """What was measured so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def is_done(key: str, row: str, count: int) -> bool:
    """Whether a row was measured on so many prompts already."""
    return results().get(key, {}).get(row, {}).get("count", 0) >= (STRETCHES if key.endswith(PERPLEXITY) else count)


def save(key: str, found: dict[str, dict]) -> None:
    """Adds results, and writes the page from all that there are."""
    import torch

    result = results()
    result.setdefault(key, {}).update(found)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    page = [
        "# Quality against bytes",
        f"`python bench/frontier.py` on {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}; "
        "smollm2, float32. What the numbers are stands in the head of the script. Recall with 95 % Wilson intervals, "
        "perplexity as a multiple of the full cache's; in front the share of bytes held.",
    ]
    for protocol in ("unseen", "seen"):
        for tokens in sorted({int(k.split()[1]) for k in result if k.startswith(protocol)}):
            probes = [p for p in (*PROBES, PERPLEXITY) if f"{protocol} {tokens} {p}" in result]
            columns = [result[f"{protocol} {tokens} {p}"] for p in probes]
            page.append(f"## Question {protocol}, {tokens:,} tokens")
            lines = ["| cache | share of bytes | " + " | ".join(probes) + " |", "|---|---|" + "---|" * len(probes)]
            names = {n: None for column in columns for n in column}
            lines += [line(n, columns) for n in sorted(names, key=by_share)]
            page.append("\n".join(lines))
    (OUT / "frontier.md").write_text("\n\n".join(page) + "\n")


def by_share(name: str) -> tuple:
    kind, _, share = name.partition(" @ ")
    return (kind != "full", -float(share or 1), kind.startswith(("kvpress", "transformers")), kind)


def line(name: str, columns: list[dict[str, dict]]) -> str:
    """One row of the page."""
    held = [c[name]["share"] for c in columns if name in c]
    cells = [
        f"{c[name]['value']:.3f} ({c[name]['low']:.3f}-{c[name]['high']:.3f})" if name in c else "" for c in columns
    ]
    return f"| {name} | {max(held):.3f} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
