"""`repro export` and `repro report --index` as typed; the test-result read by in-toto's own classes."""

import json

import pytest
from command_line import ROOT, repro

from records import canonical, keys
from records.package import read_bundle, write_bundle
from records.replication import read_statement
from records.statement import open_envelope, verify_envelope
from repro.cli import main

FIXTURE = ROOT / "tests/fixtures/formats/v1/emoe-smoke.repro.zip"
PUBLISHED = sorted(ROOT.glob("papers/*/replications/*.repro.zip"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name)
def test_test_result_is_read_by_in_toto(path, capfdbinary) -> None:
    module = pytest.importorskip("in_toto_attestation.v1.statement", reason="in-toto-attestation is not installed")
    from google.protobuf import json_format
    from in_toto_attestation.predicates.test_result.v0 import test_result_pb2
    from in_toto_attestation.v1 import statement_pb2

    assert main(["export", "test-result", str(path)]) == 0
    value = json.loads(capfdbinary.readouterr().out)
    statement = module.Statement.copy_from_pb(json_format.ParseDict(value, statement_pb2.Statement()))
    statement.validate()
    assert statement.pb.predicate_type == "https://in-toto.io/attestation/test-result/v0.1"
    result = json_format.ParseDict(value["predicate"], test_result_pb2.TestResult())  # refuses a field that it lacks
    files = read_bundle(path)
    outcome = canonical.loads(files["outcome.json"])
    for verdict, tests in (
        ("replicated", result.passed_tests),
        ("inconclusive", result.warned_tests),
        ("not_replicated", result.failed_tests),
    ):
        assert list(tests) == [item["claim"] for item in outcome["verdicts"] if item["verdict"] == verdict]
    assert result.result == ("FAILED" if result.failed_tests else "WARNED" if result.warned_tests else "PASSED")
    assert result.configuration[0].digest["sha256"] == outcome["plan_sha256"]
    assert value["subject"] == read_statement(files).statement["subject"]


def test_signed_with_a_key(key_file, tmp_path) -> None:
    out = tmp_path / "result.json"
    assert main([*map(str, ("export", "test-result", FIXTURE, "-o", out, "--key", key_file))]) == 0
    envelope = open_envelope(out.read_bytes())
    assert envelope.statement["predicate"]["result"] == "WARNED"
    checks, _ = verify_envelope(envelope, trusted=keys.pinned(), document_keys=[keys.load(key_file).public])
    assert [check.status for check in checks if check.code == "envelope_signature"] == ["pass"]


def test_latex_to_a_file(tmp_path) -> None:
    out = tmp_path / "table.tex"
    assert repro("export", "latex", FIXTURE, "-o", out).returncode == 0
    assert out.read_bytes() == repro("export", "latex", FIXTURE).stdout
    assert b"\\toprule" in out.read_bytes()


def test_the_index(tmp_path) -> None:
    done = repro("report", "--index", ROOT / "tests/fixtures/formats", "-o", tmp_path / "index.html")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'index.html'}: 2 replications\n".encode())
    assert b"2 replications of 2 papers" in (tmp_path / "index.html").read_bytes()


def test_what_cannot_be_done_is_said_in_one_line(tmp_path, capsys) -> None:
    bad = tmp_path / "bad.repro.zip"
    write_bundle(bad, read_bundle(FIXTURE) | {"run.json": b"{}"})
    (tmp_path / "junk.zip").write_bytes(b"PK\x03\x04junk")
    for code, words, message in (
        (1, ["export", "latex", bad], "'run.json' is not the file"),
        (1, ["report", "--index", bad, "-o", tmp_path / "x.html"], "'run.json' is not the file"),
        (3, ["export", "test-result", tmp_path / "junk.zip"], "not a whole zip file"),
        (2, ["export", "latex", FIXTURE, "--key", "k"], "a table is not signed"),
        (2, ["export", "test-result", tmp_path / "none.zip"], "cannot read"),
        (2, ["report", "--index", FIXTURE], "--index writes the page that -o names"),
        (2, ["report", tmp_path, "-o", "x"], "--index writes the page that -o names"),
        (2, ["report", tmp_path, "--index", FIXTURE, "-o", "x"], "expected either a run directory"),
        (2, ["export", "latex", FIXTURE, "-o", tmp_path / "no/such.tex"], "cannot write"),
    ):
        assert main([str(word) for word in words]) == code
        shown = capsys.readouterr()
        assert shown.out == "" and message in shown.err and len(shown.err.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.repro.zip", "junk.zip"]
