"""A bundle in the forms of others: an in-toto test-result statement, a LaTeX table. Both are of a bundle that was verified."""

from collections.abc import Mapping
from typing import Any

from records import canonical
from records.keys import PrivateKey
from records.package import MANIFEST
from records.replication import OUTCOME, PLAN, read_statement
from records.statement import make_statement, sign_envelope
from repro.report.latex import table

TEST_RESULT = "https://in-toto.io/attestation/test-result/v0.1"


def as_test_result(files: Mapping[str, bytes], *, key: PrivateKey | None) -> bytes:
    """The verdicts as a statement with the test-result predicate, in a signed envelope where a key is given.

    The tests are the claims: `replicated` passes, `not_replicated` fails, `inconclusive` warns; one that was not tested is left
    out. Their configuration is the plan, with what binds it to the evidence. The subject is the record's: the paper.

    Args:
        files: of a bundle that holds.
    """
    subject = read_statement(files).statement["subject"][0]
    verdicts = canonical.loads(files[OUTCOME])["verdicts"]
    by_verdict = {
        verdict: [item["claim"] for item in verdicts if item["verdict"] == verdict]
        for verdict in ("replicated", "inconclusive", "not_replicated")
    }
    predicate = {
        "result": "FAILED" if by_verdict["not_replicated"] else "WARNED" if by_verdict["inconclusive"] else "PASSED",
        "configuration": [
            {"name": name, "digest": {"sha256": canonical.sha256_hex(files[name])}}
            for name in (PLAN, OUTCOME, MANIFEST)
        ],
        "passedTests": by_verdict["replicated"],
        "warnedTests": by_verdict["inconclusive"],
        "failedTests": by_verdict["not_replicated"],
    }
    statement = make_statement(subject["name"], subject["digest"]["sha256"], TEST_RESULT, predicate)
    return canonical.dumps(statement) if key is None else sign_envelope(statement, key)


def as_latex(files: Mapping[str, bytes]) -> bytes:
    """The verdicts as a LaTeX table; `files` are those of a bundle that holds."""
    plan: dict[str, Any] = canonical.loads(files[PLAN])
    text = table(
        plan,
        canonical.loads(files[OUTCOME]),
        plan_sha256=canonical.sha256_hex(files[PLAN]),
        manifest_sha256=canonical.sha256_hex(files[MANIFEST]),
    )
    return text.encode()
