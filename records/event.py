"""The adapter from a replication bundle to a Pith `replication_record` event. Everything uncertain about that event is here.

The registry documents neither the payload of a `replication_record` nor what an event's id and signature cover. Until
it does, the event carries the signed statement whole, names the bundle by its hash, and says itself what its id is
made from.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

from records import canonical
from records.errors import UsageError
from records.number import FULL_NUMBER
from records.package import STATEMENT
from records.replication import read_statement

EVENT_TYPE: Final = "replication_record"
PREIMAGE: Final = "event_id = sha256: and the SHA-256 of the canonical JSON of this event without event_id"


def replication_event(
    files: Mapping[str, bytes], *, bundle_sha256: str, bundle_size: int, bundle_url: str | None
) -> dict[str, Any]:
    """The event of a replication bundle, whose zip has the SHA-256 and size in bytes given, and perhaps a public address.

    Raises MalformedError where there is no readable statement, UsageError where the paper has no Pith number.
    """
    envelope = read_statement(files)
    number, predicate = envelope.statement["subject"][0]["name"], envelope.statement["predicate"]
    if not FULL_NUMBER.fullmatch(number):
        raise UsageError(
            f"{number} has no known Pith number, and an event needs one; verify it without --offline first"
        )
    bundle: dict[str, Any] = {"media_type": "application/zip", "sha256": bundle_sha256, "size": bundle_size}
    if bundle_url is not None:
        bundle["url"] = bundle_url
    event: dict[str, Any] = {
        "event_type": EVENT_TYPE,
        "subject_pith_number": number,
        "target": "record",
        "created_at": predicate["finished_at"],
        "signer": {"signer_type": "replicator", "key_id": envelope.signatures[0][0] if envelope.signatures else None},
        "payload": {
            "bundle": bundle,
            "preimage": PREIMAGE,
            "statement_dsse": json.loads(files[STATEMENT]),
            "verdicts": [
                {"claim": entry["claim"], "scale": predicate["scale"], "verdict": entry["verdict"]}
                for entry in predicate["verdicts"]
            ],
        },
    }
    return {**event, "event_id": f"sha256:{canonical.digest(event)}"}
