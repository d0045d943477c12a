"""Texts as mechanisms read them when they are built from a model's own activations: one at a time, without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from foveate.core.errors import BadInput

__all__ = ["encoded"]


def encoded(model: Any, tokenizer: Any, texts: Sequence[str], what: str) -> Iterator[dict[str, Tensor]]:
    """The inputs of each text.

    Args:
        model: The model that they are for.
        tokenizer: Its tokenizer.
        texts: The texts.
        what: What they are called, for the message.

    Raises:
        BadInput: there are none, one of them has no tokens, or a single text is given in place of a list.
    """
    if isinstance(texts, str):
        raise BadInput(f"{what} is one text, {texts[:40]!r}; give a list of texts")
    if not texts:
        raise BadInput(f"{what} is empty; give at least one text")
    for n, text in enumerate(texts):
        made = tokenizer(text, return_tensors="pt")
        if not made["input_ids"].shape[1]:
            raise BadInput(f"{what}[{n}] is {text!r}, which has no tokens; leave it out")
        yield {name: made[name].to(model.device) for name in ("input_ids", "attention_mask") if name in made}
