"""`foveate steer`, `foveate ablate` and `foveate generate --plan`, as a person meets them."""

from __future__ import annotations

import json
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

import foveate
from commands import here
from foveate.core.mechanism import Mechanism
from foveate.testing import tiny

COLOURS = ("red", "blue", "green", "black")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model that reads characters."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny.model("llama").save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def a_short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Perplexity is measured on this: all of the real one as single characters takes seconds."""
    import foveate.probe

    monkeypatch.setattr(foveate.probe, "default_text", lambda: "the cat sat on the mat. " * 12)


def lines(count: int, **more: Any) -> list[dict[str, Any]]:
    """Examples that differ in their prompts; each says which of two colours a thing has."""
    made = []
    for n in range(count):
        colour, other = COLOURS[n % 4], COLOURS[(n + 1 + n // 4 % 3) % 4]
        prompt = f"Box {n} is {colour}. The colour of it is"
        made.append({"prompt": prompt, "choices": [f" {colour}", f" {other}"], "answer": 0, **more})
        made[-1] |= {"corrupted": prompt.replace(colour, other)}
    return made


def written(path: Path, examples: list[Any]) -> Path:
    """A file with one example on each line."""
    path.write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in examples))
    return path


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return written(tmp_path / "task.jsonl", lines(20))


def steer(folder: Path, task: Path, *more: Any, evaluations: int = 3) -> CompletedProcess[str]:
    return here(
        "steer", folder, "--task", task, "--evaluations", evaluations, "--out", task.parent / "plan.json", *more
    )


def refused(done: CompletedProcess[str], *words: str) -> None:
    """Told in one line, and nothing was left behind."""
    assert done.returncode == 2, done.stdout + done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("foveate: ")]
    assert len(told) == 1 and "should not happen" not in told[0], done.stderr
    for word in words:
        assert word in told[0]


# ---------------------------------------------------------------- a search, its plan, and a text under it


def test_a_plan_is_found_and_used(folder: Path, task: Path, tmp_path: Path) -> None:
    done = steer(folder, task, "--edit", "initial_token_scale:factor=3", evaluations=6)
    assert done.returncode == 0, done.stderr
    for words in ("on 10 examples, judged on 10 others", "best of 5", "held out", "right answers", "another task"):
        assert words in done.stdout
    assert "perplexity" in done.stdout and "time: a prompt of" in done.stdout
    file = tmp_path / "plan.json"
    assert f"foveate generate {folder} --plan {file}" in done.stdout.replace("\n", " ")

    plan = foveate.Plan.load(file)
    (found,) = plan.mechanisms
    assert type(found).__name__ == "InitialTokenScale"
    tries = plan.evidence["tries"]
    assert len(tries) == 5 and tries[0]["what"] == "as given"
    assert plan.evidence["training"]["with"] == max(t["objective"] for t in tries)
    assert plan.evidence["held_out"]["right"]["n"] == 10
    assert "part" not in plan.evidence
    assert str(tmp_path) not in file.read_text(), "a plan holds no paths of the machine that it was made on"

    common = ("generate", folder, "--prompt", "Box 3 is black. The colour of it is", "--tokens", 12, "--json")
    plain, under = (json.loads(here(*common, *more).stdout) for more in ((), ("--plan", file)))
    model, tokenizer = foveate.load(folder)
    inputs = tokenizer("Box 3 is black. The colour of it is", return_tensors="pt")
    with foveate.attach(model, found):
        said = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs.input_ids.shape[1] :]
    assert under["answer"] == tokenizer.decode(said, skip_special_tokens=True)
    assert under["answer"] != plain["answer"]
    shown = here(*common[:-1], "--plan", file)
    assert "under InitialTokenScale" in shown.stdout


def test_json_is_the_plan_and_nothing_else(folder: Path, task: Path, tmp_path: Path) -> None:
    done = steer(folder, task, "--edit", "temperature", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "plan.json").read_text())


def test_a_prompt_edit_changes_what_is_generated_from(folder: Path, task: Path, tmp_path: Path) -> None:
    done = steer(folder, task, "--edit", "reread", evaluations=2)
    assert done.returncode == 0, done.stderr
    assert "perplexity" not in done.stdout and "time:" not in done.stdout
    file = tmp_path / "plan.json"
    (edit,) = foveate.Plan.load(file).mechanisms
    common = ("generate", folder, "--tokens", 3, "--json")
    under = json.loads(here(*common, "--prompt", "Who?", "--plan", file).stdout)
    alone = json.loads(here(*common, "--prompt", edit.edit("Who?")).stdout)
    assert under["prompt_tokens"] == alone["prompt_tokens"] > 4
    assert under["answer"] == alone["answer"]


def test_spans_are_found_in_every_prompt(
    folder: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from foveate.finding import judging

    seen: list[tuple[tuple[int, int], ...]] = []
    attach = judging.attach

    def watched(model: Any, *mechanisms: Mechanism, **more: Any) -> Any:
        seen.extend(m.span for m in mechanisms)
        return attach(model, *mechanisms, **more)

    monkeypatch.setattr(judging, "attach", watched)
    done = steer(folder, task, "--edit", "emphasis:strength=2", "--part", "is", "--index", 0, "--no-heads")
    assert done.returncode == 0, done.stderr
    # one character each, and numbers of one digit or two before the word
    assert set(seen) == {((6, 8),), ((7, 9),)}
    assert "another task" not in done.stdout
    assert "span=" not in done.stdout, "a stand-in is not shown as if it had been found"
    assert "whose --prompt holds 'is'" in done.stdout
    plan = foveate.Plan.load(tmp_path / "plan.json")
    assert (plan.part, plan.index) == ("is", 0)
    options = (folder, "--plan", tmp_path / "plan.json", "--tokens", 3)
    done = here("generate", *options, "--prompt", "3 is it")
    assert done.returncode == 0, done.stderr
    done = here("generate", *options, "--prompt", "no such word")
    assert done.returncode == 2
    assert "'is' does not occur" in done.stderr


def test_a_table_and_a_second_task(folder: Path, tmp_path: Path) -> None:
    rows = [f"{n % 2}\tgood thing {n}" for n in range(20)]
    (tmp_path / "task.tsv").write_text("\n".join(rows) + "\n")
    done = steer(
        folder,
        tmp_path / "task.tsv",
        *("--template", "{text}\\nIt is {label}", "--columns", "label,text", "--labels", "0=bad,1=fine"),
        *("--second", written(tmp_path / "second.jsonl", lines(5)), "--edit", "sharpen", "--objective", "entropy"),
    )
    assert done.returncode == 0, done.stderr
    evidence = foveate.Plan.load(tmp_path / "plan.json").evidence
    assert evidence["held_out"]["second"]["n"] == 5
    assert evidence["objective"] == "entropy" and evidence["task"] == "task.tsv"


# ---------------------------------------------------------------- what cannot be steered


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--edit", "temprature"), ("did you mean 'temperature'",)),
        (("--edit", "entropy"), ("entropy is no edit", "measure")),
        (("--edit", "streaming"), ("streaming is no edit", "compress")),
        (("--edit", "temperature:factr=2"), ("'factr'",)),
        (("--edit", "temperature:temperature=-1"), ("temperature",)),
        (("--edit", "head_offsets"), ("HeadOffsets needs offsets", "HeadOffsets.fit(", "foveate.Plan.of")),
        (("--edit", "emphasis"), ("--part",)),
        (("--edit", "emphasis", "--part", "Bix"), ("'Bix' does not occur", "'Box'")),
        (("--edit", "emphasis", "--part", "is"), ("'is' occurs 2 times", "index")),
        (("--edit", "temperature", "--part", "is"), ("--part is", "Temperature acts on no span")),
        (("--edit", "temperature", "--objective", "acuracy"), ("did you mean 'accuracy'",)),
        (("--edit", "temperature", "--train", "1.5"), ("train=1.5",)),
        (("--edit", "temperature", "--limit", "12"), ("at least 8",)),
        (("--edit", "temperature", "--chat"), ("has no chat template",)),
        (("--edit", "expert_switch"), ("ExpertSwitch needs off, on", "ExpertSwitch.fit(")),
    ],
    ids=lambda x: " ".join(map(str, x[:4])) if "--edit" in x else "",
)
def test_what_cannot_be_steered_is_told(
    folder: Path, task: Path, tmp_path: Path, more: tuple[str, ...], words: tuple[str, ...]
) -> None:
    refused(steer(folder, task, *more), *words)
    assert [p.name for p in tmp_path.iterdir()] == ["task.jsonl"]


def test_a_single_evaluation_searches_nothing(folder: Path, task: Path) -> None:
    refused(steer(folder, task, "--edit", "temperature", evaluations=1), "--evaluations 1", "at least 2")


def test_a_broken_line_is_told_with_its_number(folder: Path, tmp_path: Path) -> None:
    broken: list[Any] = [*lines(9), '{"prompt": "a", "answer":', *lines(9), {"prompt": "b", "answer": " "}]
    done = steer(folder, written(tmp_path / "task.jsonl", broken), "--edit", "temperature")
    refused(done, "line 10: no JSON", "line 20: without choices the answer", "2 of 20 places")
    assert not (tmp_path / "plan.json").exists()
    refused(steer(folder, tmp_path / "none.jsonl", "--edit", "temperature"), "none.jsonl")
    refused(steer(folder, written(tmp_path / "task.txt", []), "--edit", "temperature"), ".jsonl")


def test_a_part_missing_from_one_held_out_prompt_is_told_before_the_search(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from foveate.finding import searching
    from foveate.tasks import read, split

    task = written(tmp_path / "task.jsonl", lines(20))
    _, held_out = split(read(task, limit=400, seed=0), 0.5, 0)
    changed = [
        e | {"prompt": e["prompt"].replace("Box", "Bag")} for e in lines(20) if e["prompt"] == held_out[3].prompt
    ]
    rest = [e for e in lines(20) if e["prompt"] != held_out[3].prompt]
    # the order of the file decides the split, so the changed one takes the place of its own
    at = next(n for n, e in enumerate(lines(20)) if e["prompt"] == held_out[3].prompt)
    written(task, [*rest[:at], *changed, *rest[at:]])
    monkeypatch.setattr(searching, "search", lambda *a, **k: pytest.fail("searched before all prompts were looked at"))
    refused(steer(folder, task, "--edit", "emphasis", "--part", "Box"), "'Box' does not occur")


def test_where_nothing_can_be_written_is_told_first(folder: Path, task: Path, tmp_path: Path) -> None:
    refused(steer(folder, task, "--edit", "temperature", "--out", tmp_path), "is a folder", "plan.json")
    refused(steer(folder, task, "--edit", "temperature", "--out", task / "plan.json"), "is a file, not a folder")
    assert [p.name for p in tmp_path.iterdir()] == ["task.jsonl"]


# ---------------------------------------------------------------- plans that cannot be used


def test_a_plan_that_cannot_be_used_is_told(folder: Path, tmp_path: Path) -> None:
    from foveate.steer import Temperature

    common = ("generate", folder, "--prompt", "Who?", "--tokens", 2, "--plan")
    foveate.Plan.of(tiny.model("llama", seed=1), Temperature(), name="another").save(tmp_path / "plan.json")
    refused(here(*common, tmp_path / "plan.json"), "this plan is for another", "foveate steer")
    refused(here(*common, tmp_path / "gone.json"), "no such plan")
    refused(here(*common, tmp_path), "is a folder")
    (tmp_path / "broken.json").write_text("{")
    refused(here(*common, tmp_path / "broken.json"), "is no JSON")
    plan = json.loads((tmp_path / "plan.json").read_text())
    for name, value, words in (("temprature", 2.0, "did you mean 'temperature'"), ("temperature", -2.0, "-2.0")):
        plan["mechanisms"] = [{"name": name, "parameters": {"temperature": value}}]
        (tmp_path / "other.json").write_text(json.dumps(plan))
        refused(here(*common, tmp_path / "other.json"), words)


# ---------------------------------------------------------------- ablation


def test_heads_are_ablated_and_tried_on_another_task(folder: Path, task: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "new" / "heads.json", written(tmp_path / "other.jsonl", lines(6, answer=1))
    done = here("ablate", folder, "--task", task, "--top", 3, "--count", 8, "--out", out, "--to", "zero")
    assert done.returncode == 0, done.stderr
    assert "8 examples of" in done.stdout and "a head is replaced by nothing" in done.stdout
    assert done.stdout.count("control") == 3
    found = json.loads(out.read_text())
    assert [r["role"] for r in found["table"]] == ["found"] * 3 + ["control"] * 3
    assert found["to"] == "zero" and len(found["estimates"]) == 2

    out.write_text(json.dumps({"heads": [[0, 1], [1, 2]]}))
    again = here("ablate", folder, "--task", task, "--heads", out, "--then", other, "--count", 6, "--json")
    assert again.returncode == 0, again.stderr
    found = json.loads(again.stdout)
    assert found["heads"] == [[0, 1], [1, 2]]
    assert [(r["layer"], r["head"]) for r in found["table"] if r["role"] == "found"] == [(0, 1), (1, 2)]
    assert list(found["together"]) == ["this task", str(other)]
    assert found["together"][str(other)]["heads"] == 2
    assert len(found["together"][str(other)]["controls"]) == 4
    assert found["together"][str(other)]["found"]["right"]["n"] == 6


def test_patching_and_generated_prompts(folder: Path) -> None:
    done = here("ablate", folder, "--task", "factual_recall", "--to", "patch", "--top", 1, "--count", 4, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["to"] == "patch"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--top", "0"), ("--top 0", "at least 1 head")),
        (("--count", "1"), ("--count 1", "2 examples")),
        (("--to", "resampel"), ("did you mean 'resample'",)),
        (("--task", "arithmetics"), ("did you mean 'arithmetic'", ".jsonl")),
        (("--task", "gone.jsonl"), ("cannot read gone.jsonl",)),
        (("--then", "arithmetics"), ("did you mean 'arithmetic'",)),
        (("--heads", "gone.json"), ("cannot read gone.json",)),
        (("--heads", "empty.json"), ("empty.json names no head at all",)),
        (("--heads", "words.json"), ("words.json names no heads",)),
        (("--heads", "far.json"), ("far.json names layer 7, head 0",)),
        (("--heads", "less.json"), ("less.json",)),
        (("--out", "."), ("is a folder", "heads.json")),
        (("--to", "patch", "--task", "uncorrupted.jsonl"), ("corrupted",)),
    ],
    ids=lambda x: " ".join(x[:4]) if x[0].startswith("--") else "",
)
def test_what_cannot_be_ablated_is_told(
    folder: Path, task: Path, tmp_path: Path, more: tuple[str, ...], words: tuple[str, ...]
) -> None:
    heads = {"empty": [], "far": [[0, 1], [7, 0]], "less": [[-1, 0]]}
    for name, pairs in heads.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"heads": pairs}))
    (tmp_path / "words.json").write_text('{"heads": "all"}')
    plain = [{k: v for k, v in e.items() if k != "corrupted"} for e in lines(4)]
    written(tmp_path / "uncorrupted.jsonl", plain)
    before = sorted(tmp_path.iterdir())
    refused(here("ablate", folder, "--task", task, "--count", 4, *more, cwd=tmp_path), *words)
    assert sorted(tmp_path.iterdir()) == before
