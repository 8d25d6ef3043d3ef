"""The replication bundle: made from a run directory, and verified by anyone, with no torch and nothing trusted.

- `make_bundle`: a finished run directory to the files of a bundle, signed where a key is given; the same bytes each time
- `verify`: identity, signature and manifest (`records`), then every hash chain, then the verdicts judged again
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from records import canonical
from records.errors import InvalidError, MalformedError, ReproError, UnsupportedError, UsageError
from records.inclusion import EVIDENCE_TREE, evidence_tree, tree_check
from records.keys import KeySet, PrivateKey
from records.replication import (
    OUTCOME,
    PAPER,
    PITH_RECORD,
    PLAN,
    PREDICATE_SCHEMA,
    build_replication,
    read_statement,
    verify_replication,
)
from records.report import Check, Verification
from records.timestamps import check_proof, proof_path
from records.versions import check_version, is_other_version
from repro.judge import OUTCOME_SCHEMA, judge, same_outcome
from repro.workflow import evals
from repro.workflow.crate import RO_CRATE, ro_crate
from repro.workflow.evidence import load, read_directory
from repro.workflow.jobs import jobs
from repro.workflow.plan import parse_plan, plan_digest
from repro.workflow.signed import SIGNED_PLAN, check_signed

RUN, REPORT = "run.json", "report.html"


def make_bundle(folder: Path, *, key: PrivateKey | None) -> dict[str, bytes]:
    """Files of the bundle of the run in `folder`.

    Raises:
        UsageError: no run directory, or a run that is not finished or not judged.
        InvalidError: the evidence does not hold, or outcome.json is not what the judge makes of it.
    """
    files = {name: _read(folder, name) for name in (PLAN, OUTCOME, RUN, REPORT)}
    plan = parse_plan(files[PLAN], name=str(folder / PLAN))
    loaded = load(plan, read_directory(folder))
    if loaded.faults:
        raise InvalidError(f"{folder}: {loaded.faults[0]}")
    outcome = canonical.loads(files[OUTCOME])
    if not same_outcome(outcome, {"plan_sha256": plan_digest(plan)} | judge(plan, loaded.evidence)):
        raise InvalidError(f"{folder / OUTCOME}: not what the judge makes of the evidence; run repro judge {folder}")
    run = canonical.loads(files[RUN])
    if run["code"]["sha256"] != plan["code"]["sha256"]:
        raise InvalidError(
            f"{folder}: the code changed while the run went on (expected {plan['code']['sha256'][:12]}, found "
            f"{run['code']['sha256'][:12]}): nothing says which code trained what; run it again in another --out"
        )
    finished_at = run["sessions"][-1]["finished_at"]
    if finished_at is None:
        raise UsageError(f"{folder}: the run is not finished; go on with repro run … --resume")
    files |= read_directory(folder) | evals.read_directory(folder)
    if faults := evals.faults(plan, files):
        raise InvalidError(f"{folder}: {faults[0]}; delete the file to bundle the run without it")
    for name in (SIGNED_PLAN, proof_path(Path(SIGNED_PLAN)).name):
        if (folder / name).exists():
            files[name] = _read(folder, name)
    subject_name, subject_sha256, paper_files = _subject(plan["paper"])
    files |= paper_files
    files[RO_CRATE] = ro_crate(plan, run, files, signed=key is not None)
    predicate = {
        "schema": PREDICATE_SCHEMA,
        "paper": plan["paper"],
        "plan_sha256": plan_digest(plan),
        "outcome_sha256": canonical.sha256_hex(files[OUTCOME]),
        "scale": plan["scale"],
        "seeds": plan["seeds"],
        "verdicts": summary(outcome),
        "corpora": plan["corpora"],
        "environment": plan["environment"],
        "code": run["code"],
        "evidence": {
            name: canonical.sha256_hex(data)
            for name, data in sorted(files.items())
            if name.startswith(("segments/", "arms/", "evals/"))
        },
        EVIDENCE_TREE: evidence_tree(files),
        "finished_at": finished_at,
    } | ({"deviates": plan["deviates"]} if "deviates" in plan else {})
    return build_replication(
        files, subject_name=subject_name, subject_sha256=subject_sha256, predicate=predicate, key=key
    )


def summary(outcome: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Verdicts as the statement gives them: without the tests, but with the effect of each claim's first criterion."""
    short = []
    for verdict in outcome["verdicts"]:
        item = {name: value for name, value in verdict.items() if name != "tests"}
        first = next((test for test in verdict["tests"] if test["role"] == "pass" and "effect" in test), None)
        if first:
            item |= {name: first[name] for name in ("effect", "interval", "p") if name in first}
        short.append(item)
    return short


def verify(files: Mapping[str, bytes], *, target: str, trusted: KeySet) -> Verification:
    """Everything that can be shown of a bundle without running it again. Never raises for what the bundle holds."""
    found = verify_replication(files, trusted=trusted, target=target)
    if any(check.status == "fail" and check.code in ("strict_json", "schema") for check in found.checks):
        return found
    try:
        plan = parse_plan(files.get(PLAN, b""), name=PLAN)
        outcome = canonical.loads(files.get(OUTCOME, b""))
        if isinstance(outcome, dict) and is_other_version(outcome.get("schema"), OUTCOME_SCHEMA):
            check_version(outcome["schema"], OUTCOME_SCHEMA, what=f"{OUTCOME}: expected an outcome of the form")
        predicate = read_statement(files).statement["predicate"]
        checks = [
            *_plan_checks(plan, predicate),
            *check_signed(files, plan, trusted=trusted),
            *_timestamps(files),
            tree_check(files, predicate),
            *_evidence_checks(plan, outcome, predicate, files),
        ]
    except UnsupportedError as error:
        checks = [Check(code="schema", status="fail", detail=str(error))]
    except ReproError as error:
        checks = [Check(code="plan", status="fail", detail=str(error))]
    return found.with_checks(*checks)


def sound(files: Mapping[str, bytes], *, target: str, trusted: KeySet) -> Verification:
    """The verification of a bundle that holds.

    Raises:
        InvalidError, MalformedError: it does not; the message names every fault.
    """
    found = verify(files, target=target, trusted=trusted)
    if found.exit_code:
        faults = "; ".join(check.detail for check in found.checks if check.status == "fail")
        raise (MalformedError if found.state == "malformed" else InvalidError)(f"{target}: {found.state}: {faults}")
    return found


def _plan_checks(plan: Mapping[str, Any], predicate: Mapping[str, Any]) -> list[Check]:
    """The statement says of the run what the plan said before it."""
    differing = [
        name for name in ("paper", "scale", "seeds", "corpora", "environment") if predicate.get(name) != plan[name]
    ]
    if predicate.get("deviates") != plan.get("deviates"):
        differing.append("deviates")
    if predicate["code"].get("sha256") != plan["code"]["sha256"]:
        differing.append("code")
    return [
        Check(code="plan", status="fail", detail=f"the statement's {name} is not the plan's") for name in differing
    ] or [Check(code="plan", status="pass", detail="paper, scale, seeds, corpora, environment and code are the plan's")]


def _timestamps(files: Mapping[str, bytes]) -> list[Check]:
    """Of the signed plan; a bundle's own timestamp lies beside it, for it would have to be of itself."""
    proof = files.get(proof_path(Path(SIGNED_PLAN)).name)
    return [] if proof is None or SIGNED_PLAN not in files else check_proof(files[SIGNED_PLAN], proof)


def _evidence_checks(
    plan: Mapping[str, Any], outcome: Any, predicate: Mapping[str, Any], files: Mapping[str, bytes]
) -> list[Check]:
    loaded = load(plan, files)
    faults = [*loaded.faults, *_strangers(plan, files), *evals.faults(plan, files)]
    if faults:
        return [
            *(Check(code="trace", status="fail", detail=fault) for fault in faults),
            Check(code="verdicts", status="skip", detail="not judged again: the evidence does not hold"),
        ]
    lacking = f"; {len(loaded.missing)} files of the plan's arms are missing" if loaded.missing else ""
    detail = f"{loaded.lines} lines in chains that start from the plan{lacking}"
    checks = [Check(code="trace", status="pass", detail=detail)]
    judged = {"plan_sha256": plan_digest(plan)} | judge(plan, loaded.evidence)
    if not same_outcome(outcome, judged):
        detail = f"{OUTCOME} is not what the judge makes of the evidence"
        checks.append(Check(code="verdicts", status="fail", detail=detail))
    elif not same_outcome(predicate["verdicts"], summary(judged)):
        detail = "the statement's verdicts are not what the judge makes of the evidence"
        checks.append(Check(code="verdicts", status="fail", detail=detail))
    else:
        text = ", ".join(f"{item['claim']} {item['verdict']}" for item in judged["verdicts"])
        checks.append(Check(code="verdicts", status="pass", detail=f"judged again from the evidence: {text}"))
    return checks


def _strangers(plan: Mapping[str, Any], files: Mapping[str, bytes]) -> list[str]:
    """Evidence files that no arm of the plan has."""
    known = {name for job in jobs(plan) for name in (job.file, *(f"{s.folder}/trace.jsonl" for s in job.segments))}
    known |= {f"{segment.folder}/timing.jsonl" for job in jobs(plan) for segment in job.segments}
    return [
        f"{name!a} belongs to no arm of the plan"
        for name in sorted(files)
        if name.startswith(("segments/", "arms/")) and name not in known
    ]


def _subject(paper: Mapping[str, Any]) -> tuple[str, str, dict[str, bytes]]:
    """Name and digest of the paper, and the file that shows them: its Pith record, or what is known of it."""
    if paper["pith_number"] is None:
        data = canonical.dumps({"title": paper["title"], "arxiv": paper["arxiv"]})
        return f"arxiv:{paper['arxiv'].split('v')[0]}", canonical.sha256_hex(data), {PAPER: data}
    from records.resolver import PackageStore

    found = PackageStore().get(paper["pith_number"].rsplit(":", 1)[-1])
    if found is None:
        raise UsageError(f"the record of {paper['pith_number']} does not come with this package")
    return paper["pith_number"], canonical.loads(found.data)["canonical_sha256"], {PITH_RECORD: found.data}


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError:
        done = {OUTCOME: f"repro judge {folder}", REPORT: f"repro report {folder}"}.get(name, "repro run")
        raise UsageError(f"{folder}: expected {name}, found none; make it with {done}") from None
    except OSError as error:
        raise UsageError(f"cannot read {folder / name}: {error.strerror}") from error
