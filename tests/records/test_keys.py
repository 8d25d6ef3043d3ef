"""Keys: made, stored, trusted; the one Ed25519 primitive."""

import json
import os
import stat
from pathlib import Path

import pytest

from records import keys
from records.errors import InvalidError, MalformedError, UsageError
from records.receipt import verify_digest

#: The eight points of small order, in the encodings that some libraries take as keys.
SMALL_ORDER = [
    "0100000000000000000000000000000000000000000000000000000000000000",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "0000000000000000000000000000000000000000000000000000000000000080",
    "0000000000000000000000000000000000000000000000000000000000000000",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
]


def test_pinned() -> None:
    (key,) = keys.pinned().keys
    assert (key.key_id, keys.fingerprint(key.raw)) == ("pith-v1-2026-05", "8d4b5ee74e4693bcd1df2446408b0d54")
    assert json.loads(keys.PINNED_FILE.read_text())["pinned_at"] >= "2026-11-21"


def test_save_and_load(tmp_path: Path) -> None:
    key = keys.generate()
    path = tmp_path / "my.key"
    keys.save(key, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    loaded = keys.load(path)
    assert loaded == key
    public = keys.parse_public_keys((tmp_path / "my.key.pub.json").read_bytes(), source="file")[0]
    assert public.raw == key.public.raw and public.source == "file"
    verify_digest(public.raw, b"m", loaded.sign(b"m"))
    assert key.seed.hex() not in repr(key) and repr(key.seed) not in repr(key)
    with pytest.raises(UsageError, match="never overwritten"):
        keys.save(key, path)
    path.chmod(0o644)
    with pytest.raises(UsageError, match="chmod 600"):
        keys.load(path)


def test_a_private_key_is_never_readable_by_others_not_even_while_written(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        keys.save(keys.generate(), tmp_path / "k")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o600


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"schema":"repro.private-key/v1"}', b"\xff"])
def test_what_is_no_private_key(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "k"
    path.write_bytes(data)
    path.chmod(0o600)
    with pytest.raises(MalformedError):
        keys.load(path)


def test_trusted_keys_come_before_pinned_ones(tmp_path: Path) -> None:
    mine = keys.generate()
    file = tmp_path / "trusted.json"
    file.write_text(json.dumps([mine.public.to_json(), keys.generate().public.to_json()]))
    trusted = keys.trusted_keys(file)
    assert trusted.find(mine.key_id) is not None and trusted.find("pith-v1-2026-05") is not None
    assert trusted.find(mine.key_id).source == "file"  # type: ignore[union-attr]
    assert len(trusted.keys) == 3
    with pytest.raises(UsageError, match="cannot read"):
        keys.trusted_keys(tmp_path / "none")
    file.write_text("{}")
    with pytest.raises(MalformedError, match="key_id"):
        keys.trusted_keys(file)


@pytest.mark.parametrize(
    "change",
    [
        {"algorithm": "rsa"}, {"format": "pem"}, {"public_key_b64": "AAAA"}, {"public_key_b64": "!"}, {"key_id": "a b"},
        {"key_id": "\x1b[31m"}, {"key_id": 1}, {"fingerprint_sha256_hex": "0" * 32}, {"valid_from": "soon"},
        {"valid_until": 1}, {"key_id": "../../x"},
    ],
)  # fmt: skip
def test_what_is_no_public_key(change: dict[str, object]) -> None:
    value = keys.generate().public.to_json() | change
    with pytest.raises(MalformedError) as caught:
        keys.parse_public_key(value, source="file")
    assert str(caught.value).isprintable()


def test_signature_primitive() -> None:
    key = keys.generate()
    signature = key.sign(b"digest")
    assert verify_digest(key.public.raw, b"digest", signature) is None
    order = 2**252 + 27742317777372353535851937790883648493
    malleable = signature[:32] + (int.from_bytes(signature[32:], "little") + order).to_bytes(32, "little")
    for public, message, wrong in (
        (key.public.raw, b"other", signature),
        (key.public.raw, b"digest", malleable),
        (key.public.raw, b"digest", signature[:63]),
        (key.public.raw, b"digest", signature + b"x"),
        (key.public.raw, b"digest", b""),
        (key.public.raw[:31], b"digest", signature),
        (b"", b"digest", signature),
    ):
        with pytest.raises(InvalidError, match="signature"):
            verify_digest(public, message, wrong)


def test_no_byte_moves_between_signature_and_message() -> None:
    """libsodium's interface takes both in one piece, so that a signature of another length would shift where one ends."""
    key = keys.generate()
    longer = key.sign(b"extra digest") + b"extra "
    with pytest.raises(InvalidError, match="64 bytes, found 70"):
        verify_digest(key.public.raw, b"digest", longer)
    signature = key.sign(b"igest")
    with pytest.raises(InvalidError, match="64 bytes, found 63"):
        verify_digest(key.public.raw, signature[63:] + b"igest", signature[:63])
    with pytest.raises(InvalidError, match="32 bytes, found 33"):
        verify_digest(key.public.raw + b"x", b"igest", signature)


@pytest.mark.parametrize("point", SMALL_ORDER)
def test_small_order_keys_are_refused(point: str) -> None:
    """Under a key of small order, R = key and S = 0 verify for every message in libraries that do not refuse it."""
    raw = bytes.fromhex(point)
    for first in (raw, bytes.fromhex(SMALL_ORDER[0])):
        with pytest.raises(InvalidError):
            verify_digest(raw, bytes(32), first + bytes(32))


def test_base64_has_one_spelling() -> None:
    assert keys.b64_strict("AAA=") == b"\0\0"
    for text in ("AAB=", "AAA", "AA A=", "AAA=\n", "AA-_", "é"):
        with pytest.raises(MalformedError):
            keys.b64_strict(text)
    with pytest.raises(MalformedError, match="expected 3 bytes, found 2"):
        keys.b64_strict("AAA=", size=3)
