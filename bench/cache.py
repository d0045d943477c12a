"""What a compressed KV cache costs and saves, beside transformers' dynamic cache and kvpress.

    python bench/cache.py decode  [--tokens 2048 4096 8192] [--batch 1 8] [--rounds 5] [--kinds NAME ...] [--again]
    python bench/cache.py prompt  [--tokens 2048 4096 8192] [--batch 1] [--rounds 2] [--kinds NAME ...]
                                  [--kvpress PYTHON] [--again]
    python bench/cache.py memory  [the same]

`decode`: one process. Caches are filled with random keys and values (time does not depend on what stands in them), as
many entries per head as the policy keeps, drawn at random. Each round decodes 2 tokens with transformers' dynamic cache
and then 16 with ours, in which entries are scored and dropped once; ratios are taken inside a round, their median and
quartiles reported. `all` keeps everything, `half`, `quarter` and `tenth` drop nothing while they decode.

`prompt`: every measurement in a process of its own: seconds to the first token of a real text, seconds per token of the
8 behind it and bytes held after them; ratios to transformers, which is measured between two kinds in each round.
`--kvpress` names a Python with kvpress installed (it needs transformers below 5.3), whose presses run beside ours.

`memory`: the peak of resident memory in the same work, above what was resident before it. The allocator is told to give
large blocks back as soon as they are free, which costs time: without that the peak of one and the same run moves by
hundreds of MB. Needs Linux.

Figures are kept by kind and size in bench/results: what is there is measured again only with --again.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
# this folder would hide Python's own module `profile`, which torch imports
sys.path = [p for p in sys.path if Path(p or ".").resolve() != HERE]
OUT = HERE / "results"
SHARES = {"all": 1.0, "half": 0.5, "quarter": 0.25, "tenth": 0.1}
# forms of storage beside the default one
FORMS = ("quantised:value_bits=4", "quantised:bits=4")
KEEP = 0.25
PLAIN_TOKENS, TOKENS, PROMPT_TOKENS = 2, 16, 8
# what is kept of a measurement
PROMPTS = {"prompt": ("seconds", "token", "bytes"), "memory": ("peak", "bytes")}
# kinds beside one measurement of transformers: time drifts, memory does not
BESIDE = {"prompt": 2, "memory": 8}
GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
PRESSES = {
    "observation_window": "SnapKVPress",
    "key_norm": "KnormPress",
    "key_diversity": "KeyDiffPress",
    "expected_attention": "ExpectedAttentionPress",
    "last_token": "TOVAPress",
    "streaming": "StreamingLLMPress",
    "chunks": "ChunkKVPress",
}


def policies(kind: str) -> tuple:
    """The policies behind a kind, as `attach` takes them."""
    import foveate
    from foveate.compress import HeavyHitters, Streaming
    from foveate.core.registry import make

    if kind in SHARES:
        return (Streaming(foveate.Budget(SHARES[kind], every=0)),)
    one = make(kind, "compress")
    if one.parts & {"score", "read"}:
        return (one.within(KEEP),)
    # what acts on entries that go has none to act on alone
    beside = (HeavyHitters(KEEP),) if "merge" in one.parts else ()
    return (*beside, one)


def kinds(asked: list[str] | None, more: tuple[str, ...] = ()) -> list[str]:
    """The kinds to measure, of those that there are."""
    import foveate
    from foveate.core.mechanism import Policy

    known = [*more, *(n for n in foveate.names("compress") if issubclass(foveate.find(n), Policy)), *FORMS]
    if unknown := set(asked or ()) - set(known):
        raise SystemExit(f"no such kind: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return [k for k in known if not asked or k in asked]


# ---------------------------------------------------------------- decoding


def decode(args: argparse.Namespace) -> None:
    import torch

    import foveate

    model, _ = foveate.load("smollm2", tokenizer=False)
    file = OUT / "cache_decode.json"
    result = json.loads(file.read_text()) if file.exists() else {}
    for tokens in args.tokens:
        for batch in args.batch:
            plain = None
            for kind in kinds(args.kinds, tuple(SHARES)):
                key = f"{tokens} x {batch} {kind}"
                if key in result and not args.again:
                    continue
                with torch.no_grad():
                    plain = plain or full(model, tokens, batch)
                    result[key] = decode_rounds(model, plain, kind, args.rounds)
                print(decode_line(key, result[key]), flush=True)
                save(file, result)


def full(model, tokens: int, batch: int):
    """transformers' own cache of random keys and values."""
    import torch
    from transformers import DynamicCache

    config = model.config
    shape = (batch, config.num_key_value_heads, tokens, config.hidden_size // config.num_attention_heads)
    cache = DynamicCache(config=config)
    for n, layer in enumerate(cache.layers):
        rng = torch.Generator().manual_seed(n)
        layer.update(torch.randn(shape, generator=rng), torch.randn(shape, generator=rng))
    return cache


def filled(model, mine: tuple, plain):
    """The same under policies: of each head as many entries as they keep, drawn at random."""
    import torch
    from transformers import DynamicCache

    from foveate.core.cache import adopt, ragged_layers
    from foveate.core.policy import Policies
    from foveate.core.ragged import Ragged

    cache = DynamicCache(config=model.config)
    adopt(cache, None)
    layers, together = ragged_layers(cache), Policies.of(mine)
    for n, layer in enumerate(layers):
        k, v = plain.layers[n].keys, plain.layers[n].values
        batch, _, tokens, _ = k.shape
        seen = torch.full((batch,), tokens)
        keep = torch.ones(k.shape[:3], dtype=torch.bool)
        if together.score is not None:
            counts = together.score.counts(seen, n, len(layers), k.shape[1], 520)
            keep = torch.rand(k.shape[:3], generator=torch.Generator().manual_seed(n)).argsort(-1) < counts[..., None]
        store = None if together.store is None else partial(together.store.store, layer=n)
        layer.store = Ragged.of_call(k, v, keep, torch.zeros(k.shape[:3]), store=store)
        layer.seen, layer.real = tokens, seen
        layer.lazy_initialization(k, v)
    return cache


def decode_rounds(model, plain, kind: str, count: int) -> list[dict]:
    """Seconds per decoded token and bytes, ours beside transformers', for each round."""
    import torch

    import foveate

    mine, token = policies(kind), torch.full((len(plain.layers[0].keys), 1), 1000)
    cache = filled(model, mine, plain)
    rounds = []
    with foveate.attach(model, *mine) as attached:
        model(input_ids=token, past_key_values=cache)
    for n in range(count + 1):
        begun = time.perf_counter()
        for _ in range(PLAIN_TOKENS):
            model(input_ids=token, past_key_values=plain)
        between = time.perf_counter()
        with foveate.attach(model, *mine) as attached:
            for _ in range(TOKENS):
                model(input_ids=token, past_key_values=cache)
        ended = time.perf_counter()
        one = {
            "plain": (between - begun) / PLAIN_TOKENS,
            "seconds": (ended - between) / TOKENS,
            "bytes": attached.bytes_held(),
            "full": sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers),
        }
        for layer in plain.layers:
            layer.crop(-PLAIN_TOKENS)
        # the first one warms everything up
        if n:
            rounds.append(one)
    return rounds


def decode_line(key: str, rounds: list[dict]) -> str:
    size, kind = key.rsplit(" ", 1)
    tokens, batch = size.split(" x ")
    ratios = [r["seconds"] / r["plain"] for r in rounds]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    seconds, plain = (statistics.median(r[name] for r in rounds) for name in ("seconds", "plain"))
    held, full = rounds[-1]["bytes"], rounds[-1]["full"]
    return (
        f"| {int(tokens):,} | {batch} | {kind} | {seconds * 1e3:.0f} | {plain * 1e3:.0f} | "
        f"{statistics.median(ratios):.2f} ({low:.2f}-{high:.2f}) | {held / 1e6:.1f} | {held / full:.3f} |"
    )


# ---------------------------------------------------------------- prompts


def prompt_worker(kind: str, tokens: int, batch: int) -> dict:
    """Prompts and a few tokens behind them, in this process."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    folder = os.environ["SMOLLM2_FOLDER"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids[: tokens * batch]).view(batch, tokens)
    where, _, name = kind.partition(":")
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), ExitStack() as stack:
        model(ids[:, :64])
        gc.collect()
        if where == "kvpress":
            import kvpress

            press = getattr(kvpress, PRESSES[name])
            press = press(kvpress.SnapKVPress(1 - KEEP)) if name == "chunks" else press(compression_ratio=1 - KEEP)
            stack.enter_context(press(model))
        elif where == "foveate":
            import foveate

            attached = stack.enter_context(foveate.attach(model, *policies(name)))
        before = resident(anew=True)
        begun = time.perf_counter()
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        between = time.perf_counter()
        for n in range(PROMPT_TOKENS):
            # the places go on behind the whole prompt, whatever a press has dropped of it
            place = torch.full((batch, 1), tokens + n)
            model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True, position_ids=place)
        ended = time.perf_counter()
        if where == "foveate":
            held = attached.bytes_held()
        else:
            held = sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))
    peak = resident("VmHWM") - before
    return {"seconds": between - begun, "token": (ended - between) / PROMPT_TOKENS, "bytes": held, "peak": peak}


def resident(what: str = "VmRSS", anew: bool = False) -> int:
    """Bytes of this process that are in memory, or their peak (`VmHWM`), which may begin `anew`."""
    own = Path("/proc/self")
    if not own.exists():
        return 0
    if anew:
        (own / "clear_refs").write_text("5")
    line = next(line for line in (own / "status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def prompt(args: argparse.Namespace) -> None:
    from foveate.models.embedded import converted

    env = os.environ | {"SMOLLM2_FOLDER": str(converted("smollm2"))}
    if args.what == "memory":
        env |= GIVING_BACK
    file = OUT / f"cache_{args.what}.json"
    result = json.loads(file.read_text()) if file.exists() else {}
    mine = [f"foveate:{k}" for k in kinds(args.kinds, tuple(SHARES))]
    if args.kvpress:
        mine += [f"kvpress:{p}" for p in PRESSES if not args.kinds or p in args.kinds]
    for tokens, batch in itertools.product(args.tokens, args.batch):
        size = f"{tokens} x {batch}"
        left = [kind for kind in mine if args.again or f"{size} {kind}" not in result]
        for n in range(0, len(left), BESIDE[args.what]):
            some = left[n : n + BESIDE[args.what]]
            # transformers between two kinds, so that it stands beside both
            order = [some[0], "transformers", *some[1:]]
            rounds = [{who: measured(who, size, args, env) for who in order} for _ in range(args.rounds)]
            for kind in some:
                key = f"{size} {kind}"
                result[key] = [{who: found[who] for who in ("transformers", kind)} for found in rounds]
                print(TABLES[args.what][2](key, result[key]), flush=True)
            save(file, result)


def measured(kind: str, size: str, args: argparse.Namespace, env: dict) -> dict:
    """What a process of its own says of one kind."""
    python = args.kvpress if kind.startswith("kvpress") else sys.executable
    command = [python, __file__, "worker", kind, *size.split(" x ")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    last = said[-1] if said else f"ended with {done.returncode}"
    if done.returncode != 0:
        return {"failed": last}
    found = json.loads(last)
    return {name: found[name] for name in PROMPTS[args.what]}


def prompt_line(key: str, rounds: list[dict]) -> str:
    size, kind = key.rsplit(" ", 1)
    tokens, batch = size.split(" x ")
    base, fine = "transformers", [r for r in rounds if "failed" not in r[kind]]
    if not fine:
        return f"| {int(tokens):,} | {batch} | {kind} | {rounds[0][kind]['failed']} | | | | |"
    cells = []
    for what in ("seconds", "token"):
        ratios = [r[kind][what] / r[base][what] for r in fine]
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
    held, whole = (statistics.median(r[who]["bytes"] for r in fine) for who in (kind, base))
    seconds = statistics.median(r[kind]["seconds"] for r in fine)
    return (
        f"| {int(tokens):,} | {batch} | {kind} | {seconds:.2f} | {cells[0]} | {cells[1]} | "
        f"{held / 1e6:.1f} | {held / whole:.3f} |"
    )


def memory_line(key: str, rounds: list[dict]) -> str:
    size, kind = key.rsplit(" ", 1)
    tokens, batch = size.split(" x ")
    fine = [r for r in rounds if "failed" not in r[kind]]
    if not fine:
        return f"| {int(tokens):,} | {batch} | {kind} | {rounds[0][kind]['failed']} | | | |"
    less = [(r["transformers"]["peak"] - r[kind]["peak"]) / 1e6 for r in fine]
    freed = statistics.median((r["transformers"]["bytes"] - r[kind]["bytes"]) / 1e6 for r in fine)
    peak, plain = (statistics.median(r[who]["peak"] / 1e6 for r in fine) for who in (kind, "transformers"))
    return (
        f"| {int(tokens):,} | {batch} | {kind} | {peak:.0f} | {plain:.0f} | "
        f"{statistics.median(less):.0f} ({min(less):.0f} to {max(less):.0f}) | {freed:.0f} |"
    )


# ---------------------------------------------------------------- what is written

SIZES = ("tokens", "batch", "cache")
TABLES = {
    "decode": (
        "one decoded token",
        (*SIZES, "ms per token", "transformers'", "x transformers (quartiles)", "MB held", "share"),
        decode_line,
    ),
    "prompt": (
        f"a prompt and {PROMPT_TOKENS} tokens",
        (
            *SIZES,
            "s to first token",
            "x transformers (range)",
            "each token, x transformers (range)",
            "MB held",
            "share",
        ),
        prompt_line,
    ),
    "memory": (
        "the peak of the same work",
        (*SIZES, "peak MB", "transformers'", "MB less (range)", "MB of the cache freed"),
        memory_line,
    ),
}


def save(file: Path, result: dict) -> None:
    """Writes the numbers, and the page from all that there are."""
    import torch

    OUT.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    page = [
        "# A compressed KV cache: time and memory",
        f"smollm2, float32, {machine}. What each line is stands in the head of bench/cache.py; rounds are in the json.",
    ]
    for what, (title, columns, line) in TABLES.items():
        found = OUT / f"cache_{what}.json"
        if found.exists():
            head = [f"`python bench/cache.py {what}`: {title}; policies keep or read a quarter", ""]
            head += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
            page.append("\n".join([*head, *(line(key, rounds) for key, rounds in ordered(found))]))
    (OUT / "cache.md").write_text("\n\n".join(page) + "\n")


def ordered(file: Path) -> list[tuple[str, list[dict]]]:
    """What a file of results holds, by size."""
    numbers = re.compile(r"\d+")
    return sorted(json.loads(file.read_text()).items(), key=lambda item: [int(x) for x in numbers.findall(item[0])])


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        print(json.dumps(prompt_worker(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("decode", *PROMPTS), nargs="?", default="decode")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--batch", type=int, nargs="+", default=None, help="default: decode 1 8, else 1")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--kinds", nargs="+", default=None, metavar="NAME", help="policies by name; default: all")
    parser.add_argument("--again", action="store_true", help="measure again what is in the results")
    parser.add_argument("--kvpress", default=None, help="a Python with kvpress; left out when not given")
    args = parser.parse_args()
    args.rounds = args.rounds or {"decode": 5, "prompt": 2, "memory": 1}[args.what]
    args.batch = args.batch or ([1, 8] if args.what == "decode" else [1])
    (decode if args.what == "decode" else prompt)(args)


if __name__ == "__main__":
    main()
