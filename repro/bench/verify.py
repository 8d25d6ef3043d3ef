"""How fast verification in bulk is, against the one thing that it cannot do without: libsodium's check of a signature.

Everything is measured in one run, the parts in turn, the best of several rounds each, in processor time, so that a busy
machine slows all alike:
- `bare`: PyNaCl's `VerifyKey.verify` over the same digests and signatures, and nothing else
- `signed`, `unsigned`: whole lines of JSON through `records.bulk`, with and without a receipt, on one core
- `parallel`: the same signed lines through `repro verify --batch` as a process, with one worker and with one a core; the
  speed-up in elapsed time, and the one that the processor time spent would give if nothing else ran on the cores
"""

import base64
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from records import canonical, keys
from records.bulk import Chunk, LineVerifier, verify_chunk
from records.number import number_of


def sample_line(number: int, key: keys.PrivateKey | None) -> bytes:
    """A made-up record document in canonical form, with a receipt by `key` where there is one."""
    identifier, title = f"2601.{number % 100000:05d}", canonical.sha256_hex(b"title %d" % number)
    record = {
        "metadata": {
            "abstract_canon_sha256": canonical.sha256_hex(b"abstract %d" % number),
            "cross_cats_sorted": ["cs.AI", "stat.ML"],
            "license": "http://creativecommons.org/licenses/by/4.0/",
            "primary_cat": "cs.LG",
            "submitted_at": "2026-01-01T00:00:00Z",
            "title_canon_sha256": title,
        },
        "schema_version": "1.0",
        "source": {"id": identifier, "kind": "arxiv", "version": 1 + number // 100000},
    }
    digest = canonical.digest(record)
    document: dict[str, Any] = {
        "canonical_record": record,
        "canonical_sha256": digest,
        "pith_number": number_of(bytes.fromhex(digest), "2026"),
    }
    if key is not None:
        document["receipt"] = {
            "algorithm": "ed25519",
            "builder_version": "pith-number-builder-2026-05-17-v1",
            "canonical_sha256": digest,
            "first_computed_at": "2026-01-02T00:00:00.000000Z",
            "key_id": key.key_id,
            "kind": "pith_receipt",
            "last_reissued_at": "2026-01-02T00:00:00.000000Z",
            "public_key_fingerprint": keys.fingerprint(key.public.raw),
            "receipt_version": "0.3",
            "signature_b64": base64.b64encode(key.sign(bytes.fromhex(digest))).decode("ascii"),
            "signature_status": "signed_v1",
            "signed_at": "2026-01-02T00:00:00.000000Z",
            "signed_message": "canonical_sha256_bytes",
        }
    return canonical.dumps(document) + b"\n"


def measure(*, lines: int = 200, rounds: int = 60, parallel_lines: int = 150_000) -> dict[str, Any]:
    """Rates in targets a second and their ratios; `parallel_lines` of 0 leaves the processes out."""
    import json

    from nacl.signing import VerifyKey

    key = keys.private_key(bytes(range(32)), key_id="bench")
    public = keys.PublicKey(key_id=key.key_id, raw=key.public.raw, source="file")
    signed = [sample_line(number, key) for number in range(lines)]
    unsigned = [sample_line(number, None) for number in range(lines)]
    parsed = [json.loads(line) for line in signed]
    pairs = [
        (bytes.fromhex(document["canonical_sha256"]), base64.b64decode(document["receipt"]["signature_b64"]))
        for document in parsed
    ]
    verify_key = VerifyKey(public.raw)
    verifier = LineVerifier(trusted=keys.KeySet(keys=(public,)), name="bench.jsonl")

    def bare() -> None:
        for digest, signature in pairs:
            verify_key.verify(digest, signature)

    def bulk(data: bytes, state: str) -> Callable[[], None]:
        def run() -> None:
            states = verify_chunk(Chunk(first=1, data=data), verifier).states
            assert states == {state: lines}, states

        return run

    parts = {"bare": bare, "signed": bulk(b"".join(signed), "trusted"), "unsigned": bulk(b"".join(unsigned), "valid")}
    seconds = dict.fromkeys(parts, float("inf"))
    for _ in range(rounds):
        for name, part in parts.items():
            start = time.process_time()  # of this process: what others do on the machine is not counted
            part()
            seconds[name] = min(seconds[name], time.process_time() - start)
    rates = {name: lines / best for name, best in seconds.items()}
    result: dict[str, Any] = {
        "schema": "repro.bench-verify/v1",
        "lines": lines,
        "bare_per_s": round(rates["bare"]),
        "signed_per_s": round(rates["signed"]),
        "unsigned_per_s": round(rates["unsigned"]),
        "signed_over_bare": f"{rates['signed'] / rates['bare']:.3f}",
        "unsigned_over_bare": f"{rates['unsigned'] / rates['bare']:.2f}",
    }
    if parallel_lines:
        result |= _parallel(b"".join(signed), lines, parallel_lines, public)
    return result


def _parallel(block: bytes, lines: int, wanted: int, public: keys.PublicKey) -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        file, trusted = Path(folder, "bench.jsonl"), Path(folder, "trusted.json")
        file.write_bytes(block * max(1, wanted // lines))
        trusted.write_bytes(canonical.dumps(public.to_json()))
        seconds: dict[int, float] = {}
        processor: dict[int, float] = {}
        for workers in sorted({1, cores}):
            command = [sys.executable, "-m", "repro", "verify", "--batch", str(file), "--offline"]
            command += ["--workers", str(workers), "--trusted-keys", str(trusted)]
            start, spent = time.perf_counter(), os.times()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            seconds[workers], ended = time.perf_counter() - start, os.times()
            processor[workers] = (
                ended.children_user + ended.children_system - spent.children_user - spent.children_system
            )
    total = max(1, wanted // lines) * lines
    return {
        "parallel_lines": total,
        "cores": cores,
        "one_worker_per_s": round(total / seconds[1]),
        "all_workers_per_s": round(total / seconds[cores]),
        "parallel_speedup": f"{seconds[1] / seconds[cores]:.2f}",
        "parallel_speedup_if_cores_were_free": f"{cores * processor[1] / processor[cores]:.2f}",
    }
