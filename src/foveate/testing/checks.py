"""The common checks: what every mechanism promises, whoever wrote it.

    check_mechanism(MyMetric)                     every check that fits, for every entry of `test_params`
    check_mechanism(MyMetric(window=3))           this one setting
    check_mechanism(MyMetric, only=["padding"])   one check

A check that a mechanism cannot pass is declared on its class, with the reason:

    known_failures: ClassVar = {"chunks": "looks at columns, which a chunk has not seen to their end"}

Strictly: a declared failure that passes is an error too.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jaxtyping
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core.attach import attach, can
from foveate.core.card import Card, Needs
from foveate.core.errors import BadInput, BadParameter, unknown
from foveate.core.mechanism import Edit, HeadEdit, Mechanism, Metric, ModelMetric, Pattern, RowMetric, Visits
from foveate.core.params import Bounds, bounds_of
from foveate.core.reductions import Reduction, Sample, Sampled
from foveate.core.rows import REFUSALS, Engine, Rows, View
from foveate.core.rows import attend as attend_rows
from foveate.testing import tiny, views
from foveate.testing.views import mask_of

__all__ = ["CheckFailed", "annotations_off", "check_mechanism", "checks_for"]

ACTING = (Edit, HeadEdit, Pattern)
ATTACHED = (Metric, *ACTING)
ALL = (*ATTACHED, ModelMetric)
# one of each trait, and the traits that get in each other's way
VARIED = [
    "causal",
    "full",
    "window",
    "right_padded",
    "left_padded_window",
    "packed_window",
    "empty_rows",
    "decode_padded",
    "sliding_cache",
    "cross",
    "multi_query",
    "narrow_values",
    "soft_cap",
    "sinks_window_padded",
    "sinks_empty_rows",
    "bias_padded",
    "scattered",
    "odd_length",
]
COLUMNS = ["layer", "head", "metric", "value", "low", "high"]

Numbers = dict[str, Tensor]


class CheckFailed(AssertionError):
    """A mechanism breaks one of the common promises; names the mechanism, the check, and the numbers."""


@dataclass(frozen=True)
class Check:
    """One promise, and the kinds of mechanism that make it."""

    name: str
    kinds: tuple[type, ...]
    run: Callable[[Any], None]


CHECKS: dict[str, Check] = {}


def check(*kinds: type) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Registers a function as the check of its own name."""

    def register(run: Callable[[Any], None]) -> Callable[[Any], None]:
        name = run.__name__.strip("_")
        CHECKS[name] = Check(name, kinds, run)
        return run

    return register


def checks_for(kind: type[Mechanism] | Mechanism) -> list[str]:
    """Names of the checks that fit a mechanism, its class, or a kind such as `Metric`."""
    cls = kind if inspect.isclass(kind) else type(kind)
    return [c.name for c in CHECKS.values() if issubclass(cls, c.kinds)]


def check_mechanism(m: type[Mechanism] | Mechanism, only: Sequence[str] | None = None) -> list[str]:
    """Runs the common checks on a mechanism.

    Args:
        m: A class (all its `test_params` are tried) or one instance.
        only: Names of checks; default: all that fit.

    Returns:
        The names of the checks that ran.

    Raises:
        CheckFailed: a promise is broken, or a declared failure is none.
        UnknownName: `only` names no check of this kind of mechanism.
    """
    cls = m if inspect.isclass(m) else type(m)
    fitting = checks_for(cls)
    for name in (*(only or ()), *cls.known_failures):
        if name not in fitting:
            raise unknown(f"check of {cls.__name__}", name, fitting)
    wanted = [name for name in fitting if only is None or name in only]
    for name in wanted:
        settings = [cls(**params) for params in cls.test_params] if inspect.isclass(m) else [m]
        failures = [failure for s in settings if (failure := outcome(CHECKS[name], s))]
        reason = cls.known_failures.get(name)
        if reason is None and failures:
            raise failures[0]
        if reason is not None and not failures:
            raise CheckFailed(f"{cls.__name__}: check {name!r} passes, but is declared a known failure ({reason!r})")
    return wanted


def outcome(one: Check, m: Mechanism) -> CheckFailed | None:
    """What a check says of one setting; an exception of any kind is a failure."""
    try:
        one.run(m)
    except Exception as error:
        what = str(error) if isinstance(error, Broken) else f"{type(error).__name__}: {error}"
        failure = CheckFailed(f"{m!r}: check {one.name!r}: {what}")
        failure.__cause__ = error
        return failure
    return None


class Broken(Exception):
    """What a check found, before the mechanism and the check are named."""


def expect(holds: bool, message: str) -> None:
    if not holds:
        raise Broken(message)


@contextmanager
def annotations_off() -> Iterator[None]:
    """Without the checking of annotations, where a test run has it on: what a user meets."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


# ---------------------------------------------------------------- what a mechanism makes of attention calls


@dataclass(frozen=True)
class WholeRows(Reduction):
    """All rows of a call, to take samples from that do not depend on how the rows came in."""

    def of_block(self, block: Any) -> Float[Tensor, "batch heads rows keys"]:
        return torch.nn.functional.pad(block.weights, (block.first, block.view.mask.keys - block.last))


def readable(m: Mechanism, view: View) -> bool:
    """Whether the mechanism has a meaning on this call; the door to models leaves out what has none."""
    return not isinstance(m, Metric | Edit) or all(can(r, view) for r in m.needs())


def grid(m: Mechanism, names: Sequence[str]) -> Iterator[tuple[str, View]]:
    """The named situations that the mechanism can read."""
    for name in names:
        view = views.view(name)
        if readable(m, view):
            yield name, view


def rows_of(
    m: Metric, view: View, engine: Engine = "auto", dtype: torch.dtype | None = None, all_rows: bool = True
) -> Rows:
    """The rows of one call with what the metric needs.

    With `all_rows`, samples hold every row, as pairs (0, 1), (2, 3), ...: then even cuts of a text cut no pair.
    """
    needed = [r for r in m.needs() if not (all_rows and isinstance(r, Sample))]
    rows = attend_rows(view, needed, engine=engine, dtype=dtype)
    samples = [r for r in m.needs() if r not in needed]
    if samples:
        index = torch.arange(view.queries // 2 * 2 or 1)
        whole = attend_rows(view, [WholeRows()], engine="blocks")[WholeRows()]
        rows.values |= {r: Sampled(index, whole[:, :, index]) for r in samples}
    return rows


def two_layers(view: View) -> list[View]:
    """The call as the second of two layers, for metrics that compare a layer with the one before."""
    return [
        replace(view, q=view.q * factor, layer=replace(view.layer, index=index))
        for index, factor in enumerate((-0.7, 1.0))
    ]


def measured(
    m: Metric,
    calls: Sequence[View],
    engine: Engine = "auto",
    dtype: torch.dtype | None = None,
    all_rows: bool = True,
    without: Reduction | None = None,
) -> Numbers:
    """What a metric says after these calls, by label; of batches of one, keys of padding are left out.

    Arrays count tokens from the beginning of the text, so they are compared whole.
    """
    states: dict[int, Any] = {}
    with torch.no_grad():
        for view in calls:
            before = None
            for n, call in enumerate(two_layers(view)):
                rows = rows_of(m, call, engine, dtype, all_rows)
                if without is not None:
                    rows.values.pop(without, None)
                rows.before = before
                states[n] = m.update(states[n] if n in states else m.start(call.layer), rows)
                before = rows
    found: Numbers = {}
    for n, state in states.items():
        for label, estimate in m.result(state).items():
            for part in ("value", "low", "high"):
                found[f"{label} ({part}, layer {n})"] = getattr(estimate, part)
        for label, values in m.per_key(state).items():
            found[f"{label} (per key, layer {n})"] = values[:, real_keys(calls[-1], values.shape[1])]
        for label, values in m.arrays(state).items():
            found[f"{label} (array, layer {n})"] = values
    return found


def real_keys(view: View, keys: int) -> Tensor | slice:
    """Keys of the text, in a batch of one whose padding is known; otherwise all."""
    mask = mask_of(view)
    if mask.valid is None or mask.begin is None or view.batch > 1 or keys != view.keys or not mask.causal:
        return slice(None)
    padded = torch.zeros(keys, dtype=torch.bool).index_fill_(0, mask.position[~mask.valid[0]], True)
    # what earlier chunks held of the padding is not in this call's `valid`, but stands before the text
    return (~padded & (torch.arange(keys) >= mask.begin[0])).nonzero()[:, 0]


def acted(m: Mechanism, calls: Sequence[View], engine: Engine = "auto", dtype: torch.dtype | None = None) -> Numbers:
    """The head outputs of the real rows under an edit or pattern."""
    outs = []
    for view in calls:
        out = output(m, view, engine, dtype)
        outs.append(out.movedim(1, 2)[view.mask.rows.expand(view.batch, -1)])
    return {"head outputs": torch.cat(outs)}


def output(
    m: Mechanism | None, view: View, engine: Engine = "auto", dtype: torch.dtype | None = None
) -> Float[Tensor, "batch heads query value_dim"]:
    """The head outputs of one call, as the mechanism leaves them."""
    options: dict[str, Any] = {"engine": engine, "dtype": dtype, "block": 4 if engine == "blocks" else None}
    if isinstance(m, Edit):
        return attend_rows(view, edits=[m], **options).out
    if isinstance(m, Pattern):
        return attend_rows(view, pattern=m.select, **options).out
    rows = attend_rows(view, **options)
    return m.edit(rows, rows.out) if isinstance(m, HeadEdit) else rows.out


def numbers(m: Mechanism, *calls: View, **options: Any) -> Numbers:
    """What the mechanism makes of these calls, in one dictionary that can be compared."""
    return measured(m, calls, **options) if isinstance(m, Metric) else acted(m, calls, **options)


def same(got: Numbers, want: Numbers, where: str, tolerance: float = 3e-4, bounds: bool = True) -> None:
    """Fails unless all numbers agree; NaN agrees with NaN only."""
    expect(got.keys() == want.keys(), f"{where}: labels {sorted(got)} instead of {sorted(want)}")
    for label, b in want.items():
        a = got[label]
        if not bounds and ("(low" in label or "(high" in label):
            continue
        expect(a.shape == b.shape, f"{where}: {label} has shape {tuple(a.shape)}, not {tuple(b.shape)}")
        a, b = a.double(), b.double()
        apart = (a - b).abs().masked_fill(a.isnan() & b.isnan() | (a == b), 0.0) / b.abs().nan_to_num(0.0).clamp_min(1)
        worst = apart.nan_to_num(torch.inf).flatten().max(0) if apart.numel() else None
        if worst is not None and worst.values > tolerance:
            x, y = (float(t.flatten()[worst.indices]) for t in (a, b))
            raise Broken(f"{where}: {label} is {x:.6g} instead of {y:.6g} (allowed {tolerance:g})")


# ---------------------------------------------------------------- the checks: what it says of itself


@check(*ALL)
def form(m: Mechanism) -> None:
    """A frozen dataclass with a docstring and a full card; labels begin with its name."""
    cls = type(m)
    expect(dataclasses.is_dataclass(cls) and "__dataclass_params__" in vars(cls), "is no dataclass of its own")
    expect(vars(cls)["__dataclass_params__"].frozen, "is not frozen: state belongs into what `start` returns")
    expect(bool((cls.__doc__ or "").strip()) and not cls.__doc__.startswith(f"{cls.__name__}("), "has no docstring")
    expect(isinstance(getattr(cls, "card", None), Card), "has no card")
    for field in ("title", "family", "equation", "differs", "use"):
        expect(bool(getattr(cls.card, field).strip()), f"card.{field} is empty")
    expect(1900 < cls.card.year < 2100, f"card.year is {cls.card.year}")
    expect(bool(cls.card.needs), "card.needs is empty: say what it reads")
    if isinstance(m, Metric):
        for _, view in grid(m, ["causal", "cross"]):
            wrong = [label for label in measured(m, [view]) if not label.startswith(m.name)]
            expect(not wrong, f"labels {wrong} do not begin with {m.name!r}")


@check(*ALL)
def bounds(m: Mechanism) -> None:
    """Values outside of the declared bounds raise `BadParameter`."""
    for name, (default, declared) in bounds_of(type(m)).items():
        for bad in outside(default, declared) if declared else ():
            try:
                with annotations_off():
                    replace(m, **{name: bad})
            except BadParameter as error:
                expect(name in str(error), f"{name}={bad!r} is refused without naming {name}: {error}")
            except Exception as error:
                raise Broken(f"{name}={bad!r} raises {type(error).__name__}, not BadParameter: {error}") from error
            else:
                raise Broken(f"{name}={bad!r} is accepted; allowed is {declared}")


def outside(default: Any, declared: Bounds) -> Iterator[Any]:
    """Values that the bounds must not admit, of each wrong kind."""
    wrong: list[Any] = ["?", None, float("nan")]
    if not declared.choices:
        wrong += [declared.low - 1, declared.high + 1, True]
    first = default[0] if isinstance(default, tuple) and default else default
    if isinstance(first, int) and not declared.choices:
        wrong.append(declared.low + 0.5)
    yield from wrong
    if isinstance(default, tuple):
        yield from ((*default, bad) for bad in wrong)


@check(Metric, Edit)
def declares(m: Metric | Edit) -> None:
    """It names each reduction that it reads, and none that it does not."""
    calls = list(grid(m, ["long", "causal", "empty_rows", "cross"]))
    for _, view in calls:
        numbers(m, view)
    for r in m.needs():
        expect(any(stumbles(m, r, view) for _, view in calls), f"declares {r} in `needs` and never reads it")


def stumbles(m: Metric | Edit, r: Reduction, view: View) -> bool:
    """Whether it fails when one of its reductions is missing."""
    try:
        if isinstance(m, Metric):
            measured(m, [view], without=r)
        else:
            output(Without(m, r), view)
    except (BadInput, KeyError):
        return True
    return False


@dataclass(frozen=True)
class Without(Edit):
    """An edit that is not told one of the facts that it asked for."""

    inner: Edit
    missing: Reduction

    def needs(self) -> tuple[Reduction, ...]:
        return tuple(r for r in self.inner.needs() if r != self.missing)

    def edit_scores(self, block: Any, scores: Tensor) -> Tensor:
        return self.inner.edit_scores(block, scores)

    def edit(self, block: Any, weights: Tensor) -> Tensor:
        return self.inner.edit(block, weights)


@check(Metric)
def card_needs(m: Metric) -> None:
    """What the card does not name has no influence: values, tokens, weights of the model."""
    other = views.view("causal", seed=1)
    for name, view in grid(m, ["causal", "odd_length"]):
        plain = measured(m, [view])
        assert view.tokens is not None
        assert other.projection is not None
        if not m.card.needs & Needs.VALUES:
            same(
                measured(m, [replace(view, v=view.v.flip(2) + 1)]),
                plain,
                f"{name}: card.needs has no VALUES, they matter",
            )
        if not m.card.needs & Needs.TOKENS:
            changed = replace(view, tokens=view.tokens // 2)
            same(measured(m, [changed]), plain, f"{name}: card.needs has no TOKENS, they matter")
        if not m.card.needs & Needs.MODEL:
            changed = replace(view, projection=other.projection * 2)
            same(measured(m, [changed]), plain, f"{name}: card.needs has no MODEL, the projection matters")


# ---------------------------------------------------------------- one truth, many ways to it


@check(*ATTACHED)
def reference(m: Mechanism) -> None:
    """Every way of the row engine gives what the dense form in float64 gives."""
    for name, view in grid(m, VARIED):
        options = {"all_rows": False} if isinstance(m, Metric) else {}
        truth = numbers(m, view, engine="reference", dtype=torch.float64, **options)
        for engine in ("blocks", "fused", "native"):
            if engine == "blocks" or (isinstance(m, Metric) and not REFUSALS[engine](view, streamed(m))):
                same(
                    numbers(m, view, engine=engine, **options),
                    truth,
                    f"{name}, engine {engine!r} against the reference",
                )


def streamed(m: Metric) -> list[Reduction]:
    return [r for r in m.needs() if r.axis != "sample"]


@check(*ACTING)
def gradients(m: Mechanism) -> None:
    """The derivative of the head outputs is the one that finite differences give."""
    for name, base in grid(m, ["causal", "left_padded", "soft_cap"]):
        view = replace(base, **{n: getattr(base, n).double() for n in ("q", "k", "v")})
        rng = torch.Generator().manual_seed(3)
        directions = {
            n: torch.randn(getattr(view, n).shape, generator=rng, dtype=torch.float64) for n in ("q", "k", "v")
        }
        weigh = torch.randn(output(m, view).shape, generator=rng, dtype=torch.float64)
        weigh = weigh * view.mask.rows[:, None, :, None]

        def loss(call: View, weigh: Tensor = weigh) -> Tensor:
            return (output(m, call) * weigh).sum()

        leaves = {n: getattr(view, n).clone().requires_grad_() for n in directions}
        got = torch.autograd.grad(loss(replace(view, **leaves)), list(leaves.values()), allow_unused=True)
        step = 1e-5
        for n, g in zip(leaves, got, strict=True):
            expect(g is None or bool(g.isfinite().all()), f"{name}: the gradient of {n} is not finite")
            ends = [loss(replace(view, **{n: getattr(view, n) + s * step * directions[n]})) for s in (1, -1)]
            want = float(ends[0] - ends[1]) / (2 * step)
            found = 0.0 if g is None else float((g * directions[n]).sum())
            close = abs(found - want) <= 1e-3 * max(1.0, abs(want))
            expect(close, f"{name}: the derivative along {n} is {found:.6g}, finite differences say {want:.6g}")


@check(*ATTACHED)
def repeatable(m: Mechanism) -> None:
    """The same input gives the same numbers, whatever the global random state."""
    for name, view in grid(m, ["causal", "left_padded", "odd_length"]):
        found = []
        with torch.random.fork_rng(devices=[]):
            for seed in (0, 1):
                torch.manual_seed(seed)
                found.append(numbers(m, view))
        same(found[1], found[0], f"{name}, the second time", tolerance=0.0)


@check(*ATTACHED)
def grouped(m: Mechanism) -> None:
    """Grouped heads give what repeated key-value heads give."""
    for name, view in grid(m, ["causal", "multi_query", "left_padded", "sinks", "cross"]):
        same(numbers(m, view), numbers(m, views.repeated(view)), f"{name}, grouped against repeated heads")


@check(*ATTACHED)
def dtypes(m: Mechanism) -> None:
    """bfloat16 gives nearly what the same numbers in float32 give."""
    for name, view in grid(m, ["bfloat16"]):
        wide = replace(view, q=view.q.float(), k=view.k.float(), v=view.v.float())
        same(numbers(m, view), numbers(m, wide), f"{name} against float32", tolerance=0.03, bounds=False)


# ---------------------------------------------------------------- nothing leaks


@check(*ATTACHED)
def padding(m: Mechanism) -> None:
    """A padded row gives what the same row gives alone: in one prefill, in chunks, and decoded."""
    for name, mask in {
        "left_padded": views.with_mask(left=(6,)),
        "right_padded": views.with_mask(right=(6,)),
        "full_right_padded": views.with_mask(causal=False, right=(6,)),
        "sinks_window_padded": views.with_mask(left=(6,), window=5),
    }.items():
        view = views.view(name, batch=1, queries=22, keys=22, mask=mask)
        if not readable(m, view):
            continue
        left = "right" not in name
        single = views.alone(view, 0, 6, 22) if left else views.alone(view, 0, 0, 16)
        want = numbers(m, single)
        same(trimmed(numbers(m, view), view, single), trimmed(want, single, single), f"{name}, against the row alone")
        if view.mask.causal:
            cuts = [(0, 10), (10, 16), (16, 22)]
            chunks = [views.chunk(view, a, b) for a, b in cuts]
            same(numbers(m, *chunks), want, f"{name}, chunked, against the row alone", bounds=False)
        if left and not sampled(m):
            steps = [views.chunk(view, 0, 18), *(views.chunk(view, i, i + 1) for i in range(18, 22))]
            same(numbers(m, *steps), want, f"{name}, decoded, against the row alone", bounds=False)


def trimmed(found: Numbers, view: View, single: View) -> Numbers:
    """Numbers per key cut to the keys of the row alone: bidirectional padding always stands behind it."""
    if view.mask.causal:
        return found
    return {label: x[:, : single.keys] if "(per key" in label else x for label, x in found.items()}


def sampled(m: Mechanism) -> bool:
    """Whether it looks at pairs of rows, which single decoded rows do not have."""
    return isinstance(m, Metric) and any(isinstance(r, Sample) for r in m.needs())


@check(*ATTACHED)
def batch(m: Mechanism) -> None:
    """Other rows of the batch change nothing."""
    for name, view in grid(m, ["causal", "window", "full"]):
        one = entry(view)
        want = numbers(m, one)
        beside = together(one, views.view(name, seed=1, batch=1), seen=False)
        same(numbers(m, beside), want, f"{name}, beside a row that is all padding")
        if isinstance(m, Metric):
            same(numbers(m, together(one, one)), want, f"{name}, beside itself", bounds=False)
        pair = [together(one, views.view(name, seed=seed, batch=1)) for seed in (1, 2)]
        if isinstance(m, RowMetric):
            a, b = (first_entry(m, rows_of(m, two_layers(call)[1])) for call in pair)
            same(a, b, f"{name}, rows beside another text")
        elif not isinstance(m, Metric):
            a, b = ({"head outputs": output(m, call)[0]} for call in pair)
            same(a, b, f"{name}, rows beside another text")


def entry(view: View) -> View:
    """The first batch entry."""
    whole = mask_of(view)
    begin = None if whole.begin is None else whole.begin[:1]
    mask = replace(whole, low=whole.low[:1], high=whole.high[:1], begin=begin, valid=None)
    tokens = None if view.tokens is None else view.tokens[:1]
    return replace(view, q=view.q[:1], k=view.k[:1], v=view.v[:1], mask=mask, tokens=tokens)


def together(one: View, other: View, seen: bool = True) -> View:
    """Two batches of one in one; the other may be all padding, full of garbage."""
    mask = mask_of(one)
    low, high = (torch.cat([t, t if seen else torch.zeros_like(t)]) for t in (mask.low, mask.high))
    valid = None if seen else torch.tensor([[True], [False]]).expand(-1, one.queries)
    begin = None if mask.begin is None else mask.begin.expand(2)
    mask = replace(mask, low=low, high=high, begin=begin, valid=valid)
    joined: dict[str, Any] = {n: torch.cat([getattr(one, n), getattr(other, n)[:1]]) for n in ("q", "k", "v", "tokens")}
    view = replace(one, mask=mask, **joined)
    return view if seen else views.poisoned(view)


def first_entry(m: RowMetric, rows: Rows) -> Numbers:
    """The numbers of the counted rows of the first batch entry."""
    counted: Bool[Tensor, " query"] = m.counted(rows)[0]
    return {label: x[0][:, counted] for label, x in m.per_row(rows).items()}


@check(*ATTACHED)
def causal(m: Mechanism) -> None:
    """What comes later in a causal text has no influence on earlier rows."""
    for name in ("causal", "window", "sinks"):
        mask = views.with_mask(window=5) if name == "window" else views.with_mask()
        first, other = (views.view(name, seed=seed, mask=mask, queries=22, keys=22) for seed in (0, 1))
        if not readable(m, first):
            continue
        real = torch.arange(22).expand(2, -1) < 14
        first.mask = replace(mask_of(first), valid=real)
        late = {n: ~real if n == "tokens" else ~real[:, None, :, None] for n in ("q", "k", "v", "tokens")}
        new: dict[str, Any] = {n: torch.where(at, getattr(other, n), getattr(first, n)) for n, at in late.items()}
        changed = replace(first, **new)
        a, b = (
            {label: x[:, :14] if "(per key" in label else x for label, x in numbers(m, call).items()}
            for call in (changed, first)
        )
        same(a, b, f"{name}, rows 0 to 13 with other rows after them")


@check(*ATTACHED)
def poison(m: Mechanism) -> None:
    """Garbage where nobody may look does not come through."""
    for name, view in grid(
        m, ["left_padded", "right_padded", "full_right_padded", "empty_rows", "sinks_empty_rows", "cross"]
    ):
        # not by sdpa, which is called as the model would have called it, and as little proof against NaN
        clean = numbers(m, view, engine="blocks")
        dirty = views.poisoned(view)
        if view.tokens is not None:
            unseen = dirty.k.isnan().all(-1).all(1)
            dirty.tokens = torch.where(unseen, (view.tokens + 1) % views.WORDS, view.tokens)
        for engine in ("blocks", "native"):
            if engine == "blocks" or (isinstance(m, Metric) and not REFUSALS[engine](view, streamed(m))):
                same(numbers(m, dirty, engine=engine), clean, f"{name}, with NaN behind the mask, engine {engine!r}")


@check(Metric)
def observing(m: Metric) -> None:
    """Looking changes nothing: head outputs are those of plain attention, and nothing that is read is written to."""
    for name, view in grid(m, ["causal", "left_padded", "sinks", "soft_cap", "cross"]):
        plain = attend_rows(view, engine="reference", dtype=torch.float64).out
        call = two_layers(view)[1]
        rows = rows_of(m, call)
        watched = {"out": rows.out, "q": call.q, "k": call.k, "v": call.v}
        watched |= {str(r): x.weights if isinstance(x, Sampled) else x for r, x in rows.values.items()}
        copies = {n: x.clone() for n, x in watched.items()}
        m.result(m.update(m.start(call.layer), rows))
        for n, x in watched.items():
            expect(torch.equal(x.nan_to_num(), copies[n].nan_to_num()), f"{name}: `update` writes to {n}")
        same({"head outputs": rows.out}, {"head outputs": plain}, f"{name}, observed against plain attention")


# ---------------------------------------------------------------- however the rows come in


@check(*ATTACHED)
def chunks(m: Mechanism) -> None:
    """A text read in chunks gives what one prefill gives."""
    for name, whole in grid(m, ["causal", "window", "sinks", "soft_cap", "multi_query"]):
        view = views.chunk(entry(whole), 0, 22)
        cuts = [views.chunk(view, a, b) for a, b in ((0, 8), (8, 14), (14, 22))]
        same(numbers(m, *cuts), numbers(m, view), f"{name}, three chunks against one prefill", bounds=False)


@check(*ATTACHED)
def decode(m: Mechanism) -> None:
    """A text decoded token by token gives what one prefill gives."""
    for name, whole in grid(m, ["causal", "window", "sinks", "soft_cap"]):
        view = views.chunk(entry(whole), 0, 22)
        # single rows make no pairs: of a sample, only that it works can be asked
        last = 11 if sampled(m) else 22
        steps = [views.chunk(view, 0, 8), *(views.chunk(view, i, i + 1) for i in range(8, last))]
        found = numbers(m, *steps)
        if not sampled(m):
            same(found, numbers(m, view), f"{name}, token by token against one prefill", bounds=False)


@check(*ATTACHED)
def lengths(m: Mechanism) -> None:
    """Any length works, and so do rows that see nothing; long texts give numbers."""
    odd = [
        "length_1",
        "length_2",
        "odd_length",
        "empty_rows",
        "all_masked",
        "decode",
        "sliding_cache",
        "packed",
        "long",
    ]
    for name, view in grid(m, odd):
        found = numbers(m, view)
        for label, x in found.items():
            expect(not bool(x.isinf().any()), f"{name}: {label} is infinite")
        if isinstance(m, Metric):
            shaped(found, view.heads, name)
        else:
            # also those of rows that see nothing
            expect(bool(output(m, view).isfinite().all()), f"{name}: head outputs are not finite")
        if name == "long":
            expect(any(bool(x.isfinite().any()) for x in found.values()), f"{name}: all {len(found)} numbers are NaN")


def shaped(found: Numbers, heads: int, name: str) -> None:
    """One number per head, inside of its interval."""
    for label, value in found.items():
        if "(value" not in label:
            continue
        expect(
            tuple(value.shape) == (heads,), f"{name}: {label} has shape {tuple(value.shape)}, not one number per head"
        )
        low, high = (found[label.replace("(value", f"({side}")] for side in ("low", "high"))
        within = (low.isnan() & high.isnan()) | ((low <= value + 1e-12) & (value <= high + 1e-12))
        expect(bool(within.all()), f"{name}: {label} lies outside of its interval")


# ---------------------------------------------------------------- those that act


@check(*ACTING)
def identity(m: Mechanism) -> None:
    """At the declared setting it changes nothing."""
    if m.identity is None:
        return
    nothing = replace(m, **m.identity)
    for name, view in grid(m, views.situations(without="long bfloat16")):
        same(
            acted(nothing, [view]), acted(HeadPass(), [view]), f"{name}, at {m.identity} against plain attention", 1e-5
        )


@dataclass(frozen=True)
class HeadPass(HeadEdit):
    """Changes nothing."""

    def edit(self, rows: Rows, out: Tensor) -> Tensor:
        return out


@check(*ACTING)
def landing(m: Mechanism) -> None:
    """It moves the head outputs, unless this is the setting at which it does not."""
    if m.identity is not None and m == replace(m, **m.identity):
        return
    moved = 0.0
    for _, view in grid(m, ["causal", "long", "left_padded"]):
        ends = output(m, view, engine="blocks"), output(None, view, engine="blocks")
        moved = max(moved, float((ends[0] - ends[1]).abs().max()))
    expect(moved > 1e-5, f"the head outputs move by {moved:.3g}: it does not land")


@check(*ATTACHED)
def detaching(m: Mechanism) -> None:
    """On a model: it runs, and leaving the context restores the logits bit for bit."""
    model = tiny.model("llama")
    batch_ = tiny.inputs("llama", padding="left", length=24)
    with torch.no_grad():
        before = model(**batch_).logits
        with attach(model, m) as attached:
            inside = model(**batch_).logits
        after = model(**batch_).logits
    expect(torch.equal(before, after), f"logits differ by {float((before - after).abs().max()):.3g} after detaching")
    real = batch_["attention_mask"].bool()
    expect(bool(inside[real].isfinite().all()), "logits of real tokens are not finite while attached")
    if isinstance(m, Metric):
        expect(bool(torch.allclose(before[real], inside[real], atol=1e-3)), "a metric changes the logits")
        expect(set(attached.results.heads.layer) == {0, 1}, "it has no results for some layer of a llama")


@check(Pattern)
def full(m: Pattern) -> None:
    """Its table has a place for every block, and visiting all of them is plain attention."""
    for name, view in grid(m, views.situations(without="long")):
        visits = m.select(view)
        want = (-(-view.queries // visits.rows), -(-view.keys // visits.keys))
        got = tuple(visits.table.shape[-2:])
        expect(got == want, f"{name}: a table of {got} for {want} row and key blocks")
        everything = Visits(torch.ones_like(visits.table), visits.rows, visits.keys)
        out = attend_rows(view, pattern=lambda _, v=everything: v).out
        same({"head outputs": out}, {"head outputs": output(None, view)}, f"{name}, full pattern against dense", 0.01)


# ---------------------------------------------------------------- those that run the model themselves


@check(ModelMetric)
def table(m: ModelMetric) -> None:
    """Its table has the columns of all tables, one row per layer, head and label, and the same numbers each time."""
    model, tokenizer = tiny.model("llama", max_position_embeddings=1 << 14), tiny.tokenizer()
    before = {n: p.clone() for n, p in model.named_parameters()}
    found, again = (m.measure(model, tokenizer) for _ in range(2))
    expect(list(found.columns) == COLUMNS, f"columns {list(found.columns)}, not {COLUMNS}")
    expect(len(found) > 0, "the table is empty")
    wrong = sorted({label for label in found.metric if not label.startswith(m.name)})
    expect(not wrong, f"labels {wrong} do not begin with {m.name!r}")
    twice = found.duplicated(["layer", "head", "metric"])
    expect(not twice.any(), f"{int(twice.sum())} rows of layer, head and metric stand there twice")
    inside = found.low.isna() | ((found.low <= found.value + 1e-12) & (found.value <= found.high + 1e-12))
    expect(bool(inside.all()), "values lie outside of their intervals")
    expect(found.equals(again), "the second run gives other numbers")
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    expect(not moved, f"it changes the model's weights: {moved[:3]}")
