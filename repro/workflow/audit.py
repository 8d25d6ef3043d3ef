"""Audit by execution: parts of a bundle, drawn by the auditor, are trained and measured again from the plan alone.

- `draw`: which arms, and which stretches between committed weight hashes, from a seed that the auditor chooses after the
  bundle was published
- `compare`: the evidence of the second execution against the bundle's
- `predicate`: what an audit statement says of it (`records.audit`)
- `check_draw`: whether a statement's items are those that its seed draws

Where the numeric environment, the code and the corpora are those of the plan, every line has to be the same bytes. Where one of
them differs, the same bytes are still the best answer; else every traced loss, and every metric that is one, has to lie within
the plan's tolerance, which no other value has: these are named as not compared. The result says which rule it was.
"""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from records import canonical
from records.audit import AUDIT_SCHEMA, Audit
from records.errors import IndeterminateError, ReproError
from records.package import MANIFEST
from records.replication import read_statement
from records.report import Check
from repro.config import decimal_string, encode
from repro.data import corpus
from repro.environment import code_state, numeric_environment
from repro.workflow.estimate import Estimate, estimate
from repro.workflow.evidence import read_directory
from repro.workflow.jobs import ArmJob, Stretch, jobs, stops, stretches
from repro.workflow.plan import device_of, plan_digest

Agreement = Literal["bitwise", "within_tolerance", "differs", "missing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What is executed again: whole arms, with their measures, and stretches of segments."""

    arms: Sequence[ArmJob]
    stretches: Sequence[Stretch]
    seed: int

    def __str__(self) -> str:
        return ", ".join([*(f"{job.arm} seed {job.seed}" for job in self.arms), *map(_name, self.stretches)])


def _name(stretch: Stretch) -> str:
    part = f" part {stretch.number + 1}" if len(stretch.job.segments) > 1 else ""
    return f"{stretch.job.arm}{part} seed {stretch.job.seed} steps {stretch.first + 1} to {stretch.last}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Audited:
    """One arm, or one stretch (`stretch` given), with a seed: how well it agreed.

    `difference` is the largest of a loss, traced or measured (nats/token; 0 if bitwise, infinite where the entries are
    not of one kind), `lines` the number of lines executed again, `not_compared` what has no tolerance.
    """

    arm: str
    seed: int
    stretch: Stretch | None
    agreement: Agreement
    difference: float
    lines: int
    not_compared: tuple[str, ...] = ()

    def __str__(self) -> str:
        return _name(self.stretch) if self.stretch else f"{self.arm} seed {self.seed}"


def draw(plan: Mapping[str, Any], *, arms: int, segments: int, seed: int) -> Drawn:
    """`arms` of the plan's arms and seeds, and `segments` of its stretches, drawn without replacement; all, where fewer.

    The draw is that of Python's Mersenne Twister, which is the same in every version: arms first, then stretches.
    """
    generator = random.Random(seed)  # noqa: S311 (a public draw, no secret)

    def some(left: list[Any], count: int) -> list[Any]:
        return [left.pop(int(generator.random() * len(left))) for _ in range(min(count, len(left)))]

    return Drawn(arms=some(jobs(plan), arms), stretches=some(stretches(plan), segments), seed=seed)


def mismatches(plan: Mapping[str, Any], drawn: Drawn, checkpoint: Path | None = None) -> list[str]:
    """What differs here from the plan, so that bitwise equality cannot be asked for: environment and code.

    Raises:
        IndeterminateError: a corpus or public checkpoint that is not the plan's: nothing can be compared.
    """
    from repro.pretrained import expect  # brings torch, which whoever only reads audits has no need of

    segments = [segment for _, segment, _ in stops(drawn.arms, drawn.stretches).values()]
    for digest in sorted({segment.config.get("checkpoint") or "" for segment in segments} - {""}):
        try:
            expect(digest, checkpoint)
        except ReproError as error:
            raise IndeterminateError(str(error)) from error
    for name in sorted({segment.config["corpus"] for segment in segments}):
        found = corpus.load(name).digest
        if found != plan["corpora"][name]:
            raise IndeterminateError(
                f"corpus {name}: the plan's digest is {plan['corpora'][name][:12]}…, this machine's {found[:12]}…; runs over "
                "different text cannot be compared (the standard library's text is that of one Python version)"
            )
    here = encode(numeric_environment(device_of(plan)))
    differing = [name for name, value in plan["environment"].items() if here.get(name) != value]
    return differing + (["code"] if code_state()["sha256"] != plan["code"]["sha256"] else [])


def cost(plan: Mapping[str, Any], drawn: Drawn, *, workers: int) -> tuple[Estimate, float]:
    """What executing the drawn parts will take, and its share of the whole run's computation (by FLOP accounting)."""
    here = estimate(plan, workers=workers, wanted=drawn.arms, drawn=drawn.stretches)
    return here, here.flops / estimate(plan, workers=workers).flops


def compare(
    plan: Mapping[str, Any], drawn: Drawn, files: Mapping[str, bytes], folder: Path, *, exact: bool
) -> list[Audited]:
    """The `drawn` parts executed in `folder` against those of the bundle's `files`.

    With `exact`, anything but the same bytes `differs`.
    """
    again = read_directory(folder)
    tolerance = None if exact else float(plan["tolerance"]["loss"])
    return [
        *(_compare(job, None, files, again, tolerance) for job in drawn.arms),
        *(_compare(stretch.job, stretch, files, again, tolerance) for stretch in drawn.stretches),
    ]


def _compare(
    job: ArmJob,
    stretch: Stretch | None,
    files: Mapping[str, bytes],
    again: Mapping[str, bytes],
    tolerance: float | None,
) -> Audited:
    segments = job.segments if stretch is None else job.segments[: stretch.number + 1]
    names = [f"{segment.folder}/trace.jsonl" for segment in segments] + ([job.file] if stretch is None else [])
    if any((name in files) != (name in again) for name in names):
        return Audited(arm=job.arm, seed=job.seed, stretch=stretch, agreement="missing", difference=0.0, lines=0)
    pairs = [(_lines(files[name]), _lines(again[name])) for name in names if name in files]
    if stretch is not None and stretch.last < stretch.segment.config["train"]["steps"]:
        before, after = pairs.pop()
        pairs.append((_until(before, stretch.last), _until(after, stretch.last)))
    lines = sum(len(after) for _, after in pairs)
    if all(before == after for before, after in pairs):
        return Audited(arm=job.arm, seed=job.seed, stretch=stretch, agreement="bitwise", difference=0.0, lines=lines)
    worst = max(_difference(before, after) for before, after in pairs)
    close = tolerance is not None and worst <= tolerance
    return Audited(
        arm=job.arm,
        seed=job.seed,
        stretch=stretch,
        agreement="within_tolerance" if close else "differs",
        difference=worst,
        lines=lines,
        not_compared=_without_tolerance(after for _, after in pairs) if close else (),
    )


def _lines(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]


def _until(lines: list[dict[str, Any]], last: int) -> list[dict[str, Any]]:
    """The lines up to and with the one that traces the step `last`; all, where the segment diverged before it."""
    for number, line in enumerate(lines, start=1):
        if line["entry"].get("type") == "step" and line["entry"]["step"] >= last:
            return lines[:number]
    return lines


def _is_loss(metric: str) -> bool:
    """Whether a metric is a loss in nats/token, by its name: one of the parts between slashes is `loss`."""
    return "loss" in metric.split("/")


def _difference(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> float:
    """Largest difference of a loss, entry by entry; infinite where the entries are not of the same kind."""
    worst = 0.0 if len(left) == len(right) else float("inf")
    for one, other in ((a["entry"], b["entry"]) for a, b in zip(left, right, strict=False)):
        if any(one.get(name) != other.get(name) for name in ("type", "step", "tokens", "name", "steps", "metrics")):
            return float("inf")
        if not _alike(one, other):
            return float("inf")
        for name in ("loss", "value"):
            if name in one and name in other and (name == "loss" or _is_loss(one["name"])):
                worst = max(worst, abs(float(one[name]) - float(other[name])))
    return worst


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two probes speak of the same layers, experts and measures; how far these lie apart is no loss in nats."""
    shapes = [
        (list(map(len, entry.get("load", []))), {name: len(row) for name, row in entry.get("values", {}).items()})
        for entry in (one, other)
    ]
    return shapes[0] == shapes[1]


def _without_tolerance(traces: Iterable[list[dict[str, Any]]]) -> tuple[str, ...]:
    """What the entries hold and the plan declares no tolerance for: weights, gradients, probes, metrics but losses."""
    found = set()
    for entry in (line["entry"] for lines in traces for line in lines):
        found |= {name for name in ("weights", "grad_norm") if name in entry}
        if entry["type"] == "probe":
            found.add("probes")
        if entry["type"] == "metric" and not _is_loss(entry["name"]):
            found.add(entry["name"])
    return tuple(sorted(found))


def predicate(
    plan: Mapping[str, Any],
    drawn: Drawn,
    audited: Sequence[Audited],
    *,
    files: Mapping[str, bytes],
    folder: Path,
    asked: tuple[int, int],
    differing: Sequence[str],
    finished_at: str,
) -> dict[str, Any]:
    """What an audit statement says, but for the auditor: numbers as decimal strings.

    Args:
        asked: how many arms and stretches were asked for.
        folder: where the second execution lies, for its measured times.
    """
    unique = stops(drawn.arms, drawn.stretches)
    clock, here, there = _seconds(read_directory(folder), files)
    return {
        "schema": AUDIT_SCHEMA,
        "statement_sha256": canonical.sha256_hex(read_statement(files).payload),
        "plan_sha256": plan_digest(plan),
        "draw": {"seed": drawn.seed, "arms": asked[0], "segments": asked[1]},
        "rule": "tolerance" if differing else "bitwise",
        "tolerance": plan["tolerance"],
        "differing": list(differing),
        "items": [_item(item) for item in audited],
        "environment": encode(numeric_environment(device_of(plan))),
        "code": code_state(),
        "cost": {
            "tokens": sum(segment.tokens_to(steps) for _, segment, steps in unique.values()),
            "run_tokens": estimate(plan, workers=1).tokens,
            "clock": clock,
            "seconds": decimal_string(round(here, 3)),
            "run_seconds": decimal_string(round(there, 3)),
        },
        "finished_at": finished_at,
    }


def _item(item: Audited) -> dict[str, Any]:
    comparable = item.difference != float("inf")
    return {
        "arm": item.arm,
        "seed": item.seed,
        "segment": item.stretch.number + 1 if item.stretch else None,
        "steps": [item.stretch.first, item.stretch.last] if item.stretch else None,
        "agreement": item.agreement,
        "difference": decimal_string(item.difference) if comparable else "not comparable",
        "lines": item.lines,
        "not_compared": list(item.not_compared),
    }


def _seconds(again: Mapping[str, bytes], files: Mapping[str, bytes]) -> tuple[str, float, float]:
    """Seconds of training measured in both executions: of the processor, where both files of times have them."""
    both = [
        [json.loads(line) for name, data in sorted(side.items()) if name.endswith("/timing.jsonl") for line in data.splitlines()]
        for side in (again, files)
    ]  # fmt: skip
    clock = "cpu_seconds" if all("cpu_seconds" in line for lines in both for line in lines) else "seconds"
    here, there = (sum(float(line[clock]) for line in lines) for lines in both)
    return clock, here, there


def check_draw(plan: Mapping[str, Any], files: Mapping[str, bytes], audit: Audit) -> list[Check]:
    """Whether an audit speaks of this bundle and plan, and its items are those that its seed draws."""
    said = audit.predicate
    if audit.manifest_sha256 != canonical.sha256_hex(files[MANIFEST]):
        detail = "the audit speaks of another bundle: its subject is not this manifest"
        return [Check(code="manifest", status="fail", detail=detail)]
    faults = []
    if said["plan_sha256"] != plan_digest(plan):
        faults.append("the audit's plan_sha256 is not the bundle's")
    if said["statement_sha256"] != canonical.sha256_hex(read_statement(files).payload):
        faults.append("the audit's statement_sha256 is not the bundle's")
    if said["tolerance"] != plan["tolerance"]:
        faults.append("the audit's tolerance is not the one that the plan declared")
    if faults:
        return [Check(code="plan", status="fail", detail=fault) for fault in faults]
    asked = said["draw"]
    drawn = draw(plan, arms=asked["arms"], segments=asked["segments"], seed=asked["seed"])
    expected = [(job.arm, job.seed, None, None) for job in drawn.arms]
    expected += [
        (item.job.arm, item.job.seed, item.number + 1, [item.first, item.last])  # type: ignore[misc]
        for item in drawn.stretches
    ]
    found = [(item["arm"], item["seed"], item["segment"], item["steps"]) for item in said["items"]]
    if found != expected:
        detail = f"the audit's items are not those that the seed {asked['seed']} draws"
        return [Check(code="draw", status="fail", detail=detail)]
    detail = f"the seed {asked['seed']} draws these {len(found)} of {len(jobs(plan))} arms and {len(stretches(plan))} segments"
    return [Check(code="draw", status="pass", detail=detail)]


def exit_code(audited: Sequence[Audited]) -> int:
    """Exit code: 0 where every part agreed, 1 where one did not."""
    return int(any(item.agreement in ("differs", "missing") for item in audited))
