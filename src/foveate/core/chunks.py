r"""One block of tokens of a recurrence as matrix products, forward and backward.

The block is n chunks of C tokens. With G_i the sum of log decays from the first token of a chunk to token i, S the
state before the chunk and u = v for additive writes,

    A_ij = \sum_c q_ic k_jc exp(G_ic - G_jc)              j <= i in the chunk
    out  = (q exp G) S + A u
    S'   = exp(G_C) S + (k exp(G_C - G))^T u

and for delta writes of strength b

    M_ij = b_i \sum_c k_ic k_jc exp(G_ic - G_jc)          j < i
    u    = (1 + M)^{-1} (b v - b (k exp G) S)

Every exponent is of a sum of logs of decays, so it is never above 0: nothing overflows, and what vanishes should.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Block", "Grads", "decayed_scores"]

# below this width, pairs of tokens are cheaper one by one than as matrix products
LEAF = 4
# a decay of 0 in logs: its exponential is 0 in float64 too
ZERO = -1000.0


class Grads(NamedTuple):
    """Gradients of one block."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    beta: Tensor | None
    state: Tensor


@dataclass(eq=False)
class Block:
    """Chunks of one stretch of tokens; heads and batch are one axis.

    Args:
        q: Queries; the groups of a key-value head stand beside each other.
        k: Keys.
        v: Values.
        decay: Logs of the decays, one per head or one per channel of the keys; None: 1.
        beta: Strengths of delta writes; None: writes are additive.
    """

    q: Float[Tensor, "heads chunks size groups key"]
    k: Float[Tensor, "heads chunks size key"]
    v: Float[Tensor, "heads chunks size value"]
    decay: Float[Tensor, "#heads #chunks size #key"] | None = None
    beta: Float[Tensor, "heads chunks size 1"] | None = None
    sums: Tensor | None = field(init=False, default=None)
    order: Tensor = field(init=False)

    def __post_init__(self) -> None:
        size = self.k.shape[2]
        self.order = torch.ones(size, size, dtype=torch.bool, device=self.k.device).tril_()
        if self.decay is not None:
            logs = self.decay
            if bool((logs < ZERO / 2).any()):
                # differences across a decay of 0 keep their digits
                logs = logs.clamp_min(ZERO).double()
            self.sums = logs.cumsum(2)

    # ---------------------------------------------------------------- decays

    def grown(self, later: Tensor, earlier: Tensor) -> Tensor:
        """What is left at a later token of what stood at an earlier one."""
        return (later - earlier).to(self.k.dtype).exp_()

    @property
    def since(self) -> Tensor | None:
        """What is left of the state before the chunk, per token: exp G."""
        return None if self.sums is None else self.sums.to(self.k.dtype).exp()

    @property
    def until(self) -> Tensor | None:
        """What is left of each token at the end of the chunk: exp(G_C - G)."""
        return None if self.sums is None else self.grown(self.sums[:, :, -1:], self.sums)

    @property
    def whole(self) -> Tensor | None:
        """What a chunk leaves of a state, exp G_C: [heads, chunks, 1 | key, 1]."""
        return None if self.sums is None else self.sums[:, :, -1, :, None].to(self.k.dtype).exp()

    @property
    def pairs(self) -> Tensor | None:
        """Decays from token j to i, exp(G_i - G_j), 0 for j > i, where they are one per head, or None."""
        if self.sums is None or self.sums.shape[3] > 1:
            return None
        logs = self.sums - self.sums.transpose(2, 3)
        return logs.to(self.k.dtype).masked_fill_(~self.order, -torch.inf).exp_()

    # ---------------------------------------------------------------- forward

    def scores(self, x: Tensor, pairs: Tensor | None) -> Tensor:
        """A, [heads, chunks, size * groups, size], for queries [heads, chunks, size, groups, key]."""
        heads, chunks, size, groups, _ = x.shape
        if self.sums is not None and pairs is None:
            return decayed_scores(x, self.k, self.sums)
        out = x.flatten(2, 3) @ self.k.transpose(2, 3)
        factor = self.order if pairs is None else pairs
        out.view(heads, chunks, size, groups, size).mul_(factor[..., None, :])
        return out

    def states(self, first: Tensor, added: Tensor) -> Tensor:
        """The states before each chunk and behind the last one, [heads, chunks + 1, key, value]."""
        heads, chunks = added.shape[:2]
        out = added.new_empty(heads, chunks + 1, *added.shape[2:])
        out[:, 0] = first
        whole = self.whole
        if whole is None:
            torch.cumsum(added, 1, out=out[:, 1:])
            out[:, 1:] += first[:, None]
            return out
        whole = whole.expand(-1, chunks, -1, -1)
        for n in range(chunks):
            torch.addcmul(added[:, n], out[:, n], whole[:, n], out=out[:, n + 1])
        return out

    def solved(self, pairs: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What delta writes need: M without the strengths, and (1 + M)^{-1} of b v and of b (k exp G)."""
        assert self.beta is not None
        met = self.scores(self.k[:, :, :, None], pairs).tril_(-1)
        since = self.since
        read = self.k if since is None else self.k * since
        right = torch.cat([self.v, read], -1) * self.beta
        both = torch.linalg.solve_triangular(met * self.beta, right, upper=False, unitriangular=True)
        return met, both[..., : self.v.shape[3]], both[..., self.v.shape[3] :]

    def written(self, first: Tensor, pairs: Tensor | None) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """u, the states, and for delta writes what `solved` gave."""
        until = self.until
        out_keys = self.k if until is None else self.k * until
        if self.beta is None:
            return self.v, self.states(first, out_keys.transpose(2, 3) @ self.v), (out_keys,)
        met, fresh, read = self.solved(pairs)
        heads, chunks = self.k.shape[:2]
        u, states = torch.empty_like(fresh), fresh.new_empty(heads, chunks + 1, *first.shape[1:])
        states[:, 0] = first
        whole = self.whole
        whole = None if whole is None else whole.expand(-1, chunks, -1, -1)
        for n in range(chunks):
            u[:, n] = torch.baddbmm(fresh[:, n], read[:, n], states[:, n], alpha=-1)
            kept = states[:, n] if whole is None else states[:, n] * whole[:, n]
            torch.baddbmm(kept, out_keys[:, n].transpose(1, 2), u[:, n], out=states[:, n + 1])
        return u, states, (out_keys, met, fresh, read)

    def forward(self, first: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs, [heads, chunks, size, groups, value], and the state behind the block."""
        pairs = self.pairs
        u, states, _ = self.written(first, pairs)
        since = self.since
        q = self.q if since is None else self.q * since[..., None, :]
        out = self.scores(self.q, pairs) @ u
        heads, chunks, size, groups, _ = q.shape
        flat = out.view(heads * chunks, size * groups, -1)
        flat.baddbmm_(q.reshape(heads * chunks, size * groups, -1), states[:, :-1].reshape(-1, *first.shape[1:]))
        # a copy: a slice would keep the states of all chunks in memory
        return out.view(heads, chunks, size, groups, -1), states[:, -1].clone()

    # ---------------------------------------------------------------- backward

    def score_grads(self, d: Tensor, x: Tensor, pairs: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gradients of `scores` for x and k from those of A, whose upper part is not read."""
        heads, chunks, size, groups, _ = x.shape
        if self.sums is not None and pairs is None:
            return decayed_score_grads(d, x, self.k, self.sums)
        factor = self.order if pairs is None else pairs
        d = (d.view(heads, chunks, size, groups, size) * factor[..., None, :]).view_as(d)
        return (d @ self.k).view_as(x), d.transpose(2, 3) @ x.flatten(2, 3)

    def backward(self, first: Tensor, d_out: Tensor, d_last: Tensor) -> Grads:
        """Gradients of what `forward(first)` was made from; everything between is computed again."""
        heads, chunks, size, groups, _ = self.q.shape
        pairs, since, until, whole = self.pairs, self.since, self.until, self.whole
        u, states, (out_keys, *solved) = self.written(first, pairs)
        d_out = d_out.reshape(heads, chunks, size * groups, -1)
        flat_q = (self.q if since is None else self.q * since[..., None, :]).flatten(2, 3)

        # within chunks
        a = self.scores(self.q, pairs)
        d_u = a.transpose(2, 3) @ d_out
        d_q, d_k = self.score_grads(d_out @ u.transpose(2, 3), self.q, pairs)

        # from chunk to chunk, from the last to the first
        d_states = states.new_empty(states.shape)
        d_states[:, -1] = d_last
        added = flat_q.transpose(2, 3) @ d_out
        whole = None if whole is None else whole.expand(-1, chunks, -1, -1)
        if self.beta is None and whole is None:
            d_states[:, :-1] = added.flip(1).cumsum(1).flip(1) + d_last[:, None]
        for n in reversed(range(chunks)) if self.beta is not None or whole is not None else ():
            if self.beta is not None:
                d_u[:, n] += out_keys[:, n] @ d_states[:, n + 1]
                added[:, n] -= solved[2][:, n].transpose(1, 2) @ d_u[:, n]
            if whole is None:
                torch.add(added[:, n], d_states[:, n + 1], out=d_states[:, n])
            else:
                torch.addcmul(added[:, n], d_states[:, n + 1], whole[:, n], out=d_states[:, n])
        after = d_states[:, 1:]
        if self.beta is None:
            d_u = d_u + out_keys @ after
        inter = d_out @ states[:, :-1].transpose(2, 3)
        inter = inter.view_as(self.q)
        d_q += inter if since is None else inter * since[..., None, :]
        d_kept = u @ after.transpose(2, 3)
        d_k += d_kept if until is None else d_kept * until

        # readers of the decays, less their writers
        d_sums = None if self.sums is None else (self.q * d_q).sum(3) - self.k * d_k
        d_beta, d_v = None, d_u
        if self.beta is not None:
            met, fresh, read = solved
            d_right, d_met, d_beta = self.solve_grads(met, fresh, read, u, d_u, states)
            d_v = d_right[..., : self.v.shape[3]]
            d_read = d_right[..., self.v.shape[3] :]
            as_query, as_key = self.score_grads(d_met, self.k[:, :, :, None], pairs)
            as_query = as_query[:, :, :, 0] + (d_read if since is None else d_read * since)
            d_k = d_k + as_query + as_key
            if d_sums is not None:
                d_sums += self.k * (as_query - as_key)
        d_decay = None
        if d_sums is not None:
            ends = (states[:, 1:] * after).sum(-1)[:, :, None]
            d_decay = d_sums.flip(2).cumsum(2).flip(2) + ends
        return Grads(d_q, d_k, d_v, d_decay, d_beta, d_states[:, 0])

    def solve_grads(
        self, met: Tensor, fresh: Tensor, read: Tensor, u: Tensor, d_u: Tensor, states: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of v and k exp G as they go into the solve, of M without strengths, and of the strengths."""
        assert self.beta is not None
        d_both = torch.cat([d_u, -(d_u @ states[:, :-1].transpose(2, 3))], -1)
        upper = (met * self.beta).transpose(2, 3)
        d_right = torch.linalg.solve_triangular(upper, d_both, upper=True, unitriangular=True)
        d_met = -(d_right @ torch.cat([fresh, read], -1).transpose(2, 3)).tril_(-1)
        since = self.since
        keys = self.k if since is None else self.k * since
        d_beta = (d_right * torch.cat([self.v, keys], -1)).sum(-1, keepdim=True)
        d_beta += (d_met * met).sum(-1, keepdim=True)
        return d_right * self.beta, d_met * self.beta, d_beta


# ---------------------------------------------------------------- one decay per channel


def halves(size: int) -> list[int]:
    """Widths of the halves into which a chunk is split again and again."""
    widths = []
    while size > LEAF:
        size //= 2
        widths.append(size)
    return widths


def parted(x: Tensor, width: int) -> Tensor:
    """Tokens as pairs of halves: [heads, chunks * pairs, 2, width, …]."""
    return x.reshape(x.shape[0], -1, 2, width, *x.shape[3:])


def factors(sums: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """For each pair of halves, what is left at a token of the second of what ended the first, and of the first then."""
    logs = parted(sums, width)
    border = logs[:, :, 0, -1:]
    return (logs[:, :, 1] - border).to(dtype).exp_(), (border - logs[:, :, 0]).to(dtype).exp_()


def blocks_of(x: Tensor, width: int, groups: int) -> Tensor:
    """The part of scores, as a view, where queries of second halves meet keys of the first ones.

    [heads, chunks, size * groups, size] gives [heads, chunks, width * groups, width, pairs].
    """
    heads, chunks, _, size = x.shape
    pairs = size // (2 * width)
    return x.view(heads, chunks, pairs, 2, width * groups, pairs, 2, width)[:, :, :, 1, :, :, 0].diagonal(0, 2, 4)


def leaves_of(x: Tensor, width: int, groups: int) -> Tensor:
    """The part of scores within leaves, as a view: [heads, chunks, width, groups, width, leaves]."""
    heads, chunks, _, size = x.shape
    parts = size // width
    return x.view(heads, chunks, parts, width, groups, parts, width).diagonal(0, 2, 5)


def leaf_factors(sums: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """exp(G_i - G_j) within leaves, 0 for later j: [heads, chunks, leaves, i, j, key]."""
    heads, chunks, size, dim = sums.shape
    logs = sums.view(heads, chunks, size // width, width, dim)
    order = torch.ones(width, width, dtype=torch.bool, device=sums.device).tril_()[..., None]
    return (logs[..., :, None, :] - logs[..., None, :, :]).to(dtype).masked_fill_(~order, -torch.inf).exp_()


def decayed_scores(
    q: Float[Tensor, "heads chunks size groups key"],
    k: Float[Tensor, "heads chunks size key"],
    sums: Float[Tensor, "#heads #chunks size key"],
) -> Float[Tensor, "heads chunks rows size"]:
    r"""A_ij = \sum_c q_ic k_jc exp(G_ic - G_jc) for j <= i, else 0, where every channel has its own decay.

    A chunk is halved again and again; between two halves both sides are related to the border, so that the sum is a
    matrix product and no exponent is above 0.
    """
    heads, chunks, size, groups, dim = q.shape
    sums = sums.expand(heads, chunks, -1, -1)
    out = q.new_zeros(heads, chunks, size * groups, size)
    for width in halves(size):
        later, earlier = factors(sums, width, q.dtype)
        left = (parted(q, width)[:, :, 1] * later[:, :, :, None]).flatten(2, 3)
        right = parted(k, width)[:, :, 0] * earlier
        met = (left @ right.transpose(2, 3)).view(heads, chunks, -1, width * groups, width)
        blocks_of(out, width, groups).copy_(met.permute(0, 1, 3, 4, 2))
    width = min(size, LEAF)
    qs = q.view(heads, chunks, -1, width, groups, dim)
    ks = k.view(heads, chunks, -1, width, dim)
    weighted = leaf_factors(sums, width, q.dtype) * ks[:, :, :, None]
    met = qs @ weighted.transpose(4, 5)
    leaves_of(out, width, groups).copy_(met.permute(0, 1, 3, 4, 5, 2))
    return out


def decayed_score_grads(d: Tensor, q: Tensor, k: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `decayed_scores` for q and k; d above the diagonal is not read."""
    heads, chunks, size, groups, dim = q.shape
    sums = sums.expand(heads, chunks, -1, -1)
    width = min(size, LEAF)
    qs = q.view(heads, chunks, -1, width, groups, dim)
    ks = k.view(heads, chunks, -1, width, dim)
    factor = leaf_factors(sums, width, q.dtype)
    # [heads, chunks, leaves, i, groups, j]
    met = leaves_of(d, width, groups).permute(0, 1, 5, 2, 3, 4)
    d_q = (met @ (factor * ks[:, :, :, None])).reshape(q.shape)
    d_k = ((met.transpose(4, 5) @ qs) * factor).sum(3).reshape(k.shape)
    for width in halves(size):
        later, earlier = factors(sums, width, q.dtype)
        met = blocks_of(d, width, groups).permute(0, 1, 4, 2, 3).reshape(heads, -1, width * groups, width)
        left = (parted(q, width)[:, :, 1] * later[:, :, :, None]).flatten(2, 3)
        right = parted(k, width)[:, :, 0] * earlier
        parted(d_q, width)[:, :, 1] += (met @ right).view(*later.shape[:3], groups, dim) * later[:, :, :, None]
        parted(d_k, width)[:, :, 0] += (met.transpose(2, 3) @ left) * earlier
    return d_q, d_k
