"""A session on a GPU, without one: its steps, what is left of a step that fails, and the tables of results."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from records.errors import UsageError
from repro.bench import gpu, moe, train
from repro.cli import main
from repro.moe.tiles import packaged


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    return []


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_each_step_leaves_its_result_and_a_failure_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    commands = {
        "tests": python("import sys; print('1 failed', file=sys.stderr); sys.exit(1)"),
        "tune": None,
        "moe": python("print('{')"),
        "train": python("import time; print('[1]', flush=True); time.sleep(60)"),
    }
    monkeypatch.setattr(gpu, "_command", lambda name, *_: commands[name])
    monkeypatch.setattr(gpu, "_GRACE_S", 0)
    assert gpu.run(tmp_path / "out", steps=None, budget=0.03, say=said.append) == 1
    assert (tmp_path / "out" / "tests.txt").read_text() == "1 failed\n"
    assert (tmp_path / "out" / "moe.json").read_text() == "{\n"
    assert not list(tmp_path.rglob("*.part"))
    assert [line.partition(" after")[0] for line in said[:-1]] == [
        "tests: exit code 1",
        "tune: skipped, for there is no test_cuda.py here, or no pytest",
        "moe: done",
        "train: out of time",
    ]
    assert "moe: no result here." in (tmp_path / "out" / "tables.md").read_text()


def test_commands_use_the_table_that_was_tuned(tmp_path: Path) -> None:
    assert gpu._command("tune", tmp_path, 9)[-4:] == ["--tiles", str(tmp_path / "tiles.json"), "--budget", "8"]  # type: ignore[index]
    assert "--tiles" not in gpu._command("moe", tmp_path, 9)  # type: ignore[operator]
    (tmp_path / "tiles.json").touch()
    assert gpu._command("moe", tmp_path, 9)[-4:] == ["--tiles", str(tmp_path / "tiles.json"), "--budget", "8"]  # type: ignore[index]
    named = gpu._command("moe", tmp_path, 9, "1,3")
    assert named is not None
    assert named[-4:] == ["--shapes", "1,3", "--budget", "8"]
    assert gpu._command("train", tmp_path, 9)[-2:] == ["--tiles", str(tmp_path / "tiles.json")]  # type: ignore[index]


@pytest.mark.parametrize(("steps", "budget"), [("moe,bench", 9), ("moe", 1)])
def test_requests_that_cannot_be(tmp_path: Path, steps: str, budget: float, said: list[str]) -> None:
    with pytest.raises(UsageError, match="expected steps of tests, tune, moe, train and a budget above 1 minute"):
        gpu.run(tmp_path, steps=steps, budget=budget, say=said.append)


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UsageError, match="expected a GPU that torch sees, found none"):
        gpu.run(tmp_path / "out", steps=None, budget=None, say=print)
    assert not (tmp_path / "out").exists()


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_tables_hold_what_the_benchmarks_gave(tmp_path: Path) -> None:
    spread = {"median": 0.5, "low": 0.25, "high": 0.75}
    names = ["dense", "gemms", "triton"]
    shape: dict[str, Any] = {"tokens": 32, "d_model": 16, "d_expert": 8, "num_experts": 4, "top_k": 2, "load": "zipf"}
    shape |= {"failed": {"liger": "a | b"}, "absent": {"sonic": "away"}, "cost_of_determinism": {"layer": spread}}
    shape |= {"goal": {"share_of_gemms": 0.65, "reached": spread, "met": False}}
    for part in ("forward", "backward"):
        shape[f"{part}_tflop_per_s"] = dict(zip(names, (100, 200, 300), strict=True))
        shape[f"{part}_share_of_gemms"] = dict.fromkeys(names, spread)
    result = moe.measure(shapes=[], rounds=2, budget=-1) | {"shapes": [shape], "shapes_left": 3}
    (tmp_path / "moe.json").write_text(json.dumps(result))
    launch = {"tile": [128, 128, 64, 8, 3, 1], "before": 2.0, "after": 1.0, "refused": {"1 2": "why"}}
    widths = [{"d_model": 8, "d_expert": 4, "launches": {"up": launch}}, {"d_model": 9, "d_expert": 9, "failed": "x"}]
    tuned = {"place": "here", "minutes": 3, "widths_left": 1, "widths": widths}
    (tmp_path / "tune.json").write_text(json.dumps(tuned))
    text = gpu.tables(tmp_path)
    assert "3 shapes were not begun" in text
    assert "train: no result here." in text
    assert ["32, 16, 8, 4, 2, zipf", "100", "200", "300", *[""] * 7, "0.50"] in rows(text)
    assert [
        "32, 16, 8, 4, 2, zipf",
        "0.5 (0.25 to 0.75) of 0.65",
        "0.5 (0.25 to 0.75)",
        "",
        "liger: a / b; sonic: away",
    ] in rows(text)
    assert ["8, 4", "up", "2.000", "1.000", "128 128 64 8 3 1", "1 2: why"] in rows(text)
    assert ["9, 9", "", "", "", "x", ""] in rows(text)


def test_a_training_result_becomes_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "_SIZES", {"cpu": {"nano": (train._NANO, 1)}})
    monkeypatch.setattr(train, "_CURVE", {"cpu": (train._NANO, 1, (8, 16))})
    (tmp_path / "train.json").write_text(json.dumps(train.measure(rounds=2, steps=1)))
    found = rows(gpu.tables(tmp_path))
    assert [row[0] for row in found] == ["size", "---", "nano", "experts", "---", "8", "16"]
    assert found[5][2] == "1 (1 to 1)"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["moe", "--shapes", "0"], "--shapes: expected numbers from 1 to 8 with commas, found '0'"),
        (["moe", "--shapes", "1,²"], "--shapes: expected numbers from 1 to 8 with commas"),
        (["moe", "--tiles", "nowhere.json"], "--tiles: cannot read nowhere.json: No such file"),
        (["tune"], "bench tune: expected --tiles FILE"),
        (["tune", "--tiles", "t.json"], "bench tune: expected triton"),
    ],
)
def test_the_command_line_names_what_cannot_be(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["bench", *words]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not list(tmp_path.iterdir())


def test_named_shapes_are_measured_with_a_given_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "tiles.json"
    table.write_text(packaged().text())
    assert main(["bench", "moe", "--shapes", "8", "--tiles", str(table), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [shape["d_model"] for shape in result["shapes"]] == [64]
    table.write_text("{}")
    assert main(["bench", "moe", "--shapes", "8", "--tiles", str(table)]) == 3
    assert "expected schema repro.moe.tiles/v1" in capsys.readouterr().err.replace("\n", " ")


def test_a_failure_of_ours_is_an_exit_code_and_one_of_theirs_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, code in (("triton", 1), ("liger", 0)):
        monkeypatch.setattr(moe, "measure", lambda name=name, **_: {"shapes": [{"failed": {name: "why"}}]})
        assert main(["bench", "moe"]) == code
