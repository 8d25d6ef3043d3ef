"""OpenTimestamps proofs, made with the format's own library."""

import io

from opentimestamps.core.op import OpAppend, OpSHA256
from opentimestamps.core.serialize import BytesSerializationContext
from opentimestamps.core.timestamp import DetachedTimestampFile, Timestamp

DATA = b"a signed plan"


def proof(*attestations, data: bytes = DATA, op=None) -> bytes:
    """A proof with a step of two operations before its attestations."""
    op = OpSHA256() if op is None else op  # the library's operations are tuples: an empty one is false
    stamp = Timestamp(op.hash_fd(io.BytesIO(data)))
    last = stamp.ops.add(OpAppend(b"nonce")).ops.add(OpSHA256())
    for attestation in attestations:
        last.attestations.add(attestation)
    context = BytesSerializationContext()
    DetachedTimestampFile(op, stamp).serialize(context)
    return context.getbytes()
