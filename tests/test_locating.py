"""From words to tokens: found to the letter, or refused with the way out."""

from __future__ import annotations

import pytest

import foveate
from foveate.core.errors import BadInput
from foveate.testing import tiny


def test_the_span_writes_the_part() -> None:
    tokenizer, text = tiny.tokenizer(), "the cat sat on the mat"
    ((start, stop),) = foveate.locate(tokenizer, text, "sat on")
    assert tokenizer.decode(tokenizer(text)["input_ids"][start:stop]) == "sat on"


def test_special_tokens_in_front_are_counted() -> None:
    tokenizer, text = tiny.tokenizer(), "<s>the cat"
    assert foveate.locate(tokenizer, text, "cat") == ((5, 8),)


def test_one_span_per_text() -> None:
    assert foveate.locate(tiny.tokenizer(), ["a b", "xxa b"], "b") == ((2, 3), (4, 5))


def test_a_part_that_is_not_there_is_refused_with_a_near_one() -> None:
    with pytest.raises(BadInput, match=r"'sat onn' does not occur .* did you mean 'sat on'\?"):
        foveate.locate(tiny.tokenizer(), "the cat sat on the mat", "sat onn")
    with pytest.raises(BadInput, match="copy it from the text"):
        foveate.locate(tiny.tokenizer(), "the cat", "zebra quagga")
    with pytest.raises(BadInput, match="is empty"):
        foveate.locate(tiny.tokenizer(), "the cat", "")


def test_a_part_that_is_there_twice_needs_an_index() -> None:
    tokenizer, text = tiny.tokenizer(), "the cat sat on the mat"
    with pytest.raises(
        BadInput, match=r"'the' occurs 2 times; say which with an index \(0: character 0, .*1: character 15"
    ):
        foveate.locate(tokenizer, text, "the")
    assert foveate.locate(tokenizer, text, "the", index=1) == ((15, 18),)
    with pytest.raises(BadInput, match="index 2 must be from 0 to 1"):
        foveate.locate(tokenizer, text, "the", index=2)


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(BadInput, match="Slow cannot say which characters"):
        foveate.locate(Slow(), "a", "a")
