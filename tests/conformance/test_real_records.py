"""Every real record that is at hand, against every rule that it can decide. They lie in ../shared/pith, not in the repository."""

import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from records import bulk, canonical, document, keys, number
from records.receipt import verify_digest

SHARED = Path(__file__).parents[2].parent / "shared"
RECORDS = SHARED / "pith" / "records.jsonl"
pytestmark = pytest.mark.skipif(
    not RECORDS.is_file(), reason="the records are not there: expected ../shared/pith/records.jsonl"
)


def entries() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORDS.read_text(encoding="utf-8").splitlines()]


def test_hashes_and_numbers() -> None:
    """Every record that is shown hashes as stated and gives its number. Where `shown_in_full` is false, the time of day in
    `submitted_at` was searched for against the hash, so that record tests the number's rule, not the hash's."""
    counts: Counter[str] = Counter()
    for entry in entries():
        digest = entry["canonical_sha256"]
        if entry["canonical_record"] is not None:
            counts["in full" if entry["shown_in_full"] else "completed"] += 1
            assert canonical.digest(entry["canonical_record"]) == digest
            submitted = entry["canonical_record"]["metadata"]["submitted_at"]
            assert entry["pith_number"] in (None, number.number_of(bytes.fromhex(digest), submitted))
        assert number.suffix_of(bytes.fromhex(digest)) == entry["suffix"]
        counts["suffixes"] += 1
    assert counts["suffixes"] == 90
    assert counts["in full"] + counts["completed"] == 83 and counts["in full"] == 44, counts


def test_receipts() -> None:
    """Each of the 8 signatures verifies over the 32 raw bytes of the hash, and over nothing else that was tried."""
    key = keys.pinned().keys[0]
    signed = [entry for entry in entries() if entry["signature_b64"] is not None]
    assert len(signed) == 8
    for entry in signed:
        signature = keys.b64_strict(entry["signature_b64"], size=64)
        digest = bytes.fromhex(entry["canonical_sha256"])
        verify_digest(key.raw, digest, signature)
        for other in (digest.hex().encode(), digest[:31], digest + b"\0", entry["suffix"].encode()):
            with pytest.raises(Exception, match="does not verify"):
                verify_digest(key.raw, other, signature)


def test_titles() -> None:
    shown = [entry for entry in entries() if entry["title"] and entry["canonical_record"]]
    assert len(shown) > 50
    for entry in shown:
        found = document.verify_value(entry, target="t", trusted=keys.pinned(), fits=lambda *_: True)
        (check,) = [check for check in found.checks if check.code == "title_hash"]
        assert check.status == "pass", (entry["title"], check.detail)


def test_the_canonical_form_is_not_rfc_8785() -> None:
    """Category lists are in code-point order, `math-ph` before `math.CA`, and keep out the primary one."""
    for entry in entries():
        if entry["canonical_record"] is not None:
            metadata = entry["canonical_record"]["metadata"]
            assert metadata["cross_cats_sorted"] == sorted(metadata["cross_cats_sorted"])
            assert metadata["primary_cat"] not in metadata["cross_cats_sorted"]


def test_verified_in_bulk_nothing_fails() -> None:
    """7 lines show no record: their hash is of something that is not there to see, so they are `indeterminate`, with the
    signature of those that have one still checked. One record is shown with its signature: it is `trusted`."""
    with RECORDS.open("rb") as stream:
        batches = list(bulk.verify_stream(stream, trusted=keys.pinned(), name="records.jsonl", workers=1))
    states: Counter[str] = Counter()
    for batch in batches:
        states.update(batch.states)
    assert states == {"valid": 82, "indeterminate": 7, "trusted": 1}
    found = [json.loads(line) for batch in batches for line in batch.output.splitlines()]
    assert not [check for entry in found for check in entry["checks"] if check["status"] == "fail"]
    signatures = [c["status"] for entry in found for c in entry["checks"] if c["code"] == "receipt_signature"]
    assert signatures.count("pass") == 8


def test_the_command_line_on_all_of_them() -> None:
    command = [sys.executable, "-m", "repro", "verify", "--batch", str(RECORDS), "--offline"]
    done = subprocess.run(command, capture_output=True, timeout=120)
    assert done.returncode == 4 and len(done.stdout.splitlines()) == 90, done.stderr


def test_the_seed_pages_and_the_packages_records_agree() -> None:
    """The package's three records against the pages that they were taken from."""
    seeds = {path.name[:3]: path.read_text(encoding="utf-8") for path in (SHARED / "seeds").glob("*.txt")}
    if not {"000", "002", "004"} <= set(seeds):
        pytest.skip("the seed pages are not there: expected ../shared/seeds")
    store = Path(keys.__file__).parent / "data" / "records"
    for seed, suffix in (("000", "IV7VH3NCTL2M6JAD44FIMISHCY"), ("002", "RS6XGWCWJNK7PNWCHDEWVB4F5E")):
        ours = canonical.loads((store / f"{suffix}.json").read_bytes())
        page = seeds[seed]
        shown = json.loads(page[page.index("Canonical record JSON") + len("Canonical record JSON") :])
        assert ours["canonical_record"] == shown
        assert ours["canonical_sha256"] in page and suffix in page and ours["paper"]["title"] in page
    assert canonical.loads((store / "X72AYRLPIFP2UVYVUQLNZSTJUW.json").read_bytes()) == json.loads(seeds["004"])


def test_the_pinned_key_is_the_registrys() -> None:
    served = json.loads((SHARED / "pith" / "signing-key.json").read_bytes())
    assert keys.pinned().keys[0].to_json() == served
    assert keys.parse_public_keys(io.BytesIO((SHARED / "pith" / "signing-key.json").read_bytes()).read(), source="file")
