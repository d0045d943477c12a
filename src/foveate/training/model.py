"""The small model that is trained: a decoder around any rule, recurrence or mixer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from foveate.core.errors import BadInput
from foveate.core.mixer import StateLayer
from foveate.core.rule import Operator
from foveate.nn import Attention
from foveate.training.run import Size
from foveate.training.task import NOT_ASKED, Batch

__all__ = ["Decoder"]

SPREAD = 0.02


class Block(nn.Module):
    """One layer: attention, and a feed-forward part where there is one, each behind a norm and beside the residual."""

    def __init__(self, size: Size, operator: Operator, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(size.width)
        self.attention = Attention(
            size.width, size.heads, size.kv_heads or None, operator, size.rope or None, bias=True, layer=layer
        )
        self.short = nn.Conv1d(size.width, size.width, size.taps, groups=size.width) if size.taps else None
        inner = size.feed_forward * size.width
        self.feed_forward = (
            nn.Sequential(
                nn.LayerNorm(size.width), nn.Linear(size.width, inner), nn.ReLU(), nn.Linear(inner, size.width)
            )
            if inner
            else None
        )

    def read(self, x: Float[Tensor, "batch position width"]) -> Float[Tensor, "batch position width"]:
        """What attention reads of the residual stream: a token, and beside it those just before."""
        x = self.attention_norm(x)
        if self.short is None:
            return x
        return x + self.short(nn.functional.pad(x.transpose(1, 2), (self.short.kernel_size[0] - 1, 0))).transpose(1, 2)


class Decoder(nn.Module):
    """A causal language model of a few layers, whose output layer is its embedding.

    Args:
        vocabulary: Number of tokens.
        size: Its shape.
        operator: What stands where attention does, in each layer.
    """

    def __init__(self, vocabulary: int, size: Size, operator: Operator) -> None:
        super().__init__()
        self.size = size
        self.embedding = nn.Embedding(vocabulary, size.width)
        self.places = nn.Embedding(size.places, size.width) if size.places else None
        self.blocks = nn.ModuleList(Block(size, operator, n) for n in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.start()

    def start(self) -> None:
        """Small weights everywhere but in what a rule brings, smaller where they write to the residual stream."""
        for name, p in self.named_parameters():
            if ".rule." in name or ".short." in name or "norm" in name or p.ndim < 2:
                if name.endswith(("o_proj.bias", "v_proj.bias")):
                    nn.init.zeros_(p)
                continue
            writes = name.endswith(("o_proj.weight", "feed_forward.3.weight"))
            nn.init.normal_(p, std=SPREAD / (2 * self.size.layers) ** 0.5 if writes else SPREAD)

    def forward(self, ids: Int[Tensor, "batch position"]) -> Float[Tensor, "batch position width"]:
        """The last hidden states; `logits` of them is a product of its own, for a few positions may be asked only."""
        *_, (_, x) = self.stages(ids)
        return x

    def stages(self, ids: Int[Tensor, "batch position"]) -> Iterator[tuple[str, Float[Tensor, "batch position width"]]]:
        """The hidden states behind each part, by its name: who looks for a NaN stops where it finds one."""
        x = self.embedding(ids)
        if self.places is not None:
            x = x + self.placed(ids.shape[1])
        yield "the embedding", x
        for n, block in enumerate(self.blocks):
            x = x + block.attention(block.read(x))
            yield f"layer {n}, attention", x
            if block.feed_forward is not None:
                x = x + block.feed_forward(x)
                yield f"layer {n}, feed-forward", x
        yield "the last norm", self.norm(x)

    def placed(self, length: int) -> Float[Tensor, "position width"]:
        """The learnt positions of a sequence."""
        assert self.places is not None
        if length > self.size.places:
            raise BadInput(
                f"the model has learnt {self.size.places} positions and the sequence has {length}; give "
                "Size(places=0), which leaves order to rope"
            )
        return self.places.weight[:length]

    def logits(self, hidden: Float[Tensor, "... width"]) -> Float[Tensor, "... vocabulary"]:
        """What may come next."""
        return hidden @ self.embedding.weight.T

    def answers(self, batch: Batch) -> tuple[Float[Tensor, " asked"], Bool[Tensor, " asked"]]:
        """The loss at each position that is asked, in order, and whether the right token is the likeliest."""
        logits, right = self.asked(batch)
        return cross_entropy(logits, right, reduction="none"), logits.argmax(-1) == right

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """The mean loss of what is asked."""
        return cross_entropy(*self.asked(batch))

    def asked(self, batch: Batch) -> tuple[Float[Tensor, "asked vocabulary"], Int[Tensor, " asked"]]:
        """The logits of the positions that are asked, and what is right there."""
        asked = batch.targets != NOT_ASKED
        return self.logits(self(batch.inputs)[asked]), batch.targets[asked]

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def state_bytes(self, length: int) -> int:
        """Bytes that a text of so many tokens leaves behind for the next one: what a cache of it holds."""
        cache = DynamicCache()
        for block in self.blocks:
            block.attention(torch.zeros(1, length, self.size.width), cache=cache)
        held = 4 * self.size.width * self.size.layers * min(max(0, self.size.taps - 1), length)
        for layer in cache.layers:
            own = isinstance(layer, StateLayer)
            held += layer.bytes_held() if own else layer.keys.nbytes + layer.values.nbytes
        return held

    def layer(self, n: int) -> Block:
        """One layer."""
        block = self.blocks[n]
        assert isinstance(block, Block)
        return block
