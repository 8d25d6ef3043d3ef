"""Each check of a document, failing for its own reason and for no other."""

import base64
import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from record_cases import STORE, bundle_of, failed, own_record, status

from records import canonical, document, keys, schema
from records.report import Verification

Verify = Callable[..., Verification]
EMPTY = "258153158e38e3291e3d48162225fcdb2d5a3ed65a07baac614ab91432fd4f57"


def test_the_packages_records(verify: Verify) -> None:
    """The store's promise: each file has the indexed hash, fits the schema, and is its number's record."""
    index = json.loads((STORE.parent / "index.json").read_bytes())
    assert {path.stem for path in STORE.glob("*.json")} == set(index["records"])
    states = {}
    for suffix, entry in index["records"].items():
        data = (STORE / f"{suffix}.json").read_bytes()
        assert canonical.sha256_hex(data) == entry["sha256"]
        assert schema.faults("record", canonical.loads(data)) == []
        found = verify(data)
        assert found.pith_number == entry["pith_number"] and found.pith_number.endswith(suffix)
        assert status(found, "title_hash") == "pass"
        source = canonical.loads(data)["canonical_record"]["source"]
        assert (source["id"], source["version"]) == (entry["arxiv"], entry["version"])
        states[suffix[:8]] = found.state
    assert states == {"X72AYRLP": "trusted", "IV7VH3NC": "valid", "RS6XGWCW": "valid"}
    for entry in index["unnumbered"].values():
        assert document.canonical_text_sha256(entry["title"]) == entry["title_canon_sha256"]


def test_constants() -> None:
    assert document.EMPTY_LIST_SHA256 == EMPTY
    assert document.EMPTY_INTEGRITY_SHA256 == "c28c3603d3b5d939e8dc4c7e95fa8dfce3d595e45f758748cecf8e644a296938"


def put(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(value: dict[str, Any]) -> None:
        for name in path[:-1]:
            value = value[int(name)] if isinstance(value, list) else value[name]
        value[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("schema", put("record_type", to="other")),
        ("canonical_hash", put("canonical_sha256", to="0" * 64)),
        ("canonical_hash", put("source", "id", to="2506.12118")),
        ("canonical_hash", put("paper", "submitted_at", to="2024-06-13T17:59:05Z")),
        ("canonical_hash", put("paper", "license", to="public domain")),
        ("pith_number", put("pith_number", to="pith:2025:IV7VH3NCTL2M6JAD44FIMISHCY")),
        ("year", put("pith_number", to="pith:2024:X72AYRLPIFP2UVYVUQLNZSTJUW")),
        ("short_number", put("short_pith_number", to="pith:IV7VH3NC")),
        ("aliases", put("aliases", "0", "alias_value", to="2605.13247")),
        ("aliases", put("aliases", "1", "alias_value", to="2506.12119v3")),
        ("aliases", put("aliases", "2", "alias_value", to="10.48550/arxiv.2605.13247")),
        ("aliases", put("aliases", "5", "alias_value", to="IV7VH3NC")),
        ("title_hash", put("paper", "title", to="Dense LLMs Can Surpass Mixture-of-Experts")),
        ("title_hash", put("graph_snapshot", "paper", "title", to="Another")),
        ("title_hash", put("title", to="Another")),
        ("abstract_hash", put("paper", "abstract", to="Another abstract.")),
        ("receipt_digest", put("receipt", "canonical_sha256", to="0" * 64)),
        ("receipt_signature", put("receipt", "algorithm", to="rsa")),
        ("receipt_signature", put("receipt", "signed_message", to="canonical_sha256_hex")),
        ("receipt_signature", put("receipt", "signature_b64", to=base64.b64encode(bytes(64)).decode())),
        ("receipt_signature", put("receipt", "signature_b64", to=base64.b64encode(bytes(63)).decode())),
        ("key_trust", put("receipt", "public_key_fingerprint", to="0" * 32)),
        ("snapshot_hash", put("graph_snapshot", "claims", "snapshot_sha256", to="0" * 64)),
        ("snapshot_hash", put("graph_snapshot", "integrity", "snapshot_sha256", to=EMPTY)),
        ("snapshot_hash", put("graph_snapshot", "references", "count", to=3)),
    ],
)  # fmt: skip
def test_each_check_fails_for_its_own_reason(
    verify: Verify, signed: dict[str, Any], code: str, change: Callable[[dict[str, Any]], None]
) -> None:
    assert verify(signed).state == "trusted"
    change(signed)
    found = verify(signed)
    assert failed(found) == {code}
    assert found.state == ("malformed" if code == "schema" else "invalid")


def test_strict_json_comes_first(verify: Verify) -> None:
    found = verify(b'{"canonical_record":{},"canonical_record":{}}')
    assert failed(found) == {"strict_json"} and found.state == "malformed" and found.exit_code == 3


@pytest.mark.parametrize("data", [b"[]", b"{}", b"1", b'"x"', b"null", b'{"a":1}'])
def test_other_json_is_malformed(verify: Verify, data: bytes) -> None:
    assert failed(verify(data)) == {"schema"}


def test_every_fault_is_reported_not_just_the_first(verify: Verify, signed: dict[str, Any]) -> None:
    signed["short_pith_number"] = "pith:AAAAAAAA"
    signed["paper"]["title"] = "Another"
    signed["receipt"]["canonical_sha256"] = "0" * 64
    assert failed(verify(signed)) == {"short_number", "title_hash", "receipt_digest"}


def test_a_receipt_of_another_record_does_not_hold(verify: Verify, signed: dict[str, Any]) -> None:
    other = json.loads((STORE / "IV7VH3NCTL2M6JAD44FIMISHCY.json").read_bytes())
    other["receipt"] = signed["receipt"]
    assert failed(verify(other)) == {"receipt_digest", "receipt_signature"}


def test_the_minimum_is_a_record_and_a_hash_or_a_number(verify: Verify, signed: dict[str, Any]) -> None:
    record = {"canonical_record": signed["canonical_record"]}
    for name in ("canonical_sha256", "pith_number"):
        found = verify({**record, name: signed[name]})
        assert found.state == "valid", found
        assert found.pith_number == signed["pith_number"]
    assert failed(verify(record)) == {"schema"}


def test_a_hash_without_its_record_shows_nothing(verify: Verify, signed: dict[str, Any]) -> None:
    """Number and receipt follow from the hash, but what was hashed is not there to see."""
    listing = {
        "canonical_record": None,
        **{name: signed[name] for name in ("canonical_sha256", "pith_number", "receipt")},
    }
    found = verify(listing)
    assert found.state == "indeterminate" and status(found, "receipt_signature") == "pass"
    listing["pith_number"] = "pith:2025:IV7VH3NCTL2M6JAD44FIMISHCY"
    assert failed(verify(listing)) == {"pith_number"}


def test_a_key_of_the_document_gives_no_trust(verify: Verify) -> None:
    """A receipt by a key nobody trusts is skipped; given with --trusted-keys, it holds; the other key of its id does not."""
    signed, key = own_record()
    signed["public_key"] = key.public.to_json()
    assert verify(signed).state == "valid"
    mine = keys.PublicKey(key_id=key.key_id, raw=key.public.raw, source="file")
    found = verify(signed, trusted=keys.pinned().with_keys([mine]))
    assert found.state == "trusted" and found.trust.source == "file"
    signed["receipt"]["key_id"] = "pith-v1-2026-05"  # our signature under the registry's name
    assert failed(verify(signed)) == {"receipt_signature"}


@pytest.mark.parametrize(
    ("field", "time", "ok"),
    [
        ("valid_from", "2026-01-01T00:00:00Z", True),
        ("valid_from", "2026-03-01T00:00:00Z", False),
        ("valid_until", "2026-03-01T00:00:00Z", True),
        ("valid_until", "2026-01-31T23:59:59.999999Z", False),
        ("revoked_at", "2027-01-01T00:00:00Z", False),
    ],
)
def test_key_rotation(verify: Verify, field: str, time: str, ok: bool) -> None:
    signed, key = own_record()
    rotated = keys.PublicKey(key_id=key.key_id, raw=key.public.raw, source="file", **{field: time})
    found = verify(signed, trusted=keys.KeySet(keys=(rotated,)))
    assert failed(found) == (set() if ok else {"key_trust"})
    assert found.state == ("trusted" if ok else "invalid")


def test_sixteen_spellings_of_one_signature(verify: Verify, signed: dict[str, Any]) -> None:
    """base64 leaves four bits of the last character free; only the canonical spelling is one signature."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    text = signed["receipt"]["signature_b64"]
    held = []
    for last in alphabet:
        spelled = text[:-3] + last + "=="
        if base64.b64decode(spelled, validate=True) == base64.b64decode(text):
            signed["receipt"]["signature_b64"] = spelled
            held.append(verify(signed).state)
    assert sorted(held) == ["invalid"] * 15 + ["trusted"]


def test_titles_outside_ascii_may_be_read_in_ways_that_are_not_settled(verify: Verify) -> None:
    signed, _ = own_record(title="Schrödinger's straße")
    signed["title"] = "Schro\u0308dinger's  Straße\n"
    assert status(verify(signed), "title_hash") == "pass"
    signed["title"] = "Schrodinger's Strasse"
    assert failed(verify(signed)) == {"title_hash"}


def test_what_no_rule_is_known_for_is_skipped(verify: Verify, signed: dict[str, Any]) -> None:
    signed["graph_snapshot"]["claims"] = {"count": 1, "items": [{"x": 1}], "snapshot_sha256": "1" * 64}
    signed["graph_snapshot"]["claims"]["snapshot_sha256"] = canonical.digest({"payload": [{"x": 1}]})
    found = verify(signed)
    assert [c.status for c in found.checks if c.code == "snapshot_hash"] == ["skip", "pass"]
    signed["aliases"].append({"alias_kind": "isbn", "alias_value": "123"})
    assert "skip" in [c.status for c in verify(signed).checks if c.code == "aliases"]


def test_many_faults_alike_are_counted_and_not_all_listed(verify: Verify, signed: dict[str, Any]) -> None:
    signed["aliases"] += [{"alias_kind": "arxiv", "alias_value": str(number)} for number in range(5000)]
    found = verify(signed)
    faults = [check for check in found.checks if check.code == "aliases" and check.status == "fail"]
    assert len(faults) == 21 and faults[-1].detail == "and 4980 more, not listed"
    assert len(json.dumps(signed)) > document.LARGE and status(found, "schema") == "pass"
    signed["aliases"].append({})
    assert "schema" in failed(verify(signed))  # and jsonschema says where, in a large document as in a small one


def test_bundle(verify: Verify, signed: dict[str, Any]) -> None:
    found = verify(bundle_of(signed))
    assert (found.kind, found.state) == ("pith_bundle", "trusted"), found
    assert status(found, "merge") == "pass"
    assert status(found, "envelope_signature") == "skip"  # what an event's signature covers is not known


def test_bundle_with_an_event_of_another_paper(verify: Verify, signed: dict[str, Any]) -> None:
    bundle = bundle_of(signed)
    bundle["events"][1]["subject_pith_number"] = "pith:2026:IV7VH3NCTL2M6JAD44FIMISHCY"
    assert failed(verify(bundle)) == {"merge"}


def state_of(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "state_type": "pith_open_graph_state", "state_version": "1.0", "pith_number": record["pith_number"],
        "merge_version": "pith-open-graph-merge-v1", "event_count": 2, "valid_event_count": 2,
        "invalid_event_count": 0, "equivocation_count": 0,
        "current": {"canonical_record": record["canonical_record"], "source_aliases": record["aliases"],
                    "graph_snapshots": [{"event_id": "sha256:" + "0" * 64,
                                         "payload": {"graph_snapshot": record["graph_snapshot"]}}]},
    }  # fmt: skip


def test_a_bundle_or_state_whose_snapshot_is_of_another_paper(verify: Verify, signed: dict[str, Any]) -> None:
    for whole, graph in ((bundle_of(signed), ("events", 1)), (state_of(signed), ("current", "graph_snapshots", 0))):
        for name, code in (("paper", "title_hash"), ("source", "canonical_hash"), ("claims", "snapshot_hash")):
            changed = copy.deepcopy(whole)
            place = changed
            for step in (*graph, "payload", "graph_snapshot"):
                place = place[step]
            if name == "paper":
                place["paper"]["title"] = "Another"
            else:
                place[name] = (
                    {"count": 0, "snapshot_sha256": "0" * 64} if name == "claims" else {**place[name], "version": 1}
                )
            assert failed(verify(changed)) == {code}


def test_state(verify: Verify, signed: dict[str, Any]) -> None:
    state = state_of(signed)
    found = verify(state)
    assert (found.kind, found.state) == ("pith_state", "valid"), found
    wrong = copy.deepcopy(state)
    wrong["event_count"] = 3
    assert failed(verify(wrong)) == {"merge"}
    wrong = copy.deepcopy(state)
    wrong["current"]["canonical_record"]["source"]["version"] = 1
    assert failed(verify(wrong)) >= {"pith_number"}


def test_graph_key_and_mirrors(verify: Verify, signed: dict[str, Any]) -> None:
    graph = verify(signed["graph_snapshot"])
    assert graph.kind == "pith_state" and graph.state == "indeterminate"  # it names no record that it is bound to
    assert status(graph, "snapshot_hash") == "pass"
    key = keys.pinned().keys[0].to_json()
    assert status(verify(key), "key_trust") == "pass"
    other = keys.generate(key_id="pith-v1-2026-05").public.to_json()
    assert failed(verify(other)) == {"key_trust"}
    mirror = {"name": "m", "mirror_type": "https", "base_url": "https://m", "public_key": key,
              "bundle_pattern": "https://m/pith/{suffix}/bundle.json"}  # fmt: skip
    manifest = {"manifest_type": "pith_mirror_manifest", "manifest_version": "1.0", "mirrors": [mirror]}
    assert status(verify(manifest), "key_trust") == "pass"
    mirror["public_key"] = other
    assert failed(verify(manifest)) == {"key_trust"}


def test_control_characters_of_a_document_never_reach_a_message(verify: Verify, signed: dict[str, Any]) -> None:
    evil = "\x1b[2J\u202e\n"
    signed |= {"short_pith_number": evil, "pith_number": evil, "record_type": evil}
    signed["aliases"][0]["alias_value"] = evil
    signed["receipt"] |= {"key_id": evil, "algorithm": evil}
    signed["paper"]["title"] = evil
    for check in verify(signed).checks:
        assert check.detail.isprintable(), check


JUNK: list[Any] = [None, True, 0, -1, "", "x", [], [1], {}, {"x": 1}, [[]], [{}]]


def test_any_junk_in_any_place_gives_a_verification(verify: Verify, signed: dict[str, Any]) -> None:
    """No KeyError, TypeError or the like, whatever stands where: each field in turn is replaced by each kind of junk."""
    for whole in (signed, bundle_of(signed), state_of(signed)):
        for path in _paths(whole):
            for junk in JUNK:
                changed = copy.deepcopy(whole)
                parent = changed
                for name in path[:-1]:
                    parent = parent[name]
                parent[path[-1]] = junk
                value = canonical.loads(canonical.dumps(changed))
                found = document.verify_value(value, target="t", trusted=keys.pinned(), schema_known="not looked at")
                assert found.state in ("trusted", "valid", "invalid", "malformed", "indeterminate")


def _paths(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if len(above) > 4:
        return []
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    return [p for name, inner in items for p in [(*above, name), *_paths(inner, (*above, name))]]
