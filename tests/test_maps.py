"""Pictures per head: the binned attention map and entropy by position, against dense weights in float64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

import foveate
from foveate.core.attach import attach
from foveate.core.reductions import KeyBins, Reduction
from foveate.core.rows import attend
from foveate.measure import AttentionMap, Entropy
from foveate.testing import tiny, views

WHERE = views.situations(cross=False, without="all_masked")


@dataclass(frozen=True)
class Whole(Reduction):
    """All weights."""

    def of_block(self, block):
        return torch.nn.functional.pad(block.weights, (block.first, block.view.mask.keys - block.last))


def weights(view):
    return attend(view, [Whole()], engine="reference", dtype=torch.float64)[Whole()]


def begins(view):
    """Where each text begins, in the keys of the call, written down for the situations one by one."""
    mask = view.mask
    if mask.begin is not None:
        return mask.begin.expand(view.batch).tolist()
    return [int(mask.low[b % len(mask.low)][mask.rows[b % len(mask.rows)]].min()) for b in range(view.batch)]


def dense(view, p, width, count):
    """The map and the entropies of each bin, one weight after the other."""
    heads = view.heads
    mass, entropy = torch.zeros(heads, count, count).double(), torch.zeros(heads, count).double()
    rows = torch.zeros(count).double()
    real = view.mask.rows.expand(view.batch, -1)
    for b, begin in enumerate(begins(view)):
        for i in real[b].nonzero()[:, 0].tolist():
            r = (int(view.mask.position[i]) - begin) // width
            rows[r] += 1
            entropy[:, r] += torch.special.entr(p[b, :, i]).sum(-1)
            for j in range(view.keys):
                c = (j - begin) // width
                if 0 <= c < count:
                    mass[:, r, c] += p[b, :, i, j]
    return mass, entropy / rows, rows


def drawn(metric, *calls, engine="auto"):
    state = metric.start(calls[0].layer)
    for call in calls:
        state = metric.update(state, attend(call, metric.needs(), engine=engine))
    return metric.arrays(state)


def texts(view):
    """How many texts open in the call."""
    place = view.mask.position[None] - torch.tensor(begins(view))[:, None]
    return max(1, int((view.mask.rows.expand(view.batch, -1) & (place == 0)).sum()))


@pytest.mark.parametrize("bins", [64, 4])
@pytest.mark.parametrize("name", [n for n in WHERE if "long" not in n])
def test_the_map_is_the_dense_one_in_bins(name, bins):
    view = views.view(name)
    wide = replace(view, q=view.q.float(), k=view.k.float(), v=view.v.float())
    found = drawn(AttentionMap(bins), view)["attention_map"]
    count = found.shape[-1]
    tokens, _ = KeyBins(bins).of_view(view)
    width = KeyBins(bins).width(tokens)
    assert count == -(-tokens // width) <= bins
    p = weights(wide)
    mass, entropy, rows = dense(view, p, width, count)
    torch.testing.assert_close(found, mass / texts(view), atol=1e-5, rtol=1e-5)
    if view.sinks is None:
        torch.testing.assert_close(found.sum(-1), (rows / texts(view)).expand(view.heads, -1), atol=1e-5, rtol=1e-5)
    course = drawn(Entropy(bins), view)["entropy_by_position"]
    torch.testing.assert_close(course, entropy, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("engine", ["reference", "blocks", "fused", "native"])
def test_no_mass_is_lost_on_a_long_text(engine):
    view = views.view("long_window_padded")
    found = drawn(AttentionMap(16), view, engine=engine)["attention_map"]
    assert found.shape == (2, 9, 9), "522 tokens behind the padding, 64 to a bin"
    assert found.sum((1, 2)).tolist() == pytest.approx([522, 522], abs=1e-3)
    assert found.sum(-1)[0].tolist() == pytest.approx([64] * 8 + [10], abs=1e-4)


def test_cells_are_joined_when_the_text_outgrows_them():
    whole = views.view("causal", batch=1, queries=300, keys=300)
    cuts = [0, 5, 9, 64, 65, 200, *range(201, 206), 300]
    calls = [views.chunk(whole, a, b) for a, b in itertools.pairwise(cuts)]
    for metric in (AttentionMap(8), Entropy(8)):
        label = {"attention_map": "attention_map", "entropy": "entropy_by_position"}[metric.name]
        found, want = drawn(metric, *calls)[label], drawn(metric, whole)[label]
        assert found.shape[1:] == (5,) * (found.ndim - 1)
        torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


def test_a_text_has_at_least_half_of_the_cells():
    for tokens in (1, 2, 63, 64, 65, 100, 128, 129, 4096, 5000, 8192):
        bins = KeyBins(64)
        edges = bins.edges(tokens)
        assert edges[0] == 0 and edges[-1] == tokens and edges == sorted(set(edges))
        assert min(tokens, 33) <= len(edges) - 1 <= 64


def test_the_share_of_cells():
    """One key takes all: a column of cells; all alike: nearly all of them."""
    view = views.view("causal", batch=1, queries=64, keys=64)
    q = torch.zeros_like(view.q)
    k = torch.zeros_like(view.k)
    q[..., 0], k[:, :, 0, 0] = 1.0, 200.0
    metric = AttentionMap(8)
    for call, share in ((replace(view, q=q, k=k), 0.95 * 8 / 36), (replace(view, q=q * 0), None)):
        state = metric.update(metric.start(call.layer), attend(call, metric.needs()))
        value = metric.result(state)["attention_map_cells"].value
        if share is not None:
            assert value.tolist() == pytest.approx([share] * 4, abs=1e-4)
        else:
            assert bool((value > 0.6).all())


def test_cross_attention_has_no_map():
    model = tiny.model("t5").eval()
    with attach(model, AttentionMap(), Entropy()) as attached, torch.no_grad():
        model(**tiny.inputs("t5"))
    found = attached.results
    names = found.layers
    crossing = [n for n, name in names.items() if "EncDecAttention" in name]
    own = [n for n in names if n not in crossing]
    assert crossing and own
    for picture in found.arrays.values():
        assert picture.shape[:2] == (len(names), 4)
        assert np.isnan(picture[crossing]).all()
        assert np.isfinite(picture[own]).any((1, 2)).all() if picture.ndim == 3 else True
    assert np.isfinite(found.arrays["attention_map"][own]).all()


def test_a_profile_carries_them_for_all_heads():
    model = tiny.model("gemma2").eval()
    ids = torch.randint(3, 99, (201,), generator=torch.Generator().manual_seed(0)).tolist()
    found = foveate.profile(model, None, ids, metrics=["attention_map:bins=32", "entropy"], maps=False)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        p = torch.cat(model(torch.tensor([ids]), output_attentions=True).attentions).double()
    for name, bins in (("map_edges", 32), ("position_edges", 64)):
        assert found.info[name] == KeyBins(bins).edges(201)
    edges = found.info["map_edges"]
    cells = torch.stack([p[:, :, a:b].sum(2) for a, b in itertools.pairwise(edges)], 2)
    cells = torch.stack([cells[..., a:b].sum(-1) for a, b in itertools.pairwise(edges)], -1)
    np.testing.assert_allclose(found.arrays["attention_map"], cells, atol=1e-4)
    edges = found.info["position_edges"]
    entropy = torch.special.entr(p).sum(-1)
    course = torch.stack([entropy[..., a:b].mean(-1) for a, b in itertools.pairwise(edges)], -1)
    np.testing.assert_allclose(found.arrays["entropy_by_position"], course, atol=1e-4)
    assert found.arrays["attention_map"].dtype == np.float32
