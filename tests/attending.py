"""A small module around any rule, its input, and its queries, keys and values, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.nn import Attention

WIDTH, HEADS, KV_HEADS, LENGTH = 16, 4, 2, 9


def module(rule: object, **options: object) -> Attention:
    torch.manual_seed(0)
    made = Attention(WIDTH, HEADS, KV_HEADS, rule, **options).double().eval()
    for parameter in made.rule.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return made


def texts() -> Tensor:
    return torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def projected(attention: Attention, x: Tensor) -> list[Tensor]:
    """q, k and v, [batch, heads, length, dim], key-value heads repeated."""
    found = [attention.heads_of(p(x)) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
    return [t.repeat_interleave(HEADS // t.shape[1], 1) for t in found]
