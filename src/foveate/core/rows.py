"""The row engine: exact attention over row blocks, with whatever is asked of the rows on the way.

`attend(view, reductions=...)` gives the head outputs and the reductions in memory O(heads x block x N). There are six
ways to the same numbers, each the others' test:

    reference   whole rows of one layer at once, float64 on request: defines what is right
    blocks      row blocks in plain PyTorch: any rule, edit, pattern, bias or reduction; differentiable
    fused       closed forms from the log-sum-exp of fused kernels: no weight is formed, any device
    native      one pass of the package's own CPU kernel, or two under an edit that says its outputs so
    tiled       the key blocks that a pattern visits and no others (`core/tiled.py`); differentiable
    sdpa        nothing is asked: scaled_dot_product_attention and nothing else
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from foveate.core import fused, onepass, tiled
from foveate.core.errors import BadInput, NotSupported
from foveate.core.mask import Mask
from foveate.core.mechanism import Edit, Schedule, Tilt
from foveate.core.passes import Passes
from foveate.core.places import within
from foveate.core.reductions import Reduction, Sampled
from foveate.core.rule import Rule, lse_of

__all__ = ["Engine", "Layer", "RowBlock", "Rows", "View", "attend"]

Engine = Literal["auto", "reference", "blocks", "fused", "native", "tiled", "schedule", "sdpa"]
SOFTMAX = Rule()
# larger blocks leave the cache between one stage and the next
BLOCK_BYTES = 4 << 20
# what `View` works out from the shapes when it is not given
DERIVED: Any = None


@dataclass(frozen=True)
class Layer:
    """Which attention of the model this is.

    Args:
        index: Number of the attention module in the model, from 0.
        name: Its dotted path in the model.
        cross: Whether its keys come from another sequence.
    """

    index: int = 0
    name: str = "attention"
    cross: bool = False


@dataclass(eq=False)
class View:
    """One attention call: what the model really handed over.

    Args:
        q: Queries, [batch, heads, query, dim], positions already applied.
        k: Keys, [batch, kv_heads, key, dim]; never repeated for grouped heads.
        v: Values, [batch, kv_heads, key, value_dim].
        mask: Which keys each row may see; None: all of them.
        scale: Factor on q . k; None: dim ** -0.5.
        softcap: c of c tanh(s / c), or None.
        sinks: Learned extra logit per head, [heads], or None.
        bias: Additive bias, [batch|1, heads|1, query, key], or None.
        tilt: What edits do to the scores in closed form: a bias per key, on all rows or some; None: nothing. A factor
            is in the queries.
        dropout: Probability of dropping a weight (training).
        tokens: Token ids of the keys, [batch|1, key], where known.
        projection: Weight of the output projection, [model_dim, heads * value_dim], where known.
        layer: Which layer of the model this is.
        rule: How scores are made and become weights; softmax attention where nothing else stands in the layer.
        learned: The rule's own parameters, or None.
        hidden: The layer's input at the queries, where a rule stands in it.
        training: Whether the model is being trained.

    Raises:
        BadInput: shapes that do not fit each other.
    """

    q: Float[Tensor, "batch heads query dim"]
    k: Float[Tensor, "batch kv_heads key dim"]
    v: Float[Tensor, "batch kv_heads key value_dim"]
    mask: Mask = DERIVED
    scale: float = DERIVED
    softcap: float | None = None
    sinks: Float[Tensor, " heads"] | None = None
    bias: Tensor | None = None
    tilt: Tilt | None = None
    dropout: float = 0.0
    tokens: Int[Tensor, "#batch key"] | None = None
    projection: Float[Tensor, "model_dim inner"] | None = None
    layer: Layer = field(default_factory=Layer)
    rule: Rule = SOFTMAX
    learned: torch.nn.Module | None = None
    hidden: Float[Tensor, "batch query width"] | None = None
    training: bool = False

    def __post_init__(self) -> None:
        q, k, v = self.q, self.k, self.v
        if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
            raise BadInput(f"q, k, v must be [batch, heads, length, dim]; got {[tuple(t.shape) for t in (q, k, v)]}")
        if (
            q.shape[0] != k.shape[0]
            or k.shape[:3] != v.shape[:3]
            or q.shape[3] != k.shape[3]
            or q.shape[1] % k.shape[1]
        ):
            raise BadInput(
                f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit: batch and dim must be "
                "equal, k and v of one length, and the query heads a multiple of the key-value heads"
            )
        if self.mask is None:
            self.mask = Mask.full(q.shape[2], k.shape[2], q.device)
        if self.mask.queries != q.shape[2] or self.mask.keys != k.shape[2]:
            raise BadInput(
                f"a mask of {self.mask.queries} x {self.mask.keys} on {q.shape[2]} queries, {k.shape[2]} keys"
            )
        if self.scale is None:
            self.scale = q.shape[3] ** -0.5

    def but(self, **changes: Any) -> View:
        """The same call with other fields, which must fit: nothing is checked again."""
        other = object.__new__(View)
        other.__dict__.update(self.__dict__, **changes)
        return other

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def queries(self) -> int:
        return self.q.shape[2]

    @property
    def keys(self) -> int:
        return self.k.shape[2]

    @property
    def grouped(self) -> int:
        """Query heads per key-value head."""
        return self.heads // self.kv_heads

    @property
    def needs_grad(self) -> bool:
        tilt = None if self.tilt is None else self.tilt.bias
        own = () if self.learned is None else self.learned.parameters()
        return torch.is_grad_enabled() and any(
            t is not None and t.requires_grad
            for t in (self.q, self.k, self.v, self.sinks, self.bias, tilt, self.hidden, *own)
        )

    def inside(self, spans: tuple[tuple[int, int], ...], place: Tensor) -> Bool[Tensor, "#batch tokens"]:
        """Which of these places lie in a span: one for all rows of the batch, or one for each.

        Raises:
            BadInput: neither one span nor as many as rows (or a divisor of that, where a batch was expanded).
        """
        return within(spans, place, self.batch)


@dataclass(eq=False)
class RowBlock:
    """Some rows of one layer, all heads: what an edit sees, and what the reductions are defined on.

    Args:
        view: The attention call.
        index: Which of its queries these rows are.
        first: First key that any of them may see.
        last: One past the last such key.
        dtype: Precision of scores and weights.
        edits: What acts on scores and weights, in order.
        facts: Reductions of the unedited rows that the edits asked for.
        visited: Keys that a pattern visits, or None: all.
    """

    view: View
    index: Int[Tensor, " rows"]
    first: int
    last: int
    dtype: torch.dtype
    edits: tuple = ()
    facts: dict[Reduction, Any] = field(default_factory=dict)
    visited: Tensor | None = None

    @cached_property
    def q(self) -> Float[Tensor, "batch heads rows dim"]:
        return self.view.q[:, :, self.index].to(self.dtype)

    @cached_property
    def distance(self) -> Int[Tensor, "rows keys"]:
        """|i - j| in tokens."""
        at = torch.arange(self.first, self.last, device=self.index.device)
        return (self.view.mask.position[self.index][:, None] - at).abs()

    @cached_property
    def scores(self) -> Float[Tensor, "batch heads rows keys"]:
        """Scores with the model's own bias and mask: -inf where a row may not look. Edits of scores are in."""
        view = self.view
        s = view.rule.score(self)
        if view.bias is not None:
            s = s + view.bias[..., self.index, :][..., self.first : self.last].to(s.dtype)
        if view.tilt is not None and view.tilt.bias is not None:
            s = tilted_scores(self, s, view.tilt)
        for edit in self.edits:
            s = edit.edit_scores(self, s)
        if view.mask.dense is not None:
            blocked = view.mask.additive(self.index, self.first, self.last).to(s.dtype)
            s = torch.where(blocked == -torch.inf, blocked, s + blocked)
        elif s.requires_grad:
            # where, not plus: garbage behind the mask may be NaN
            s = torch.where(view.mask.allowed(self.index, self.first, self.last), s, -torch.inf)
        else:
            for a, b in self.ragged:
                allowed = view.mask.allowed(self.index, a, b)
                s[..., a - self.first : b - self.first].masked_fill_(~allowed, -torch.inf)
        return s if self.visited is None else s.masked_fill(~self.visited, -torch.inf)

    @cached_property
    def ragged(self) -> list[tuple[int, int]]:
        """The stretches of keys in front of and behind those that every row sees."""
        if self.view.mask.plain == "full":
            return []
        low, high = self.view.mask.low[:, self.index], self.view.mask.high[:, self.index]
        if not low.numel():
            return [(self.first, self.last)]
        a = min(max(int(low.max()), self.first), self.last)
        b = min(max(int(high.min()), a), self.last)
        return [(x, y) for x, y in ((self.first, a), (b, self.last)) if x < y]

    @cached_property
    def simple(self) -> bool:
        """Whether all that a row may not see is what its interval leaves out, and every row sees something."""
        view, mask = self.view, self.view.mask
        tilt = None if view.tilt is None else view.tilt.bias
        return (
            mask.dense is None
            and self.visited is None
            and view.bias is None
            and not any(type(e).edit_scores is not Edit.edit_scores for e in self.edits)
            and (tilt is None or not bool((tilt == -torch.inf).any()))
            and (bool(mask.keys) if mask.plain == "full" else bool((mask.high > mask.low)[:, self.index].all()))
        )

    @cached_property
    def lse(self) -> Float[Tensor, "batch heads rows"]:
        """Log-sum-exp of the scores; the learned sink of the head takes part."""
        return lse_of(self, self.scores)

    @cached_property
    def weights(self) -> Float[Tensor, "batch heads rows keys"]:
        """Weights of keys first..last after normalisation and edits."""
        p = self.view.rule.normalise(self, self.scores)
        for edit in self.edits:
            p = edit.edit(self, p)
        return p

    def mix(self) -> Float[Tensor, "batch heads rows value_dim"]:
        """The head outputs of these rows."""
        view, p = self.view, self.weights
        if view.dropout:
            p = torch.nn.functional.dropout(p, view.dropout)
        v = view.v[:, :, self.first : self.last].to(p.dtype)
        # a key that no row may see must not reach the output, whatever stands in its value: 0 x NaN is NaN
        if not self.simple:
            seen = (self.scores > -torch.inf).any(2).unflatten(1, (view.kv_heads, -1)).any(2)
            v = torch.where(seen[..., None], v, v.new_zeros(()))
        elif self.ragged:
            parts = [view.mask.allowed(self.index, a, b).any(2) for a, b in self.ragged]
            if not all(bool(part.all()) for part in parts):
                seen = torch.ones(len(parts[0]), 1, self.last - self.first, dtype=torch.bool, device=v.device)
                for (a, b), part in zip(self.ragged, parts, strict=True):
                    seen[..., a - self.first : b - self.first] = part
                v = torch.where(seen[..., None], v, v.new_zeros(()))
        batch, heads, rows, keys = p.shape
        return (p.reshape(batch, view.kv_heads, view.grouped * rows, keys) @ v).reshape(batch, heads, rows, v.shape[3])


@dataclass(eq=False)
class Rows:
    """What one attention call gave: head outputs and reductions; a metric's `update` reads this.

    `rows[RowEntropy()]` is the reduction; `rows.before` are the rows of the layer before (its samples only).

    Args:
        view: The attention call.
        out: The head outputs.
        values: The reductions that were asked for.
        engine: Which way was taken.
        before: The rows of the layer before.
    """

    view: View
    out: Float[Tensor, "batch heads query value_dim"]
    values: dict[Reduction, Any]
    engine: str
    before: Rows | None = None

    @property
    def layer(self) -> Layer:
        return self.view.layer

    def samples(self) -> Rows:
        """Only what the next layer may look at: the sampled rows, not the tensors of the call."""
        return replace(self, out=self.out[:0], values={r: v for r, v in self.values.items() if r.axis == "sample"})

    def __getitem__(self, reduction: Reduction) -> Any:
        try:
            return self.values[reduction]
        except KeyError:
            raise BadInput(f"{reduction} was not asked of this pass; name it in `needs`") from None


def attend(
    view: View,
    reductions: Sequence[Reduction] = (),
    *,
    edits: Sequence = (),
    pattern: Callable | None = None,
    schedule: Schedule | None = None,
    engine: Engine = "auto",
    block: int | None = None,
    dtype: torch.dtype | None = None,
) -> Rows:
    """Attention of one layer, and the reductions asked of its rows.

    Args:
        view: The attention call.
        reductions: What to compute on the way.
        edits: Row edits in the order in which they act, tilts before all others; reductions see the edited weights.
        pattern: `select(view)` of a pattern: which key blocks each row block visits.
        schedule: In which order to compute what no engine has been named for, where nobody looks at rows.
        engine: Which way; "auto" takes the cheapest that can do what is asked.
        block: Rows per block; default: as many as fit in 4 MB of weights.
        dtype: Precision of the row blocks; default float32, or float64 if the inputs are.

    Returns:
        Head outputs in the dtype of `view.q`, and one tensor per reduction.

    Raises:
        NotSupported: the named engine cannot do what is asked; the message says why.
    """
    view = view.rule.prepare(view)
    wanted, edits = tuple(dict.fromkeys(reductions)), tuple(edits)
    mixed = None
    if engine == "auto" and not (edits or wanted or pattern) and dtype is None:
        mixed = view.rule.shortcut(view)
    if mixed is None:
        rows = passed(view, wanted, edits, pattern=pattern, schedule=schedule, engine=engine, block=block, dtype=dtype)
    else:
        rows = Rows(view, mixed, {}, "shortcut")
    rows.out = view.rule.finish(view, rows.out)
    return rows


def passed(
    view: View,
    wanted: Sequence[Reduction],
    given: Sequence,
    *,
    pattern: Callable | None = None,
    schedule: Schedule | None = None,
    engine: Engine = "auto",
    block: int | None = None,
    dtype: torch.dtype | None = None,
) -> Rows:
    """One pass over the rows of a call that its rule has prepared; arguments as of `attend`."""
    free = engine == "auto" and pattern is None and dtype is None
    if free and schedule is None and not (given or wanted) and choose(view, (), view.rule.plain, dtype) == "sdpa":
        return Rows(view, sdpa(view), {}, "sdpa")
    unedited = view
    edits = tuple(e for e in given if e.whole_rows and e.acts(view.layer.index))
    view, beyond = tilted(view, given)
    edits = (*edits, *beyond)
    plain = view.rule.plain and not edits
    streamed = tuple(r for r in wanted if r.axis != "sample")
    through = None
    if free and len(edits) == 1 and view.rule.plain and not streamed:
        passes = Passes(view)
        through = edits[0].through(passes) if passes.fit else None
    if engine == "auto":
        whole = free and plain and not streamed and view.tilt is None
        if schedule is not None and whole and not schedule.refuses(view):
            engine = "schedule"
        else:
            engine = choose(view, streamed, plain, dtype, pattern is not None)
    if engine not in ("blocks", "reference", "schedule"):
        if not plain or (pattern is not None and engine != "tiled"):
            raise NotSupported(f"engine {engine!r} has no rules, edits or patterns; use 'blocks' or 'auto'")
        if dtype is not None:
            raise NotSupported(f"engine {engine!r} works in float32; use 'reference' for {dtype}")
        reason = REFUSALS[engine](view, streamed)
        if reason:
            raise NotSupported(f"engine {engine!r}: {reason}; use 'blocks' or 'auto'")

    stages = Stages(
        edits, first_pass(unedited, edits), None if pattern is None else tiled.covered(view, pattern(view)), dtype
    )
    found: dict[Reduction, Tensor]
    if through is not None:
        out, found, engine = through.to(view.q.dtype), {}, "native"
    elif engine == "sdpa":
        out, found = sdpa(view), {}
    elif engine == "tiled":
        out, found = tiled.attend(view, stages.visits)[0], {}
    elif engine == "schedule":
        assert schedule is not None
        out, found = schedule.run(view)[0], {}
    elif engine == "native":
        out, found = onepass.rows(view, streamed)
    elif engine == "fused":
        out, found = fused.rows(view, streamed)
    else:
        out, found = by_blocks(view, streamed, stages, view.queries if engine == "reference" else block)

    values: dict[Reduction, Any] = dict(found)
    for sample in (r for r in wanted if r.axis == "sample"):
        index = sample.rows(view).to(view.q.device)
        values[sample] = Sampled(index, sample.of_block(stages.cut(view, index)))
    return Rows(unedited, out, values, engine)


def tilted(view: View, edits: Sequence[Edit]) -> tuple[View, list[Edit]]:
    """The call with the closed forms of its edits in it.

    Tilts that are for different rows are no single tilt: all but the first stay edits of scores, which come back
    beside the call.
    """
    own = view.tilt or Tilt()
    bias, rows, q = own.bias, own.rows, view.q
    beyond: list[Edit] = []
    for edit in edits:
        tilt = edit.tilt(view)
        if tilt is None:
            continue
        if tilt.factor is not None:
            q = (q * tilt.factor[..., None]).to(view.q.dtype)
        if tilt.bias is None:
            continue
        if bias is None:
            bias, rows = tilt.bias, tilt.rows
        elif rows is None and tilt.rows is None:
            bias = bias + tilt.bias
        else:
            beyond.append(Tilted(tilt))
    if q is view.q and bias is own.bias:
        return view, beyond
    return view.but(q=q, tilt=None if bias is None else Tilt(bias=bias, rows=rows)), beyond


@dataclass(frozen=True, eq=False)
class Tilted(Edit):
    """A tilt beside another one that is for other rows.

    Args:
        by: The tilt.
    """

    by: Tilt

    def edit_scores(self, block: RowBlock, scores: Tensor) -> Tensor:
        return tilted_scores(block, scores, self.by)


def tilted_scores(
    block: RowBlock, scores: Float[Tensor, "batch heads rows keys"], tilt: Tilt
) -> Float[Tensor, "batch heads rows keys"]:
    """The scores of a block with the bias of a tilt."""
    assert tilt.bias is not None
    bias = tilt.bias[:, :, None, block.first : block.last].to(scores.dtype)
    if tilt.rows is not None:
        bias = torch.where(tilt.rows[:, None, block.index, None], bias, 0.0)
    # where, not plus: what is taken out has no gradient, and no influence if it is NaN
    return torch.where(bias == -torch.inf, bias, scores + bias)


def first_pass(view: View, edits: Sequence) -> dict[Reduction, Any]:
    """The reductions that edits need before they can act, from a pass in which nothing is edited."""
    needed = tuple(dict.fromkeys(r for edit in edits for r in edit.needs()))
    return passed(view, needed, ()).values if needed else {}


def choose(
    view: View, reductions: Sequence[Reduction], plain: bool, dtype: torch.dtype | None, patterned: bool = False
) -> Engine:
    """The cheapest way that can do what is asked."""
    if plain and patterned and dtype is None and not REFUSALS["tiled"](view, reductions):
        return "tiled"
    if not plain or patterned or dtype is not None or view.q.dtype == torch.float64:
        return "blocks"
    # one row's mask is as small as its scores: the framework's kernel starts faster than ours
    if view.tilt is not None and view.queries > 1 and not REFUSALS["native"](view, reductions):
        return "native"
    if not reductions and not REFUSALS["sdpa"](view, reductions):
        return "sdpa"
    if view.q.device.type == "cpu" and not REFUSALS["native"](view, reductions):
        return "native"
    if not REFUSALS["fused"](view, reductions):
        return "fused"
    return "blocks"


# ---------------------------------------------------------------- sdpa


def sdpa_refuses(view: View, reductions: Sequence[Reduction]) -> str:
    """Why scaled_dot_product_attention cannot stand for this call, or ""."""
    if reductions:
        return f"{reductions[0]} needs the rows"
    if view.softcap is not None or view.sinks is not None:
        return "soft cap and learned sinks are not in scaled_dot_product_attention"
    if (not view.mask.plain or view.tilt is not None) and view.queries * view.keys * view.batch > 1 << 24:
        return "its mask would be N x N"
    if view.tilt is not None and (view.mask.dense is not None or view.bias is not None):
        return "a tilt beside a mask of the model's own"
    if view.tilt is not None and view.tilt.bias is not None:
        out = view.tilt.bias == -torch.inf
        # a row that sees nothing at all comes out as NaN
        if bool((out.all(-1) if view.mask.plain == "full" else out).any()):
            return "a tilt that takes keys out"
    return ""


def sdpa(view: View) -> Float[Tensor, "batch heads query value_dim"]:
    """The framework's own attention, called as the model would have called it."""
    mask, extra = None, {}
    if not view.mask.plain or (view.tilt is not None and view.mask.plain != "full"):
        mask = view.mask.additive(torch.arange(view.queries, device=view.q.device), 0, view.keys).to(view.q.dtype)
    if view.tilt is not None:
        tilt = by_tilt(view.tilt, view.queries).to(view.q.dtype)
        mask = tilt if mask is None else mask + tilt
    if view.bias is not None:
        mask = view.bias if mask is None else view.bias + mask
        if view.mask.plain == "causal":
            mask = mask + view.mask.additive(torch.arange(view.queries, device=mask.device), 0, view.keys)
        mask = mask.to(view.q.dtype)
    if view.grouped > 1:
        extra["enable_gqa"] = True
    return torch.nn.functional.scaled_dot_product_attention(
        view.q,
        view.k,
        view.v,
        attn_mask=mask,
        dropout_p=view.dropout,
        is_causal=mask is None and view.mask.plain == "causal" and view.queries > 1,
        scale=view.scale,
        **extra,
    )


def by_tilt(tilt: Tilt, queries: int) -> Float[Tensor, "#batch #heads query key"]:
    """The bias of a tilt as rows x keys, for a few rows."""
    assert tilt.bias is not None
    bias = tilt.bias[:, :, None].expand(-1, -1, queries, -1)
    return bias if tilt.rows is None else torch.where(tilt.rows[:, None, :, None], bias, 0.0)


REFUSALS: dict[str, Callable[[View, Sequence[Reduction]], str]] = {
    "sdpa": sdpa_refuses,
    "native": onepass.refuses,
    "fused": fused.refuses,
    "tiled": tiled.refuses,
}


# ---------------------------------------------------------------- row blocks


@dataclass(frozen=True, eq=False)
class Stages:
    """What happens to the rows of one pass, whichever block they are in."""

    edits: tuple
    facts: dict[Reduction, Any]
    visits: Any
    dtype: torch.dtype | None

    def cut(self, view: View, index: Int[Tensor, " rows"]) -> RowBlock:
        """The block of the listed rows, with the keys that any of them may see."""
        if len(index) and int(index[-1]) - int(index[0]) == len(index) - 1:
            first, last = view.mask.span(int(index[0]), int(index[-1]) + 1)
        else:
            first, last = 0, view.keys
        dtype = self.dtype or (torch.float64 if view.q.dtype == torch.float64 else torch.float32)
        block = RowBlock(view, index, first, last, dtype, self.edits, self.facts)
        if self.visits is not None:
            block.visited = self.visits.block(index, first, last)
        return block


def by_blocks(
    view: View, reductions: Sequence[Reduction], stages: Stages, block: int | None
) -> tuple[Float[Tensor, "batch heads query value_dim"], dict[Reduction, Any]]:
    """Walks over the row blocks; recomputes a block in the backward pass instead of keeping it."""
    if block is None:
        block = max(16, min(512, BLOCK_BYTES // max(1, 4 * view.batch * view.heads * view.keys)))
    out: list[Tensor] = []
    parts: dict[Reduction, list[Tensor]] = {r: [] for r in reductions}

    # the leaves are arguments: `checkpoint` then recomputes from them and keeps nothing of the block
    def run(index: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        rows = stages.cut(view, index)
        return rows.mix(), *(r.of_block(rows) for r in reductions)

    # the largest first: what it leaves free holds the others, where growing ones would each take new memory
    for a in reversed(range(0, view.queries, block)):
        index = torch.arange(a, min(view.queries, a + block), device=view.q.device)
        if view.needs_grad:
            mixed, *values = checkpoint(run, index, view.q, view.k, view.v, use_reentrant=False)
        else:
            mixed, *values = run(index)
        out.append(mixed)
        for r, value in zip(reductions, values, strict=True):
            if r.axis == "column" and parts[r]:
                parts[r] = [parts[r][0] + value]
            else:
                parts[r].append(value)
    joined = {r: p[0] if r.axis == "column" else torch.cat(p[::-1], 2) for r, p in parts.items()}
    return torch.cat(out[::-1], 2).to(view.q.dtype), joined
