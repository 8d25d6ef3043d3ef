"""Audit by execution: an honest bundle agrees bit for bit, and a forged one that verifies does not."""

import json
from pathlib import Path

import pytest
from command_line import repro
from test_workflow import rechained, resealed

from records import canonical
from records.errors import IndeterminateError
from records.package import read_bundle, write_bundle
from repro.judge import judge
from repro.trace import genesis
from repro.workflow import audit
from repro.workflow.bundle import summary
from repro.workflow.evidence import load
from repro.workflow.plan import jobs, parse_plan, plan_digest


def test_an_honest_bundle_agrees_bitwise(smoke_bundle):
    done = repro("audit", smoke_bundle, "--arms", "3", "--seed", "5", "--json")
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads(done.stdout)
    assert found["differing"] == []
    assert [arm["agreement"] for arm in found["arms"]] == ["bitwise"] * 3
    assert b"draw 5" in done.stderr


def forged(bundle: Path, change) -> dict[str, bytes]:
    """A bundle in which every chain, outcome, manifest and signature was made anew around changed losses."""
    files = read_bundle(bundle)
    plan = parse_plan(files["plan.json"], name="plan")
    for job in jobs(plan):
        segment = job.segments[-1]
        name = f"{segment.folder}/trace.jsonl"
        files[name] = rechained(files[name], genesis(plan_digest(plan), segment.digest), change)
        head = json.loads(files[name].splitlines()[-1])["chain"]
        files[job.file] = rechained(files[job.file], genesis(head, job.digest), lambda entry: entry)
    outcome = {"plan_sha256": plan_digest(plan)} | judge(plan, load(plan, files).evidence)
    return resealed(files | {"outcome.json": canonical.dumps(outcome)}, verdicts=summary(outcome))


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry | ({"loss": str(float(entry["loss"]) - 0.5)} if "loss" in entry else {}),
        lambda entry: entry | ({"loss": f"{float(entry['loss']) * 1.0001:.12f}"} if "loss" in entry else {}),
        lambda entry: entry | ({"weights": "0" * 64} if entry["type"] == "end" else {}),
    ],
    ids=["a faked loss", "a trace rescaled by 1e-4", "other weights"],
)
def test_a_forgery_that_verifies_is_found_by_execution(smoke_bundle, tmp_path, change):
    path = tmp_path / "forged.zip"
    write_bundle(path, forged(smoke_bundle, change))
    assert repro("verify", path, "--offline").returncode == 0
    done = repro("audit", path, "--seed", "1")
    assert done.returncode == 1, done.stderr.decode()
    assert b"differs" in done.stdout


def test_a_bundle_that_does_not_verify_is_not_executed(smoke_bundle, tmp_path):
    files = read_bundle(smoke_bundle)
    write_bundle(tmp_path / "bad.zip", files | {"extra": b""})
    done = repro("audit", tmp_path / "bad.zip")
    assert done.returncode == 1
    assert b"is in the bundle but not in the manifest" in done.stderr
    (tmp_path / "junk.zip").write_bytes(b"junk")
    assert repro("audit", tmp_path / "junk.zip").returncode == 3


def test_the_draw_is_the_auditors_and_repeats(smoke_bundle):
    plan = parse_plan(read_bundle(smoke_bundle)["plan.json"], name="plan")
    first, again, other = ([(job.arm, job.seed) for job in audit.draw(plan, arms=4, seed=seed)] for seed in (1, 1, 2))
    assert first == again != other
    assert len(set(first)) == 4
    assert len(audit.draw(plan, arms=10**6, seed=0)) == len(jobs(plan))


def test_where_the_environment_differs_the_tolerance_holds_and_is_named(smoke_bundle, tmp_path):
    files = read_bundle(smoke_bundle)
    plan = parse_plan(files["plan.json"], name="plan")
    (job,) = audit.draw(plan, arms=1, seed=3)
    name = f"{job.segments[-1].folder}/trace.jsonl"
    for shift, exact, agreement in (
        (0.01, False, "within_tolerance"),
        (0.01, True, "differs"),
        (0.5, False, "differs"),
    ):
        folder = tmp_path / f"{shift}{exact}"
        for file, data in files.items():
            if file.startswith(("segments/", "arms/")):
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_bytes(data)

        def shifted(entry, shift=shift):
            return entry | ({"loss": str(float(entry["loss"]) + shift)} if "loss" in entry else {})

        (folder / name).write_bytes(
            rechained(files[name], genesis(plan_digest(plan), job.segments[-1].digest), shifted)
        )
        (found,) = audit.compare(plan, [job], files, folder, exact=exact)
        assert found.agreement == agreement
        assert found.difference == pytest.approx(shift)
    plan["environment"]["torch"] = "1.0"
    assert audit.mismatches(plan, [job]) == ["torch"]


def test_another_corpus_cannot_be_compared(smoke_bundle):
    plan = parse_plan(read_bundle(smoke_bundle)["plan.json"], name="plan")
    plan["corpora"]["synthetic"] = "0" * 64
    with pytest.raises(IndeterminateError, match="different text cannot be compared"):
        audit.mismatches(plan, jobs(plan)[:1])
