"""docs/schemas is what the code makes, and what the code takes: published files fit, and changed ones fail in both or in none."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT
from jsonschema import Draft202012Validator

from records import canonical, keys
from records.audit import read_audit
from records.errors import InvalidError, MalformedError
from records.inclusion import make_proof, read_proof
from records.package import MANIFEST, STATEMENT, check_manifest, read_bundle
from records.replication import statement_faults
from records.schema import FILE
from records.statement import make_statement, open_envelope, sign_envelope
from repro.workflow import signed
from repro.workflow.bundle import verify
from repro.workflow.plan import parse_plan
from repro.workflow.schemas import schemas

FIXTURES = sorted((ROOT / "tests/fixtures/formats").glob("v*/*.repro.zip"))
BUNDLES = [*FIXTURES, *sorted(ROOT.glob("papers/*/replications/*.repro.zip"))]
EXAMPLE_KEY = keys.private_key(bytes(range(32)))
SMOKE = FIXTURES[1]


def validator(name: str) -> Draft202012Validator:
    return Draft202012Validator(json.loads((ROOT / f"docs/schemas/{name}.json").read_bytes()))


def fits(name: str, value: Any) -> list[str]:
    return [f"{error.json_path}: {error.message[:200]}" for error in validator(name).iter_errors(value)]


def test_the_files_are_what_the_code_makes() -> None:
    folder = ROOT / "docs/schemas"
    found = {path.name: path.read_bytes() for path in folder.glob("*.json")}
    assert found == schemas(), "make them again: python -m repro export schemas docs/schemas"
    assert found["pith.json"] == FILE.read_bytes()
    for name in found:
        Draft202012Validator.check_schema(json.loads(found[name]))


@pytest.mark.parametrize("path", BUNDLES, ids=lambda path: path.name)
def test_every_published_file_fits(path: Path) -> None:
    files = read_bundle(path)
    for name in ("plan", "outcome", "run"):
        assert fits(name, json.loads(files[f"{name}.json"])) == []
    assert fits("manifest", json.loads(files[MANIFEST])) == []
    assert fits("envelope", json.loads(files[STATEMENT])) == []
    assert fits("replication", open_envelope(files[STATEMENT]).statement) == []
    found = verify(files, target=path.name, trusted=keys.pinned())
    assert fits("verify", found.to_json()) == []
    line, timing = validator("trace-line"), validator("timing-line")
    for name in sorted(files):
        if name.endswith("/timing.jsonl"):
            assert all(timing.is_valid(json.loads(text)) for text in files[name].splitlines()[:3])
        elif name.endswith(".jsonl"):
            lines = files[name].splitlines()
            some = lines if path == SMOKE else [lines[0], lines[-1]]
            assert all(line.is_valid(json.loads(text)) for text in some), name


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every part of `value`, of a list's items only the first."""
    if at:
        yield at
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*at, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*at, 0))


def changes(value: Any, *, whole: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """`value` with one part taken out, of another type, or with something beside it, part by part.

    What lies within the fields `whole` has a schema of its own.
    """
    for at in places(value):
        if at[0] in whole and len(at) > 1:
            continue
        for what in ("out", None, 7, "text", [], {}, True, "unknown field"):
            changed = copy.deepcopy(value)
            part = changed
            for key in at[:-1]:
                part = part[key]
            if what == "out":
                del part[at[-1]]
            elif what == "unknown field":
                if not isinstance(part[at[-1]], dict):
                    continue
                part[at[-1]]["of nobody"] = 1
            elif part[at[-1]] == what and type(part[at[-1]]) is type(what):
                continue
            else:
                part[at[-1]] = what
            yield f"{'.'.join(map(str, at))} {what!r}", changed


def small_plan() -> dict[str, Any]:
    """A plan with one of each: claims with a criterion of every shape, a group, a figure."""
    plan: dict[str, Any] = json.loads(read_bundle(SMOKE)["plan.json"])
    plan["claims"] = plan["claims"][:1]
    plan["claims"][0]["passes"][0]["base"] = {"arm": "topk", "metric": "loss/k=4"}
    plan["claims"][0]["passes"][0]["relation"] = "short_of"
    for name in ("arms", "groups", "deviations"):
        plan[name] = plan[name][:1]
    for curve in plan["figures"][0]["curves"][1:]:
        plan["figures"][0]["curves"].remove(curve)
    return plan


def plan_taken(value: Any) -> bool:
    try:
        parse_plan(canonical.dumps(value), name="plan.json")
    except MalformedError:
        return False
    return True


def statement_taken(value: Any) -> bool:
    try:
        envelope = open_envelope(sign_envelope(value, None))
    except MalformedError:
        return False
    return not statement_faults(envelope.statement)


def manifest_taken(value: Any) -> bool:
    found = check_manifest({MANIFEST: canonical.dumps(value)})
    return not any("expected {" in check.detail or check.code == "schema" for check in found)


def audit_taken(value: Any) -> bool:
    try:
        read_audit(sign_envelope(value, None))
    except (MalformedError, InvalidError):
        return False
    return True


def envelope_taken(value: Any) -> bool:
    try:
        open_envelope(canonical.dumps(value))
    except MalformedError:
        return False
    return True


def proof_taken(value: Any) -> bool:
    try:
        read_proof(canonical.dumps(value))
    except (MalformedError, InvalidError):
        return False
    return True


def audit_statement() -> dict[str, Any]:
    item = {"arm": "topk-lr0.003", "seed": 0, "segment": 1, "steps": [0, 4], "agreement": "bitwise", "difference": "0.0",
            "lines": 2, "not_compared": ["grad_norm"]}  # fmt: skip
    predicate = {
        "schema": "repro.audit/v2", "statement_sha256": "1" * 64, "plan_sha256": "2" * 64,
        "draw": {"seed": 3, "arms": 1, "segments": 0}, "rule": "tolerance", "tolerance": {"loss": "0.08"}, "differing": ["code"],
        "items": [item], "environment": {}, "code": {}, "cost": {}, "auditor": None, "finished_at": "2026-11-22T00:00:00Z",
    }  # fmt: skip
    return make_statement("manifest.json", "3" * 64, "urn:pith-repro:audit:v1", predicate)


def signed_statement() -> dict[str, Any]:
    statement = open_envelope(read_bundle(SMOKE)[STATEMENT]).statement
    statement["predicate"]["evidence"] = {}
    return statement


def short_manifest() -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads(read_bundle(SMOKE)[MANIFEST])
    return manifest | {"files": {name: manifest["files"][name] for name in ("plan.json", "run.json")}}


def committed() -> dict[str, Any]:
    """The proof of a piece of a bundle, whose statement is made to commit to its tree."""
    from records.inclusion import evidence_tree

    files = read_bundle(SMOKE)
    statement = open_envelope(files[STATEMENT]).statement
    statement["predicate"]["evidence_tree"] = evidence_tree(files)
    files[STATEMENT] = sign_envelope(statement, EXAMPLE_KEY)
    name = next(name for name in sorted(files) if name.startswith("arms/"))
    proof: dict[str, Any] = canonical.loads(make_proof(files, file=name, line=1))
    return proof


#: Where the code reads no further into a document than it has to: a schema says there more than the code asks for.
LOOSE = {
    "plan": ("corpora",),
    "replication": ("predicate.finished_at",),
    "audit": ("predicate.finished_at",),
    "inclusion": ("statement", "plan", "key"),
}

CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], bool]]] = {
    "plan": (small_plan, plan_taken),
    "replication": (signed_statement, statement_taken),
    "manifest": (short_manifest, manifest_taken),
    "envelope": (lambda: json.loads(read_bundle(SMOKE)[STATEMENT]), envelope_taken),
    "audit": (audit_statement, audit_taken),
    "inclusion": (committed, proof_taken),
}


@pytest.mark.parametrize("name", CASES)
def test_what_the_code_takes_fits_and_what_does_not_fit_it_refuses(name: str) -> None:
    make, taken = CASES[name]
    value = make()
    check = validator(name)
    assert fits(name, value) == [] and taken(value)
    counts = {(fit, ours): 0 for fit in (True, False) for ours in (True, False)}
    wrong = []
    for what, changed in changes(value, whole=("plan", "statement", "key") if name == "inclusion" else ()):
        fit, ours = check.is_valid(changed), taken(changed)
        counts[fit, ours] += 1
        if ours and not fit and not what.startswith(LOOSE.get(name, ("-",))):
            wrong.append(what)
    assert wrong == []  # nothing that the code takes is against the schema
    assert counts[False, False] > 5, counts
    # and of what the code refuses, the schema lets through rules between fields alone
    assert counts[True, False] <= 0.15 * (counts[True, False] + counts[False, False]), counts


@pytest.mark.parametrize("name", ["outcome", "run", "verify", "trace-line", "timing-line"])
def test_what_is_written_for_others_fits_as_a_whole_or_not(name: str) -> None:
    """Of these the code reads only its own: an outcome is compared with the judge's, a verification is never read."""
    files = read_bundle(SMOKE)
    trace = next(files[name] for name in sorted(files) if name.endswith("/trace.jsonl"))
    timing = next(files[name] for name in sorted(files) if name.endswith("/timing.jsonl"))
    value = {
        "outcome": lambda: json.loads(files["outcome.json"]),
        "run": lambda: json.loads(files["run.json"]),
        "verify": lambda: verify(files, target="x", trusted=keys.pinned()).to_json(),
        "trace-line": lambda: json.loads(trace.splitlines()[0]),
        "timing-line": lambda: json.loads(timing.splitlines()[0]),
    }[name]()
    check = validator(name)
    assert check.is_valid(value)
    refused = [what for what, changed in changes(value) if not check.is_valid(changed)]
    for at in value:
        if at not in ("groups", "pith_number"):
            assert f"{at} 'out'" in refused
        assert any(what.startswith(f"{at} ") and not what.endswith("'out'") for what in refused)


def test_a_signed_plan_and_one_that_deviates_from_it_fit() -> None:
    plan = small_plan()
    key = keys.private_key(bytes(32))
    statement = open_envelope(signed.sign_plan(plan, key=key, signed_at="2026-11-22T00:00:00Z")).statement
    assert fits("signed-plan", statement) == []
    assert fits("signed-plan", statement | {"predicate": statement["predicate"] | {"more": 1}}) != []
    here = {name: plan[name] for name in ("code", "corpora")} | {"environment": plan["environment"] | {"torch": "9.0"}}
    assert fits("plan", signed.deviated(plan, here, "a reason")) == []
    assert fits("plan", plan | {"deviates": {"why": "a reason"}}) != []
