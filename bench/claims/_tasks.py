"""What the claims about steering share: labelled examples from a folder of public data, and pooled differences."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from _claim import number
from scipy import stats

from foveate.tasks import Example, read

SST2 = {"0": " negative", "1": " positive"}
AGNEWS = {"1": " World", "2": " Sports", "3": " Business", "4": " Technology"}


def folder() -> Path:
    """The folder that --data names: sst2-train.tsv and sst2-dev.tsv (label, sentence), agnews-a.csv (class, title,
    text), wikitext2-valid.txt, bbh-NAME.json."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--data", type=Path, required=True, help=folder.__doc__)
    return parser.parse_args().data


def command(name: str) -> dict[str, str]:
    return {"command": f"python bench/claims/{name}.py --data FOLDER"}


def sst2(data: Path, part: str, count: int, seed: int) -> tuple[Example, ...]:
    template = "Review: {sentence}\nSentiment: {label}"
    return read(data / f"sst2-{part}.tsv", template, ["label", "sentence"], SST2, count, seed)


def agnews(data: Path, count: int, seed: int) -> tuple[Example, ...]:
    """News with their topic, the text cut to its first 200 characters."""
    found = read(
        data / "agnews-a.csv", "News: {title}. {text}\nTopic: {label}", ["label", "title", "text"], AGNEWS, count, seed
    )
    end = "\nTopic:"
    return tuple(
        Example(e.prompt if len(e.prompt) < 280 else e.prompt.removesuffix(end)[:270] + " …" + end, e.choices, e.answer)
        for e in found
    )


def bbh(data: Path, name: str, count: int, seed: int) -> tuple[Example, ...]:
    """A task of BIG-Bench Hard; of options in brackets, the letter is the answer."""
    file = data / f"bbh-{name}.json"
    found = read(file, limit=count, seed=seed)
    lettered = all(c.startswith(" (") for e in found for c in e.choices)
    return read(file, "Q: {input}\nA: ({target}", limit=count, seed=seed) if lettered else found


def difference(before: np.ndarray, after: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Mean difference of paired numbers, its 95 % bootstrap interval, and what stood before and after."""
    gap = after.astype(float) - before.astype(float)
    low = high = gap.mean()
    if gap.any() and len(set(gap)) > 1:
        found = stats.bootstrap((gap,), np.mean, rng=np.random.default_rng(seed), method="percentile")
        low, high = found.confidence_interval
    p = stats.permutation_test((gap,), np.mean, permutation_type="samples", rng=np.random.default_rng(seed)).pvalue
    shares = {"before": number(before.mean()), "after": number(after.mean())}
    return (
        {"value": number(gap.mean()), "low": number(low), "high": number(high), "n": len(gap)}
        | shares
        | {"p": number(p)}
    )
