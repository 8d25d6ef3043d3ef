"""A source tokenized once into memory-mapped files with a digest: what the corpus `data:NAME` is read from.

- `prepare`: source to folder; stopped at any moment, the same command goes on; the folder gets its name when it is whole
- `read`: the folder again, every byte of it digested
- layout: corpus.json, and for each part (train, held_out) PART.bin, token ids with a boundary after each document, and
  PART.ends, the number of tokens up to the end of each document (little-endian, 8 bytes)

Every twentieth different document is held out; a document that occurs twice is taken once.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from records import canonical
from records.errors import InvalidError, MalformedError, ReproError, UsageError
from records.package import write_atomically
from records.resolver import default_cache
from repro.data.corpus import HELD_OUT_EVERY, NotPreparedError
from repro.data.sources import Source
from repro.data.tokens import Subwords, Tokenizer, Tokens, train_bpe

SCHEMA = "repro.corpus/v1"
PARTS = ("train", "held_out")
_COUNTS = ("tokens", "documents", "bytes", "characters")
_AT_ONCE = 256  # documents tokenized together
_SAVE_SECONDS = 5.0
_DOCUMENT_DIGEST = 8  # bytes of a document's SHA-256 that tell it from the others
TOKENIZER_BYTES = 50_000_000
"""Text that a BPE is trained on, at most."""

Progress = Callable[[int, int], None]
"""Called with (documents, training tokens) so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A prepared corpus: its record, and its parts as memory-mapped token ids with the ends of their documents."""

    record: Mapping[str, Any]
    tokens: Mapping[str, Tokens]
    ends: Mapping[str, npt.NDArray[np.uint64]]
    tokenizer: Tokenizer

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON of the record without `source`: equal digests mean equal tokens."""
        return _digest(self.record)


def root() -> Path:
    """Where prepared corpora lie: `$REPRO_DATA`, or `data` in the cache folder."""
    own = os.environ.get("REPRO_DATA")
    return Path(own) if own else default_cache() / "data"


def names() -> list[str]:
    """Names of the corpora prepared here."""
    return sorted(path.parent.name for path in root().glob("*/corpus.json") if not path.parent.name.endswith(".part"))


def prepare(
    source: Source,
    name: str,
    *,
    tokenizer: Tokenizer | int,
    tokens: int | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Tokenizes `source` into the corpus `name`, up to `tokens` training tokens (by whole documents).

    Args:
        tokenizer: the tokenizer, or the vocabulary's size of a BPE to be trained on the source.

    Raises:
        UsageError: the name is taken, too few documents, or a folder that cannot be written.
        InvalidError: the source changed on the way.
        ReproError: the source cannot be read to its end; what is malformed leaves nothing behind.
    """
    if not name or name.startswith(".") or name.endswith(".part") or set(name) & set("/\\@:"):
        raise UsageError(f"corpus name: expected letters, digits, '.', '_' and '-', found {name[:60]!a}")
    whole, part = root() / name, root() / f"{name}.part"
    if whole.exists():
        raise UsageError(f"{whole} exists: the corpus {name} is prepared; remove the folder, or choose another --name")
    settings = {
        "source": source.describe(),
        "tokenizer": tokenizer if isinstance(tokenizer, int) else tokenizer.sha256,
        "tokens": tokens,
    }
    try:
        with _held(part):
            try:
                _write(source, part, settings, tokenizer, tokens, progress)
            except BaseException as error:
                if isinstance(error, MalformedError | InvalidError) or not (part / "state.json").exists():
                    shutil.rmtree(part, ignore_errors=True)  # nothing to go on from
                raise
            part.replace(whole)
    except OSError as error:
        raise UsageError(
            f"cannot write {error.filename or part}: {error.strerror}; free space, or choose another folder by REPRO_DATA"
        ) from error
    return read(name)


@contextlib.contextmanager
def _held(part: Path) -> Iterator[None]:
    part.parent.mkdir(parents=True, exist_ok=True)
    lock = part.with_name(f".{part.name}.lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"{part} is in use by another `repro data prepare`; wait for it") from error
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


class _Part:
    """One part's files, written on."""

    def __init__(self, folder: Path, name: str, counts: Mapping[str, int]) -> None:
        self.counts = dict(counts)
        self._files = [(folder / f"{name}.{suffix}").open("ab") for suffix in ("bin", "ends")]

    def truncate(self, width: int) -> None:
        """Back to what the counts say."""
        for file, size in zip(self._files, (self.counts["tokens"] * width, self.counts["documents"] * 8), strict=True):
            file.truncate(size)

    def add(self, text: bytes, ids: Tokens, end: bytes) -> None:
        tokens, ends = self._files
        tokens.write(ids.tobytes() + end)
        self.counts["tokens"] += len(ids) + 1
        self.counts["documents"] += 1
        self.counts["bytes"] += len(text)
        self.counts["characters"] += len(text.decode(errors="replace"))
        ends.write(self.counts["tokens"].to_bytes(8, "little"))

    def sync(self) -> None:
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        for file in self._files:
            file.close()


def _write(
    source: Source,
    part: Path,
    settings: Mapping[str, Any],
    tokenizer: Tokenizer | int,
    limit: int | None,
    progress: Progress | None,
) -> None:
    state = _resumed(part, settings)
    if isinstance(tokenizer, int):
        path = part / "tokenizer.json"
        if not path.exists():
            write_atomically(path, train_bpe(_sample(source), tokenizer).data)
        tokenizer = Subwords(path.read_bytes(), name=str(path))
    elif tokenizer.data:
        write_atomically(part / "tokenizer.json", tokenizer.data)
    parts = [_Part(part, name, state["parts"][name]) for name in PARTS]
    end = np.array([tokenizer.boundary], dtype=tokenizer.dtype).tobytes()
    try:
        for item in parts:
            item.truncate(tokenizer.dtype.itemsize)
        with (part / "seen").open("ab") as seen_file:
            seen_file.truncate(state["seen"] * _DOCUMENT_DIGEST)
        data = (part / "seen").read_bytes()
        seen = {data[i : i + _DOCUMENT_DIGEST] for i in range(0, len(data), _DOCUMENT_DIGEST)}
        documents, saved = source.documents(state["source"]), time.monotonic()
        with (part / "seen").open("ab") as seen_file:
            while batch := list(itertools.islice(documents, _AT_ONCE)):
                fresh = []
                for text in batch:
                    digest = hashlib.sha256(text).digest()[:_DOCUMENT_DIGEST]
                    if text and digest not in seen:
                        seen.add(digest)
                        seen_file.write(digest)
                        fresh.append(text)
                for text, ids in zip(fresh, tokenizer.encode(fresh), strict=True):
                    if limit and parts[0].counts["tokens"] >= limit:
                        break
                    number = sum(item.counts["documents"] for item in parts)
                    parts[number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1].add(text, ids, end)
                if progress:
                    progress(len(seen), parts[0].counts["tokens"])
                if limit and parts[0].counts["tokens"] >= limit:
                    break
                if time.monotonic() - saved > _SAVE_SECONDS:
                    saved = time.monotonic()
                    seen_file.flush()
                    os.fsync(seen_file.fileno())
                    for item in parts:
                        item.sync()
                    _save(part, settings, source.state(), len(seen), parts)
        for item in parts:
            item.sync()
    finally:
        for item in parts:
            item.close()
    source.check()
    if not parts[1].counts["documents"]:
        raise MalformedError(
            f"expected at least {HELD_OUT_EVERY} different documents (every {HELD_OUT_EVERY}th is held out), found "
            f"{parts[0].counts['documents']}; --split-on cuts a text file into documents"
        )
    record = {
        "schema": SCHEMA,
        "source": settings["source"] | {"tokens": limit},
        "tokenizer": {
            "kind": "subwords" if tokenizer.data else "bytes",
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "boundary": tokenizer.boundary,
        },
        "parts": {
            name: item.counts | {suffix: _file_digest(part / f"{name}.{suffix}") for suffix in ("bin", "ends")}
            for name, item in zip(PARTS, parts, strict=True)
        },
    }
    write_atomically(part / "corpus.json", canonical.dumps(record))
    for name in ("seen", "state.json"):
        (part / name).unlink(missing_ok=True)


def _resumed(part: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Where an earlier preparation stopped, or the start."""
    path = part / "state.json"
    if not path.exists():
        if part.exists():
            shutil.rmtree(part)
        part.mkdir()
        return {"source": None, "seen": 0, "parts": {name: dict.fromkeys(_COUNTS, 0) for name in PARTS}}
    try:
        state: dict[str, Any] = json.loads(path.read_bytes())
        found = state["settings"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read; remove {part} and prepare the corpus again") from error
    if found != settings:
        # not deleted: it may be hours of another command's work
        raise UsageError(
            f"{part} holds an unfinished corpus of another source, tokenizer or length, or the source has changed since: "
            "remove the folder, or choose another --name"
        )
    return state


def _save(part: Path, settings: Mapping[str, Any], at: Any, seen: int, parts: list[_Part]) -> None:
    counts = {name: item.counts for name, item in zip(PARTS, parts, strict=True)}
    state = {"settings": settings, "source": at, "seen": seen, "parts": counts}
    write_atomically(part / "state.json", json.dumps(state).encode())


def _sample(source: Source) -> Iterator[bytes]:
    """The first documents of the training part."""
    seen: set[bytes] = set()
    size = 0
    for text in source.documents():
        digest = hashlib.sha256(text).digest()[:_DOCUMENT_DIGEST]
        if not text or digest in seen:
            continue
        seen.add(digest)
        if len(seen) % HELD_OUT_EVERY:
            size += len(text)
            yield text
        if size > TOKENIZER_BYTES:
            return


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(record: Mapping[str, Any]) -> str:
    return canonical.digest({name: value for name, value in record.items() if name != "source"})


def read(name: str) -> Prepared:
    """The prepared corpus `name`, its files digested again.

    Raises:
        NotPreparedError: there is none here.
        InvalidError: a file is not the one that was prepared.
        MalformedError: corpus.json is not the record of a corpus.
    """
    folder = root() / name
    try:
        data = (folder / "corpus.json").read_bytes()
    except OSError as error:
        raise NotPreparedError(
            f"corpus data:{name}: not prepared on this machine (looked in {root()}); see repro data prepare --help"
        ) from error
    try:
        record = canonical.loads(data)
        if not isinstance(record, dict) or record["schema"] != SCHEMA:
            raise MalformedError(f"expected the form {SCHEMA}")
        form, parts = record["tokenizer"], record["parts"]
        tokenizer = Tokenizer()
        if form["kind"] == "subwords":
            tokenizer = Subwords(_held_bytes(folder / "tokenizer.json", form["sha256"]), end=form["boundary"])
        tokens, ends = (
            {
                part: _mapped(folder / f"{part}.{suffix}", parts[part][suffix], dtype)
                for part in PARTS
            }
            for suffix, dtype in (("bin", tokenizer.dtype), ("ends", np.dtype("<u8")))
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedError(f"{folder / 'corpus.json'}: {type(error).__name__}: {error}; prepare it again") from error
    except InvalidError:
        raise
    except ReproError as error:
        raise MalformedError(f"{folder / 'corpus.json'}: {error}; prepare it again") from error
    return Prepared(record=record, tokens=tokens, ends=ends, tokenizer=tokenizer)


def _held_bytes(path: Path, sha256: str) -> bytes:
    data = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise InvalidError(f"{path}: not the file that the corpus was prepared with: prepare it again")
    return data


def _mapped(path: Path, sha256: str, dtype: "np.dtype[Any]") -> Any:
    found = _file_digest(path) if path.exists() else "no file"
    if found != sha256:
        raise InvalidError(
            f"{path}: expected the digest {sha256[:12]}… of when it was prepared, found {found[:12]}…: the corpus changed "
            "under its name; remove its folder and prepare it again"
        )
    return np.memmap(path, dtype=dtype, mode="r")
