"""Running English text that every Python installation has."""

from __future__ import annotations

from functools import cache
from typing import Any

__all__ = ["default_text", "tokenised"]


@cache
def default_text() -> str:
    """The help topics of Python itself, in the order of their names: about 110,000 tokens of English."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def tokenised(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """A text's tokens, and what the tokenizer puts in front of a text: every stretch of it begins so."""
    plain = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    one, whole = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    front = next((n for n in range(len(whole)) if whole[n : n + len(one)] == one), 0)
    return plain, whole[:front]
