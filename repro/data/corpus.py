"""Corpora: real text on every machine, named by what they are and identified by a digest.

- `stdlib`: the Python sources of the running interpreter's standard library, without its tests
- `stdlib:prose`: what stands between triple quotes there, English documentation for the most part; a file's is held out
  where `stdlib` holds that file out, so that neither corpus trains on what the other holds out
- `file:PATH`: a text file (its last twentieth is held out) or a folder of files (every twentieth file is)
- `synthetic` or `synthetic:SEED`: a seeded Markov source over bytes, the same everywhere, with a known entropy

Tokens are bytes. A document that occurs twice is taken once, so no held-out document has a copy in the training part.
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

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Training and held-out tokens, disjoint by document; bytes, unless `data:` brings a tokenizer.

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


class NotPreparedError(UsageError):
    """A corpus that `repro data prepare` has not made on this machine."""


@lru_cache(maxsize=4)
def load(name: str) -> Corpus:
    """Corpus called `name`.

    Raises:
        UsageError: no such corpus, an unreadable path, or too little text to hold some out.
    """
    kind, _, rest = name.partition(":")
    if name == "stdlib":
        return _by_document(name, _stdlib())
    if name == "stdlib:prose":
        return _by_document(name, _stdlib(), take=_prose)
    if kind == "file" and rest:
        path = Path(rest)
        try:
            if path.is_dir():
                return _by_document(name, (file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()))
            return _single_file(name, path.read_bytes())
        except OSError as error:
            raise UsageError(f"corpus {name}: cannot read {error.filename or path}: {error.strerror}") from error
    if kind == "synthetic":
        if rest and not rest.isdecimal():
            raise UsageError(f"corpus {name}: expected synthetic:SEED with a whole number, found {rest!r}")
        # every state has eight equally likely followers, so the entropy rate is log 8 whatever the seed
        return _by_document(name, _synthetic(int(rest or 0)), entropy=math.log(_SYNTHETIC_BRANCHES))
    raise UsageError(f"unknown corpus {name!r}: expected stdlib, stdlib:prose, file:PATH or synthetic[:SEED]")


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
