"""Ed25519 signatures: the one primitive, and the registry's receipts.

A receipt signs the 32 raw bytes of a record's canonical hash and nothing else: its own time, builder, key id, the
aliases and the year in the number are the registry's word, not covered by the signature.
"""

from collections.abc import Callable
from functools import cache

from records.errors import InvalidError


@cache
def _sodium() -> tuple[Callable[[bytes, bytes], bytes], tuple[type[Exception], ...]]:
    """libsodium's verification and what it raises; loaded when the first signature is looked at."""
    from nacl.bindings import crypto_sign_open
    from nacl.exceptions import CryptoError

    return crypto_sign_open, (CryptoError, ValueError)


def verify_digest(public_key: bytes, digest: bytes, signature: bytes) -> None:
    """Raise InvalidError unless `signature` (64 bytes) is the Ed25519 one of `digest` by `public_key` (32 raw bytes).

    `digest` is the message as it stands, hashed no further here: a receipt's is 32 bytes, an envelope's any length.
    libsodium refuses small-order keys and R, S >= L and encodings that are not canonical. Another library would not
    do in its place: some accept signatures under all 14 weak keys.
    """
    verify, refusals = _sodium()
    # PyNaCl raises ValueError for some wrong lengths, and reads a longer signature as one with its message attached.
    if len(public_key) != 32:
        raise InvalidError(f"signature: expected a public key of 32 bytes, found {len(public_key)}")
    if len(signature) != 64:
        raise InvalidError(f"signature: expected 64 bytes, found {len(signature)}")
    try:
        verify(signature + digest, public_key)
    except refusals:
        raise InvalidError("signature: it does not verify under this key") from None
