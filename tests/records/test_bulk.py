"""Bulk verification gives line for line what single verification gives, in order, in constant memory, on any worker count."""

import base64
import copy
import io
import json
import os
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from record_cases import STORE, bundle_of

from records import bulk, canonical, keys, schema
from records.document import verify_document
from repro.bench.verify import measure, sample_line

KEY = keys.private_key(bytes(range(32)), key_id="bench")
TRUSTED = keys.pinned().with_keys([keys.PublicKey(key_id="bench", raw=KEY.public.raw, source="file")])


def single(line: bytes, number: int, name: str = "f.jsonl", trusted: keys.KeySet = TRUSTED) -> bytes:
    """What `repro verify --json` prints for a line that is a file of its own."""
    return json.dumps(verify_document(line, target=f"{name}:{number}", trusted=trusted).to_json()).encode() + b"\n"


def through(data: bytes, *, workers: int = 1, name: str = "f.jsonl", max_bytes: int = canonical.MAX_BYTES) -> bytes:
    batches = bulk.verify_stream(io.BytesIO(data), trusted=TRUSTED, name=name, workers=workers, max_bytes=max_bytes)
    return b"".join(batch.output for batch in batches)


def variants() -> list[bytes]:
    """Lines that the fast path takes, and the same with one thing changed that it must not let through."""
    lines = [sample_line(1, None), sample_line(2, KEY), (STORE / "X72AYRLPIFP2UVYVUQLNZSTJUW.json").read_bytes()]
    for line in (sample_line(3, None), sample_line(4, KEY)):
        value = json.loads(line)
        lines += [
            json.dumps(value).encode(),
            json.dumps(value, indent=None, ensure_ascii=False, separators=(",", ":")).encode(),
        ]
        changes: list[tuple[tuple[str, ...], Any]] = [
            (("canonical_sha256",), "0" * 64),
            (("pith_number",), "pith:2025:" + value["pith_number"][10:]),
            (("pith_number",), value["pith_number"][:-1] + ("A" if value["pith_number"][-1] != "A" else "B")),
            (("canonical_record", "metadata", "cross_cats_sorted"), ["cs.AI", "cs.AI"]),
            (("canonical_record", "metadata", "cross_cats_sorted"), ["a,a", "a"]),
            (("canonical_record", "metadata", "license"), 'with "quotes" and é'),
            (("canonical_record", "metadata", "license"), "\x7f"),
            (("canonical_record", "metadata", "primary_cat"), ""),
            (("canonical_record", "source", "version"), 0),
            (("canonical_record", "source", "id"), "hep-lat/0305021"),
            (("canonical_record", "schema_version"), "2.0"),
            (("title",), "x"),
        ]
        if "receipt" in value:
            signature = value["receipt"]["signature_b64"]
            changes += [
                (("receipt", "signature_b64"), base64.b64encode(bytes(64)).decode()),
                (("receipt", "signature_b64"), signature[:-3] + chr(ord(signature[-3]) + 1) + "=="),
                (("receipt", "key_id"), "pith-v1-2026-05"),
                (("receipt", "key_id"), "nobody"),
                (("receipt", "public_key_fingerprint"), "0" * 32),
                (("receipt", "canonical_sha256"), "0" * 64),
                (("receipt", "signed_at"), "yesterday"),
                (("receipt", "algorithm"), "rsa"),
                (("receipt",), None),
            ]
        for path, new in changes:
            changed = copy.deepcopy(value)
            place = changed
            for name in path[:-1]:
                place = place[name]
            place[path[-1]] = new
            rehashed = copy.deepcopy(changed)
            rehashed["canonical_sha256"] = canonical.digest(rehashed["canonical_record"])
            lines += [canonical.dumps(changed), canonical.dumps(rehashed)]
    return [*lines, b"{}", b"[]", b"nonsense", b"\xff", b'{"a":1,"a":1}', b"{" + b" " * 50]


def test_every_line_is_answered_as_it_is_alone() -> None:
    verifier = bulk.LineVerifier(trusted=TRUSTED, name="f%d.jsonl")
    for order in range(3):
        lines = variants()
        random.Random(order).shuffle(lines)
        found = verifier.lines([line.rstrip(b"\n") for line in lines], 1)
        for number, line in enumerate(lines, 1):
            assert found[number - 1] == single(line, number, "f%d.jsonl"), line


def test_the_fast_path_is_taken_and_only_for_lines_that_pass() -> None:
    verifier = bulk.LineVerifier(trusted=TRUSTED, name="f")
    taken = [line for line in variants() if verifier._fast(line.rstrip(b"\n"), 1) is not None]
    assert sample_line(1, None) in taken and sample_line(2, KEY) in taken
    for line in taken:  # all but the signature holds: that is looked at in the end
        failing = {c["code"] for c in json.loads(single(line, 1))["checks"] if c["status"] == "fail"}
        assert failing <= {"receipt_signature"}


def test_a_key_with_a_period_is_never_on_the_fast_path() -> None:
    limited = keys.PublicKey(key_id="bench", raw=KEY.public.raw, source="file", valid_until="2026-01-01T00:00:00Z")
    trusted = TRUSTED.with_keys([limited])
    line = sample_line(1, KEY)
    (found,) = bulk.LineVerifier(trusted=trusted, name="f.jsonl").lines([line], 1)
    assert found == single(line, 1, trusted=trusted) and json.loads(found)["state"] == "invalid"


@pytest.mark.parametrize("workers", [1, 2])
def test_order_blank_lines_and_failures(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "CHUNK_BYTES", 5000)
    lines = [*variants(), b"", b"  \r", *variants()]
    lines = [line.strip() for line in lines]
    data = b"\n".join(lines)
    expected = [single(line, number) for number, line in enumerate(lines, 1) if line]
    assert through(data, workers=workers).splitlines(keepends=True) == expected


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n"])
def test_the_last_line(ending: bytes) -> None:
    assert through(sample_line(1, None).strip() + ending) == single(sample_line(1, None), 1)
    assert through(b"") == b""


def test_lines_beyond_the_limit_are_reported_and_skipped_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "CHUNK_BYTES", 1000)
    good = sample_line(1, None)
    for size in (1001, 1999, 2000, 5000, 123_456):
        long = b'"' + b"x" * (size - 2) + b'"'
        found = [json.loads(line) for line in through(good + long + b"\n" + good + long, max_bytes=1000).splitlines()]
        assert [(entry["state"], entry["target"]) for entry in found] == [
            ("valid", "f.jsonl:1"), ("malformed", "f.jsonl:2"), ("valid", "f.jsonl:3"), ("malformed", "f.jsonl:4"),
        ]  # fmt: skip
        assert f"found {size}" in found[1]["checks"][0]["detail"]


class Endless(io.RawIOBase):
    """A stream of `size` bytes that repeats `pattern` and holds none of it."""

    def __init__(self, pattern: bytes, size: int) -> None:
        self.pattern, self.at, self.end = pattern, 0, size

    def read(self, size: int = -1) -> bytes:
        size, start = min(size, self.end - self.at), self.at % len(self.pattern)
        self.at += size
        return (self.pattern * (size // len(self.pattern) + 2))[start : start + size]


@pytest.mark.parametrize("pattern", [b"x", sample_line(1, None)])
def test_memory_is_constant(pattern: bytes) -> None:
    stream = Endless(pattern, 20_000_000)
    tracemalloc.start()
    try:
        for _ in bulk.verify_stream(stream, trusted=TRUSTED, name="f", workers=1, max_bytes=1_000_000):  # type: ignore[arg-type]
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12_000_000


def test_the_predicate_says_what_jsonschema_says() -> None:
    """The compiled schema against jsonschema itself, over every single replacement in documents of every form."""
    signed = json.loads((STORE / "X72AYRLPIFP2UVYVUQLNZSTJUW.json").read_bytes())
    key = keys.pinned().keys[0].to_json()
    mirror = {
        "name": "m",
        "mirror_type": "https",
        "base_url": "https://m",
        "bundle_pattern": "https://m",
        "public_key": key,
    }
    documents: dict[str, Any] = {
        "record": signed,
        "bundle": bundle_of(signed),
        "graph": signed["graph_snapshot"],
        "key": key,
        "mirrors": {"manifest_type": "pith_mirror_manifest", "manifest_version": "1.0", "mirrors": [mirror]},
        "canonical_record": signed["canonical_record"],
        "alias": signed["aliases"][0],
    }
    junk: list[Any] = [None, True, 0, -1, "", "x\n", "a" * 64, "a" * 64 + "\n", [], ["x", "x"], [{}], {}, {"x": 1}]
    disagreements, compared = [], 0
    for form, document in documents.items():
        assert schema.predicate(form)(document) and schema.faults(form, document) == []
        for path in paths(document):
            for new in (*junk, ...):
                changed = copy.deepcopy(document)
                place = changed
                for name in path[:-1]:
                    place = place[name]
                if new is ... and isinstance(place, dict):
                    del place[path[-1]]
                elif new is not ...:
                    place[path[-1]] = new
                compared += 1
                if schema.predicate(form)(changed) != schema.validator(form).is_valid(changed):
                    disagreements.append((form, path, new))
    assert disagreements == [] and compared > 1000


def paths(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if len(above) > 3:
        return []
    items = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    return [path for name, inner in items for path in [(*above, name), *paths(inner, (*above, name))]]


def test_a_keyword_that_the_predicate_does_not_know_is_an_error() -> None:
    with pytest.raises(NotImplementedError):
        schema._compiled({"multipleOf": 2}, {})


def test_bench_measures() -> None:
    found = measure(lines=20, rounds=2, parallel_lines=0)
    assert found["signed_per_s"] > 0 and float(found["unsigned_over_bare"]) > 1


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_that_read_and_workers_that_are_sent_to_agree(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a file, from a place in a file, and from memory; with lines that are too long in between."""
    if method == "fork" and sys.platform != "linux":
        pytest.skip("forked workers are for Linux")
    monkeypatch.setattr(bulk, "_start_method", lambda: method)
    monkeypatch.setattr(bulk, "CHUNK_BYTES", 4000)
    lines = [sample_line(number, None) for number in range(30)]
    data = b"".join(lines[:20]) + b"x" * 9000 + b"\n" + b"".join(lines[20:])
    expected = through(data, max_bytes=5000)
    file = tmp_path / "many.jsonl"
    file.write_bytes(b"skipped\n" + data)
    with file.open("rb") as stream:
        stream.readline()
        batches = bulk.verify_stream(stream, trusted=TRUSTED, name="f.jsonl", workers=2, max_bytes=5000)
        assert b"".join(batch.output for batch in batches) == expected
    assert through(data, workers=2, max_bytes=5000) == expected


def test_the_pool_as_a_process(tmp_path: Path) -> None:
    file = tmp_path / "many.jsonl"
    file.write_bytes(b"".join(sample_line(number, None) for number in range(2000)))
    command = [sys.executable, "-m", "repro", "verify", "--batch", str(file), "--workers", "2"]
    done = subprocess.run(command, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["target"] for line in done.stdout.splitlines()] == [f"{file}:{n}" for n in range(1, 2001)]
    assert done.stderr.count(b"\n") == 1 and b"2000 targets" in done.stderr and b"2000 valid" in done.stderr


@pytest.mark.skipif(
    not os.environ.get("REPRO_TIMING"), reason="times bulk rates: set REPRO_TIMING=1 on a quiet machine"
)
def test_rates() -> None:
    found = measure()
    assert float(found["signed_over_bare"]) >= 0.85
    assert float(found["unsigned_over_bare"]) >= 10
    if found["cores"] == 2:
        assert float(found["parallel_speedup"]) >= 1.8
