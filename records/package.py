"""The replication bundle as a container: a zip or a folder of files, written deterministically and read with suspicion.

- `write_bundle` stores the files uncompressed, in name order, with one fixed time and mode: the same files give the
  same bytes everywhere, which no compressor promises from one zlib to the next.
- `read_bundle` reads everything once into memory and hands out only those bytes, so nothing can change between hash
  and use.
- `build_manifest` and `check_manifest` bind the files together.
"""

import errno
import io
import os
import re
import stat
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from records import canonical
from records.errors import MalformedError, UnsupportedError, UsageError
from records.report import Check
from records.versions import check_version, is_other_version

MANIFEST: Final = "manifest.json"
STATEMENT: Final = "statement.dsse.json"
MANIFEST_SCHEMA: Final = "repro.manifest/v1"

MAX_FILES: Final = 10_000
MAX_TOTAL_BYTES: Final = 512 * 1024 * 1024
#: Deflate can reach 1032:1; text of ours stays under 30:1. Small files may compress as they like.
MAX_RATIO: Final = 100
RATIO_FREE_BYTES: Final = 1024 * 1024

_EPOCH: Final = (1980, 1, 1, 0, 0, 0)
_BAD_CHARACTERS: Final = re.compile(r'[\x00-\x1f\x7f-\x9f\\:*?"<>|\u200e\u200f\u202a-\u202e\u2066-\u2069]')
# What zipfile and zlib raise on broken or unsupported archives, found by feeding them damaged ones.
_ZIP_ERRORS: Final = (
    zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError,
    OverflowError, OSError, IndexError, KeyError, MemoryError,
)  # fmt: skip


def check_name(name: str) -> str:
    """Return `name` if it is a safe relative path with `/` between its parts; MalformedError otherwise."""
    parts = name.split("/")
    if not name or len(name) > 400 or _BAD_CHARACTERS.search(name) or any(part in ("", ".", "..") for part in parts):
        raise MalformedError(f"bundle: expected a plain relative file name, found {name[:80]!a}; the archive is unsafe")
    return name


def _check_names(names: list[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        folded = unicodedata.normalize("NFC", check_name(name)).casefold()
        if folded in seen:
            raise MalformedError(f"bundle: the name {name!a} occurs twice (the other is {seen[folded]!a})")
        seen[folded] = name
    if len(names) > MAX_FILES:
        raise MalformedError(f"bundle: expected at most {MAX_FILES} files, found {len(names)}")


def zip_bytes(files: Mapping[str, bytes]) -> bytes:
    """The bundle of `files` as zip bytes: the same files always give the same bytes."""
    _check_names(list(files))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            info = zipfile.ZipInfo(name, _EPOCH)
            info.create_system = 3  # Unix on every platform: zipfile would write the platform's own
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            archive.writestr(info, files[name])
    return buffer.getvalue()


def write_atomically(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write `data` to `path` whole or not at all; UsageError where the folder or the disk does not let it."""
    temporary: str | None = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            if hasattr(os, "fchmod"):
                os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)  # noqa: PTH105 - a str, and pathlib adds nothing
        temporary = None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UsageError(
            f"cannot write {path}: {reason}; choose a folder that exists, is writable and has room"
        ) from None
    finally:
        if temporary is not None:  # also after Ctrl-C
            Path(temporary).unlink(missing_ok=True)


def require_writable(path: Path) -> None:
    """UsageError before long work where `write_atomically` could not put its result at `path`."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror}; choose a folder that exists, is writable and has room"
        ) from None


def write_bundle(path: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` as the zip at `path`, under its final name only when whole.

    Raises MalformedError for a name that no reader would take, UsageError where the disk or folder does not let it.
    """
    write_atomically(Path(path), zip_bytes(files))


def read_bundle(source: Path | bytes) -> dict[str, bytes]:
    """The files of a bundle, from a folder, a zip file or the bytes of one.

    Raises MalformedError for anything unsafe, broken or too large, UsageError where `source` cannot be read.
    """
    if isinstance(source, bytes):
        return _read_zip(source)
    try:
        if source.is_dir():
            return _read_folder(source)
        with source.open("rb") as file:
            data = file.read(MAX_TOTAL_BYTES + 1)
        return _read_zip(data)
    except OSError as error:
        raise UsageError(f"cannot read {source}: {error.strerror or error}") from None
    except MalformedError as error:
        raise MalformedError(f"{source}: {error}") from None


def _read_zip(data: bytes) -> dict[str, bytes]:
    if len(data) > MAX_TOTAL_BYTES:
        raise MalformedError(f"bundle: expected at most {MAX_TOTAL_BYTES} bytes")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [info for info in archive.infolist() if not _is_folder(info)]
            _check_names([info.filename for info in entries])
            total = 0
            for info in entries:
                total += info.file_size
                if info.file_size > RATIO_FREE_BYTES and info.file_size > MAX_RATIO * info.compress_size:
                    raise MalformedError(
                        f"bundle: {info.filename!a} unpacks to over {MAX_RATIO} times its size: a zip bomb"
                    )
            if total > MAX_TOTAL_BYTES:
                raise MalformedError(
                    f"bundle: unpacks to {total} bytes, expected at most {MAX_TOTAL_BYTES}: a zip bomb"
                )
            # ZipExtFile stops at the declared size and then compares the CRC, so a size that lies is an error, not a
            # bomb.
            files = {info.filename: archive.read(info) for info in entries}
    except MalformedError:
        raise
    except _ZIP_ERRORS as error:
        raise MalformedError(
            f"bundle: not a whole zip file ({type(error).__name__}); fetch or build it again"
        ) from None
    return files


def _is_folder(info: zipfile.ZipInfo) -> bool:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if info.orig_filename != info.filename or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise MalformedError(f"bundle: {info.filename!a} is a link or a special file; a bundle holds plain files only")
    if info.is_dir() or kind == stat.S_IFDIR:
        if info.file_size or not info.is_dir():
            raise MalformedError(f"bundle: the folder {info.filename!a} carries data")
        check_name(info.filename[:-1])
        return True
    return False


def _read_folder(root: Path) -> dict[str, bytes]:
    names: list[str] = []
    for folder, subfolders, entries in os.walk(root, onerror=_raise):
        for entry in [*subfolders, *entries]:
            path = Path(folder, entry)
            mode = path.lstat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise MalformedError(f"bundle: {entry!a} is a link or a special file; a bundle holds plain files only")
        names += [Path(folder, entry).relative_to(root).as_posix() for entry in entries]
    _check_names(names)
    files: dict[str, bytes] = {}
    room = MAX_TOTAL_BYTES
    for name in sorted(names):
        # O_NOFOLLOW: a link put there since the walk must not lead out of the folder.
        descriptor = os.open(root / name, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(descriptor, "rb") as file:
            files[name] = file.read(room + 1)
        room -= len(files[name])
        if room < 0:
            raise MalformedError(f"bundle: the folder holds more than {MAX_TOTAL_BYTES} bytes")
    return files


def _raise(error: OSError) -> None:
    raise error


def build_manifest(files: Mapping[str, bytes]) -> bytes:
    """Canonical JSON that lists every file's SHA-256 and size in bytes, but the manifest's own and the statement's."""
    entries = {
        check_name(name): {"sha256": canonical.sha256_hex(data), "size": len(data)}
        for name, data in files.items()
        if name not in (MANIFEST, STATEMENT)
    }
    return canonical.dumps({"schema": MANIFEST_SCHEMA, "files": entries})


def check_manifest(files: Mapping[str, bytes]) -> list[Check]:
    """One `manifest` check for every fault found, or a single one that passes."""
    if MANIFEST not in files:
        return [Check(code="manifest", status="fail", detail=f"expected {MANIFEST} in the bundle, found none")]
    try:
        listed = _manifest_entries(canonical.loads(files[MANIFEST]))
    except UnsupportedError as error:
        return [Check(code="schema", status="fail", detail=str(error))]
    except MalformedError as error:
        return [Check(code="manifest", status="fail", detail=f"{MANIFEST}: {error}")]
    present = set(files) - {MANIFEST, STATEMENT}
    faults = [f"{name!a} is in the bundle but not in the manifest" for name in sorted(present - set(listed))]
    faults += [f"{name!a} is in the manifest but not in the bundle" for name in sorted(set(listed) - present)]
    for name in sorted(present & set(listed)):
        data, entry = files[name], listed[name]
        if len(data) != entry["size"] or canonical.sha256_hex(data) != entry["sha256"]:
            faults.append(f"{name!a} is not the file that the manifest lists: its size or SHA-256 differs")
    if faults:
        return [Check(code="manifest", status="fail", detail=fault) for fault in faults]
    return [Check(code="manifest", status="pass", detail=f"{len(listed)} files, each with the listed size and SHA-256")]


def _manifest_entries(manifest: Any) -> dict[str, dict[str, Any]]:
    expected = f'expected {{"schema":"{MANIFEST_SCHEMA}","files":{{path:{{"sha256","size"}}}}}}'
    if isinstance(manifest, dict) and is_other_version(manifest.get("schema"), MANIFEST_SCHEMA):
        check_version(manifest["schema"], MANIFEST_SCHEMA, what=f"{MANIFEST}: expected a manifest of the form")
    if not isinstance(manifest, dict) or set(manifest) != {"schema", "files"} or manifest["schema"] != MANIFEST_SCHEMA:
        raise MalformedError(expected)
    files = manifest["files"]
    if not isinstance(files, dict):
        raise MalformedError(expected)
    for entry in files.values():
        if not isinstance(entry, dict) or set(entry) != {"sha256", "size"}:
            raise MalformedError(expected)
        if not isinstance(entry["sha256"], str) or not isinstance(entry["size"], int) or entry["size"] is True:
            raise MalformedError(expected)
    return files
