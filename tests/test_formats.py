"""Old bundles stay readable, and another version of any of our formats is said to be one: exit code 3 and one line."""

from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import ROOT, repro

from records import canonical, keys
from records.package import MANIFEST, STATEMENT, build_manifest, read_bundle, write_bundle
from records.replication import OUTCOME, PLAN
from records.report import Verification
from records.statement import make_statement, open_envelope, sign_envelope
from repro.workflow.bundle import verify

FIXTURES = sorted((ROOT / "tests/fixtures/formats").glob("v*/*.repro.zip"))
EXAMPLE_KEY = keys.private_key(bytes(range(32)))  # the published one of docs/replication-record.md
Files = dict[str, bytes]


def verified(files: Files) -> Verification:
    return verify(files, target="fixture", trusted=keys.pinned())


def test_each_version_has_its_fixtures() -> None:
    assert {path.parent.name for path in FIXTURES} == {"v1"}
    assert [path.name for path in FIXTURES] == ["emo-smoke.repro.zip", "emoe-smoke.repro.zip"]


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_an_old_bundle_verifies_and_judges_to_the_same(path: Path) -> None:
    found = verified(read_bundle(path))
    assert [check.detail for check in found.checks if check.status == "fail"] == []
    assert (found.state, found.exit_code, found.trust.key_id) == ("valid", 0, EXAMPLE_KEY.key_id)
    passed = {check.code for check in found.checks if check.status == "pass"}
    assert {"schema", "envelope_signature", "manifest", "plan", "trace", "verdicts"} <= passed


def signed_again(files: Files, *, predicate_type: str | None = None, schema: str | None = None) -> Files:
    """The files as a bundler of theirs would bind them: manifest, digests and signature all hold."""
    statement = open_envelope(files[STATEMENT]).statement
    predicate = statement["predicate"]
    if MANIFEST in files and canonical.loads(files[MANIFEST])["schema"].endswith("v1"):
        files[MANIFEST] = build_manifest(files)
    predicate |= {
        "plan_sha256": canonical.sha256_hex(files[PLAN]),
        "outcome_sha256": canonical.sha256_hex(files[OUTCOME]),
        "manifest_sha256": canonical.sha256_hex(files[MANIFEST]),
        "schema": schema or predicate["schema"],
    }
    subject = statement["subject"][0]
    made = make_statement(
        subject["name"], subject["digest"]["sha256"], predicate_type or statement["predicateType"], predicate
    )
    return files | {STATEMENT: sign_envelope(made, EXAMPLE_KEY)}


def renamed(name: str, schema: str) -> Callable[[Files], Files]:
    def change(files: Files) -> Files:
        value = canonical.loads(files[name]) | {"schema": schema, "of_a_later_version": "yes"}
        return signed_again(files | {name: canonical.dumps(value)})

    return change


def with_header(pattern: str) -> Callable[[Files], Files]:
    def change(files: Files) -> Files:
        name = next(name for name in sorted(files) if pattern in name)
        return signed_again(files | {name: b'{"schema":"repro.trace/v2"}\n' + files[name]})

    return change


LATER = {
    "repro.plan/v2": renamed(PLAN, "repro.plan/v2"),
    "repro.outcome/v7": renamed(OUTCOME, "repro.outcome/v7"),
    "repro.manifest/v2": renamed(MANIFEST, "repro.manifest/v2"),
    "repro.trace/v2": with_header("/trace.jsonl"),
    "repro.trace/v2 of measures": with_header("arms/"),
    "repro.replication/v2": lambda files: signed_again(files, schema="repro.replication/v2"),
    "urn:pith-repro:replication-record:v2": lambda files: signed_again(
        files, predicate_type="urn:pith-repro:replication-record:v2"
    ),
}


@pytest.mark.parametrize("version", LATER)
def test_a_later_version_is_unsupported_and_said_in_one_line(version: str) -> None:
    files = LATER[version](read_bundle(FIXTURES[-1]))
    found = verified(files)
    faults = [check for check in found.checks if check.status == "fail"]
    assert [fault.code for fault in faults] == ["schema"]
    assert f"found '{version.split(' ')[0]}': another version of the format" in faults[0].detail
    assert "\n" not in faults[0].detail
    assert (found.state, found.exit_code) == ("malformed", 3)


def test_the_changed_bundle_differs_in_its_version_alone() -> None:
    """What the test above signs again would verify, but for the version: no other fault hides behind it."""
    assert verified(signed_again(read_bundle(FIXTURES[-1]))).exit_code == 0


def test_the_command_line_says_so(tmp_path: Path) -> None:
    path = tmp_path / "later.repro.zip"
    write_bundle(path, LATER["repro.plan/v2"](read_bundle(FIXTURES[-1])))
    done = repro("verify", path, "--offline")
    assert done.returncode == 3
    assert done.stdout.decode().count("fail") == 1
    assert "another version of the format, which this version of repro cannot read" in done.stdout.decode()
    done = repro("audit", path)
    assert (done.returncode, done.stdout) == (3, b"")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("schema", ["repro.plan/v", "repro.plans/v2", "repro.plan/v2x", 2, None])
def test_what_is_no_version_of_ours_is_malformed_as_ever(schema: object) -> None:
    files = read_bundle(FIXTURES[-1])
    value = canonical.loads(files[PLAN]) | {"schema": schema}
    found = verified(signed_again(files | {PLAN: canonical.dumps(value)}))
    assert (found.state, found.exit_code) == ("invalid", 1)
