"""The hash-chained evidence of an execution: what a second execution must give again, and nothing else.

- one canonical JSON object a line, `{"chain": hex, "entry": {…}}`
- chain of line i = SHA-256(chain of line i−1 as 32 bytes ‖ canonical bytes of entry i); line 0 starts from a genesis
- the genesis of a segment is made of the plan's digest and the segment's; that of an arm's measures, of the last
  segment's chain: nothing can be taken from another plan, segment or arm
- measured times are not here, because they never come again: they lie in a file beside it
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from records import canonical
from records.errors import InvalidError, MalformedError, ReproError
from records.versions import check_version

TRACE_SCHEMA = "repro.trace/v1"
_DOMAIN = TRACE_SCHEMA.encode() + b"\0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One look at the live model: tokens that each expert got, by MoE layer, and the mechanism's own measures by name."""

    load: tuple[tuple[int, ...], ...]
    values: Mapping[str, tuple[float, ...]]


def genesis(plan_sha256: str, subject_sha256: str) -> str:
    """Hex digest from which a chain starts; both arguments are hex SHA-256 digests."""
    return hashlib.sha256(_DOMAIN + bytes.fromhex(plan_sha256) + bytes.fromhex(subject_sha256)).hexdigest()


def link(previous: str, entry: Mapping[str, Any]) -> str:
    """Chain value of `entry` after the chain value `previous` (hex)."""
    return hashlib.sha256(bytes.fromhex(previous) + canonical.dumps(dict(entry))).hexdigest()


class TraceWriter:
    """Appends entries to a trace file, which it closes at the end of a `with` block.

    `head` is the chain value of the last line, `count` the number of lines.
    """

    def __init__(self, path: Path, start: str, *, keep: int = 0) -> None:
        """Opens `path`, keeping its first `keep` lines (those before a checkpoint) and cutting off the rest.

        Raises:
            InvalidError: the lines to keep are not all there, or do not hold together.
        """
        kept = path.read_bytes().splitlines(keepends=True)[:keep] if keep else []
        if len(kept) < keep:
            raise InvalidError(f"{path}: expected the {keep} lines before the checkpoint, found {len(kept)}")
        self.head, self.count = start, keep
        if kept:
            self.head = check_chain(b"".join(kept), start, name=str(path))[1]
        self._file = path.open("r+b" if kept else "wb")
        self._file.truncate(sum(len(line) for line in kept))
        self._file.seek(0, os.SEEK_END)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Writes one line; `entry` holds no float (numbers are integers or decimal strings)."""
        self.head = link(self.head, entry)
        self.count += 1
        self._file.write(canonical.dumps({"chain": self.head, "entry": dict(entry)}) + b"\n")

    def sync(self) -> None:
        """Brings every line to the disk; a checkpoint that counts on them is written after this."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> "TraceWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def check_chain(data: bytes, start: str, *, name: str = "trace") -> tuple[list[dict[str, Any]], str]:
    """Entries of a trace and its last chain value, after recomputing every link from `start`.

    Raises:
        MalformedError: a line is not one of our canonical objects.
        UnsupportedError: a trace of another version.
        InvalidError: a link does not follow from the line before it.
    """
    entries: list[dict[str, Any]] = []
    head = start
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            item = canonical.loads(line)
        except ReproError as error:
            raise MalformedError(f"{name} line {number}: {error}") from error
        if number == 1 and isinstance(item, dict) and "schema" in item:
            # v1 has no such line; every later version begins with one, so that no reader takes it for a broken chain
            check_version(item["schema"], TRACE_SCHEMA, what=f"{name}: expected a trace of the form")
        if not (isinstance(item, dict) and set(item) == {"chain", "entry"} and isinstance(item["entry"], dict)):
            raise MalformedError(f"{name} line {number}: expected an object of chain and entry")
        head = link(head, item["entry"])
        if item["chain"] != head:
            raise InvalidError(
                f"{name} line {number}: the chain is broken, expected {head[:12]}…, found {item['chain']!s:.12}…"
            )
        entries.append(item["entry"])
    return entries, head
