"""Documents to verify and to tamper with, made fresh for each test from the package's own records."""

import base64
import copy
from pathlib import Path
from typing import Any

from records import canonical, keys
from records.report import Verification

STORE = Path(keys.__file__).parent / "data" / "records"
SIGNED = "X72AYRLPIFP2UVYVUQLNZSTJUW"


def failed(found: Verification) -> set[str]:
    """The codes of the checks that failed."""
    return {check.code for check in found.checks if check.status == "fail"}


def status(found: Verification, code: str) -> str:
    """How the last check of this code went."""
    return [check.status for check in found.checks if check.code == code][-1]


def bundle_of(record: dict[str, Any]) -> dict[str, Any]:
    """A bundle.json in the registry's form, around a signed record document."""
    number, aliases = record["pith_number"], copy.deepcopy(record["aliases"])
    payload = {name: record[name] for name in ("canonical_record", "canonical_sha256", "receipt")}
    signer = {"key_id": "pith-v1-2026-05", "signer_id": "pith.science", "signer_type": "pith_registry"}
    event = {"subject_pith_number": number, "created_at": "2026-05-20T00:02:51Z", "signer": signer}
    return {
        "bundle_type": "pith_open_graph_bundle",
        "bundle_version": "1.0",
        "pith_number": number,
        "short_pith_number": record["short_pith_number"],
        "canonical_record": copy.deepcopy(record["canonical_record"]),
        "canonical_sha256": record["canonical_sha256"],
        "source": copy.deepcopy(record["source"]),
        "source_aliases": aliases,
        "events": [
            {"event_type": "record_created", "target": "record", "payload": copy.deepcopy(payload), **event},
            {
                "event_type": "graph_snapshot",
                "target": "graph",
                "payload": {"graph_snapshot": copy.deepcopy(record["graph_snapshot"])},
                **event,
            },
        ],
    }


def own_record(identifier: str = "2601.00001", title: str = "A title") -> tuple[dict[str, Any], keys.PrivateKey]:
    """A record document of a made-up paper, with a receipt by a key of the test's own."""
    key = keys.private_key(bytes(range(32)))
    record = {
        "metadata": {
            "abstract_canon_sha256": "0" * 64,
            "cross_cats_sorted": [],
            "license": "",
            "primary_cat": "cs.LG",
            "submitted_at": "2026-01-01T00:00:00Z",
            "title_canon_sha256": canonical.sha256_hex(" ".join(title.lower().split()).encode()),
        },
        "schema_version": "1.0",
        "source": {"id": identifier, "kind": "arxiv", "version": 1},
    }
    digest = canonical.digest(record)
    receipt = {
        "kind": "pith_receipt",
        "key_id": key.key_id,
        "algorithm": "ed25519",
        "signed_message": "canonical_sha256_bytes",
        "canonical_sha256": digest,
        "signed_at": "2026-02-01T00:00:00Z",
        "signature_b64": base64.b64encode(key.sign(bytes.fromhex(digest))).decode(),
    }
    return {"canonical_record": record, "canonical_sha256": digest, "title": title, "receipt": receipt}, key
