"""The row engine's way through the package's own CPU kernel: all streamed reductions in one pass (`core/native.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.core import native
from foveate.core.reductions import ColumnMass, Distance, KeyBins, Match, OnKeys, Reduction, RowEntropy, Within, labels

if TYPE_CHECKING:
    from foveate.core.rows import View

__all__ = ["given", "refuses", "rows"]

KNOWN = (RowEntropy, Distance, Within, Match, OnKeys, KeyBins, ColumnMass)


def refuses(view: View, reductions: Sequence[Reduction]) -> str:
    """Why the kernel cannot stand for this call, or ""."""
    for r in reductions:
        if not isinstance(r, KNOWN):
            return f"{r} is not in the kernel"
    if not native.available():
        return "the kernel was not built (no C++ compiler at installation)"
    if view.q.device.type != "cpu":
        return f"the kernel runs on the CPU, the model is on {view.q.device.type}"
    if max(view.q.shape[-1], view.v.shape[-1]) > 256:
        return "heads wider than 256"
    if view.bias is not None or view.mask.dense is not None:
        return "an additive bias, or a mask that is no interval of keys"
    if view.dropout:
        return "dropout acts on single weights"
    if view.needs_grad:
        return "gradients go through the row blocks"
    return ""


def given(view: View) -> dict[str, Any]:
    """What the kernel is told of a call, but for which keys each row sees, and learned sinks."""
    mask, tilt = view.mask, view.tilt
    return {
        "scale": view.scale,
        "query_position": mask.position.to(torch.int32)[None].contiguous(),
        "key_position": torch.arange(mask.keys, dtype=torch.int32)[None],
        "softcap": view.softcap,
        "tilt": None if tilt is None else tilt.bias,
        "tilted": None if tilt is None else tilt.rows,
    }


def rows(view: View, reductions: Sequence[Reduction]) -> tuple[Tensor, dict[Reduction, Tensor]]:
    """Head outputs, and all reductions, in one pass."""
    mask = view.mask
    widths = [r for r in reductions if isinstance(r, Within)]
    links = [r for r in reductions if isinstance(r, Match)]
    sets = {r: r.columns(view) for r in reductions if isinstance(r, OnKeys | KeyBins)}
    kinds = {type(r): r for r in reductions}
    call = partial(
        native.attend,
        view.q,
        view.k,
        view.v,
        hi=mask.high.contiguous(),
        sinks=view.sinks,
        **given(view),
    )
    # what padded queries look at is no part of anybody's text: the columns must not hold it
    real = mask.valid if ColumnMass in kinds and mask.valid is not None and not bool(mask.valid.all()) else None
    result = call(
        lo=mask.low.contiguous() if real is None else torch.where(real, mask.low, mask.high),
        want_entropy=RowEntropy in kinds,
        want_distance=Distance in kinds,
        within=tuple(r.width for r in widths),
        match=tuple((a.to(torch.int32), b.to(torch.int32)) for a, b in (labels(view, r.link) for r in links)),
        extra=side_by_side(list(sets.values())),
        want_column=ColumnMass in kinds,
    )
    found: dict[Reduction, Tensor] = {}
    if RowEntropy in kinds:
        found[kinds[RowEntropy]] = result.entropy
    if Distance in kinds:
        found[kinds[Distance]] = result.distance
    if ColumnMass in kinds:
        found[kinds[ColumnMass]] = result.column
    found |= {r: result.within[n] for n, r in enumerate(widths)}
    found |= {r: result.match[n] for n, r in enumerate(links)}
    at = 0
    for s, x in sets.items():
        found[s] = result.extra[..., at : at + x.shape[-1]]
        at += x.shape[-1]
    out = result.out
    if real is not None:
        theirs = call(lo=torch.where(real, mask.high, mask.low)).out
        out = torch.where(real[:, None, :, None], out, theirs)
    return out, found


def side_by_side(columns: list[Tensor]) -> Tensor | None:
    """All columns over the keys as one tensor; those that are the same for the whole batch are repeated."""
    if not columns:
        return None
    batch = max(len(x) for x in columns)
    return torch.cat([x.expand(batch, -1, -1) for x in columns], -1).contiguous()
