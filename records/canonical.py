"""Strict JSON in, canonical JSON out: every hash and signature of the project goes through these few functions.

- `loads` takes what the rules in docs/pith-protocol.md allow and nothing else: UTF-8 without a byte order mark, no
  duplicate keys, no floats, no -0, no surrogates, integers within 2**53 - 1, at most 64 levels deep.
- `dumps` writes the registry's canonical form, `json.dumps(sort_keys=True, separators=(",", ":"),
  ensure_ascii=False)` in UTF-8. It is not RFC 8785: keys sort by code point, and numbers are integers only.
- `digest` is the SHA-256 of that form.

Time and memory are linear in the input, and the answers are the same on Python 3.11 to 3.13: nesting is measured before
the interpreter's own recursive parser sees the text.
"""

import json
import re
from collections.abc import Iterator
from hashlib import sha256
from typing import Any, Final, NoReturn

from records.errors import MalformedError

MAX_BYTES: Final = 16 * 1024 * 1024
MAX_DEPTH: Final = 64
MAX_INT: Final = 2**53 - 1

# A whole string (or the rest of the text, where its end is missing), so that brackets inside strings count for nothing.
# Possessive quantifiers keep it linear: an unterminated string of escaped quotes would otherwise be scanned once a
# quote.
_STRING_OR_BRACKET: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[][{}]', re.DOTALL)
_STEP: Final = {b"[": 1, b"{": 1, b"]": -1, b"}": -1}


def _refuse_number(text: str) -> NoReturn:
    raise MalformedError(
        f"strict JSON: floats are not allowed, found {text[:32]!r}; write the number as a decimal string"
    )


def _integer(text: str) -> int:
    # The length first: int() of a long text takes quadratic time, or raises ValueError past 4300 digits.
    if len(text) <= 17 and text != "-0":
        value = int(text)
        if -MAX_INT <= value <= MAX_INT:
            return value
    raise MalformedError(f"strict JSON: expected an integer within +-(2**53 - 1) and no -0, found {text[:32]!r}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise MalformedError(f"strict JSON: the key {key[:64]!a} occurs twice in one object")
            seen.add(key)
    return value


_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_object, parse_float=_refuse_number, parse_constant=_refuse_number, parse_int=_integer
)
_ENCODER: Final = json.JSONEncoder(
    ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False, check_circular=False
)


def _too_deep() -> MalformedError:
    return MalformedError(f"strict JSON: nested deeper than {MAX_DEPTH} levels")


def _check_depth(data: bytes) -> None:
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(data):
        depth += _STEP.get(match[0][:1], 0)
        if depth > MAX_DEPTH:
            raise _too_deep()


def _place(text: str, position: int) -> str:
    """Line and column, from 1. Python 3.13 points at a trailing comma, 3.12 at the bracket behind it: here, at the comma."""
    before = text[:position].rstrip(" \t\n\r")
    if before.endswith(",") and text[position : position + 1] in ("]", "}"):
        position = len(before) - 1
    return f"line {text.count(chr(10), 0, position) + 1} column {position - text.rfind(chr(10), 0, position)}"


def loads(data: bytes, *, max_bytes: int = MAX_BYTES) -> Any:
    """Parse one strict JSON text of at most `max_bytes` bytes.

    Raises MalformedError, and nothing else, for every text that the rules of this module refuse.
    """
    if len(data) > max_bytes:
        raise MalformedError(f"strict JSON: expected at most {max_bytes} bytes, found {len(data)}; raise --max-bytes")
    if data.startswith(b"\xef\xbb\xbf"):
        raise MalformedError("strict JSON: starts with a byte order mark; save the file as UTF-8 without one")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedError(f"strict JSON: not UTF-8 at byte {error.start}") from None
    _check_depth(data)
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise MalformedError(f"strict JSON: not JSON at {_place(text, error.pos)}") from None
    if b"\\u" in data:
        # Only an escape can smuggle a surrogate in, and only an encoder finds it wherever it stands.
        encode_parsed(value)
    return value


def encode_parsed(value: Any) -> bytes:
    """Canonical bytes of a value that came from `loads`, whose rules it therefore keeps: `dumps` without the walk."""
    try:
        return _ENCODER.encode(value).encode("utf-8")
    except UnicodeEncodeError:
        raise MalformedError("strict JSON: a string holds half a surrogate pair, which no UTF-8 text can") from None


def dumps(value: Any) -> bytes:
    """Canonical bytes of `value`: dicts with str keys, lists or tuples, str, int, bool and None.

    Raises MalformedError for anything that `loads` would refuse to read back: floats, other types, keys that are not
    strings, surrogates, integers beyond 2**53 - 1, more than 64 levels.
    """
    # Depth first with one iterator a level, so that a cycle ends at the depth limit and never in a RecursionError.
    levels: list[Iterator[Any]] = [iter((value,))]
    while levels:
        for item in levels[-1]:
            if item is None or isinstance(item, str):
                continue
            if isinstance(item, int):
                if not -MAX_INT <= item <= MAX_INT:
                    raise MalformedError("canonical JSON: expected an integer within +-(2**53 - 1); write a string")
                continue
            if isinstance(item, dict):
                for key in item:
                    if not isinstance(key, str):
                        raise MalformedError(f"canonical JSON: expected str keys, found {type(key).__name__}")
                children: Iterator[Any] = iter(item.values())
            elif isinstance(item, list | tuple):
                children = iter(item)
            else:
                raise MalformedError(
                    f"canonical JSON: expected dict, list, str, int, bool or None, found {type(item).__name__}"
                    + ("; write numbers as decimal strings" if isinstance(item, float) else "")
                )
            if len(levels) > MAX_DEPTH:
                raise _too_deep()
            levels.append(children)
            break
        else:
            levels.pop()
    return encode_parsed(value)


def sha256_hex(data: bytes) -> str:
    """Lower-case hex SHA-256 of `data`."""
    return sha256(data).hexdigest()


def digest(value: Any) -> str:
    """Lower-case hex SHA-256 of the canonical bytes of `value`; raises what `dumps` raises."""
    return sha256_hex(dumps(value))
