"""Commands of the replicator as typed: what they print, what they exit with, and how they refuse."""

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from command_line import ROOT, repro
from page_reader import faults

from records.package import read_bundle


def refused(code: int, *words, message: str, **more) -> None:
    """The command ends with `code` and one line on stderr that holds `message`."""
    done = repro(*words, **more)
    lines = done.stderr.decode().splitlines()
    assert done.returncode == code, done.stderr.decode()
    assert message in lines[-1]
    assert len([line for line in lines if line.startswith("repro: ")]) == 1
    assert "Traceback" not in done.stderr.decode()
    assert done.stdout == b""


def test_papers_and_claims():
    done = repro("papers", "--json")
    papers = [json.loads(line) for line in done.stdout.splitlines()]
    assert "emoe" in [paper["slug"] for paper in papers]
    done = repro("claims", "emoe", "--json")
    claims = [json.loads(line) for line in done.stdout.splitlines()]
    assert [claim["id"] for claim in claims][:3] == ["A1", "A2", "A3"]
    assert all(claim["source"] and claim["statement"] and claim["passes"] for claim in claims)
    text = repro("claims", "EMoE").stdout.decode()
    assert "replicated if all of: topk loss/2k > topk loss/1k + 2σ, p < 0.05" in text


def test_plan_prints_its_digest_and_its_own_canonical_json():
    text = repro("plan", "emoe", "--scale", "smoke").stdout.decode()
    data = repro("plan", "emoe", "--scale", "smoke", "--json").stdout.rstrip(b"\n")
    import hashlib

    assert hashlib.sha256(data).hexdigest() in text
    assert "estimate" in text


def test_judge_and_report_again(smoke_run):
    outcome = (smoke_run / "outcome.json").read_bytes()
    report = (smoke_run / "report.html").read_bytes()
    done = repro("judge", smoke_run, "--json")
    assert (done.returncode, done.stdout.rstrip(b"\n")) == (4, outcome)
    assert repro("report", smoke_run).returncode == 0
    assert (smoke_run / "report.html").read_bytes() == report


def test_the_report_stands_alone(smoke_run):
    page = (smoke_run / "report.html").read_text()
    assert faults(page) == []
    assert page.count('<figure class="plot') == 2
    for attribute in (' src="', "@import", "url(http", "<link"):
        assert attribute not in page
    for text in ("inconclusive", "Deviations from the paper", "topk-lr0.003", "95% interval", "repro run emoe"):
        assert text in page


def test_env_says_where_it_runs():
    found = json.loads(repro("env").stdout)
    assert found["environment"]["threads"] == 1
    assert len(found["code"]["sha256"]) == 64


def test_version_and_help():
    assert repro("--version").stdout.startswith(b"repro ")
    text = repro("--help").stdout.decode()
    for command in ("verify", "papers", "claims", "plan", "run", "judge", "report", "bundle", "keys", "env"):
        assert f"\n    {command} " in text


def test_no_command_is_usage():
    assert repro().returncode == 2
    assert repro("fly").returncode == 2


def test_unknown_names():
    refused(2, "claims", "bert", message="unknown paper 'bert': expected one of emo, emoe")
    refused(2, "run", "emoe", "--claims", "A1,Z7", message="unknown claim 'Z7'")
    refused(2, "run", "emoe", "--scale", "huge", message="unknown scale 'huge'")
    refused(2, "plan", "emoe", "--scale", "smoke", "--device", "cuda", message="run with --device cpu")
    refused(2, "judge", "/nonexistent", message="expected a run directory")
    refused(2, "report", message="expected either a run directory or --readme")


def test_a_folder_that_cannot_be_written(smoke_run, tmp_path):
    (tmp_path / "file").write_text("")
    refused(2, "run", "emoe", "--scale", "smoke", "--out", tmp_path / "file/run", message="cannot write to")
    refused(2, "bundle", smoke_run, "-o", tmp_path / "no/such/x.zip", message="cannot write")
    assert not (tmp_path / "no").exists()


def test_junk_in_place_of_a_plan(tmp_path):
    (tmp_path / "plan.json").write_bytes(b"\x00\xff junk")
    refused(3, "judge", tmp_path, message="UTF-8")


@pytest.mark.parametrize("package", ["torch", "safetensors"])
def test_a_missing_extra_names_its_cure(tmp_path, package):
    (tmp_path / f"{package}.py").write_text(f"raise ImportError('none', name={package!r})")
    env = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    refused(2, "run", "emoe", "--scale", "smoke", message="pip install 'pith-repro[train]'", env=env)


def test_a_missing_report_extra_is_said_before_the_training(tmp_path):
    (tmp_path / "jinja2.py").write_text("raise ImportError('none', name='jinja2')")
    env = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    out = tmp_path / "run"
    refused(2, "run", "emoe", "--scale", "smoke", "--out", out, message="pip install 'pith-repro[report]'", env=env)
    assert not out.exists()


def test_a_full_disk_leaves_nothing_half_written(smoke_run):
    """A tiny file system of our own, where this machine lets us mount one."""
    folder = Path(tempfile.mkdtemp())
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    try:
        refused(2, "bundle", smoke_run, "-o", folder / "x.repro.zip", message="No space left on device")
        assert list(folder.iterdir()) == []
        done = repro("run", "emoe", "--scale", "smoke", "--out", folder / "run")
        assert done.returncode == 2
        assert b"No space left on device" in done.stderr
        assert b"Traceback" not in done.stderr
        assert not list(folder.rglob("final.safetensors"))
        assert not (folder / "run/outcome.json").exists()
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


def test_a_disk_that_fills_up_during_the_run_loses_nothing_that_was_done(tmp_path):
    """As every user can have it: no file may grow beyond a limit, then one may, and the run goes on."""
    words = [sys.executable, "-m", "repro", "run", "emoe", "--scale", "smoke", "--claims", "A1", "--seeds", "1"]
    words += ["--out", str(tmp_path / "run"), "--workers", "2"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    done = subprocess.run(words, env=env, capture_output=True, preexec_fn=limit, timeout=240)
    assert done.returncode == 2, done.stderr.decode()
    assert b"File too large" in done.stderr
    assert b"Traceback" not in done.stderr
    assert not list(tmp_path.rglob("final.safetensors"))
    assert not list(tmp_path.rglob("outcome.json"))
    done = subprocess.run([*words, "--resume"], env=env, capture_output=True, timeout=240)
    assert done.returncode == 4, done.stderr.decode()


def test_a_run_on_a_terminal_draws_bars(tmp_path):
    """Under a pseudo-terminal the progress is drawn, with tokens/s."""
    import pty

    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "repro", "run", "emoe", "--scale", "smoke", "--claims", "A1", "--out", tmp_path / "run"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "120"},
        stdout=subprocess.DEVNULL,
        stderr=child,
    )
    os.close(child)
    shown = b""
    while True:
        try:
            part = os.read(parent, 65536)
        except OSError:
            break
        if not part:
            break
        shown += part
    os.close(parent)
    assert process.wait(timeout=60) == 4
    assert b"tokens/s" in shown
    assert b"all arms" in shown


def test_a_truncated_zip_and_junk(smoke_bundle, tmp_path):
    (tmp_path / "cut.zip").write_bytes(smoke_bundle.read_bytes()[:-100])
    (tmp_path / "junk.zip").write_bytes(os.urandom(5000))
    for name in ("cut.zip", "junk.zip"):
        done = repro("verify", tmp_path / name, "--offline")
        assert done.returncode == 3
        assert b"Traceback" not in done.stdout + done.stderr
    assert "statement.dsse.json" in read_bundle(smoke_bundle)


def test_figures_of_a_run_and_of_a_bundle_are_the_same(smoke_run, smoke_bundle, tmp_path):
    for source, out in ((smoke_run, "run"), (smoke_bundle, "bundle")):
        done = repro("report", source, "--figures", tmp_path / out)
        assert done.returncode == 0
        assert done.stdout.decode().split() == [str(path) for path in sorted((tmp_path / out).glob("*.svg"))]
    (first,) = (tmp_path / "run").glob("figure-1.svg")
    assert first.read_bytes() == (tmp_path / "bundle" / "figure-1.svg").read_bytes()
    assert first.read_text().startswith("<svg")
    refused(2, "report", tmp_path, "--figures", tmp_path / "x", message="expected a judged run or a replication bundle")
