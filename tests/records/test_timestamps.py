"""OpenTimestamps proofs, made with the format's own library and checked offline as far as that goes."""

import hashlib
import sys

import pytest

from records.errors import InvalidError, MalformedError, UsageError
from records.timestamps import attach, check_proof, proof_path, read_headers

pytest.importorskip("opentimestamps")
from opentimestamps.core.notary import BitcoinBlockHeaderAttestation, PendingAttestation, UnknownAttestation
from opentimestamps.core.op import OpKECCAK256, OpSHA1
from timestamp_proofs import DATA, proof


def root(data: bytes = DATA) -> bytes:
    return hashlib.sha256(hashlib.sha256(data).digest() + b"nonce").digest()


def header(merkle: bytes, *, bits: int = 0x207FFFFF, worked: bool = True) -> bytes:
    """A block header with the least work there is: about two hashes."""
    for nonce in range(1000):
        found = b"\1\0\0\0" + bytes(32) + merkle + (1_700_000_000).to_bytes(4, "little") + bits.to_bytes(4, "little")
        found += nonce.to_bytes(4, "little")
        digest = hashlib.sha256(hashlib.sha256(found).digest()).digest()
        if (int.from_bytes(digest, "little") <= 0x7FFFFF << 8 * (0x20 - 3)) is worked:
            return found
    raise AssertionError


def statuses(data: bytes, made: bytes, **more) -> list[tuple[str, str]]:
    return [(check.status, check.detail) for check in check_proof(data, made, **more)]


def test_a_promise_is_pending_and_proves_nothing():
    ((status, detail),) = statuses(DATA, proof(PendingAttestation("https://calendar.example")))
    assert status == "skip"
    assert detail.startswith("pending: the calendar https://calendar.example")


def test_a_block_proves_a_time_once_its_header_is_there():
    made = proof(BitcoinBlockHeaderAttestation(800_000))
    ((status, detail),) = statuses(DATA, made)
    assert (status, root()[::-1].hex() in detail, "not checked" in detail) == ("skip", True, True)
    good = header(root())
    assert statuses(DATA, made, headers={800_000: good}) == [
        ("pass", "existed by 2023-11-14T22:13:20Z, the time of Bitcoin block 800000")
    ]
    assert statuses(DATA, made, headers={800_001: good})[0][0] == "skip"
    assert "has not the Merkle root" in statuses(DATA, made, headers={800_000: header(bytes(32))})[0][1]
    for bad in (header(root(), worked=False), header(root(), bits=0x1B0404CB), header(root(), bits=0xFF7FFFFF)):
        assert statuses(DATA, made, headers={800_000: bad})[0] == (
            "fail",
            "the header given for Bitcoin block 800000 has no proof of work",
        )


def test_the_genesis_block_of_bitcoin_has_the_work_that_it_states():
    """A header of the real chain, from its source code: its time and work as everybody knows them."""
    from records.timestamps import _works

    genesis = bytes.fromhex(
        "0100000000000000000000000000000000000000000000000000000000000000000000003ba3edfd7a7b12b27ac72c3e67768f61"
        "7fc81bc3888a51323a9fb8aa4b1e5e4a29ab5f49ffff001d1dac2b7c"
    )
    assert hashlib.sha256(hashlib.sha256(genesis).digest()).digest()[::-1].hex().startswith("000000000019d668")
    assert _works(genesis)
    assert not _works(genesis[:-1] + b"\0")


def test_each_attestation_is_said():
    kinds = (
        PendingAttestation("https://a.example"),
        BitcoinBlockHeaderAttestation(5),
        UnknownAttestation(b"12345678", b""),
    )
    found = statuses(DATA, proof(*kinds))
    assert [status for status, _ in found] == ["skip"] * 3
    assert any("not checked here" in detail for _, detail in found)


@pytest.mark.parametrize(
    "made",
    [
        b"",
        b"junk",
        proof(PendingAttestation("https://a.example"))[:-3],
        proof(PendingAttestation("https://a.example")) + b"x",
    ],
)
def test_junk_is_no_proof(made):
    ((status, detail),) = statuses(DATA, made)
    assert (status, "not a whole OpenTimestamps proof" in detail) == ("fail", True)


def test_what_else_is_no_proof_of_a_file():
    assert statuses(b"other bytes", proof(PendingAttestation("https://a.example")))[0][0] == "fail"
    assert "SHA-256, found sha1" in statuses(DATA, proof(PendingAttestation("https://a.example"), op=OpSHA1()))[0][1]
    made = proof(PendingAttestation("https://a.example"))
    keccak = made[:32] + OpKECCAK256.TAG + made[33:]  # the library has no hashlib name for it
    assert "SHA-256, found keccak256" in statuses(DATA, keccak)[0][1]
    assert statuses(DATA, bytes(65 * 1024)) == [("fail", "timestamp: expected a proof of at most 65536 bytes")]


def test_proofs_are_put_beside_the_file_and_joined(tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(DATA)
    assert attach(path, proof(PendingAttestation("https://a.example"))) == proof_path(path)
    attach(path, proof(BitcoinBlockHeaderAttestation(7)))
    assert len(statuses(DATA, proof_path(path).read_bytes())) == 2
    path.write_bytes(b"changed")
    with pytest.raises(InvalidError, match="the proof is not of"):
        attach(path, proof(BitcoinBlockHeaderAttestation(7)))
    attach(path, proof(BitcoinBlockHeaderAttestation(8), data=b"changed"))
    assert len(statuses(b"changed", proof_path(path).read_bytes())) == 1
    with pytest.raises(MalformedError):
        attach(path, b"junk")
    with pytest.raises(UsageError, match="cannot read"):
        attach(tmp_path / "none", b"")


def test_headers_from_a_file(tmp_path):
    path = tmp_path / "headers"
    path.write_text(f"7 {header(root()).hex()}\n\n8  {header(bytes(32)).hex().upper()}\n")
    assert read_headers(path) == {7: header(root()), 8: header(bytes(32))}
    assert read_headers(None) == {}
    path.write_text("7 00")
    with pytest.raises(UsageError, match="expected lines of a height"):
        read_headers(path)
    with pytest.raises(UsageError, match="cannot read the block headers"):
        read_headers(tmp_path / "none")


def test_without_the_extra_nothing_is_said_against_the_file(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentimestamps", None)
    for name in [name for name in sys.modules if name.startswith("opentimestamps.")]:
        monkeypatch.setitem(sys.modules, name, None)
    ((status, detail),) = statuses(DATA, b"anything")
    assert (status, "pip install 'pith-repro[timestamps]'" in detail) == ("skip", True)
