"""The report as a file: what stands in it, how large it is, what it refuses. A browser looks at it in another file."""

import base64
import gzip
import json
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

import fabricated
from commands import here
from foveate.core.errors import BadInput
from foveate.profiling import Profile
from foveate.report import report, write
from foveate.report.compare import compare, table
from foveate.report.data import Detail, page_data, shares, sink_keys
from foveate.report.pack import ERROR, FLOOR, Pack, clean, coarsen, grade, quantise, script_json
from foveate.report.page import LIMIT
from foveate.report.units import describe, unit
from foveate.summary import Link, findings, sentences


@pytest.fixture(scope="module")
def profile():
    return fabricated.make()


@pytest.fixture(scope="module")
def hostile():
    return report(fabricated.make(hostile=True))


class Page(HTMLParser):
    """What a browser would make of the file: elements, and what stands in its scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.attributes, self.text = [], {}, [], []
        self.within = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.within = dict(attrs).get("id") if tag == "script" else None

    def handle_endtag(self, tag):
        self.within = None

    def handle_data(self, data):
        if self.within:
            self.scripts[self.within] = self.scripts.get(self.within, "") + data
        else:
            self.text.append(data)


def unpacked(page, name):
    return gzip.decompress(base64.b64decode(page.scripts[f"blob-{name}"]))


def test_rounding_to_8_bits_keeps_its_promise():
    share = np.concatenate([np.logspace(np.log10(FLOOR) + 1e-6, 0, 5000), [0.0, FLOOR / 3, np.nan]]).astype(np.float32)
    q = quantise(share)
    back = np.where(q > 0, FLOOR ** (1 - (q.astype(float) - 1) / 254), 0)
    assert np.abs(back[:5000] / share[:5000] - 1).max() <= ERROR * 1.001
    assert (q[-3:] == 0).all()
    assert ERROR < 0.025


def test_shades_are_doublings_of_the_mean():
    mass = np.full((1, 1000), 1.0, np.float32)
    mass[0, :5] = [0.5, 1.4, 2.9, 100, np.nan]
    mean = np.nan_to_num(mass).mean()
    expected = [0, 1, 2 if 2.9 / mean >= 2 else 1, 7, 0]
    assert grade(mass)[0, :5].tolist() == expected


def test_coarser_maps_lose_no_mass():
    mass = np.random.default_rng(0).random((3, 10, 10)).astype(np.float32)
    less, edges = coarsen(mass, [*range(0, 50, 5), 53], 4)
    assert less.shape == (3, 4, 4)
    assert edges == [0, 15, 30, 45, 53]
    assert np.allclose(less.sum((-1, -2)), mass.sum((-1, -2)))
    assert np.allclose(less[:, 3, 3], mass[:, 9, 9])
    assert coarsen(mass, list(range(11)), 10)[0] is mass


def test_the_page_holds_the_map_of_the_profile(profile):
    page = Page(report(profile))
    data = json.loads(page.scripts["data"])["profiles"][0]
    place = data["map"]["values"]
    raw = np.frombuffer(unpacked(page, "arrays"), np.uint8, np.prod(place["shape"]), place["at"]).reshape(
        place["shape"]
    )
    back = np.where(raw > 0, FLOOR ** (1 - (raw.astype(float) - 1) / 254), 0)
    edges = profile.info["map_edges"]
    expected = shares(profile.arrays["attention_map"].reshape(12, 16, 16), edges)
    big = expected > 10 * FLOOR
    assert np.abs(back[big] / expected[big] - 1).max() <= ERROR * 1.01
    # a row of shares sums to one: nothing was lost on the way
    assert np.abs(back.sum(-1) - 1).max() < 0.03


def test_sentences_link_to_their_evidence(profile):
    html = report(profile)
    page = Page(html)
    measured = set(profile.heads.metric)
    links = [p for parts in findings(profile.info) for p in parts if isinstance(p, Link)]
    assert len(links) >= 8
    for link in links:
        assert link.metric in measured
        assert f">{link.text}</a>" in html
    assert ("data-head", "2.1") in page.attributes
    assert {dict([a])["data-metric"] for a in page.attributes if a[0] == "data-metric"} <= measured
    said = "".join(page.text)
    for sentence in sentences(profile.info):
        assert sentence in said, "the page says what the terminal says"


def test_hostile_text_stays_text(hostile):
    page = Page(hostile)
    plain = Page(report(fabricated.make()))
    # skipped metrics add a heading and a list, nothing else may differ
    extra = sorted(page.tags)
    for tag in [*plain.tags, "h4", "dl", "dt", "dd"]:
        extra.remove(tag)
    assert extra == []
    assert not [k for k, _ in page.attributes if k.startswith("on")]
    assert "\x00" not in hostile
    assert "\u202e" not in hostile
    hostile.encode("utf-8")
    texts = json.loads(unpacked(page, "texts"))
    assert texts["pieces"][0][1 : 1 + len(fabricated.HOSTILE)] == fabricated.HOSTILE, "the text itself is kept whole"
    assert "<" not in page.scripts["data"]


def test_control_characters_become_visible():
    assert clean("a\x00b\x1b\x7f\x85\u202e\u2066") == "a␀b␛␡‹U+0085›‹U+202E›‹U+2066›"
    assert clean("\ud83d") == "\ufffd"
    assert clean("\ud83d\ude00 שלום") == "😀 שלום"
    assert clean("👩\u200d👧\u200b\n") == "👩\u200d👧‹U+200B›⏎"
    assert "<" not in script_json({"a": "</script><!--"})


def test_two_reports_of_one_profile_are_the_same(profile):
    def without_ids(html):
        page = Page(html)
        return {name: text for name, text in page.scripts.items() if name != "figures"}

    assert without_ids(report(profile)) == without_ids(report(profile))


def test_3_mb_hold_8192_tokens_and_270_heads():
    html = report(fabricated.large())
    size = len(html.encode())
    assert size <= LIMIT == 3_000_000
    data = json.loads(Page(html).scripts["data"])["profiles"][0]
    assert len(data["heads"]) == 270
    assert data["map"]["values"]["shape"] == [270, 64, 64], "the map of every head at 64 bins"
    assert data["shades"]["values"]["shape"] == [270, 8192], "each token has its shade"
    assert len(data["maps"]) == 12
    assert min(len(m["edges"]) - 1 for m in data["maps"]) >= 128
    assert "To keep this file small: fine maps at" in html


def test_what_does_not_fit_is_left_out_and_said():
    pack = Pack()
    data, notes = page_data(fabricated.make(), table(fabricated.make()), Detail(0, 4, 10, 950), pack)
    assert data["maps"] == []
    assert data["map"]["bins"] == 4
    assert data["shades"]["values"]["shape"] == [12, 9]
    assert len(data["windows"]) == 1
    said = "; ".join(notes)
    assert "no fine maps" in said
    assert "4 bins" in said
    assert "stretches of 10 tokens" in said
    assert "2 of 3 windows" in said


@pytest.mark.parametrize("pictures", [True, False])
def test_few_metrics_are_enough(pictures):
    whole = fabricated.make(pictures=pictures)
    heads = whole.heads[whole.heads.metric == "induction"]
    info = whole.info | {"summary": {"thresholds": {}, "heads": 12}}
    html = report(Profile(heads, whole.keys.iloc[:0], info, whole.arrays, whole.maps, whole.windows, whole.pieces))
    assert "None of the metrics that the sentences are made of" in html
    assert "DecompressionStream" in html


def test_a_profile_without_heads_is_refused(profile):
    with pytest.raises(BadInput, match="has no heads"):
        report(Profile(profile.heads.iloc[:0], profile.keys, profile.info))


def test_sinks_are_those_above_the_threshold(profile):
    found = sink_keys(profile)
    part = profile.keys[(profile.keys.metric == "sink_rate_importance") & (profile.keys.value > 0.3)]
    assert found["all"] == part.key.nunique()
    assert found["heads"] == len(part[["layer", "head"]].drop_duplicates())
    first = found["keys"][0]
    assert first["heads"] == part.key.value_counts().max()
    assert first["token"] == profile.pieces[first["key"]]


def test_units_and_meanings():
    known = np.array([0.2, 0.9])
    assert unit("entropy", known) == "nats"
    assert unit("local_mass_distance", known) == "tokens"
    assert unit("first_token_mass", known) == "%"
    assert unit("somebodys_own", np.array([-1.0, 3.0])) == ""
    entries = [{"name": name, "family": family} for name, family in (("local", "x"), ("local_mass", "y"))]
    assert describe("local_mass_16", entries)["family"] == "y"
    assert describe("unheard_of", entries)["family"] == "other"


def test_differences_are_those_whose_intervals_do_not_overlap(profile):
    other = fabricated.make(shift=0.5)
    found = compare(table(profile), table(other))
    assert found.matched
    where = [(found.metrics[m], table(profile).heads[h]) for m, h in np.argwhere(found.exceeds)]
    assert where == [("induction", (1, 1))]
    # facts of a text have no interval to exceed
    changed = other.heads.copy()
    changed.loc[changed.metric == "sink_rate", ["value", "low", "high"]] += 1.0
    again = compare(table(profile), table(Profile(changed, other.keys, other.info)))
    assert again.exceeds.sum() == 1
    html = report(profile, other)
    assert "<b>1</b> of " in html
    assert "do not overlap" in html


def test_profiles_with_different_heads_are_compared_by_depth(profile):
    html = report(profile, fabricated.make(layers=2, heads=5))
    assert "A has 12 heads in 4 layers and B has 10 in 2, so no head" in html
    data = json.loads(Page(html).scripts["data"])
    assert data["compared"]["matched"] is False


def test_a_report_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = write("<p>first", tmp_path / "deep" / "r.html")
    assert file.read_text() == "<p>first"
    assert [f.name for f in file.parent.iterdir()] == ["r.html"]
    monkeypatch.setattr(type(file), "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(BadInput, match=r"No space left on device; choose another file with --out"):
        write("<p>second", file)
    assert file.read_text() == "<p>first"
    assert [f.name for f in file.parent.iterdir()] == ["r.html"]


def test_the_report_is_saved_with_the_profile(profile, tmp_path):
    profile.save(tmp_path / "p", "<p>page")
    assert (tmp_path / "p" / "report.html").read_text() == "<p>page"
    Profile.load(tmp_path / "p")


# ---------------------------------------------------------------- the command


def run(*arguments, cwd=None):
    return here("report", *arguments, cwd=cwd)


def test_the_command_draws_one_and_two(profile, tmp_path):
    a, b = profile.save(tmp_path / "a"), fabricated.make(shift=0.5).save(tmp_path / "b")
    done = run(a)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == str(a / "report.html")
    assert (a / "report.html").read_text().startswith("<!DOCTYPE html>")
    done = run(a, b, cwd=tmp_path)
    assert done.stdout.strip() == "compare-a-b.html", done.stderr
    assert "What differs" in (tmp_path / "compare-a-b.html").read_text()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "profile.json").write_text('{"format": 99}'), "profile format 99"),
        (lambda f: (f / "keys.parquet").unlink(), "keys.parquet is missing"),
        (lambda f: (f / "heads.parquet").write_bytes((f / "heads.parquet").read_bytes()[:60]), "damaged profile"),
        (lambda f: (f / "arrays.npz").write_bytes((f / "arrays.npz").read_bytes()[:200]), "damaged profile"),
        (lambda f: pd.DataFrame({"x": [1]}).to_parquet(f / "heads.parquet"), "has columns ['x']"),
    ],
)  # fmt: skip
def test_spoiled_profiles_are_one_line(profile, tmp_path, spoil, words):
    folder = profile.save(tmp_path / "a")
    spoil(folder)
    done = run(folder)
    lines = done.stderr.splitlines()
    assert done.returncode == 2
    assert len(lines) == 1, done.stderr
    assert words in lines[0]
    assert not (folder / "report.html").exists()


def test_no_folder_is_one_line(tmp_path):
    done = run(tmp_path / "nowhere")
    assert done.returncode == 2
    assert "is no saved profile" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "nowhere").exists()
