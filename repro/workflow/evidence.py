"""What a run directory or a bundle proves: every hash chain recomputed, then the values that the judge may use.

- `load`: files to evidence by (arm, seed), and the faults found; no torch, no clock, nothing trusted
- a chain starts from the plan's digest and the segment's; an arm's measures from its last segment's chain
- metrics that follow from what is there are added: `time/seconds` and `time/work`, the measured training time of all the
  arm's segments (bound by the manifest, outside the chains, never the same twice), and `recovery/…`, for arms of several
"""

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from records import canonical
from records.errors import InvalidError, MalformedError, ReproError, UnsupportedError, UsageError
from repro.config import decimal_string, is_decimal
from repro.judge import ArmEvidence
from repro.trace import Probe, check_chain, genesis
from repro.workflow.jobs import ArmJob, SegmentJob, jobs
from repro.workflow.plan import plan_digest

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """Evidence by (arm, seed); `faults` are chains that do not hold; `missing` files of arms that were not run.

    `losses`: by (arm, seed), for each part of its training, a segment with those that just go on from it: (tokens since the
    arm's start, mean loss of a step group).
    `timed`: likewise, (measured seconds since the arm's start, mean loss); empty where a time is lacking.
    `probes`: likewise, (tokens since the arm's start, what the trace says of the live model there).
    """

    evidence: Mapping[tuple[str, int], ArmEvidence]
    losses: Mapping[tuple[str, int], list[list[tuple[int, float]]]]
    timed: Mapping[tuple[str, int], list[list[tuple[float, float]]]]
    probes: Mapping[tuple[str, int], list[list[tuple[int, Probe]]]]
    faults: tuple[str, ...]
    missing: tuple[str, ...]
    lines: int


def read_directory(folder: Path) -> dict[str, bytes]:
    """Files of a run directory that count as evidence, by their path within it; UsageError where one is unreadable."""
    names = [*folder.glob("segments/*/*.jsonl"), *folder.glob("arms/*/*.jsonl")]
    try:
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(names)}
    except OSError as error:
        raise UsageError(f"cannot read {error.filename}: {error.strerror}") from error


def load(plan: Mapping[str, Any], files: Mapping[str, bytes]) -> Loaded:
    """Evidence that `files` hold for `plan`.

    Raises:
        UnsupportedError: a trace of another version, of which nothing can be said.
    """
    digest = plan_digest(plan)
    evidence: dict[tuple[str, int], ArmEvidence] = {}
    faults: list[str] = []
    missing: list[str] = []
    checked: dict[str, tuple[str, str, str] | None] = {}
    traced: dict[str, SegmentJob] = {}
    losses: dict[str, list[tuple[int, float]]] = {}
    curves: dict[tuple[str, int], list[list[tuple[int, float]]]] = {}
    timed: dict[tuple[str, int], list[list[tuple[float, float]]]] = {}
    looks: dict[str, list[tuple[int, Probe]]] = {}
    probes: dict[tuple[str, int], list[list[tuple[int, Probe]]]] = {}
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
                _check_own(segment, entries, traced, name)
                checked[segment.digest] = (status, head, entries[-1].get("weights", "")) if status else None
                losses[segment.digest] = [(e["step"], float(e["loss"])) for e in entries if e.get("type") == "step"]
                looks[segment.digest] = [(e["step"], _probe(e)) for e in entries if e.get("type") == "probe"]
            except UnsupportedError:
                raise
            except ReproError as error:
                faults.append(str(error))
        last = checked[job.segments[-1].digest]
        if job.file not in files:
            if last and last[0] == "diverged":
                evidence[job.arm, job.seed] = ArmEvidence(status="diverged", weights=last[2], metrics={})
            else:
                missing.append(job.file)
            continue
        if last is None or not all((found := checked[s.digest]) and found[0] == "complete" for s in job.segments):
            faults.append(f"{job.file}: measures of an arm whose segments are not all complete")
            continue
        try:
            entries, _ = check_chain(files[job.file], genesis(last[1], job.digest), name=job.file)
            lines += len(entries)
            curves[job.arm, job.seed] = _along(job, losses)
            timed[job.arm, job.seed] = _over_time(job, losses, files)
            probes[job.arm, job.seed] = _along(job, looks)
            derived = _recovery(job, losses) | _seconds(job, files)
            evidence[job.arm, job.seed] = _arm_evidence(job, entries, derived, weights=last[2])
        except UnsupportedError:
            raise
        except ReproError as error:
            faults.append(str(error))
    return Loaded(
        evidence=evidence, losses=curves, timed=timed, probes=probes, faults=tuple(faults), missing=tuple(missing),
        lines=lines,
    )  # fmt: skip


def _check_segment(segment: SegmentJob, entries: list[dict[str, Any]], name: str) -> str:
    """`complete`, `diverged`, or `` for a segment that has not come to its end; raises where it is not the plan's."""
    train = segment.config["train"]
    steps, every, tokens = train["steps"], train["trace_every"], train["batch"] * train["context"]
    planned = -(-steps // every)
    traced = [entry for entry in entries if entry.get("type") == "step"]
    probed = _check_probes(segment, entries, name)
    for number, entry in enumerate(traced, start=1):
        step = min(number * every, steps)
        if entry.get("step") != step or entry.get("tokens") != step * tokens:
            raise InvalidError(f"{name} line {number}: expected step {step} with {step * tokens} tokens as planned")
        if not is_decimal(entry.get("loss")) or not is_decimal(entry.get("grad_norm")):
            raise MalformedError(f"{name} line {number}: expected loss and grad_norm as decimal strings")
        if step % train["hash_every"] == 0 and step < steps and "weights" not in entry:
            raise InvalidError(f"{name} line {number}: expected a weight hash at step {step}")
    if not entries or entries[-1].get("type") not in ("end", "diverged"):
        return ""
    if len(traced) + probed != len(entries) - 1:
        raise InvalidError(f"{name}: entries of an unknown type")
    if entries[-1]["type"] == "diverged":
        return "diverged"
    if len(traced) != planned or entries[-1].get("steps") != steps:
        raise InvalidError(f"{name}: expected {planned} step entries up to step {steps}, found {len(traced)}")
    if probed != _probes_planned(train):
        raise InvalidError(f"{name}: expected {_probes_planned(train)} probes, found {probed}")
    return "complete"


def _check_own(segment: SegmentJob, entries: list[dict[str, Any]], traced: dict[str, SegmentJob], name: str) -> None:
    """Two seeds see different text in a different order, so that no two traces of theirs are alike: one was copied."""
    other = traced.setdefault(canonical.digest(entries), segment)
    if other.seed != segment.seed and any("loss" in entry for entry in entries):
        raise InvalidError(f"{name}: the trace of seed {segment.seed} is that of seed {other.seed}: one was copied")


def _probes_planned(train: Mapping[str, Any]) -> int:
    """Probes of a segment's trace: one every `probe_every` steps from 0 on, and one at the last step."""
    every, last = train.get("probe_every", 0), train["steps"] - 1
    return last // every + 1 + bool(last % every) if every else 0


def _check_probes(segment: SegmentJob, entries: list[dict[str, Any]], name: str) -> int:
    """Number of probes; raises where one is not the plan's, out of its place, or not of the segment's experts."""
    model, train = segment.config["model"], segment.config["train"]
    found, done = 0, 0
    for number, entry in enumerate(entries, start=1):
        if entry.get("type") == "step":
            done += 1
        if entry.get("type") != "probe":
            continue
        if found == _probes_planned(train):
            raise InvalidError(f"{name} line {number}: a probe that the plan does not ask for")
        step = min(found * train["probe_every"], train["steps"] - 1)
        if entry.get("step") != step or done != step // train["trace_every"]:
            raise InvalidError(f"{name} line {number}: expected a probe of step {step} after the steps before it")
        experts, load, values = model["num_experts"], entry.get("load"), entry.get("values")
        dense = model.get("dense_blocks", [])
        sparse = range(model["dense_layers"], model["num_layers"]) if experts and isinstance(dense, list) else ()
        layers = sum(layer not in dense for layer in sparse)
        if not (isinstance(load, list) and len(load) == layers and all(_is_load(row, experts) for row in load)):
            raise MalformedError(
                f"{name} line {number}: expected the load of {experts} experts in each of {layers} layers"
            )
        if not (isinstance(values, dict) and all(_is_numbers(row) for row in values.values())):
            raise MalformedError(f"{name} line {number}: expected the probe's values as lists of decimal strings")
        found += 1
    return found


def _is_numbers(row: object) -> bool:
    return isinstance(row, list) and all(is_decimal(value) for value in row)


def _is_load(row: object, num_experts: int) -> bool:
    return isinstance(row, list) and len(row) == num_experts and all(type(n) is int and n >= 0 for n in row)


def _probe(entry: Mapping[str, Any]) -> Probe:
    return Probe(
        load=tuple(tuple(row) for row in entry["load"]),
        values={name: tuple(float(value) for value in row) for name, row in entry["values"].items()},
    )


def _arm_evidence(
    job: ArmJob, entries: list[dict[str, Any]], derived: Mapping[str, str], *, weights: str
) -> ArmEvidence:
    metrics: dict[str, str] = {}
    for entry in entries:
        if entry.get("type") == "metric":
            if not isinstance(entry.get("name"), str) or not is_decimal(entry.get("value")):
                raise MalformedError(f"{job.file}: expected each metric as a name and a decimal string")
            metrics[entry["name"]] = entry["value"]
    ended = (
        bool(entries) and entries[-1] == {"type": "end", "metrics": len(metrics)} and len(entries) == len(metrics) + 1
    )
    diverged = bool(entries) and entries[-1].get("type") == "diverged"
    status = "diverged" if diverged else "complete" if ended else "incomplete"
    return ArmEvidence(status=status, weights=weights, metrics={**metrics, **derived})


def _along(job: ArmJob, found: Mapping[str, list[tuple[int, _T]]]) -> list[list[tuple[int, _T]]]:
    """What was found by step of each part, by tokens since the arm's start."""
    curve: list[list[tuple[int, _T]]] = []
    before = 0
    for segment, begins in zip(job.segments, _begins(job), strict=True):
        tokens = segment.tokens // segment.config["train"]["steps"]
        curve += [[]] * begins
        curve[-1] = curve[-1] + [(before + step * tokens, value) for step, value in found[segment.digest]]
        before += segment.tokens
    return curve


def _over_time(
    job: ArmJob, losses: Mapping[str, list[tuple[int, float]]], files: Mapping[str, bytes]
) -> list[list[tuple[float, float]]]:
    """Losses of each part by measured seconds since the arm's start; steps done twice after a kill count twice."""
    curve: list[list[tuple[float, float]]] = []
    seconds = 0.0
    for segment, begins in zip(job.segments, _begins(job), strict=True):
        reached: dict[int, float] = {}
        for group in _timing(segment, files):
            seconds += group.seconds
            reached[group.step] = seconds
        curve += [[]] * begins
        curve[-1] = curve[-1] + [(reached[step], loss) for step, loss in losses[segment.digest] if step in reached]
    return curve


def _begins(job: ArmJob) -> list[bool]:
    """Of each segment, whether a new part of the training begins with it, and it does not just go on from the one before."""
    configs = [segment.config for segment in job.segments]
    return [True] + [
        after.get("inherit") != "all" or after.get("growth") is not None or after["corpus"] != before["corpus"]
        for before, after in itertools.pairwise(configs)
    ]


_LEVEL = 5  # step groups whose mean is the level that a loss was at


def _recovery(job: ArmJob, losses: Mapping[str, list[tuple[int, float]]]) -> dict[str, str]:
    """Steps from a segment's start until the mean loss of five step groups is back at the level before it.

    The largest over the arm's later segments; one that does not come back counts with all its steps.
    """
    worst = None
    for before, after in itertools.pairwise(job.segments):
        level = math.fsum(loss for _, loss in losses[before.digest][-_LEVEL:]) / len(losses[before.digest][-_LEVEL:])
        later = losses[after.digest]
        steps = later[-1][0]
        for last in range(_LEVEL, len(later) + 1):
            window = later[last - _LEVEL : last]
            if math.fsum(loss for _, loss in window) / _LEVEL <= level:
                steps = window[0][0]
                break
        worst = max(worst or 0, steps)
    if worst is None:
        return {}
    steps = sum(segment.config["train"]["steps"] for segment in job.segments)
    return {"recovery/steps": str(worst), "recovery/share": decimal_string(worst / steps)}


def _seconds(job: ArmJob, files: Mapping[str, bytes]) -> dict[str, str]:
    """Measured training time of the arm's segments, as if it had been trained alone."""
    if any(f"{segment.folder}/timing.jsonl" not in files for segment in job.segments):
        return {}
    times = dict.fromkeys(("seconds", "work"), 0.0)
    for segment in job.segments:
        groups = _timing(segment, files)
        times["seconds"] += math.fsum(group.seconds for group in groups)
        times["work"] += math.fsum(group.work for group in groups)
    return {f"time/{name}": decimal_string(round(seconds, 3)) for name, seconds in times.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Measured times of the steps up to `step` since the group before: by the wall clock, and of the device at work."""

    step: int
    seconds: float
    work: float


def _timing(segment: SegmentJob, files: Mapping[str, bytes]) -> list[_Group]:
    """A segment's measured times, if it has any."""
    data = files.get(f"{segment.folder}/timing.jsonl", b"")
    try:
        items = [json.loads(line) for line in data.splitlines()]
        found = [
            _Group(
                step=int(item["step"]),
                seconds=float(item["seconds"]),
                work=float(item.get("cpu_seconds", item["seconds"])),
            )
            for item in items
        ]
        if not all(
            0 <= math.fsum(times) < math.inf for times in zip(*((g.seconds, g.work) for g in found), strict=True)
        ):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise MalformedError(
            f"{segment.folder}/timing.jsonl: expected a line of step and seconds a step group"
        ) from error
    return found
