"""Where documents come from: local files, the packages installed here, and datasets of the Hugging Face hub.

- `Files`: parquet, JSONL (plain or gzipped) and text, digested before and after they are read
- `Hub`: a dataset at a pinned revision, streamed, never downloaded whole
- `open_source`: from what `repro data prepare` was told

A source yields UTF-8 documents in a fixed order and can go on from any state that it has given.
"""

import gzip
import hashlib
import json
import logging
import re
import sysconfig
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from records.errors import InvalidError, MalformedError, NetworkError, UsageError


class Source(Protocol):
    """Documents, and where among them the reader is."""

    def describe(self) -> dict[str, Any]:
        """What the source is, without paths or dates, for the corpus' record."""

    def documents(self, state: Any = None) -> Iterator[bytes]:
        """Documents from `state` on, or from the start."""

    def state(self) -> Any:
        """JSON value from which `documents` goes on after the last one yielded."""

    def check(self) -> None:
        """Raises `InvalidError` where what was read is no longer there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A dataset of the hub: repository, configuration, split, the field that holds the text, and the commit."""

    path: str
    config: str | None
    split: str
    text: str
    revision: str


# The commits are those that other public work cites for these datasets (November 2026); they were not compared with the
# hub, which could not be reached when this was written. Another can be given by --revision.
DATASETS = {
    "fineweb-edu": Dataset(
        path="HuggingFaceFW/fineweb-edu", config="sample-10BT", split="train", text="text",
        revision="87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
    ),
    "c4": Dataset(
        path="allenai/c4", config="en", split="train", text="text", revision="1588ec454efa1a09f29cd18ddd04fe05fc8653a2"
    ),
    "tinystories": Dataset(
        path="roneneldan/TinyStories", config=None, split="train", text="text",
        revision="f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
    ),
}  # fmt: skip
_COMMIT = re.compile(r"[0-9a-f]{40}")


def open_source(
    word: str, *, text: str = "text", revision: str | None = None, split_on: str | None = None
) -> "Files | Hub":
    """The source that `word` names: `installed`, one of `DATASETS`, `hub:OWNER/NAME[:CONFIG]`, a file or a folder.

    Args:
        text: field of parquet and JSONL rows that holds the document.
        revision: full commit of a dataset of the hub; needed where the name has none here.
        split_on: what separates the documents of a text file; without it a file is one document.

    Raises:
        UsageError: none of these, or a hub's dataset without a full commit.
    """
    if word in DATASETS:
        known = DATASETS[word]
        return Hub(known if revision is None else _at(known, revision))
    if word.startswith("hub:"):
        owner_name, _, config = word.removeprefix("hub:").partition(":")
        if revision is None:
            raise UsageError(
                f"{word}: expected --revision with the dataset's full commit: what a branch holds changes under its name"
            )
        return Hub(
            _at(Dataset(path=owner_name, config=config or None, split="train", text=text, revision=""), revision)
        )
    if word == "installed":
        return Files(installed(), kind="installed", text=text, split_on=None)
    path = Path(word)
    if path.is_dir():
        files = sorted(item for item in path.rglob("*") if item.is_file())
    elif path.is_file():
        files = [path]
    else:
        raise UsageError(
            f"unknown source {word!r}: expected installed, {', '.join(DATASETS)}, hub:OWNER/NAME[:CONFIG], a file or a folder"
        )
    return Files(files, kind="files", text=text, split_on=split_on)


def _at(dataset: Dataset, revision: str) -> Dataset:
    if not _COMMIT.fullmatch(revision):
        raise UsageError(f"--revision: expected a full commit of 40 hexadecimal digits, found {revision[:60]!a}")
    return Dataset(path=dataset.path, config=dataset.config, split=dataset.split, text=dataset.text, revision=revision)


def installed() -> list[Path]:
    """Python sources of the packages installed beside this interpreter, without this project's own."""
    roots = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    own = {"repro", "records", "papers"}
    return [
        path
        for root in sorted(roots)
        for path in sorted(root.rglob("*.py"))
        if path.relative_to(root).parts[0] not in own and path.is_file()
    ]


@dataclass(slots=True)
class Files:
    """Local files in order: `.parquet`, `.jsonl` and `.jsonl.gz` (or `.json.gz`) by row, any other as text."""

    files: list[Path]
    kind: str
    text: str
    split_on: str | None
    sha256: str = field(init=False)
    _at: tuple[int, int] = field(init=False, default=(0, 0))

    def __post_init__(self) -> None:
        if not self.files:
            raise UsageError(f"source {self.kind}: expected at least one file, found none")
        for path in self.files:
            if path.suffix == ".parquet":
                self._parquet(path)  # a truncated file is found before anything is written
        self.sha256 = self._digest()

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "files": len(self.files), "sha256": self.sha256}

    def check(self) -> None:
        if self._digest() != self.sha256:
            raise InvalidError("the source's files changed while they were read: nothing was kept; prepare it again")

    def state(self) -> Any:
        return list(self._at)

    def documents(self, state: Any = None) -> Iterator[bytes]:
        first, skip = state or (0, 0)
        for number in range(first, len(self.files)):
            path = self.files[number]
            try:
                for row, text in enumerate(self._rows(path)):
                    if number == first and row < skip:
                        continue
                    self._at = (number, row + 1)
                    yield text
            except (OSError, EOFError, zlib.error) as error:
                raise MalformedError(f"{path}: cannot be read to its end ({error}): fetch it again") from error

    def _rows(self, path: Path) -> Iterator[bytes]:
        if path.suffix == ".parquet":
            yield from self._parquet_rows(path)
        elif path.name.endswith((".jsonl", ".jsonl.gz", ".json.gz")):
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield self._field(_json_line(line, path, number), f"{path} line {number}")
        else:
            data = path.read_bytes()
            yield from data.split(self.split_on.encode()) if self.split_on else [data]

    def _field(self, row: object, where: str) -> bytes:
        value = row.get(self.text) if isinstance(row, Mapping) else None
        if not isinstance(value, str):
            raise MalformedError(f"{where}: expected a text under {self.text!r}, found {str(value)[:40]!a}; see --text")
        return value.encode(errors="replace")

    def _parquet(self, path: Path) -> Any:
        pyarrow = _pyarrow()
        try:
            file = pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise MalformedError(
                f"{path}: expected a whole parquet file, found {str(error).splitlines()[0]}: fetch it again"
            ) from error
        if self.text not in file.schema_arrow.names:
            raise MalformedError(
                f"{path}: expected a column {self.text!r}, found {', '.join(file.schema_arrow.names)}; see --text"
            )
        return file

    def _parquet_rows(self, path: Path) -> Iterator[bytes]:
        pyarrow = _pyarrow()
        with self._parquet(path) as file:
            try:
                row = 0
                for batch in file.iter_batches(columns=[self.text]):
                    for value in batch.column(0).to_pylist():
                        row += 1
                        yield self._field({self.text: value}, f"{path} row {row}")
            except pyarrow.ArrowException as error:
                raise MalformedError(f"{path}: {str(error).splitlines()[0]}: fetch it again") from error

    def _digest(self) -> str:
        whole = hashlib.sha256()
        for path in self.files:
            try:
                with path.open("rb") as file:
                    whole.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise UsageError(f"cannot read {path}: {error.strerror}") from error
        return whole.hexdigest()


def _json_line(line: bytes, path: Path, number: int) -> object:
    try:
        value: object = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"{path} line {number}: expected JSON, found {error}") from error
    return value


class Hub:
    """A dataset of the hub, streamed."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._rows: Any = None

    def describe(self) -> dict[str, Any]:
        d = self.dataset
        return {"kind": "hub", "path": d.path, "config": d.config, "split": d.split, "revision": d.revision}

    def check(self) -> None:
        """A commit does not change."""

    def state(self) -> Any:
        return self._rows.state_dict()

    def documents(self, state: Any = None) -> Iterator[bytes]:
        name = f"{self.dataset.path} at {self.dataset.revision[:12]}"
        self._rows = self._open(name)
        if state is not None:
            self._rows.load_state_dict(state)
        try:
            for row in self._rows:
                value = row.get(self.dataset.text)
                if not isinstance(value, str):
                    raise MalformedError(
                        f"{name}: expected a text under {self.dataset.text!r}, found {str(value)[:40]!a}"
                    )
                yield value.encode(errors="replace")
        except (OSError, _hub_error()) as error:
            raise NetworkError(
                f"{name}: the hub stopped answering ({_first_line(error)}); the same command goes on from here"
            ) from error

    def _open(self, name: str) -> Any:
        for library in ("huggingface_hub", "datasets"):
            logging.getLogger(library).setLevel(logging.CRITICAL)  # its retries are not for the user; our error is
        try:
            import datasets
            import huggingface_hub
        except ImportError as error:
            raise UsageError("datasets of the hub need another package: pip install 'pith-repro[eval]'") from error
        try:
            huggingface_hub.HfApi().dataset_info(self.dataset.path, revision=self.dataset.revision, timeout=20)
            return datasets.load_dataset(
                self.dataset.path,
                self.dataset.config,
                split=self.dataset.split,
                revision=self.dataset.revision,
                streaming=True,
            )
        except huggingface_hub.errors.RepositoryNotFoundError as error:
            raise UsageError(f"{name}: the hub has no such dataset or revision, or does not show it to you") from error
        except huggingface_hub.errors.RevisionNotFoundError as error:
            raise UsageError(f"{name}: the hub has no such revision") from error
        except (OSError, ValueError, _hub_error()) as error:
            raise NetworkError(
                f"{name}: the hub cannot be reached ({_first_line(error)}); without it, prepare local files or `installed`"
            ) from error


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _hub_error() -> type[Exception]:
    """Root of what the hub's client raises: its HTTP library's errors, which are no OSErrors."""
    import huggingface_hub.errors
    import huggingface_hub.utils

    http: type[Exception] = next(
        base
        for base in huggingface_hub.errors.HfHubHTTPError.__mro__
        if base.__module__.startswith(("http", "requests"))
    )
    return http


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError("parquet files need another package: pip install 'pith-repro[eval]'") from error
    return pyarrow
