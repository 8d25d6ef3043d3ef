"""Kills runs with SIGKILL at random moments and asks for the same evidence all the same: `python tests/soak/soak.py --kills 200`.

A smoke run is killed at a random moment, resumed, killed again, up to five times, and then left to finish; sometimes it is the
run that is killed, sometimes it with its workers, sometimes a worker. What it leaves has to be bitwise that of a run that nobody
disturbed: every trace and measure, every final weight, the outcome, and all that the judge was given but measured times.
Each run is a command as a user types it; with --fork the runs are forked from one process that has everything loaded, without
their report, which costs a few seconds less a kill.
Prints a line of JSON a run, and one for all; exits with 1 where anything differed or was lost.
"""

import argparse
import collections
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from records.canonical import sha256_hex  # noqa: E402
from repro.workflow.evidence import load, read_directory  # noqa: E402
from repro.workflow.run import read_plan  # noqa: E402

#: What is run: one segment an arm, and arms of several segments that grow and share what they have in common.
RUNS = (("emoe", "A1"), ("emo", "E3"))
KILLS_A_RUN = 5
FORK = False


def command(paper: str, claims: str, folder: Path, *more: str) -> list[str]:
    words = [
        "run",
        paper,
        "--scale",
        "smoke",
        "--claims",
        claims,
        "--seeds",
        "1",
        "--workers",
        "2",
        "--out",
        str(folder),
    ]
    return [sys.executable, "-m", "repro", *words, *more]


class Forked:
    """A run in a forked process, in a session of its own; looks like what `subprocess` gives."""

    def __init__(self, words: list[str]) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the run)
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os.dup2(self.errors.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os._exit(_execute(words))

    def poll(self) -> int | None:
        if self.returncode is None and os.waitpid(self.pid, os.WNOHANG)[0]:
            self.returncode = -1  # it ended, which is all that is asked
        return self.returncode

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def communicate(self, timeout: float = 0) -> tuple[bytes, bytes]:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.errors.seek(0)
        text = self.errors.read()
        self.errors.close()
        return b"", text


def _execute(words: list[str]) -> int:
    """`repro run` without its report, its workers forked, too."""
    from repro.cli import main as repro_main
    from repro.workflow import publish

    def no_report(folder: Path) -> Path:
        return folder / "report.html"

    publish.write_report = no_report
    get = multiprocessing.get_context
    multiprocessing.get_all_start_methods = lambda: ["fork", "spawn"]  # type: ignore[method-assign]
    multiprocessing.get_context = lambda _: get("fork")  # type: ignore[method-assign,assignment]
    try:
        return repro_main(words[3:])
    finally:
        sys.stderr.flush()


def start(words: list[str]) -> Any:
    if FORK:
        return Forked(words)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def finish(words: list[str]) -> str:
    """Runs to the end; waits for workers of a killed run, which end when they find nobody to report to."""
    for _ in range(300):
        process = start(words)
        _, stderr = process.communicate(timeout=600)
        if b"in use by another run" not in stderr:
            break
        time.sleep(0.2)
    text = stderr.decode(errors="replace")
    if process.returncode != 4 or "Traceback" in text:
        raise AssertionError(f"exit code {process.returncode}: {text[-2000:]}")
    return text


def state(folder: Path) -> dict:
    """All that must come out the same: hashes of files, and the judge's input but for measured times."""
    files = {name: data for name, data in read_directory(folder).items() if not name.endswith("timing.jsonl")}
    plan = read_plan(folder)
    judged = {
        f"{arm} {seed}": (
            found.status,
            found.weights,
            sorted((k, v) for k, v in found.metrics.items() if "time" not in k),
        )
        for (arm, seed), found in load(plan, read_directory(folder)).evidence.items()
    }
    weights = {
        str(path.relative_to(folder)): sha256_hex(path.read_bytes()) for path in folder.rglob("final.safetensors")
    }
    outcome = json.loads((folder / "outcome.json").read_bytes())
    verdicts = [(item["claim"], item["verdict"]) for item in outcome["verdicts"]]
    return {"evidence": {n: sha256_hex(d) for n, d in files.items()}, "weights": weights, "judged": judged,
            "verdicts": verdicts}  # fmt: skip


def moment(folder: Path) -> str:
    """Where in a run a kill fell, by what it left."""
    if not (folder / "plan.json").exists():
        return "before the plan"
    if (folder / "outcome.json").exists():
        return "while reporting"
    if list(folder.rglob("*.tmp")) or list(folder.rglob("*.part")):
        return "while writing a checkpoint, weights or measures"
    if list(folder.glob("arms/*/*.jsonl")):
        return "while measuring and training"
    return "while training" if list(folder.glob("segments/*/trace.jsonl")) else "while starting"


def kill(process: Any, how: str) -> None:
    if how == "the run and its workers":
        os.killpg(process.pid, signal.SIGKILL)
    elif how == "the run":
        process.kill()
    else:  # a worker: any process of the group but the first
        found = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True).stdout.split()
        others = [int(pid) for pid in found if int(pid) != process.pid]
        for pid in others[-1:]:
            os.kill(pid, signal.SIGKILL)


def one(paper: str, claims: str, wanted: dict, seconds: float, generator: random.Random, kills: int) -> dict:
    """One run, killed up to `kills` times."""
    with tempfile.TemporaryDirectory(prefix="repro-soak-") as name:
        folder = Path(name) / "run"
        where: collections.Counter[str] = collections.Counter()
        ways: collections.Counter[str] = collections.Counter()
        for _ in range(kills):
            resume = ["--resume"] if (folder / "plan.json").exists() else []
            process = start(command(paper, claims, folder, *resume))
            how = generator.choice(("the run", "the run and its workers", "a worker"))
            time.sleep(generator.uniform(0.1, seconds))
            if process.poll() is not None:
                process.communicate()
                continue  # it was quicker: no kill, and no moment to count
            at = moment(folder)
            kill(process, how)
            _, stderr = process.communicate(timeout=600)
            if b"Traceback" in stderr:
                raise AssertionError(stderr.decode(errors="replace")[-2000:])
            where[at] += 1
            ways[how] += 1
        finish(command(paper, claims, folder, *(["--resume"] if (folder / "plan.json").exists() else [])))
        found = state(folder)
        left = [str(path) for path in folder.rglob("*") if path.suffix in (".tmp", ".part")]
    lost = sorted(set(wanted["evidence"]) - set(found["evidence"]))
    return {"paper": paper, "kills": sum(where.values()), "same": found == wanted, "lost": lost,
            "left_over": len(left), "moments": dict(where), "killed": dict(ways)}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--fork", action="store_true", help="fork the runs from one process that has everything loaded")
    arguments = parser.parse_args()
    global FORK
    FORK = arguments.fork
    if FORK:
        from repro.workflow import preload  # noqa: F401
    generator = random.Random(arguments.seed)
    wanted, seconds = {}, {}
    for paper, claims in RUNS:
        with tempfile.TemporaryDirectory(prefix="repro-soak-") as name:
            began = time.monotonic()
            finish(command(paper, claims, Path(name) / "run"))
            seconds[paper] = time.monotonic() - began
            wanted[paper] = state(Path(name) / "run")
    total: dict = {"runs": 0, "kills": 0, "differed": 0, "lost": 0, "left_over": 0}
    moments: collections.Counter[str] = collections.Counter()
    killed: collections.Counter[str] = collections.Counter()
    while total["kills"] < arguments.kills:
        paper, claims = RUNS[total["runs"] % len(RUNS)]
        left = min(KILLS_A_RUN, arguments.kills - total["kills"])
        found = one(paper, claims, wanted[paper], seconds[paper], generator, left)
        print(json.dumps(found), flush=True)
        total["runs"] += 1
        total["kills"] += found["kills"]
        total["differed"] += not found["same"]
        total["lost"] += len(found["lost"])
        total["left_over"] += found["left_over"]
        moments.update(found["moments"])
        killed.update(found["killed"])
    print(json.dumps(total | {"moments": dict(moments), "killed": dict(killed)}))
    return int(bool(total["differed"] or total["lost"]))


if __name__ == "__main__":
    sys.exit(main())
