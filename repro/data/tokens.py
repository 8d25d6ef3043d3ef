"""Tokenizers: bytes, a byte-level BPE trained here, or the tokenizer.json of a public checkpoint.

- `Tokenizer`: documents (UTF-8) to token ids, each document to be followed by `boundary`
- `train_bpe`: a byte-level BPE from a corpus' own text; the same text gives the same file
- `open_tokenizer`: from what `repro data prepare --tokenizer` was told
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from records.errors import MalformedError, UsageError

Tokens = npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
END = "<|endoftext|>"
_ENDS = (END, "</s>", "<eos>", "<|end_of_text|>")  # what public tokenizers call the end of a document


class Tokenizer:
    """Bytes as tokens; `boundary` is the zero byte, which text does not contain."""

    vocab_size = 256
    boundary = 0
    data = b""
    """The tokenizer.json that this is, empty for bytes."""

    def encode(self, documents: Sequence[bytes]) -> list[Tokens]:
        """Token ids of each document, of the narrowest type that holds the vocabulary."""
        return [np.frombuffer(text, dtype=np.uint8) for text in documents]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids; what is no UTF-8 becomes U+FFFD."""
        return bytes(tokens).decode(errors="replace")

    @property
    def dtype(self) -> "np.dtype[Any]":
        """Little-endian type that token ids are stored in."""
        return np.dtype("<u1" if self.vocab_size <= 256 else "<u2" if self.vocab_size <= 65_536 else "<u4")

    @property
    def sha256(self) -> str | None:
        """Digest of the tokenizer.json; None for bytes."""
        return hashlib.sha256(self.data).hexdigest() if self.data else None


class Subwords(Tokenizer):
    """A tokenizer.json, as the `tokenizers` library has it.

    Raises:
        MalformedError: no such file, or none with a token that ends documents (`end`, or one of the usual names).
    """

    def __init__(self, data: bytes, *, end: str | int | None = None, name: str = "tokenizer.json") -> None:
        library = _library()
        try:
            self._tokenizer = library.Tokenizer.from_str(data.decode())
        except Exception as error:  # the library raises bare Exceptions
            raise MalformedError(f"{name}: expected a tokenizer.json, found {error}") from error
        self._tokenizer.encode_special_tokens = True  # a document that spells a special token does not contain it
        self.data = data
        self.vocab_size = self._tokenizer.get_vocab_size()
        ids = (
            [end] if isinstance(end, int) else [self._tokenizer.token_to_id(text) for text in ([end] if end else _ENDS)]
        )
        known = [number for number in ids if number is not None and 0 <= number < self.vocab_size]
        if not known:
            raise MalformedError(
                f"{name}: expected a token that ends documents, {end or ' or '.join(_ENDS)}; found none"
            )
        self.boundary = known[0]

    def encode(self, documents: Sequence[bytes]) -> list[Tokens]:
        texts = [text.decode(errors="replace") for text in documents]
        found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(item.ids, dtype=self.dtype) for item in found]

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=False)
        return text


def train_bpe(documents: Iterable[bytes], vocab_size: int) -> Subwords:
    """A byte-level BPE of `vocab_size` tokens: 256 bytes, the merges, and `<|endoftext|>`."""
    library = _library()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.decode(errors="replace") for text in documents), trainer)
    return Subwords(tokenizer.to_str().encode())


def open_tokenizer(word: str) -> Tokenizer | int:
    """What `word` names: `bytes`, a tokenizer.json or a checkpoint's folder with one; `bpe:SIZE` gives SIZE, to be trained.

    Raises:
        UsageError: none of these.
    """
    if word == "bytes":
        return Tokenizer()
    kind, _, size = word.partition(":")
    if kind == "bpe":
        if not size.isdecimal() or not 257 < int(size) <= 2**20:
            raise UsageError(
                f"tokenizer {word!r}: expected bpe:SIZE with a vocabulary of 258 to 1048576, found {size!r}"
            )
        return int(size)
    path, end = Path(word), None
    if path.is_dir():
        end, path = _end_of(path), path / "tokenizer.json"
    try:
        return Subwords(path.read_bytes(), end=end, name=str(path))
    except OSError as error:
        raise UsageError(
            f"tokenizer {word!r}: expected bytes, bpe:SIZE, a tokenizer.json or a folder with one ({error.strerror})"
        ) from error


def _end_of(folder: Path) -> int | None:
    """The checkpoint's own end-of-text token, as its config.json has it."""
    try:
        found = json.loads((folder / "config.json").read_bytes())["eos_token_id"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    found = found[0] if isinstance(found, list) and found else found
    return found if type(found) is int else None


def _library() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise UsageError("tokenizers other than bytes need another package: pip install 'pith-repro[eval]'") from error
    return tokenizers
