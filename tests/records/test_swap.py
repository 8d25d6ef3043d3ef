"""What is verified is what was read: a bundle's files are read once, and a file swapped meanwhile changes nothing."""

import os
from pathlib import Path

import pytest
from test_replication import TRUSTED, build, judged

from records import package
from records.errors import ReproError


def unpacked(folder: Path) -> dict[str, bytes]:
    files = build()
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return files


def test_a_file_swapped_after_it_was_read_is_not_what_was_verified(tmp_path: Path) -> None:
    files = unpacked(tmp_path)
    read = package.read_bundle(tmp_path)
    for name in files:
        (tmp_path / name).write_bytes(b"swapped")
    assert read == files and judged(read, TRUSTED).state == "trusted"


def test_every_file_of_a_folder_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = unpacked(tmp_path)
    opened: list[str] = []
    real = os.open

    def counting(path: str | Path, *arguments: int, **options: int) -> int:
        opened.append(str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", counting)
    judged(package.read_bundle(tmp_path), TRUSTED)
    assert sorted(opened) == sorted(str(tmp_path / name) for name in files)


def test_a_file_replaced_by_a_link_after_the_walk_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, secret = tmp_path / "bundle", tmp_path / "secret"
    folder.mkdir()
    unpacked(folder)
    secret.write_bytes(b"not for anybody")
    real = package._check_names

    def swapping(names: list[str]) -> None:
        real(names)
        (folder / "plan.json").unlink()
        (folder / "plan.json").symlink_to(secret)

    monkeypatch.setattr(package, "_check_names", swapping)
    with pytest.raises(ReproError):
        package.read_bundle(folder)
