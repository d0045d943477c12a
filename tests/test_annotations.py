"""Shape annotations are checked in the tests, whatever was checked before."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jaxtyping
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from conftest import checked, plain, remembering
from foveate.core.policy import best
from foveate.probe.run import wilson

if TYPE_CHECKING:
    from pathlib import Path as Seldom

SCORES, COUNTS = torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.long)


def test_a_wrong_shape_is_told_also_behind_right_ones():
    for _ in range(3):
        best(SCORES, COUNTS)
    for scores, counts in ((SCORES[0], COUNTS), (SCORES, COUNTS.float()), (SCORES, torch.ones(1, 3, dtype=torch.long))):
        for _ in range(2):
            with pytest.raises(jaxtyping.TypeCheckError):
                best(scores, counts)


def test_what_comes_out_is_looked_at_although_the_same_went_in():
    gives, calls = [torch.zeros(2)], []

    def same(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        calls.append(x)
        return gives[0]

    function = remembering(typechecker=checked)(same)
    for _ in range(2):
        assert function(torch.zeros(2)) is gives[0]
    gives[0] = torch.zeros(3)
    for n in range(2):
        with pytest.raises(jaxtyping.TypeCheckError):
            function(torch.zeros(2))
        # a call that is looked at again is not made again
        assert len(calls) == 3 + n
    gives[0] = torch.zeros(2, dtype=torch.long)
    with pytest.raises(jaxtyping.TypeCheckError):
        function(torch.zeros(2))


def test_kinds_of_numbers_are_told_apart():
    wilson(1, 2)
    for wrong in ("1", None, [1]):
        with pytest.raises(jaxtyping.TypeCheckError):
            wilson(wrong, 2)


def test_annotations_can_be_off(unchecked):
    best(SCORES[0], COUNTS[0])
    with pytest.raises(TypeError, match="unsupported operand"):
        wilson("1", 2)


Pairs = list[Float[Tensor, " n"]]


def of_words(x: list[int], y: Tensor) -> str:
    return ""


def by_another_name(x: Pairs) -> None:
    pass


def out_of_sight(x: Seldom) -> int:
    return 1


def of_nothing(x: Callable[..., int]) -> None:
    pass


def test_what_speaks_of_shapes():
    assert plain(of_words) and plain(of_nothing) and not plain(by_another_name) and not plain(out_of_sight)
    function = remembering(typechecker=checked)(of_words)
    for _ in range(2):
        assert function([1, 2], torch.zeros(2)) == ""
        with pytest.raises(jaxtyping.TypeCheckError):
            function([1, "2"] * 40, torch.zeros(3, 1).tolist())
    assert remembering(typechecker=checked)(out_of_sight)(2) == 1
    gives = remembering(typechecker=checked)(by_another_name)
    gives([torch.zeros(2)])
    with pytest.raises(jaxtyping.TypeCheckError):
        gives([torch.zeros(2, 3)])


def test_sizes_are_told_apart_by_name_alone_where_axes_have_names():
    calls = []

    def pair(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> None:
        calls.append(x)

    def three(x: Float[Tensor, "n 3"]) -> None:
        calls.append(x)

    by_name, by_number = (remembering(typechecker=checked)(f) for f in (pair, three))
    for n in (2, 3, 4):
        by_name(torch.zeros(n), torch.zeros(n))
        by_number(torch.zeros(n, 3))
    with pytest.raises(jaxtyping.TypeCheckError):
        by_name(torch.zeros(3), torch.zeros(4))
    with pytest.raises(jaxtyping.TypeCheckError):
        by_number(torch.zeros(3, 4))
