"""The statement and its envelope, read by other people's code: securesystemslib (DSSE) and in-toto-attestation (Statement v1)."""

import json

import pytest
from test_replication import KEY, build

from records import keys

dsse = pytest.importorskip(
    "securesystemslib.dsse", reason="securesystemslib is not installed: pip install 'pith-repro[dev]'"
)


def test_securesystemslib_verifies_our_envelope_and_refuses_a_changed_one() -> None:
    from securesystemslib.exceptions import VerificationError
    from securesystemslib.signer import SSlibKey

    def key_of(public: keys.PublicKey) -> SSlibKey:
        return SSlibKey(public.key_id, "ed25519", "ed25519", {"public": public.raw.hex()})

    value = json.loads(build()["statement.dsse.json"])
    envelope = dsse.Envelope.from_dict(value)
    assert set(envelope.verify([key_of(KEY.public)], 1)) == {KEY.key_id}
    with pytest.raises(VerificationError):
        envelope.verify([key_of(keys.private_key(bytes(32), key_id=KEY.key_id).public)], 1)
    envelope.payload = envelope.payload.replace(b"replicated", b"REPLICATED")
    with pytest.raises(VerificationError):
        envelope.verify([key_of(KEY.public)], 1)


def test_we_verify_an_envelope_of_securesystemslib() -> None:
    """The other direction: bytes signed over by their encoding verify under ours."""
    from records import statement
    from records.receipt import verify_digest

    payload = b'{"a":1}'
    theirs = dsse.Envelope(payload, statement.PAYLOAD_TYPE, {}).pae()
    assert theirs == statement.pae(payload)
    verify_digest(KEY.public.raw, theirs, KEY.sign(statement.pae(payload)))


def test_in_toto_attestation_reads_our_statement() -> None:
    module = pytest.importorskip("in_toto_attestation.v1.statement", reason="in-toto-attestation is not installed")
    from google.protobuf import json_format
    from in_toto_attestation.v1 import statement_pb2

    envelope = dsse.Envelope.from_dict(json.loads(build()["statement.dsse.json"]))
    read = json_format.Parse(envelope.payload, statement_pb2.Statement())
    theirs = module.Statement.copy_from_pb(read)
    theirs.validate()
    assert theirs.pb.predicate_type == "urn:pith-repro:replication-record:v1"
    assert theirs.pb.subject[0].name == "arxiv:2509.21892"
