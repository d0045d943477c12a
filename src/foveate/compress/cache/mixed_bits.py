r"""Mixed bits: every entry stays, in 8 bits in the layers that need them and in 4 in the others.

    D_p = mean over tokens of KL(p_full || p with part p in 4 bits and all others in 8)
    8 bits for the parts of largest D_p, as many as fit; 4 for the others

A part is the keys or the values of one layer. How rows become integers is that of `Quantised`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from foveate.compress.cache._integers import Integers
from foveate.core.card import Card, Needs
from foveate.core.errors import BadInput
from foveate.core.params import bounded
from foveate.core.places import Layers
from foveate.core.ragged import SIDES, Side
from foveate.probe.ledger import Ledger, circumstances
from foveate.probe.text import tokenised
from foveate.probe.trials import each

__all__ = ["MixedBits"]


def some_layers() -> Any:
    """A dataclass field that names layers; none, unless it is given."""
    return dataclasses.field(default=(), metadata={"bounds": Layers()})


@dataclass(frozen=True)
class MixedBits(Integers):
    """Store keys and values as integers of 8 bits in some layers, of 4 in the others.

    Args:
        keys: Layers whose keys get 8 bits a channel.
        values: Layers whose values get 8 bits a channel.
        group: Channels of a row that share a middle and a step, at most.

    Example:
        Each layer whose keys or values get 8 bits adds to what the cache holds.

        >>> import foveate
        >>> from foveate.compress import MixedBits
        >>> from foveate.testing import handmade, tiny
        >>> ids = handmade.ids("To be. Or not to be. Ask.")
        >>> def held(policy):
        ...     with foveate.attach(handmade.model(), policy) as attached:
        ...         attached.model(ids)
        ...         return attached.bytes_held()
        >>> all_in_8 = MixedBits(keys=(0, 1), values=(0, 1))
        >>> held(MixedBits()) < held(MixedBits(keys=(1,))) < held(all_in_8)
        True

        `fit` finds which parts need 8: here the values of the last layer.

        >>> again, model = 16 * "qwertyuiopasdfgh", handmade.model()
        >>> few = {"keep": 0.3, "tokens": 48, "samples": 2, "follow": 8}
        >>> found = MixedBits.fit(model, tiny.tokenizer(), again, **few)
        >>> found.keys, found.values
        ((), (1,))
    """

    keys: tuple[int, ...] = some_layers()
    values: tuple[int, ...] = some_layers()
    group: int = bounded(32, 8, 256)

    card: ClassVar = Card(
        title="KVTuner: Sensitivity-Aware Layer-Wise Mixed-Precision KV Cache Quantization for Efficient and Nearly "
        "Lossless LLM Inference",
        year=2025,
        family="kv cache",
        needs=Needs.KEYS | Needs.VALUES | Needs.MODEL,
        equation="D_p = mean KL(p_full || p with part p in 4 bits, the others in 8); 8 bits for the largest D_p",
        differs="8 and 4 bits, no 2; rows are rotated and have a grid each, as in Quantised. The paper clusters layers "
        "by the errors of single layers and searches the pairs of bits of all clusters together, by a genetic "
        "algorithm against task accuracy; here parts are taken one at a time, by what each alone does to the model's "
        "predictions behind a text, and are added up. Keys and values of a layer are chosen apart",
        use="when a cache is to be smaller than 8 bits for keys and 4 for values make it, and nothing may be forgotten",
        misleads="what parts do together may be more than the sum of what each does; parts that are alike are told "
        "apart by chance on few texts. It saves bytes and hardly any time on a CPU",
        claims=("mixed_bits",),
    )
    test_params: ClassVar = ({}, {"keys": (0,)}, {"keys": (1,), "values": (1,)})

    def bits_of(self, side: Side, layer: int) -> int:
        return 8 if layer in (self.keys if side == "keys" else self.values) else 4

    @classmethod
    def fit(
        cls,
        model: Any,
        tokenizer: Any,
        text: str,
        *,
        keep: float = 0.2,
        tokens: int = 1024,
        samples: int = 4,
        follow: int = 128,
        file: str | Path | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> MixedBits:
        """Finds which parts get 8 bits, so that the cache takes a share of the model's own.

        Args:
            model: A causal language model.
            tokenizer: Its tokenizer.
            text: What is read.
            keep: Share of the bytes of the model's own cache, positions and spare room included.
            tokens: Length of what is stored.
            samples: Stretches of the text.
            follow: Tokens behind each, whose predictions are compared.
            file: Where results are kept as they come: another share takes them from there.
            progress: Called with the stretches done and all stretches.

        Raises:
            BadInput: a text that is too short, a number below 1, or a share below what 4 bits take.
        """
        for name, number in (("tokens", tokens), ("samples", samples), ("follow", follow)):
            if number < 1:
                raise BadInput(f"MixedBits.fit({name}={number}): give at least 1")
        ids, front = tokenised(tokenizer, text)
        length = tokens + follow - len(front)
        last = len(ids) - length
        if last < samples - 1:
            raise BadInput(
                f"MixedBits.fit: the text has {len(ids):,} tokens, and {samples} stretches of {length:,} take "
                f"{length + samples - 1:,} at least; give a longer text, or fewer tokens"
            )
        layers = range(model.config.get_text_config(decoder=True).num_hidden_layers)
        parts = [(side, layer) for side in SIDES for layer in layers]
        tried = [cls.eight(parts), *(cls.eight([p for p in parts if p != part]) for part in parts)]
        ledger, found = Ledger(file), []
        for n in range(samples):
            some = [*front, *ids[(at := n * last // max(1, samples - 1)) : at + length]]
            key = ledger.key("mixed_bits", circumstances(model), follow, some)
            if key not in ledger:
                ledger.add(key, divergences(model, some, follow, tried))
            found.append(ledger[key])
            if progress is not None:
                progress(n + 1, samples)
        apart, held = torch.tensor(found, dtype=torch.float64).mean(0).unbind(-1)
        saved, share = (held[0] - held[1:]).tolist(), float(held[0])
        if share - sum(saved) > keep:
            raise BadInput(
                f"MixedBits.fit(keep={keep:.3g}): in 4 bits everything takes {share - sum(saved):.3f} of the cache; "
                "keep at least that, or let a policy drop entries beside it"
            )
        left = list(parts)
        for n in apart[1:].argsort().tolist():
            if share <= keep:
                break
            left.remove(parts[n])
            share -= saved[n]
        return cls.eight(left)

    @classmethod
    def eight(cls, parts: list[tuple[Side, int]]) -> MixedBits:
        """8 bits for these parts."""
        keys, values = (tuple(layer for side, layer in parts if side == of) for of in SIDES)
        return cls(keys, values)


def divergences(model: Any, ids: list[int], follow: int, tried: list[MixedBits]) -> list[tuple[float, float]]:
    """How far the predictions of the last tokens are from the model's own, and the share of bytes, under each."""
    rest = torch.tensor([ids[-follow:]], device=model.device)
    whole = torch.tensor([ids], device=model.device)
    with torch.no_grad():
        want = model(input_ids=whole, logits_to_keep=follow).logits.float().log_softmax(-1)

    def apart(cache: DynamicCache, logits: Tensor, piece: int) -> list[float]:
        total = torch.zeros(len(logits), dtype=torch.float64)
        for start in range(0, follow, piece):
            some = rest[:, start : start + piece].expand(len(logits), -1)
            got = model(input_ids=some, past_key_values=cache, use_cache=True).logits.float().log_softmax(-1)
            true = want[:, start : start + piece]
            total += (true.exp() * (true - got)).sum((-1, -2)).double().cpu()
        return (total / follow).tolist()

    found = {name: (value, held) for name, value, held in each(model, ids[:-follow], named(tried), apart)}
    return [found[str(n)] for n in range(len(tried))]


def named(tried: list[MixedBits]) -> dict[str, tuple[MixedBits]]:
    """Sets of policies as trials take them."""
    return {str(n): (policy,) for n, policy in enumerate(tried)}
