"""One head opened: windows and fine maps against eager weights, kept states, what is saved, and `foveate zoom`."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import foveate
from foveate import opened, stored
from foveate.closeup import map_of, weights_of
from foveate.core.errors import BadInput, LoadError, TooBig
from foveate.highlights import BINS, Source, draw, later_sinks, picks
from foveate.measure.retrieval_score import RetrievalScore
from foveate.opened import Map, Window
from foveate.passes import visit
from foveate.testing import tiny

N = 90


def ids_of(n=N, seed=0):
    return torch.randint(4, 99, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def eager(family, ids):
    """Weights [layers, heads, row, key] as the model's own code computes them."""
    model = tiny.model(family).eval()
    with torch.no_grad():
        return torch.cat(model(torch.tensor([ids]), output_attentions=True).attentions)


@pytest.fixture(scope="module")
def model():
    return tiny.model("llama").eval()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """A saved profile with states kept."""
    folder = tmp_path_factory.mktemp("profiles")
    found = foveate.profile(model, tiny.tokenizer(), ids_of(), metrics=["entropy"], states=folder / "kept")
    found.save(folder / "p")
    return folder / "p"


@pytest.fixture
def bare(model, tmp_path):
    """A saved profile without states."""
    foveate.profile(model, tiny.tokenizer(), ids_of(), metrics=["entropy"]).save(tmp_path / "p")
    return tmp_path / "p"


# ---------------------------------------------------------------- windows and maps


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gpt_oss", "bert", "gpt2"])
def test_a_kept_layer_gives_the_weights_of_the_model(family, tmp_path):
    ids, want = ids_of(), eager(family, ids_of())
    model = tiny.model(family).eval()
    kept = []
    visit(model, torch.tensor([ids]), [0, 1], lambda v: kept.append(stored.write(v, tmp_path, "profile", "m")))
    assert kept == [True, True]
    for layer, head, rows, keys in ((0, 0, (0, N), (0, N)), (1, 3, (40, 47), (12, 60)), (1, 2, (89, 90), (0, 1))):
        view = stored.read(tmp_path, "profile", layer, "m")
        found = weights_of(view, head, rows, keys)
        np.testing.assert_allclose(found, want[layer, head, slice(*rows), slice(*keys)], atol=2e-6)


def test_a_map_sums_the_weights_of_its_cells(model, tmp_path):
    ids, want = ids_of(), eager("llama", ids_of()).double()
    visit(model, torch.tensor([ids]), [1], lambda v: stored.write(v, tmp_path, "profile", "m"))
    found = map_of(stored.read(tmp_path, "profile", 1, "m"), 3, 7)
    assert found.edges[0] == 0 and found.edges[-1] == N and len(found.edges) == 8
    for r, (a, b) in enumerate(zip(found.edges, found.edges[1:], strict=False)):
        for c, (i, j) in enumerate(zip(found.edges, found.edges[1:], strict=False)):
            assert found.mass[r, c] == pytest.approx(float(want[1, 3, a:b, i:j].sum()), abs=1e-5)
    assert found.mass.sum() == pytest.approx(N, abs=1e-4)


def test_a_visit_stops_after_the_layer_and_leaves_no_trace(model):
    ran = []
    handles = [m.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, m in enumerate(model.model.layers)]
    before = model(torch.tensor([ids_of()])).logits
    ran.clear()
    visit(model, torch.tensor([ids_of()]), [0], lambda view: None)
    assert ran == [], "the first layer's attention is seen, and nothing after it runs"
    for handle in handles:
        handle.remove()
    assert torch.equal(model(torch.tensor([ids_of()])).logits, before)
    assert model.config._attn_implementation == "eager"


# ---------------------------------------------------------------- zoom


def test_zoom_reads_kept_states_and_needs_no_model(saved):
    window = foveate.zoom(saved, 1, 2, (50, 60), (10, 40), model="no/such/model")
    want = eager("llama", ids_of())[1, 2, 50:60, 10:40]
    np.testing.assert_allclose(window.weights, want, atol=1e-3)
    assert window.weights.dtype == np.float16
    tokenizer = tiny.tokenizer()
    assert window.row_tokens == [tokenizer.decode([i]) for i in ids_of()[50:60]]
    again = foveate.Profile.load(saved)
    assert [w.name for w in again.windows] == [window.name]
    np.testing.assert_array_equal(again.windows[0].weights, window.weights)
    foveate.zoom(saved, 1, 2, (50, 60), (10, 40))
    assert len(foveate.Profile.load(saved).windows) == 1, "the same window twice"
    foveate.zoom(saved, 0, 2, (50, 60), (10, 40))
    assert len(foveate.Profile.load(saved).windows) == 2


def test_zoom_runs_the_model_once_and_keeps_the_layer(bare, model):
    assert not (bare / "states").exists()
    found = foveate.zoom(bare, 1, 3, (5, 9), (0, 9), model=model)
    np.testing.assert_allclose(found.weights, eager("llama", ids_of())[1, 3, 5:9, :9], atol=1e-3)
    assert [p.name for p in (bare / "states").iterdir()] == ["profile-001.safetensors"]
    again = foveate.zoom(bare, 1, 0, (5, 9), (0, 9))
    np.testing.assert_allclose(again.weights, eager("llama", ids_of())[1, 0, 5:9, :9], atol=1e-3)


def test_a_layer_with_a_bias_is_not_kept_and_still_zoomed(tmp_path):
    t5 = tiny.model("t5").eval()
    foveate.profile(t5, None, ids_of(), metrics=["entropy"]).save(tmp_path / "p")
    found = foveate.zoom(tmp_path / "p", 1, 2, (3, 8), (0, 20), model=t5)
    with torch.no_grad():
        ids = torch.tensor([ids_of()])
        want = t5(input_ids=ids, decoder_input_ids=ids, output_attentions=True).encoder_attentions[1][0, 2, 3:8, :20]
    np.testing.assert_allclose(found.weights, want, atol=1e-3)
    assert found.key_tokens[0] == f"#{ids_of()[0]}", "no tokenizer: the ids stand for the tokens"
    assert not (tmp_path / "p" / "states").exists()


@pytest.mark.parametrize(
    ("layer", "head", "rows", "keys", "text", "words"),
    [
        (2, 0, (0, 5), (0, 5), "profile", "no layer 2; LlamaForCausalLM has layers 0 to 1"),
        (-1, 0, (0, 5), (0, 5), "profile", "no layer -1"),
        (0, 4, (0, 5), (0, 5), "profile", "no head 4 in layer 0; it has heads 0 to 3"),
        (0, 0, (0, 91), (0, 5), "profile", "rows 0:91 are not in the text; give START:STOP between 0 and 90"),
        (0, 0, (0, 5), (7, 7), "profile", "keys 7:7"),
        (0, 0, (0, 5), (0, 5), "needle", "no retrieval head was found"),
        (0, 0, (0, 5), (0, 5), "other", "no text 'other'"),
    ],
)
def test_what_is_not_there_cannot_be_zoomed(saved, layer, head, rows, keys, text, words):
    with pytest.raises(BadInput, match=words) as e:
        foveate.zoom(saved, layer, head, rows, keys, text=text)
    assert "\n" not in str(e.value)


def test_a_window_too_big_is_refused(saved, monkeypatch):
    monkeypatch.setattr("foveate.zooming.LARGEST", 99)
    with pytest.raises(TooBig, match="10 rows x 10 keys has more than 99 weights"):
        foveate.zoom(saved, 0, 0, (0, 10), (0, 10))


def test_a_model_that_is_gone_or_another_is_told(bare):
    with pytest.raises(LoadError, match=r"was not kept.*--model"):
        foveate.zoom(bare, 0, 0, (0, 5), (0, 5))
    with pytest.raises(LoadError, match=r"no such file or folder.*--model"):
        foveate.zoom(bare, 0, 0, (0, 5), (0, 5), model="./nowhere")
    with pytest.raises(BadInput, match="GPT2LMHeadModel with 4 heads is not the profiled model"):
        foveate.zoom(bare, 0, 0, (0, 5), (0, 5), model=tiny.model("gpt2"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "0"}, "states of format 0, not 1"),
        ({"mark": "x"}, "another model or text"),
        (None, "is damaged"),
        ({"about": "{}"}, "is damaged"),
    ],
)
def test_states_that_do_not_belong_are_told(bare, model, change, words):
    foveate.zoom(bare, 0, 0, (0, 5), (0, 5), model=model)
    file = bare / "states" / "profile-000.safetensors"
    if change is None:
        file.write_bytes(file.read_bytes()[:100])
    else:
        with safe_open(file, "pt") as f:
            said, tensors = f.metadata(), {n: f.get_tensor(n) for n in f.keys()}  # noqa: SIM118
        save_file(tensors, file, said | change)
    with pytest.raises(BadInput, match=f"{words}.*delete"):
        foveate.zoom(bare, 0, 0, (0, 5), (0, 5), model=model)


def test_states_of_another_text_are_not_mixed_up(bare, model, tmp_path):
    foveate.zoom(bare, 0, 0, (0, 5), (0, 5), model=model)
    foveate.profile(model, tiny.tokenizer(), ids_of(seed=1), metrics=["entropy"]).save(tmp_path / "other")
    (bare / "states").rename(tmp_path / "other" / "states")
    with pytest.raises(BadInput, match="another model or text"):
        foveate.zoom(tmp_path / "other", 0, 0, (0, 5), (0, 5), model=model)


# ---------------------------------------------------------------- the heads that stand out


def table(**values):
    """A table of heads with one value of a metric each: `metric_layer_head=value`."""
    rows = []
    for name, value in values.items():
        metric, layer, head = name.rsplit("_", 2)
        rows.append({"layer": int(layer), "head": int(head), "metric": metric, "value": value})
    return pd.DataFrame(rows, columns=["layer", "head", "metric", "value"])


def sinks(*rows):
    return pd.DataFrame(
        [(n, h, k, "sink_rate_importance", v) for n, h, k, v in rows],
        columns=["layer", "head", "key", "metric", "value"],
    )


def test_picks_take_the_best_above_the_threshold():
    heads = table(
        retrieval_score_0_0=0.3,
        retrieval_score_0_1=0.9,
        retrieval_score_1_0=0.5,
        retrieval_score_1_1=0.4,
        induction_1_1=0.1,
        previous_token_0_3=0.8,
    )
    found = picks(heads, sinks((1, 2, 40, 0.6), (1, 3, 41, 0.5), (0, 2, 0, 0.9), (0, 3, 7, 0.2)))
    assert [(p.layer, p.head, p.look) for p in found] == [
        (0, 1, "needle"),
        (1, 0, "needle"),
        (1, 1, "needle"),
        (0, 3, "near"),
        (1, 2, "sink"),
    ]
    assert "0.90" in found[0].why and "token 40 takes 60%" in found[-1].why
    assert later_sinks(pd.DataFrame()) == []


def test_maps_and_windows_are_those_of_the_model():
    model, tokenizer = tiny.model("llama", max_position_embeddings=1 << 12).eval(), tiny.tokenizer()
    ids = ids_of()
    info = {"model": "tiny", "architecture": "LlamaForCausalLM", "ids": ids}
    heads = table(retrieval_score_1_2=0.9, previous_token_0_3=0.8, duplicate_token_1_0=0.5, entropy_relative_1_2=0.9)
    probe = RetrievalScore(length=128, samples=2)
    pieces = [tokenizer.decode([i]) for i in ids]
    found = draw(Source(model, info), tokenizer, [probe], heads, sinks((0, 1, 33, 0.6)), pieces)

    assert [(m.layer, m.head) for m in found.maps] == [(1, 2), (1, 0), (0, 3), (0, 1)]
    assert "retrieves" in found.maps[0].why and "broad" in found.maps[0].why
    want = eager("llama", ids)
    for m in found.maps:
        assert len(m.edges) - 1 == min(BINS, N)
        np.testing.assert_allclose(m.mass, want[m.layer, m.head], atol=1e-5)

    needle = found.needle
    assert tokenizer.decode(needle["ids"][slice(*needle["needle"])]) == needle["answer"]
    first, last = needle["answering"]
    assert tokenizer.decode(needle["ids"][first + 1 : last + 1]) == needle["answer"], "each row says the next token"
    by_text = {t: [w for w in found.windows if w.text == t] for t in ("needle", "profile")}
    assert [(w.layer, w.head) for w in by_text["needle"]] == [(1, 2)]
    assert sorted((w.layer, w.head) for w in by_text["profile"]) == [(0, 1), (0, 3), (1, 0)]
    w = by_text["needle"][0]
    assert w.rows[0] <= first and w.rows[1] == last
    assert w.keys[0] <= needle["needle"][0] and needle["needle"][1] <= w.keys[1]
    with torch.no_grad():
        dense = torch.cat(model(torch.tensor([needle["ids"]]), output_attentions=True).attentions)
    np.testing.assert_allclose(w.weights, dense[1, 2, slice(*w.rows), slice(*w.keys)], atol=1e-3)
    for w in by_text["profile"]:
        np.testing.assert_allclose(w.weights, want[w.layer, w.head, slice(*w.rows), slice(*w.keys)], atol=1e-3)
        assert w.key_tokens == pieces[slice(*w.keys)]
    sink = next(w for w in by_text["profile"] if w.head == 1)
    assert sink.keys[0] <= 33 < sink.keys[1]


def test_kept_states_serve_for_the_maps_too(tmp_path, model):
    ids, heads = ids_of(), table(previous_token_0_3=0.8)
    found = foveate.profile(model, None, ids, metrics=["entropy"], states=tmp_path)
    source = Source(None, found.info, tmp_path)
    drawn = draw(source, None, [], heads, sinks(), [])
    np.testing.assert_allclose(drawn.maps[0].mass, eager("llama", ids)[0, 3], atol=1e-5)


# ---------------------------------------------------------------- on disk


HOSTILE = ["</script>", "\x00\x1b[31m", "\ufffd", "שלום", "🙂", '"\\', "\u2028"]


def full(profile):
    rng = np.random.default_rng(0)
    window = Window(1, 2, "needle", (3, 5), (0, 7), ["a", "b"], HOSTILE, rng.random((2, 7)).astype(np.float16), "w")
    maps = [Map(1, 2, [0, 40, N], rng.random((2, 2)).astype(np.float32), "m")]
    return replace(profile, maps=maps, windows=[window], pieces=HOSTILE)


@pytest.fixture(scope="module")
def profile(model):
    return full(foveate.profile(model, None, ids_of(), metrics=["entropy", "attention_map"], maps=False))


def test_pictures_are_saved_and_loaded(profile, tmp_path):
    profile.save(tmp_path / "p")
    again = foveate.Profile.load(tmp_path / "p")
    assert again.info == json.loads(json.dumps(profile.info))
    assert set(again.arrays) == {"attention_map", "entropy_by_position"}
    for label, x in profile.arrays.items():
        np.testing.assert_array_equal(again.arrays[label], x)
    assert again.pieces == HOSTILE
    for a, b in ((again.maps[0], profile.maps[0]), (again.windows[0], profile.windows[0])):
        for name, value in vars(b).items():
            np.testing.assert_array_equal(getattr(a, name), value)
    assert again.windows[0].rows == (3, 5)
    again.save(tmp_path / "p")
    assert len(foveate.Profile.load(tmp_path / "p").windows) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["p"]


def test_a_profile_of_before_pictures_is_read(profile, tmp_path):
    profile.save(tmp_path / "p")
    for name in ("arrays.npz", *opened.FILES):
        (tmp_path / "p" / name).unlink()
    file = tmp_path / "p" / "profile.json"
    info = json.loads(file.read_text())
    assert info.pop("files") == ["arrays.npz", *opened.FILES]
    file.write_text(json.dumps(info))
    again = foveate.Profile.load(tmp_path / "p")
    assert (again.arrays, again.maps, again.windows, again.pieces, again.states) == ({}, [], [], [], None)


@pytest.mark.parametrize("name", ["arrays.npz", *opened.FILES])
def test_damaged_pictures_are_told(profile, tmp_path, name):
    profile.save(tmp_path / "p")
    file = tmp_path / "p" / name
    whole = file.read_bytes()
    for cut in (0, 20, len(whole) // 2, len(whole) - 30):
        file.write_bytes(whole[:cut])
        with pytest.raises(BadInput, match="damaged"):
            foveate.Profile.load(tmp_path / "p")
    file.unlink()
    with pytest.raises(BadInput, match=f"{name} is missing"):
        foveate.Profile.load(tmp_path / "p")


def test_numbers_that_do_not_fit_their_tokens_are_damage(profile, tmp_path):
    profile.save(tmp_path / "p")
    file = tmp_path / "p" / "opened.json"
    about = json.loads(file.read_text())
    about["windows"][0]["key_tokens"].pop()
    file.write_text(json.dumps(about))
    with pytest.raises(BadInput, match="damaged"):
        foveate.Profile.load(tmp_path / "p")


def test_states_go_along_when_a_profile_is_saved(saved, tmp_path):
    found = foveate.Profile.load(saved)
    assert found.states == saved / "states"
    names = sorted(p.name for p in found.states.iterdir())
    assert names == ["profile-000.safetensors", "profile-001.safetensors"]
    for _ in range(2):
        found.save(tmp_path / "copy")
        assert sorted(p.name for p in (tmp_path / "copy" / "states").iterdir()) == names
        found = foveate.Profile.load(tmp_path / "copy")
    assert foveate.zoom(tmp_path / "copy", 0, 0, (0, 4), (0, 4)).weights.shape == (4, 4)


def test_the_size_told_is_the_size_kept(saved, model):
    told = stored.layer_bytes(model, N)
    kept = sum(p.stat().st_size for p in (saved / "states").iterdir())
    assert told <= kept < told * 1.2


# ---------------------------------------------------------------- figures


def test_figures(profile):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    fine = profile.plot("attention_map", layer=1, head=2)
    assert fine.collections[0].get_array().shape == (2, 2), "the fine map where there is one"
    assert fine.yaxis_inverted()
    binned = profile.plot("attention_map", layer=0, head=1)
    assert binned.collections[0].get_array().shape == (45, 45)
    window = profile.plot("window", index=0)
    assert window.images[0].get_array().shape == (2, 7)
    assert len(window.get_xticklabels()) == 7
    assert len(profile.plot("entropy_by_position").lines) == 2, "a line per layer"
    assert len(profile.plot("entropy_by_position", layer=1).lines) == 4, "a line per head"
    assert len(profile.plot("entropy", by="layer").lines) >= 2
    for ax in (fine, binned, window):
        ax.figure.canvas.draw()
    pyplot.close("all")
    for name, what, words in (
        ("attention_map", {}, "give layer= and head="),
        ("attention_map", {"layer": 0, "head": 9}, "no layer 0, head 9"),
        ("entropy_by_position", {"layer": 7}, "no layer 7"),
        ("window", {"index": 1}, "no window 1"),
        ("entropy", {"by": "x"}, "by='x'"),
    ):
        with pytest.raises(BadInput, match=words):
            profile.plot(name, **what)
    with pytest.raises(BadInput, match="no attention_map; it has no pictures"):
        replace(profile, arrays={}, maps=[]).plot("attention_map", layer=0, head=0)
    pyplot.close("all")
