"""Strict JSON and the canonical form: what is refused, that time is linear, and that what is written reads back."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from records import canonical
from records.errors import MalformedError

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-canonical.MAX_INT, canonical.MAX_INT) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_what_is_written_reads_back_and_is_written_the_same(value: object) -> None:
    data = canonical.dumps(value)
    assert canonical.loads(data) == value
    assert canonical.dumps(canonical.loads(data)) == data
    assert data == json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


@given(VALUES)
def test_spelling_does_not_change_the_digest(value: object) -> None:
    spelled = json.dumps(value, indent=2, ensure_ascii=True).encode()
    assert canonical.digest(canonical.loads(spelled)) == canonical.digest(value)


@given(st.binary(max_size=200))
@settings(max_examples=300)
def test_junk_is_refused_with_one_error(data: bytes) -> None:
    try:
        canonical.loads(data)
    except MalformedError as error:
        assert str(error).startswith("strict JSON: ") and "\n" not in str(error)


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":1,"a":1}',
        b'{"a":1,"\\u0061":2}',
        b'{"x":{"b":1,"b":2}}',
        b"NaN",
        b"[Infinity]",
        b"-Infinity",
        b"1e400",
        b"1.0",
        b"1E2",
        b"-0",
        b"[-0]",
        b"9007199254740992",
        b"-9007199254740992",
        b"9" * 5000,
        b"\xef\xbb\xbf{}",
        '{"a":1}'.encode("utf-16"),
        '{"a":1}'.encode("utf-16-le"),
        b'"\\ud800"',
        b'{"\\udc00":1}',
        b'"\xed\xa0\x80"',
        b'"\xff"',
        b'"\x01"',
        b"{} x",
        b"",
        b"[1,]",
        b"'a'",
    ],
)
def test_refused(data: bytes) -> None:
    with pytest.raises(MalformedError):
        canonical.loads(data)


def test_faults_are_placed_the_same_on_every_python() -> None:
    places = {
        b"[1 2]": "1 column 4",
        b"[1,]": "1 column 3",
        b'{"a":1 ,\n}': "1 column 8",
        b"\n [": "2 column 3",
        b"": "1 column 1",
    }
    for data, place in places.items():
        with pytest.raises(MalformedError, match=f"line {place}$"):
            canonical.loads(data)


def test_edges_that_are_allowed() -> None:
    assert canonical.loads(b"[9007199254740991,-9007199254740991,0]") == [canonical.MAX_INT, -canonical.MAX_INT, 0]
    assert canonical.loads(b'"\\ud83d\\ude00"') == "\N{GRINNING FACE}"
    assert canonical.loads(b" {}\r\n\t") == {}


def test_depth_is_64_and_brackets_in_strings_do_not_count() -> None:
    assert canonical.loads(b"[" * 64 + b"]" * 64)
    for bomb in (b"[" * 65 + b"]" * 65, b"[" * 5_000_000, b'{"a":' * 1_000_000):
        with pytest.raises(MalformedError, match="64 levels"):
            canonical.loads(bomb)
    brackets = json.dumps(["[" * 1000 + '"\\'] * 3).encode()
    assert canonical.loads(brackets)[0] == "[" * 1000 + '"\\'
    assert canonical.loads(b"[" + b"[]," * 1000 + b"[]]")


@pytest.mark.parametrize("piece", [b'\\"', b"[", b'"', b"9", b"\\", b'"a":', b"[]"])
def test_time_is_linear(piece: bytes) -> None:
    """Ten times the input takes nowhere near a hundred times as long, also for text that never ends."""

    def seconds(size: int) -> float:
        # Enough brackets in front that the depth is looked at, and then a string that never ends.
        data = b"[" + b"[]," * 70 + b'"' + piece * (size // len(piece))
        start = time.process_time()  # its own: other processes' turns are no time of the parser's
        with pytest.raises(MalformedError):
            canonical.loads(data)
        return time.process_time() - start

    small, large = (min(seconds(size) for _ in range(3)) for size in (20_000, 200_000))
    assert large < 40 * max(small, 0.001)


def test_a_byte_order_mark_is_named() -> None:
    with pytest.raises(MalformedError, match="byte order mark"):
        canonical.loads(b"\xef\xbb\xbf{}")


def test_size_limit() -> None:
    with pytest.raises(MalformedError, match="at most 10 bytes"):
        canonical.loads(b" " * 11, max_bytes=10)


@pytest.mark.parametrize("value", [1.0, float("nan"), {1: 2}, "\ud800", {"\udc00": 1}, 2**53, b"x", {1, 2}, [object()]])
def test_values_that_cannot_be_hashed(value: object) -> None:
    with pytest.raises(MalformedError):
        canonical.dumps(value)


def test_a_cycle_is_refused() -> None:
    cycle: list[object] = []
    cycle.append(cycle)
    with pytest.raises(MalformedError, match="64 levels"):
        canonical.dumps(cycle)
