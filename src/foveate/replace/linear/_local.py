r"""A depthwise convolution of the values over time: y_t = \sum_i w_i v_{t - r + i}, each channel by itself.

In causal order r is the width - 1, so that no token takes from a later one; otherwise the window is centred.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.mixer import Tokens

__all__ = ["Local"]


class Local(nn.Module):
    """The weights of a convolution over time, begun as torch begins those of its own.

    Args:
        channels: Numbers of weights and biases for the heads and for the channels of a head, 1 where all share them.
        width: Tokens under the window, an odd number.
        bias: Whether something constant is added.
    """

    bias: nn.Parameter | None

    def __init__(self, channels: tuple[int, int], width: int, bias: bool = True) -> None:
        super().__init__()
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(*channels, width).uniform_(-bound, bound))
        self.register_parameter("bias", nn.Parameter(torch.empty(*channels).uniform_(-bound, bound)) if bias else None)

    def forward(
        self,
        v: Float[Tensor, "batch heads time value_dim"],
        tokens: Tokens,
        before: Float[Tensor, "batch heads kept value_dim"] | None = None,
    ) -> Float[Tensor, "batch heads time value_dim"]:
        """The output for each token; values are 0 at padding and, but for those `before`, outside of the text."""
        length, width = v.shape[2], self.weight.shape[2]
        reach = width - 1 if tokens.causal else width // 2
        left = v.new_zeros(*v.shape[:2], reach, v.shape[3]) if before is None else before.to(v)
        wide = torch.cat([left, v, v.new_zeros(*v.shape[:2], width - 1 - reach, v.shape[3])], 2)
        number = None
        if tokens.opens is not None:
            number = nn.functional.pad(tokens.opens.cumsum(1), (reach, width - 1 - reach))
        y = torch.zeros_like(v) if self.bias is None else self.bias.to(v)[:, None].expand_as(v)
        for i in range(width):
            near = wide[:, :, i : i + length]
            if number is not None:
                same = number[:, i : i + length] == number[:, reach : reach + length]
                near = near.where(same[:, None, :, None], 0.0)
            y = y + self.weight[:, None, :, i].to(v) * near
        return y

    def kept(
        self,
        v: Float[Tensor, "batch heads time value_dim"],
        tokens: Tokens,
        before: Float[Tensor, "batch heads kept value_dim"] | None,
    ) -> Float[Tensor, "batch heads kept value_dim"]:
        """What later calls read of the values so far: the last ones of the text that is open."""
        kept = self.weight.shape[2] - 1
        left = v.new_zeros(*v.shape[:2], kept, v.shape[3]) if before is None else before.to(v)
        number = torch.zeros_like(tokens.place) if tokens.opens is None else tokens.opens.cumsum(1)
        own = nn.functional.pad(number, (kept, 0)) == number[:, -1:]
        return torch.cat([left, v], 2).where(own[:, None, :, None], 0.0)[:, :, v.shape[2] :].clone()
