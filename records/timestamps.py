"""OpenTimestamps proofs beside a file: that its bytes existed at a time, verified offline as far as that goes.

A proof leads from a file's SHA-256 to attestations. A calendar's is a promise (`pending`): nothing is proven yet. A Bitcoin
attestation says which Merkle root the block of a height has; with that block's header, given by the user from a node of
their own, root and proof of work are checked here, and the header's time is when the bytes existed at the latest.

The format is read by the project's own library, the optional extra `timestamps`.
"""

import datetime
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from records.errors import InvalidError, MalformedError, UsageError
from records.report import Check

MAX_PROOF: Final = 64 * 1024
_HEADER_LINE: Final = re.compile(r"(\d{1,9})\s+([0-9a-f]{160})")


def _library() -> Any:
    try:
        from opentimestamps.core import notary, serialize, timestamp
    except ImportError as error:
        raise UsageError(
            f"reading timestamps needs the package {error.name!r}: pip install 'pith-repro[timestamps]'"
        ) from error
    return notary, serialize, timestamp


def proof_path(path: Path) -> Path:
    """Where the proof of the file at `path` lies, as the format's own tools have it."""
    return path.with_name(path.name + ".ots")


def parse_proof(proof: bytes) -> Any:
    """The detached timestamp in `proof`, of the library's type.

    Raises:
        MalformedError: no such proof.
        UsageError: the extra is missing.
    """
    _, serialize, timestamp = _library()
    if len(proof) > MAX_PROOF:
        raise MalformedError(f"timestamp: expected a proof of at most {MAX_PROOF} bytes")
    context = serialize.BytesDeserializationContext(proof)
    try:
        found = timestamp.DetachedTimestampFile.deserialize(context)
        context.assert_eof()
    except (serialize.DeserializationError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise MalformedError(f"timestamp: not a whole OpenTimestamps proof ({type(error).__name__})") from None
    if found.file_hash_op.TAG_NAME != "sha256":
        raise MalformedError(f"timestamp: expected a proof over SHA-256, found {found.file_hash_op.TAG_NAME}")
    return found


def check_proof(data: bytes, proof: bytes, *, headers: Mapping[int, bytes] | None = None) -> list[Check]:
    """The checks `timestamp` of a proof for the bytes `data`: one an attestation. Never raises for what the proof holds.

    `headers` are block headers of 80 bytes by height, which the user trusts.
    """
    try:
        found = parse_proof(proof)
    except UsageError as error:
        return [_check("skip", str(error))]
    except MalformedError as error:
        return [_check("fail", str(error))]
    if found.timestamp.msg != hashlib.sha256(data).digest():
        return [_check("fail", "the timestamp is of other bytes: its SHA-256 is not the file's")]
    checks = [
        _attested(message, attestation, headers or {}) for message, attestation in found.timestamp.all_attestations()
    ]
    return checks or [_check("skip", "the timestamp has no attestation: it proves nothing")]


def _attested(message: bytes, attestation: Any, headers: Mapping[int, bytes]) -> Check:
    notary, _, _ = _library()
    if isinstance(attestation, notary.PendingAttestation):
        uri = "".join(c if c.isprintable() else "?" for c in str(attestation.uri))[:100]
        return _check("skip", f"pending: the calendar {uri} promised it, which proves nothing yet; upgrade the proof")
    if not isinstance(attestation, notary.BitcoinBlockHeaderAttestation):
        return _check("skip", f"an attestation that is not checked here: {type(attestation).__name__}")
    root = message[::-1].hex()
    if attestation.height not in headers:
        detail = (
            f"Bitcoin block {attestation.height} has to have the Merkle root {root}: not checked without its header"
        )
        return _check("skip", f"{detail} (--block-headers)")
    header = headers[attestation.height]
    if header[36:68] != message:
        return _check(
            "fail", f"Bitcoin block {attestation.height} has not the Merkle root {root} that the proof leads to"
        )
    if not _works(header):
        return _check("fail", f"the header given for Bitcoin block {attestation.height} has no proof of work")
    time = datetime.datetime.fromtimestamp(int.from_bytes(header[68:72], "little"), datetime.UTC)
    return _check("pass", f"existed by {time:%Y-%m-%dT%H:%M:%SZ}, the time of Bitcoin block {attestation.height}")


def _works(header: bytes) -> bool:
    """Whether the header's hash is under the target that it states; which chain it is of is the giver's word."""
    bits = int.from_bytes(header[72:76], "little")
    size, mantissa = bits >> 24, bits & 0x7FFFFF
    target = mantissa << 8 * (size - 3) if size >= 3 else mantissa >> 8 * (3 - size)
    digest = hashlib.sha256(hashlib.sha256(header).digest()).digest()
    return size <= 32 and int.from_bytes(digest, "little") <= target


def _check(status: Any, detail: str) -> Check:
    return Check(code="timestamp", status=status, detail=detail)


def read_headers(path: Path | None) -> dict[int, bytes]:
    """Block headers by height from a text file: a line a block, its height and its 80 bytes in hexadecimal."""
    if path is None:
        return {}
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not ASCII text"
        raise UsageError(f"cannot read the block headers {path}: {reason}") from None
    matches = [_HEADER_LINE.fullmatch(line.strip().lower()) for line in lines if line.strip()]
    if not all(matches):
        raise UsageError(f"{path}: expected lines of a height and 160 hexadecimal digits")
    return {int(match[1]): bytes.fromhex(match[2]) for match in matches if match}


def attach(path: Path, proof: bytes) -> Path:
    """Puts a proof beside the file at `path`, joined with the one that lies there; returns where.

    Raises:
        MalformedError: no proof.
        InvalidError: it is of other bytes.
    """
    from records.package import write_atomically

    _, serialize, _ = _library()
    try:
        data = path.read_bytes()
        before = proof_path(path).read_bytes() if proof_path(path).exists() else None
    except OSError as error:
        raise UsageError(f"cannot read {error.filename}: {error.strerror}") from None
    found = parse_proof(proof)
    if found.timestamp.msg != hashlib.sha256(data).digest():
        raise InvalidError(f"the proof is not of {path}: expected one over {hashlib.sha256(data).hexdigest()}")
    if before is not None:
        old = parse_proof(before)
        if old.timestamp.msg == found.timestamp.msg:  # else it is of a file that lay here before, and is of no use
            found.timestamp.merge(old.timestamp)
    context = serialize.BytesSerializationContext()
    found.serialize(context)
    write_atomically(proof_path(path), context.getbytes())
    return proof_path(path)
