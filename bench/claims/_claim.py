"""What the claim scripts share: the model and its untrained twin, intervals, and the one form of a result."""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from scipy import stats

import foveate

RESULTS = Path(__file__).parent / "results"
VERDICTS = ("holds", "partly", "fails", "not testable here")
STARTED = time.perf_counter()


def trained() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer."""
    return foveate.load("smollm2")


def untrained(model: Any, seed: int = 0) -> Any:
    """The same architecture with random weights, as its configuration initialises them."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    torch.manual_seed(seed)
    return type(model)(config).float().eval()


def mean(values: Any) -> dict[str, float]:
    """Mean of independent values with Student's 95 % interval."""
    x = torch.as_tensor(values, dtype=torch.float64).flatten()
    half = float(stats.t.ppf(0.975, len(x) - 1)) * float(x.std()) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    return {"value": number(x.mean()), "low": number(x.mean() - half), "high": number(x.mean() + half), "n": len(x)}


def share(hits: int, of: int) -> dict[str, float]:
    """A share with its Wilson 95 % interval."""
    p, z = hits / of, 1.96
    middle, half = (p + z * z / of / 2), z * math.sqrt(p * (1 - p) / of + z * z / of / of / 4)
    low, high = ((middle + sign * half) / (1 + z * z / of) for sign in (-1, 1))
    # exactly so, but for rounding
    low, high = low if hits else 0, high if hits < of else 1
    return {"value": number(p), "low": number(low), "high": number(high), "hits": hits, "n": of}


def number(x: Any) -> float:
    """Four figures: more would be noise in a result that people read."""
    return float(f"{float(x):.4g}")


def write(title: str, claim: str, verdict: str, numbers: dict, control: dict, seeds: list[int], **more: Any) -> None:
    """Writes bench/claims/results/NAME.json for the script that runs, and says what is in it."""
    if verdict not in VERDICTS:
        raise ValueError(f"verdict {verdict!r} is none of {VERDICTS}")
    name = Path(sys.argv[0]).stem
    result = {"title": title, "claim": claim, "verdict": verdict, "numbers": numbers, "control": control}
    result |= {"seeds": seeds, "command": f"python bench/claims/{name}.py"} | more
    result["model"] = result.pop("encoder", "SmolLM2-135M-Instruct")
    result["seconds"] = round(time.perf_counter() - STARTED)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(result, indent=2, ensure_ascii=False))
