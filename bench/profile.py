"""What measuring every head costs, beside the plain forward pass and the tools that people use today.

    python bench/profile.py [--tokens 512 1024 ...] [--rounds 3] [--lens PYTHON]

Each measurement runs in a process of its own; a round runs all of them at one length, one after the other, and ratios
are taken inside a round. The median over rounds is reported with its range. `--lens` names a Python that has
transformer_lens installed. A process may take 20 GB; one that wants more is reported as "out of memory".

    plain               model(ids, logits_to_keep=1), scaled_dot_product_attention, nothing observed
    plain_all_logits    the same with the logits of all tokens, as model(ids) gives them
    base                foveate: entropy, sink_rate, column_mass, local_mass
    all                 foveate: every streaming metric
    output_attentions   transformers, eager, output_attentions=True
    lens                TransformerLens, run_with_cache (all activations, its default)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
# this folder would hide Python's own module `profile`, which torch imports
sys.path = [p for p in sys.path if Path(p or ".").resolve() != HERE]
KINDS = ("plain", "plain_all_logits", "base", "all", "output_attentions", "lens")
BASE = ("entropy", "sink_rate", "column_mass", "local_mass")
LIMIT = 20 << 30
# lengths from which on a peer is known to want more than LIMIT for its weights alone: layers x heads x N x N x 4 bytes
PEER_ROOM = {"output_attentions": 1.0, "lens": 2.0}


def resident() -> int:
    with Path("/proc/self/statm").open() as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measured(run) -> dict[str, float]:
    """Seconds of one call, and the largest resident memory during it."""
    peak, done = [resident()], threading.Event()

    def look() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], resident())

    before = resident()
    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    begun = time.perf_counter()
    try:
        extra = run() or {}
    finally:
        seconds = time.perf_counter() - begun
        done.set()
        watcher.join()
    return {"seconds": seconds, "before_bytes": before, "peak_bytes": max(peak[0], resident()), **extra}


def worker(kind: str, tokens: int) -> dict[str, float]:
    """One measurement, in this process."""
    import torch

    if kind in PEER_ROOM:
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    if kind == "lens":
        return lens(tokens)
    import foveate
    from foveate.core import registry
    from foveate.core.mechanism import Metric
    from foveate.probe.text import default_text
    from foveate.profiling import profile

    model, tokenizer = foveate.load("smollm2")
    ids = tokenizer(default_text(), verbose=False).input_ids[:tokens]
    batch = torch.tensor([ids])
    # rotary positions go on past the table; the length is what is measured
    model.config.max_position_embeddings = max(model.config.max_position_embeddings, tokens)
    if kind == "output_attentions":
        model.set_attn_implementation("eager")

    def run() -> dict[str, float] | None:
        with torch.inference_mode():
            if kind == "plain":
                model(input_ids=batch, use_cache=False, logits_to_keep=1)
            elif kind == "plain_all_logits":
                model(input_ids=batch, use_cache=False)
            elif kind == "output_attentions":
                model(input_ids=batch, use_cache=False, logits_to_keep=1, output_attentions=True)
            else:
                names = BASE if kind == "base" else registry.names("measure")
                metrics = [m for m in map(registry.make, names) if isinstance(m, Metric)]
                # the one pass; maps of single heads come from a second one that is told apart in `seconds`
                found = profile(model, tokenizer, ids, tokens=tokens, metrics=metrics, max_memory=LIMIT, maps=False)
                return {"estimated_bytes": found.info["estimated_bytes"], "metrics": len(metrics)}

    warm = torch.tensor([ids[:128]])
    with torch.inference_mode():
        model(input_ids=warm, use_cache=False)
    return measured(run)


def lens(tokens: int) -> dict[str, float]:
    import torch
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = os.environ["SMOLLM2_FOLDER"]
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = TransformerBridge.boot_transformers(folder, hf_model=network, tokenizer=tokenizer, device="cpu")
    ids = torch.randint(0, 49152, (1, tokens))

    def run() -> None:
        with torch.inference_mode():
            model.run_with_cache(ids)

    return measured(run)


def spawn(kind: str, tokens: int, python: str) -> dict[str, float]:
    """The measurement in a process of its own; {"failed": reason} when it could not be done."""
    weights = 30 * 9 * tokens**2 * 4
    if kind in PEER_ROOM and weights * PEER_ROOM[kind] > LIMIT:
        return {"failed": f"out of memory: keeps {weights * PEER_ROOM[kind] / 1e9:.0f} GB of weights"}
    from foveate.models.embedded import converted

    done = subprocess.run(
        [python, __file__, "--worker", kind, "--tokens", str(tokens)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"SMOLLM2_FOLDER": str(converted("smollm2"))},
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        memory = (
            any(w in done.stderr for w in ("can't allocate memory", "MemoryError", "bad_alloc"))
            or done.returncode == -9
        )
        return {"failed": "out of memory" if memory else last}
    return json.loads(done.stdout.strip().splitlines()[-1])


def summary(rounds: list[dict], tokens: int) -> list[str]:
    """One line of the table per kind."""
    lines = []
    for kind in KINDS:
        got = [r[kind] for r in rounds if kind in r]
        if not got:
            continue
        fine = [g for g in got if "failed" not in g]
        if not fine:
            lines.append(f"| {tokens:,} | {kind} | {got[0]['failed']} | | | |")
            continue
        seconds = [g["seconds"] for g in fine]
        ratios = [
            r[kind]["seconds"] / r["plain"]["seconds"] for r in rounds if "failed" not in r.get(kind, {"failed": 1})
        ]
        peak = statistics.median(g["peak_bytes"] for g in fine) / 1e9
        over = peak - statistics.median(r["plain"]["peak_bytes"] for r in rounds) / 1e9
        told = [g["estimated_bytes"] / g["peak_bytes"] for g in fine if "estimated_bytes" in g]
        what = f"{kind} ({int(fine[0]['metrics'])} metrics)" if "metrics" in fine[0] else kind
        lines.append(
            f"| {tokens:,} | {what} | {statistics.median(seconds):.2f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f}) | {peak:.2f} ({over:+.2f}) | "
            + (f"{statistics.median(told):.2f} |" if told else "|")
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--lens", default=None, help="a Python with transformer_lens; left out when not given")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "profile.json")
    parser.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args.worker, args.tokens[0])))
        return

    import torch

    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "model": "smollm2",
        "rounds": json.loads(args.out.read_text())["rounds"] if args.out.exists() else {},
    }
    for tokens in args.tokens:
        # at 16,384 tokens one round takes minutes and nothing is asked of it
        count = args.rounds if tokens <= 8192 else 1
        rounds = []
        for _ in range(count):
            kinds = [k for k in args.kinds if k != "lens" or args.lens]
            rounds.append({k: spawn(k, tokens, args.lens if k == "lens" else sys.executable) for k in kinds})
        result["rounds"][str(tokens)] = rounds
        print("\n".join(summary(rounds, tokens)), flush=True)
        args.out.parent.mkdir(exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")
        args.out.with_suffix(".md").write_text(page(result))


def page(result: dict) -> str:
    """The results as a page; lengths that were measured earlier stay in it."""
    lines = [
        "| tokens | what | seconds | x plain (range) | peak GB (over plain) | estimate / peak |",
        "|---|---|---|---|---|---|",
    ]
    for tokens in sorted(map(int, result["rounds"])):
        lines += summary(result["rounds"][str(tokens)], tokens)
    return (
        "# Measuring every head: time and memory\n\n"
        f"`python bench/profile.py` on {result['machine']}; smollm2, float32. What each line is stands in the head of "
        "the script; the rounds of each length are in profile.json.\n\n" + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    main()
