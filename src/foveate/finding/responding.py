r"""How a task's loss answers to an edit in each head, all heads at once.

    s'_ij = s_ij + lambda_h bias_j
    p'_i = p_i + lambda_h (edit(p)_i - p_i)
    o'_i = o_i + lambda_h (edit(o)_i - o_i)
    response_h = -d loss / d lambda_h at lambda = 0

Each head gets a dial between nothing and the whole edit. One backward pass says for every dial which way to turn it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.attach import attach, attention_layers
from foveate.core.errors import NotSupported
from foveate.core.mechanism import Edit, HeadEdit, Mechanism, Tilt
from foveate.core.recording import frozen
from foveate.core.reductions import Reduction
from foveate.core.rows import RowBlock, Rows, View
from foveate.tasks import Prepared, loss

__all__ = ["responses"]


@dataclass(frozen=True, eq=False)
class DialledEdit(Edit):
    """An edit, turned on in each head as far as its dial says."""

    inner: Edit
    dials: dict[int, Tensor]

    def needs(self) -> tuple[Reduction, ...]:
        return self.inner.needs()

    def dial(self, view: View) -> Float[Tensor, " heads"]:
        """The dials of this layer's heads."""
        if view.layer.index not in self.dials:
            self.dials[view.layer.index] = view.q.new_zeros(view.heads, dtype=torch.float32).requires_grad_()
        return self.dials[view.layer.index]

    def tilt(self, view: View) -> Tilt | None:
        tilt = self.inner.tilt(view)
        if tilt is None:
            return None
        if tilt.bias is not None and bool(tilt.bias.isinf().any()):
            raise NotSupported(f"{type(self.inner).__name__} takes keys out, which cannot be done by degrees")
        dial = self.dial(view)[:, None]
        factor = None if tilt.factor is None else tilt.factor**dial
        return Tilt(factor, None if tilt.bias is None else tilt.bias * dial, tilt.rows)

    def edit_scores(
        self, block: RowBlock, scores: Float[Tensor, "batch heads rows keys"]
    ) -> Float[Tensor, "batch heads rows keys"]:
        new = self.inner.edit_scores(block, scores)
        return scores if new is scores else scores + self.dial(block.view)[:, None, None] * (new - scores)

    def edit(
        self, block: RowBlock, weights: Float[Tensor, "batch heads rows keys"]
    ) -> Float[Tensor, "batch heads rows keys"]:
        new = self.inner.edit(block, weights)
        return weights if new is weights else weights + self.dial(block.view)[:, None, None] * (new - weights)

    def acts(self, layer: int) -> bool:
        return self.inner.acts(layer)

    @property
    def whole_rows(self) -> bool:
        """As of the edit itself."""
        return self.inner.whole_rows


@dataclass(frozen=True, eq=False)
class DialledHeads(HeadEdit):
    """A head edit, turned on in each head as far as its dial says."""

    inner: HeadEdit
    dials: dict[int, Tensor]

    def edit(
        self, rows: Rows, out: Float[Tensor, "batch heads query value_dim"]
    ) -> Float[Tensor, "batch heads query value_dim"]:
        at = rows.layer.index
        if at not in self.dials:
            self.dials[at] = out.new_zeros(out.shape[1], dtype=torch.float32).requires_grad_()
        return out + self.dials[at].to(out.dtype)[:, None, None] * (self.inner.edit(rows, out) - out)


def responses(
    model: Any,
    groups: list[tuple[Mechanism, Prepared]],
    lose: Callable[[Any, Prepared], Tensor] = loss,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "layers heads"]:
    """How far turning an edit on in each head would lower the loss, to first order.

    Args:
        model: A causal language model.
        groups: Examples, each group with the edit for it (the same one, but for its span).
        lose: What is to become small, as a mean over examples.
        batch: Examples that one backward pass holds.
        progress: Called with how many examples are done and how many there are.

    Returns:
        The mean response per example, in units of the loss; NaN for heads that a layer has not.

    Raises:
        NotSupported: the mechanism does not act in heads.
    """
    found: dict[int, Tensor] = {}
    total, done = sum(len(p) for _, p in groups), 0
    with frozen(model):
        for m, prepared in groups:
            for start in range(0, len(prepared), batch):
                part = prepared[start : start + batch]
                dials: dict[int, Tensor] = {}
                with attach(model, dialled(m, dials), trial=False):
                    value = lose(model, part)
                known = {at: d for at, d in dials.items() if d.requires_grad}
                slopes = torch.autograd.grad(value, list(known.values()), allow_unused=True)
                for at, slope in zip(known, slopes, strict=True):
                    if slope is not None:
                        found[at] = found.get(at, 0.0) - slope.detach() * len(part) / total
                done += len(part)
                if progress is not None:
                    progress(done, total)
    if not found:
        raise NotSupported(f"{type(groups[0][0]).__name__} has no effect that can be told head by head")
    layers, width = len(attention_layers(model)), max(len(x) for x in found.values())
    made = torch.full((layers, width), float("nan"))
    for at, values in found.items():
        made[at, : len(values)] = values.cpu()
    return made


def dialled(m: Mechanism, dials: dict[int, Tensor]) -> Mechanism:
    """The mechanism with a dial for each head."""
    if isinstance(m, Edit):
        return DialledEdit(m, dials)
    if isinstance(m, HeadEdit):
        return DialledHeads(m, dials)
    raise NotSupported(f"{type(m).__name__} does not act in heads, so no head responds to it")
