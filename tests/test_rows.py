"""The row engine: five ways to one set of numbers, in values and gradients, and the definition of each reduction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from foveate.core import fused, native, onepass
from foveate.core.card import Card, Needs
from foveate.core.errors import BadInput, BadParameter, NotSupported
from foveate.core.mask import Mask
from foveate.core.mechanism import Edit, Tilt, Visits
from foveate.core.reductions import ColumnMass, Distance, Match, OnKeys, Reduction, RowEntropy, Sample, Within
from foveate.core.rows import REFUSALS, RowBlock, View, attend
from foveate.core.rule import Rule
from foveate.testing import views

SPANS = ((0, 3), (3, 20), (2, 1000))
LINKS = ("self", "previous", "first", "token", "follower")
REDUCTIONS: tuple[Reduction, ...] = (
    RowEntropy(),
    Distance(),
    Within(0),
    Within(3),
    Within(100),
    *(Match(link) for link in LINKS),
    OnKeys(SPANS),
    ColumnMass(),
)
BUILT = pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason="the kernel was not built"))
ENGINES = ("reference", "blocks", "fused", BUILT, "auto")


def readable(view: View) -> tuple[Reduction, ...]:
    """The reductions that have a meaning on this call."""
    words = view.tokens is not None
    return tuple(
        r
        for r in REDUCTIONS
        if not (view.layer.cross and r.one_sequence) and (words or getattr(r, "link", "") not in ("token", "follower"))
    )


@dataclass
class ByHand:
    """Attention and its statistics as a textbook writes them: dense, float64, no code shared with the engine."""

    view: View

    def __post_init__(self) -> None:
        view, mask = self.view, self.view.mask
        self.heads, self.keys = view.heads, torch.arange(view.keys)
        q, k, v = (t.double() for t in (view.q, view.k, view.v))
        k, v = (t.repeat_interleave(view.heads // view.kv_heads, 1) for t in (k, v))
        if mask.dense is None:
            self.seen = (self.keys >= mask.low[..., None]) & (self.keys < mask.high[..., None])
        else:
            self.seen = mask.dense(0, view.queries, 0, view.keys)[:, 0] == 0
        self.seen = self.seen.expand(view.batch, -1, -1)
        s = view.scale * torch.einsum("bhid,bhjd->bhij", q, k)
        if view.softcap:
            s = view.softcap * torch.tanh(s / view.softcap)
        if view.bias is not None:
            s = s + view.bias.double()
        e = torch.where(self.seen[:, None], s.exp(), 0.0)
        total = e.sum(-1, keepdim=True)
        if view.sinks is not None:
            total = total + view.sinks.double().exp()[None, :, None, None]
        # a row that sees nothing has weights of zero, whatever its sink says
        empty = (e.sum(-1, keepdim=True) == 0).expand_as(e)
        self.p = torch.where(empty, 0.0, e / torch.where(total == 0, 1.0, total))
        self.out = torch.einsum("bhij,bhjd->bhid", self.p, v)
        self.i = mask.position

    def of(self, r: Reduction) -> torch.Tensor:
        p, gap = self.p, (self.i[:, None] - self.keys).abs()
        if isinstance(r, RowEntropy):
            return -(p * p.clamp_min(1e-300).log()).sum(-1)
        if isinstance(r, Distance):
            return (p * gap).sum(-1)
        if isinstance(r, Within):
            return (p * (gap <= r.width)).sum(-1)
        if isinstance(r, OnKeys):
            real = self.keys + self.view.mask.key_offset
            return torch.stack([p[..., (real >= a) & (real < b)].sum(-1) for a, b in r.spans], -1)
        if isinstance(r, ColumnMass):
            valid = self.view.mask.valid
            real = p if valid is None else p * valid[:, None, :, None]
            return real.sum(-2)
        return (p * self.linked(r.link)[:, None]).sum(-1)

    def linked(self, link: str) -> torch.Tensor:
        batch, rows, keys = self.seen.shape
        same = torch.zeros(batch, rows, keys, dtype=torch.bool)
        for b in range(batch):
            for row in range(rows):
                i = int(self.i[row])
                for j in range(keys):
                    same[b, row, j] = self.pair(link, b, row, i, j)
        return same

    def pair(self, link: str, b: int, row: int, i: int, j: int) -> bool:
        if link == "self":
            return i == j
        if link == "previous":
            return i == j + 1
        if link == "first":
            return int(self.view.mask.starts.expand(len(self.seen), -1)[b, row]) == j
        words = self.view.tokens[b]
        if link == "token":
            return bool(words[i] == words[j])
        opens = self.view.mask.starts.expand(len(self.seen), -1)[b].tolist()
        return j > 0 and j not in opens and bool(words[i] == words[j - 1])


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 2e-5) -> None:
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)


def real(view: View, r: Reduction, value: torch.Tensor) -> torch.Tensor:
    """Without the rows of padded queries, which are part of nobody's text."""
    if r.axis == "column" or view.mask.valid is None:
        return value
    return value.movedim(1, 2)[view.mask.valid.expand(view.batch, -1)]


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("situation", views.situations())
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_agree_with_the_textbook(engine: str, situation: str) -> None:
    view = views.view(situation)
    wanted = (
        readable(view) if view.queries < 100 else (RowEntropy(), Distance(), Within(3), OnKeys(SPANS), ColumnMass())
    )
    if engine in REFUSALS and REFUSALS[engine](view, wanted):
        with pytest.raises(NotSupported, match=engine):
            attend(view, wanted, engine=engine)
        return
    rows = attend(view, wanted, engine=engine, dtype=torch.float64 if engine == "reference" else None)
    truth = ByHand(view)
    close(rows.out, truth.out.to(view.q.dtype), 1e-2 if view.q.dtype == torch.bfloat16 else 2e-5)
    for r in wanted:
        scale = view.keys if isinstance(r, Distance | ColumnMass) else 1
        close(real(view, r, rows[r]) / scale, real(view, r, truth.of(r)) / scale)


@pytest.mark.parametrize("situation", views.situations())
def test_sdpa_is_the_same_attention(situation: str) -> None:
    view = views.view(situation)
    if reason := REFUSALS["sdpa"](view, ()):
        pytest.skip(reason)
    rows = attend(view, engine="sdpa")
    close(rows.out, ByHand(view).out.to(view.q.dtype), 1e-2 if view.q.dtype == torch.bfloat16 else 2e-5)


@pytest.mark.parametrize("situation", views.situations(without="long"))
@pytest.mark.parametrize("block", [1, 4, 16])
def test_any_block_size_gives_the_same(situation: str, block: int) -> None:
    view = views.view(situation)
    wanted = readable(view)
    small, whole = (attend(view, wanted, engine="blocks", block=b) for b in (block, 1000))
    close(small.out, whole.out, 1e-2 if view.q.dtype == torch.bfloat16 else 1e-5)
    for r in wanted:
        close(small[r], whole[r])


@pytest.mark.parametrize("situation", ["left_padded", "right_padded", "empty_rows", "sinks_empty_rows", "cross"])
@pytest.mark.parametrize("engine", ENGINES)
def test_garbage_behind_the_mask_stays_there(engine: str, situation: str) -> None:
    clean = views.view(situation)
    wanted = readable(clean)
    for value in (float("nan"), float("inf"), 1e30):
        a, b = (attend(v, wanted, engine=engine) for v in (clean, views.poisoned(clean, value)))
        close(b.out, a.out)
        for r in wanted:
            close(real(clean, r, b[r]), real(clean, r, a[r]))


@pytest.mark.parametrize("engine", ENGINES)
def test_padded_queries_may_be_garbage(engine: str) -> None:
    """Queries behind the text see it, so their own rows are garbage, but nobody else's and no column is."""
    clean = views.view("right_padded")
    pad = ~clean.mask.valid[:, None, :, None]
    dirty = replace(clean, q=clean.q.masked_fill(pad, float("nan")))
    wanted = (RowEntropy(), ColumnMass(), OnKeys(SPANS))
    a, b = (attend(v, wanted, engine=engine) for v in (clean, dirty))
    close(b[ColumnMass()], a[ColumnMass()])
    real = clean.mask.valid[:, None].expand(-1, clean.heads, -1)
    close(b.out[real], a.out[real])
    close(b[RowEntropy()][real], a[RowEntropy()][real])


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_of_learned_sinks_sum_to_less_than_one(engine: str) -> None:
    view = views.view("sinks")
    everywhere = OnKeys(((0, view.keys),))
    rows = attend(view, [everywhere], engine=engine)
    assert rows[everywhere].max() < 1
    assert rows[everywhere].mean() < 0.95


def test_long_rows_keep_their_digits() -> None:
    """Positions up to a few thousand are where float32 columns would lose the distance."""
    view = views.view("causal", queries=3000, keys=3000, batch=1, heads=1, kv_heads=1, spread=6.0)
    truth = attend(view, [Distance(), RowEntropy()], engine="reference", dtype=torch.float64)
    for engine in ("blocks", "fused", "native"):
        if REFUSALS.get(engine, lambda *_: "")(view, ()):
            continue
        rows = attend(view, [Distance(), RowEntropy()], engine=engine)
        assert (rows[Distance()] - truth[Distance()]).abs().max() < 0.02
        assert (rows[RowEntropy()] - truth[RowEntropy()]).abs().max() < 1e-4


# ---------------------------------------------------------------- gradients


def differentiable(situation: str, dtype: torch.dtype = torch.float64) -> View:
    """A call whose queries, keys, values, sinks and bias ask for gradients."""
    view = views.view(situation, dtype=dtype)
    leaves = {n: getattr(view, n) for n in ("q", "k", "v", "sinks", "bias")}
    return replace(view, **{n: None if t is None else t.to(dtype).requires_grad_() for n, t in leaves.items()})


def gradients(view: View, loss: torch.Tensor) -> list[torch.Tensor]:
    leaves = [t for t in (view.q, view.k, view.v, view.sinks, view.bias) if t is not None]
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def a_loss(out: torch.Tensor, values: list[torch.Tensor]) -> torch.Tensor:
    """Weighs every number differently, so that no two errors cancel."""
    total = 0.0
    for n, t in enumerate([out, *values]):
        weight = torch.linspace(-1, 1, t.numel(), dtype=torch.float64).view(t.shape) + 0.1 * n
        total = total + (t.double() * weight).sum()
    return total


@pytest.mark.parametrize("situation", views.situations(without="long bfloat16 all_masked"))
def test_gradients_equal_the_textbook(situation: str) -> None:
    wanted = (Distance(), Within(3), OnKeys(SPANS), ColumnMass())
    view = differentiable(situation)
    wanted = tuple(r for r in wanted if r in readable(view))
    rows = attend(view, wanted, block=4)
    assert rows.engine == "blocks"
    got = gradients(view, a_loss(rows.out, [rows[r] for r in wanted]))
    truth = ByHand(view)
    want = gradients(view, a_loss(truth.out, [truth.of(r) for r in wanted]))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("situation", ["causal", "left_padded", "empty_rows", "sinks_empty_rows", "soft_cap"])
def test_entropy_has_finite_gradients(situation: str) -> None:
    """The weight 0 of a masked key is where the derivative of p ln p is infinite."""
    view = differentiable(situation)
    grads = gradients(view, attend(view, [RowEntropy()])[RowEntropy()].sum())
    for g in grads:
        assert g.isfinite().all()
    truth = ByHand(view)
    p = torch.where(truth.p > 0, truth.p, 1.0)
    for a, b in zip(grads, gradients(view, -(p * p.log()).sum()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_gradcheck_of_one_small_call() -> None:
    view = differentiable("left_padded_window")

    def outputs(q, k, v):
        rows = attend(replace(view, q=q, k=k, v=v), [Within(2), ColumnMass()], block=5)
        return rows.out, rows[Within(2)], rows[ColumnMass()]

    small = [t.detach()[:, :, :].requires_grad_() for t in (view.q, view.k, view.v)]
    assert torch.autograd.gradcheck(outputs, small, fast_mode=True)


@pytest.mark.parametrize("situation", views.situations(without="bias scattered soft_cap long bfloat16"))
def test_gradients_of_closed_forms_equal_the_textbook(situation: str) -> None:
    """In float32, and with garbage where nobody looks."""
    wanted = (RowEntropy(), Distance(), Within(3), OnKeys(SPANS), Match("previous"), Match("self"))
    view = differentiable(situation, torch.float32)
    wanted = tuple(r for r in wanted if r in readable(view))
    rows = attend(view, wanted)
    assert rows.engine == "fused"
    got = gradients(view, a_loss(rows.out, [rows[r] for r in wanted]))
    truth = ByHand(view)
    want = gradients(view, a_loss(truth.out, [truth.of(r) for r in wanted]))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * max(1.0, float(b.abs().amax())))
    worse = views.poisoned(views.view(situation))
    worse.q.requires_grad_()
    rows = attend(worse, wanted)
    (found,) = torch.autograd.grad(a_loss(rows.out, [rows[r] for r in wanted]), worse.q)
    real = view.mask.rows.expand(view.batch, -1)
    torch.testing.assert_close(found.movedim(1, 2)[real], got[0].movedim(1, 2)[real], rtol=1e-3, atol=1e-3)


def test_fast_ways_refuse_gradients() -> None:
    view = differentiable("causal", torch.float32)
    for engine, one in (("native", RowEntropy()), ("fused", ColumnMass()), ("fused", Match("token"))):
        with pytest.raises(NotSupported, match=r"gradients|kernel was not built"):
            attend(view, [one], engine=engine)
        assert attend(view, [ColumnMass()]).engine == "blocks"
        with torch.no_grad():
            assert attend(view, [one]).engine != "blocks"


@dataclass(frozen=True)
class Spread(Reduction):
    """How many keys the block of a row has."""

    def of_block(self, block: RowBlock) -> torch.Tensor:
        WIDTHS.append(block.last - block.first)
        return block.weights.sum(-1)


WIDTHS: list[int] = []


def test_blocks_come_from_the_largest_to_the_smallest() -> None:
    """Memory that a block leaves free holds the next one; growing ones would each take more of it."""
    WIDTHS.clear()
    view = views.view("causal")
    rows = attend(view, [Spread()], block=4)
    assert len(WIDTHS) > 2 and sorted(WIDTHS, reverse=True) == WIDTHS
    torch.testing.assert_close(rows.out, attend(view, engine="reference").out, rtol=1e-4, atol=1e-5)


def test_backward_keeps_no_square_of_weights() -> None:
    long = views.view("causal", queries=256, keys=256, batch=1)
    long = replace(long, q=long.q.requires_grad_())
    kept: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        # every block keeps the same inputs, which costs nothing
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        rows = attend(long, [RowEntropy(), ColumnMass()], block=16)
        loss = rows.out.sum() + rows[RowEntropy()].sum()
    assert kept
    assert max(kept.values()) < 16 * 256 * long.heads, "a block of weights was kept"
    assert sum(kept.values()) < 256 * 256, "all blocks together hold N x N"
    loss.backward()
    assert long.q.grad.isfinite().all()


# ---------------------------------------------------------------- sdpa, and nothing else


class Counter(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_nothing_observed_is_one_call_of_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    view = views.view("causal", dtype=torch.float32)
    assert view.mask.plain == "causal"
    with Counter() as ours:
        rows = attend(view)
    assert rows.engine == "sdpa"
    assert len(calls) == 1
    assert calls[0]["attn_mask"] is None
    with Counter() as theirs:
        expected = real(view.q, view.k, view.v, is_causal=True, scale=view.scale, enable_gqa=True)
    assert ours.seen == theirs.seen
    assert torch.equal(rows.out, expected)


@pytest.mark.parametrize("situation", ["causal", "full", "decode", "length_1", "multi_head"])
def test_plain_calls_need_no_mask_tensor(situation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("a mask tensor was made")

    view = views.view(situation)
    monkeypatch.setattr(Mask, "additive", forbidden)
    assert attend(view).engine == "sdpa"


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("engine", "situation", "asked", "words"),
    [
        ("sdpa", "causal", [RowEntropy()], "needs the rows"),
        ("sdpa", "soft_cap", [], "soft cap"),
        ("sdpa", "sinks", [], "learned sinks"),
        ("fused", "soft_cap", [RowEntropy()], "soft cap"),
        ("fused", "bias", [RowEntropy()], "bias"),
        ("fused", "scattered", [RowEntropy()], "interval"),
        ("native", "bias", [RowEntropy()], "bias|compiler"),
    ],
)
def test_refusals_say_why(engine: str, situation: str, asked: list, words: str) -> None:
    with pytest.raises(NotSupported, match=words) as caught:
        attend(views.view(situation), asked, engine=engine)
    assert "'blocks'" in str(caught.value)


def test_edits_need_blocks() -> None:
    with pytest.raises(NotSupported, match="edits"):
        attend(views.view("causal"), edits=[Halved()], engine="fused")


def test_float64_is_not_for_fast_ways() -> None:
    with pytest.raises(NotSupported, match="float64"):
        attend(views.view("causal"), engine="fused", dtype=torch.float64)


def test_a_kernel_that_was_not_built_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    view = views.view("causal")
    assert "compiler" in onepass.refuses(view, [RowEntropy()])
    assert attend(view, [RowEntropy()]).engine == "fused"
    assert attend(views.view("soft_cap"), [RowEntropy()]).engine == "blocks"


def test_dropout_goes_through_blocks() -> None:
    view = replace(views.view("causal"), dropout=0.5)
    assert attend(view, [RowEntropy()]).engine == "blocks"
    assert "dropout" in fused.refuses(view, [])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(2, 3, 4)}, "batch, heads, length, dim"),
        ({"q": torch.zeros(2, 3, 5, 8)}, "multiple"),
        ({"v": torch.zeros(2, 2, 9, 8)}, "one length"),
        ({"q": torch.zeros(2, 4, 9, 8)}, "mask of"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_shapes_that_do_not_fit_are_refused(change: dict, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        replace(views.view("causal"), **change)


def test_what_was_not_asked_cannot_be_read() -> None:
    rows = attend(views.view("causal"), [RowEntropy()])
    with pytest.raises(BadInput, match=r"Distance.*needs"):
        rows[Distance()]


def test_token_links_need_tokens() -> None:
    view = replace(views.view("causal"), tokens=None)
    for engine in ("auto", "blocks"):
        with pytest.raises(BadInput, match="token ids"):
            attend(view, [Match("token")], engine=engine)


@pytest.mark.parametrize("make", [lambda: Within(-1), lambda: Match("next")])
@pytest.mark.usefixtures("unchecked")
def test_reductions_check_themselves(make) -> None:
    with pytest.raises(BadParameter, match="must be"):
        make()


# ---------------------------------------------------------------- samples and reductions of one's own


@pytest.mark.parametrize("situation", views.situations(cross=False))
@pytest.mark.parametrize("engine", ENGINES)
def test_samples_are_whole_rows(engine: str, situation: str) -> None:
    view = views.view(situation)
    if REFUSALS.get(engine, lambda *_: "")(view, ()):
        pytest.skip("refused")
    sample = Sample(5)
    got = attend(view, [sample], engine=engine)[sample]
    truth = ByHand(view)
    close(got.weights, truth.p[:, :, got.index])
    assert torch.equal(got.index, attend(view, [sample, Within(1)], engine="blocks")[sample].index)


@pytest.mark.parametrize("queries", [1, 2, 3, 10, 64, 1001])
def test_sample_places(queries: int) -> None:
    index = Sample(16, seed=3).index(queries)
    assert index.min() >= 0
    assert index.max() < queries
    assert torch.equal(index, Sample(16, seed=3).index(queries))
    if queries > 1:
        assert torch.equal(index[1::2] - index[::2], torch.ones_like(index[::2]))
        assert len(index) == 2 * min(16, queries // 2)
    if queries > 100:
        assert not torch.equal(index, Sample(16, seed=4).index(queries))
        assert (index[1::2].diff() > queries / 16 / 4).any(), "places are spread over the text"


@dataclass(frozen=True)
class Largest(Reduction):
    """The largest weight of a row: a reduction of a user's own, which only says what it is."""

    def of_block(self, block):
        return block.weights.amax(-1) if block.weights.shape[-1] else block.weights.new_zeros(block.weights.shape[:-1])


@dataclass(frozen=True)
class Hits(Reduction):
    """How many rows look at each key with more than a fifth of their mass."""

    axis: ClassVar = "column"

    def of_block(self, block):
        hits = (block.weights > 0.2).sum(-2)
        return torch.nn.functional.pad(hits, (block.first, block.view.mask.keys - block.last))


@pytest.mark.parametrize("situation", views.situations(without="long"))
def test_a_reduction_needs_only_of_block(situation: str) -> None:
    view = views.view(situation)
    rows = attend(view, [Largest(), Hits()], block=5)
    truth = ByHand(view)
    close(rows[Largest()], truth.p.amax(-1))
    close(rows[Hits()], (truth.p > 0.2).sum(-2))
    assert rows.engine == "blocks"


# ---------------------------------------------------------------- edits and patterns

A_CARD = Card("a test", 2026, "test", Needs.WEIGHTS, "p' = f(p)", "nothing known", "in tests")


@dataclass(frozen=True)
class Halved(Edit):
    """Halves all weights."""

    card: ClassVar = A_CARD

    def edit(self, block, weights):
        return weights / 2


@dataclass(frozen=True)
class Raised(Edit):
    """Adds to the scores of the first three keys."""

    by: float = 1.0
    card: ClassVar = A_CARD

    def edit_scores(self, block, scores):
        at = torch.arange(block.first, block.last)
        return scores + self.by * (at < 3)


@dataclass(frozen=True)
class ByColumn(Edit):
    """Scales each weight by the mass that its key receives, which a first pass must find out."""

    card: ClassVar = A_CARD

    def needs(self):
        return (ColumnMass(),)

    def edit(self, block, weights):
        mass = block.facts[ColumnMass()][..., block.first : block.last]
        return weights * mass[:, :, None]


@pytest.mark.parametrize("situation", views.situations(without="long"))
def test_edits_act_in_order(situation: str) -> None:
    view = views.view(situation)
    truth = ByHand(view)
    v = torch.where(truth.seen.any(1)[:, None, :, None], view.v.double().repeat_interleave(view.grouped, 1), 0.0)
    tolerance = 1e-2 if view.q.dtype == torch.bfloat16 else 2e-5

    halved = attend(view, [OnKeys(((0, 1000),))], edits=[Halved()], block=4)
    close(halved.out, (truth.out / 2).to(view.q.dtype), tolerance)
    close(halved[OnKeys(((0, 1000),))][..., 0], truth.of(OnKeys(((0, 1000),)))[..., 0] / 2)

    columns = attend(view, edits=[ByColumn()], block=4)
    column = truth.of(ColumnMass())
    close(columns.out, torch.einsum("bhij,bhj,bhjd->bhid", truth.p, column, v).to(view.q.dtype), tolerance)

    twice = attend(view, edits=[ByColumn(), Halved()], block=4)
    close(twice.out, columns.out / 2, tolerance)


def test_an_edit_of_scores_is_a_bias() -> None:
    view = views.view("left_padded")
    bias = torch.zeros(1, 1, view.queries, view.keys)
    bias[..., :3] = 0.7
    close(attend(view, edits=[Raised(0.7)], block=4).out, ByHand(replace(view, bias=bias)).out)


def test_the_first_pass_sees_the_unedited_rows() -> None:
    view = views.view("causal")
    first = attend(view, edits=[Halved(), ByColumn()]).out
    truth = ByHand(view)
    v = view.v.double().repeat_interleave(view.grouped, 1)
    close(first, torch.einsum("bhij,bhj,bhjd->bhid", truth.p / 2, truth.of(ColumnMass()), v))


def test_gradients_flow_through_edits() -> None:
    view = differentiable("causal")
    got = gradients(view, a_loss(attend(view, edits=[Raised(0.5), Halved()], block=4).out, []))
    bias = torch.zeros(1, 1, view.queries, view.keys, dtype=torch.float64)
    bias[..., :3] = 0.5
    want = gradients(view, a_loss(ByHand(replace(view, bias=bias)).out / 2, []))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("situation", views.situations(without="long scattered"))
@pytest.mark.parametrize("block", [3, 5, 16])
def test_patterns_visit_blocks_of_keys(situation: str, block: int) -> None:
    view = views.view(situation)
    rng = torch.Generator().manual_seed(5)
    table = torch.rand(1, view.heads, -(-view.queries // 4), -(-view.keys // 3), generator=rng) > 0.4
    # each row sees itself, for one that sees nothing is refused; padding may
    table[..., torch.arange(view.queries) // 4, view.mask.position // 3] = True
    rows = attend(view, [RowEntropy()], pattern=lambda _: Visits(table, 4, 3), block=block)
    visited = table.repeat_interleave(4, 2)[:, :, : view.queries].repeat_interleave(3, 3)[..., : view.keys]
    # a key that is not visited is a key with a bias of minus infinity
    minus = torch.zeros(visited.shape).masked_fill(~visited, -1e9)
    want = ByHand(replace(view, bias=minus if view.bias is None else view.bias + minus))
    unseen = (want.p.sum(-1) == 0)[..., None]
    close(
        rows.out, want.out.masked_fill(unseen, 0.0).to(view.q.dtype), 1e-2 if view.q.dtype == torch.bfloat16 else 2e-5
    )


def test_a_full_pattern_is_dense() -> None:
    view = views.view("left_padded")
    full = Visits(torch.ones(1, 1, 6, 6, dtype=torch.bool), 4, 4)
    close(attend(view, pattern=lambda _: full).out, attend(view).out)


def test_a_rule_of_ones_own_is_used() -> None:
    @dataclass(frozen=True)
    class Uniform(Rule):
        """All keys alike."""

        def score(self, block):
            return torch.zeros_like(super().score(block))

    view = views.view("causal")
    rows = attend(replace(view, rule=Uniform()), [RowEntropy()])
    # a subclass of softmax is no softmax: no fast way may be taken
    close(rows[RowEntropy()], torch.arange(1, view.keys + 1).log().expand_as(rows[RowEntropy()]))


def test_dropout_keeps_the_mean() -> None:
    view = views.view("causal", batch=1)
    plain = attend(view, engine="blocks").out
    with torch.random.fork_rng():
        torch.manual_seed(0)
        many = sum(attend(replace(view, dropout=0.3), engine="blocks").out for _ in range(600)) / 600
    assert (many - plain).abs().max() < 0.25
    assert (many - plain).abs().mean() < 0.03


# ---------------------------------------------------------------- tilts


@dataclass(frozen=True)
class Tilting(Edit):
    """A random factor and bias; some keys taken out, on all rows or on every third."""

    seed: int = 0
    out: bool = False
    thirds: bool = False
    per_head: bool = True

    def tilt(self, view: View) -> Tilt:
        rng = torch.Generator().manual_seed(self.seed)
        bias = torch.randn(1, view.heads if self.per_head else 1, view.keys, generator=rng)
        if self.out:
            bias = bias.masked_fill(bias > 0.8, -torch.inf)
        factor = 1 + torch.rand(1, view.heads, 1, generator=rng)
        rows = (torch.arange(view.queries) % 3 == 0)[None] if self.thirds else None
        return Tilt(factor, bias, rows)


@pytest.mark.parametrize("name", views.situations(without="bfloat16"))
@pytest.mark.parametrize("edit", [Tilting(), Tilting(out=True), Tilting(thirds=True), Tilting(per_head=False)])
def test_tilts_are_what_they_say_on_every_engine(name: str, edit: Tilting) -> None:
    view = views.view(name)
    tilt = edit.tilt(view)
    assert tilt.factor is not None
    assert tilt.bias is not None
    # by hand: the factor is on the product of queries and keys, in front of the soft cap and of the model's own bias
    call = replace(view, q=view.q * tilt.factor[..., None])
    s = attend(call, [Scores()], engine="blocks", dtype=torch.float64)[Scores()]
    bias = tilt.bias[:, :, None].double()
    s = s + (bias if tilt.rows is None else torch.where(tilt.rows[:, None, :, None], bias, 0.0))
    if view.sinks is None:
        p = s.softmax(-1).nan_to_num(0.0)
    else:
        sink = view.sinks.double()[None, :, None, None].expand(*s.shape[:3], 1)
        p = torch.cat([s, sink], -1).softmax(-1)[..., :-1]
        p = torch.where((s == -torch.inf).all(-1, keepdim=True), 0.0, p)
    want = p @ view.v.double().repeat_interleave(view.grouped, 1)
    entropy = torch.special.entr(p).sum(-1)
    real = view.mask.rows[:, None].expand(view.batch, view.heads, -1)
    for engine in ("auto", "reference", "blocks", "native"):
        if engine == "native" and REFUSALS["native"](replace(view, tilt=tilt), [RowEntropy()]):
            continue
        rows = attend(view, [RowEntropy()], edits=[edit], engine=engine)
        torch.testing.assert_close(rows.out[real].double(), want[real], atol=2e-4, rtol=0)
        torch.testing.assert_close(rows[RowEntropy()][real].double(), entropy[real], atol=1e-3, rtol=0)
    if not REFUSALS["sdpa"](replace(view, tilt=tilt), []):
        rows = attend(view, edits=[edit], engine="sdpa")
        torch.testing.assert_close(rows.out[real].double(), want[real], atol=2e-4, rtol=0)


@dataclass(frozen=True)
class Scores(Reduction):
    """Masked scores, whole."""

    def of_block(self, block: RowBlock) -> Tensor:
        return torch.nn.functional.pad(block.scores, (block.first, block.view.keys - block.last), value=-torch.inf)


def test_tilts_for_different_rows_add_up() -> None:
    view = views.view("causal")
    a, b = Tilting(thirds=True), Tilting(seed=1)
    got = attend(view, edits=[a, b]).out
    tilts = [e.tilt(view) for e in (a, b)]
    q = view.q * tilts[0].factor[..., None] * tilts[1].factor[..., None]
    both = tilts[1].bias[:, :, None] + torch.where(tilts[0].rows[:, None, :, None], tilts[0].bias[:, :, None], 0.0)
    want = attend(replace(view, q=q, bias=both), engine="blocks").out
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_a_tilt_takes_the_kernel_and_keeps_gradients() -> None:
    view = views.view("long")
    if native.available():
        assert attend(view, edits=[Tilting()]).engine == "native"
    bias = torch.zeros(1, 1, view.keys, requires_grad=True)

    @dataclass(frozen=True)
    class Given(Edit):
        """A bias that is learned."""

        def tilt(self, view: View) -> Tilt:
            return Tilt(bias=bias)

    attend(view, edits=[Given()]).out.square().sum().backward()
    assert bias.grad is not None
    assert bias.grad.abs().max() > 0
