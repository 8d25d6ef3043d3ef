"""Replication records: what is signed, and that every tampering shows. The statement is checked by independent code too."""

import base64
import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from record_cases import STORE, failed, status

from records import canonical, keys, package, replication, statement
from records.errors import InvalidError, MalformedError
from records.report import Check, Verification

KEY = keys.private_key(bytes(range(32)))
MINE = keys.PublicKey(key_id=KEY.key_id, raw=KEY.public.raw, source="file")
TRUSTED = keys.pinned().with_keys([MINE])
FILES = {
    "plan.json": b'{"plan":1}',
    "outcome.json": b'{"outcome":1}',
    "paper.json": b'{"arxiv":"2509.21892"}',
    "trace/arm.jsonl": b'{"step":1}\n',
}
PREDICATE: dict[str, Any] = {
    "schema": "repro.replication/v1",
    "paper": {"slug": "emoe", "arxiv": "2509.21892"},
    "plan_sha256": canonical.sha256_hex(FILES["plan.json"]),
    "outcome_sha256": canonical.sha256_hex(FILES["outcome.json"]),
    "scale": "nano",
    "verdicts": [{"claim": "A1", "verdict": "replicated", "effect": "0.071"}],
    "environment": {"torch": "2.13.0"},
    "code": {"sha256": "0" * 64, "version": "0.1.0", "commit": None, "dirty": True},
    "finished_at": "2026-11-21T22:00:00Z",
}


def build(files: dict[str, bytes] | None = None, key: keys.PrivateKey | None = KEY, **changes: Any) -> dict[str, bytes]:
    files = FILES if files is None else files
    subject = {"subject_name": "arxiv:2509.21892", "subject_sha256": canonical.sha256_hex(files["paper.json"])}
    subject |= {name: changes.pop(name) for name in list(changes) if name in subject}
    return replication.build_replication(files, **subject, predicate={**PREDICATE, **changes}, key=key)


def judged(files: dict[str, bytes], trusted: keys.KeySet = TRUSTED) -> Verification:
    """As the workflow does it: the records' own checks, and then that the verdicts were judged again."""
    found = replication.verify_replication(files, trusted=trusted)
    return found.with_checks(Check(code="verdicts", status="pass", detail="judged again"))


def resigned(files: dict[str, bytes], key: keys.PrivateKey | None, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the statement and sign it anew, as a forger with a key of their own would."""
    value = copy.deepcopy(statement.open_envelope(files["statement.dsse.json"]).statement)
    change(value)
    files["statement.dsse.json"] = statement.sign_envelope(value, key)


def test_signed_and_unsigned() -> None:
    files = build()
    assert judged(files).state == "trusted"
    assert judged(files, keys.pinned()).state == "valid"  # the key came with the bundle
    assert judged(files, keys.pinned()).trust.source == "document"
    assert judged(build(key=None)).state == "valid"
    assert status(judged(build(key=None)), "envelope_signature") == "skip"
    assert replication.verify_replication(files, trusted=TRUSTED).state == "indeterminate"  # no verdict was judged


def test_building_is_deterministic() -> None:
    assert package.zip_bytes(build()) == package.zip_bytes(build(dict(reversed(FILES.items()))))


@pytest.mark.parametrize("name", sorted(build()))
def test_any_changed_byte_of_any_file_shows(name: str) -> None:
    whole = build()
    for at in range(len(whole[name])):
        files = dict(whole)
        files[name] = whole[name][:at] + bytes([whole[name][at] ^ 1]) + whole[name][at + 1 :]
        assert judged(files).state in ("invalid", "malformed"), (name, at)


@pytest.mark.parametrize("name", sorted(build()))
def test_any_file_left_out_shows(name: str) -> None:
    files = build()
    del files[name]
    assert judged(files).state in ("invalid", "malformed")


def test_a_file_added_shows() -> None:
    assert failed(judged(build() | {"extra.txt": b""})) == {"manifest"}


def test_a_manifest_rebuilt_around_a_changed_file_is_not_the_signed_one() -> None:
    files = build() | {"trace/arm.jsonl": b'{"step":2}\n'}
    files["manifest.json"] = package.build_manifest(files)
    assert failed(judged(files)) == {"manifest"}


def test_a_tolerance_changed_after_the_run_shows() -> None:
    """The plan's digest is in the signed statement, so another plan fails even with its manifest rebuilt and re-signed."""
    files = build() | {"plan.json": b'{"plan":2}'}
    files["manifest.json"] = package.build_manifest(files)
    other = keys.generate()

    def change(value: dict[str, Any]) -> None:
        value["predicate"]["manifest_sha256"] = canonical.sha256_hex(files["manifest.json"])

    resigned(files, other, change)
    assert "plan" in failed(judged(files))


def test_another_key_under_the_signers_id_does_not_hold() -> None:
    files = build()
    forger = keys.private_key(bytes(32), key_id=KEY.key_id)
    resigned(files, forger, lambda value: value["predicate"]["verdicts"][0].update(verdict="not_replicated"))
    files["signing-key.json"] = canonical.dumps(forger.public.to_json())
    assert "envelope_signature" in failed(judged(files))
    assert judged(files, keys.pinned()).state == "invalid"  # the listed key file is not the one in the manifest


def test_every_signature_has_to_hold() -> None:
    files = build()
    value = json.loads(files["statement.dsse.json"])
    value["signatures"].append({"keyid": "other", "sig": base64.b64encode(bytes(64)).decode()})
    files["statement.dsse.json"] = canonical.dumps(value)
    assert judged(files).state == "trusted"  # a key that is not at hand is skipped, and said
    found = judged(files, TRUSTED.with_keys([keys.PublicKey(key_id="other", raw=MINE.raw, source="file")]))
    assert failed(found) == {"envelope_signature"}


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "other"}, {"finished_at": "yesterday"}, {"verdicts": []}, {"verdicts": [{"claim": "A1", "verdict": "great"}]},
        {"verdicts": [{"claim": "A1", "verdict": "replicated"}] * 2}, {"plan_sha256": "0"}, {"scale": None},
        {"code": {"sha256": "0" * 64}}, {"environment": None}, {"subject_name": "EMoE"}, {"subject_sha256": "x"},
    ],
)  # fmt: skip
def test_a_predicate_of_another_form_is_not_built(change: dict[str, Any]) -> None:
    with pytest.raises(MalformedError, match="expected"):
        build(**change)


def test_a_dirty_tree_cannot_be_hidden_by_leaving_it_out() -> None:
    files = build()
    resigned(files, KEY, lambda value: value["predicate"]["code"].pop("dirty"))
    assert failed(judged(files)) == {"schema"}


def test_the_paper_that_is_named_is_the_paper_that_is_bound() -> None:
    """The digest binds paper.json; what it and the predicate say has to be of the subject, too."""
    assert failed(judged(build(subject_name="arxiv:2604.19835"))) == {"aliases"}
    assert failed(judged(build(paper={"arxiv": "2604.19835"}))) == {"aliases"}
    for data in (b'{"arxiv":"2604.19835"}', b"{}", b"[]", b'{"arxiv":1}'):
        assert failed(judged(build(FILES | {"paper.json": data}))) == {"aliases"}
    assert failed(judged(build(FILES | {"paper.json": b"junk"}))) == {"strict_json"}
    assert judged(build(FILES | {"paper.json": b'{"arxiv":"2509.21892v2"}'})).state == "trusted"


def test_a_float_is_never_signed() -> None:
    with pytest.raises(MalformedError, match="decimal strings"):
        build(environment={"loss": 1.5})


def test_the_pith_record_is_the_subject() -> None:
    suffix = "X72AYRLPIFP2UVYVUQLNZSTJUW"
    record = (STORE / f"{suffix}.json").read_bytes()
    files = FILES | {"pith-record.json": record}
    subject = {"subject_name": f"pith:2025:{suffix}", "subject_sha256": json.loads(record)["canonical_sha256"]}
    found = judged(build(files, **subject))
    assert (found.state, found.pith_number) == ("trusted", f"pith:2025:{suffix}"), found.checks
    other = (STORE / "IV7VH3NCTL2M6JAD44FIMISHCY.json").read_bytes()
    assert failed(judged(build(files | {"pith-record.json": other}, **subject))) == {"pith_number", "canonical_hash"}
    assert failed(judged(build(FILES, **subject))) == {"pith_number"}
    assert failed(judged(build(files, subject_name="arxiv:2506.12119"))) == {"pith_number"}
    another = {"paper": {"pith_number": "pith:2026:IV7VH3NCTL2M6JAD44FIMISHCY"}}
    assert failed(judged(build(files, **subject, **another))) == {"pith_number"}
    state = {
        "state_type": "pith_open_graph_state",
        "canonical_sha256": subject["subject_sha256"],
        "current": json.loads(record),
    }
    found = judged(build(FILES | {"pith-record.json": json.dumps(state).encode()}, **subject))
    assert found.state in ("invalid", "malformed")
    unsigned = build(files, key=None, **subject)
    # The record's own receipt holds and its key is pinned; that gives the replication no trust.
    assert judged(unsigned).state == "valid"


@pytest.mark.parametrize("time", ["2026-01-01T00:00:00Z", "2027-01-01T00:00:00Z"])
def test_a_key_outside_its_time(time: str) -> None:
    limited = keys.PublicKey(
        key_id=KEY.key_id, raw=MINE.raw, source="file",
        valid_from="2026-06-01T00:00:00Z", valid_until="2026-12-01T00:00:00Z",
    )  # fmt: skip
    trusted = keys.KeySet(keys=(limited,))
    assert judged(build(), trusted).state == "trusted"
    assert failed(judged(build(finished_at=time), trusted)) == {"key_trust"}


@pytest.mark.parametrize(
    "secret",
    [
        b'{"schema":"repro.private-key/v1"}',
        b"-----BEGIN OPENSSH PRIVATE KEY-----",
        b"token=ghp_" + b"a" * 36,
        b'"path": "/home/somebody/runs"',
        b"/Users/somebody/x",
        b"C:\\Users\\somebody",
        b"/%b/runs" % b"root",
    ],
)
def test_secrets_and_home_paths_are_kept_out(secret: bytes) -> None:
    with pytest.raises(InvalidError, match="take it out"):
        build(FILES | {"log.txt": b"x " + secret})
    with pytest.raises(InvalidError):
        build(environment={"note": secret.decode()})


@pytest.mark.parametrize("form", [KEY.seed, KEY.seed.hex().encode(), base64.b64encode(KEY.seed)])
def test_the_signing_key_itself_is_kept_out_in_any_form(form: bytes) -> None:
    with pytest.raises(InvalidError, match="holds the signing key"):
        build(FILES | {"log.txt": b"x" + form + b"x"})


@pytest.mark.parametrize("name", ["manifest.json", "statement.dsse.json", "signing-key.json"])
def test_what_the_bundler_writes_is_not_taken_from_the_run(name: str) -> None:
    with pytest.raises(MalformedError, match="written by the bundler"):
        build(FILES | {name: b"{}"})


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e.update(payloadType="text/plain"),
        lambda e: e.update(extra=1),
        lambda e: e.update(payload=e["payload"] + "\n"),
        lambda e: e.pop("signatures"),
        lambda e: e["signatures"][0].update(sig="AAAA"),
        lambda e: e["signatures"].append(e["signatures"][0]),
        lambda e: e.update(payload=base64.b64encode(b"[]").decode()),
        lambda e: e.update(payload=base64.b64encode(b" " + base64.b64decode(e["payload"])).decode()),
    ],
)
def test_envelopes_of_another_form(change: Callable[[dict[str, Any]], None]) -> None:
    files = build()
    value = json.loads(files["statement.dsse.json"])
    files["statement.dsse.json"] = json.dumps(value).encode()  # the same, in another spelling
    assert judged(files).state == "malformed"
    change(value)
    files["statement.dsse.json"] = canonical.dumps(value)
    assert judged(files).state == "malformed"


def test_pae_is_that_of_the_dsse_specification() -> None:
    assert statement.pae(b"hello world", "http://example.com/HelloWorld") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )
