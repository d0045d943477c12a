r"""Softmax and GELU as a fixed-point circuit computes them in one pass, to see what their errors do to a model.

Both follow the code published with "Edge-MoE: Memory-Efficient Multi-Task Vision Transformer Architecture with
Task-level Sparsity via Mixture-of-Experts" (2023), whose numbers have 32 bits: 10 before the point, the sign among
them, and 22 after it. Bits behind those are cut off, as the default of its number type does.

Forward only: what is cut to a grid has no useful derivative, so none is passed on.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import BadInput

__all__ = ["gelu", "gelu_table", "single_pass_softmax"]

# float64 holds the product of two numbers below 1 of so many bits
MOST_BITS = 26


@torch.no_grad()
def single_pass_softmax(
    x: Float[Tensor, "*rows key"], fraction: int | None = 22, whole: int = 10
) -> Float[Tensor, "*rows key"]:
    r"""Softmax whose bias and sum come from one pass over the row.

        x_j > b:    l' = e^{b - x_j} l + 1,    b' = x_j
        else:       l' = l + e^{x_j - b},      b' = b
        weight_j = e^{x_j - b} (1 / l)

    The bias b is the largest number so far, so but for the cut bits this is the softmax itself; the reciprocal is taken
    once a row. Every exponential, product and reciprocal is cut to `fraction` bits.

    Largest absolute error of a weight, measured by the claim `edge_approximations` on rows of up to 256 keys: 3.2e-5 on
    SmolLM2's own scores, 2.7e-5 on random ones. The sum loses up to a bit a key, so long rows with one heavy key are
    off most.

    Args:
        x: Scores; minus infinity where a row may not look.
        fraction: Bits after the point; None: nothing is cut.
        whole: Bits before the point, with the sign.

    Returns:
        Weights in the dtype of `x`; zeros for a row that may look nowhere.

    Raises:
        BadInput: scores, or a sum over so many keys, that such numbers cannot hold.

    Differs from the paper: the exponential and the reciprocal are exact before they are cut, those of its library are
    not known to be; what would wrap around is refused, and exponents below the format give 0; masks are ours.

    Example:
        >>> import torch
        >>> from foveate.core.approximate import single_pass_softmax
        >>> x = torch.tensor([1.0, 3.0, 2.0])
        >>> (single_pass_softmax(x) - x.softmax(-1)).abs().max() < 1e-6
        tensor(True)
        >>> single_pass_softmax(x, fraction=4)
        tensor([0.0625, 0.6875, 0.1875])
    """
    hidden = x == -torch.inf
    row = cut(x.double(), checked(fraction))
    if fraction is not None:
        fits(row.masked_fill(hidden, 0.0), whole)
    bias = torch.full(row.shape[:-1], -torch.inf, dtype=row.dtype, device=row.device)
    total = torch.zeros_like(bias)
    for s, off in zip(row.unbind(-1), hidden.unbind(-1), strict=True):
        e = cut(torch.exp(-(bias - s).abs()), fraction)
        now = torch.where(s > bias, cut(total * e, fraction) + 1, total + e)
        total, bias = torch.where(off, total, now), torch.where(off, bias, torch.maximum(bias, s))
    share = cut(1 / total, fraction)[..., None]
    weights = cut(cut(torch.exp(row - bias[..., None]), fraction) * share, fraction)
    return weights.masked_fill(hidden, 0.0).to(x.dtype)


@torch.no_grad()
def gelu(
    x: Float[Tensor, "*shape"], step: float = 2**-5, size: int | None = None, fraction: int | None = 22
) -> Float[Tensor, "*shape"]:
    r"""GELU as ReLU minus a small even function, which is read from a table and interpolated.

        delta(x) = ReLU(x) - GELU(x) = |x| \Phi(-|x|),    i = floor(|x| / step),    t = |x| / step - i
        gelu(x) = ReLU(x) - (delta_i + t (delta_{i+1} - delta_i)),    ReLU(x) behind the end of the table

    Linear interpolation is off by at most step^2 max|delta''| / 8, and |delta''| is largest at 0: 2 / sqrt(2 \pi).
    That is 9.74e-5 at the step of 1/32. Largest absolute error on [-8, 8], measured by the claim `edge_approximations`:
    9.77e-5; the usual formula with tanh is off by 4.74e-4.

    Args:
        x: Any numbers.
        step: Distance of the entries.
        size: Entries of the table; None: up to the first that is 0 (177 of them in the paper's format, so to 5.5).
        fraction: Bits after the point; None: nothing is cut.

    Returns:
        The same shape and dtype.

    Raises:
        BadInput: a step, size or number of bits that makes no table.

    Differs from the paper: nothing known within its numbers; those beyond them, which wrap around there, are kept.

    Example:
        >>> import torch
        >>> from foveate.core.approximate import gelu
        >>> x = torch.linspace(-8, 8, 4097)
        >>> exact = torch.nn.functional.gelu(x)
        >>> for step in (1 / 32, 1 / 2):
        ...     print(f"{(gelu(x, step) - exact).abs().max():.1e}")
        9.7e-05
        2.3e-02
    """
    table = torch.tensor(gelu_table(step, size, fraction), dtype=torch.float64, device=x.device)
    wide = cut(x.double(), fraction)
    relu, place = wide.relu(), wide.abs() / step
    # behind the end, delta is that of 0: nothing
    place = torch.where(place < len(table) - 1, place, 0.0)
    index = place.long()
    a, b = table[index], table[index + 1]
    delta = cut(a + (place - index) * (b - a), fraction)
    return (relu - delta).to(x.dtype)


@cache
def gelu_table(step: float = 2**-5, size: int | None = None, fraction: int | None = 22) -> tuple[float, ...]:
    """The table of `gelu`: delta at 0, step, 2 step, ..., rounded to `fraction` bits.

    Args:
        step: Distance of the entries.
        size: How many; None: up to the first behind 0 that is 0.
        fraction: Bits after the point; None: nothing is rounded.

    Raises:
        BadInput: a step, size or number of bits that makes no table.
    """
    checked(fraction)
    if not 0 < step <= 4 or (size is not None and size < 2):
        raise BadInput(f"a GELU table of step {step} and {size} entries; it takes a step in (0, 4] and 2 or more")
    found = [0.0]
    while len(found) != size and (size or len(found) == 1 or found[-1] > 0):
        x = len(found) * step
        delta = x * math.erfc(x / math.sqrt(2)) / 2
        found.append(delta if fraction is None else round(delta * 2**fraction) / 2**fraction)
    return tuple(found)


def cut(x: Float[Tensor, "*shape"], fraction: int | None) -> Float[Tensor, "*shape"]:
    """Without the bits behind `fraction`, towards minus infinity."""
    return x if fraction is None else torch.floor(x * 2**fraction) / 2**fraction


def checked(fraction: int | None) -> int | None:
    """The number of bits after the point, if float64 can stand for them."""
    if fraction is not None and not 1 <= fraction <= MOST_BITS:
        raise BadInput(f"{fraction} bits after the point; it may be 1 to {MOST_BITS}, or None for no cut at all")
    return fraction


def fits(row: Float[Tensor, "*rows key"], whole: int) -> None:
    """Raises `BadInput` where numbers, or sums of as many weights, need more bits before the point."""
    room, keys = 2 ** (whole - 1), row.shape[-1]
    if keys >= room:
        raise BadInput(
            f"the weights of {keys} keys may add up to more than {whole} bits before the point hold, which is less "
            f"than {room}; pass whole={keys.bit_length() + 1}"
        )
    if row.numel() and (largest := float(row.abs().max())) >= room:
        raise BadInput(
            f"a score of size {largest:g} is too large for {whole} bits before the point, which hold less than {room}; "
            f"pass whole={int(largest).bit_length() + 1}"
        )
