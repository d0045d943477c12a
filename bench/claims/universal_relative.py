"""Whether relative attention cannot represent what its universal form can.

A sequence of one token repeated has nothing but positions to tell its places apart. Softmax with relative positions
gives the same output everywhere, whatever it learns: rows sum to 1 and all values are alike. One attention layer is
trained to say in which quarter of the text each place lies, for texts of 32 tokens, and judged by its accuracy; 25 %
is chance. The control is a text of random tokens that name their quarter, which both can read.
"""

from __future__ import annotations

import torch
from _claim import mean, number, write
from torch import nn

import foveate
from foveate.replace import UniversalRelative

SEEDS = range(5)
LENGTH, WIDTH, QUARTERS, STEPS = 32, 32, 4, 400
CHANCE, SOLVED, STUCK = 1 / QUARTERS, 0.9, 0.3


def accuracy(universal: bool, seed: int, named: bool) -> float:
    """Of a trained layer on all places of a text."""
    torch.manual_seed(seed)
    embedding = nn.Embedding(1 + QUARTERS, WIDTH)
    layer = foveate.nn.Attention(WIDTH, heads=2, rule=UniversalRelative(span=LENGTH), causal=False)
    # relative attention is the universal form whose factor stays 1
    layer.rule.learned.factor.requires_grad_(universal)
    head = nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, QUARTERS))
    learned = [p for part in (embedding, layer, head) for p in part.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(learned, lr=0.01)
    quarter = torch.arange(LENGTH) * QUARTERS // LENGTH
    ids = (quarter + 1 if named else torch.zeros_like(quarter))[None]
    for _ in range(STEPS):
        logits = head(layer(embedding(ids)))[0]
        loss = nn.functional.cross_entropy(logits, quarter)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return float((logits.argmax(-1) == quarter).float().mean())


def main() -> None:
    forms = {"relative": False, "universal": True}
    alike = {n: mean([accuracy(r, s, named=False) for s in SEEDS]) for n, r in forms.items()}
    told = {n: mean([accuracy(r, s, named=True) for s in SEEDS]) for n, r in forms.items()}
    can, cannot = alike["universal"]["low"] >= SOLVED, alike["relative"]["high"] <= STUCK
    write(
        title="Your Transformer May Not be as Powerful as You Expect",
        claim="Relative attention cannot represent a function of places that its universal form can.",
        verdict=("fails", "partly", "holds")[can + cannot],
        numbers={f"accuracy where all tokens are alike, {n}": x for n, x in alike.items()} | {"chance": number(CHANCE)},
        control={f"accuracy where tokens name their quarter, {n}": x for n, x in told.items()},
        seeds=list(SEEDS),
        rule=f"can: the universal form is right in {SOLVED:.0%} or more; cannot: the relative one in {STUCK:.0%} or "
        f"less "
        "(intervals). Holds: both; partly: one",
        encoder="one attention layer of width 32 and a small network behind it",
    )


if __name__ == "__main__":
    main()
