"""How much faster a batch decodes when the prefix of its sequences is held once, by batch and by prefix.

    python bench/claims/shared_prefix.py [--quick]

Whole decode steps of smollm2, ours beside transformers' own with a prefix for each sequence, as bench/prefix.py times
them. Rounds in which one follows the other are the samples. `--quick` tries small sizes and prints what it found; only
a full run is written.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from _claim import mean, number, trained, write

BATCHES, PREFIXES, SUFFIX, ROUNDS, SEED = (1, 4, 16, 32), (256, 1024, 4096), 64, 7, 0


def timed():
    """bench/prefix.py, which is no module of a package."""
    place = Path(__file__).resolve().parents[1] / "prefix.py"
    spec = importlib.util.spec_from_file_location("prefix_bench", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def grows(found: dict, sizes: list[tuple[int, int]]) -> bool:
    """Whether each size is faster beside transformers than the one before, and the last surely than the first."""
    middle = [found[size]["value"] for size in sizes]
    return middle == sorted(middle) and found[sizes[-1]]["low"] > found[sizes[0]]["high"]


def lost(seconds: list[float], longer: list[float]) -> float:
    """Share of the throughput that a longer prefix costs."""
    return number(1 - torch.tensor(seconds).median() / torch.tensor(longer).median())


@torch.inference_mode()
def main() -> None:
    quick = "--quick" in sys.argv
    batches, prefixes, rounds = ((1, 4), (64, 256), 3) if quick else (BATCHES, PREFIXES, ROUNDS)
    bench, (model, _) = timed(), trained()
    torch.manual_seed(SEED)
    faster, times = {}, {}
    for batch in batches:
        for prefix in prefixes:
            size = batch, prefix
            times[size] = bench.step(model, batch, prefix, SUFFIX, rounds)["rounds"]
            faster[size] = mean([theirs / ours for ours, theirs in times[size]])
            print(f"{batch} sequences, prefix {prefix}: {faster[size]['value']:.2f} times faster", flush=True)
    by_batch = [(batch, prefixes[-1]) for batch in batches]
    by_prefix = [(batches[-1], prefix) for prefix in prefixes]
    both = [grows(faster, by_batch), grows(faster, by_prefix)]
    ours, theirs = ([[pair[n] for pair in times[size]] for size in by_prefix] for n in (0, 1))
    numbers = {f"{b} sequences, prefix {p}: times faster": x for (b, p), x in faster.items()}
    words = f"throughput lost with {batches[-1]} sequences, prefix {prefixes[0]} to {prefixes[-1]}"
    numbers[words] = lost(ours[0], ours[-1])
    control = {f"{words}, a prefix for each": lost(theirs[0], theirs[-1])}
    control["one sequence, which shares with nobody: times faster"] = faster[1, prefixes[-1]]
    if quick:
        print(numbers, control, both, sep="\n")
        return
    write(
        title="Hydragen: High-Throughput LLM Inference with Shared Prefixes",
        claim="Attention over a prefix that is held once makes decoding faster than a prefix for each sequence does, "
        "and the more so the larger the batch and the longer the prefix.",
        verdict="holds" if all(both) and faster[by_batch[-1]]["low"] > 1 else "partly" if any(both) else "fails",
        numbers=numbers,
        control=control,
        seeds=[SEED],
        rule=f"holds when the ratio grows at each step of the batch (prefix {prefixes[-1]}) and of the prefix "
        f"({batches[-1]} sequences), the last surely above the first, and is surely above 1 at the largest size",
        machine=f"CPU, {torch.get_num_threads()} threads; the paper's figures are of GPUs",
    )


if __name__ == "__main__":
    main()
