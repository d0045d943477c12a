"""Draws the README's pictures.

python docs/draw.py heads profiles/smollm2 docs/images/smollm2.png     # from a saved profile
python docs/draw.py frontier docs/images/frontier.png                  # from bench/results/frontier.json
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import foveate

sys.path.insert(0, str(Path(__file__).parent / "hooks"))
from figures import FRONTIER, draw_frontier
from svg import drawing

PANELS = {
    "first_token_mass": "first token",
    "streaming_mass": "first token + last 256",
    "induction": "induction",
    "retrieval_score": "retrieval",
    "entropy_relative": "relative entropy",
}


def heads(folder: str, target: str) -> None:
    profile = foveate.Profile.load(folder)
    fig, axes = plt.subplots(1, len(PANELS), figsize=(11, 5), sharey=True, layout="constrained")
    for ax, (metric, title) in zip(axes, PANELS.items(), strict=True):
        table = profile.metric(metric)
        image = ax.imshow(table.to_numpy(), aspect="auto", cmap="magma", interpolation="nearest", vmin=0)
        ax.set(title=title, xlabel="head")
        ax.set_xticks(range(table.shape[1]))
        fig.colorbar(image, ax=ax, location="bottom", shrink=0.9)
    axes[0].set_ylabel("layer")
    info = profile.info
    fig.suptitle(f"{info['model']}: {info['summary']['heads']} heads on {info['tokens']:,} tokens", fontsize=12)
    fig.savefig(target, dpi=110)


def frontier(target: str) -> None:
    with drawing(*FRONTIER) as fig:
        draw_frontier(fig)
        fig.savefig(target, dpi=110, facecolor="white")


if __name__ == "__main__":
    {"heads": heads, "frontier": frontier}[sys.argv[1]](*sys.argv[2:])
