"""The main job, on tiny models: what it measures, what it refuses, what it leaves on disk."""

import errno
import json

import pandas as pd
import pytest
import torch

import foveate
from foveate.core import registry
from foveate.core.errors import BadInput, TooBig, UnknownName
from foveate.core.mechanism import Metric
from foveate.profiling import estimate_bytes, positions
from foveate.summary import ranges, sentences, summarise
from foveate.testing import tiny

STREAMING = [n for n in registry.names("measure") if issubclass(registry.find(n), Metric)]


@pytest.fixture(scope="module")
def model():
    return tiny.model("llama").eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 99, (200,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def profile(model, ids):
    return foveate.profile(model, None, ids, metrics=STREAMING)


def test_every_metric_has_every_head(profile):
    counts = profile.heads.groupby("metric")[["layer", "head"]].apply(lambda t: len(t.drop_duplicates()))
    heads = profile.info["query_heads"] * len(profile.info["layers"])
    assert (counts == heads).all()
    for name in STREAMING:
        if name not in profile.info["skipped"] and name != "span_mass":
            assert profile.heads.metric.str.startswith(name).any(), f"{name} emitted nothing"


def test_entropy_is_what_the_eager_weights_say(model, ids, profile):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = torch.cat(model(torch.tensor([ids]), output_attentions=True).attentions)
    expected = torch.special.entr(weights.double()).sum(-1).mean(-1)
    assert torch.allclose(torch.tensor(profile.metric("entropy").to_numpy()), expected, atol=1e-5)
    first = weights[..., 0].mean(-1)
    assert torch.allclose(torch.tensor(profile.metric("first_token_mass").to_numpy()), first.double(), atol=1e-5)


def test_intervals_hold_their_value(profile):
    with_interval = profile.heads.dropna(subset=["low", "high"])
    assert len(with_interval) > len(profile.heads) / 2
    assert (with_interval.low <= with_interval.value + 1e-9).all()
    assert (with_interval.high >= with_interval.value - 1e-9).all()


def test_tokens_cut_the_text(model, ids):
    found = foveate.profile(model, None, ids, tokens=50, metrics=["entropy"])
    assert found.info["tokens"] == 50
    assert found.info["text_tokens"] == 200


@pytest.mark.parametrize(
    ("text", "tokens", "words"),
    [
        ("", None, "empty"),
        ("  \n ", None, "empty"),
        ([], None, "no tokens"),
        ([5] * 400, 400, "--tokens 256"),
        ([5] * 9, 1, "at least 2"),
        ("a text", None, "needs a tokenizer"),
    ],
)
def test_text_that_cannot_be_used(model, text, tokens, words):
    with pytest.raises(BadInput, match=words):
        foveate.profile(model, None, text, tokens=tokens, metrics=["entropy"])


def test_unknown_metric_gets_a_suggestion(model, ids):
    with pytest.raises(UnknownName, match="did you mean 'entropy'"):
        foveate.profile(model, None, ids, metrics=["entropi"])


def test_a_run_that_does_not_fit_never_starts(model, ids):
    seen = []
    with pytest.raises(TooBig, match="--tokens"):
        foveate.profile(model, None, ids, metrics=["entropy"], max_memory=1 << 20, progress=lambda *a: seen.append(a))
    assert not seen


def test_the_estimate_grows_linearly(model):
    a, b, c = (estimate_bytes(model, n) for n in (1000, 2000, 3000))
    assert abs((c - b) - (b - a)) < 1 << 20


def test_a_model_that_gives_nan_is_told(ids):
    broken = tiny.model("llama").eval()
    with torch.no_grad():
        broken.model.layers[0].mlp.down_proj.weight.fill_(torch.nan)
    with pytest.raises(BadInput, match="NaN"):
        foveate.profile(broken, None, ids, metrics=["entropy"])


def test_saved_and_loaded_is_the_same(profile, tmp_path):
    profile.save(tmp_path / "p")
    again = foveate.Profile.load(tmp_path / "p")
    pd.testing.assert_frame_equal(again.heads, profile.heads)
    pd.testing.assert_frame_equal(again.keys, profile.keys, check_dtype=False)
    assert again.info == json.loads(json.dumps(profile.info))
    pictures = ["arrays.npz", "heads.parquet", "keys.parquet", "opened.json", "opened.npz", "profile.json"]
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == pictures
    assert list(tmp_path.iterdir()) == [tmp_path / "p"], "a temporary folder stayed behind"
    profile.save(tmp_path / "p")
    assert list(tmp_path.iterdir()) == [tmp_path / "p"]


def test_a_folder_with_other_things_is_left_alone(profile, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BadInput, match="no profile"):
        profile.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_full_disk_leaves_the_old_profile_and_nothing_else(profile, tmp_path, monkeypatch):
    profile.save(tmp_path / "p")
    before = (tmp_path / "p" / "profile.json").read_bytes()

    def full(self, path, **_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    with pytest.raises(BadInput, match="No space left on device; nothing was written"):
        profile.save(tmp_path / "p")
    assert list(tmp_path.iterdir()) == [tmp_path / "p"]
    assert (tmp_path / "p" / "profile.json").read_bytes() == before


@pytest.mark.parametrize("name", ["profile.json", "heads.parquet", "keys.parquet"])
def test_damaged_profiles_are_told(profile, tmp_path, name):
    profile.save(tmp_path / "p")
    file = tmp_path / "p" / name
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(BadInput, match="damaged"):
        foveate.Profile.load(tmp_path / "p")
    file.unlink()
    with pytest.raises(BadInput, match=f"{name} is missing"):
        foveate.Profile.load(tmp_path / "p")


def test_another_format_is_told(profile, tmp_path):
    profile.save(tmp_path / "p")
    (tmp_path / "p" / "profile.json").write_text('{"format": 99}')
    with pytest.raises(BadInput, match="format 99"):
        foveate.Profile.load(tmp_path / "p")


def test_plot_draws_the_table(profile):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    ax = profile.plot("entropy")
    assert ax.images[0].get_array().shape == profile.metric("entropy").shape
    with pytest.raises(UnknownName, match="did you mean"):
        profile.plot("entropie")


def test_an_encoder_and_an_encoder_decoder_are_profiled():
    for family in ("bert", "t5"):
        model = tiny.model(family).eval()
        found = foveate.profile(model, None, list(range(3, 60)), metrics=["entropy", "column_mass", "output_norm"])
        assert found.heads.value.notna().any()
        assert positions(model) is None or positions(model) >= 60


def test_the_summary_counts_what_it_says():
    rows = [
        {"layer": n, "head": h, "metric": m, "value": v, "low": v, "high": v}
        for n in range(2)
        for h in range(4)
        for m, v in {
            "first_token_mass": 0.9 if n else 0.1,
            "streaming_mass": 0.99 if (n, h) in {(0, 0), (0, 1), (1, 0), (1, 2)} else 0.5,
            "retrieval_score": 0.4 if (n, h) == (1, 3) else 0.0,
        }.items()
    ]
    info = {"query_heads": 4, "kv_heads": 2, "tokens": 1028, "layers": {"0": "a", "1": "b"}}
    info["summary"] = summarise(pd.DataFrame(rows), info)
    s = info["summary"]
    assert list(s["sink_layers"]) == [1]
    assert len(s["local_heads"]) == 4
    assert s["local_kv_heads"] == [[0, 0]], "a KV head is local only when all its query heads are"
    assert s["kv_cache_share_to_give_up"] == pytest.approx(0.25 * (1 - 257 / 1028), abs=1e-4)
    assert s["retrieval_heads"] == [[1, 3, 0.4]]
    assert len(sentences(info)) == 3

    from foveate.cli.profile import head_map, marked

    profile = foveate.Profile(pd.DataFrame(rows), pd.DataFrame(), info)
    assert marked(profile)[1, 3] == "[bold green]R[/]", "retrieval wins over the sink"
    assert marked(profile)[1, 0] == "[blue]L[/]", "local wins over the sink"
    assert marked(profile)[1, 1] == "[red]S[/]"
    assert head_map(profile).row_count == 2
    assert ranges([3, 4, 5, 9]) == "3-5, 9"
