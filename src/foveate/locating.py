"""From words to tokens: where a part of a text stands among its tokens."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from foveate.core.errors import BadInput

__all__ = ["locate"]


def locate(
    tokenizer: Any,
    texts: str | Sequence[str],
    part: str,
    index: int | None = None,
    add_special_tokens: bool = True,
) -> tuple[tuple[int, int], ...]:
    """The tokens that write a part of a text, as edits take them: first and one past the last, one pair per text.

    Args:
        tokenizer: A fast tokenizer.
        texts: The text as the model is given it, or those of a batch. A chat is given as its template renders it.
        part: The words to find, to the letter.
        index: Which occurrence, from 0, where there are several.
        add_special_tokens: Whether the tokenizer adds its special tokens, as it does for the model.

    Raises:
        BadInput: the part does not stand in a text, or stands there several times and `index` does not say which.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise BadInput(
            f"{type(tokenizer).__name__} cannot say which characters a token writes; load the fast tokenizer"
        )
    if not part:
        raise BadInput("the part to find is empty; give some words of the text")
    found = []
    for text in [texts] if isinstance(texts, str) else texts:
        start = occurrence(text, part, index)
        encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False)
        stop = start + len(part)
        inside = [n for n, (a, b) in enumerate(encoded["offset_mapping"]) if a < stop and b > start]
        if not inside:
            raise BadInput(f"no token of {type(tokenizer).__name__} writes {part!r} at character {start}")
        found.append((inside[0], inside[-1] + 1))
    return tuple(found)


def occurrence(text: str, part: str, index: int | None) -> int:
    """The character at which the asked occurrence begins."""
    starts = []
    at = text.find(part)
    while at >= 0:
        starts.append(at)
        at = text.find(part, at + 1)
    if not starts:
        words = part.split()
        size = max(1, len(words))
        pieces = text.split()
        windows = {" ".join(pieces[n : n + size]) for n in range(max(1, len(pieces) - size + 1))}
        near = difflib.get_close_matches(part, sorted(windows), n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else "copy it from the text, to the letter"
        raise BadInput(f"{part!r} does not occur in the text of {len(text):,} characters; {hint}")
    if index is None and len(starts) > 1:
        where = ", ".join(f"{n}: {around(text, at, len(part))}" for n, at in enumerate(starts[:5]))
        more = ", …" if len(starts) > 5 else ""
        raise BadInput(f"{part!r} occurs {len(starts)} times; say which with an index ({where}{more})")
    if index is not None and not 0 <= index < len(starts):
        raise BadInput(f"{part!r} occurs {len(starts)} times; index {index} must be from 0 to {len(starts) - 1}")
    return starts[index or 0]


def around(text: str, at: int, size: int) -> str:
    """Some characters of the text around a place."""
    piece = " ".join(text[max(0, at - 12) : at + size + 12].split())
    return f"character {at:,}, “{'…' if at > 12 else ''}{piece}{'…' if at + size + 12 < len(text) else ''}”"
