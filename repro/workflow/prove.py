"""One piece of a bundle's evidence, shown and checked without the rest: which arm it is of, by the plan that comes along.

- `prove`: the proof for an arm's trace up to a step, or for its measures
- `verify`: what `records.inclusion` checks, then that the piece is where the plan puts it and starts where it has to
"""

from collections.abc import Mapping
from typing import Any

from records import canonical
from records.errors import ReproError, UsageError
from records.inclusion import Piece, make_proof, read_proof, verify_proof
from records.keys import KeySet
from records.report import Check, Verification
from repro.trace import genesis, link
from repro.workflow.jobs import ArmJob, jobs
from repro.workflow.plan import parse_plan, plan_digest


def prove(files: Mapping[str, bytes], *, arm: str, seed: int, step: int | None) -> bytes:
    """Proof for the piece of the arm's trace in which `step` (from 1, over all its segments) lies, None for its measures.

    Raises:
        UsageError: no such arm, seed or step, or a bundle that commits to no tree.
    """
    plan = parse_plan(files["plan.json"], name="plan.json")
    job = find(plan, arm, seed)
    if step is None:
        return make_proof(files, file=job.file, line=1)
    before = 0
    for segment in job.segments:
        train = segment.config["train"]
        if before < step <= before + train["steps"]:
            name = f"{segment.folder}/trace.jsonl"
            return make_proof(files, file=name, line=_line_of(files.get(name, b""), step - before))
        before += train["steps"]
    raise UsageError(f"arm {arm}: expected a step from 1 to {before}, found {step}")


def _line_of(trace: bytes, step: int) -> int:
    """Number of the line that traces `step` of the segment: the first that goes so far; the last, where none does."""
    lines = trace.splitlines()
    for number, line in enumerate(lines, start=1):
        entry = canonical.loads(line)["entry"]
        if entry.get("type") == "step" and entry["step"] >= step:
            return number
    return len(lines)


def find(plan: Mapping[str, Any], arm: str, seed: int) -> ArmJob:
    """The arm of the plan with the seed; UsageError names what there is."""
    for job in jobs(plan):
        if (job.arm, job.seed) == (arm, seed):
            return job
    arms, seeds = ", ".join(item["id"] for item in plan["arms"]), ", ".join(map(str, plan["seeds"]))
    raise UsageError(f"no arm {arm[:60]!a} with seed {seed} in the plan: arms {arms}; seeds {seeds}")


def verify(data: bytes, *, trusted: KeySet, target: str = "-") -> Verification:
    """Everything that can be shown of a proof alone. Never raises for what is in `data`."""
    found = verify_proof(data, trusted=trusted, target=target)
    if found.state == "malformed":
        return found
    proof = read_proof(data)
    try:
        plan = parse_plan(canonical.dumps(proof.plan), name="the proof's plan")
        return found.with_checks(_place(plan, proof.piece))
    except ReproError as error:
        return found.with_checks(Check(code="plan", status="fail", detail=str(error)))


def _place(plan: Mapping[str, Any], piece: Piece) -> Check:
    """Whose piece it is; a first piece starts from the plan's digest and the segment's, as its chain must."""
    for job in jobs(plan):
        for segment in job.segments:
            if piece.file != f"{segment.folder}/trace.jsonl":
                continue
            start = genesis(plan_digest(plan), segment.digest)
            steps = [entry.get("step") for entry in piece.entries() if entry.get("type") == "step"]
            what = f"steps {steps[0]} to {steps[-1]}" if steps else "the end"
            if (
                piece.previous is None
                and link(start, piece.entries()[0]) != canonical.loads(piece.lines.splitlines()[0])["chain"]
            ):
                return Check(code="trace", status="fail", detail="the chain does not start from this plan and segment")
            number = job.segments.index(segment) + 1
            detail = f"{what} of segment {number} of {len(job.segments)} of arm {job.arm}, seed {job.seed}"
            return Check(code="trace", status="pass", detail=detail)
        if piece.file == job.file:
            return Check(code="trace", status="pass", detail=f"measures of arm {job.arm}, seed {job.seed}")
    return Check(code="trace", status="fail", detail=f"{piece.file!a} belongs to no arm of the plan")
