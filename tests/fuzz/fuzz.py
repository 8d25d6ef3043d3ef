"""Fuzzes every parser of foreign bytes with atheris: `python tests/fuzz/fuzz.py --seconds 3600`.

A finding is any exception but a ReproError, an input that takes over 2 s of processor time, or a process over 512 MB. Each
target runs in a process of its own for its share of the time; the inputs of findings stay in --findings, and one that was
mended becomes a regression test. Prints a line of JSON a target: inputs tried, coverage, findings.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE), str(HERE.parent), str(HERE.parent / "records")]

CPU_SECONDS = 2.0
MEGABYTES = 512


def one(name: str, rest: list[str]) -> None:
    """The process of one target; `rest` is for libFuzzer."""
    import atheris

    with atheris.instrument_imports(include=["records", "repro", "opentimestamps"]):
        from targets import TARGETS, run
    target = TARGETS[name]

    def test(data: bytes) -> None:
        began, before = time.process_time(), _peak()
        run(target, data)
        taken, grown = time.process_time() - began, _peak() - before
        if taken > CPU_SECONDS:
            raise TimeoutError(f"{len(data)} bytes took {taken:.1f} s")
        if grown > MEGABYTES / 4:  # libFuzzer looks once a second, and blames the input that it sees then
            raise MemoryError(f"{len(data)} bytes took {grown:.0f} MB more than any input before")

    corpus = Path(rest[0])
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    atheris.Setup([sys.argv[0], *rest], test)
    atheris.Fuzz()


def _peak() -> float:
    """The most memory that this process ever held, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3600, help="for all targets together (default: an hour)")
    parser.add_argument("--targets", help="comma-separated (default: all)")
    parser.add_argument("--findings", type=Path, default=ROOT / ".fuzz", help="folder for inputs (default: .fuzz)")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run this one input through the one of --targets")
    arguments = parser.parse_args()
    from targets import TARGETS, run

    names = arguments.targets.split(",") if arguments.targets else list(TARGETS)
    if arguments.replay:
        resource.setrlimit(
            resource.RLIMIT_DATA, (4 * MEGABYTES * 2**20,) * 2
        )  # what it finds must not take the machine along
        run(TARGETS[names[0]], arguments.replay.read_bytes())
        return 0
    found = 0
    for name in names:
        folder = arguments.findings.resolve() / name
        folder.mkdir(parents=True, exist_ok=True)
        result = _campaign(name, folder, arguments.seconds / len(names))
        found += len(result["findings"])
        print(json.dumps(result), flush=True)
    return 1 if found else 0


def _campaign(name: str, folder: Path, seconds: float) -> dict:
    """Runs one target for so long, begun again after each finding."""
    tried, coverage, log = 0, 0, ""
    deadline = time.monotonic() + seconds
    before = set(folder.iterdir())
    crashes = 0
    with tempfile.TemporaryDirectory() as corpus:
        while (left := deadline - time.monotonic()) > 1 and crashes < 20:
            done = subprocess.run(
                [sys.executable, __file__, "--one", name, corpus, f"-max_total_time={int(left) + 1}", "-timeout=60",
                 f"-rss_limit_mb={MEGABYTES}", "-max_len=65536", f"-artifact_prefix={folder}/", "-print_final_stats=1"],
                capture_output=True, text=True, errors="replace", env=os.environ | {"PYTHONHASHSEED": "0"},
            )  # fmt: skip
            log = done.stdout + done.stderr
            counts = re.findall(r"number_of_executed_units: (\d+)", log)
            tried += int(counts[-1]) if counts else 0
            coverage = max([coverage, *map(int, re.findall(r"cov: (\d+)", log))])
            if done.returncode:
                crashes += 1
                trace = done.stdout[done.stdout.find("Uncaught Python exception") :][:6000]
                (folder / f"log-{time.time_ns()}.txt").write_text(f"{trace}\n{log[-2000:]}")
        corpus_size = len(list(Path(corpus).iterdir()))
    new = sorted(path.name for path in set(folder.iterdir()) - before if not path.name.startswith("log-"))
    crash = [line for line in log.splitlines() if "Error" in line][-1:] if crashes else []
    return {
        "target": name,
        "seconds": round(seconds),
        "inputs": tried,
        "coverage": coverage,
        "corpus": corpus_size,
        "findings": new if new or not crashes else ["the process died; see its log"],
        "last": crash,
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main())
