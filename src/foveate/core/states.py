r"""The states engine: attention by a state that is decayed, written to and read, in time linear in the length.

    S_t = a_t * S_{t-1} + k_t v_t^T                               additive writes
    S_t = a_t * S_{t-1} + k_t b_t (v_t - k_t^T (a_t * S_{t-1}))^T     delta writes of strength b
    o_t = q_t^T S_t,   or   q_t^T S_t / q_t^T z_t with z_t = a_t * z_{t-1} + k_t

where a_t is one number per head or one per channel of the keys. One `Scan` says what a call is, and has four forms:

    quadratic   the weights of every pair of tokens, [heads, N, N]; defines what is right (`weights`)
    chunked     matrix products in chunks and a state from chunk to chunk; differentiable, recomputed backward
    recurrent   token by token; constant memory, for decoding
    systems     (A, B, C, D) of a linear dynamical system per token, for analysis (`core/systems.py`)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveate.core.chunks import ZERO, Block
from foveate.core.errors import BadInput, NotSupported

__all__ = ["Form", "Scan", "chunk_for", "run", "weights"]

Form = Literal["auto", "quadratic", "chunked", "recurrent"]
SMALLEST, LARGEST = 16, 128
# numbers of one block's largest tensor: more leave the cache, fewer wait for the interpreter
BLOCK_NUMBERS = 1 << 19


@dataclass(frozen=True, eq=False)
class Scan:
    """One call of a recurrence.

    Args:
        q: Queries, features already made.
        k: Keys, features already made.
        v: Values.
        decay: Logs of the decays, at most 0; -inf forgets everything. One per head or per channel of the keys, constant
            or per token. None: nothing is forgotten.
        beta: Strengths of delta writes, 0 to 1 (to 2 with negative eigenvalues). None: additive writes.
        normalised: Whether outputs are divided by the sum of their weights; 0 where that is 0.
        real: Which tokens are no padding. None: all.
        opens: Which tokens open a text of their own, where several are packed. None: the first one.
        causal: Whether no token sees a later one.
        prefix: Tokens at the start of each text which all see each other, the first ones that are real.

    Raises:
        BadInput: shapes that do not fit each other.
        NotSupported: a form that these writes have not.
    """

    q: Float[Tensor, "batch heads query key"]
    k: Float[Tensor, "batch kv_heads time key"]
    v: Float[Tensor, "batch kv_heads time value"]
    decay: Float[Tensor, "#batch kv_heads #time #key"] | None = None
    beta: Float[Tensor, "batch kv_heads time"] | None = None
    normalised: bool = False
    real: Bool[Tensor, "batch time"] | None = None
    opens: Bool[Tensor, "batch time"] | None = None
    causal: bool = True
    prefix: Int[Tensor, " batch"] | None = None

    def __post_init__(self) -> None:
        q, k, v = self.q, self.k, self.v
        fits = q.shape[0] == k.shape[0] and k.shape[:3] == v.shape[:3] and q.shape[3] == k.shape[3]
        if not fits or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
            raise BadInput(
                f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit: batch and key width must "
                "be equal, k and v of one length, and the query heads a multiple of the key-value heads"
            )
        alone = self.causal or self.decay is not None or self.beta is not None or self.opens is not None
        if alone and q.shape[2] != k.shape[2]:
            raise BadInput(f"{q.shape[2]} queries and {k.shape[2]} keys: only a scan in which all see all may differ")
        if self.beta is not None and (self.normalised or not self.causal or self.prefix is not None):
            raise NotSupported("delta writes are causal and have no sum of weights to divide by")
        if self.prefix is not None and (self.decay is not None or not self.causal):
            raise NotSupported("a prefix whose tokens all see each other goes with causal order and without decays")

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """Sizes of the state: batch, key-value heads, width of a key, width of a value and of its normaliser."""
        batch, heads, _, dim = self.k.shape
        return batch, heads, dim, self.v.shape[3] + self.normalised

    def empty(self) -> Float[Tensor, "batch kv_heads key written"]:
        """The state before the first token."""
        return torch.zeros(self.state_shape, dtype=exact(self.q), device=self.q.device)


def exact(x: Tensor) -> torch.dtype:
    """The precision in which states are kept: half precisions would forget small writes."""
    return torch.promote_types(x.dtype, torch.float32)


def run(
    scan: Scan, state: Float[Tensor, "batch kv_heads key written"] | None = None, form: Form = "auto", chunk: int = 0
) -> tuple[Float[Tensor, "batch heads query value"], Float[Tensor, "batch kv_heads key written"]]:
    """The outputs of a scan, in the dtype of its queries, and the state behind its last token.

    Args:
        scan: What is computed.
        state: The state that earlier tokens left; None: there were none.
        form: Which way to the numbers; "auto" steps through a few tokens and takes chunks for more.
        chunk: Tokens per chunk, a power of two; 0 chooses one.

    Raises:
        BadInput: a state of another shape.
    """
    if state is None:
        state = scan.empty()
    elif tuple(state.shape) != scan.state_shape:
        raise BadInput(
            f"a state of {tuple(state.shape)} for a scan that keeps {scan.state_shape}: it is from another layer, or "
            "was made with other settings; start with an empty one"
        )
    if not scan.causal:
        out, state = full(scan, state, chunk)
    else:
        ready, state = prepared(scan, state)
        few = scan.q.shape[2] <= 2
        way = form if form != "auto" else "recurrent" if few and not torch.is_grad_enabled() else "chunked"
        out, state = {"quadratic": quadratic, "chunked": chunked, "recurrent": recurrent}[way](ready, state, chunk)
    return divided(out, scan.normalised).to(scan.q.dtype), state


def divided(out: Tensor, normalised: bool) -> Tensor:
    """Outputs by the sum of their weights, which is their last number."""
    if not normalised:
        return out
    total = out[..., -1:]
    return torch.where(total == 0, 0.0, out[..., :-1] / torch.where(total == 0, 1.0, total))


def prepared(scan: Scan, state: Tensor) -> tuple[Scan, Tensor]:
    """A causal scan over real tokens alone and without prefix, and the state that it begins with.

    Padding writes nothing and lets nothing decay; where a text opens, all before it decays to nothing; the sums of the
    weights are one more number per value; a prefix is written before the first token reads.
    """
    dtype = exact(scan.q)
    q, k, v = (t.to(dtype) for t in (scan.q, scan.k, scan.v))
    decay = None if scan.decay is None else scan.decay.to(dtype)
    beta = None if scan.beta is None else scan.beta.to(dtype)
    if decay is not None and bool((decay > 0).any()):
        raise BadInput(f"a decay of {float(decay.exp().max()):.4g} lets the state grow; give logs of at most 0")
    if scan.normalised:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    if scan.real is not None and not bool(scan.real.all()):
        gap = ~scan.real[:, None, :, None]
        k, v = k.masked_fill(gap, 0.0), v.masked_fill(gap, 0.0)
        q = q.masked_fill(gap, 0.0)
        decay = None if decay is None else torch.where(gap, 0.0, decay)
        beta = None if beta is None else beta.masked_fill(gap[..., 0], 0.0)
    if scan.opens is not None and bool(scan.opens.any()):
        decay = torch.zeros_like(k[..., :1]) if decay is None else decay
        decay = torch.where(scan.opens[:, None, :, None], -torch.inf, decay)
    if scan.prefix is not None:
        real = torch.ones_like(k[:, 0, :, 0], dtype=torch.bool) if scan.real is None else scan.real
        early = ((real.cumsum(1) <= scan.prefix[:, None]) & real)[:, None, :, None]
        state = state + (k * early).transpose(2, 3) @ v
        k = k * ~early
    return replace(
        scan, q=q, k=k, v=v, decay=decay, beta=beta, normalised=False, real=None, opens=None, prefix=None
    ), state


def grouped(q: Tensor, kv_heads: int) -> Tensor:
    """Queries beside the key-value head that they share: [batch, kv_heads, query, groups, key]."""
    return q.unflatten(1, (kv_heads, -1)).transpose(2, 3)


def ungrouped(out: Tensor) -> Tensor:
    """Outputs by query head: [batch, heads, query, value]."""
    return out.transpose(2, 3).flatten(1, 2)


# ---------------------------------------------------------------- quadratic


def weights(scan: Scan) -> Float[Tensor, "batch heads query time"]:
    r"""What each token's output takes of each value, W with o_i = \sum_j W_ij v_j, in memory quadratic in the length.

    Of delta writes W = A (1 + M)^{-1} diag(b), as `core/chunks.py` writes it. Weights may be negative.
    """
    if not scan.causal:
        return full_weights(scan)
    # what a prefix writes is read by all of it, so that its part of the order is full
    plain = replace(scan, prefix=None, normalised=False)
    ready, _ = prepared(plain, plain.empty())
    batch, kv_heads, length = ready.k.shape[:3]
    block = whole(padded(ready, 1 << (length - 1).bit_length()))
    pairs = block.pairs
    met = block.scores(block.q, pairs)
    if block.beta is not None:
        seen, _, _ = block.solved(pairs)
        eye = torch.eye(seen.shape[-1], dtype=met.dtype, device=met.device).expand_as(seen)
        inverse = torch.linalg.solve_triangular(seen * block.beta, eye, upper=False, unitriangular=True)
        met = met @ (inverse * block.beta.transpose(2, 3))
    met = met.view(batch, kv_heads, *block.q.shape[2:4], -1)
    out = ungrouped(met[:, :, :length, :, :length])
    if scan.prefix is not None:
        real = torch.ones_like(ready.k[:, 0, :, 0], dtype=torch.bool) if scan.real is None else scan.real
        early = (real.cumsum(1) <= scan.prefix[:, None]) & real
        every = torch.einsum("bhigc,bhjc->bhigj", grouped(ready.q, kv_heads), ready.k)
        out = torch.where(early[:, None, None], ungrouped(every), out)
    if scan.normalised:
        total = out.sum(-1, keepdim=True)
        out = torch.where(total == 0, 0.0, out / torch.where(total == 0, 1.0, total))
    return out


def whole(scan: Scan) -> Block:
    """A prepared scan as one chunk."""
    q = grouped(scan.q, scan.k.shape[1]).flatten(0, 1)[:, None]
    k, v = (t.flatten(0, 1)[:, None] for t in (scan.k, scan.v))
    decay = None if scan.decay is None else per_token(scan.decay, scan.k).flatten(0, 1)[:, None]
    beta = None if scan.beta is None else scan.beta.flatten(0, 1)[:, None, :, None]
    return Block(q, k, v, decay, beta)


def per_token(decay: Tensor, k: Tensor) -> Tensor:
    """Decays as one row for each token."""
    return decay.expand(k.shape[0], -1, k.shape[2], -1)


def quadratic(scan: Scan, state: Tensor, chunk: int = 0) -> tuple[Tensor, Tensor]:
    """All weights at once: a state is what tokens before have written, one per channel, and what tokens behind read."""
    batch, kv_heads, length, dim = scan.k.shape
    groups = scan.q.shape[1] // kv_heads
    eye = torch.eye(dim, dtype=state.dtype, device=state.device).expand(batch, kv_heads, dim, dim)
    many = eye.repeat_interleave(groups, 1)
    decay, beta = scan.decay, scan.beta
    if decay is not None:
        around = decay.new_zeros(batch, kv_heads, dim, decay.shape[3])
        decay = torch.cat([around, per_token(decay, scan.k), around], 2)
    if beta is not None:
        beta = torch.cat([torch.ones_like(eye[..., 0]), beta, torch.zeros_like(eye[..., 0])], 2)
    k = torch.cat([eye, scan.k, torch.zeros_like(eye)], 2)
    v = torch.cat([state, scan.v, torch.zeros_like(state)], 2)
    q = torch.cat([torch.zeros_like(many), scan.q, many], 2)
    out = weights(Scan(q, k, v, decay, beta)) @ v.repeat_interleave(groups, 1)
    return out[:, :, dim : dim + length], out[:, ::groups, dim + length :]


# ---------------------------------------------------------------- recurrent


def recurrent(scan: Scan, state: Tensor, chunk: int = 0) -> tuple[Tensor, Tensor]:
    """Token by token, as the definition says."""
    q, outs = grouped(scan.q, scan.k.shape[1]), []
    a = None if scan.decay is None else per_token(scan.decay, scan.k).exp()
    for t in range(scan.q.shape[2]):
        k, v = scan.k[:, :, t], scan.v[:, :, t]
        if a is not None:
            state = state * a[:, :, t, :, None]
        if scan.beta is not None:
            v = scan.beta[:, :, t, None] * (v - (k[:, :, None] @ state)[:, :, 0])
        state = state + k[..., None] * v[:, :, None]
        outs.append(q[:, :, t] @ state)
    return ungrouped(torch.stack(outs, 2)), state


# ---------------------------------------------------------------- chunked


def chunk_for(length: int, key: int, value: int) -> int:
    """Tokens per chunk: as much work within chunks as from chunk to chunk, and no more than there are tokens."""
    even = 2 * key * value / (key + value)
    size = SMALLEST
    while size < LARGEST and size < even:
        size *= 2
    while size > 1 and size >= 2 * length:
        size //= 2
    return size


def padded(scan: Scan, length: int) -> Scan:
    """With tokens behind that write nothing and let nothing decay."""
    more = length - scan.k.shape[2]
    if not more:
        return scan
    decay = None if scan.decay is None else filled(per_token(scan.decay, scan.k), more)
    beta = None if scan.beta is None else filled(scan.beta, more)
    q, k, v = (filled(x, more) for x in (scan.q, scan.k, scan.v))
    return replace(scan, q=q, k=k, v=v, decay=decay, beta=beta)


def chunked(scan: Scan, state: Tensor, chunk: int = 0) -> tuple[Tensor, Tensor]:
    """In chunks, whose tensors exist for one stretch of the text at a time, forward and backward."""
    length, dim = scan.k.shape[2:]
    if chunk < 0 or chunk & (chunk - 1):
        raise BadInput(f"chunk={chunk}: give a power of two, or 0 for one that fits")
    size = chunk or chunk_for(length, dim, scan.v.shape[3])
    # a chunk longer than the text is cut to it
    size = min(size, 1 << max(0, length - 1).bit_length())
    if length == 0:
        return scan.q.new_zeros(*scan.q.shape[:3], scan.v.shape[3]), state
    return Chunked.apply(scan.q, scan.k, scan.v, scan.decay, scan.beta, state, size)


def stretches(batch: int, length: int, size: int, numbers: int) -> list[tuple[slice, list[tuple[int, int]]]]:
    """Texts, and the ranges of their tokens, that are computed at once; all ranges but the last are whole chunks.

    Args:
        batch: Texts.
        length: Tokens of each.
        size: Tokens of a chunk.
        numbers: What the largest tensor holds for one token of one text.
    """
    texts = min(batch, max(1, BLOCK_NUMBERS // (numbers * size)))
    step = max(1, BLOCK_NUMBERS // (texts * numbers * size)) * size
    ranges = [(a, min(length, a + step)) for a in range(0, length, step)]
    return [(slice(n, min(batch, n + texts)), ranges) for n in range(0, batch, texts)]


def block_at(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], texts: slice, a: int, b: int, size: int
) -> Block:
    """One stretch of some texts in chunks, the last one filled up."""
    q, k, v, decay, beta = tensors
    short = -(b - a) % size

    def cut(x: Tensor) -> Tensor:
        x = filled(x[texts, :, a:b], short)
        return x.reshape(-1, x.shape[2] // size, size, *x.shape[3:])

    if decay is not None:
        decay = decay.expand(k.shape[0], -1, -1, -1)
        if decay.shape[2] == 1:
            # constant: one chunk's decays are every chunk's, but for what stands behind the text
            decay = filled(decay[texts].expand(-1, -1, b - a if short else size, -1), short)
            decay = decay.reshape(-1, decay.shape[2] // size, size, decay.shape[3])
        else:
            decay = cut(decay)
    beta = None if beta is None else cut(beta[..., None])
    return Block(cut(grouped(q, k.shape[1])), cut(k), cut(v), decay, beta)


def filled(x: Tensor, more: int) -> Tensor:
    """With zeros behind its last token."""
    return torch.cat([x, x.new_zeros(*x.shape[:2], more, *x.shape[3:])], 2) if more else x


class Chunked(torch.autograd.Function):
    """The chunked form: keeps its inputs and one state per stretch, and computes the rest again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        beta: Tensor | None,
        state: Tensor,
        size: int,
    ) -> tuple[Tensor, Tensor]:
        batch, kv_heads, length, dim = k.shape
        groups = q.shape[1] // kv_heads
        out = v.new_empty(batch, kv_heads, length, groups, v.shape[3])
        numbers = kv_heads * max(size * groups, dim, v.shape[3])
        ctx.parts, ctx.size = stretches(batch, length, size, numbers), size
        last, states = torch.empty_like(state), []
        for texts, ranges in ctx.parts:
            first = state[texts].flatten(0, 1)
            for a, b in ranges:
                states.append(first)
                got, first = block_at((q, k, v, decay, beta), texts, a, b, size).forward(first)
                out[texts, :, a:b] = got.view(-1, kv_heads, got.shape[1] * size, groups, v.shape[3])[:, :, : b - a]
            last[texts] = first.view_as(last[texts])
        ctx.save_for_backward(q, k, v, decay, beta, *states)
        return ungrouped(out), last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, decay, beta, *states = ctx.saved_tensors
        kv_heads = k.shape[1]
        d_out, d_state = grouped(d_out, kv_heads), torch.empty_like(d_last)
        d_q = torch.empty_like(q).unflatten(1, (kv_heads, -1)).transpose(2, 3)
        d_k, d_v = torch.empty_like(k), torch.empty_like(v)
        d_decay = None if decay is None else torch.zeros_like(decay)
        d_beta = None if beta is None else torch.empty_like(beta)
        for texts, ranges in reversed(ctx.parts):
            d_later = d_last[texts].flatten(0, 1)
            # texts may share their decays
            own = texts if decay is not None and decay.shape[0] > 1 else slice(None)
            for a, b in reversed(ranges):
                block = block_at((q, k, v, decay, beta), texts, a, b, ctx.size)
                d = filled(d_out[texts, :, a:b], -(b - a) % ctx.size)
                got = block.backward(states.pop(), d.reshape(*block.q.shape[:4], -1), d_later)
                d_later = got.state

                def cut(x: Tensor, n: int = b - a) -> Tensor:
                    return x.reshape(-1, kv_heads, x.shape[1] * x.shape[2], *x.shape[3:])[:, :, :n]

                at = (texts, slice(None), slice(a, b))
                d_q[at], d_k[at], d_v[at] = cut(got.q), cut(got.k), cut(got.v)
                if d_beta is not None and got.beta is not None:
                    d_beta[at] = cut(got.beta)[..., 0]
                if d_decay is not None and got.decay is not None:
                    part = cut(got.decay)
                    if decay.shape[2] == 1 and k.shape[2] > 1:
                        part, to = part.sum(2, keepdim=True), d_decay[own]
                    else:
                        to = d_decay[own, :, a:b]
                    to += part.sum_to_size(to.shape)
            d_state[texts] = d_later.view_as(d_state[texts])
        if d_decay is not None:
            # what has decayed to nothing depends on nothing
            d_decay.masked_fill_(decay < ZERO / 2, 0.0)
        return ungrouped(d_q), d_k, d_v, d_decay, d_beta, d_state, None


# ---------------------------------------------------------------- all see all


def full(scan: Scan, state: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Outputs, not divided, where every token sees every other one."""
    plain = replace(scan, causal=True) if scan.q.shape[2] == scan.k.shape[2] else None
    if scan.decay is None and (scan.opens is None or not bool(scan.opens[:, 1:].any())):
        return read_all(scan, state)
    assert plain is not None
    ready, state = prepared(plain, state)
    before, last = chunked(ready, state, chunk)
    after, _ = chunked(behind(ready), torch.zeros_like(state), chunk)
    return before + after.flip(2), last


def read_all(scan: Scan, state: Tensor) -> tuple[Tensor, Tensor]:
    """One state of all tokens, read by each."""
    keys = replace(scan, q=scan.k, causal=True, opens=None)
    ready, state = prepared(keys, state)
    state = state + ready.k.transpose(2, 3) @ ready.v
    q = grouped(scan.q.to(state.dtype), scan.k.shape[1])
    out = (q.flatten(2, 3) @ state).view(*q.shape[:4], -1)
    return ungrouped(out), state


def behind(scan: Scan) -> Scan:
    """The scan from the last token to the first in which each sees the ones behind it, not itself.

    Between token t and a later one s stand the decays of t + 1 to s.
    """
    decay = torch.zeros_like(scan.k[..., :1]) if scan.decay is None else per_token(scan.decay, scan.k)

    def shifted(x: Tensor) -> Tensor:
        x = x.flip(2)
        return torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, :-1]], 2)

    k = shifted(scan.k * decay.exp())
    return replace(scan, q=scan.q.flip(2), k=k, v=shifted(scan.v), decay=shifted(decay))


def full_weights(scan: Scan) -> Tensor:
    """`weights` where all see all."""
    plain = replace(scan, causal=True, normalised=False)
    if scan.decay is None and scan.opens is None:
        keys = replace(scan, q=scan.k, causal=True, normalised=False)
        ready, _ = prepared(keys, keys.empty())
        q = grouped(scan.q.to(ready.k.dtype), scan.k.shape[1])
        out = ungrouped(torch.einsum("bhigc,bhjc->bhigj", q, ready.k))
    else:
        ready, _ = prepared(plain, plain.empty())
        later = weights(behind(ready)).flip(2)
        # its keys are those one token behind
        later = torch.cat([torch.zeros_like(later[..., :1]), later[..., 1:].flip(3)], -1)
        out = weights(ready) + later
    if scan.normalised:
        total = out.sum(-1, keepdim=True)
        out = torch.where(total == 0, 0.0, out / torch.where(total == 0, 1.0, total))
    return out
