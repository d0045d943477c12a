r"""Global-to-local blocks: a decoder over blocks of tokens, and a small one inside each block."""

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
from foveate.replace.hierarchy._layers import EPS, Stack

__all__ = ["BlockStack", "GlobalToLocal"]

# rows that a block's context is for the decoder of the next block
PREFIX = 2
ROPE = 10_000.0


@dataclass(frozen=True)
class GlobalToLocal(Mixer):
    r"""A block embedder, a block decoder and a token decoder for blocks of L tokens.

        e_b = concat_l(W_e x_{b,l})                                  one row per block
        c = block_decoder(e)                                         causal over blocks
        y_{b+1} = token_decoder([W_p c_b, x_{b+1,1}, ..., x_{b+1,L-1}])     causal inside one block

    The last prefix row W_p c_b gives the output of block b's last token, and each further row that of its own token:
    the output of a token tells of itself and all before it. A cache holds N / L rows for the block decoder; the token
    decoder sees no more than one block.

    Example:
        It is a whole stack of layers. As a language model it stands between an embedding and an output layer.

        >>> import torch, foveate
        >>> from foveate.replace import GlobalToLocal
        >>> stack = foveate.nn.Attention(32, heads=4, rule=GlobalToLocal(block=4))
        >>> embedding, head = torch.nn.Embedding(100, 32), torch.nn.Linear(32, 100)
        >>> model = torch.nn.Sequential(embedding, stack, head)
        >>> model(torch.randint(100, (2, 21))).shape
        torch.Size([2, 21, 100])

    Args:
        block: Tokens per block, L; divides the width.
        block_layers: Layers of the block decoder.
        token_layers: Layers of the token decoder.
    """

    block: int = bounded(4, 1, 65536)
    block_layers: int = bounded(2, 1, 256)
    token_layers: int = bounded(2, 1, 256)

    full: ClassVar[bool] = False
    card: ClassVar[Card] = Card(
        title="Block Transformer: Global-to-Local Language Modeling for Fast Inference",
        year=2024,
        family="hierarchy",
        needs=Needs.TRAINING,
        equation="c = block_decoder(e), y_{b+1} = token_decoder([W_p c_b, x_{b+1}])",
        differs=(
            "Embedder and token decoder read the layer's input, through a projection and as it is; the authors have an "
            "embedding table for each. The context of the first block is learned; theirs is a block of padding. "
            "Attention and feed-forward follow each other, with rotary positions on whole heads; GPT-NeoX has them "
            "side by side, and on a quarter of a head. Decoding computes the open block anew for each token."
        ),
        use="Train a decoder whose cache is read once per block instead of once per token.",
        misleads="Put into a loaded model by `convert` it begins untrained, and is a stack in the place of one layer.",
    )
    test_params: ClassVar = (
        {"token_layers": 1},
        {"block": 8, "block_layers": 1},
        {"block": 1, "block_layers": 1, "token_layers": 1},
    )

    def module(self, sizes: Sizes) -> nn.Module:
        return BlockStack(self, sizes)


class BlockStack(nn.Module):
    """The parts of a `GlobalToLocal`, called as `Mixer.module` says.

    Args:
        of: How many layers there are, and the length of a block.
        sizes: Sizes of each layer.

    Raises:
        BadInput: the width cannot be divided among the tokens of a block.
    """

    def __init__(self, of: GlobalToLocal, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.width
        if width % of.block:
            raise BadInput(
                f"width {width} is no multiple of block={of.block}, whose tokens share a row; take a divisor"
            )
        self.block = of.block
        self.embed = nn.Linear(width, width // of.block, bias=False)
        self.block_layers = Stack(of.block_layers, sizes, ROPE)
        self.block_norm = nn.LayerNorm(width, EPS)
        self.start = nn.Parameter(0.02 * torch.randn(width))
        self.expand = nn.Linear(width, PREFIX * width)
        self.token_layers = Stack(of.token_layers, sizes, ROPE)
        self.token_norm = nn.LayerNorm(width, EPS)
        nn.init.normal_(self.expand.weight, std=width**-0.5)
        nn.init.zeros_(self.expand.bias)

    def forward(self, tokens: Tokens, state: State | None) -> tuple[Float[Tensor, "batch query width"], State]:
        before = state or {}
        groups = Groups.of(tokens, tokens.x, self.block, before.get("open"))
        held = {name: t for name, t in before.items() if name in ("keys", "values")}
        c, held = self.block_layers.across(self.embed(groups.x).flatten(2)[:, :, None], groups, held, causal=True)
        c = self.block_norm(c)[:, :, 0]
        last = before["context"] if before else self.start.to(c).expand(len(c), -1)
        after = {"open": groups.left(), "context": groups.latest(c, last)} | held
        y = self.inside(torch.cat([last[:, None], c], 1), groups.x[:, :, :-1])
        # what a block's last token gives is decoded in front of the next block
        return groups.back(torch.cat([y[:, :-1, PREFIX:], y[:, 1:, PREFIX - 1 : PREFIX]], 2)), after

    def inside(
        self, contexts: Float[Tensor, "batch more width"], x: Float[Tensor, "batch blocks few width"]
    ) -> Float[Tensor, "batch more rows width"]:
        """The token decoder behind each context, and in each block: prefix rows, then rows of tokens."""
        prefix = self.expand(contexts).unflatten(-1, (PREFIX, -1))
        behind = torch.cat([x, torch.zeros_like(x[:, :1])], 1)
        y = torch.cat([prefix, behind], 2)
        size, rows = y.shape[:2], y.shape[2]
        y = self.token_layers(y.flatten(0, 1), Mask.causal_of(rows, device=y.device))
        return self.token_norm(y).unflatten(0, size)
