"""`foveate train-probe`: what a person sees who asks for a comparison, interrupts it, or asks for something else."""

from __future__ import annotations

import json
import re

import pytest
from rich.console import Console

from commands import here, process
from foveate.cli.train_probe import duration, ends, number, show

SMALL = ("--quick", "--steps", 3, "--seeds", 2, "--width", 8, "--workers", 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("probe") / "out"
    return out, here("train-probe", "mqar", "--rule", "softmax", "--rule", "relu", *SMALL, "--out", out)


def test_rules_are_trained_and_compared(made):
    out, done = made
    assert done.returncode == 0, done.stderr
    assert re.search(r"multi-query associative recall: 4 models; training takes about \d+ s, 1 at a time", done.stdout)
    for word in ("softmax", "relu", "recall", "95 % t-intervals over seeds", "4.12 KB", "report.html"):
        assert word in done.stdout, word
    results = json.loads((out / "results.json").read_text())
    assert [(r["mixer"], r["width"], r["cells"][0]["seeds"]) for r in results["rows"]] == [
        ("softmax", 8, 2),
        ("relu", 8, 2),
    ]
    assert len(results["runs"]) == 4 and all(len(run["losses"]) == 3 for run in results["runs"])
    assert "multi-query associative recall" in (out / "report.html").read_text()


def test_a_folder_with_results_is_gone_on_with_only_when_asked(made):
    out, _ = made
    again = here("train-probe", "mqar", "--rule", "softmax", "--rule", "relu", *SMALL, "--out", out)
    assert again.returncode == 2 and "go on with --resume, or name another folder with --out" in again.stderr
    before = (out / "results.jsonl").read_text()
    again = here(
        "train-probe", "mqar", "--rule", "softmax", "--rule", "relu", *SMALL, "--out", out, "--resume", "--json"
    )
    assert again.returncode == 0 and (out / "results.jsonl").read_text() == before
    assert "4 models, 4 of them trained\n" in again.stderr
    assert json.loads(again.stdout) == json.loads((out / "results.json").read_text())
    other = here("train-probe", "mqar", "--rule", "softmax", *SMALL, "--out", out, "--resume")
    assert other.returncode == 2 and "mixer was ['softmax', 'relu'] and is 'softmax'" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("mqqar",), "no training probe is called 'mqqar'; did you mean 'mqar'?"),
        (("mqar", "--rule", "sofmax"), "no rule is called 'sofmax'; did you mean 'softmax' or 'soft'?"),
        (("mqar", "--seeds", 0), "0 seeds: give at least 1"),
        (("mqar", "--steps", 0), "steps must be from 1"),
        (("characters", "--text", "nowhere.txt"), "no such file: nowhere.txt"),
    ],
)
def test_what_cannot_be(tmp_path, arguments, says):
    done = here("train-probe", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert says in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_text_of_ones_own(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("to be or not to be, that is the question. " * 200)
    done = here("train-probe", "characters", "--text", file, *SMALL, "--out", tmp_path / "out", "--rule", "softmax")
    assert done.returncode == 0, done.stderr
    assert "loss @ 32" in done.stdout and "loss @ 512" in done.stdout


def test_the_command_is_named_as_people_type_it(tmp_path):
    assert "train-probe" in process("--help").stdout


def test_numbers_stay_whole_on_a_narrow_screen(capsys):
    columns = [{"measure": m, "title": m.replace("_", " "), "share": False} for m in ("loss", "late_loss", "peak")]
    cells = [
        {"measure": c["measure"], "at": at, "value": -1.2345, "low": -12.3456, "high": 12.3456, "seeds": 3}
        for c in columns
        for at in (32, 512)
    ]
    model = {"width": 4096, "parameters": 123_456_789, "state_bytes": 65536, "seconds": 600.0, "failed": 1}
    rows = [{"mixer": mixer, "cells": cells} | model for mixer in ("softmax", "sigmoid:length=64")]
    show(Console(width=80), {"rows": rows, "columns": columns, "trained_at": 32})
    lines = capsys.readouterr().out.splitlines()
    assert sum("-1.234" in line and "(-12.346 to 12.346)" in line for line in lines) == 12
    assert sum("late loss @ 512" in line and "softmax" in line and "4096" in line for line in lines) == 1
    assert sum("sigmoid:length=64 (1 failed)" in line and "123,456,789" in line for line in lines) == 1


def test_how_numbers_are_said():
    assert [duration(s) for s in (0.2, 40, 200, 7000)] == ["1 s", "40 s", "3 min", "1 h 57 min"]
    cell = {"value": 0.951, "low": 0.9, "high": 1.04}
    assert number(cell, share=True) == ("95%", "(90% to 100%)")
    assert number(cell, share=False) == ("0.951", "(0.900 to 1.040)")
    assert number(None, share=True) == ("–", "") and number(cell | {"low": None}, share=True) == ("95%", "")
    rows = [{"cells": [{"measure": "loss", "at": at} for at in (1, 2, 4)]}]
    assert ends(rows, "loss") == [1, 4] and ends(rows, "right") == []
