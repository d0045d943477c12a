"""What a rule or mixer costs in the place of attention, beside PyTorch's attention and x-transformers'.

    python bench/rules.py [--only call module decode memory] [--rules SPEC ...] [--tokens 512 2048 8192] [--rounds 7]
                          [--seconds 30] [--threads 2] [--x-transformers PYTHON] [--again]

Float32, causal, 4 heads of width 64, batch 1 where nothing else is said; every rule and mixer of the registry that has
a causal form, as it is by default, or as `--rules` writes it (`relu`, `relu:alpha=0.5`).

`call`: a rule alone on queries, keys and values (`core.rows.attend`), beside scaled_dot_product_attention (sdpa) on the
same ones.
`module`: `foveate.nn.Attention` in training or not, its loss included where the rule has one, beside a plain PyTorch
module with the same projections around scaled_dot_product_attention; so are torch.nn.MultiheadAttention
(need_weights=False) and, if `--x-transformers` names a Python that has it, x-transformers' own module of the mechanism,
up to 4,096 tokens where that forms whole rows.
`decode`: one token behind 2,048 cached ones, batch 1 and 8: the module beside the plain one, both with transformers'
dynamic cache, and a rule alone on one query.
`memory`: the peak of resident memory on top of input and parameters, of a module in a process of its own; how it grows
is the exponent between the two largest lengths.

Ours and the other follow each other, in turns the one and the other first; a round is as many turns as fill 0.2 s.
Ratios are taken inside a round, their median and quartiles reported. Slow rules get fewer rounds, so that one figure
takes about `--seconds`, but at least 3 where so many are asked for. Figures are kept by what they are of: what is
there is measured again only with --again.

Targets: the normalisers that act on single scores (sigmoid, relu, softplus) take at most 1.6 x the time of
scaled_dot_product_attention forward and 2 x forward and backward, as calls; the module around softmax at most 1.05 x
that of the plain one; a rule's decode step at most 1.3 x that of the plain module; memory is linear in the length
(an exponent of at most 1.1). A target is met if the upper quartile keeps to it, missed if the lower one does not, and
otherwise within the spread.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

# in front, this folder would hide Python's own module `profile`, which torch imports
if str(Path(__file__).resolve().parent) in sys.path:
    sys.path.remove(str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parent))

import torch
from _timing import peak, ratio_cell, ratios, rounds, spread, timed, verdict
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import DynamicCache

import foveate
from foveate.core.errors import FoveateError
from foveate.core.mask import Mask
from foveate.core.rows import View, attend
from foveate.core.rule import Operator, Rule, Sizes
from foveate.core.standing import called

HERE = Path(__file__).resolve().parent
OUT = HERE / "results" / "rules.json"
HEADS, DIM = 4, 64
WIDTH = HEADS * DIM
PARTS = ("call", "module", "decode", "memory")
PASSES = ("forward", "both")
SAID = {"forward": "forward", "both": "with backward"}
CACHED, BATCHES = 2048, (1, 8)
# decode steps on one copy of a cache, and processes in which memory is measured
STEPS, PROCESSES = 32, 2
# whole rows of weights in memory: more is not tried
EAGER = 4096
PLAIN, MULTIHEAD, PEER = "plain", "torch.nn.MultiheadAttention", "x-transformers "
ELEMENTWISE = ("sigmoid", "relu", "softplus")
TARGETS = {"forward": 1.6, "both": 2.0, "module": 1.05, "decode": 1.3, "exponent": 1.1}

Timer = Callable[[], float]
Figure = dict[str, Any]
# a target, whether it is met, and what by
Verdict = tuple[str, str, str]


def specs(asked: list[str] | None) -> list[str]:
    """The rules and mixers to measure: those asked for, or all that have a causal form."""
    if asked:
        try:
            for spec in asked:
                called(spec)
        except FoveateError as error:
            raise SystemExit(str(error)) from None
        return asked
    kinds = {name: foveate.find(name) for name in foveate.names("replace")}
    return [name for name, kind in kinds.items() if issubclass(kind, Operator) and kind.causal]


def named(spec: str) -> str:
    """A spec without its parameters."""
    return spec.partition(":")[0]


# ---------------------------------------------------------------- what is compared


class Plain(nn.Module):
    """PyTorch's attention between the projections that `foveate.nn.Attention` has."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor, cache: DynamicCache | None = None) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        if cache is not None:
            k, v = cache.update(k, v, 0)
        return self.o_proj(sdpa(q, k, v, is_causal=q.shape[2] > 1).transpose(1, 2).flatten(2))


class MultiHead(nn.Module):
    """torch.nn.MultiheadAttention, asked for no weights."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, bias=False, batch_first=True)
        self.mask = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False, attn_mask=self.mask, is_causal=True)[0]


def made(name: str, tokens: int) -> nn.Module:
    """The module of a name, with fresh parameters."""
    torch.manual_seed(0)
    if name == PLAIN:
        return Plain()
    return MultiHead(tokens) if name == MULTIHEAD else foveate.nn.Attention(WIDTH, HEADS, rule=name)


def drawn(*shape: int, grad: bool = False, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def forward(call: Callable[[], Tensor]) -> None:
    with torch.no_grad():
        call()


def derived(
    call: Callable[[], Tensor], leaves: list[Tensor], weigh: Tensor, loss: Callable[[], Tensor] | None = None
) -> None:
    """Forward and backward."""
    total = (call() * weigh).sum()
    # a rule may leave out what a short text does not need
    torch.autograd.grad(total if loss is None else total + loss(), leaves, allow_unused=True)


def module_pass(name: str, tokens: int, which: str) -> Callable[[], None]:
    """A pass of a module."""
    grad = which == "both"
    module, x = made(name, tokens).train(grad), drawn(1, tokens, WIDTH, grad=grad)
    call = partial(module, x)
    if not grad:
        return partial(forward, call)
    loss = partial(foveate.nn.auxiliary_loss, module) if isinstance(module, foveate.nn.Attention) else None
    return partial(derived, call, [x, *module.parameters()], drawn(1, tokens, WIDTH, seed=1), loss)


def call_passes(name: str, tokens: int, which: str) -> list[Callable[[], None]]:
    """Passes of PyTorch's attention and of a rule over the same queries, keys and values."""
    grad = which == "both"
    tensors = [drawn(1, HEADS, tokens, DIM, grad=grad, seed=n) for n in range(3)]
    view = ruled(name, tensors, drawn(1, tokens, WIDTH), training=grad)
    calls = [partial(sdpa, *tensors, is_causal=True), partial(attended, view)]
    if not grad:
        return [partial(forward, call) for call in calls]
    own = [] if view.learned is None else view.learned.parameters()
    weigh = drawn(1, HEADS, tokens, DIM, seed=3)
    leaves = [tensors, [*tensors, *own]]
    return [partial(derived, call, some, weigh) for call, some in zip(calls, leaves, strict=True)]


def attended(view: View) -> Tensor:
    """The head outputs of a call that is made anew each time, as it is in a model."""
    return attend(replace(view)).out


def ruled(name: str, tensors: list[Tensor], hidden: Tensor, training: bool = False) -> View:
    """The attention call of a rule with fresh parameters."""
    rule = called(name)
    assert isinstance(rule, Rule)
    torch.manual_seed(0)
    learned = rule.learned(Sizes(WIDTH, HEADS, HEADS, DIM))
    mask = Mask.causal_of(tensors[0].shape[2], tensors[1].shape[2])
    view = View(*tensors, mask, rule=rule, hidden=hidden, training=training)
    view.learned = None if learned is None else learned.train(training)
    return view


class Steps:
    """Seconds of one decode step at a time, on a copy of a filled cache that is made anew every few steps.

    Args:
        module: What decodes.
        batch: Texts.
    """

    def __init__(self, module: nn.Module, batch: int) -> None:
        self.module, self.filled, self.left = module.eval(), DynamicCache(), 0
        self.token = drawn(batch, 1, WIDTH, seed=1)
        with torch.no_grad():
            module(drawn(batch, CACHED, WIDTH), cache=self.filled)

    def __call__(self) -> float:
        if not self.left:
            self.cache, self.left = copy.deepcopy(self.filled), STEPS
        self.left -= 1
        with torch.no_grad():
            return timed(partial(self.module, self.token, cache=self.cache))


class Peer:
    """x-transformers in another environment.

    Args:
        python: The Python of that environment.
        threads: Threads of it.
    """

    def __init__(self, python: str, threads: int) -> None:
        command = [python, str(HERE / "peers" / "x_transformers_worker.py"), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        first = self.said()
        self.versions, self.whole = first["versions"], first["whole"]

    def said(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"x-transformers' worker ended with {self.process.wait()}")
        return json.loads(line)

    def seconds(self, mechanism: str, tokens: int, which: str) -> float:
        """One pass there."""
        asked = {"mechanism": mechanism, "tokens": tokens, "backward": which == "both"}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return self.said()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


# ---------------------------------------------------------------- measuring


def time_call(name: str, tokens: int, which: str, args: argparse.Namespace) -> Figure:
    base, other = call_passes(name, tokens, which)
    return rounds(partial(timed, base), partial(timed, other), args.rounds, args.seconds)


def time_module(name: str, tokens: int, which: str, peer: Peer | None, args: argparse.Namespace) -> Figure:
    base = partial(timed, module_pass(PLAIN, tokens, which))
    if not name.startswith(PEER):
        return rounds(base, partial(timed, module_pass(name, tokens, which)), args.rounds, args.seconds)
    assert peer is not None
    found = rounds(base, partial(peer.seconds, name.removeprefix(PEER), tokens, which), args.rounds, args.seconds)
    return found | {"versions": peer.versions}


def time_step(name: str, batch: int, bare: bool, args: argparse.Namespace) -> Figure:
    if not bare:
        return rounds(Steps(Plain(), batch), Steps(made(name, CACHED), batch), args.rounds, args.seconds)
    tensors = [drawn(batch, HEADS, n, DIM, seed=n) for n in (1, CACHED, CACHED)]
    calls = partial(sdpa, *tensors), partial(attended, ruled(name, tensors, drawn(batch, 1, WIDTH)))
    base, other = (partial(timed, partial(forward, call)) for call in calls)
    return rounds(base, other, args.rounds, args.seconds)


def worker(name: str, tokens: int, threads: int) -> dict[str, float]:
    """Megabytes of each pass of a module, in this process."""
    torch.set_num_threads(threads)
    found = {}
    for which in PASSES:
        # what is loaded or made once, of whatever length
        module_pass(name, 64, which)()
        found[which] = peak(module_pass(name, tokens, which))
    return found


def memory(name: str, tokens: int, args: argparse.Namespace) -> list[dict[str, float]]:
    """The peaks of processes of their own."""
    command = [sys.executable, __file__, "worker", name, str(tokens), str(args.threads)]
    found = []
    for _ in range(min(args.rounds, PROCESSES)):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
        last = said[-1] if said else f"ended with {done.returncode}"
        if done.returncode:
            raise RuntimeError(last)
        found.append(json.loads(last))
    return found


def jobs(args: argparse.Namespace, peer: Peer | None) -> dict[str, Callable[[], Any]]:
    """What there is to measure, by its key: part, size, pass, and name."""
    names, found = specs(args.rules), dict[str, Callable[[], Any]]()
    rules = [name for name in names if isinstance(called(name), Rule)]
    for tokens in sorted(args.tokens):
        others = [MULTIHEAD]
        if peer is not None:
            bare = {named(name) for name in names}
            others += [PEER + n for n, whole in peer.whole.items() if n in bare and (tokens <= EAGER or not whole)]
        for which in PASSES:
            for name in rules:
                found[f"call {tokens} {which} {name}"] = partial(time_call, name, tokens, which, args)
            for name in (*others, *names):
                found[f"module {tokens} {which} {name}"] = partial(time_module, name, tokens, which, peer, args)
        for name in (PLAIN, MULTIHEAD, *names):
            found[f"memory {tokens} peak {name}"] = partial(memory, name, tokens, args)
    for batch in BATCHES:
        for name in names:
            found[f"decode {batch} module {name}"] = partial(time_step, name, batch, False, args)
        for name in rules:
            found[f"decode {batch} call {name}"] = partial(time_step, name, batch, True, args)
    return {key: job for key, job in found.items() if key.partition(" ")[0] in args.only}


def measure(args: argparse.Namespace) -> None:
    """Runs what is not there yet, or failed."""
    result = json.loads(args.out.read_text()) if args.out.exists() else {}
    peer = Peer(args.x_transformers, args.threads) if args.x_transformers else None
    for key, job in jobs(args, peer).items():
        if key in result and "failed" not in result[key] and not args.again:
            continue
        try:
            result[key] = job()
        except Exception as error:
            # one that cannot does not keep the others from being measured
            result[key] = {"failed": (str(error) or type(error).__name__).splitlines()[0]}
        print(f"{key}: {told(result[key])}", flush=True)
        save(args.out, result)
        gc.collect()
    if peer is not None:
        peer.close()
    save(args.out, result)


def told(figure: Any) -> str:
    """A figure in one line."""
    if isinstance(figure, list):
        return ", ".join(f"{statistics.median(one[which] for one in figure):.1f} MB {which}" for which in PASSES)
    return figure["failed"] if "failed" in figure else ratio_cell(spread(ratios(figure)))


# ---------------------------------------------------------------- the page


def target(part: str, which: str, name: str) -> tuple[str, float] | None:
    """What is asked of a time, and the most that it may be."""
    if part == "call" and named(name) in ELEMENTWISE:
        most = TARGETS[which]
        return f"{', '.join(ELEMENTWISE)} as calls, {SAID[which]}: at most {most} x", most
    if part == "module" and name == "softmax":
        return f"the module around softmax: at most {TARGETS['module']} x", TARGETS["module"]
    if part == "decode" and which == "module" and issubclass(foveate.find(named(name)), Rule):
        return f"a rule's decode step: at most {TARGETS['decode']} x", TARGETS["decode"]
    return None


def times(found: dict[str, Any], part: str, columns: tuple[str, str]) -> tuple[list[str], list[Verdict]]:
    """The lines of a table of times, and what has a target."""
    lines, verdicts = [], []
    for (name, size), figures in grouped(found, part).items():
        cells = []
        for which in columns:
            figure = figures.get(which)
            if figure is None or "failed" in figure:
                cells += ["", "" if figure is None else figure["failed"]]
                continue
            ratio, asked = spread(ratios(figure)), target(part, which, name)
            ms = statistics.median(figure["seconds"]) * 1e3
            cells += [f"{ms:.3g}" if ms < 100 else f"{ms:,.0f}", ratio_cell(ratio)]
            if asked is not None:
                said = verdict(ratio, asked[1])
                cells[-1] += f", {said}"
                verdicts.append((asked[0], said, f"{name}, {of_size(part, size, which)} ({ratio[1]:.2f})"))
        lines.append(f"| {name} | {size:,} | {' | '.join(cells)} |")
    return lines, verdicts


def of_size(part: str, size: int, which: str) -> str:
    """What a time is of, beside what its target says."""
    if part == "decode":
        return f"batch {size}"
    return f"{size:,} tokens" if part == "call" else f"{size:,} tokens {SAID[which]}"


def grouped(found: dict[str, Any], part: str) -> dict[tuple[str, int], dict[str, Any]]:
    """The figures of one part by name and size, each of them by pass."""
    groups: dict[tuple[str, int], dict[str, Any]] = defaultdict(dict)
    for key, figure in found.items():
        if key.startswith(f"{part} "):
            _, size, which, name = key.split(" ", 3)
            groups[name, int(size)][which] = figure
    return dict(sorted(groups.items(), key=lambda item: item[0]))


def peaks(found: dict[str, Any]) -> tuple[list[str], list[Verdict]]:
    """The lines of the table of memory, and what has a target."""
    by_name: dict[str, dict[int, Any]] = defaultdict(dict)
    for (name, size), one in grouped(found, "memory").items():
        by_name[name][size] = one["peak"]
    lines, verdicts = [], []
    for name, figures in by_name.items():
        for which in PASSES:
            cells = []
            for size, figure in figures.items():
                if "failed" in figure:
                    cells.append(f"{size:,}: {figure['failed']}")
                    continue
                most, plain = middle(figure, which), middle(by_name[PLAIN].get(size), which)
                over = "" if plain is None or name == PLAIN else f" ({most - plain:+.1f})"
                cells.append(f"{size:,}: {most:.1f}{over}")
            grown = growth(figures, which)
            cells = ["; ".join(cells), "" if grown is None else ratio_cell(grown)]
            if grown is not None and name not in (PLAIN, MULTIHEAD):
                said = verdict(grown, TARGETS["exponent"])
                cells[-1] += f", {said}"
                asked = f"memory linear in the length: an exponent of at most {TARGETS['exponent']}"
                verdicts.append((asked, said, f"{name}, {SAID[which]} ({grown[1]:.2f})"))
            lines.append(f"| {name} | {SAID[which]} | {' | '.join(cells)} |")
    return lines, verdicts


def middle(figure: Any, which: str) -> float | None:
    """The median of peaks, where they were measured."""
    return None if figure is None or "failed" in figure else statistics.median(one[which] for one in figure)


def growth(figures: dict[int, Any], which: str) -> tuple[float, float, float] | None:
    """The exponent by which memory grows between the two largest lengths."""
    sizes = [size for size in sorted(figures) if "failed" not in figures[size]][-2:]
    if len(sizes) < 2:
        return None
    short, long = ([max(one[which], 0.1) for one in figures[size]] for size in sizes)
    grown = [math.log(b / a) / math.log(sizes[1] / sizes[0]) for a, b in zip(short, long, strict=False)]
    return spread(grown)


def summary(verdicts: list[Verdict]) -> list[str]:
    """The lines of the table of targets."""
    by_target: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for asked, said, what in verdicts:
        by_target[asked][said].append(what)
    lines = []
    for asked, whats in by_target.items():
        cells = [str(len(whats["met"]))]
        for said in ("within the spread", "missed"):
            cells.append(f"{len(whats[said])}: {'; '.join(whats[said])}" if whats[said] else "0")
        lines.append(f"| {asked} | {' | '.join(cells)} |")
    return lines


def page(result: dict[str, Any]) -> str:
    """All figures of what there is in the registry as tables."""
    known = {PLAIN, MULTIHEAD, *foveate.names("replace")}
    found = {key: f for key, f in result.items() if named(key.split(" ", 3)[3].removeprefix(PEER)) in known}
    times_of = "| rule | tokens | forward, ms | x {0} (quartiles) | with backward, ms | x {0} (quartiles) |"
    sections = {
        "Calls": (times(found, "call", PASSES), times_of.format("sdpa")),
        "Modules": (times(found, "module", PASSES), times_of.format("the plain module")),
        f"A decode step behind {CACHED:,} tokens": (
            times(found, "decode", ("module", "call")),
            "| rule | batch | module, ms | x the plain module (quartiles) | call, ms | x sdpa (quartiles) |",
        ),
        "Memory of a module": (
            peaks(found),
            "| rule | pass | MB by tokens (over the plain module) | exponent of growth (quartiles) |",
        ),
    }
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    peers = {json.dumps(f["versions"]) for f in found.values() if isinstance(f, dict) and "versions" in f}
    beside = "".join(f"; beside {' and '.join(' '.join(v) for v in json.loads(p).items())}" for p in sorted(peers))
    parts = [
        "# Rules and mixers in the place of attention: time and memory",
        f"`python bench/rules.py`: float32, causal, {HEADS} heads of width {DIM}, {machine}{beside}. What each line "
        "is, and when a target is met, stands in the head of the script; rounds are in the json.",
    ]
    if lines := summary([v for (_, verdicts), _ in sections.values() for v in verdicts]):
        parts += ["## Targets", table("| target | met | within the spread | missed |", lines)]
    for title, ((lines, _), header) in sections.items():
        if lines:
            parts += [f"## {title}", table(header, lines)]
    return "\n\n".join(parts) + "\n"


def table(header: str, lines: list[str]) -> str:
    return "\n".join([header, "|" + "---|" * (header.count("|") - 1), *lines])


def save(file: Path, result: dict[str, Any]) -> None:
    """Writes the numbers, and the page from all that there are."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    file.with_suffix(".md").write_text(page(result))


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        try:
            print(json.dumps(worker(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
        except FoveateError as error:
            raise SystemExit(str(error)) from None
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rules", nargs="+", metavar="SPEC", help="rules and mixers; default: all with a causal form")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=30.0, help="after which a figure gets no more rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--x-transformers", metavar="PYTHON", help="a Python with x-transformers; left out without")
    parser.add_argument("--again", action="store_true", help="measure again what is in the results")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    measure(args)


if __name__ == "__main__":
    main()
