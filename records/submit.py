"""Handing a replication to the registry: the exact request first, the sending apart from it, the answer kept as a receipt.

The registry's format is not documented (records/event.py), and it holds submissions for moderation. A submission is
named by the digest of its body and address, so sending it twice is sending it once.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from records import canonical
from records.errors import InvalidError, MalformedError, NetworkError, UsageError
from records.event import replication_event
from records.keys import refuse_secrets
from records.network import USER_AGENT, Client, check_url
from records.number import FULL_NUMBER, SUFFIX_LENGTH
from records.package import write_atomically

REGISTRY: Final = "https://pith.science"
RECEIPT_SCHEMA: Final = "repro.submission/v1"
NOTICE: Final = (
    "The registry's submission format is not documented: this is the project's own event, held there for moderation if it is "
    "taken at all. A replication record is a typed annotation, not peer review."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """A request that is ready to send, and its digest."""

    number: str
    url: str
    headers: tuple[tuple[str, str], ...]
    body: bytes

    @property
    def digest(self) -> str:
        """SHA-256 of address and body: what makes two submissions the same."""
        return canonical.digest({"body_sha256": canonical.sha256_hex(self.body), "url": self.url})

    def shown(self) -> str:
        """The exact request as text: the request line, the headers, the body."""
        head = "".join(f"{name}: {value}\n" for name, value in self.headers)
        return f"POST {self.url}\n{head}\n{self.body.decode('utf-8')}\n"


def prepare(files: Mapping[str, bytes], data: bytes, *, to: str | None, bundle_url: str | None) -> Submission:
    """The request for a bundle (`files`, and its zip `data`); raises UsageError for an address that may not be asked,
    InvalidError where it would carry a secret."""
    event = replication_event(
        files,
        bundle_sha256=canonical.sha256_hex(data),
        bundle_size=len(data),
        bundle_url=bundle_url and check_url(bundle_url),
    )
    number = str(event["subject_pith_number"])
    url = check_url(to or f"{REGISTRY}/pith/{number[-SUFFIX_LENGTH:]}/action/replication_record")
    body = canonical.dumps(event)
    refuse_secrets({"the request": body, "the statement": canonical.dumps(event["payload"])})
    headers = (
        ("User-Agent", USER_AGENT),
        ("Accept", "application/json"),
        ("Content-Type", "application/json"),
        ("Idempotency-Key", canonical.sha256_hex(body)),
    )
    return Submission(number=number, url=url, headers=headers, body=body)


def receipts_folder() -> Path:
    """`$REPRO_DATA`, or `pith-repro` in the user's data folder: receipts are kept, unlike a cache."""
    own, base = os.environ.get("REPRO_DATA"), os.environ.get("XDG_DATA_HOME")
    home = Path(base) if base else Path.home() / ".local" / "share"
    return (Path(own) if own else home / "pith-repro") / "submissions"


def stored_receipt(submission: Submission, folder: Path) -> dict[str, Any] | None:
    """The receipt of an earlier sending of the same submission, or None."""
    try:
        value = canonical.loads((folder / f"{submission.digest}.json").read_bytes())
    except (OSError, MalformedError):
        return None
    return value if isinstance(value, dict) and value.get("schema") == RECEIPT_SCHEMA else None


def send(submission: Submission, *, client: Client, folder: Path, sent_at: str) -> dict[str, Any]:
    """Send once: an earlier receipt is the answer where there is one. Returns the receipt, which lies in `folder`.

    Raises NetworkError where no answer of 2xx came, InvalidError where the answer speaks of another paper.
    """
    earlier = stored_receipt(submission, folder)
    if earlier is not None:
        return earlier
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write receipts to {folder}: {error.strerror}; set REPRO_DATA") from None
    answer = client.request("POST", submission.url, headers=dict(submission.headers), body=submission.body)
    if not 200 <= answer.status < 300:
        raise NetworkError(f"{submission.url} refuses the submission: HTTP {answer.status}; nothing was stored")
    named = _number_in(answer.body)
    if named is not None and named != submission.number:
        raise InvalidError(
            f"the answer of {submission.url} is about {named}, expected {submission.number}; it was not stored"
        )
    receipt = {
        "schema": RECEIPT_SCHEMA,
        "url": submission.url,
        "pith_number": submission.number,
        "body_sha256": canonical.sha256_hex(submission.body),
        "sent_at": sent_at,
        "status": answer.status,
        "answer_sha256": canonical.sha256_hex(answer.body),
        "answer": answer.body.decode("utf-8", "replace"),
    }
    write_atomically(folder / f"{submission.digest}.json", canonical.dumps(receipt) + b"\n")
    return receipt


def _number_in(body: bytes) -> str | None:
    """The full Pith number that an answer speaks of, if it is JSON and does; its form is not documented."""
    try:
        value = canonical.loads(body)
    except MalformedError:
        return None
    for name in ("pith_number", "subject_pith_number"):
        number = value.get(name) if isinstance(value, dict) else None
        if isinstance(number, str) and FULL_NUMBER.fullmatch(number):
            return number
    return None
