"""Audit statements: form, signature, and the merge of several, whatever their order and repetition."""

import copy
import itertools
import json
import random
from typing import Any

import pytest
from record_cases import failed

from records import canonical, keys
from records.audit import merge_audits, read_audit, sign_audit, verify_audit
from records.errors import InvalidError, MalformedError, UnsupportedError
from records.statement import make_statement, open_envelope, sign_envelope

MANIFEST = "ab" * 32
A, B, C = (keys.private_key(bytes([n]) * 32) for n in (1, 2, 3))
TRUSTED = keys.KeySet(keys=(keys.PublicKey(key_id=A.key_id, raw=A.public.raw, source="file"),))


def item(arm: str = "topk", agreement: str = "bitwise", **more: Any) -> dict[str, Any]:
    plain = {"seed": 0, "segment": None, "steps": None, "difference": "0.0", "lines": 12, "not_compared": []}
    return {"arm": arm, "agreement": agreement, **plain, **more}


def said(*items: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "schema": "repro.audit/v2",
        "statement_sha256": "01" * 32,
        "plan_sha256": "02" * 32,
        "draw": {"seed": 5, "arms": 1, "segments": 0},
        "rule": "bitwise",
        "tolerance": {"loss": "0.08"},
        "differing": [],
        "items": list(items) or [item()],
        "environment": {"torch": "2.13.0"},
        "code": {"sha256": "00" * 32},
        "cost": {"tokens": 10, "run_tokens": 100},
        "finished_at": "2026-11-22T01:00:00Z",
        **more,
    }


def signed(*items: dict[str, Any], key: keys.PrivateKey | None = A, manifest: str = MANIFEST, **more: Any) -> bytes:
    return sign_audit(said(*items, **more), manifest_sha256=manifest, key=key)


def test_who_vouches_decides_the_state():
    assert verify_audit(signed(), trusted=TRUSTED).state == "trusted"
    assert verify_audit(signed(key=B), trusted=TRUSTED).state == "valid"
    assert verify_audit(signed(key=None), trusted=TRUSTED).state == "indeterminate"
    found = verify_audit(signed(item(agreement="differs", difference="not comparable")), trusted=TRUSTED)
    assert "1 differs" in " ".join(check.detail for check in found.checks)


def test_a_statement_is_in_toto_about_the_manifest():
    statement = open_envelope(signed()).statement
    assert statement["predicateType"] == "urn:pith-repro:audit:v1"
    assert statement["subject"] == [{"name": "manifest.json", "digest": {"sha256": MANIFEST}}]
    assert statement["predicate"]["auditor"] == A.public.to_json()


def test_a_statement_changed_under_its_signature():
    data = json.loads(signed(item(agreement="differs", difference="1.5")))
    other = json.loads(signed())
    data["payload"] = other["payload"]
    assert failed(verify_audit(canonical.dumps(data), trusted=TRUSTED)) == {"envelope_signature"}


@pytest.mark.parametrize(
    "change",
    [
        {"items": []},
        {"items": [item(), item()]},
        {"items": [item(agreement="perhaps")]},
        {"items": [item(difference="1e3")]},
        {"items": [item(difference=0)]},
        {"items": [item(lines=-1)]},
        {"items": [item(segment=1)]},
        {"items": [item(segment=0, steps=[0, 10])]},
        {"items": [item(segment=1, steps=[10, 10])]},
        {"items": [item(agreement="within_tolerance")]},
        {"items": [item() | {"more": 1}]},
        {"rule": "tolerance"},
        {"differing": ["torch"]},
        {"draw": {"seed": -1, "arms": 1, "segments": 0}},
        {"draw": {"seed": 1, "arms": True, "segments": 0}},
        {"plan_sha256": "x"},
        {"tolerance": []},
        {"finished_at": "yesterday"},
        {"finished_at": 5},
        {"extra": None},
    ],
)
def test_another_form_is_malformed(change):
    with pytest.raises(MalformedError):
        signed(**change)
    statement = make_statement("manifest.json", MANIFEST, "urn:pith-repro:audit:v1", said(**change) | {"auditor": None})
    assert verify_audit(sign_envelope(statement, A), trusted=TRUSTED).state == "malformed"


def test_other_versions_are_unsupported():
    with pytest.raises(UnsupportedError):
        signed(schema="repro.audit/v9")
    statement = make_statement("manifest.json", MANIFEST, "urn:pith-repro:audit:v7", said() | {"auditor": None})
    with pytest.raises(UnsupportedError):
        read_audit(sign_envelope(statement, A))
    assert verify_audit(b'{"a":1.5}', trusted=TRUSTED).state == "malformed"


# Several audits of one bundle


def merged(*statements: bytes, **more: Any):
    return merge_audits(statements, manifest_sha256=MANIFEST, trusted=TRUSTED, **more)


def test_order_repetition_and_split_leave_no_trace():
    parts = [
        signed(item("a"), item("b")),
        signed(item("c"), key=B),
        signed(item("a"), item("d", segment=1, steps=[0, 200]), key=C),
        signed(key=None),
        b"junk",
    ]
    expected = merged(*parts).to_json()
    for order in itertools.permutations(parts):
        assert merged(*order, *random.Random(0).choices(order, k=3)).to_json() == expected
    assert [(entry["arm"], len(entry["agree"])) for entry in expected["items"]] == [
        ("a", 2),
        ("b", 1),
        ("c", 1),
        ("d", 1),
    ]
    assert len(expected["refused"]) == 2
    split = merged(signed(item("a")), signed(item("b")), *parts[1:])
    assert split.to_json() == expected


def test_one_auditor_counts_once_under_however_many_names():
    again = keys.PrivateKey(public=keys.PublicKey(key_id="another-name", raw=A.public.raw), seed=A.seed)
    found = merged(signed(), signed(key=again), signed(said()["items"][0], finished_at="2026-11-23T01:00:00Z"))
    assert len(found.auditors) == 1
    assert [len(entry.agree) for entry in found.items] == [1]


def test_contradictions_are_shown_and_decide_nothing():
    bad = item(agreement="differs", difference="0.5")
    found = merged(signed(), signed(bad, key=B))
    assert ([entry.contradiction for entry in found.items], found.exit_code) == ([True], 4)
    assert merged(signed(), signed(bad)).items[0].contradiction, "with himself, too"
    assert merged(signed(bad)).exit_code == 1
    assert merged(signed(bad, key=B)).exit_code == 4, "the word of a stranger proves nothing"
    assert merged(signed(bad), signed(key=B)).exit_code == 1
    assert merged(signed()).exit_code == 0
    assert merged().exit_code == 4


def test_what_counts_for_nothing_is_refused_with_the_reason():
    def none(_: bytes) -> None:
        raise InvalidError("its seed does not draw these")

    forged = json.loads(signed())
    forged["signatures"] = json.loads(signed(key=B))["signatures"]
    for statement, reason in (
        (signed(manifest="cd" * 32), "another bundle"),
        (signed(key=None), "nobody signed it"),
        (canonical.dumps(forged), "no signature is under its id"),
        (b"{", "strict JSON"),
    ):
        found = merged(statement)
        assert (found.items, len(found.refused)) == ((), 1)
        assert reason in found.refused[0]
    assert "does not draw" in merged(signed(), examine=none).refused[0]


def test_the_merge_leaves_its_input_alone():
    predicate = said()
    before = copy.deepcopy(predicate)
    sign_audit(predicate, manifest_sha256=MANIFEST, key=A)
    assert predicate == before
