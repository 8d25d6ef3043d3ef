"""Prepared corpora: one digest whatever the format, stopped and gone on with, and every way a source can be broken."""

import gzip
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from command_line import repro

from records.errors import InvalidError, MalformedError, UsageError
from repro.data import corpus, prepare, sources
from repro.data.batches import Batches
from repro.data.tokens import Subwords, Tokenizer, open_tokenizer

TEXTS = [f"Document {number}: " + "naïve words — " * (number % 7 + 1) for number in range(300)]
TEXTS[77] = TEXTS[76]  # twice


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REPRO_DATA", str(tmp_path / "data"))
    corpus.load.cache_clear()
    return tmp_path / "data"


def write(path: Path, texts: list[str]) -> Path:
    """The texts in the format that the name says."""
    if path.suffix == ".parquet":
        table = pyarrow.table({"text": texts, "id": list(range(len(texts)))})
        pyarrow.parquet.write_table(table, path, row_group_size=50)
    elif path.name.endswith(".txt"):
        path.write_text("|".join(texts))
    else:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        path.write_bytes(gzip.compress(lines, mtime=0) if path.suffix == ".gz" else lines)
    return path


def made(path: Path | str, name: str, **more) -> prepare.Prepared:
    split_on = "|" if str(path).endswith(".txt") else None
    return prepare.prepare(sources.open_source(str(path), split_on=split_on), name, tokenizer=Tokenizer(), **more)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.txt"])
def test_the_same_documents_are_the_same_corpus_in_any_format(tmp_path: Path, name: str) -> None:
    found = made(write(tmp_path / name, TEXTS), "x")
    unique = list(dict.fromkeys(TEXTS))
    held_out = unique[19::20]
    train = [text for text in unique if text not in held_out]
    assert found.tokens["held_out"].tobytes() == "".join(text + "\0" for text in held_out).encode()
    assert found.tokens["train"].tobytes() == "".join(text + "\0" for text in train).encode()
    assert np.diff(found.ends["train"]).tolist() == [len(text.encode()) + 1 for text in train[1:]]
    text = corpus.load("data:x")
    assert (text.digest, text.documents, text.vocab_size) == (found.digest, 299, 256)
    assert text.characters_per_token == pytest.approx(sum(map(len, held_out)) / len(text.held_out))
    assert text.bytes_per_token == pytest.approx(1 - len(held_out) / len(text.held_out))
    tokens, targets = Batches(data=text.train, batch=4, context=32, seed=0).at(3)
    assert (tokens[:, 1:] == targets[:, :-1]).all()
    assert not (tmp_path / "data" / "x.part").exists()


def test_a_part_by_whole_documents_has_a_digest_of_its_own(tmp_path: Path) -> None:
    made(write(tmp_path / "a.jsonl", TEXTS), "x")
    whole, part = corpus.load("data:x"), corpus.load("data:x@5000")
    assert part.ends is not None and whole.ends is not None
    assert part.ends.tolist() == whole.ends[: len(part.ends)].tolist()
    assert part.ends[-2] < 5000 <= len(part.train) == part.ends[-1]
    assert (part.train == whole.train[: len(part.train)]).all()
    assert part.digest not in (whole.digest, corpus.load("data:x@7000").digest)
    assert part.epochs(3 * len(part.train)) == 3.0
    shorter = made(tmp_path / "a.jsonl", "y", tokens=5000)
    assert shorter.tokens["train"].tobytes() == part.train.tobytes()
    with pytest.raises(UsageError, match=f"expected 1 to {len(whole.train)} tokens after @, found '9999999'"):
        corpus.load("data:x@9999999")


class Stop:
    """Ctrl-C after so many calls."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self, documents: int, tokens: int) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["files", "hub"])
def test_stopped_and_gone_on_with_it_is_the_same_corpus(tmp_path: Path, monkeypatch, kind: str) -> None:
    for number in range(3):
        write(tmp_path / f"{number}.parquet", TEXTS[100 * number : 100 * number + 100])
    files = [str(tmp_path / f"{number}.parquet") for number in range(3)]

    def source() -> sources.Source:
        if kind == "files":
            return sources.Files([Path(file) for file in files], kind="files", text="text", split_on=None)
        hub = sources.open_source("fineweb-edu")
        monkeypatch.setattr(
            hub, "_open", lambda name: datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
        )
        return hub

    monkeypatch.setattr(prepare, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(prepare, "_AT_ONCE", 16)
    expected = prepare.prepare(source(), "whole", tokenizer=Tokenizer())
    for calls in (1, 4, 9, 2):
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(source(), "x", tokenizer=Tokenizer(), progress=Stop(calls))
    again = source()
    starts: list[object] = []
    read = again.documents
    monkeypatch.setattr(type(again), "documents", lambda self, state=None: starts.append(state) or read(state))
    assert prepare.prepare(again, "x", tokenizer=Tokenizer()).digest == expected.digest
    assert starts != [None], "it went on from where it was"


def test_what_is_held_out_and_taken_does_not_depend_on_time_or_size(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", TEXTS)
    before, stat = made(path, "x").digest, path.stat()
    path.write_bytes(path.read_bytes().replace(b"Document 42:", b"Document 24:"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert made(path, "y").digest != before


def test_a_corpus_that_changed_under_its_digest(tmp_path: Path, data: Path) -> None:
    made(write(tmp_path / "a.jsonl", TEXTS), "x")
    path = data / "x" / "train.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(InvalidError, match=r"train\.bin: expected the digest .* the corpus changed under its name"):
        corpus.load("data:x")
    (data / "x" / "corpus.json").write_text("{}")
    with pytest.raises(MalformedError, match="prepare it again"):
        corpus.load("data:x")
    with pytest.raises(UsageError, match="the corpus x is prepared"):
        made(tmp_path / "a.jsonl", "x")


def test_a_source_that_changes(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", TEXTS)

    def change() -> None:
        with path.open("rb+") as file:
            file.seek(20)
            file.write(b"X")

    with pytest.raises(InvalidError, match="changed while they were read"):
        made(path, "x", progress=lambda documents, tokens: change())
    assert not list(data.iterdir()), "nothing is left"
    write(path, TEXTS)
    monkeypatch.setattr(prepare, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(prepare, "_AT_ONCE", 16)
    with pytest.raises(KeyboardInterrupt):
        made(path, "x", progress=Stop(3))
    write(path, TEXTS[1:])
    with pytest.raises(UsageError, match="an unfinished corpus of another source"):
        made(path, "x")


def spoiled(path: Path, change) -> Path:
    path.write_bytes(change(path.read_bytes()))
    return path


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("a.parquet", lambda data: data[:-200], "expected a whole parquet file"),
        ("a.jsonl.gz", lambda data: data[:-50], "cannot be read to its end"),
        ("a.jsonl", lambda data: data.replace(b'{"text": "Document 200', b'{"text" "Document 200'), "line 201: expected JSON"),
        ("a.jsonl", lambda data: data.replace(b'{"text": "Document 200', b'{"x": "Document 200'), "line 201: expected a text"),
        ("a.txt", lambda data: data[:200], "at least 20 different documents"),
    ],
)  # fmt: skip
def test_a_broken_source_leaves_nothing(tmp_path: Path, data: Path, name: str, change, message: str) -> None:
    path = spoiled(write(tmp_path / name, TEXTS), change)
    with pytest.raises(MalformedError, match=message):
        made(path, "x")
    assert not data.exists() or not list(data.iterdir())


def test_a_bpe_is_the_same_file_for_the_same_text_and_gives_the_text_back(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*TEXTS, "it spells <|endoftext|> out"])
    found = prepare.prepare(sources.open_source(str(path)), "x", tokenizer=300)
    assert found.digest == prepare.prepare(sources.open_source(str(path)), "y", tokenizer=300).digest
    assert (found.tokenizer.vocab_size, found.tokens["train"].dtype) == (300, np.dtype("<u2"))
    ends = found.ends["train"].astype(int)
    first = found.tokens["train"][: ends[0]].tolist()
    assert first[-1] == found.tokenizer.boundary and found.tokenizer.decode(first[:-1]) == TEXTS[0]
    assert (found.tokens["train"] == found.tokenizer.boundary).sum() == len(ends), "the text's own spelling is none"
    text = corpus.load("data:x")
    assert text.bytes_per_token > 1.5
    held_out = "".join([*[*dict.fromkeys(TEXTS)][19::20], "it spells <|endoftext|> out"])
    ratio = len(held_out.encode()) / len(held_out)
    assert text.bytes_per_token / text.characters_per_token == pytest.approx(ratio)
    tokenizer = open_tokenizer(str(tmp_path / "data" / "x" / "tokenizer.json"))
    assert isinstance(tokenizer, Subwords) and tokenizer.sha256 == found.tokenizer.sha256


@pytest.mark.parametrize(
    ("word", "error", "message"),
    [
        ("bpe:x", UsageError, "expected bpe:SIZE"),
        ("bpe:100", UsageError, "a vocabulary of 258"),
        ("/nonexistent", UsageError, "expected bytes, bpe:SIZE, a tokenizer.json"),
        (__file__, MalformedError, "expected a tokenizer.json"),
    ],
)
def test_a_tokenizer_that_is_none(word: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        open_tokenizer(word)


def test_installed_packages_are_a_source_without_our_own() -> None:
    files = sources.installed()
    assert any(path.parts[-2:] == ("numpy", "__init__.py") for path in files)
    assert not any("papers" in path.parts and "emoe" in path.parts for path in files)


def test_the_hub_is_pinned_and_its_absence_is_one_line(tmp_path: Path) -> None:
    for name, dataset in sources.DATASETS.items():
        assert len(dataset.revision) == 40, name
    with pytest.raises(UsageError, match="expected --revision with the dataset's full commit"):
        sources.open_source("hub:owner/name")
    with pytest.raises(UsageError, match="a full commit of 40 hexadecimal digits, found 'main'"):
        sources.open_source("c4", revision="main")
    with pytest.raises(UsageError, match=r"expected installed, fineweb-edu, c4, tinystories, hub:"):
        sources.open_source("wikipedia")
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "REPRO_DATA": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
    done = repro("data", "prepare", "tinystories", env=nowhere)
    assert done.returncode == 5
    assert done.stderr.decode().count("\n") == 1
    assert "roneneldan/TinyStories at f54c09fd2331: the hub cannot be reached" in done.stderr.decode()
    assert not list(tmp_path.glob("*.part"))
