"""Audit by execution: arms of a bundle, drawn by the auditor, are trained and measured again from the plan alone.

- `draw`: which arms and seeds, from a seed that the auditor chooses after the bundle was published
- `compare`: the evidence of the second execution against the bundle's

Where the numeric environment, the code and the corpora are those of the plan, every chain has to be the same bytes. Where one of
them differs, traced losses and measured values may differ by the plan's tolerance, and the result says so.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from records.errors import IndeterminateError, ReproError
from repro.config import encode
from repro.data import corpus
from repro.environment import code_state, numeric_environment
from repro.pretrained import expect
from repro.workflow.evidence import read_directory
from repro.workflow.plan import ArmJob, jobs

Agreement = Literal["bitwise", "within_tolerance", "differs", "missing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditedArm:
    """One arm and seed: how well it agreed, and the largest difference of a loss or metric (nats/token; 0 if bitwise)."""

    arm: str
    seed: int
    agreement: Agreement
    difference: float


def draw(plan: Mapping[str, Any], *, arms: int, seed: int) -> list[ArmJob]:
    """`arms` of the plan's arms and seeds, drawn without replacement; all of them where there are no more.

    The draw is that of Python's Mersenne Twister, which is the same in every version.
    """
    left = jobs(plan)
    generator = random.Random(seed)  # noqa: S311 (a public draw, no secret)
    return [left.pop(int(generator.random() * len(left))) for _ in range(min(arms, len(left)))]


def mismatches(plan: Mapping[str, Any], wanted: Sequence[ArmJob], checkpoint: Path | None = None) -> list[str]:
    """What differs here from the plan, so that bitwise equality cannot be asked for: environment and code.

    Raises:
        IndeterminateError: a corpus or public checkpoint that is not the plan's: nothing can be compared.
    """
    for digest in sorted({segment.config.get("checkpoint") or "" for job in wanted for segment in job.segments} - {""}):
        try:
            expect(digest, checkpoint)
        except ReproError as error:
            raise IndeterminateError(str(error)) from error
    for name in sorted({segment.config["corpus"] for job in wanted for segment in job.segments}):
        found = corpus.load(name).digest
        if found != plan["corpora"][name]:
            raise IndeterminateError(
                f"corpus {name}: the plan's digest is {plan['corpora'][name][:12]}…, this machine's {found[:12]}…; runs over "
                "different text cannot be compared (the standard library's text is that of one Python version)"
            )
    device = "cpu" if plan["environment"]["device"] == "cpu" else "cuda"
    here = encode(numeric_environment(device))
    differing = [name for name, value in plan["environment"].items() if here.get(name) != value]
    return differing + (["code"] if code_state()["sha256"] != plan["code"]["sha256"] else [])


def compare(
    plan: Mapping[str, Any], wanted: Sequence[ArmJob], files: Mapping[str, bytes], folder: Path, *, exact: bool
) -> list[AuditedArm]:
    """The `wanted` arms executed in `folder` against those of the bundle's `files`.

    With `exact`, anything but the same bytes `differs`.
    """
    again = read_directory(folder)
    tolerance = 0.0 if exact else float(plan["tolerance"]["loss"])
    return [_compare(job, files, again, tolerance) for job in wanted]


def _compare(job: ArmJob, files: Mapping[str, bytes], again: Mapping[str, bytes], tolerance: float) -> AuditedArm:
    names = [*(f"{segment.folder}/trace.jsonl" for segment in job.segments), job.file]
    if any((name in files) != (name in again) for name in names):
        return AuditedArm(arm=job.arm, seed=job.seed, agreement="missing", difference=0.0)
    names = [name for name in names if name in files]
    if all(files[name] == again[name] for name in names):
        return AuditedArm(arm=job.arm, seed=job.seed, agreement="bitwise", difference=0.0)
    worst = max(_difference(files[name], again[name]) for name in names)
    close = tolerance > 0 and worst <= tolerance
    return AuditedArm(
        arm=job.arm, seed=job.seed, agreement="within_tolerance" if close else "differs", difference=worst
    )


def _difference(left: bytes, right: bytes) -> float:
    """Largest difference of a loss or a metric, entry by entry; infinite where the entries are not of the same kind."""
    a, b = ([json.loads(line)["entry"] for line in data.splitlines()] for data in (left, right))
    worst = 0.0 if len(a) == len(b) else float("inf")
    for one, other in zip(a, b, strict=False):
        if any(one.get(name) != other.get(name) for name in ("type", "step", "name", "steps")):
            return float("inf")
        for name in ("loss", "value"):
            if name in one and name in other:
                worst = max(worst, abs(float(one[name]) - float(other[name])))
        if not _alike(one, other):
            return float("inf")
    return worst


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two probes speak of the same layers, experts and measures; how far these lie apart is no loss in nats."""
    shapes = [
        (list(map(len, entry.get("load", []))), {name: len(row) for name, row in entry.get("values", {}).items()})
        for entry in (one, other)
    ]
    return shapes[0] == shapes[1]


def result(audited: Sequence[AuditedArm], *, differing: Sequence[str], seed: int, plan_sha256: str) -> dict[str, Any]:
    """The audit as data, numbers as decimal strings."""
    return {
        "schema": "repro.audit/v1",
        "plan_sha256": plan_sha256,
        "seed": seed,
        "differing": list(differing),
        "arms": [encode(arm) if arm.difference != float("inf") else _unlike(arm) for arm in audited],
    }


def _unlike(arm: AuditedArm) -> dict[str, Any]:
    return {"arm": arm.arm, "seed": arm.seed, "agreement": arm.agreement, "difference": "not comparable"}


def exit_code(audited: Sequence[AuditedArm]) -> int:
    """Exit code: 0 where every arm agreed, 1 where one did not."""
    return int(any(arm.agreement in ("differs", "missing") for arm in audited))
