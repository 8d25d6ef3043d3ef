"""The replications that the project publishes, each verified and judged again, and the README's table made from them."""

from pathlib import Path

import pytest
from command_line import ROOT

from records import canonical, keys
from records.audit import read_audit
from records.package import read_bundle
from repro.cli.evidence import merge
from repro.report.table import BEGIN, END
from repro.workflow.bundle import verify
from repro.workflow.evidence import load
from repro.workflow.jobs import jobs
from repro.workflow.plan import parse_plan
from repro.workflow.publish import audits_of, readme_table

PUBLISHED = sorted(ROOT.glob("papers/*/replications/*.repro.zip"))


def test_something_is_published():
    assert PUBLISHED


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name)
def test_a_published_replication_verifies_and_judges_to_the_same(path: Path):
    files = read_bundle(path)
    found = verify(files, target=path.name, trusted=keys.pinned())
    assert [check.detail for check in found.checks if check.status == "fail"] == []
    assert found.state in ("valid", "trusted")
    passed = {check.code for check in found.checks if check.status == "pass"}
    assert {"manifest", "plan", "trace", "verdicts", "envelope_signature"} <= passed
    run = canonical.loads(files["run.json"])
    assert run["code"]["dirty"] is False
    assert run["code"]["commit"]
    outcome = canonical.loads(files["outcome.json"])
    assert not any("missing" in verdict["reason"] for verdict in outcome["verdicts"])


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name)
def test_a_published_replication_was_audited_and_agreed(path: Path):
    """Each audit beside it is of this very bundle, drew what its seed draws, and found the same bytes in all of it."""
    audits = [audit.read_bytes() for audit in audits_of(path)]
    merged = merge(read_bundle(path), audits, keys.pinned())
    assert audits
    assert (merged.refused, merged.exit_code) == ((), 0)
    assert {item["agreement"] for data in audits for item in read_audit(data).predicate["items"]} == {"bitwise"}


def test_measures_without_each_segment_before_them_are_a_fault_and_no_crash():
    """EMO's arms have up to four segments: taking out any trace but keeping the measures must be said."""
    files = read_bundle(ROOT / "papers/emo/replications/emo-nano.repro.zip")
    plan = parse_plan(files["plan.json"], name="plan.json")
    job = next(job for job in jobs(plan) if len(job.segments) > 2)
    for segment in job.segments:
        for trace in (None, b""):
            fewer = {name: data for name, data in files.items() if name != f"{segment.folder}/trace.jsonl"}
            if trace is not None:
                fewer[f"{segment.folder}/trace.jsonl"] = trace
            faults = load(plan, fewer).faults
            assert any(fault.startswith(f"{job.file}: measures of an arm whose segments") for fault in faults)


def test_the_readmes_table_is_the_bundles():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.partition(BEGIN)[2].partition(END)[0].strip()
    assert table == readme_table(ROOT)
