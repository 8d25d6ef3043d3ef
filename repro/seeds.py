"""Independent random streams from one seed, named, so that adding a draw somewhere changes no other draw."""

import hashlib


def derive(seed: int, *labels: object) -> int:
    """A 63-bit seed for the stream that `labels` name: the first 63 bits of SHA-256 over seed and labels."""
    text = "/".join(str(part) for part in ("repro.seed/v1", seed, *labels))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
