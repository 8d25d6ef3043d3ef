"""Reading fields of foreign JSON, where any of them may be missing or of another type."""

import re
from typing import Any, Final

_SHA256: Final = re.compile(r"[0-9a-f]{64}")


def get(value: Any, *path: str) -> Any:
    """The value under `path` of nested objects, or None where one is missing or is not an object."""
    for name in path:
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value


def text(value: Any, *path: str) -> str | None:
    """The text under `path`, or None."""
    found = get(value, *path)
    return found if isinstance(found, str) else None


def shown(value: Any) -> str:
    """A value from a document as it may stand in a message: short, and without control characters."""
    return ascii(value)[:80] if isinstance(value, str | int | None) else f"a {type(value).__name__}"


def is_sha256(value: Any) -> bool:
    """Whether a value is a SHA-256 as all formats write it: 64 lower-case hex digits."""
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None
