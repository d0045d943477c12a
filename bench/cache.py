"""What a compressed KV cache costs and saves, beside transformers' dynamic cache and kvpress.

    python bench/cache.py decode  [--tokens 2048 4096 8192] [--batch 1 8] [--rounds 15]
    python bench/cache.py prompt  [--tokens 2048 4096 8192] [--rounds 2] [--kvpress PYTHON]

`decode`: one process; the caches of all kinds are filled with the same random keys and values (time does not depend on
what stands in them), kept entries drawn at random. Each round decodes one token with every kind in turn; ratios are
taken inside a round, to transformers' dynamic cache, and their median and quartiles reported. `ours at 1.0` keeps all.
Nothing is scored or dropped while decoding (every=0): what a policy adds for that is not in these figures.

`prompt`: every measurement in a process of its own: seconds to the first token of a real text, bytes held after it, and
the peak of resident memory; ratios to transformers inside a round. `--kvpress` names a Python with kvpress installed
(it needs transformers below 5.3), whose presses run beside ours.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
# this folder would hide Python's own module `profile`, which torch imports
sys.path = [p for p in sys.path if Path(p or ".").resolve() != HERE]
OUT = HERE / "results"
KEEPS = (1.0, 0.5, 0.25, 0.1)
POLICIES = ("heavy_hitters", "key_diversity", "key_norm", "last_token", "observation_window", "streaming")
PRESSES = {"observation_window": "SnapKVPress", "key_norm": "KnormPress", "key_diversity": "KeyDiffPress"}


# ---------------------------------------------------------------- decoding


def decode(args: argparse.Namespace) -> None:
    import torch

    import foveate

    model, _ = foveate.load("smollm2")
    file = OUT / "cache_decode.json"
    result = json.loads(file.read_text()) if file.exists() else {}
    for tokens in args.tokens:
        for batch in args.batch:
            with torch.no_grad():
                rounds = decode_rounds(model, tokens, batch, args.rounds)
            result[f"{tokens} x {batch}"] = rounds
            print("\n".join(decode_lines(tokens, batch, rounds)), flush=True)
            save(file, result)


def decode_rounds(model, tokens: int, batch: int, count: int) -> list[dict]:
    """Seconds per decoded token and bytes, by kind, for each round."""
    import torch
    from transformers import DynamicCache

    import foveate
    from foveate.compress import Streaming
    from foveate.core.cache import adopt, ragged_layers
    from foveate.core.ragged import Ragged

    config = model.config
    shape = (batch, config.num_key_value_heads, tokens, config.hidden_size // config.num_attention_heads)
    kinds = ["transformers", *(f"ours at {keep}" for keep in KEEPS)]
    caches = {}
    for kind in kinds:
        caches[kind] = DynamicCache(config=config)
        for n, layer in enumerate(caches[kind].layers):
            rng = torch.Generator().manual_seed(n)
            k, v = (torch.randn(shape, generator=rng) for _ in range(2))
            if kind == "transformers":
                layer.update(k, v)
        if kind != "transformers":
            adopt(caches[kind], None)
            for n, layer in enumerate(ragged_layers(caches[kind])):
                rng = torch.Generator().manual_seed(n)
                k, v = (torch.randn(shape, generator=rng) for _ in range(2))
                drawn = torch.rand(shape[:3], generator=rng).argsort(-1)
                keep = drawn < float(kind.split()[-1]) * tokens
                layer.store = Ragged.of_call(k, v, keep, torch.zeros(shape[:3]))
                layer.seen, layer.real = tokens, torch.full((batch,), tokens)
                layer.lazy_initialization(k, v)
    token = torch.full((batch, 1), 1000)
    rounds = []
    for n in range(count + 2):
        one = {}
        for kind in kinds:
            if kind == "transformers":
                begun = time.perf_counter()
                model(input_ids=token, past_key_values=caches[kind])
                seconds = time.perf_counter() - begun
                held = sum(layer.keys.nbytes + layer.values.nbytes for layer in caches[kind].layers)
            else:
                budget = foveate.Budget(float(kind.split()[-1]), every=0)
                with foveate.attach(model, Streaming(budget)) as attached:
                    begun = time.perf_counter()
                    model(input_ids=token, past_key_values=caches[kind])
                    seconds = time.perf_counter() - begun
                held = attached.bytes_held()
            one[kind] = {"seconds": seconds, "bytes": held}
        # the first two warm everything up
        if n >= 2:
            rounds.append(one)
    return rounds


def decode_lines(tokens: int, batch: int, rounds: list[dict]) -> list[str]:
    lines = []
    for kind in rounds[0]:
        ratios = sorted(r[kind]["seconds"] / r["transformers"]["seconds"] for r in rounds)
        seconds = statistics.median(r[kind]["seconds"] for r in rounds)
        low, _, high = statistics.quantiles(ratios, n=4)
        share = rounds[-1][kind]["bytes"] / rounds[-1]["transformers"]["bytes"]
        lines.append(
            f"| {tokens:,} | {batch} | {kind} | {seconds * 1e3:.1f} | {statistics.median(ratios):.2f} "
            f"({low:.2f}-{high:.2f}) | {rounds[-1][kind]['bytes'] / 1e6:.1f} | {share:.3f} |"
        )
    return lines


# ---------------------------------------------------------------- prompts


def prompt_worker(kind: str, tokens: int, keep: float) -> dict:
    """One prompt, in this process."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    folder = os.environ["SMOLLM2_FOLDER"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = torch.tensor([tokenizer(text, verbose=False).input_ids[:tokens]])
    with torch.no_grad():
        model(ids[:, :64])
        gc.collect()
        cache = DynamicCache(config=model.config)
        where, _, name = kind.partition(":")
        options = {"input_ids": ids, "past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        if where == "kvpress":
            import kvpress

            with getattr(kvpress, PRESSES[name])(compression_ratio=1 - keep)(model):
                seconds = timed(lambda: model(**options))
        elif where == "foveate":
            import foveate
            from foveate.core.registry import make

            with foveate.attach(model, make(name, "compress").within(keep)) as attached:
                seconds = timed(lambda: model(**options))
        else:
            seconds = timed(lambda: model(**options))
        if where == "foveate":
            held = attached.bytes_held()
        else:
            kept = [t for layer in cache.layers for t in (layer.keys, layer.values)]
            held = sum(t.untyped_storage().nbytes() for t in kept)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "bytes": held, "peak": peak}


def timed(run) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def prompt(args: argparse.Namespace) -> None:
    from foveate.models.embedded import converted

    env = os.environ | {"SMOLLM2_FOLDER": str(converted("smollm2"))}
    file = OUT / "cache_prompt.json"
    result = json.loads(file.read_text()) if file.exists() else {}
    kinds = [("transformers", 1.0), *((f"foveate:{p}", 0.25) for p in POLICIES), ("foveate:heavy_hitters", 1.0)]
    if args.kvpress:
        kinds += [(f"kvpress:{p}", 0.25) for p in PRESSES]
    for tokens in args.tokens:
        rounds = []
        for _ in range(args.rounds):
            one = {}
            for kind, keep in kinds:
                python = args.kvpress if kind.startswith("kvpress") else sys.executable
                command = [python, __file__, "worker", kind, str(tokens), str(keep)]
                done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
                last = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1]
                one[f"{kind} at {keep}"] = json.loads(last) if done.returncode == 0 else {"failed": last}
            rounds.append(one)
        result[str(tokens)] = rounds
        print("\n".join(prompt_lines(tokens, rounds)), flush=True)
        save(file, result)


def prompt_lines(tokens: int, rounds: list[dict]) -> list[str]:
    lines, base = [], "transformers at 1.0"
    for kind in rounds[0]:
        fine = [r for r in rounds if "failed" not in r[kind]]
        if not fine:
            lines.append(f"| {tokens:,} | {kind} | {rounds[0][kind]['failed']} | | | | |")
            continue
        ratios = [r[kind]["seconds"] / r[base]["seconds"] for r in fine]
        held, peak = (statistics.median(r[kind][x] for r in fine) for x in ("bytes", "peak"))
        full, plain = (statistics.median(r[base][x] for r in fine) for x in ("bytes", "peak"))
        lines.append(
            f"| {tokens:,} | {kind} | {statistics.median(r[kind]['seconds'] for r in fine):.2f} | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) | {held / 1e6:.1f} | "
            f"{held / full:.3f} | {(peak - plain) / 1e6:+.0f} |"
        )
    return lines


# ---------------------------------------------------------------- both


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
    found = OUT / "cache_decode.json"
    if found.exists():
        lines = [
            "`python bench/cache.py decode`: one decoded token",
            "",
            "| tokens | batch | cache | ms per token | x transformers (quartiles) | MB held | share |",
            "|---|---|---|---|---|---|---|",
        ]
        for key, rounds in json.loads(found.read_text()).items():
            lines += decode_lines(*(int(x) for x in key.split(" x ")), rounds)
        page.append("\n".join(lines))
    found = OUT / "cache_prompt.json"
    if found.exists():
        lines = [
            "`python bench/cache.py prompt`: a prompt, batch 1",
            "",
            "| tokens | cache | s to first token | x transformers (range) | MB held | share | peak MB over plain |",
            "|---|---|---|---|---|---|---|",
        ]
        for key, rounds in json.loads(found.read_text()).items():
            lines += prompt_lines(int(key), rounds)
        page.append("\n".join(lines))
    (OUT / "cache.md").write_text("\n\n".join(page) + "\n")


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        print(json.dumps(prompt_worker(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("decode", "prompt"), nargs="?", default="decode")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--kvpress", default=None, help="a Python with kvpress; left out when not given")
    args = parser.parse_args()
    args.rounds = args.rounds or {"decode": 15, "prompt": 2}[args.what]
    {"decode": decode, "prompt": prompt}[args.what](args)


if __name__ == "__main__":
    main()
