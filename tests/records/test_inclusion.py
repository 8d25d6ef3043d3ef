"""The commitment over evidence and proofs of single pieces: checked by the page's own words, and every change is found."""

import base64
import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from record_cases import failed
from test_replication import FILES, KEY, TRUSTED, build

from records import canonical, inclusion
from records.errors import MalformedError, UsageError
from records.merkle import leaf_hash, tree_root


def chained(entries: list[dict[str, Any]], start: str = "00" * 32) -> bytes:
    lines, head = [], start
    for entry in entries:
        head = hashlib.sha256(bytes.fromhex(head) + canonical.dumps(entry)).hexdigest()
        lines.append(canonical.dumps({"chain": head, "entry": entry}) + b"\n")
    return b"".join(lines)


TRACE = chained(
    [{"step": step} | ({"weights": "ab"} if step in (20, 40) else {}) for step in range(10, 70, 10)]
    + [{"weights": "f"}]
)
EVIDENCE = {
    "segments/a/trace.jsonl": TRACE,
    "segments/a/timing.jsonl": b'{"seconds":0.5}\n',
    "arms/x/seed-0.jsonl": chained([{"name": "loss", "value": "1.5"}]),
}


def committed() -> dict[str, bytes]:
    files = FILES | EVIDENCE
    return build(files, evidence_tree=inclusion.evidence_tree(files))


def test_a_piece_ends_after_each_weight_hash_and_times_are_no_evidence():
    found = inclusion.pieces(EVIDENCE)
    assert [(piece.file, piece.line, piece.lines.count(b"\n")) for piece in found] == [
        ("arms/x/seed-0.jsonl", 1, 1),
        ("segments/a/trace.jsonl", 1, 2),
        ("segments/a/trace.jsonl", 3, 2),
        ("segments/a/trace.jsonl", 5, 3),
    ]
    assert b"".join(piece.lines for piece in found[1:]) == TRACE
    assert [piece.previous for piece in found[:2]] == [None, None]
    assert found[2].previous == json.loads(TRACE.splitlines()[1])["chain"]


def test_the_root_by_the_words_of_the_page():
    lines = TRACE.splitlines(keepends=True)
    cut = [("arms/x/seed-0.jsonl", 1, None, EVIDENCE["arms/x/seed-0.jsonl"])]
    for first, last in ((0, 2), (2, 4), (4, 7)):
        before = json.loads(lines[first - 1])["chain"] if first else None
        cut.append(("segments/a/trace.jsonl", first + 1, before, b"".join(lines[first:last])))
    leaves = []
    for file, line, previous, data in cut:
        place = json.dumps({"file": file, "line": line, "previous": previous}, separators=(",", ":")).encode()
        leaves.append(hashlib.sha256(b"\x00repro.evidence-leaf/v1\x00" + place + b"\n" + data).digest())
    left, right = (hashlib.sha256(b"\x01" + leaves[i] + leaves[i + 1]).digest() for i in (0, 2))
    root = hashlib.sha256(b"\x01" + left + right).hexdigest()
    assert inclusion.evidence_tree(EVIDENCE) == {"algorithm": "rfc6962-sha256", "leaves": 4, "root": root}


@pytest.mark.parametrize("line", range(1, 8))
def test_every_line_can_be_shown_and_checked_alone(line):
    data = inclusion.make_proof(committed(), file="segments/a/trace.jsonl", line=line)
    found = inclusion.verify_proof(data, trusted=TRUSTED)
    assert (found.state, failed(found)) == ("trusted", set())
    piece = inclusion.read_proof(data).piece
    assert piece.line <= line < piece.line + piece.lines.count(b"\n")
    alone = inclusion.verify_proof(data, trusted=inclusion.KeySet())
    assert (alone.state, alone.trust.source) == ("valid", "document")


def test_a_single_piece_is_its_own_root():
    files = FILES | {"arms/x/seed-0.jsonl": EVIDENCE["arms/x/seed-0.jsonl"]}
    bundle = build(files, evidence_tree=inclusion.evidence_tree(files))
    data = inclusion.make_proof(bundle, file="arms/x/seed-0.jsonl", line=1)
    assert json.loads(data)["path"] == []
    assert inclusion.verify_proof(data, trusted=TRUSTED).state == "trusted"


def changed(change: Callable[[dict[str, Any]], object]) -> set[str]:
    proof = json.loads(inclusion.make_proof(committed(), file="segments/a/trace.jsonl", line=3))
    change(proof)
    return failed(inclusion.verify_proof(canonical.dumps(proof), trusted=TRUSTED))


def other_root(proof: dict[str, Any]) -> None:
    statement = json.loads(base64.b64decode(proof["statement"]["payload"]))
    statement["predicate"]["evidence_tree"]["root"] = "00" * 32
    proof["statement"]["payload"] = base64.b64encode(canonical.dumps(statement)).decode()


@pytest.mark.parametrize(
    ("change", "codes"),
    [
        (lambda proof: proof.update(index=1), {"evidence_tree"}),
        (lambda proof: proof.update(index=9), {"evidence_tree"}),
        (lambda proof: proof["path"].pop(), {"evidence_tree"}),
        (lambda proof: proof["path"].reverse(), {"evidence_tree"}),
        (lambda proof: proof["piece"].update(file="segments/b/trace.jsonl"), {"evidence_tree"}),
        (lambda proof: proof["piece"].update(line=4), {"evidence_tree"}),
        (lambda proof: proof["piece"].update(previous="00" * 32), {"evidence_tree", "trace"}),
        (lambda proof: proof["piece"].update(lines=proof["piece"]["lines"].replace("30", "31")), {"evidence_tree", "trace"}),
        (lambda proof: proof.update(plan={}), {"plan"}),
        (other_root, {"envelope_signature", "evidence_tree"}),
        (lambda proof: proof.update(schema="repro.inclusion/v2"), {"schema"}),
        (lambda proof: proof.update(index=True), {"schema"}),
        (lambda proof: proof.update(path=["00"]), {"schema"}),
        (lambda proof: proof.update(path=["00" * 32] * 65), {"schema"}),
        (lambda proof: proof["piece"].update(file="../x"), {"schema"}),
        (lambda proof: proof["piece"].update(previous=None), {"schema"}),
        (lambda proof: proof["piece"].update(lines="{}\n"), {"schema"}),
        (lambda proof: proof.pop("plan"), {"schema"}),
        (lambda proof: proof.update(key={}), {"schema"}),
        (lambda proof: proof.update(statement=[]), {"schema"}),
    ],
)  # fmt: skip
def test_a_changed_proof_fails(change, codes):
    assert changed(change) == codes


def test_what_cannot_be_proven():
    files = committed()
    for file, line in (("segments/a/trace.jsonl", 8), ("segments/a/trace.jsonl", 0), ("segments/b/trace.jsonl", 1)):
        with pytest.raises(UsageError, match="expected a line of the bundle's evidence"):
            inclusion.make_proof(files, file=file, line=line)
    with pytest.raises(UsageError, match="older than proofs"):
        inclusion.make_proof(build(), file="segments/a/trace.jsonl", line=1)


def test_the_check_of_a_bundle():
    files = committed()
    predicate = {"evidence_tree": inclusion.evidence_tree(files)}
    assert inclusion.tree_check(files, predicate).status == "pass"
    assert inclusion.tree_check(files, {}).status == "skip"
    for changes in (
        {"segments/a/trace.jsonl": TRACE[: TRACE.rindex(b"{", 0, -200)]},
        {"segments/a/trace.jsonl": b'{"weights"\n'},
        {"segments/a/trace.jsonl": b'{"chain":"0","entry":{}}'},
        {"arms/y/seed-0.jsonl": EVIDENCE["arms/x/seed-0.jsonl"]},
    ):
        assert inclusion.tree_check(files | changes, predicate).status == "fail"
    with pytest.raises(MalformedError, match="64 lower-case hex"):
        inclusion.pieces({"arms/x/seed-0.jsonl": b'{"chain":"0","entry":{}}'})


def test_the_signature_is_the_statements_and_no_other():
    data = json.loads(inclusion.make_proof(committed(), file="arms/x/seed-0.jsonl", line=1))
    signature = base64.b64decode(data["statement"]["signatures"][0]["sig"])
    data["statement"]["signatures"][0]["sig"] = base64.b64encode(bytes([signature[0] ^ 1]) + signature[1:]).decode()
    assert failed(inclusion.verify_proof(canonical.dumps(data), trusted=TRUSTED)) == {"envelope_signature"}
    assert KEY.key_id == data["statement"]["signatures"][0]["keyid"]
    assert tree_root([leaf_hash(b"x")]) == leaf_hash(b"x")
