"""The native kernel against a dense float64 reference."""

import math

import pytest
import torch
from torch import Tensor

from foveate.core import native

pytestmark = pytest.mark.skipif(
    not native.available(), reason="the native kernel is not built: python setup.py build_ext --inplace"
)

WITHIN = (3, 0, 40)
# of 65 keys of 16 channels, in two groups
CODES = torch.zeros(2, 2, 65, 16, dtype=torch.uint8), torch.zeros(2, 2, 65, 2, 2, dtype=torch.bfloat16)
ROW_FIELDS = ("out", "lse", "entropy", "distance", "within", "match", "extra")


def reference(
    q,
    k,
    v,
    *,
    scale,
    lo,
    hi,
    query_position,
    key_position,
    softcap=None,
    sinks=None,
    within=(),
    match=(),
    extra=None,
) -> dict[str, Tensor]:
    """Every quantity of `native.attend` from dense weights, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    share, keys = q.shape[1] // k.shape[1], torch.arange(k.shape[2])
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    seen = ((keys >= lo[..., None]) & (keys < hi[..., None]))[:, None]
    anyone = seen.any(2)[..., None].expand(k.shape[0], 1, -1, 1)
    k, v = k.masked_fill(~anyone, 0), v.masked_fill(~anyone, 0)
    s = scale * q @ k.mT
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~seen, -math.inf)
    logits = s
    if sinks is not None:
        logits = torch.cat([s, sinks.double()[None, :, None, None].expand(*s.shape[:3], 1)], -1)
    lse = logits.logsumexp(-1).masked_fill(~seen.any(-1), -math.inf)
    p = (s - lse[..., None]).exp().masked_fill(~seen, 0)
    surprise = (lse[..., None] - s).masked_fill(~seen, 0)
    far = (query_position[..., None] - key_position[:, None]).abs()[:, None].double()
    return {
        "out": p @ v,
        "lse": lse,
        "entropy": (p * surprise).sum(-1),
        "distance": (p * far).sum(-1),
        "within": torch.stack([(p * (far <= w)).sum(-1) for w in within]) if within else None,
        "match": torch.stack([(p * _same(a, b)[:, None]).sum(-1) for a, b in match]) if match else None,
        "extra": None if extra is None else p @ extra.double()[:, None],
        "column": p.sum(2),
    }


def _same(query_labels: Tensor, key_labels: Tensor) -> Tensor:
    return (query_labels[..., None] == key_labels[:, None]) & (query_labels[..., None] != -1)


def intervals(kind: str, batch: int, queries: int, keys: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    i = torch.arange(queries) + keys - queries
    zero, full = torch.zeros_like(i), torch.full_like(i, keys)
    random = torch.Generator().manual_seed(seed)
    if kind == "causal":
        lo, hi = zero, i + 1
    elif kind == "full":
        lo, hi = zero, full
    elif kind == "window":
        lo, hi = i - 16, i + 1
    elif kind == "two-sided window":
        lo, hi = i - 9, i + 12
    elif kind == "packed":
        starts = torch.tensor([0, keys // 5, keys // 5 + 1, keys // 2])
        lo = starts[torch.searchsorted(starts, i.clamp(min=0), right=True) - 1]
        hi = i + 1
    elif kind == "left-padded":
        lo = (torch.arange(batch) * keys // 3)[:, None].expand(batch, queries)
        hi = (i + 1).expand(batch, queries)
    elif kind == "right-padded":
        hi = torch.minimum(i + 1, keys - (torch.arange(batch) * keys // 3)[:, None])
        lo = zero.expand(batch, queries)
    elif kind == "random":
        lo = torch.randint(-3, keys + 1, (batch, queries), generator=random)
        hi = torch.randint(0, keys + 4, (batch, queries), generator=random)
    elif kind == "empty":
        lo, hi = full, zero
    return torch.broadcast_tensors(*(x.int().reshape(-1, queries) for x in (lo, hi)))


def inputs(
    kind="causal",
    batch=2,
    heads=4,
    groups=2,
    queries=65,
    keys=None,
    width=16,
    values=None,
    dtype=torch.float32,
) -> dict:
    keys, values = keys or queries, values or width
    torch.manual_seed(0)
    q = torch.randn(batch, queries, heads, width).to(dtype).transpose(1, 2)
    k = torch.randn(batch, keys, groups, width).to(dtype).transpose(1, 2)
    v = torch.randn(batch, keys, groups, values).to(dtype).transpose(1, 2)
    lo, hi = intervals(kind, batch, queries, keys)
    key_position = torch.arange(keys, dtype=torch.int32)[None] + 5
    query_position = key_position[:, -1:] - queries + 1 + torch.arange(queries, dtype=torch.int32)[None]
    labels = torch.randint(-1, 4, (batch, keys), dtype=torch.int32)
    wanted = torch.randint(-1, 4, (batch, queries), dtype=torch.int32)
    return {
        "q": q, "k": k, "v": v, "scale": 1.7 / math.sqrt(width), "lo": lo, "hi": hi,
        "query_position": query_position, "key_position": key_position, "within": WITHIN,
        "match": ((wanted, labels), (query_position - 1, key_position)), "extra": torch.randn(1, keys, 3),
    }  # fmt: skip


def attend_all(given: dict, **more) -> native.NativeResult:
    return native.attend(**given, want_entropy=True, want_distance=True, want_column=True, **more)


def check(given: dict, got: native.NativeResult | None = None) -> None:
    got, want = got or attend_all(given), reference(**given)
    reach = max(1.0, given["key_position"].max().item())
    for field, x in want.items():
        y = getattr(got, field)
        assert y.shape == x.shape, field
        tolerance = {"entropy": 1e-5, "lse": 5e-6, "distance": 2e-6 * reach, "column": 5e-6}.get(field, 2e-6)
        if field in ("out", "extra"):
            # Values are drawn from a normal distribution: weights off by 2e-6 in all.
            tolerance = 4e-6 if y.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(y.double(), x, atol=tolerance, rtol=0, msg=lambda m, field=field: f"{field}: {m}")


KINDS = (
    "causal", "full", "window", "two-sided window", "packed",
    "left-padded", "right-padded", "random", "empty",
)  # fmt: skip


@pytest.mark.parametrize("size", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_intervals(kind, size):
    check(inputs(kind, queries=size))


@pytest.mark.parametrize("kind", ["causal", "window", "packed", "random"])
def test_many_chunks(kind):
    check(inputs(kind, batch=1, heads=3, groups=1, queries=1300))


@pytest.mark.parametrize("groups", [1, 2, 4, 12])
@pytest.mark.parametrize("heads", [12])
def test_grouped_heads(heads, groups):
    check(inputs(heads=heads, groups=groups, queries=70))


@pytest.mark.parametrize("values", [1, 7, 16, 64, 80, 128, 256])
@pytest.mark.parametrize("width", [1, 7, 16, 64, 80, 128, 256])
def test_widths(width, values):
    check(inputs(width=width, values=values))


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (3, 1), (8, 2), (7, 7)])
@pytest.mark.parametrize("keys", [1, 64, 200, 1111])
def test_decode(heads, groups, keys):
    check(inputs(heads=heads, groups=groups, queries=1, keys=keys))


@pytest.mark.parametrize("kind", ["causal", "full", "window", "random"])
@pytest.mark.parametrize(("queries", "keys"), [(5, 130), (130, 700), (100, 37)])
def test_more_or_fewer_keys_than_queries(kind, queries, keys):
    check(inputs(kind, queries=queries, keys=keys))


@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0])
def test_softcap(softcap):
    check(inputs() | {"softcap": softcap})


def test_softcap_of_large_scores():
    check(inputs() | {"softcap": 3.0, "scale": 40.0})


@pytest.mark.parametrize("kind", ["causal", "random", "empty"])
def test_sinks(kind):
    check(inputs(kind) | {"sinks": torch.tensor([0.0, 3.0, -200.0, 50.0])})


def test_large_scores_do_not_overflow():
    given = inputs() | {"scale": 100.0}
    got, want = attend_all(given), reference(**given)
    for field in ("out", "within", "match"):
        # A score of 1000 carries an error of 6e-5 in float32.
        torch.testing.assert_close(getattr(got, field).double(), want[field], atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    given = inputs(dtype=dtype)
    got = attend_all(given)
    assert got.out.dtype == dtype
    check(given, got)


def test_bfloat16_is_read_as_it_stands(monkeypatch):
    given = inputs(queries=3, keys=300, dtype=torch.bfloat16)
    wide = attend_all(given | {name: given[name].float() for name in "qkv"})
    largest, widen = [], Tensor.float

    def watched(x: Tensor) -> Tensor:
        largest.append(x.numel())
        return widen(x)

    monkeypatch.setattr(Tensor, "float", watched)
    got = attend_all(given)
    assert max(largest) < given["k"].numel()
    assert torch.equal(got.out, wide.out.bfloat16())
    for field in (*ROW_FIELDS[1:], "column"):
        assert torch.equal(getattr(got, field), getattr(wide, field)), field


def coded(rows: Tensor, width: int, bits: int, groups: int, seed: int) -> tuple[native.Codes, Tensor]:
    """Random codes in the shape of some rows, and what they stand for."""
    rng = torch.Generator().manual_seed(seed)
    shape, top = rows.shape[:-1], 2**bits - 1
    whole = torch.randint(0, top + 1, (*shape, width), generator=rng)
    grid = torch.rand(*shape, 2, groups, generator=rng) - torch.tensor([[0.5], [0.0]])
    grid = (grid * torch.tensor([[1.0], [4 / top]])).bfloat16()
    half = width // 2
    codes = whole if bits == 8 else whole[..., :half] + 16 * whole[..., half:]
    middle, step = grid.double().repeat_interleave(width // groups, -1).unbind(-2)
    decoded = middle + step * (whole - top / 2)
    return native.Codes(codes.to(torch.uint8), grid, bits), decoded.float()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("width", "values"),
    [((32, 2), (64, 2)), ((20, 5), (6, 1)), ((96, 3), (256, 1)), ((256, 8), (96, 3)), ((256, 8), (256, 1))],
)
@pytest.mark.parametrize(("kind", "queries", "keys"), [("random", 1, 300), ("causal", 3, 600), ("window", 200, 300)])
def test_codes(bits, width, values, kind, queries, keys):
    given = inputs(kind, queries=queries, keys=keys, width=width[0], values=values[0])
    k, keys_there = coded(given["k"], width[0], bits, width[1], 1)
    v, values_there = coded(given["v"], values[0], bits, values[1], 2)
    got = attend_all(given | {"k": k, "v": v})
    check(given | {"k": keys_there, "v": values_there}, got)
    plain = attend_all(given | {"k": keys_there, "v": v})
    assert torch.equal(plain.lse, attend_all(given | {"k": keys_there}).lse)
    torch.testing.assert_close(plain.out, got.out, atol=4e-6, rtol=0)


@pytest.mark.parametrize("queries", [1, 200])
def test_codes_with_an_index_and_in_any_layout(queries):
    given = inputs("random", queries=queries, keys=300)
    index = torch.randint(0, 300, (2, 300), generator=torch.Generator().manual_seed(3)).int()
    for name, bits in (("k", 8), ("v", 4)):
        codes, there = coded(given[name], 16, bits, 2, 1)
        want = attend_all(given | {name: there}, index=index)
        apart = native.Codes(*(torch.stack([x, x], -1)[..., 0] for x in (codes.codes, codes.grid)), bits)
        for rows in (codes, apart):
            got = attend_all(given | {name: rows}, index=index)
            for field in (*ROW_FIELDS, "column"):
                torch.testing.assert_close(getattr(got, field), getattr(want, field), atol=1e-5, rtol=1e-5)


def test_one_list_of_codes_serves_all():
    given = inputs(queries=1, keys=90) | {"within": (), "match": (), "extra": None}
    codes, there = coded(torch.empty(90, 16), 16, 4, 2, 1)
    got = native.attend(**given | {"k": codes.expand(2, 2, 90, 16)})
    want = native.attend(**given | {"k": there.expand(2, 2, 90, 16)})
    torch.testing.assert_close(got.out, want.out, atol=4e-6, rtol=0)


def test_layouts_agree():
    given = inputs()
    want = attend_all(given)
    contiguous = {name: given[name].contiguous() for name in "qkv"}
    strided = {name: torch.randn(*given[name].shape, 2)[..., 0].copy_(given[name]) for name in "qkv"}
    for layout in (contiguous, strided):
        got = attend_all(given | layout)
        assert all(torch.equal(getattr(got, field), getattr(want, field)) for field in (*ROW_FIELDS, "column"))


def test_out_is_a_view_of_the_layout_that_follows():
    out = attend_all(inputs()).out
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("queries", [1, 65, 200])
@pytest.mark.parametrize("kind", ["causal", "window", "left-padded", "right-padded", "empty"])
def test_keys_that_nobody_sees_have_no_influence(kind, queries, poison):
    given = inputs(kind, queries=queries, keys=queries + 40)
    given["hi"] = given["hi"].clamp(max=queries + 17)
    want = attend_all(given)
    keys = torch.arange(queries + 40)
    seen = ((keys >= given["lo"][..., None]) & (keys < given["hi"][..., None])).any(1)
    hidden = ~seen.expand(2, -1)[:, None, :, None]
    poisoned = {name: given[name].masked_fill(hidden, poison) for name in "kv"}
    poisoned["extra"] = given["extra"].masked_fill(hidden[:, 0], poison)
    got = attend_all(given | poisoned)
    assert all(torch.equal(getattr(got, field), getattr(want, field)) for field in (*ROW_FIELDS, "column"))


@pytest.mark.parametrize("kind", ["causal", "window", "packed", "random"])
def test_a_row_ignores_poison_that_another_row_sees(kind):
    given = inputs(kind, queries=200)
    want = attend_all(given)
    at = 100
    poisoned = {name: given[name].clone() for name in ("k", "v", "extra")}
    poisoned["k"][:, :, at] = poisoned["v"][:, :, at] = poisoned["extra"][:, at] = math.nan
    got = attend_all(given | poisoned)
    spared = ((given["lo"] > at) | (given["hi"] <= at)).expand(2, -1)[:, None].expand(2, 4, -1)
    for field in ROW_FIELDS:
        x, y = getattr(got, field), getattr(want, field)
        axes = (0,) if field in ("within", "match") else ()
        for i in range(x.shape[0]) if axes else (slice(None),):
            assert torch.equal(x[i][spared], y[i][spared]), field
            assert x[i][~spared].isnan().any(), field


def test_positions_with_gaps_and_restarts():
    given = inputs(queries=200)
    gaps = torch.arange(200, dtype=torch.int32).mul(3).remainder(177)[None]
    check(given | {"key_position": gaps, "query_position": gaps})
    packed = inputs("packed", queries=200)
    restart = (torch.arange(200, dtype=torch.int32) - packed["lo"]).contiguous()
    check(packed | {"key_position": restart, "query_position": restart})


def test_within_takes_any_order_and_negative_numbers():
    given = inputs() | {"within": (1000, -1, 2, 2, 0)}
    check(given)
    check(given | {"key_position": given["key_position"] * 2})


def test_many_labels():
    given = inputs()
    check(given | {"match": given["match"] * 3 + given["match"][:1]})


@pytest.mark.parametrize("queries", [1, 65, 1300])
def test_threads_and_repetition_do_not_change_a_bit(queries):
    given = inputs(batch=1, queries=queries)
    want = attend_all(given, threads=1)
    for threads in (1, 2, 2, 3):
        got = attend_all(given, threads=threads)
        assert all(torch.equal(getattr(got, field), getattr(want, field)) for field in (*ROW_FIELDS, "column"))


def test_what_is_not_asked_is_none_and_changes_nothing():
    given = inputs()
    everything = attend_all(given)
    for field in ("within", "match", "extra"):
        given.pop(field)
    plain = native.attend(**given)
    assert all(getattr(plain, f) is None for f in ("entropy", "distance", "within", "match", "extra", "column"))
    torch.testing.assert_close(plain.out, everything.out)
    assert torch.equal(plain.lse, everything.lse)
    bare = native.attend(**given, want_out=False)
    assert bare.out is None
    assert torch.equal(bare.lse, everything.lse)


@pytest.mark.parametrize("queries", [1, 3, 200])
def test_an_index_says_which_row_each_key_is(queries):
    given = inputs("random", queries=queries, keys=300)
    index = torch.randint(0, 300, (2, 300), generator=torch.Generator().manual_seed(3)).int()
    at = index[:, None, :, None].long().expand_as(given["k"])
    moved = given | {"k": given["k"].gather(2, at), "v": given["v"].gather(2, at)}
    got, want = attend_all(given, index=index), attend_all(moved)
    for field in (*ROW_FIELDS, "column"):
        assert torch.equal(getattr(got, field), getattr(want, field)), field


def test_an_index_may_be_shorter_than_the_rows():
    given = inputs("full", queries=1, keys=90) | {"within": (), "match": (), "extra": None}
    index = torch.tensor([[88, 3, 41], [0, 7, 7]], dtype=torch.int32)
    short = given | {"key_position": given["key_position"][:, :3]}
    got = native.attend(**short, index=index).out
    rows = torch.arange(2)[:, None]
    picked = given | {
        "k": given["k"].transpose(1, 2)[rows, index.long()].transpose(1, 2),
        "v": given["v"].transpose(1, 2)[rows, index.long()].transpose(1, 2),
        "key_position": given["key_position"][:, :3],
        "hi": given["hi"].clamp_max(3),
    }
    torch.testing.assert_close(got, reference(**picked)["out"].float(), atol=4e-6, rtol=0)


def test_no_queries_and_no_keys():
    given = inputs(queries=1, keys=5)
    none = {name: given[name][:, :0] for name in ("lo", "hi", "query_position")}
    match = ((none["lo"], given["key_position"]),)
    got = attend_all(given | none | {"q": given["q"][:, :, :0], "match": match})
    assert got.out.shape == (2, 4, 0, 16)
    assert not got.column.any()
    nothing = {
        "k": given["k"][:, :, :0],
        "v": given["v"][:, :, :0],
        "key_position": given["key_position"][:, :0],
    }
    got = attend_all(given | nothing | {"extra": given["extra"][:, :0], "match": ()})
    assert not got.out.any()
    assert got.lse.isneginf().all()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"k": torch.randn(2, 3, 65, 16), "v": torch.randn(2, 3, 65, 16)}, "multiple of the 3 kv heads"),
        ({"v": torch.randn(2, 2, 64, 16)}, "do not fit together"),
        ({"q": torch.randn(2, 4, 65, 16).double()}, "share float32"),
        ({"q": torch.randn(4, 65, 16)}, "4 dimensions"),
        ({"lo": torch.zeros(2, 65)}, r"lo must be int32 \[2 or 1, 65\], got float32"),
        ({"hi": torch.zeros(3, 65, dtype=torch.int32)}, "hi must be int32"),
        ({"key_position": torch.zeros(2, 64, dtype=torch.int32)}, "key_position must be int32"),
        ({"sinks": torch.zeros(3)}, "sinks must have the shape"),
        ({"extra": torch.zeros(65, 2)}, "extra must be"),
        ({"softcap": -1.0}, "softcap must be positive"),
        ({"index": torch.full((2, 65), 65, dtype=torch.int32)}, "index must be from 0 to 64"),
        ({"index": torch.zeros(3, 65, dtype=torch.int32)}, "index must be int32"),
        ({"k": native.Codes(*CODES, 4)}, "do not fit together"),
    ],
)
def test_bad_inputs_raise(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        attend_all(inputs() | change)


@pytest.mark.parametrize(
    ("codes", "grid", "bits", "sentence"),
    [
        (*CODES, 5, "of 5 bits"),
        (CODES[0].float(), CODES[1], 8, "got float32"),
        (CODES[0], CODES[1].float(), 8, "with float32"),
        (CODES[0], CODES[1][..., :0], 8, "share out the channels"),
        (CODES[0], torch.zeros(2, 2, 65, 2, 3).bfloat16(), 8, "share out the channels"),
        (CODES[0], CODES[1][:, :, :64], 8, "got uint8"),
    ],
)
def test_codes_that_are_none(codes, grid, bits, sentence):
    with pytest.raises(ValueError, match=f"codes must be uint8 .*{sentence}"):
        native.Codes(codes, grid, bits)


@pytest.mark.parametrize(
    ("width", "size", "groups", "bits"), [(9, 4, 2, 8), (8, 4, 2, 5), (1, 1, 1, 4), (257, 257, 1, 8), (200, 100, 3, 8)]
)
def test_rows_that_do_not_fit_are_not_packed(width, size, groups, bits):
    with pytest.raises(ValueError, match=f"rows of {width} channels do not fit into {groups} groups"):
        native.pack(torch.zeros(3, width), torch.eye(size), groups, bits)
