"""Corpora: real text on every machine, named by what they are and identified by a digest.

- `stdlib`: the Python sources of the running interpreter's standard library, without its tests
- `stdlib:prose`: what stands between triple quotes there, English documentation for the most part; a file's is held out
  where `stdlib` holds that file out, so that neither corpus trains on what the other holds out
- `file:PATH`: a text file (its last twentieth is held out) or a folder of files (every twentieth file is)
- `installed`: the Python sources of the packages installed beside this interpreter, hundreds of megabytes
- `data:NAME`: what `repro data prepare` tokenized, memory-mapped; `data:NAME@TOKENS` its first whole documents that hold
  as many training tokens
- `synthetic` or `synthetic:SEED`: a seeded Markov source over bytes, the same everywhere, with a known entropy
- `classification` or `classification:SEED`: records of `RECORD_INPUTS` input bytes and one of `RECORD_CLASSES` classes, the same
  everywhere, for a model that predicts the last byte of a record from the others

Tokens are bytes, but for those of `data:`, which may bring a tokenizer. A document that occurs twice is taken once, so no
held-out document has a copy in the training part.
"""

import hashlib
import math
import re
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from records.errors import UsageError

HELD_OUT_EVERY = 20
_BOUNDARY = b"\0"  # between documents; text does not contain it
_SYNTHETIC_DOCUMENTS, _SYNTHETIC_LENGTH = 80, 16_384
_SYNTHETIC_STATES, _SYNTHETIC_BRANCHES = 64, 8
RECORD_INPUTS, RECORD_CLASSES = 64, 10
_RECORDS, _RECORDS_HELD_OUT = 65_536, 4_096
_PROTOTYPES, _KEPT = 4, 96  # of a class; of 256: how often an input is the prototype's

Bytes = npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
Ends = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Training and held-out tokens, disjoint by document; bytes, unless `data:` brings a tokenizer.

    `documents` counts both parts. `bytes_per_token` and `characters_per_token` are those of the held-out part: a loss in
    nats/token divided by them and by log 2 is bits per byte and bits per character.
    `digest` is the SHA-256 over the sorted digests of both parts' documents: equal digests mean equal data. `entropy` is
    the source's entropy rate in nats/byte where it is known (`synthetic`), a floor that no model can beat.
    """

    name: str
    digest: str
    train: Bytes
    held_out: Bytes
    documents: int
    entropy: float | None = None
    vocab_size: int = 256
    tokenizer_sha256: str | None = None
    bytes_per_token: float = 1.0
    characters: int | None = None
    ends: Ends | None = None
    """Number of training tokens up to the end of each document, where that is known (`data:`)."""

    @property
    def characters_per_token(self) -> float:
        """Unicode characters of the held-out part by its tokens, where tokens are bytes: those that continue none."""
        if self.characters is not None:
            return self.characters / len(self.held_out)
        return float(np.count_nonzero((self.held_out & 0xC0) != 0x80)) / len(self.held_out)

    def epochs(self, tokens: int) -> float:
        """How often training on `tokens` tokens goes through the corpus."""
        return tokens / len(self.train)


class NotPreparedError(UsageError):
    """A corpus that is not on this machine: a file that is not there, or what `repro data prepare` has not made yet."""


@lru_cache(maxsize=4)
def load(name: str) -> Corpus:
    """Corpus called `name`.

    Raises:
        UsageError: no such corpus, an unreadable path, or too little text to hold some out.
        InvalidError: a prepared corpus that changed since.
    """
    kind, _, rest = name.partition(":")
    if name == "stdlib":
        return _by_document(name, _stdlib())
    if name == "installed":
        from repro.data.sources import installed

        return _by_document(name, (path.read_bytes() for path in installed()))
    if kind == "data" and rest:
        return _prepared(name, *rest.partition("@")[::2])
    if name == "stdlib:prose":
        return _by_document(name, _stdlib(), take=_prose)
    if kind == "file" and rest:
        path = Path(rest)
        try:
            if path.is_dir():
                return _by_document(name, (file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()))
            return _single_file(name, path.read_bytes())
        except OSError as error:
            raise NotPreparedError(f"corpus {name}: cannot read {error.filename or path}: {error.strerror}") from error
    if kind == "synthetic":
        if rest and not rest.isdecimal():
            raise UsageError(f"corpus {name}: expected synthetic:SEED with a whole number, found {rest!r}")
        # every state has eight equally likely followers, so the entropy rate is log 8 whatever the seed
        return _by_document(name, _synthetic(int(rest or 0)), entropy=math.log(_SYNTHETIC_BRANCHES))
    if kind == "classification":
        if rest and not rest.isdecimal():
            raise UsageError(f"corpus {name}: expected classification:SEED with a whole number, found {rest!r}")
        return _classification(name, int(rest or 0))
    raise UsageError(
        f"unknown corpus {name!r}: expected stdlib, stdlib:prose, installed, file:PATH, data:NAME, synthetic[:SEED] or "
        "classification[:SEED]"
    )


def _prepared(name: str, folder: str, tokens: str) -> Corpus:
    from repro.data.prepare import read

    found = read(folder)
    train, ends, digest = found.tokens["train"], found.ends["train"], found.digest
    if tokens:
        if not tokens.isdecimal() or not 0 < int(tokens) <= len(train):
            raise UsageError(f"corpus {name}: expected 1 to {len(train)} tokens after @, found {tokens!r}")
        documents = int(np.searchsorted(ends, int(tokens))) + 1
        train, ends = train[: int(ends[documents - 1])], ends[:documents]
        digest = hashlib.sha256(f"{digest} {documents}".encode()).hexdigest()
    held_out = found.record["parts"]["held_out"]
    return Corpus(
        name=name,
        digest=digest,
        train=train,
        held_out=found.tokens["held_out"],
        documents=len(ends) + held_out["documents"],
        vocab_size=found.tokenizer.vocab_size,
        tokenizer_sha256=found.tokenizer.sha256,
        bytes_per_token=held_out["bytes"] / held_out["tokens"],
        characters=held_out["characters"],
        ends=ends,
    )


def _by_document(
    name: str,
    documents: Iterable[bytes],
    *,
    entropy: float | None = None,
    take: Callable[[bytes], bytes] | None = None,
) -> Corpus:
    """Every twentieth document held out; with `take`, then that part of each document, where it is not empty."""
    unique = {hashlib.sha256(text).hexdigest(): text for text in documents if text}
    if len(unique) < HELD_OUT_EVERY:
        raise UsageError(
            f"corpus {name}: expected at least {HELD_OUT_EVERY} different documents (every {HELD_OUT_EVERY}th is held out), "
            f"found {len(unique)}"
        )
    parts: tuple[list[str], list[str]] = ([], [])
    for index, digest in enumerate(unique):
        parts[index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1].append(digest)
    if take:
        unique, parts = _taken(unique, parts, take)
    train, held_out = (np.frombuffer(_BOUNDARY.join(unique[d] for d in part), dtype=np.uint8) for part in parts)
    return Corpus(
        name=name, digest=_digest(*parts), train=train, held_out=held_out, documents=len(unique), entropy=entropy
    )


def _taken(
    documents: dict[str, bytes], parts: tuple[list[str], list[str]], take: Callable[[bytes], bytes]
) -> tuple[dict[str, bytes], tuple[list[str], list[str]]]:
    """A part of each document: text by digest, and the digests of the two parts; what was trained on is not held out."""
    taken: dict[str, bytes] = {}
    found: tuple[list[str], list[str]] = ([], [])
    for number, part in enumerate(parts):
        for text in (take(documents[digest]) for digest in part):
            digest = hashlib.sha256(text).hexdigest()
            if text and digest not in taken:
                taken[digest] = text
                found[number].append(digest)
    return taken, found


def _single_file(name: str, text: bytes) -> Corpus:
    cut = len(text) - len(text) // HELD_OUT_EVERY
    parts = text[:cut], text[cut:]
    if not parts[1]:
        raise UsageError(f"corpus {name}: expected at least {HELD_OUT_EVERY} bytes, found {len(text)}")
    train, held_out = (np.frombuffer(part, dtype=np.uint8) for part in parts)
    digests = [[hashlib.sha256(part).hexdigest()] for part in parts]
    return Corpus(name=name, digest=_digest(*digests), train=train, held_out=held_out, documents=1)


def _digest(train: list[str], held_out: list[str]) -> str:
    lines = [f"train {digest}\n" for digest in train] + [f"held-out {digest}\n" for digest in held_out]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _stdlib() -> Iterable[bytes]:
    root = Path(sysconfig.get_path("stdlib"))
    # site-packages lies inside the standard library's folder; lib2to3 and idlelib keep tests beside their code
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        # _sysconfigdata holds the paths and flags of one machine's build, not text of the library
        if left_out.isdisjoint(path.relative_to(root).parts) and not path.name.startswith("_sysconfigdata"):
            yield path.read_bytes()


_TRIPLE_QUOTED = re.compile(rb'"""(.*?)"""|\'\'\'(.*?)\'\'\'', re.DOTALL)


def _prose(source: bytes) -> bytes:
    """What stands between triple quotes, in order; found by the quotes alone, so that no parser's version matters."""
    texts = ((match[1] or match[2] or b"").strip() for match in _TRIPLE_QUOTED.finditer(source))
    return b"\n\n".join(text for text in texts if text)


def _random_bytes(count: int, *labels: object) -> bytes:
    """SHA-256 in counter mode: random bytes that are the same on every machine and library version."""
    prefix = "/".join(str(label) for label in ("repro.synthetic/v1", *labels))
    blocks = (hashlib.sha256(f"{prefix}/{counter}".encode()).digest() for counter in range(-(-count // 32)))
    return b"".join(blocks)[:count]


def _transitions(seed: int) -> list[list[int]]:
    """For each of the 64 states the eight that may follow it, equally likely.

    Row s always holds s+1, so that every state can be reached from every other; the rest is drawn without repetition.
    """
    rows = []
    for state in range(_SYNTHETIC_STATES):
        row = [(state + 1) % _SYNTHETIC_STATES]
        for byte in _random_bytes(1024, seed, "transitions", state):
            if len(row) < _SYNTHETIC_BRANCHES and byte % _SYNTHETIC_STATES not in row:
                row.append(byte % _SYNTHETIC_STATES)
        rows.append(row)
    return rows


def _synthetic(seed: int) -> Iterable[bytes]:
    rows = _transitions(seed)
    to_text = bytes(ord("0") + state if state < _SYNTHETIC_STATES else 0 for state in range(256))
    for document in range(_SYNTHETIC_DOCUMENTS):
        draws = _random_bytes(_SYNTHETIC_LENGTH, seed, "document", document)
        state = draws[0] % _SYNTHETIC_STATES
        states = bytearray()
        for draw in draws:
            states.append(state)
            state = rows[state][draw % _SYNTHETIC_BRANCHES]
        yield bytes(states).translate(to_text)


def _classification(name: str, seed: int) -> Corpus:
    """Records whose class has several prototypes: each input byte is the prototype's, or, more often, any other.

    A byte comes before the first record, so that a window of RECORD_INPUTS + 1 tokens is the class of the record before,
    which a model is not to look at, and a record's inputs; its last next token is the record's class.
    """
    count = _RECORDS + _RECORDS_HELD_OUT
    prototypes = np.frombuffer(
        _random_bytes(RECORD_CLASSES * _PROTOTYPES * RECORD_INPUTS, seed, "prototypes"), dtype=np.uint8
    ).reshape(-1, RECORD_INPUTS)
    # a stream that numpy's policy fixes
    raw = np.random.Philox(key=seed).random_raw(count * (2 * RECORD_INPUTS + 8) // 8)
    draws = np.frombuffer(raw.astype("<u8").tobytes(), dtype=np.uint8).reshape(count, 2 * RECORD_INPUTS + 8)
    noise, kept, which = draws[:, :RECORD_INPUTS], draws[:, RECORD_INPUTS : 2 * RECORD_INPUTS], draws[:, -2:]
    chosen = which.astype(np.int64) @ np.array([256, 1]) % len(prototypes)
    inputs = np.where(kept < _KEPT, prototypes[chosen], noise)
    classes = (chosen % RECORD_CLASSES).astype(np.uint8)
    records = np.concatenate([inputs, classes[:, None]], axis=1)
    parts = [
        np.concatenate([np.zeros(1, np.uint8), part.reshape(-1)]) for part in (records[:_RECORDS], records[_RECORDS:])
    ]
    digests = [[hashlib.sha256(part.tobytes()).hexdigest()] for part in parts]
    return Corpus(name=name, digest=_digest(*digests), train=parts[0], held_out=parts[1], documents=count)
