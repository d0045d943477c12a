"""Exact attention by tiles, by visited blocks and by parts of the keys, beside PyTorch, FlexAttention and transformers.

    python bench/exact.py [--only machine length sparse split] [--repeats 5] [--tokens 8192] [--threads 2]

Float32, 4 heads of width 64, batch 1. The calls of one repeat follow each other, ratios are taken inside a repeat, and
the median is reported with its quartiles. Sections that are not run keep what they wrote before; `exact.md` and
`exact.svg` are made from all of them. The attention over shared prefixes has a script of its own, `prefix.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _timing import peak, rounded
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from foveate.core import native, tiled
from foveate.core.mask import Mask
from foveate.core.mechanism import Visits
from foveate.core.rows import View

# profile.py beside this script hides a module of Python's own, which torch.compile imports
sys.path = [at for at in sys.path if Path(at).resolve() != Path(__file__).resolve().parent]
RESULTS = Path(__file__).parent / "results"
HEADS, DIM = 4, 64
LENGTHS = (512, 1024, 2048, 4096, 8192)
# whole rows of weights in memory: more is not tried
EAGER, FLEX = 4096, 8192
DENSITIES = (0.03, 0.1, 0.3, 0.6, 1.0)
BLOCKS = (64, 128)
KEYS = 65536


def alternate(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, one after the other in every repeat; the first repeat warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begun)
    return {name: seconds[1:] for name, seconds in times.items()}


def ratio(seconds: list[float], base: list[float]) -> dict[str, Any]:
    """Median of the ratios inside the repeats, with quartiles."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(seconds, base, strict=True)], n=4)
    return {
        "ratio": round(middle, 3),
        "quartiles": [round(low, 3), round(high, 3)],
        "seconds": [*map(rounded, seconds)],
    }


def inputs(n: int, grad: bool = False) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(1, HEADS, n, DIM, generator=rng).requires_grad_(grad) for _ in range(3)]


def derived(call: Callable[..., Tensor], tensors: list[Tensor], weigh: Tensor) -> None:
    """Forward and backward."""
    torch.autograd.grad(call(*tensors), tensors, weigh)


def by_tiles(q: Tensor, k: Tensor, v: Tensor, mask: Any = None, visits: Visits | None = None) -> Tensor:
    return tiled.attend(View(q, k, v, mask), visits)[0]


# ---------------------------------------------------------------- sections


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """What the machine can do: products of square matrices, and a sum over more than its caches hold."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    long = torch.randn(1 << 26)
    found = alternate({"product": lambda: a @ b, "sum": long.sum}, max(args.repeats, 5))
    return {
        "GFLOP/s": round(2 * 2048**3 / min(found["product"]) / 1e9, 1),
        "GB/s": round(long.nbytes / min(found["sum"]) / 1e9, 1),
        "threads": args.threads,
    }


def length(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Dense causal attention against length, forward and backward, and the memory that both take."""
    rows = []
    flex = flexible()
    for n in (n for n in LENGTHS if n <= args.tokens):
        q, k, v = inputs(n)
        mask = Mask.causal_of(n)
        calls: dict[str, Callable[[], Any]] = {
            "sdpa": partial(sdpa, q, k, v, is_causal=True),
            "tiled": partial(by_tiles, q, k, v, mask),
        }
        if n <= EAGER:
            calls["transformers, eager"] = eager(q, k, v)
        if flex is not None and n <= FLEX:
            calls["FlexAttention, compiled"] = flex(q, k, v, causal=True)
        times = alternate(calls, args.repeats)
        flops = 2 * HEADS * n * n * DIM
        for name, seconds in times.items():
            rows.append({"tokens": n, "pass": "forward", "what": name} | ratio(seconds, times["sdpa"]))
            rows[-1]["GFLOP/s"] = round(flops / statistics.median(seconds) / 1e9, 1)
        grad, weigh = inputs(n, True), torch.randn(1, HEADS, n, DIM)
        both: dict[str, Callable[[], Any]] = {
            "sdpa": partial(derived, partial(sdpa, is_causal=True), grad, weigh),
            "tiled": partial(derived, partial(by_tiles, mask=mask), grad, weigh),
        }
        if n <= EAGER:
            both["transformers, eager"] = lambda grad=grad, weigh=weigh: derived(lambda *x: eager(*x)(), grad, weigh)
        times_both = alternate(both, args.repeats)
        for name, seconds in times_both.items():
            rows.append(
                {"tokens": n, "pass": "forward and backward", "what": name} | ratio(seconds, times_both["sdpa"])
            )
            rows[-1]["MB"] = peak(both[name])
        back = {name: [b - f for b, f in zip(times_both[name], times[name], strict=True)] for name in ("sdpa", "tiled")}
        rows.append({"tokens": n, "pass": "backward", "what": "tiled"} | ratio(back["tiled"], back["sdpa"]))
        tell(rows, n)
    return rows


def sparse(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Random visits of a stated density against dense attention of the same shape."""
    n, rows = args.tokens, []
    q, k, v = inputs(n)
    grad, weigh = inputs(n, True), torch.randn(1, HEADS, n, DIM)
    flex = flexible()
    for block in BLOCKS:
        for density in DENSITIES:
            visits = visited(n, block, density)
            real = float(visits.table.float().mean())
            calls: dict[str, Callable[[], Any]] = {
                "sdpa, dense": partial(sdpa, q, k, v),
                "tiled": partial(by_tiles, q, k, v, None, visits),
            }
            if flex is not None and block == 128:
                calls["FlexAttention, compiled"] = flex(q, k, v, visits=visits)
            times = alternate(calls, args.repeats)
            both = alternate(
                {
                    "sdpa, dense": partial(derived, sdpa, grad, weigh),
                    "tiled": partial(derived, partial(by_tiles, visits=visits), grad, weigh),
                },
                args.repeats,
            )
            for which, found in (("forward", times), ("forward and backward", both)):
                for name, seconds in found.items():
                    slope, rest = (1.15, 0.05) if which == "forward" else (1.3, 0.1)
                    row = {"tokens": n, "block": block, "density": round(real, 4), "pass": which, "what": name}
                    row |= ratio(seconds, found["sdpa, dense"])
                    rows.append(row | ({"target": round(slope * real + rest, 3)} if name == "tiled" else {}))
            tell(rows[-5:], n)
    return rows


def split(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per head over many keys, on one core and on all; and a batch of uneven texts."""
    rows = []
    for heads, lengths in ((1, (KEYS,)), (3, (KEYS,)), (1, (KEYS, 4096, 1024, 256))):
        rng = torch.Generator().manual_seed(0)
        batch = len(lengths)
        q = torch.randn(batch, heads, 1, DIM, generator=rng)
        k, v = (torch.randn(batch, 1, KEYS, DIM, generator=rng) for _ in range(2))
        high = torch.tensor(lengths, dtype=torch.int32)[:, None]
        zero = torch.zeros(1, 1, dtype=torch.int32)
        keys = torch.zeros(1, KEYS, dtype=torch.int32)
        options = {"scale": DIM**-0.5, "lo": zero, "hi": high, "query_position": zero, "key_position": keys}
        call = partial(native.attend, q, k, v, **options)
        calls: dict[str, Callable[[], Any]] = {
            "split, all cores": partial(call, threads=args.threads),
            "split, one core": partial(call, threads=1),
            "whole, all cores": partial(call, threads=args.threads, piece=KEYS),
        }
        if batch == 1:
            calls["sdpa"] = partial(sdpa, q, k, v, enable_gqa=True)
        times = alternate(calls, 4 * args.repeats)
        moved = 2 * 4 * DIM * sum(lengths)
        for name, seconds in times.items():
            row = {"keys": list(lengths), "query heads": heads, "what": name}
            row |= ratio(times["split, one core"], seconds)
            rows.append(row | {"GB/s": round(moved / statistics.median(seconds) / 1e9, 1)})
        tell(rows[-len(calls) :], KEYS)
    return rows


SECTIONS = {"machine": machine, "length": length, "sparse": sparse, "split": split}


# ---------------------------------------------------------------- what is compared


def visited(n: int, block: int, density: float) -> Visits:
    """Random visits of each head; no row block is left with nothing."""
    rng = torch.Generator().manual_seed(0)
    table = torch.rand(1, HEADS, n // block, n // block, generator=rng) < density
    table |= torch.eye(n // block, dtype=torch.bool)
    return Visits(table, block, block)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """transformers' own eager attention, causal."""
    from transformers.models.llama.modeling_llama import eager_attention_forward

    class Module(torch.nn.Module):
        num_key_value_groups = 1

    n = q.shape[2]
    mask = torch.full((n, n), -torch.inf).triu(1)[None, None]
    module = Module().eval()
    return lambda: eager_attention_forward(module, q, k, v, mask, DIM**-0.5)[0].transpose(1, 2)


def flexible() -> Callable[..., Callable[[], Tensor]] | None:
    """FlexAttention as the framework compiles it for this CPU; None where it cannot."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def make(
        q: Tensor, k: Tensor, v: Tensor, causal: bool = False, visits: Visits | None = None
    ) -> Callable[[], Tensor]:
        n = q.shape[2]
        if causal:
            mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, n, n, device="cpu")
        else:
            assert visits is not None
            table, block = visits.table[0], visits.rows
            mask = create_block_mask(lambda b, h, i, j: table[h, i // block, j // block], 1, HEADS, n, n, device="cpu")
        compiled = torch.compile(flex_attention)
        with torch.no_grad():
            compiled(q, k, v, block_mask=mask)

        def call() -> Tensor:
            with torch.no_grad():
                return compiled(q, k, v, block_mask=mask)

        return call

    try:
        make(*inputs(512), causal=True)
    except Exception as error:
        print(f"FlexAttention is left out: {type(error).__name__}: {str(error).splitlines()[0]}")
        return None
    return make


# ---------------------------------------------------------------- results


def tell(rows: list[dict[str, Any]], n: int) -> None:
    for row in rows:
        if row.get("tokens", n) == n:
            print({k: v for k, v in row.items() if k != "seconds"}, flush=True)


def exponent(x: list[float], y: list[float]) -> dict[str, float]:
    """Slope of ln y over ln x, with its standard error."""
    (slope, _), cov = np.polyfit(np.log(x), np.log(y), 1, cov="unscaled" if len(x) < 4 else True)
    return {"value": rounded(slope), "error": rounded(float(np.sqrt(cov[0, 0])))}


def fits(found: dict[str, Any]) -> dict[str, Any]:
    """How cost grows with length and with density."""
    out: dict[str, Any] = {}
    for which in ("forward", "forward and backward"):
        for name in ("sdpa", "tiled"):
            rows = [
                r for r in found.get("length", ()) if r["pass"] == which and r["what"] == name and r["tokens"] > 1000
            ]
            if len(rows) > 2:
                seconds = [statistics.median(r["seconds"]) for r in rows]
                out[f"{name}, {which}, time over N"] = exponent([r["tokens"] for r in rows], seconds)
                if "MB" in rows[0]:
                    out[f"{name}, {which}, memory over N"] = exponent(
                        [r["tokens"] for r in rows], [max(r["MB"], 0.1) for r in rows]
                    )
        for block in BLOCKS:
            rows = [
                r
                for r in found.get("sparse", ())
                if r["pass"] == which and r["what"] == "tiled" and r["block"] == block
            ]
            if len(rows) > 2:
                slope, rest = np.polyfit([r["density"] for r in rows], [r["ratio"] for r in rows], 1)
                out[f"blocks of {block}, {which}, ratio over density"] = {
                    "slope": rounded(slope),
                    "rest": rounded(rest),
                }
    return out


def draw(found: dict[str, Any], path: Path) -> None:
    """Cost against length and against density."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "foveate"
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for which, style in (("forward", "-"), ("forward and backward", "--")):
        for name, colour in (("sdpa", "#888888"), ("tiled", "#0072b2"), ("transformers, eager", "#d55e00")):
            rows = [r for r in found.get("length", ()) if r["pass"] == which and r["what"] == name]
            label = f"{name}, {which}"
            left.plot(
                [r["tokens"] for r in rows],
                [statistics.median(r["seconds"]) for r in rows],
                style,
                color=colour,
                marker=".",
                label=label,
            )
        for block, colour in zip(BLOCKS, ("#0072b2", "#009e73"), strict=True):
            rows = [
                r
                for r in found.get("sparse", ())
                if r["pass"] == which and r["what"] == "tiled" and r["block"] == block
            ]
            right.plot(
                [r["density"] for r in rows],
                [r["ratio"] for r in rows],
                style,
                color=colour,
                marker=".",
                label=f"blocks of {block}, {which}",
            )
    left.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds, causal")
    right.plot([0, 1], [0, 1], ":", color="#888888", label="dense × density")
    right.set(xlabel="density of visits", ylabel="time, dense sdpa = 1")
    for ax in (left, right):
        ax.legend(fontsize=6)
        ax.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


def page(found: dict[str, Any]) -> str:
    """The results as tables."""
    lines = [
        "# Exact attention: by tiles, by visited blocks, by parts of the keys",
        "",
        f"`{found['command']}`: float32, {HEADS} heads of width {DIM}, batch 1, {found['repeats']} repeats; medians of "
        "ratios inside a repeat, with quartiles.",
        "",
    ]
    if "machine" in found:
        m = found["machine"]
        lines += [
            f"The machine, {m['threads']} threads: matrix products {m['GFLOP/s']} GFLOP/s, sums {m['GB/s']} GB/s.",
            "",
        ]
    if "length" in found:
        top = found.get("machine", {}).get("GFLOP/s")
        lines += [
            "## Dense causal attention",
            "",
            "| tokens | pass | what | × sdpa | quartiles | GFLOP/s | MB on top |",
        ]
        lines += ["|---:|---|---|---:|---|---:|---:|"]
        for r in found["length"]:
            speed = r.get("GFLOP/s", "")
            part = f"{speed} ({speed / top:.0%})" if speed and top else speed
            lines.append(
                f"| {r['tokens']:,} | {r['pass']} | {r['what']} | {r['ratio']:.2f} | {r['quartiles'][0]:.2f}–"
                f"{r['quartiles'][1]:.2f} | {part} | {r.get('MB', '')} |"
            )
        lines.append("")
    if "sparse" in found:
        lines += ["## Visited blocks", "", "| block | density | pass | what | × dense sdpa | quartiles | target |"]
        lines += ["|---:|---:|---|---|---:|---|---:|"]
        for r in found["sparse"]:
            if r["what"] != "sdpa, dense":
                lines.append(
                    f"| {r['block']} | {r['density']:.3f} | {r['pass']} | {r['what']} | {r['ratio']:.3f} | "
                    f"{r['quartiles'][0]:.3f}–{r['quartiles'][1]:.3f} | {r.get('target', '')} |"
                )
        lines.append("")
    if "split" in found:
        top = found.get("machine", {}).get("GB/s")
        lines += [
            "## One row over many keys",
            "",
            "| keys | query heads | what | faster than one core | quartiles | GB/s |",
        ]
        lines += ["|---|---:|---|---:|---|---:|"]
        for r in found["split"]:
            share = f" ({r['GB/s'] / top:.0%})" if top else ""
            keys = ", ".join(f"{n:,}" for n in r["keys"])
            lines.append(
                f"| {keys} | {r['query heads']} | {r['what']} | {r['ratio']:.2f} | {r['quartiles'][0]:.2f}–"
                f"{r['quartiles'][1]:.2f} | {r['GB/s']}{share} |"
            )
        lines.append("")
    if found.get("fits"):
        lines += ["## Fits", ""]
        for name, fit in found["fits"].items():
            said = (
                f"exponent {fit['value']:.2f} ± {fit['error']:.2f}"
                if "value" in fit
                else f"{fit['slope']:.2f} × density + {fit['rest']:.3f}"
            )
            lines.append(f"- {name}: {said}")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS / "exact.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    found |= {"command": "python bench/exact.py", "torch": torch.__version__, "repeats": args.repeats}
    for name in args.only:
        found[name] = SECTIONS[name](args)
        found["fits"] = fits(found)
        args.out.parent.mkdir(exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(page(found))
        if "length" in found and "sparse" in found:
            draw(found, args.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
