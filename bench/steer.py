"""What each edit costs: a prompt, a decoded token and memory, beside the same model without it.

    python bench/steer.py [--tokens 512 2048 8192] [--rounds 7] [--edits NAME ...]

smollm2, float32, batch 1, logits of the last token only. Each round runs the plain model and then the edited one, the
other way round in every second round, on a prompt of random tokens and on a few tokens behind it; ratios are taken
inside a round, and their median is reported with its quartiles. A round before them, of at most 2,048 tokens, warms up
and is left out. In the timing the edit is attached with trial=False; what the trial on entering costs, once per `with`
block, is a column of its own.

Memory: a process of its own per edit and length runs the prompt once; what its peak of resident memory is above the
memory before the prompt is compared with the same of the plain model (on Linux). Nothing may grow with the square of
the length: at 8,192 tokens one score per head and pair of tokens is 2.4 GB in every layer.

Targets: an edit in closed form (a span emphasis) or of head outputs (a head scaling) takes at most 1.05 x the plain
forward pass, one that needs whole rows at most 1.6 x at 2,048 tokens.

Figures are kept by edit and length in bench/results/steer.json: an edit that is there is measured again only with
--again, so that a long run can be broken off and added to.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# this folder would hide Python's own module `profile`, which torch imports
sys.path = [p for p in sys.path if Path(p or ".").resolve() != HERE]
OUT = HERE / "results"
PLAIN = "plain"
DECODED = 4
WARMING = 2048
CLOSED, WHOLE_ROWS, WHOLE_ROWS_AT = 1.05, 1.6, 2048
SPAN = ((16, 48),)
# in the middle of the model, two heads in each of three layers
HEADS = tuple((layer, head) for layer in (10, 15, 20) for head in (2, 5))


def settings(model: Any) -> dict[str, Callable[[], Any]]:
    """Settings of the edits whose defaults do nothing, or that need something to be found first; sizes are real."""
    from foveate import steer

    width, head_dim = model.config.hidden_size, model.config.hidden_size // model.config.num_attention_heads
    vector, value = (0.01,) * width, (0.01,) * head_dim
    return {
        "emphasis": lambda: steer.Emphasis(SPAN, 1.0),
        "head_offsets": lambda: steer.HeadOffsets(tuple((*h, value) for h in HEADS)),
        "head_reinforcement": lambda: steer.HeadReinforcement(2.0, heads=HEADS),
        "head_scale": lambda: steer.HeadScale(1.0, heads=tuple((*h, 0.0) for h in HEADS)),
        "knockout": lambda: steer.Knockout(keys=SPAN),
        "length_temperature": lambda: steer.LengthTemperature(trained=128),
        "mean_ablation": lambda: steer.MeanAblation(tuple((*h, value) for h in HEADS)),
        "resample_ablation": lambda: steer.ResampleAblation.fit(model, {"input_ids": prompt(model, 64)}, HEADS),
        "shift_vectors": lambda: steer.ShiftVectors(tuple((layer, vector) for layer in (10, 15, 20))),
        "sink_redistribution": lambda: steer.SinkRedistribution(SPAN),
    }


def acting() -> list[str]:
    """The edits that act on a running model, by name; those of prompts act before there are tokens."""
    import foveate
    from foveate.core.mechanism import Edit, ExpertEdit, HeadEdit, ResidualEdit

    kinds = (Edit, HeadEdit, ResidualEdit, ExpertEdit)
    return [name for name in foveate.names("steer") if issubclass(foveate.find(name), kinds)]


def made(name: str, model: Any) -> Any:
    """The edit at its representative setting."""
    import foveate

    edit = settings(model).get(name, lambda: foveate.make(name, "steer"))()
    if edit.nothing:
        raise SystemExit(f"{name}: its default changes nothing; give it a setting in bench/steer.py")
    return edit


def kind(edit: Any) -> str:
    """What the edit must see, on which its target depends."""
    from foveate.core.mechanism import Edit, HeadEdit

    if isinstance(edit, Edit):
        return "whole rows" if edit.whole_rows or edit.needs() else "closed form"
    return "head outputs" if isinstance(edit, HeadEdit) else "residual stream"


def prompt(model: Any, tokens: int) -> Any:
    """Random tokens: time does not depend on what they say."""
    import torch

    return torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- time


def timed(model: Any, ids: Any, edit: Any) -> dict[str, float]:
    """Seconds of a prompt, and of a decoded token."""
    import foveate

    with nullcontext() if edit is None else foveate.attach(model, edit, trial=False):
        begun = time.perf_counter()
        cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        between = time.perf_counter()
        for _ in range(DECODED):
            cache = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).past_key_values
        ended = time.perf_counter()
    return {"prefill": between - begun, "decode": (ended - between) / DECODED}


def trial(model: Any, edit: Any) -> float:
    """Seconds that attaching takes with the trial on entering, the plain run of it included."""
    import foveate

    begun = time.perf_counter()
    with foveate.attach(model, edit):
        ended = time.perf_counter()
        # an edit that nothing reached raises on leaving, and so does a span that no text came to
        model(input_ids=prompt(model, 64), logits_to_keep=1)
    return ended - begun


def measured(model: Any, name: str, tokens: int, rounds: int) -> dict[str, Any]:
    """One edit at one length: the rounds, the trial, and the peaks of memory."""
    import torch

    edit, found = made(name, model), []
    with torch.no_grad():
        ids = prompt(model, tokens)
        for n in range(rounds + 1):
            order = [(PLAIN, None), ("edited", edit)]
            part = ids if n else ids[:, :WARMING]
            one = {what: timed(model, part, e) for what, e in (order if n % 2 else order[::-1])}
            if n:
                found.append(one)
        entering = [trial(model, edit) for _ in range(min(rounds, 3))]
    return {"kind": kind(edit), "setting": described(edit), "rounds": found, "trial": entering}


def described(edit: Any) -> str:
    """The setting, with long tuples counted."""
    import dataclasses

    parts = []
    for f in dataclasses.fields(edit):
        value = getattr(edit, f.name)
        if value == f.default:
            continue
        if isinstance(value, tuple) and len(str(value)) > 40:
            parts.append(f"{f.name} of {len(value)}")
        else:
            parts.append(f"{f.name}={value if isinstance(value, tuple | int | float | str) else '…'}")
    return ", ".join(parts) or "default"


# ---------------------------------------------------------------- memory


def worker(name: str, tokens: int) -> dict[str, int]:
    """The resident memory before one prompt, and its peak, in this process."""
    import ctypes
    import gc

    import torch

    import foveate

    model, _ = foveate.load("smollm2", tokenizer=False)
    edit = None if name == PLAIN else made(name, model)
    with torch.no_grad(), nullcontext() if edit is None else foveate.attach(model, edit, trial=False):
        model(input_ids=prompt(model, 64), logits_to_keep=1)
        # what loading has freed goes back, and its own peak is forgotten
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = high_water()
        model(input_ids=prompt(model, tokens), use_cache=True, logits_to_keep=1)
    return {"before": before, "peak": high_water()}


def high_water() -> int:
    """Largest resident memory since it was last reset, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024


def peak(name: str, tokens: int) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "worker", name, str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    last = said[-1] if said else f"ended with {done.returncode}"
    return json.loads(last) if done.returncode == 0 else {"failed": last}


# ---------------------------------------------------------------- what is written


def ratios(rounds: list[dict], what: str) -> tuple[float, float, float]:
    """Median and quartiles of edited / plain."""
    values = [r["edited"][what] / r[PLAIN][what] for r in rounds]
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4)
    return statistics.median(values), low, high


def verdict(entry: dict, tokens: int) -> str:
    """Whether the target is met, where there is one."""
    ratio, low, _ = ratios(entry["rounds"], "prefill")
    if entry["kind"] == "whole rows":
        if tokens != WHOLE_ROWS_AT:
            return ""
        target = WHOLE_ROWS
    elif entry["kind"] in ("closed form", "head outputs"):
        target = CLOSED
    else:
        return ""
    return "met" if ratio <= target else "within the spread" if low <= target else "missed"


def line(name: str, tokens: int, entry: dict, peaks: dict[str, dict]) -> str:
    """One row of the page."""
    prefill, decode = (ratios(entry["rounds"], what) for what in ("prefill", "decode"))
    seconds = statistics.median(r[PLAIN]["prefill"] for r in entry["rounds"])
    own, plain = peaks.get(f"{name} {tokens}", {}), peaks.get(f"{PLAIN} {tokens}", {})
    over = own.get("failed", "")
    if "peak" in own and "peak" in plain:
        # against what was there before the prompt: the edit's own code is no part of what a text costs
        over = f"{(own['peak'] - own['before'] - plain['peak'] + plain['before']) / 1e6:+.0f}"
    times = " | ".join(f"{middle:.2f} ({low:.2f}-{high:.2f})" for middle, low, high in (prefill, decode))
    return (
        f"| {tokens:,} | {name} | {entry['kind']} | {times} | {verdict(entry, tokens)} | {over} | "
        f"{statistics.median(entry['trial']) * 1e3:.0f} | {seconds:.2f} | {entry['setting']} |"
    )


def save(found: dict[str, Any]) -> None:
    """Writes the numbers, and the page from all that there are."""
    import torch

    OUT.mkdir(exist_ok=True)
    (OUT / "steer.json").write_text(json.dumps(found, indent=1) + "\n")
    page = [
        "# Edits: time and memory",
        f"`python bench/steer.py` on {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}; smollm2, "
        "float32, batch 1. What each column is stands in the head of the script; the rounds are in steer.json. Times "
        "are with trial=False; the trial on entering, once per `with` block, is the column after memory. Targets: a "
        f"closed form or an edit of head outputs at most {CLOSED} x the plain forward pass, an edit of whole rows at "
        f"most {WHOLE_ROWS} x at {WHOLE_ROWS_AT:,} tokens.",
        "| tokens | edit | sees | prompt, x plain (quartiles) | decoded token, x plain (quartiles) | target | "
        "peak MB over plain | trial ms | plain prompt s | setting |\n|---|---|---|---|---|---|---|---|---|---|\n"
        + "\n".join(
            line(name, tokens, entry, found["peaks"])
            for tokens, name, entry in sorted(
                ((int(key.split()[1]), key.split()[0], entry) for key, entry in found["edits"].items()),
                key=lambda row: row[:2],
            )
        ),
    ]
    if found.get("left out"):
        page.append("\n".join(f"- {name}: {reason}" for name, reason in sorted(found["left out"].items())))
    (OUT / "steer.md").write_text("\n\n".join(page) + "\n")


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        print(json.dumps(worker(sys.argv[2], int(sys.argv[3]))))
        return
    import foveate
    from foveate.core.mechanism import ExpertEdit

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--edits", nargs="+", default=acting(), choices=acting(), metavar="NAME")
    parser.add_argument("--again", action="store_true", help="measure again what is in the results")
    args = parser.parse_args()
    if args.rounds < 1 or min(args.tokens) < 64:
        parser.error("at least 1 round and 64 tokens")
    file = OUT / "steer.json"
    found = json.loads(file.read_text()) if file.exists() else {"edits": {}, "peaks": {}, "left out": {}}
    model, _ = foveate.load("smollm2", tokenizer=False)
    longest = model.config.max_position_embeddings
    for tokens in args.tokens:
        for name in args.edits:
            if issubclass(foveate.find(name), ExpertEdit):
                found["left out"][name] = "smollm2 has no experts whose choice it could change"
                print(f"{name}: left out, {found['left out'][name]}", flush=True)
                continue
            key = f"{name} {tokens}"
            if key in found["edits"] and not args.again:
                continue
            # decoding needs room behind the prompt
            length = min(tokens, longest - DECODED)
            found["edits"][key] = measured(model, name, length, args.rounds)
            for who in (PLAIN, name):
                if args.again or f"{who} {tokens}" not in found["peaks"] or who == name:
                    found["peaks"][f"{who} {tokens}"] = peak(who, length)
            print(line(name, tokens, found["edits"][key], found["peaks"]), flush=True)
            save(found)
    save(found)


if __name__ == "__main__":
    main()
