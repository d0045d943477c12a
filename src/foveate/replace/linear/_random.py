"""Random features whose products are exp(q . k) on average, positive and orthogonal."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.states import exact

__all__ = ["Draw", "orthogonal"]

# features of keys stay below its exponential, of which float32 can sum very many
HIGHEST = 60.0


def orthogonal(rows: int, dim: int, seed: int) -> Float[Tensor, "rows dim"]:
    """Random directions, in blocks of `dim` that stand at right angles, as long as independent normal vectors are."""
    rng = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(0, rows, dim):
        q, r = torch.linalg.qr(torch.randn(dim, dim, generator=rng, dtype=torch.float64))
        # without the signs, not all rotations would be equally likely
        blocks.append(q * r.diagonal().sign())
    lengths = torch.randn(rows, dim, generator=rng, dtype=torch.float64).norm(dim=1, keepdim=True)
    return (torch.cat(blocks)[:rows] * lengths).float()


class Draw(nn.Module):
    r"""The directions w_r of one layer, the same for all heads, and their features.

    phi_r(x) = exp(w_r . x' - |x'|^2 / 2) with x' = x sqrt(scale); the mean of phi_r(q) phi_r(k) over draws is
    exp(scale q . k).

    Args:
        omega: The directions; kept in the state dict, and not trained.
    """

    omega: Tensor

    def __init__(self, omega: Float[Tensor, "features dim"]) -> None:
        super().__init__()
        self.register_buffer("omega", omega)

    def logs(
        self, x: Float[Tensor, "batch heads time dim"], scale: float, less: float = 0.0
    ) -> Float[Tensor, "batch heads time features"]:
        """Logs of the features, `less` taken off."""
        x = x.to(exact(x)) * scale**0.5
        # in the product, for features are many times as wide as what they are made of
        off = -x.square().sum(-1, keepdim=True) / 2 - less
        omega = self.omega.to(x)
        return torch.cat([x, off], -1) @ torch.cat([omega, torch.ones_like(omega[:, :1])], 1).T

    def queries(
        self, x: Float[Tensor, "batch heads time dim"], scale: float
    ) -> tuple[Float[Tensor, "batch heads time features"], Float[Tensor, "batch heads time 1"]]:
        """Features of queries with a factor of each taken out, which cancels where weights are divided; and its log."""
        logs = self.logs(x, scale)
        most = logs.detach().amax(-1, keepdim=True)
        return logs.sub_(most).exp_(), most

    def keys(
        self, x: Float[Tensor, "batch heads time dim"], scale: float
    ) -> Float[Tensor, "batch heads time features"]:
        """Features of keys, lowered by exp(shift), which is the same for all."""
        return self.logs(x, scale, self.shift).exp_()

    @property
    def shift(self) -> float:
        """What is taken off the logs of all keys: no log is above max |w|^2 / 2, whatever keys are still to come."""
        return max(0.0, float(self.omega.double().square().sum(1).max()) / 2 - HIGHEST)
