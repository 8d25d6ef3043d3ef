"""in-toto Statement v1 in a DSSE v1 envelope, signed with Ed25519.

The signature covers the pre-authentication encoding `DSSEv1 SP len(type) SP type SP len(payload) SP payload`; the
payload is the canonical JSON of the statement, so that one statement has one envelope. docs/replication-record.md is
normative.
"""

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from records import canonical
from records.errors import InvalidError, MalformedError
from records.keys import KeySet, PrivateKey, PublicKey, b64_strict
from records.receipt import verify_digest
from records.report import Check, Trust

STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
MAX_SIGNATURES: Final = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Envelope:
    """An opened envelope: the statement, the exact bytes that were signed over, and `(key id, signature)` pairs."""

    statement: dict[str, Any]
    payload: bytes
    signatures: tuple[tuple[str, bytes], ...]


def make_statement(
    subject_name: str, subject_sha256: str, predicate_type: str, predicate: dict[str, Any]
) -> dict[str, Any]:
    """An in-toto Statement v1 about one subject; `subject_sha256` is 64 lower-case hex digits."""
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": subject_name, "digest": {"sha256": subject_sha256}}],
        "predicateType": predicate_type,
        "predicate": predicate,
    }


def pae(payload: bytes, payload_type: str = PAYLOAD_TYPE) -> bytes:
    """DSSE's pre-authentication encoding: what the signature is made over."""
    kind = payload_type.encode("utf-8")
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def sign_envelope(statement: dict[str, Any], key: PrivateKey | None) -> bytes:
    """The envelope of `statement` as canonical JSON; without a key, its list of signatures is empty."""
    payload = canonical.dumps(statement)
    signatures = [] if key is None else [{"keyid": key.key_id, "sig": _b64(key.sign(pae(payload)))}]
    return canonical.dumps({"payload": _b64(payload), "payloadType": PAYLOAD_TYPE, "signatures": signatures})


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def open_envelope(data: bytes) -> Envelope:
    """Parse an envelope without judging its signatures; MalformedError where it or its statement has another form."""
    value = canonical.loads(data)
    if not isinstance(value, dict) or set(value) != {"payload", "payloadType", "signatures"}:
        raise MalformedError("envelope: expected a DSSE object with payload, payloadType and signatures, and no more")
    if value["payloadType"] != PAYLOAD_TYPE:
        raise MalformedError(f"envelope: expected payloadType {PAYLOAD_TYPE}, found {str(value['payloadType'])[:60]!a}")
    if not isinstance(value["payload"], str) or not isinstance(value["signatures"], list):
        raise MalformedError("envelope: expected a text under payload and a list under signatures")
    if len(value["signatures"]) > MAX_SIGNATURES:
        raise MalformedError(f"envelope: expected at most {MAX_SIGNATURES} signatures")
    signatures: list[tuple[str, bytes]] = []
    for entry in value["signatures"]:
        if not isinstance(entry, dict) or set(entry) != {"keyid", "sig"}:
            raise MalformedError("envelope: expected each signature as an object with keyid and sig")
        if not isinstance(entry["keyid"], str) or not isinstance(entry["sig"], str):
            raise MalformedError("envelope: expected keyid and sig to be texts")
        signatures.append((entry["keyid"], b64_strict(entry["sig"], size=64, what="envelope: sig")))
    if len({key_id for key_id, _ in signatures}) != len(signatures):
        raise MalformedError("envelope: two signatures under one key id")
    payload = b64_strict(value["payload"], what="envelope: payload")
    return Envelope(statement=_statement(payload), payload=payload, signatures=tuple(signatures))


def _statement(payload: bytes) -> dict[str, Any]:
    value = canonical.loads(payload)
    if not isinstance(value, dict) or set(value) != {"_type", "subject", "predicateType", "predicate"}:
        raise MalformedError("statement: expected an object with _type, subject, predicateType and predicate")
    if value["_type"] != STATEMENT_TYPE:
        raise MalformedError(f"statement: expected _type {STATEMENT_TYPE}, found {str(value['_type'])[:60]!a}")
    subjects = value["subject"]
    if not isinstance(subjects, list) or len(subjects) != 1 or not isinstance(subjects[0], dict):
        raise MalformedError("statement: expected exactly one subject")
    digests = subjects[0].get("digest")
    if not isinstance(subjects[0].get("name"), str) or not isinstance(digests, dict) or set(digests) != {"sha256"}:
        raise MalformedError("statement: expected a subject with a name and a sha256 digest")
    if not isinstance(value["predicateType"], str) or not isinstance(value["predicate"], dict):
        raise MalformedError("statement: expected a text under predicateType and an object under predicate")
    if canonical.encode_parsed(value) != payload:
        raise MalformedError("statement: the payload is not canonical JSON")
    return value


def verify_envelope(
    envelope: Envelope, *, trusted: KeySet, document_keys: Iterable[PublicKey] = (), at: str | None = None
) -> tuple[list[Check], Trust]:
    """The checks `envelope_signature` and `key_trust`, and the key that they speak of.

    A key is looked up by its id among the trusted ones first; one that came with the document is used only where no
    trusted key has that id, and then gives no trust. `at` is when the signer says it signed. Every signature has to
    hold.
    """
    if not envelope.signatures:
        reason = "the envelope carries no signature: the content can be checked, its author cannot"
        return [_check("envelope_signature", "skip", reason), _check("key_trust", "skip", "nothing is signed")], Trust()
    own = {key.key_id: key for key in document_keys}
    # The key id is a hint that no signature covers: changed, it would turn a bad signature into one that cannot be
    # checked.
    checks = [
        _check("envelope_signature", "fail", f"the key {key_id} came along, and no signature is under its id")
        for key_id in own
        if all(key_id != signer for signer, _ in envelope.signatures)
    ]
    trust = Trust(key_id=envelope.signatures[0][0] if _printable(envelope.signatures[0][0]) else None)
    for key_id, signature in envelope.signatures:
        key = trusted.find(key_id) or own.get(key_id)
        if key is None:
            checks.append(_check("envelope_signature", "skip", f"the public key {key_id[:80]!a} is not at hand"))
            checks.append(_check("key_trust", "skip", "the key is neither pinned nor given with --trusted-keys"))
            continue
        try:
            verify_digest(key.raw, pae(envelope.payload), signature)
        except InvalidError:
            checks.append(_check("envelope_signature", "fail", f"it does not verify under the key {key.key_id}"))
            continue
        checks.append(_check("envelope_signature", "pass", f"Ed25519 over the DSSE encoding, key {key.key_id}"))
        fault = key.fault_at(at)
        if fault is not None:
            checks.append(_check("key_trust", "fail", fault))
        elif key.source in ("pinned", "file"):
            checks.append(_check("key_trust", "pass", f"key {key.key_id} is {_ORIGIN[key.source]}"))
            trust = Trust(key_id=key.key_id, source=key.source)
        else:
            checks.append(_check("key_trust", "skip", f"key {key.key_id} came with the document: anyone can make one"))
        if trust.source == "none":
            trust = Trust(key_id=key.key_id, source=key.source)
    return checks, trust


_ORIGIN: Final = {"pinned": "pinned in the package", "file": "one that you trust (--trusted-keys)"}


def _printable(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _check(code: str, status: Any, detail: str) -> Check:
    return Check(code=code, status=status, detail=detail)
