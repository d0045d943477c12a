"""What attention by state costs, beside scaled_dot_product_attention, token-by-token code and transformers' own.

    python bench/states.py [--only forward backward lengths naive decode memory] [--rules SPEC ...] [--rounds 5]
                           [--seconds 20] [--threads 2] [--again] [--fla FOLDER]

Float32, causal, batch 1, 4 heads of width 64 where nothing else is said; every recurrence of the registry with a causal
form, as it is by default (Hyena with filters for 65,536 tokens), on queries, keys and values alone (`flow`: features,
decays and finish are in it, projections are not), and every mixer of the state spaces on its input.

`forward`: at 16,384 tokens, beside causal scaled_dot_product_attention (sdpa) on the same ones. The share of the
machine's peak is that of the products which chunks need, over the time, by what two matrices of 2,048 x 2,048 reach.
`backward`: forward with backward beside forward, at 16,384 tokens.
`lengths`: 65,536 tokens as 64 texts of 1,024 up to one of 65,536, beside those of 1,024.
`naive`: at 4,096 tokens, the recurrent form beside the chunked one, forward; `--fla` names a folder with the package
fla (and einops), whose reference functions then run beside the engine on the same tensors, to the same outputs;
transformers' chunked gated delta rule and its Mamba layer run in any case; x-transformers has no attention by state.
`decode`: one token behind 65,536 beside one behind 1,024, and the bytes of the state.
`memory`: the peak of resident memory of forward and backward from 4,096 to 65,536 tokens, each in a process of its own.

Targets: at least 5 x faster than sdpa; backward at most 4 x forward; tokens per second within 10 % at all lengths; 20 x
faster than the recurrent form; a decoded token's time within 10 % wherever it stands; memory linear in the length (an
exponent of at most 1.1). Figures are kept by what they are of: what is there is measured again only with --again.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import platform
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

# in front, this folder would hide Python's own module `profile`, which torch imports
if str(Path(__file__).resolve().parent) in sys.path:
    sys.path.remove(str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parent))

import torch
from _timing import peak, ratio_cell, ratios, rounded, rounds, spread, timed, verdict
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import foveate
from foveate.core.mixer import Mixer, Tokens
from foveate.core.recurrence import Heads, Recurrence
from foveate.core.rule import Sizes
from foveate.core.standing import called
from foveate.core.states import chunk_for

OUT = Path(__file__).resolve().parent / "results" / "states.json"
HEADS, DIM = 4, 64
WIDTH = HEADS * DIM
PARTS = ("forward", "backward", "lengths", "naive", "decode", "memory")
LONG, TOTAL, SHORT, MIDDLE = 16_384, 65_536, 1024, 4096
GROWTH = (4096, 16_384, 65_536)
TARGETS = {"forward": 1 / 5, "backward": 4.0, "lengths": 1 / 0.9, "naive": 1 / 20, "decode": 1.1, "memory": 1.1}
# where the default is for shorter texts
SETTINGS = {"hyena": f"hyena:max_length={TOTAL}"}
MAMBA, DELTA = "transformers MambaMixer", "transformers torch_chunk_gated_delta_rule"
# reference code of fla: the folder, and what it takes besides queries, keys and values
FLA: dict[str, tuple[str, tuple[str, ...]]] = {
    "naive_recurrent_linear_attn": ("linear_attn", ()),
    "naive_chunk_linear_attn": ("linear_attn", ()),
    "naive_recurrent_simple_gla": ("simple_gla", ("g",)),
    "naive_chunk_simple_gla": ("simple_gla", ("g",)),
    "naive_recurrent_gla": ("gla", ("gk",)),
    "delta_rule_recurrence": ("delta_rule", ("beta",)),
    "delta_rule_chunkwise": ("delta_rule", ("beta",)),
    "naive_recurrent_gated_delta_rule": ("gated_delta_rule", ("g", "beta")),
    "naive_chunk_gated_delta_rule": ("gated_delta_rule", ("g", "beta")),
}


def specs(asked: list[str] | None) -> list[str]:
    """The operators to measure: those asked for, or all recurrences and the mixers of state spaces."""
    if asked:
        return asked
    kinds = {name: foveate.find(name) for name in foveate.names("replace")}
    return [
        SETTINGS.get(name, name)
        for name, kind in kinds.items()
        if issubclass(kind, Recurrence | Mixer) and kind.causal and kind.card.family in ("linear", "state_space")
    ]


def drawn(*shape: int, grad: bool = False, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


class Call:
    """A recurrence on random queries, keys and values, or a mixer on a random input.

    Args:
        name: The operator.
        tokens: Length of a text.
        batch: Texts.
        grad: Whether gradients will be asked for.
    """

    def __init__(self, name: str, tokens: int, batch: int = 1, grad: bool = False) -> None:
        torch.manual_seed(0)
        self.operator = called(name)
        sizes = Sizes(WIDTH, HEADS, HEADS, DIM)
        x, real = drawn(batch, tokens, WIDTH, grad=grad), torch.ones(batch, tokens, dtype=torch.bool)
        place = torch.arange(tokens)[None].expand(batch, -1)
        self.tokens, self.leaves = Tokens(x, real, True, place, grad), [x]
        if isinstance(self.operator, Mixer):
            self.module = self.operator.module(sizes)
        else:
            self.qkv = [drawn(batch, HEADS, tokens, DIM, grad=grad, seed=n) for n in range(1, 4)]
            self.module = self.operator.learned(sizes)
            self.leaves += self.qkv
            self.heads = Heads(*self.qkv, self.tokens, DIM**-0.5, self.module, sizes)
        self.leaves += [] if self.module is None or not grad else list(self.module.parameters())

    def __call__(self, state: Any = None, form: str = "auto") -> tuple[Tensor, Any]:
        if isinstance(self.operator, Mixer):
            return self.module(self.tokens, state)
        return self.operator.flow(self.heads, state, form)

    @torch.no_grad()
    def forward(self, form: str = "auto") -> None:
        self(None, form)

    def both(self) -> None:
        out, _ = self(None)
        torch.autograd.grad(out.sum(), self.leaves, allow_unused=True)

    @torch.no_grad()
    def products(self) -> float:
        """Multiplications and additions of a forward pass in chunks; 0 where it has none."""
        if isinstance(self.operator, Mixer):
            return 0.0
        try:
            scan = self.operator.scan(self.heads)
        except foveate.core.errors.NotSupported:
            return 0.0
        heads, length, key = scan.k.shape[1:]
        value = scan.v.shape[3] + scan.normalised
        size = chunk_for(length, key, value)
        each = size * (key + value) + 2 * key * value
        if scan.beta is not None:
            # scores of keys, the solve, and what is read of the state
            each += size * key + size * (key + value) // 2 + key * value
        return 2.0 * heads * length * each


def peak_products() -> float:
    """Multiplications and additions per second of two large matrices."""
    a, b = drawn(2048, 2048), drawn(2048, 2048, seed=1)
    for _ in range(2):
        a @ b
    return 2 * 2048**3 / min(timed(lambda: a @ b) for _ in range(5))


# ---------------------------------------------------------------- what is measured


def forward(name: str, args: argparse.Namespace) -> dict[str, Any]:
    call = Call(name, args.long)
    base = partial(sdpa, *(drawn(1, HEADS, args.long, DIM, seed=n) for n in range(1, 4)), is_causal=True)
    figure = rounds(partial(timed, base), partial(timed, call.forward), args.rounds, args.seconds)
    products = call.products()
    return figure | {"products": products, "peak": peak_products()}


def backward(name: str, args: argparse.Namespace) -> dict[str, Any]:
    call = Call(name, args.long, grad=True)
    return rounds(partial(timed, call.forward), partial(timed, call.both), args.rounds, args.seconds)


def lengths(name: str, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    base, other = Call(name, SHORT, TOTAL // SHORT), Call(name, tokens, TOTAL // tokens)
    return rounds(partial(timed, base.forward), partial(timed, other.forward), args.rounds, args.seconds)


def naive(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The chunked form by what steps from token to token."""
    call = Call(name, MIDDLE)
    step = partial(call.forward, "recurrent")
    return rounds(partial(timed, step), partial(timed, call.forward), args.rounds, args.seconds)


def decode(name: str, args: argparse.Namespace) -> dict[str, Any]:
    one, steps, held = Call(name, 1), [], 0
    with torch.no_grad():
        for tokens in (SHORT, TOTAL):
            state = Call(name, tokens)({})[1]
            held = sum(t.untyped_storage().nbytes() for t in state.values())
            steps.append(partial(one, state))
        found = rounds(*(partial(timed, step) for step in steps), args.rounds, args.seconds)
    return found | {"bytes": held}


def memory(name: str, args: argparse.Namespace) -> dict[str, Any]:
    found = {}
    for tokens in GROWTH:
        command = [sys.executable, __file__, "worker", name, str(tokens), str(args.threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[str(tokens)] = json.loads(done.stdout.splitlines()[-1])
    return {"megabytes": found}


def worker(name: str, tokens: int, threads: int) -> float:
    """Megabytes of a forward and backward pass on top of its inputs, in this process."""
    torch.set_num_threads(threads)
    Call(name, 64, grad=True).both()
    return peak(Call(name, tokens, grad=True).both)


# ---------------------------------------------------------------- peers


def peers(args: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """Ours beside other people's code of the same mechanism, forward at 4,096 tokens."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    found = {
        f"naive {DELTA}": partial(beside, torch_chunk_gated_delta_rule, ("g", "beta"), False, args),
        f"naive {MAMBA}": partial(beside_mamba, args),
    }
    if args.fla:
        sys.path.append(str(args.fla))
        import einops  # noqa: F401 - from that folder, for the files below

        sys.path.remove(str(args.fla))
        for name, (folder, takes) in FLA.items():
            function = getattr(loaded(args.fla / "fla" / "ops" / folder / "naive.py"), name)
            found[f"naive fla {name}"] = partial(beside, function, takes, folder == "delta_rule", args)
    return found


def loaded(path: Path) -> ModuleType:
    """A file that is loaded by its path, for its package imports a GPU's compiler."""
    spec = importlib.util.spec_from_file_location(f"fla_{path.parent.name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def beside(function: Any, takes: tuple[str, ...], heads_first: bool, args: argparse.Namespace) -> dict[str, Any]:
    """The engine beside a function of queries, keys, values and what else it takes, on the same ones.

    Args:
        function: The function; its tensors are [batch, time, heads, ...].
        takes: Names of its other arguments: `g` are decays per head, `gk` per channel, `beta` strengths.
        heads_first: Whether its tensors are [batch, heads, time, ...] instead.
        args: What the script was called with.
    """
    q, k, v = (drawn(1, MIDDLE, HEADS, DIM, seed=n) for n in range(3))
    k = torch.nn.functional.normalize(k, dim=-1)
    more = {
        "g": -drawn(1, MIDDLE, HEADS, seed=3).abs(),
        "gk": -drawn(1, MIDDLE, HEADS, DIM, seed=3).abs(),
        "beta": drawn(1, MIDDLE, HEADS, seed=4).sigmoid(),
    }
    more = {name: more[name] for name in takes}
    decay = more["g"][..., None] if "g" in more else more.get("gk")
    given = [DIM**-0.5 * q, k, v, decay, more.get("beta")]
    scan = foveate.core.states.Scan(*(None if t is None else t.transpose(1, 2) for t in given))
    if heads_first:
        q, k, v, *others = (t.transpose(1, 2).contiguous() for t in (q, k, v, *more.values()))
        more = dict(zip(more, others, strict=True))
    base, other = partial(function, q, k, v, **more), partial(foveate.core.states.run, scan)
    theirs = base()
    theirs, ours = theirs[0] if isinstance(theirs, tuple) else theirs, other()[0]
    torch.testing.assert_close(theirs if heads_first else theirs.transpose(1, 2), ours, rtol=1e-3, atol=1e-4)
    return rounds(partial(timed, base), partial(timed, other), args.rounds, args.seconds)


def beside_mamba(args: argparse.Namespace) -> dict[str, Any]:
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(hidden_size=WIDTH, state_size=16, expand=2, conv_kernel=4, num_hidden_layers=1)
    mixer, x, call = (
        MambaMixer(config, layer_idx=0).eval(),
        drawn(1, MIDDLE, WIDTH),
        Call("selective_state_space", MIDDLE),
    )
    with torch.no_grad():
        return rounds(partial(timed, partial(mixer, x)), partial(timed, call.forward), args.rounds, args.seconds)


# ---------------------------------------------------------------- running and telling


def jobs(args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What there is to measure, by its key."""
    found: dict[str, Callable[[], Any]] = {}
    for name in specs(args.rules):
        found[f"forward {name}"] = partial(forward, name, args)
        found[f"backward {name}"] = partial(backward, name, args)
        for tokens in GROWTH:
            found[f"lengths {name} {tokens}"] = partial(lengths, name, tokens, args)
        if issubclass(type(called(name)), Recurrence):
            found[f"naive {name}"] = partial(naive, name, args)
        found[f"decode {name}"] = partial(decode, name, args)
        found[f"memory {name}"] = partial(memory, name, args)
    found |= peers(args)
    return {key: job for key, job in found.items() if key.partition(" ")[0] in args.only}


def measure(args: argparse.Namespace) -> None:
    """Runs what is not there yet, or failed."""
    result = json.loads(args.out.read_text()) if args.out.exists() else {}
    for key, job in jobs(args).items():
        if key in result and "failed" not in result[key] and not args.again:
            continue
        try:
            result[key] = job()
        except Exception as error:
            # one that cannot does not keep the others from being measured
            result[key] = {"failed": (str(error) or type(error).__name__).splitlines()[0]}
        print(line(key, result[key]), flush=True)
        args.out.parent.mkdir(exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(page(result, args))
        gc.collect()


def line(key: str, figure: dict[str, Any]) -> str:
    """A row of the table."""
    part, _, name = key.partition(" ")
    if "failed" in figure:
        return f"| {part} | {name} | failed: {figure['failed']} | | |"
    most = TARGETS[part]
    if part == "memory":
        sizes = {int(n): m for n, m in figure["megabytes"].items()}
        low, high = min(sizes), max(sizes)
        slope = math.log(max(sizes[high], 0.1) / max(sizes[low], 0.1)) / math.log(high / low)
        said = ", ".join(f"{m:.0f}" for m in sizes.values())
        return f"| {part} | {name} | exponent {slope:.2f} | {said} MB | {'met' if slope <= most else 'missed'} |"
    found = spread(ratios(figure))
    # people's own chunked code is no token-by-token reference
    kept = "" if name in (MAMBA, DELTA) or "chunk" in name else verdict(found, most)
    if part == "lengths" and kept == "met" and found[0] < 0.9:
        kept = "met (faster)"
    more = f"{1e3 * spread(figure['seconds'])[1]:.4g} ms"
    if figure.get("products"):
        share = figure["products"] / spread(figure["seconds"])[1] / figure["peak"]
        more += f", {share:.0%} of peak"
    if "bytes" in figure:
        more += f", {figure['bytes']:,} bytes of state"
    return f"| {part} | {name} | {ratio_cell(found)} | {more} | {kept} |"


def page(result: dict[str, Any], args: argparse.Namespace) -> str:
    """The figures as a page."""
    about = (
        f"`python bench/states.py` on {platform.machine()}, {args.threads} threads, torch {torch.__version__}. What "
        "each line is stands in the head of the script; ratios are to what is named there, medians with quartiles, and "
        f"targets at most {', '.join(f'{rounded(most)} ({part})' for part, most in TARGETS.items())}."
    )
    rows = [
        line(key, figure) for key, figure in sorted(result.items(), key=lambda item: PARTS.index(item[0].split()[0]))
    ]
    return "\n".join(
        [
            "# Attention by state: time and memory",
            "",
            about,
            "",
            "| part | of | ratio | | target |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        print(worker(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rules", nargs="+", metavar="SPEC", help="operators; default: all with a causal form")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="after which a figure gets no more rounds")
    parser.add_argument("--long", type=int, default=LONG, help="tokens of the first two parts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--fla", type=Path, metavar="FOLDER", help="where the packages fla and einops are; left out without"
    )
    parser.add_argument("--again", action="store_true", help="measure again what is in the results")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    measure(args)


if __name__ == "__main__":
    main()
