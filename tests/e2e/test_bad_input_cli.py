"""Wrong input as typed: one line that names what was found, the right exit code, and nothing written."""

import errno
import os
from pathlib import Path

import pytest
from command_line import ROOT

from records.package import read_bundle
from repro.cli import main

FIXTURE = ROOT / "tests/fixtures/formats/v1/emoe-smoke.repro.zip"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a key of two halves, a text, an empty file and a run in it."""
    assert main(["keys", "new", str(tmp_path / "k.key")]) == 0
    (tmp_path / "text.json").write_text("no json")
    (tmp_path / "one.json").write_text('{"a":1}')
    (tmp_path / "cut.repro.zip").write_bytes(FIXTURE.read_bytes()[:2000])
    for name, data in read_bundle(FIXTURE).items():
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], code: int, message: str, *words: str | Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    capsys.readouterr()
    try:
        found = main([str(word) for word in words])
    except SystemExit as stop:  # argparse's
        found = int(str(stop.code))
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert (found, shown.out, len(lines)) == (code, "", 1), shown.err
    assert lines[0].startswith("repro: error: ") and message in lines[0]
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before


@pytest.mark.parametrize(
    ("code", "message", "words"),
    [
        (2, "argument COMMAND: invalid choice: 'veryfy'", ["veryfy"]),
        (2, "see repro run --help", ["run", "emoe", "--workers", "-1"]),
        (2, "argument --seeds: expected a number of at least 1, found 'three'", ["plan", "emoe", "--seeds", "three"]),
        (2, "expected a number of at most 10000, found '99999999999'", ["plan", "emoe", "--seeds", "99999999999"]),
        (2, "unknown claim 'Z9': expected some of A1", ["plan", "emoe", "--claims", "A1,Z9"]),
        (2, "argument form: invalid choice: 'pdf'", ["export", "pdf", FIXTURE]),
        (2, "argument what: invalid choice: 'speed'", ["bench", "speed"]),
        (2, "found no program 'no-such-python'", ["bench", "determinism", "--python", "no-such-python"]),
        (2, "cannot write run: Is a directory", ["audit", FIXTURE, "--seed", "1", "-o", "run"]),
        (2, "cannot write none/a.json: No such file", ["audit", FIXTURE, "--seed", "1", "-o", "none/a.json"]),
        (3, "cut.repro.zip: bundle: not a whole zip file", ["report", "--index", FIXTURE, "cut.repro.zip", "-o", "x"]),
        (3, "cut.repro.zip: bundle: not a whole zip file", ["audit", "cut.repro.zip"]),
        (3, "one.json: key: expected", ["verify", FIXTURE, "--trusted-keys", "one.json"]),
        (3, "text.json: strict JSON: not JSON", ["keys", "list", "--trusted-keys", "text.json"]),
        (3, "text.json: strict JSON: not JSON", ["keys", "show", "text.json"]),
        (3, "found a public key", ["export", "test-result", FIXTURE, "--key", "k.key.pub.json"]),
        (3, "found another file", ["export", "test-result", FIXTURE, "--key", "text.json"]),
        (2, "headers none: No such file or directory", ["verify", "x.json", "--block-headers", "none"]),
        (2, "found a zip; leave --batch out", ["verify", "--batch", FIXTURE]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_one_line_and_nothing_written(here, capsys, code, message, words) -> None:
    refused(capsys, code, message, *words)


def test_a_key_that_others_can_read(here, capsys) -> None:
    (here / "k.key").chmod(0o644)
    refused(capsys, 2, "can be read by others (mode 644)", "export", "test-result", FIXTURE, "--key", "k.key")


@pytest.mark.parametrize("command", ["judge", "report", "bundle"])
def test_evidence_that_cannot_be_read(here, capsys, command) -> None:
    trace = next((here / "run").glob("segments/*/trace.jsonl"))
    trace.unlink()
    trace.mkdir()
    words = ["-o", "x.repro.zip"] if command == "bundle" else []
    refused(capsys, 2, f"trace.jsonl: {os.strerror(errno.EISDIR)}", command, here / "run", *words)


def test_a_run_is_not_put_among_other_files(here, capsys) -> None:
    pytest.importorskip("torch")
    (here / "notes").mkdir()
    (here / "notes" / "mine.txt").write_text("mine")
    words = ["run", "emoe", "--scale", "smoke", "--out", "notes"]
    refused(capsys, 2, "notes: expected no folder, an empty one or a run, found 'mine.txt'", *words)


def test_a_path_that_no_reader_expected(here, capsys, monkeypatch) -> None:
    def slips(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "some/where")

    monkeypatch.setattr("repro.workflow.publish.write_report", slips)
    refused(capsys, 2, "cannot use some/where: Permission denied", "report", "run")
