"""Benchmark results in a run directory and in its bundle: each bound to the weights that a trace of the plan ends with.

- `record`: writes one beside the run's evidence
- `faults`: what in them does not hold; no torch, nothing trusted
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from records import canonical
from records.errors import ReproError, UsageError
from records.package import write_atomically
from repro.config import is_decimal
from repro.trace import check_chain, genesis
from repro.workflow.jobs import jobs
from repro.workflow.plan import plan_digest

FOLDER, SCHEMA = "evals", "repro.eval/v1"


def record(run: Path, result: Mapping[str, Any]) -> Path:
    """Writes the result under its own digest; returns the file. Raises UsageError where the run cannot be written."""
    data = canonical.dumps(dict(result))
    path = run / FOLDER / f"{canonical.sha256_hex(data)[:16]}.json"
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {path.parent}: {error.strerror}") from error
    write_atomically(path, data)
    return path


def read_directory(folder: Path) -> dict[str, bytes]:
    """Results in a run directory, by their path within it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.glob(f"{FOLDER}/*.json"))}


def faults(plan: Mapping[str, Any], files: Mapping[str, bytes]) -> list[str]:
    """Results that are not of weights that a trace of the plan ends with, or not in form."""
    found = []
    segments = {segment.digest: segment for job in jobs(plan) for segment in job.segments}
    for name, data in sorted(files.items()):
        if not name.startswith(f"{FOLDER}/"):
            continue
        try:
            value = canonical.loads(data)
            if not isinstance(value, dict) or value.get("schema") != SCHEMA or canonical.dumps(value) != data:
                found.append(f"{name!a}: expected {SCHEMA} in canonical form")
                continue
            if name != f"{FOLDER}/{canonical.sha256_hex(data)[:16]}.json":
                found.append(f"{name!a}: expected its own digest as its name")
            segment = segments.get(str(value.get("segment")))
            if segment is None or value.get("plan_sha256") != plan_digest(plan):
                found.append(f"{name!a}: evaluates no segment of the plan")
                continue
            trace = f"{segment.folder}/trace.jsonl"
            entries, _ = check_chain(files.get(trace, b""), genesis(plan_digest(plan), segment.digest), name=trace)
            if not entries or entries[-1].get("type") != "end" or entries[-1].get("weights") != value.get("weights"):
                found.append(f"{name!a}: evaluates other weights than those that {trace} ends with")
            if not _in_form(value.get("results")):
                found.append(f"{name!a}: expected results with metrics as decimal strings")
        except ReproError as error:
            found.append(f"{name!a}: {error}")
    return found


def _in_form(results: object) -> bool:
    return isinstance(results, list) and all(
        isinstance(row, dict)
        and isinstance(row.get("task"), str)
        and isinstance(row.get("metrics"), dict)
        and all(map(is_decimal, row["metrics"].values()))
        for row in results
    )
