"""KV heads that policies name, and what a budget is when some of them keep everything."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

from jaxtyping import Int
from torch import Tensor

from foveate.core.budget import Budget
from foveate.core.errors import BadInput
from foveate.core.places import Head, Heads

__all__ = ["KVHeads", "names_kv_heads", "some_kv_heads", "whole_for", "with_all"]


@dataclasses.dataclass(frozen=True)
class KVHeads(Heads):
    """Pairs of layer and KV head."""

    entry: ClassVar = "(layer, KV head)"
    empty: ClassVar = "() is none"


def some_kv_heads() -> Any:
    """A dataclass field that names KV heads; none, unless it is given."""
    return dataclasses.field(default=(), metadata={"bounds": KVHeads()})


def names_kv_heads(policy: str, named: Iterable[Head], layer: int, layers: int, kv_heads: int) -> list[int]:
    """The KV heads of a layer that are named.

    A model tells how many it has only when it runs, and `attach` counts its query heads.

    Raises:
        BadInput: the model has not so many layers with a KV cache, or this layer has not so many KV heads.
    """
    found = []
    for at, head in named:
        if at >= layers:
            raise BadInput(
                f"{policy}: the model has no layer {at}; its {layers} layers with a KV cache are 0 to {layers - 1}"
            )
        if at == layer:
            if head >= kv_heads:
                raise BadInput(
                    f"{policy}: layer {layer} has no KV head {head}; its {kv_heads} KV heads, which its query heads "
                    f"share, are 0 to {kv_heads - 1}"
                )
            found.append(head)
    return found


def whole_for(heads: Iterable[Head], budget: Budget) -> Budget:
    """The budget with a plan in which these KV heads keep everything; the others do not compete."""
    if budget.whole:
        return budget
    plan = budget.heads if isinstance(budget.heads, tuple) else ()
    return dataclasses.replace(budget, heads=(*plan, *((layer, head, 1.0) for layer, head in heads)))


def with_all(
    counts: Int[Tensor, "batch kv_heads"], heads: list[int], seen: Int[Tensor, " batch"]
) -> Int[Tensor, "batch kv_heads"]:
    """The counts with all tokens for these KV heads, whatever a budget gives to their layer."""
    counts = counts.clone()
    counts[:, heads] = seen[:, None]
    return counts
