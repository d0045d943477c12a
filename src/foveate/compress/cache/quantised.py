r"""Quantised: keep every entry, and keep it in 8 or 4 bits a channel.

    code = round((x R - m) / s + top / 2),        x' = (m + s (code - top / 2)) R^T,        top = 2^bits - 1
    q . k' = (q R) . (m + s (code - top / 2))

x are the channels of a key or a value in groups, m and s the middle and the step of a group, R a Hadamard matrix that
spreads the few large channels of keys over their group, so that they do not set the step for all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.compress.cache._integers import Integers
from foveate.core.card import Card, Needs
from foveate.core.params import bounded, choice
from foveate.core.ragged import Side

__all__ = ["Quantised"]


@dataclass(frozen=True)
class Quantised(Integers):
    """Store keys and values as integers, each row by itself; attention decodes them as it reads.

    Args:
        bits: Of each channel, 8 or 4.
        value_bits: Of each channel of values, where they get other ones than keys; 0: as many.
        group: Channels of a row that share a middle and a step, at most.

    Example:
        All entries stay, in a third, a quarter or a fifth of the bytes; positions and scores are counted with them.

        >>> import foveate
        >>> from foveate.compress import Quantised, Streaming
        >>> from foveate.testing import handmade
        >>> ids = handmade.ids("To be. Or not to be. Ask.")
        >>> def held(*policies):
        ...     with foveate.attach(handmade.model(), *policies) as attached:
        ...         cache = attached.model(ids).past_key_values
        ...         return attached.bytes_held()
        >>> whole = held(Streaming(1.0))
        >>> forms = Quantised(8), Quantised(8, value_bits=4), Quantised(4)
        >>> [round(held(form) / whole, 2) for form in forms]
        [0.3, 0.24, 0.18]
    """

    bits: int = choice(8, 8, 4)
    value_bits: int = choice(0, 0, 8, 4)
    group: int = bounded(32, 8, 256)

    card: ClassVar = Card(
        title="QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs",
        year=2024,
        family="kv cache",
        needs=Needs.KEYS | Needs.VALUES,
        equation="code = round((x R - m) / s + top / 2); x' = (m + s (code - top / 2)) R^T; top = 2^bits - 1",
        differs="only the cache is quantised, no weights and no other activations; the mean of the values is turned "
        "back after attention, the paper folds that rotation into the weights; each group is rotated by itself, which "
        "keeps the two halves that rotary positions pair apart; nothing is clipped; a group whose size is no power of "
        "two is rotated by a Hadamard matrix times a Hartley matrix; m and s are in bfloat16. KIVI gives each channel "
        "of keys a step of its own over many tokens, which is closer at 4 bits and needs the tokens to stay together; "
        "values can have fewer bits than keys, as in KVTuner",
        use="when memory is short and nothing may be forgotten; beside any policy that says what stays",
        misleads="it saves bytes and hardly any time on a CPU: decoding a row takes about as long as reading a whole "
        "one; without the native kernel rows are turned into numbers again at each token. The call that brings tokens "
        "still sees them as they came, so that the loss shows from the next call on",
        claims=("value_bits",),
    )
    test_params: ClassVar = ({}, {"bits": 4}, {"value_bits": 4})

    def bits_of(self, side: Side, layer: int) -> int:
        return (self.value_bits if side == "values" else 0) or self.bits
