"""Whether maps that learned softmax's weights give them better, on other text, than linear attention with fixed maps.

SmolLM2's own queries and keys on WikiText-2, all layers, windows of 256 tokens. Hedgehog's maps learn on windows of the
first part of the text, in three orders, with either activation; everything is judged on windows of the last part by
the KL divergence of the softmax weights from the linear ones, mean over layers, heads and rows. The controls are
weights that are uniform over the past, the same with a share of its own for the first token, and Hedgehog's maps before
training.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from _claim import mean, share, trained, write
from _tasks import command, folder
from torch import Tensor

from foveate.core.mixer import Tokens
from foveate.core.recurrence import Heads, Recurrence
from foveate.core.rows import RowBlock, View
from foveate.core.rule import Sizes
from foveate.core.states import weights
from foveate.measure.active_dormant import pieces_of
from foveate.replace import Elu, Hedgehog, RandomFeatures, Taylor
from foveate.replace.linear._calls import calls_of
from foveate.replace.linear.hedgehog import LEAST, Maps

SEEDS, LENGTH, LEARN, HELD = (0, 1, 2), 256, 20, 12
# shares of the text: windows to learn from lie in front of the one, held-out windows behind the other
FIRST, LAST = 0.7, 0.8
PASSES, RATE = 2, 0.01
# the paper's own map, and that of the authors' later code
ACTIVATIONS = ("exp", "softmax")
Window = dict[int, View]
Method = Callable[[View], Tensor]


def sizes(view: View) -> Sizes:
    dim = view.q.shape[3]
    return Sizes(view.heads * dim, view.heads, view.kv_heads, dim, view.layer.index)


def linear(rule: Recurrence, own: torch.nn.Module | None, view: View) -> Tensor:
    """The weights of a recurrence on a call of the model, [heads, rows, keys]."""
    n = view.queries
    tokens = Tokens(torch.zeros(1, n, 1), torch.ones(1, n, dtype=torch.bool), True, torch.arange(n)[None])
    return weights(rule.scan(Heads(view.q, view.k, view.v, tokens, view.scale, own, sizes(view))))[0]


def fixed(rule: Recurrence, window: Window) -> Method:
    """A recurrence as it is without training."""
    torch.manual_seed(0)
    owns = {n: rule.learned(sizes(view)) for n, view in window.items()}
    return lambda view: linear(rule, owns[view.layer.index], view)


def learned(rule: Hedgehog, windows: list[Window], seed: int) -> Method:
    """Hedgehog after some passes through the windows, in orders of this seed."""
    owns = {n: rule.learned(sizes(view)) for n, view in windows[0].items()}
    adam = torch.optim.Adam([p for own in owns.values() for p in own.parameters()], RATE)
    falling = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.1, PASSES * len(windows))
    dice = random.Random(seed)
    for turn in range(PASSES):
        losses = []
        for window in dice.sample(windows, len(windows)):
            adam.zero_grad()
            for n, view in window.items():
                own = owns[n]
                assert isinstance(own, Maps)
                losses.append(rule.mimicry(own, view))
                # layers have nothing in common: one graph at a time is enough
                losses[-1].backward()
            adam.step()
            falling.step()
        loss = float(torch.stack(losses).detach().mean())
        print(f"{rule.activation}, seed {seed}, pass {turn}: cross-entropy {loss:.4f}", file=sys.stderr, flush=True)
    return lambda view: linear(rule, owns[view.layer.index], view)


def uniform(view: View) -> Tensor:
    one = torch.ones(view.queries, view.keys).tril()
    return (one / one.sum(-1, keepdim=True)).expand(view.heads, -1, -1)


def sink(windows: list[Window]) -> Method:
    """One share for the first token, head by head what it has in these windows, the rest uniform over the past."""
    first = {n: torch.stack([softmax(w[n])[:, 1:, 0].mean(-1) for w in windows]).mean(0) for n in windows[0]}

    def call(view: View) -> Tensor:
        rest = torch.ones(view.queries, view.keys).tril()
        rest[:, 0] = 0
        share = first[view.layer.index][:, None, None]
        a = (1 - share) * rest / rest.sum(-1, keepdim=True).clamp_min(1)
        a[:, :, :1] = share
        return a

    return call


def softmax(view: View) -> Tensor:
    return RowBlock(view, torch.arange(view.queries), 0, view.keys, torch.float32).weights[0]


def per_head(rows: Tensor) -> Tensor:
    """The mean over rows; the first one has a single key, and so no choice."""
    return rows[:, 1:].mean(-1)


@torch.no_grad()
def judged(windows: list[Window], methods: dict[str, Method]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """KL divergence of softmax from each method, and the entropy of its rows, [windows, layers, heads]."""
    far: dict[str, list[Tensor]] = {name: [] for name in methods}
    entropy: dict[str, list[Tensor]] = {name: [] for name in methods}
    for at, window in enumerate(windows):
        for view in window.values():
            p = softmax(view)
            own = torch.special.xlogy(p, p).sum(-1)
            for name, method in methods.items():
                a = method(view)
                far[name].append(per_head(own - (p * a.clamp_min(LEAST).log()).sum(-1)))
                entropy[name].append(per_head(-torch.special.xlogy(a, a).sum(-1)))
        print(f"judged window {at}", file=sys.stderr, flush=True)
    shape = (len(windows), len(windows[0]), -1)
    return tuple({k: torch.stack(v).view(shape) for k, v in part.items()} for part in (far, entropy))


def main() -> None:
    text = (folder() / "wikitext2-valid.txt").read_text(encoding="utf-8")
    model, tokenizer = trained()

    def windows(part: str, count: int) -> list[Window]:
        pieces = pieces_of(part, tokenizer, LENGTH, count, 0)
        return [calls_of(model, input_ids=ids, logits_to_keep=1) for ids in pieces]

    learn, held = windows(text[: int(FIRST * len(text))], LEARN), windows(text[int(LAST * len(text)) :], HELD)
    dim = learn[0][0].q.shape[3]
    draws = {f"random features, draw {seed}": RandomFeatures(256, seed) for seed in SEEDS}
    # narrow queries and keys as wide as a head are only turned, which leaves their products
    rivals: dict[str, Recurrence] = {"elu": Elu(), "Taylor": Taylor(feature_dim=dim)} | draws
    methods = {name: fixed(rule, held[0]) for name, rule in rivals.items()} | {"softmax": softmax, "uniform": uniform}
    methods["sink"] = sink(learn)
    for act in ACTIVATIONS:
        methods[f"{act}, untrained"] = fixed(Hedgehog(act), held[0])
        methods |= {f"{act}, order {seed}": learned(Hedgehog(act), learn, seed) for seed in SEEDS}
    far, entropy = judged(held, methods)

    def over(names: list[str], what: dict[str, Tensor]) -> dict[str, float]:
        """Interval over windows of the mean over these methods."""
        return mean(torch.stack([what[name] for name in names]).mean((0, 2, 3)))

    def ahead(others: list[str], ours: list[str]) -> dict[str, float]:
        """By how much ours are nearer to softmax: of all pairs, the one with the lowest lower end."""
        gaps = [mean((far[other] - far[own]).mean((1, 2))) for other in others for own in ours]
        return min(gaps, key=lambda gap: gap["low"])

    kinds = {"elu": ["elu"], "random features": list(draws), "Taylor": ["Taylor"]}
    ours = {act: [f"{act}, order {seed}" for seed in SEEDS] for act in ACTIVATIONS}
    numbers: dict[str, Any] = {f"KL, {kind}": over(names, far) for kind, names in kinds.items()}
    control: dict[str, Any] = {"KL, uniform over the past": over(["uniform"], far)}
    control["KL, a share for the first token, the rest uniform"] = over(["sink"], far)
    gaps, checks = [], []
    for act, names in ours.items():
        numbers[f"KL, learned maps, {act}"] = over(names, far)
        for kind, others in kinds.items():
            gaps.append(ahead(others, names))
            numbers[f"KL, {kind} less learned maps, {act}"] = gaps[-1]
        nearest = torch.stack([far[name].mean(0) for others in kinds.values() for name in others]).amin(0)
        nearer = torch.stack([far[name].mean(0) for name in names]).mean(0) < nearest
        numbers[f"heads where learned maps are nearest, {act}"] = share(int(nearer.sum()), nearer.numel())
        control[f"KL, maps before training, {act}"] = over([f"{act}, untrained"], far)
        for name, label in (("uniform", "uniform"), (f"{act}, untrained", "maps before training")):
            checks.append(ahead([name], names))
            control[f"KL, {label} less learned maps, {act}"] = checks[-1]
        control[f"KL, a share for the first token less learned maps, {act}"] = ahead(["sink"], names)
    spikes = {"softmax": ["softmax"]} | kinds | {f"learned maps, {act}": names for act, names in ours.items()}
    numbers["entropy of the rows, nats"] = {name: over(names, entropy) for name, names in spikes.items()}
    control["entropy of the rows, nats"] = {"uniform over the past": over(["uniform"], entropy)}
    won = [gap["low"] > 0 for gap in gaps]
    write(
        title="The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
        claim="Maps that learned a model's softmax weights give them on other text better than the fixed maps of elu, "
        "random features and the Taylor series of exp.",
        verdict="holds" if all(won) and all(c["low"] > 0 for c in checks) else "partly" if any(won) else "fails",
        numbers=numbers,
        control=control,
        seeds=list(SEEDS),
        rule="holds: with either activation the KL is below that of each fixed map, of uniform weights and of maps "
        "before training, in every order of the windows and against every draw, each interval of the difference over "
        "held-out windows above 0; partly: this is so of some fixed map with some activation",
        setting=f"{LEARN} windows of {LENGTH} tokens to learn from, {PASSES} times, Adam at {RATE} down to a tenth; "
        f"{HELD} held-out windows; weights count as at least {LEAST:g}; widths of the features: elu {dim}, learned "
        f"{2 * dim}, random 256, Taylor {1 + dim + dim * (dim + 1) // 2}",
        note="weights with a share for the first token need no features; they are no part of the rule",
        **command("softmax_mimicry"),
    )


if __name__ == "__main__":
    main()
