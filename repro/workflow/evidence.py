"""What a run directory or a bundle proves: every hash chain recomputed, then the values that the judge may use.

- `load`: files to evidence by (arm, seed), and the faults found; no torch, no clock, nothing trusted
- a chain starts from the plan's digest and the segment's; an arm's measures from its last segment's chain
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from records.errors import InvalidError, ReproError
from repro.judge import ArmEvidence
from repro.trace import check_chain, genesis
from repro.workflow.plan import ArmJob, SegmentJob, jobs, plan_digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """Evidence by (arm, seed); `faults` are chains that do not hold; `missing` files of arms that were not run."""

    evidence: Mapping[tuple[str, int], ArmEvidence]
    faults: tuple[str, ...]
    missing: tuple[str, ...]
    lines: int


def read_directory(folder: Path) -> dict[str, bytes]:
    """Files of a run directory that count as evidence, by their path within it."""
    names = [*folder.glob("segments/*/*.jsonl"), *folder.glob("arms/*/*.jsonl")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(names)}


def load(plan: Mapping[str, Any], files: Mapping[str, bytes]) -> Loaded:
    """Evidence that `files` hold for `plan`."""
    digest = plan_digest(plan)
    evidence: dict[tuple[str, int], ArmEvidence] = {}
    faults: list[str] = []
    missing: list[str] = []
    checked: dict[str, tuple[str, str, str] | None] = {}
    lines = 0
    for job in jobs(plan):
        for segment in job.segments:
            if segment.digest in checked:
                continue
            checked[segment.digest] = None
            name = f"{segment.folder}/trace.jsonl"
            if name not in files:
                missing.append(name)
                continue
            try:
                entries, head = check_chain(files[name], genesis(digest, segment.digest), name=name)
                lines += len(entries)
                status = _check_segment(segment, entries, name)
                checked[segment.digest] = (status, head, entries[-1].get("weights", "")) if status else None
            except ReproError as error:
                faults.append(str(error))
        last = checked[job.segments[-1].digest]
        if job.file not in files:
            if last and last[0] == "diverged":
                evidence[job.arm, job.seed] = ArmEvidence(status="diverged", weights=last[2], metrics={})
            else:
                missing.append(job.file)
            continue
        if last is None:
            faults.append(f"{job.file}: measures of an arm whose last segment is not complete")
            continue
        try:
            entries, _ = check_chain(files[job.file], genesis(last[1], job.digest), name=job.file)
            lines += len(entries)
            evidence[job.arm, job.seed] = _arm_evidence(job, entries, weights=last[2])
        except ReproError as error:
            faults.append(str(error))
    return Loaded(evidence=evidence, faults=tuple(faults), missing=tuple(missing), lines=lines)


def _check_segment(segment: SegmentJob, entries: list[dict[str, Any]], name: str) -> str:
    """`complete`, `diverged`, or `` for a segment that has not come to its end; raises where it is not the plan's."""
    train = segment.config["train"]
    steps, every, tokens = train["steps"], train["trace_every"], train["batch"] * train["context"]
    planned = -(-steps // every)
    traced = [entry for entry in entries if entry.get("type") == "step"]
    for number, entry in enumerate(traced, start=1):
        step = min(number * every, steps)
        if entry.get("step") != step or entry.get("tokens") != step * tokens:
            raise InvalidError(f"{name} line {number}: expected step {step} with {step * tokens} tokens as planned")
        if step % train["hash_every"] == 0 and step < steps and "weights" not in entry:
            raise InvalidError(f"{name} line {number}: expected a weight hash at step {step}")
    if not entries or entries[-1].get("type") not in ("end", "diverged"):
        return ""
    if len(traced) != len(entries) - 1:
        raise InvalidError(f"{name}: entries of an unknown type")
    if entries[-1]["type"] == "diverged":
        return "diverged"
    if len(traced) != planned or entries[-1].get("steps") != steps:
        raise InvalidError(f"{name}: expected {planned} step entries up to step {steps}, found {len(traced)}")
    return "complete"


def _arm_evidence(job: ArmJob, entries: list[dict[str, Any]], *, weights: str) -> ArmEvidence:
    metrics = {str(entry["name"]): str(entry["value"]) for entry in entries if entry.get("type") == "metric"}
    ended = (
        bool(entries) and entries[-1] == {"type": "end", "metrics": len(metrics)} and len(entries) == len(metrics) + 1
    )
    diverged = bool(entries) and entries[-1].get("type") == "diverged"
    status = "diverged" if diverged else "complete" if ended else "incomplete"
    return ArmEvidence(status=status, weights=weights, metrics=metrics)
