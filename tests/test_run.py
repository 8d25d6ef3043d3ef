"""The run directory: stopped at any moment, run again, judged again, bundled, and never for two runs at once."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import ROOT, repro

from records import canonical
from records.errors import InvalidError, UsageError
from repro.workflow.bundle import make_bundle
from repro.workflow.evidence import read_directory
from repro.workflow.run import finish, read_plan


def copy_of(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns(".lock"))
    return to


def test_judging_again_gives_the_same_bytes(smoke_run, tmp_path):
    again = copy_of(smoke_run, tmp_path / "run")
    before = (again / "outcome.json").read_bytes()
    (again / "outcome.json").unlink()
    finish(read_plan(again), again)
    assert (again / "outcome.json").read_bytes() == before


def test_judging_refuses_evidence_that_does_not_hold(smoke_run, tmp_path):
    again = copy_of(smoke_run, tmp_path / "run")
    name = next(name for name in sorted(read_directory(again)) if name.endswith("trace.jsonl"))
    (again / name).write_bytes((again / name).read_bytes().replace(b'"loss":"5', b'"loss":"4'))
    with pytest.raises(InvalidError, match="the chain is broken"):
        finish(read_plan(again), again)
    assert repro("judge", again).returncode == 1


def test_a_bundle_wants_a_finished_and_judged_run(smoke_run, tmp_path):
    again = copy_of(smoke_run, tmp_path / "run")
    outcome = json.loads((again / "outcome.json").read_bytes())
    outcome["verdicts"][0]["verdict"] = "replicated"
    (again / "outcome.json").write_bytes(canonical.dumps(outcome))
    with pytest.raises(InvalidError, match="not what the judge makes of the evidence"):
        make_bundle(again, key=None)
    (again / "outcome.json").unlink()
    with pytest.raises(UsageError, match="make it with repro judge"):
        make_bundle(again, key=None)
    with pytest.raises(UsageError, match=r"expected plan\.json"):
        make_bundle(tmp_path / "nothing", key=None)


def test_code_that_changed_during_the_run_is_not_bundled(smoke_run, tmp_path):
    again = copy_of(smoke_run, tmp_path / "run")
    run = json.loads((again / "run.json").read_bytes())
    run["code"]["sha256"] = "0" * 64
    (again / "run.json").write_bytes(canonical.dumps(run))
    with pytest.raises(InvalidError, match="the code changed while the run went on"):
        make_bundle(again, key=None)


def test_a_finished_run_is_not_run_again(smoke_run, tmp_path):
    again = copy_of(smoke_run, tmp_path / "run")
    done = repro("run", "emoe", "--scale", "smoke", "--out", again)
    assert done.returncode == 2
    assert b"go on with --resume" in done.stderr
    done = repro("run", "emoe", "--scale", "smoke", "--out", again, "--resume")
    assert done.returncode == 4
    assert b"0 tasks left" in done.stderr
    done = repro("run", "emoe", "--scale", "smoke", "--out", again, "--resume", "--seeds", "3")
    assert done.returncode == 2
    assert b"holds a run of another plan" in done.stderr


def test_two_runs_in_one_directory(tmp_path):
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = repro("run", "emoe", "--scale", "smoke", "--out", tmp_path)
    assert done.returncode == 2
    assert b"in use by another run" in done.stderr


def _started(folder: Path, lines: int) -> subprocess.Popen:
    """A run of the command line, once some steps were traced."""
    process = subprocess.Popen(
        [sys.executable, "-m", "repro", "run", "emoe", "--scale", "smoke", "--out", str(folder), "--workers", "2"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while len(list(folder.glob("segments/*/final.safetensors"))) < lines:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_stopped_goes_on_to_the_same_evidence(smoke_run, tmp_path, how):
    folder = tmp_path / "run"
    process = _started(folder, 3)
    if how == signal.SIGKILL:
        process.send_signal(how)
    else:
        os.killpg(process.pid, how)  # as a terminal does: the workers get Ctrl-C too
    _, stderr = process.communicate(timeout=60)
    assert not (folder / "outcome.json").exists()
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert b"--resume" in stderr
        assert b"Traceback" not in stderr
    for _ in range(100):  # the workers of a killed run end when they find nobody to report to
        done = repro("run", "emoe", "--scale", "smoke", "--out", folder, "--resume")
        if b"in use by another run" not in done.stderr:
            break
        time.sleep(0.1)
    assert done.returncode == 4, done.stderr.decode()

    def evidence(run: Path) -> dict[str, bytes]:
        return {name: data for name, data in read_directory(run).items() if not name.endswith("timing.jsonl")}

    assert evidence(folder) == evidence(smoke_run)
    assert (folder / "outcome.json").read_bytes() == (smoke_run / "outcome.json").read_bytes()


def test_a_worker_that_dies_is_said_and_recoverable(tmp_path):
    folder = tmp_path / "run"
    process = _started(folder, 2)

    def found(*words: str) -> list[str]:
        return subprocess.run(["pgrep", *words], capture_output=True, text=True).stdout.split()

    # Workers are the fork server's children; one that had just finished is missed by nobody, so the next one dies too.
    while process.poll() is None:
        if servers := found("-s", str(process.pid), "-f", "forkserver"):
            for pid in found("-P", ",".join(servers)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert b"go on with --resume" in stderr
    assert b"Traceback" not in stderr
    assert repro("run", "emoe", "--scale", "smoke", "--out", folder, "--resume").returncode == 4


def test_a_worker_whose_run_was_killed_ends_without_a_word():
    """Found by killing runs at random: it had nobody to tell of its trouble, and printed a traceback of that."""
    code = (
        "from multiprocessing import Pipe; from repro.workflow import worker; ours, theirs = Pipe(duplex=False); "
        "ours.close(); worker.main({}, 'x', 'arm', 0, None, 0, theirs, None)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert (done.returncode, done.stderr) == (1, b"")
