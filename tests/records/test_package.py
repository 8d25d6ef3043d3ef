"""The bundle as a container: deterministic, whole or absent, and safe to read."""

import errno
import io
import os
import stat
import warnings
import zipfile
from pathlib import Path

import pytest

from records import canonical, package
from records.errors import MalformedError, UsageError

FILES = {"plan.json": b"{}", "trace/arm.jsonl": b"line\n" * 100, "a b.txt": b""}


def zipped(entries: list[tuple[zipfile.ZipInfo | str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of the duplicate names that are wanted here
        with zipfile.ZipFile(buffer, "w", compression) as archive:
            for info, data in entries:
                archive.writestr(info, data)
    return buffer.getvalue()


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    package.write_bundle(tmp_path / "a.zip", FILES)
    package.write_bundle(tmp_path / "b.zip", dict(reversed(FILES.items())))
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    # Golden: no time, platform or compressor in it. A change of this hash is a change of the file format.
    found = canonical.sha256_hex((tmp_path / "a.zip").read_bytes())
    assert found == "a0a0908da9ff7a78f4589931ac04dcba02b158a3fdef9b39e3cadf2d4cfbd833"
    assert package.read_bundle(tmp_path / "a.zip") == FILES


def test_a_folder_reads_as_its_zip(tmp_path: Path) -> None:
    for name, data in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert package.read_bundle(tmp_path) == FILES


def test_a_bundle_packed_again_by_a_zip_program_reads_too() -> None:
    folder = zipfile.ZipInfo("trace/")
    folder.external_attr = (stat.S_IFDIR | 0o755) << 16
    data = zipped([(folder, b""), *FILES.items()], zipfile.ZIP_DEFLATED)
    assert package.read_bundle(data) == FILES


@pytest.mark.parametrize(
    "name",
    [
        "../evil", "/etc/passwd", "a/../../evil", "a//b", "./a", "a/.", "C:evil", "a\\b", "a\nb", "a\x1b[31m", "",
        "\u202egpj.exe", "x" * 401,
    ],
)  # fmt: skip
def test_unsafe_names_are_refused_in_both_directions(name: str, tmp_path: Path) -> None:
    with pytest.raises(MalformedError) as caught:
        package.read_bundle(zipped([(zipfile.ZipInfo(name), b"x")]))
    assert str(caught.value).isprintable()
    with pytest.raises(MalformedError):
        package.write_bundle(tmp_path / "x.zip", {name: b"x"})
    assert list(tmp_path.iterdir()) == []


def test_symlinks_and_special_files_are_refused(tmp_path: Path) -> None:
    for kind in (stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR):
        info = zipfile.ZipInfo("link")
        info.external_attr = (kind | 0o777) << 16
        with pytest.raises(MalformedError, match="link or a special file"):
            package.read_bundle(zipped([(info, b"/etc/passwd")]))
    (tmp_path / "real").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to("/etc/passwd")
    with pytest.raises(MalformedError, match="link or a special file"):
        package.read_bundle(tmp_path)
    (tmp_path / "folder" / "link").unlink()
    (tmp_path / "folder" / "up").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(MalformedError, match="link or a special file"):
        package.read_bundle(tmp_path)
    (tmp_path / "folder" / "up").unlink()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MalformedError, match="link or a special file"):
        package.read_bundle(tmp_path)


def test_duplicate_names_are_refused() -> None:
    for other in ("plan.json", "PLAN.json"):
        with pytest.raises(MalformedError, match="twice"):
            package.read_bundle(zipped([("plan.json", b"1"), (other, b"2")]))


def test_zip_bombs_are_refused_by_ratio_and_by_total_size(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = zipped([("zeros", bytes(20_000_000))], zipfile.ZIP_DEFLATED)
    assert len(bomb) < 30_000
    with pytest.raises(MalformedError, match="zip bomb"):
        package.read_bundle(bomb)
    monkeypatch.setattr(package, "MAX_TOTAL_BYTES", 1_000_000)
    with pytest.raises(MalformedError, match="zip bomb"):
        package.read_bundle(zipped([(str(i), os.urandom(1000) * 200) for i in range(8)], zipfile.ZIP_DEFLATED))
    monkeypatch.setattr(package, "MAX_FILES", 3)
    with pytest.raises(MalformedError, match="at most 3 files"):
        package.read_bundle(zipped([(str(i), b"") for i in range(4)]))


def test_a_size_that_lies_is_an_error_and_unpacks_no_more_than_it_says() -> None:
    data = bytearray(zipped([("zeros", bytes(1_000_000))], zipfile.ZIP_DEFLATED))
    for at in (data.index(b"PK\x03\x04") + 22, data.index(b"PK\x01\x02") + 24):
        data[at : at + 4] = (100).to_bytes(4, "little")
    with pytest.raises(MalformedError):
        package.read_bundle(bytes(data))


def test_every_truncation_and_every_changed_byte_is_an_error_or_shows() -> None:
    """No damage leaks another exception, and none gives the same files but where a byte means nothing."""
    whole = package.zip_bytes(FILES)
    for end in range(len(whole)):
        with pytest.raises(MalformedError):
            package.read_bundle(whole[:end])
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 0xFF
        try:
            package.read_bundle(bytes(damaged))
        except MalformedError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("junk", [b"", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), os.urandom(4096), b"{}" * 100])
def test_junk(junk: bytes) -> None:
    if junk.startswith(b"PK\x05\x06"):
        assert package.read_bundle(junk) == {}  # an empty zip is whole; what it lacks is for the manifest to say
        return
    with pytest.raises(MalformedError, match="not a whole zip"):
        package.read_bundle(junk)


def test_nothing_is_left_behind_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "run.repro.zip"
    target.write_bytes(b"the one before")

    full = OSError(errno.ENOSPC, "No space left on device")
    for error, expected in ((full, UsageError), (KeyboardInterrupt(), KeyboardInterrupt)):

        def fail(_: int, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(expected):
            package.write_bundle(target, FILES)
        assert [path.name for path in tmp_path.iterdir()] == [target.name]
        assert target.read_bytes() == b"the one before"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write"):
        package.write_bundle(tmp_path / "no" / "x.zip", FILES)
    with pytest.raises(UsageError, match="cannot read"):
        package.read_bundle(tmp_path / "no.zip")


def test_manifest_names_every_fault() -> None:
    files = {**FILES, "statement.dsse.json": b"not listed"}
    files["manifest.json"] = package.build_manifest(files)
    assert [check.status for check in package.check_manifest(files)] == ["pass"]
    files["extra"] = b"x"
    files["plan.json"] = b"[]"
    del files["a b.txt"]
    details = [check.detail for check in package.check_manifest(files) if check.status == "fail"]
    assert len(details) == 3
    for name in ("'extra'", "'plan.json'", "'a b.txt'"):
        assert any(name in detail for detail in details)


@pytest.mark.parametrize(
    "manifest",
    [
        None,
        b"",
        b"{}",
        b"[]",
        b'{"schema":"repro.manifest/v1","files":[]}',
        b'{"schema":"repro.manifest/v1","files":{"plan.json":{"sha256":1,"size":2}}}',
        b'{"schema":"repro.manifest/v1","files":{"plan.json":{"sha256":"","size":true}}}',
    ],
)
def test_a_manifest_that_is_none(manifest: bytes | None) -> None:
    files = {"plan.json": b"{}"} | ({} if manifest is None else {"manifest.json": manifest})
    assert {check.status for check in package.check_manifest(files)} == {"fail"}
