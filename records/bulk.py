"""Verification of JSON Lines in bulk: a document a line, constant memory, all cores, results in input order.

- `LineVerifier` gives the same JSON objects as `repro verify --json` does for single documents. Most lines of a large file
  look alike: a minimal record in canonical form, which one regular expression recognises whole (`_FAST`). Such a line
  whose every check passes is answered from a template that the general code filled once; every other line takes the
  general code.
- `verify_stream` cuts a stream into chunks of whole lines and hands them to worker processes, a bounded number at a
  time.
"""

import json
import os
import re
import stat
import sys
import threading
from binascii import a2b_base64, unhexlify
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import chain, islice
from multiprocessing import get_context
from typing import BinaryIO, Final

from records import canonical
from records.document import compiled_schema, verify_value
from records.errors import InvalidError, MalformedError
from records.keys import KeySet, fingerprint
from records.receipt import verify_digest
from records.report import EXIT_CODES, Check, State, Verification

CHUNK_BYTES: Final = 512 * 1024
#: Room for the output of one chunk in the memory that forked workers share; only what is written is really taken.
SLOT_BYTES: Final = 64 * 1024 * 1024

_S: Final = (
    r"[ !#-\[\]-~]*+"  # printable ASCII without quotes and backslashes: it needs no unescaping, and is its own escape
)
_TIME: Final = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,6})?(?:Z|\+00:00)"


def _fast_pattern() -> re.Pattern[bytes]:
    """A record document in canonical form, with a number and perhaps a receipt, and what has to be looked at in groups.

    It is narrower than the schema in every place; whatever it does not match is for the general code to judge.
    """
    sha = "[0-9a-f]{64}"
    record = (
        rf'\{{"metadata":\{{"abstract_canon_sha256":"{sha}","cross_cats_sorted":\[(?:"{_S}"(?:,(?=")|(?=\])))*+\],'
        rf'"license":"{_S}","primary_cat":"[!#-\[\]-~]{_S}","submitted_at":"(?P<year>\d{{4}})-\d\d-\d\dT\d\d:\d\d:\d\dZ",'
        rf'"title_canon_sha256":"{sha}"\}},"schema_version":"1\.0",'
        r'"source":\{"id":"\d{4}\.\d{4,5}","kind":"arxiv","version":[1-9]\d{0,9}\}\}'
    )
    receipt = (
        rf'"algorithm":"ed25519","builder_version":"{_S}","canonical_sha256":"(?P=sha)",'
        rf'"first_computed_at":"{_TIME}","key_id":"(?P<key>{_S})","kind":"pith_receipt","last_reissued_at":"{_TIME}",'
        rf'"public_key_fingerprint":"(?P<print>[0-9a-f]{{32}})","receipt_version":"{_S}",'
        rf'"signature_b64":"(?P<signature>[A-Za-z0-9+/]{{85}}[AQgw]==)","signature_status":"{_S}",'
        rf'"signed_at":"{_TIME}","signed_message":"canonical_sha256_bytes"'
    )
    document = (
        rf'\{{"canonical_record":(?P<record>{record}),"canonical_sha256":"(?P<sha>{sha})",'
        rf'"pith_number":"pith:(?P=year):(?P<suffix>[A-Z2-7]{{26}})"(?:,"receipt":\{{{receipt}\}})?\}}\s*+'
    )
    return re.compile(document.encode("ascii"), re.ASCII)


_FAST: Final = _fast_pattern()
_FAST_KEYS: Final = frozenset({"canonical_record", "canonical_sha256", "pith_number", "receipt"})
_BASE32: Final = bytes.maketrans(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", b"0123456789abcdefghijklmnopqrstuv")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Template:
    """The output of a line that passed, with holes for what differs between such lines, and the state that it states."""

    text: bytes
    state: State


#: A signature that is still to be looked at: public key, digest, signature. Without it, the answer it goes with does not
#: stand. A tuple, for a million of them are made.
_Claim = tuple[bytes, bytes, bytes]


class LineVerifier:
    """Verifies lines under one set of keys; `seen` counts states."""

    def __init__(self, *, trusted: KeySet, name: str, max_bytes: int = canonical.MAX_BYTES) -> None:
        self._trusted = trusted
        self._name = name
        self._max_bytes = max_bytes
        self._keys: dict[bytes, tuple[bytes, bytes]] = {}
        for key_id in {key.key_id for key in trusted.keys}:
            key = trusted.find(key_id)
            # Keys with a period of validity need the receipt's time looked at: those are for the general code.
            if key is not None and (key.valid_from, key.valid_until, key.revoked_at) == (None, None, None):
                self._keys[key_id.encode()] = (key.raw, fingerprint(key.raw).encode())
        self._templates: dict[bytes | None, _Template] = {}
        self.seen: Counter[State] = Counter()

    def lines(self, lines: list[bytes], first: int) -> list[bytes]:
        """The JSON object of each line, as a line; nothing for a blank line. `first` is the first line's number.

        Signatures come last and all in one go: taking turns, libsodium and the interpreter push each other out of the
        processor's cache, which costs a twentieth of the whole.
        """
        answers: list[bytes] = []
        claims: list[tuple[int, _Claim, State]] = []
        fast, seen = self._fast, self.seen
        for number, line in enumerate(lines, first):
            found = fast(line, number)
            if found is None:
                if not line or line.isspace():
                    answers.append(b"")
                    continue
                try:
                    value = canonical.loads(line, max_bytes=self._max_bytes)
                except MalformedError as error:
                    answers.append(self._malformed(str(error), number))
                    continue
                # What is checked is the parsed value, so another spelling will do; the canonical one may be a fast one.
                if isinstance(value, dict) and _FAST_KEYS.issuperset(value):
                    found = fast(canonical.encode_parsed(value), number)
                if found is None:
                    answers.append(self._line_of(self._general(value, number)))
                    continue
            answer, claim, state = found
            seen[state] += 1
            if claim is not None:
                claims.append((len(answers), claim, state))
            answers.append(answer)
        for index, claim, state in claims:
            try:
                verify_digest(*claim)
            except InvalidError:
                seen[state] -= 1
                answers[index] = self._line_of(self._general(canonical.loads(lines[index]), first + index))
        return answers

    def _fast(self, line: bytes, number: int) -> tuple[bytes, _Claim | None, State] | None:
        """The answer for a line that `_FAST` matches and whose checks pass, if its claim holds; None for any other."""
        match = _FAST.fullmatch(line)
        if match is None or len(line) > self._max_bytes:
            return None
        record, year, sha, suffix, key_id, print_, signature = match.groups()
        digest = sha256(record).digest()
        if unhexlify(sha) != digest or int(suffix.translate(_BASE32), 32) != int.from_bytes(digest[:17], "big") >> 6:
            return None
        claim = None
        if signature is not None:
            key = self._keys.get(key_id)
            if key is None or key[1] != print_:
                return None
            # The pattern lets only the canonical spelling through: of the last character's six bits, four are zero.
            claim = (key[0], digest, a2b_base64(signature))
        template = self._templates.get(key_id) or self._learn(line, key_id, sha, year, suffix)
        if template is None:
            return None
        return template.text % (number, year, suffix, sha, suffix, year), claim, template.state

    def _malformed(self, detail: str, number: int) -> bytes:
        check = Check(code="strict_json", status="fail", detail=detail)
        return self._line_of(Verification(target=f"{self._name}:{number}", kind="pith_record", checks=(check,)))

    def _line_of(self, found: Verification) -> bytes:
        self.seen[found.state] += 1
        return json.dumps(found.to_json()).encode("ascii") + b"\n"

    def oversize(self, size: int, number: int) -> bytes:
        """The JSON object of a line of `size` bytes that was not kept, as a line."""
        return self._malformed(
            f"strict JSON: expected at most {self._max_bytes} bytes, found {size}; raise --max-bytes", number
        )

    def _general(self, value: object, number: int) -> Verification:
        return verify_value(value, target=f"{self._name}:{number}", trusted=self._trusted, fits=compiled_schema)

    def _learn(self, line: bytes, key_id: bytes | None, sha: bytes, year: bytes, suffix: bytes) -> _Template | None:
        """Make the template of lines like this one from what the general code says of it; None where that is no pass."""
        found = self._general(canonical.loads(line), 0)
        if found.exit_code != 0:
            return None
        text = json.dumps(found.to_json()).encode("ascii").replace(b"%", b"%%") + b"\n"
        name = json.dumps(self._name)[:-1].encode("ascii").replace(b"%", b"%%")
        holes = (
            (b'"target": ' + name + b':0"', b'"target": ' + name + b':%d"'),
            (b'"pith:' + year + b":" + suffix + b'"', b'"pith:%b:%b"'),
            (sha, b"%b"),
            (b'"' + suffix + b" are", b'"%b are'),
            (b'"' + year + b", from", b'"%b, from'),
        )
        for old, new in holes:
            assert text.count(old) == 1, "the general code words its checks otherwise than the template expects"
            text = text.replace(old, new)
        template = self._templates[key_id] = _Template(text=text, state=found.state)
        return template


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Whole lines from byte `offset` of the stream on; or one line too long to be kept, `oversize` bytes of it."""

    first: int
    data: bytes = b""
    offset: int = 0
    oversize: int = 0


def read_chunks(stream: BinaryIO, *, max_bytes: int) -> Iterator[Chunk]:
    """Cut a stream into chunks of whole lines of about 512 KiB; memory stays within one chunk and one line.

    A line longer than `max_bytes` is skipped over as it comes, so that it costs no memory either.
    """
    number, kept, offset = 1, b"", 0
    while True:
        block = stream.read(CHUNK_BYTES)
        data = kept + block
        end = data.rfind(b"\n") + 1 if block else len(data)
        if end:
            yield Chunk(first=number, data=data[:end], offset=offset)
            number += data.count(b"\n", 0, end)
            offset += end
        kept = data[end:]
        if not block:
            return
        if len(kept) > max_bytes:
            size = len(kept)
            while block := stream.read(CHUNK_BYTES):
                cut = block.find(b"\n") + 1
                size += cut - 1 if cut else len(block)
                if cut:
                    break
            yield Chunk(first=number, oversize=size)
            number += 1
            offset += size + 1
            kept = block[cut:] if block else b""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The results of one chunk: its output lines and how many lines came to which state."""

    output: bytes
    states: dict[State, int] = field(default_factory=dict)
    left: int = 0  # bytes of output that a worker left in the shared memory instead

    @property
    def count(self) -> int:
        """How many targets the chunk held."""
        return sum(self.states.values())


# What a worker process has: its verifier, whose templates are made once, and the file that it shares with its parent.
_verifier: LineVerifier | None = None
_shared: int | None = None
_memory: int | None = None


def _start(trusted: KeySet, name: str, max_bytes: int, shared: int | None, memory: int | None) -> None:
    import signal

    global _verifier, _shared, _memory
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle, in one line
    _verifier, _shared, _memory = LineVerifier(trusted=trusted, name=name, max_bytes=max_bytes), shared, memory


def _work(chunk: Chunk) -> Batch:
    assert _verifier is not None
    return verify_chunk(chunk, _verifier)


def _read_and_work(first: int, offset: int, size: int, slot: int) -> Batch:
    """Read a chunk from the shared file, and leave its output in a slot of the shared memory.

    Both are cheaper than a pipe, through which a megabyte goes in pieces; what is read is what is verified.
    """
    assert _shared is not None and _memory is not None
    batch = _work(Chunk(first=first, data=os.pread(_shared, size, offset)))
    if len(batch.output) > SLOT_BYTES or os.pwrite(_memory, batch.output, slot * SLOT_BYTES) != len(batch.output):
        return batch
    return Batch(output=b"", states=batch.states, left=len(batch.output))


def verify_chunk(chunk: Chunk, verifier: LineVerifier) -> Batch:
    """Verify every line of a chunk; blank lines are no targets."""
    verifier.seen.clear()
    if chunk.oversize:
        line = verifier.oversize(chunk.oversize, chunk.first)
        return Batch(output=line, states=dict(verifier.seen))
    answers = verifier.lines(chunk.data.split(b"\n"), chunk.first)
    return Batch(output=b"".join(answers), states={state: count for state, count in verifier.seen.items() if count})


def _start_method() -> str:
    """Forked workers start at once and share what is loaded; that is safe on Linux while there is one thread."""
    return "fork" if sys.platform == "linux" and threading.active_count() == 1 else "spawn"


def verify_stream(
    stream: BinaryIO, *, trusted: KeySet, name: str, workers: int, max_bytes: int = canonical.MAX_BYTES
) -> Iterator[Batch]:
    """Verify a stream of JSON lines; batches come in input order. Small inputs and one worker start no process."""
    start = stream.tell() if _regular_file(stream) is not None else 0
    chunks = read_chunks(stream, max_bytes=max_bytes)
    first = list(islice(chunks, 2))
    if workers == 1 or len(first) < 2:
        verifier = LineVerifier(trusted=trusted, name=name, max_bytes=max_bytes)
        for chunk in chain(first, chunks):
            yield verify_chunk(chunk, verifier)
        return
    method, bound = _start_method(), 2 * workers  # bounded: a fast reader must not fill memory with chunks
    shared = _regular_file(stream) if method == "fork" else None
    memory = os.memfd_create("repro-bulk") if shared is not None else None
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context(method), initializer=_start, initargs=(trusted, name, max_bytes, shared, memory)
    )
    pending: deque[tuple[Future[Batch], int]] = deque()

    def first_result() -> Batch:
        future, slot = pending.popleft()
        batch = future.result()
        if memory is None or not batch.left:
            return batch
        return Batch(output=os.pread(memory, batch.left, slot * SLOT_BYTES), states=batch.states)

    try:
        for number, chunk in enumerate(chain(first, chunks)):
            slot = number % (bound + 1)
            if shared is None or chunk.oversize:
                future = pool.submit(_work, chunk)
            else:
                future = pool.submit(_read_and_work, chunk.first, start + chunk.offset, len(chunk.data), slot)
            pending.append((future, slot))
            if len(pending) > bound:
                yield first_result()
        while pending:
            yield first_result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if memory is not None:
            os.close(memory)


def _regular_file(stream: BinaryIO) -> int | None:
    """The descriptor of a stream that is a file on disk, which forked workers can read from at any place; else None."""
    try:
        descriptor = stream.fileno()
        return descriptor if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    except OSError:  # io.UnsupportedOperation is one: a stream in memory
        return None


def worst(states: Counter[State], *, require_trusted: bool) -> list[int]:
    """The exit codes of the states that were seen."""
    return [4 if state == "valid" and require_trusted else EXIT_CODES[state] for state in states]
