"""The command line as a person meets it."""

import json
import subprocess
import sys

import pytest

from commands import here, process
from foveate import catalogue


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved tiny model with a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from foveate.testing import tiny

    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny.model("llama").save_pretrained(path)
    words = {
        "<unk>": 0,
        **{
            w: n + 3
            for n, w in enumerate(["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "then"])
        },
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path)
    return path


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("the cat sat on the mat and then the dog ran under a tree " * 12)
    return file


def test_profile_measures_and_writes(folder, text, tmp_path):
    done = process(
        "profile",
        folder,
        "--text",
        text,
        "--out",
        tmp_path / "out",
        "--metrics",
        "entropy,local_mass:widths=1+4,column_mass",
    )
    assert done.returncode == 0, done.stderr
    assert "layer" in done.stdout
    written = [
        "arrays.npz",
        "heads.parquet",
        "keys.parquet",
        "opened.json",
        "opened.npz",
        "profile.json",
        "report.html",
    ]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == written
    assert ", ".join(written) in done.stdout
    import pandas as pd

    heads = pd.read_parquet(tmp_path / "out" / "heads.parquet")
    assert {"entropy", "local_mass_1", "local_mass_4"} <= set(heads.metric)
    assert list(heads.columns) == ["layer", "head", "metric", "value", "low", "high"]


def test_json_is_json_and_nothing_else(folder, text, tmp_path):
    done = here("profile", folder, "--text", text, "--out", tmp_path / "out", "--metrics", "entropy", "--json")
    assert json.loads(done.stdout)["summary"]["entropy"] > 0


def bad(tmp_path, name, data):
    file = tmp_path / name
    file.write_bytes(data)
    return file


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("none.txt", None, "no such file"),
        ("empty.txt", b"", "is empty"),
        ("latin.txt", b"caf\xe9", "not UTF-8 (byte 3)"),
    ],
)
def test_bad_texts_are_one_line(folder, tmp_path, name, data, words):
    file = tmp_path / name if data is None else bad(tmp_path, name, data)
    done = here("profile", folder, "--text", file, "--out", tmp_path / "out")
    one_line(done, words)
    assert not (tmp_path / "out").exists()


def test_bad_requests_are_one_line(folder, text, tmp_path):
    common = ("--text", text, "--out", tmp_path / "out")
    one_line(here("profile", folder, *common, "--metrics", "entropi"), "did you mean 'entropy'")
    one_line(here("profile", folder, *common, "--metrics", "local_mass:width=3"), "did you mean 'widths'")
    one_line(here("profile", folder, *common, "--tokens", "9000"), "", code=0)
    long = tmp_path / "long.txt"
    long.write_text("the cat " * 400)
    one_line(here("profile", folder, "--text", long, "--out", tmp_path / "o", "--tokens", "600"), "--tokens 256")
    one_line(here("profile", folder, "--text", text, "--out", tmp_path / "o", "--max-memory", "0.01"), "--max-memory")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    one_line(here("profile", folder, "--text", text, "--out", tmp_path / "mine"), "no profile")
    one_line(here("profile", tmp_path / "nowhere.gguf", *common), "nowhere.gguf")


def one_line(done, words, code=2):
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    if code:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        assert len(lines) == 1, done.stderr
        assert words in lines[0]


def test_zoom_shows_and_keeps_a_window(folder, text, tmp_path):
    out, csv = tmp_path / "out", tmp_path / "w" / "window.csv"
    kept = here("profile", folder, "--text", text, "--out", out, "--metrics", "entropy", "--keep-states", "--no-maps")
    assert kept.returncode == 0, kept.stderr
    assert "keeping queries and keys of all layers: 0.00 GB" in kept.stdout
    assert sorted(p.name for p in out.parent.iterdir()) == ["out", "text.txt"], "no temporary folder stays behind"
    assert sorted(p.name for p in (out / "states").iterdir()) == [f"profile-00{n}.safetensors" for n in range(2)]
    common = ("--layer", 1, "--head", 2, "--rows", "20:30", "--keys", "5:25")
    done = here("zoom", out, *common, "--out", csv)
    assert done.returncode == 0, done.stderr
    assert "strongest pairs" in done.stdout and "█" in done.stdout
    import pandas as pd

    import foveate

    pairs = pd.read_csv(csv)
    assert len(pairs) == 10 * 20 and list(pairs.columns) == ["row", "key", "row_token", "key_token", "weight"]
    (window,) = foveate.Profile.load(out).windows
    best = pairs.loc[pairs.weight.idxmax()]
    assert best.weight == pytest.approx(window.weights.max())
    assert f"{best.weight:.3f}" in done.stdout and repr(best.key_token) in done.stdout
    for name in ("w.npz", "w.png"):
        assert here("zoom", out, *common, "--out", tmp_path / name).returncode == 0
        assert (tmp_path / name).stat().st_size > 100
    # without the states the model itself is opened, where the profile says that it was
    for file in (out / "states").iterdir():
        file.unlink()
    assert here("zoom", out, *common).returncode == 0
    assert [p.name for p in (out / "states").iterdir()] == ["profile-001.safetensors"]

    one_line(here("zoom", out, "--layer", 9, *common[2:]), "no layer 9; tiny has layers 0 to 1")
    one_line(here("zoom", out, *common[:4], "--rows", "20-30", "--keys", "5:25"), "write START:STOP")
    one_line(here("zoom", out, *common[:4], "--rows", "30:20", "--keys", "5:25"), "rows 30:20 are not in the text")
    one_line(here("zoom", out, *common, "--out", tmp_path / "w.txt"), "--out")
    one_line(here("zoom", tmp_path / "nothing", *common), "is no saved profile")
    one_line(here("zoom", out, "--layer", 0, *common[2:], "--model", tmp_path / "gone"), "--model")


def test_debug_shows_the_traceback(folder, tmp_path):
    done = process("profile", folder, "--text", tmp_path / "none.txt", "--debug")
    assert "Traceback" in done.stderr


def test_list_and_show_need_no_torch():
    code = "import sys; from foveate.cli import main; sys.argv = ['foveate', 'list']\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "assert 'torch' not in sys.modules"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for entry in catalogue.entries():
        assert entry["name"] in done.stdout
    shown = here("show", "entropy").stdout
    assert "H_i" in shown
    assert "Stabilizing Transformer Training" in shown
    one_line(here("show", "entropie"), "did you mean 'entropy'")
    one_line(here("list", "--verb", "measur"), "did you mean 'measure'")


def test_the_catalogue_is_fresh():
    assert catalogue.entries() == json.loads(json.dumps(catalogue.generate())), "run `python -m foveate.catalogue`"
