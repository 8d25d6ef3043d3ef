"""Ed25519 keys: made, stored, read and trusted.

- A public key is a JSON object in the form of the registry's signing-key.json, with optional `valid_from`,
  `valid_until` and `revoked_at` for rotation.
- A private key lies in a file of its own with mode 0600; it is never printed and `refuse_secrets` keeps it out of
  bundles.
- A `KeySet` holds the keys that the package pins or the user names. A key that came with a document is never in one.
"""

import base64
import binascii
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

from records import canonical
from records.errors import InvalidError, MalformedError, UsageError
from records.report import Source

PRIVATE_SCHEMA: Final = "repro.private-key/v1"
PINNED_FILE: Final = Path(__file__).parent / "data" / "keys.json"
KEY_FORM: Final = (
    '{"key_id","algorithm":"ed25519","format":"raw","public_key_b64","fingerprint_sha256_hex","rotates_at"}'
)

_KEY_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|\+00:00)")


def b64_strict(text: str, *, size: int | None = None, what: str = "base64") -> bytes:
    """The bytes of standard base64 in its one canonical spelling; MalformedError for the other 15, or a wrong size."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise MalformedError(f"{what}: expected standard base64") from None
    if base64.b64encode(data).decode("ascii") != text:
        raise MalformedError(f"{what}: a second spelling of the same base64; expected the canonical one")
    if size is not None and len(data) != size:
        raise MalformedError(f"{what}: expected {size} bytes, found {len(data)}")
    return data


def fingerprint(public_key: bytes) -> str:
    """The registry's `public_key_fingerprint`: hex of the first 16 bytes of SHA-256 of the raw key."""
    return canonical.sha256_hex(public_key)[:32]


def utc_key(time: str) -> str:
    """A text that sorts as the UTC time does (YYYY-MM-DDTHH:MM:SS[.ffffff]Z or +00:00); MalformedError otherwise."""
    if not _TIME.fullmatch(time):
        raise MalformedError(f"time: expected UTC like 2026-05-20T00:02:51Z, found {time[:40]!a}")
    head = time.removesuffix("Z").removesuffix("+00:00")
    whole, _, fraction = head.partition(".")
    return f"{whole}.{fraction:0<6}"


@dataclass(frozen=True, kw_only=True, slots=True)
class PublicKey:
    """A public key of 32 raw bytes, under its id, with the times between which signatures count."""

    key_id: str
    raw: bytes
    valid_from: str | None = None
    valid_until: str | None = None
    revoked_at: str | None = None
    source: Source = "none"

    def __post_init__(self) -> None:
        if not _KEY_ID.fullmatch(self.key_id):
            raise MalformedError(
                f"key: expected an id of letters, digits, '.', '_' and '-', found {self.key_id[:40]!a}"
            )
        if len(self.raw) != 32:
            raise MalformedError(f"key: expected a raw Ed25519 key of 32 bytes, found {len(self.raw)}")
        for time in (self.valid_from, self.valid_until, self.revoked_at):
            if time is not None:
                utc_key(time)

    def fault_at(self, time: str | None) -> str | None:
        """Why a signature said to be made at `time` does not count under this key, or None.

        The time is the signer's own word (no receipt covers it), so a revoked key counts for nothing at any time.
        """
        if self.revoked_at is not None:
            return f"key {self.key_id} was revoked at {self.revoked_at}"
        if self.valid_from is None and self.valid_until is None:
            return None
        if time is None:
            return f"key {self.key_id} is valid for a limited time, and the signature states none"
        moment = utc_key(time)
        if self.valid_from is not None and moment < utc_key(self.valid_from):
            return f"key {self.key_id} is valid from {self.valid_from}, the signature says {time}"
        if self.valid_until is not None and moment > utc_key(self.valid_until):
            return f"key {self.key_id} is valid until {self.valid_until}, the signature says {time}"
        return None

    def to_json(self) -> dict[str, Any]:
        """The key in the form of the registry's signing-key.json."""
        value: dict[str, Any] = {
            "key_id": self.key_id,
            "algorithm": "ed25519",
            "format": "raw",
            "public_key_b64": base64.b64encode(self.raw).decode("ascii"),
            "fingerprint_sha256_hex": fingerprint(self.raw),
            "rotates_at": None,
        }
        for name in ("valid_from", "valid_until", "revoked_at"):
            if getattr(self, name) is not None:
                value[name] = getattr(self, name)
        return value


def parse_public_key(value: Any, *, source: Source) -> PublicKey:
    """A public key from its JSON form; MalformedError says what differs from that form."""
    if not isinstance(value, dict):
        raise MalformedError(f"key: expected a JSON object {KEY_FORM}")
    for name in ("key_id", "algorithm", "public_key_b64"):
        if not isinstance(value.get(name), str):
            raise MalformedError(f"key: expected {KEY_FORM}, found no text under {name!r}")
    for name in ("valid_from", "valid_until", "revoked_at", "fingerprint_sha256_hex"):
        if value.get(name) is not None and not isinstance(value[name], str):
            raise MalformedError(f"key: expected text or null under {name!r}")
    if value["algorithm"] != "ed25519" or value.get("format", "raw") != "raw":
        raise MalformedError('key: expected "algorithm":"ed25519" and "format":"raw"; no other kind is supported')
    raw = b64_strict(value["public_key_b64"], size=32, what="key: public_key_b64")
    stated = value.get("fingerprint_sha256_hex")
    if stated is not None and stated != fingerprint(raw):
        raise MalformedError(f"key: fingerprint_sha256_hex says {stated[:40]!a}, the key's is {fingerprint(raw)}")
    return PublicKey(
        key_id=value["key_id"],
        raw=raw,
        valid_from=value.get("valid_from"),
        valid_until=value.get("valid_until"),
        revoked_at=value.get("revoked_at"),
        source=source,
    )


def parse_public_keys(data: bytes, *, source: Source) -> list[PublicKey]:
    """The keys of a JSON text that is one key or a list of them."""
    value = canonical.loads(data)
    return [parse_public_key(item, source=source) for item in (value if isinstance(value, list) else [value])]


@dataclass(frozen=True, kw_only=True, slots=True)
class KeySet:
    """The keys that give trust, in order: those that the user named come before those that the package pins."""

    keys: tuple[PublicKey, ...] = ()

    def find(self, key_id: str | None) -> PublicKey | None:
        """The first key with this id. Ids that two keys share resolve to the user's own, never to a document's."""
        return next((key for key in self.keys if key.key_id == key_id), None)

    def with_keys(self, keys: Iterable[PublicKey]) -> "KeySet":
        """A set in which `keys` come first."""
        return KeySet(keys=(*keys, *self.keys))


@cache
def pinned() -> KeySet:
    """The keys that come with the package; data/keys.json says since when and from where."""
    value = canonical.loads(PINNED_FILE.read_bytes())
    return KeySet(keys=tuple(parse_public_key(item, source="pinned") for item in value["keys"]))


def pinned_at() -> str:
    """The date (YYYY-MM-DD) on which the package's keys were pinned."""
    return str(canonical.loads(PINNED_FILE.read_bytes())["pinned_at"])


def trusted_keys(path: Path | None = None) -> KeySet:
    """The pinned keys, and before them those of the JSON file at `path` (`--trusted-keys`)."""
    if path is None:
        return pinned()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the trusted keys {path}: {error.strerror}") from None
    try:
        return pinned().with_keys(parse_public_keys(data, source="file"))
    except MalformedError as error:
        raise MalformedError(f"{path}: {error}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivateKey:
    """A signing key; its seed appears neither in `repr` nor in any message."""

    public: PublicKey
    seed: bytes = field(repr=False)

    def sign(self, message: bytes) -> bytes:
        """The 64-byte Ed25519 signature of `message`."""
        from nacl.signing import SigningKey

        return SigningKey(self.seed).sign(message).signature

    @property
    def key_id(self) -> str:
        """The id that goes with the signature."""
        return self.public.key_id


def private_key(seed: bytes, *, key_id: str | None = None) -> PrivateKey:
    """The key of a 32-byte seed; its id, unless given, is `repro-` and the start of its fingerprint."""
    from nacl.signing import SigningKey

    if len(seed) != 32:
        raise MalformedError(f"private key: expected a seed of 32 bytes, found {len(seed)}")
    raw = bytes(SigningKey(seed).verify_key)
    return PrivateKey(public=PublicKey(key_id=key_id or f"repro-{fingerprint(raw)[:16]}", raw=raw), seed=seed)


def generate(*, key_id: str | None = None) -> PrivateKey:
    """A new key from the operating system's random numbers."""
    return private_key(os.urandom(32), key_id=key_id)


def public_path(path: Path) -> Path:
    """Where the public half of the private key at `path` lies."""
    return path.with_name(path.name + ".pub.json")


def save(key: PrivateKey, path: Path) -> None:
    """Write the private key to `path` (0600) and its public half to `path`.pub.json; never over a file that exists."""
    from records.package import write_atomically

    for target in (path, public_path(path)):
        if target.exists() or target.is_symlink():
            raise UsageError(f"{target} exists; choose another name, a key is never overwritten")
    secret = {
        "schema": PRIVATE_SCHEMA,
        "key_id": key.key_id,
        "algorithm": "ed25519",
        "seed_b64": base64.b64encode(key.seed).decode("ascii"),
    }
    write_atomically(path, canonical.dumps(secret) + b"\n", mode=0o600)
    write_atomically(public_path(path), canonical.dumps(key.public.to_json()) + b"\n")


def load(path: Path) -> PrivateKey:
    """Read a private key; UsageError where it is unreadable or open to others, MalformedError where it is none."""
    try:
        data = path.read_bytes()
        mode = path.stat().st_mode
    except OSError as error:
        raise UsageError(f"cannot read the key {path}: {error.strerror}") from None
    try:
        value = canonical.loads(data)
    except MalformedError:
        value = None
    if not isinstance(value, dict) or value.get("schema") != PRIVATE_SCHEMA:
        what = "a public key" if isinstance(value, dict) and "public_key_b64" in value else "another file"
        raise MalformedError(f"{path}: expected a private key written by `repro keys new`, found {what}")
    if os.name == "posix" and stat.S_IMODE(mode) & 0o077:
        raise UsageError(f"{path} can be read by others (mode {stat.S_IMODE(mode):o}); run: chmod 600 {path}")
    if not isinstance(value.get("key_id"), str) or not isinstance(value.get("seed_b64"), str):
        raise MalformedError(f"{path}: expected the texts key_id and seed_b64")
    return private_key(b64_strict(value["seed_b64"], size=32, what="private key"), key_id=value["key_id"])


# What must never leave this machine inside a bundle. The tokens are the public prefixes of well-known services.
_SECRETS: Final = re.compile(
    rb"repro\.private-key/|-----BEGIN [A-Z ]*PRIVATE KEY-----|\bhf_[A-Za-z0-9]{30}|\bgh[pousr]_[A-Za-z0-9]{30}"
    rb"|\bAKIA[A-Z0-9]{16}\b|\bsk-[A-Za-z0-9_-]{40}"
)
_HOMES: Final = re.compile(rb"(?:/home/|/Users/|[A-Za-z]:\\+Users\\+)[A-Za-z0-9._-]+|/root(?=/)")


def refuse_secrets(files: Mapping[str, bytes]) -> None:
    """Raise InvalidError where a file to be published holds a private key, an access token or a home folder's path."""
    home = str(Path.home()).encode()
    for name, data in sorted(files.items()):
        if _SECRETS.search(data):
            raise InvalidError(f"{name} holds a private key or an access token; take it out before publishing")
        match = _HOMES.search(data)
        found = match[0] if match else home if len(home) > 5 and home in data else None
        if found is not None:
            raise InvalidError(f"{name} holds the home path {found[:60].decode('utf-8', 'replace')!a}; take it out")
