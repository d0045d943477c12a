r"""Interleaved local and latent layers: groups of tokens by themselves, a few latents per group that see the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.card import Card, Needs
from foveate.core.errors import BadInput
from foveate.core.mask import Mask
from foveate.core.mixer import Mixer, Tokens
from foveate.core.params import bounded
from foveate.core.rule import Sizes
from foveate.replace._groups import Groups, State
from foveate.replace.hierarchy._layers import EPS, Exchange, Stack

__all__ = ["Interleaved", "LocalLatent"]

# what a stage keeps between calls
HELD = ("keys", "values", "latents")


@dataclass(frozen=True)
class LocalLatent(Mixer):
    r"""Local layers inside groups of n tokens, in turn with global layers over m latents per group.

        x_g <- local(x_g)                                    each group by itself
        z_g <- z_g + attention(z_g, x_g),    z <- global(z)  latents read their group, then look over the text
        x_g <- x_g + attention(x_g, z_{g-1})                 tokens read the latents of the group before theirs

    In causal order, tokens see no later one of their group and latents no later group; where all see all, tokens read
    the latents of their own group. With groups of N^{1/3} tokens attention costs O(N^{4/3}).

    Example:
        It is a whole stack of layers. As a language model it stands between an embedding and an output layer.

        >>> import torch, foveate
        >>> from foveate.replace import LocalLatent
        >>> rule = LocalLatent(group=8, latents=2)
        >>> stack = foveate.nn.Attention(32, heads=4, rule=rule)
        >>> embedding, head = torch.nn.Embedding(100, 32), torch.nn.Linear(32, 100)
        >>> model = torch.nn.Sequential(embedding, stack, head)
        >>> model(torch.randint(100, (2, 21))).shape
        torch.Size([2, 21, 100])

    Args:
        group: Tokens per group, n.
        latents: Latents per group, m.
        stages: Local stacks; between two of them stands a global one.
        local_layers: Layers of a local stack.
        global_layers: Layers of a global stack.
        max_groups: Groups that have latents of their own; a longer text is refused.
    """

    group: int = bounded(16, 1, 65536)
    latents: int = bounded(4, 1, 65536)
    stages: int = bounded(2, 1, 64)
    local_layers: int = bounded(1, 1, 64)
    global_layers: int = bounded(1, 1, 64)
    max_groups: int = bounded(256, 1, 65536)

    card: ClassVar[Card] = Card(
        title="FIT: Far-reaching Interleaved Transformers",
        year=2023,
        family="hierarchy",
        needs=Needs.TRAINING,
        equation="x_g <- x_g + attention(x_g, z_{g-1}), z <- global(z + attention(z, x))",
        differs=(
            "Latents are as wide as tokens, and no dropout or stochastic depth is built in. The causal form is that of "
            "the authors' code; the one in which all see all follows the abstract. Decoding computes the open group "
            "anew for each token instead of caching its keys."
        ),
        use="Train a decoder or encoder of long texts whose global layers see a few rows per group.",
        misleads="Put into a loaded model by `convert` it begins untrained, and is a stack in the place of one layer.",
    )
    test_params: ClassVar = (
        {"group": 4, "latents": 2, "global_layers": 2, "max_groups": 20},
        {"group": 5, "latents": 1, "stages": 3, "max_groups": 20},
        {"group": 3, "stages": 1, "local_layers": 2},
    )

    def module(self, sizes: Sizes) -> nn.Module:
        return Interleaved(self, sizes)


class Interleaved(nn.Module):
    """The layers of a `LocalLatent`, called as `Mixer.module` says.

    Args:
        of: How many there are of what.
        sizes: Sizes of each layer.
    """

    def __init__(self, of: LocalLatent, sizes: Sizes) -> None:
        super().__init__()
        self.group = of.group
        self.place = nn.Parameter(0.02 * torch.randn(of.group, sizes.width))
        if of.stages > 1:
            self.latents = nn.Parameter(0.02 * torch.randn(of.max_groups, of.latents, sizes.width))
        self.first = Stack(of.local_layers, sizes)
        self.stages = nn.ModuleList(Stage(of, sizes) for _ in range(of.stages - 1))
        self.norm = nn.LayerNorm(sizes.width, EPS)

    def forward(self, tokens: Tokens, state: State | None) -> tuple[Float[Tensor, "batch query width"], State]:
        if state is not None and not tokens.causal:
            raise BadInput("where all tokens see all, all must be there at once; call it without a cache")
        before, after = state or {}, dict[str, Tensor]()
        groups = Groups.of(tokens, tokens.x, self.group, before.get("open"))
        after["open"] = groups.left()
        seen = groups.real.flatten(0, 1)
        inside = Mask.of_padding(seen, self.group, self.group, causal=tokens.causal, device=seen.device)
        x = self.first((groups.x + self.place).flatten(0, 1), inside)
        z = self.start(groups) if len(self.stages) else None
        for n, stage in enumerate(self.stages):
            held = {name: before[f"{name} {n}"] for name in HELD} if before else {}
            x, z, held = stage(x, z, inside, groups, held)
            after |= {f"{name} {n}": t for name, t in held.items()}
        return groups.back(self.norm(x).unflatten(0, groups.real.shape[:2])), after

    def start(self, groups: Groups) -> Float[Tensor, "batch groups latents width"]:
        """The latents of each group before they have seen anything.

        Raises:
            BadInput: there are more groups than latents were made for.
        """
        most = len(self.latents)
        number = int(groups.number.where(groups.real.any(2), -1).max()) + 1
        if number > most:
            raise BadInput(
                f"a text of {number} groups of {self.group} tokens, and latents for {most}; make it with a larger "
                "max_groups"
            )
        return self.latents[groups.number.clamp_max(most - 1)]


class Stage(nn.Module):
    """Global layers, what goes to them and comes from them, and the local layers after them.

    Args:
        of: How many there are of what.
        sizes: Sizes of each layer.
    """

    def __init__(self, of: LocalLatent, sizes: Sizes) -> None:
        super().__init__()
        self.read, self.write = Exchange(sizes), Exchange(sizes)
        self.overall, self.local = Stack(of.global_layers, sizes), Stack(of.local_layers, sizes)

    def forward(
        self,
        x: Float[Tensor, "pieces size width"],
        z: Float[Tensor, "batch groups latents width"],
        inside: Mask,
        groups: Groups,
        held: State,
    ) -> tuple[Float[Tensor, "pieces size width"], Float[Tensor, "batch groups latents width"], State]:
        """Tokens, group by group of all texts, and latents, as the next stage gets them; and what it keeps.

        Args:
            x: The tokens.
            z: The latents.
            inside: Which tokens of a group see each other.
            groups: The groups.
            held: What earlier calls left of this stage.
        """
        few, causal = z.shape[2], inside.causal
        size, seen = z.shape[:2], groups.real.flatten(0, 1)
        read = Mask.of_padding(seen, few, x.shape[1], causal=False, device=x.device)
        z = self.read(z.flatten(0, 1), x, read).unflatten(0, size)
        pairs = {name: held[name] for name in ("keys", "values")} if held else {}
        z, kept = self.overall.across(z, groups, pairs, causal)
        source = z
        if causal:
            last = held["latents"] if held else torch.zeros_like(z[:, 0])
            kept["latents"] = groups.latest(z, last)
            source = torch.cat([last[:, None], z[:, :-1]], 1)
        x = self.write(x, source.flatten(0, 1), Mask.full(x.shape[1], few, x.device))
        return self.local(x, inside), z, kept
