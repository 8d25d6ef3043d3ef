"""`repro data prepare|list|show`: text tokenized once into memory-mapped files, and what is there."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

Subparsers = Any  # argparse gives this type no public name


def add_parser(commands: Subparsers) -> None:
    """Adds the command to `commands`."""
    command = commands.add_parser("data", help="corpora: text tokenized once, memory-mapped, named by digest")
    actions = command.add_subparsers(title="actions", metavar="ACTION", required=True)

    action = actions.add_parser("prepare", help="tokenize a source into the corpus data:NAME; goes on where it stopped")
    action.add_argument(
        "source",
        metavar="SOURCE",
        help="fineweb-edu, c4 or tinystories (from the hub), hub:OWNER/NAME[:CONFIG], installed, a file or a folder "
        "(parquet, JSONL, text)",
    )
    action.add_argument("--name", help="name of the corpus (default: that of the source)")
    action.add_argument(
        "--tokenizer", default="bytes", metavar="T", help="bytes (default), bpe:SIZE (trained here), a tokenizer.json or "
        "a checkpoint's folder",
    )  # fmt: skip
    action.add_argument(
        "--tokens", type=_positive, metavar="N", help="stop after the document with the Nth training token"
    )
    action.add_argument("--text", default="text", metavar="FIELD", help="field that holds a document (default: text)")
    action.add_argument(
        "--split-on", metavar="TEXT", help="what separates documents in text files (default: one a file)"
    )
    action.add_argument("--revision", metavar="COMMIT", help="full commit of the hub's dataset")
    action.set_defaults(func=_prepare)

    action = actions.add_parser("list", help="corpora prepared on this machine")
    action.set_defaults(func=_list)

    action = actions.add_parser("show", help="digest, tokens and documents of a corpus")
    action.add_argument("name", metavar="CORPUS", help="stdlib, installed, file:PATH, data:NAME[@TOKENS], …")
    action.add_argument("--tokens", type=_positive, metavar="N", help="how many epochs N training tokens would take")
    action.add_argument("--json", action="store_true", help="one JSON object")
    action.set_defaults(func=_show)


def _positive(text: str) -> int:
    plain = text.replace("_", "")
    if not plain.isdecimal() or int(plain) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, found {text!r}")
    return int(plain)


def _prepare(arguments: argparse.Namespace) -> int:
    from repro.environment import require_torch

    require_torch()  # numpy comes with the same extra
    from repro.data.prepare import prepare
    from repro.data.sources import open_source
    from repro.data.tokens import open_tokenizer

    name = arguments.name or Path(arguments.source.rpartition(":")[2]).name.partition(".")[0]
    tokenizer = open_tokenizer(arguments.tokenizer)
    source = open_source(
        arguments.source, text=arguments.text, revision=arguments.revision, split_on=arguments.split_on
    )
    try:
        prepare(source, name, tokenizer=tokenizer, tokens=arguments.tokens, progress=_Progress())
    except KeyboardInterrupt:
        print("repro: stopped; the same command goes on", file=sys.stderr)
        return 130
    return _say(f"data:{name}", None, as_json=False)


class _Progress:
    """A line on stderr every few seconds; on a terminal it is written over."""

    def __init__(self) -> None:
        self._began = self._said = time.monotonic()
        self._first: int | None = None
        self._every, self._end = (0.2, "\r") if sys.stderr.isatty() else (10.0, "\n")

    def __call__(self, documents: int, tokens: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = tokens
        if now - self._said > self._every:
            self._said = now
            rate = (tokens - self._first) / (now - self._began)
            print(f"{documents:,} documents, {tokens:,} tokens, {rate:,.0f} tokens/s", end=self._end, file=sys.stderr)


def _list(arguments: argparse.Namespace) -> int:
    from repro.environment import require_torch

    require_torch()
    from repro.data.prepare import names

    for name in names():
        print(f"data:{name}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from repro.environment import require_torch

    require_torch()
    return _say(arguments.name, arguments.tokens, as_json=arguments.json)


def _say(name: str, tokens: int | None, *, as_json: bool) -> int:
    from repro.data import corpus

    found = corpus.load(name)
    facts = {
        "corpus": name,
        "sha256": found.digest,
        "documents": found.documents,
        "train_tokens": len(found.train),
        "held_out_tokens": len(found.held_out),
        "vocabulary": found.vocab_size,
        "bytes_per_token": f"{found.bytes_per_token:.6f}",
        "characters_per_token": f"{found.characters_per_token:.6f}",
    }
    if tokens:
        facts["epochs"] = f"{found.epochs(tokens):.6f}"
    if as_json:
        print(json.dumps(facts))
        return 0
    for key, value in facts.items():
        print(
            f"{key.replace('_', ' '):21} {value:,}" if isinstance(value, int) else f"{key.replace('_', ' '):21} {value}"
        )
    return 0
