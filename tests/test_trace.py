"""The hash chain: what it holds together, and that every kind of tampering breaks it."""

import hashlib
from pathlib import Path

import pytest

from records import canonical
from records.errors import InvalidError, MalformedError
from repro.trace import TraceWriter, check_chain, genesis

START = genesis("11" * 32, "22" * 32)


def _write(path: Path, count: int, *, keep: int = 0) -> TraceWriter:
    with TraceWriter(path, START, keep=keep) as trace:
        for step in range(keep + 1, count + 1):
            trace.append({"type": "step", "step": step, "loss": "1.5"})
    return trace


def test_a_chain_is_what_its_docstring_says(tmp_path):
    trace = _write(tmp_path / "t", 2)
    first, second = ({"type": "step", "step": step, "loss": "1.5"} for step in (1, 2))
    head = hashlib.sha256(bytes.fromhex(START) + canonical.dumps(first)).digest()
    head = hashlib.sha256(head + canonical.dumps(second)).digest()
    assert trace.head == head.hex()
    assert check_chain((tmp_path / "t").read_bytes(), START) == ([first, second], head.hex())


def test_an_interrupted_trace_goes_on_to_the_same_bytes(tmp_path):
    _write(tmp_path / "whole", 6)
    _write(tmp_path / "cut", 5)
    with (tmp_path / "cut").open("ab") as file:
        file.write(b'{"chain":"half a li')  # what a kill leaves behind
    _write(tmp_path / "cut", 6, keep=3)
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()


def test_lines_that_the_checkpoint_stands_on_must_be_there(tmp_path):
    _write(tmp_path / "t", 2)
    with pytest.raises(InvalidError, match="expected the 3 lines before the checkpoint, found 2"):
        TraceWriter(tmp_path / "t", START, keep=3)


@pytest.mark.parametrize("line", [0, 1, 2])
def test_every_changed_line_is_found(tmp_path, line):
    _write(tmp_path / "t", 3)
    lines = (tmp_path / "t").read_bytes().splitlines(keepends=True)
    lines[line] = lines[line].replace(b'"loss":"1.5"', b'"loss":"1.4"')
    with pytest.raises(InvalidError, match=f"line {line + 1}: the chain is broken"):
        check_chain(b"".join(lines), START)


def test_a_chain_recomputed_from_another_start_is_refused(tmp_path):
    _write(tmp_path / "t", 3)
    for other in (genesis("33" * 32, "22" * 32), genesis("11" * 32, "33" * 32)):
        with pytest.raises(InvalidError, match="line 1"):
            check_chain((tmp_path / "t").read_bytes(), other)


@pytest.mark.parametrize("junk", [b"\xff\xfe", b"[]", b'{"chain":"00"}', b'{"chain":"00","entry":[]}', b'{"a":1.5}'])
def test_junk_is_malformed_and_says_where(tmp_path, junk):
    _write(tmp_path / "t", 1)
    with pytest.raises(MalformedError, match="line 2"):
        check_chain((tmp_path / "t").read_bytes() + junk + b"\n", START)
