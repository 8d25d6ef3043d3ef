"""Submission: the exact request first, sent once, never elsewhere, and only a fitting answer becomes a receipt."""

import json
from pathlib import Path
from typing import Any

import pytest
from loopback import Handler, Site, cutting, failing, redirecting
from test_replication import FILES, KEY, PREDICATE, build

from records import canonical, package, statement, submit
from records.errors import InvalidError, NetworkError, UsageError
from records.event import replication_event
from records.network import Client

SUFFIX = "X72AYRLPIFP2UVYVUQLNZSTJUW"
NUMBER = f"pith:2025:{SUFFIX}"


def bundle() -> dict[str, bytes]:
    from record_cases import STORE

    record = (STORE / f"{SUFFIX}.json").read_bytes()
    sha = json.loads(record)["canonical_sha256"]
    return build(FILES | {"pith-record.json": record}, subject_name=NUMBER, subject_sha256=sha)


def prepared(site: Site | None = None, **options: Any) -> submit.Submission:
    files = bundle()
    to = f"{site.url}/submit" if site is not None else None
    return submit.prepare(files, package.zip_bytes(files), **{"to": to, "bundle_url": None, **options})


def send(submission: submit.Submission, folder: Path, **options: Any) -> dict[str, Any]:
    client = Client(**{"backoff": 0.001, "read_timeout": 5, "max_bytes": 5000, **options})
    return submit.send(submission, client=client, folder=folder, sent_at="2026-11-21T00:00:00Z")


def test_the_event_states_its_preimage_and_carries_the_signed_statement() -> None:
    event = json.loads(prepared().body)
    stated = event.pop("event_id")
    assert stated == f"sha256:{canonical.digest(event)}"
    assert event["subject_pith_number"] == NUMBER and event["event_type"] == "replication_record"
    envelope = statement.open_envelope(canonical.dumps(event["payload"]["statement_dsse"]))
    assert envelope.statement["predicate"]["verdicts"] == PREDICATE["verdicts"]
    assert event["signer"]["key_id"] == KEY.key_id
    assert event["payload"]["bundle"]["sha256"] == canonical.sha256_hex(package.zip_bytes(bundle()))


def test_without_a_number_there_is_nothing_to_submit_to() -> None:
    with pytest.raises(UsageError, match="no known Pith number"):
        replication_event(build(), bundle_sha256="0" * 64, bundle_size=1, bundle_url=None)


def test_what_is_shown_is_what_is_sent(site: Site, tmp_path: Path) -> None:
    submission = prepared(site)
    assert prepared().url == f"https://pith.science/pith/{SUFFIX}/action/replication_record"
    site.routes["/submit"] = json.dumps({"status": "held", "pith_number": NUMBER}).encode()
    receipt = send(submission, tmp_path)
    method, path, headers, body = site.requests[0]
    assert (method, path, body) == ("POST", "/submit", submission.body)
    for name, value in submission.headers:
        assert headers[name] == value and f"{name}: {value}" in submission.shown()
    assert submission.body.decode() in submission.shown()
    assert receipt["status"] == 200 and json.loads(receipt["answer"])["status"] == "held"
    assert "private" not in submission.shown() and KEY.seed.hex() not in submission.shown()


def test_sending_twice_is_sending_once(site: Site, tmp_path: Path) -> None:
    site.routes["/submit"] = b'{"status":"held"}'
    first = send(prepared(site), tmp_path)
    assert send(prepared(site), tmp_path) == first and len(site.requests) == 1
    assert send(prepared(site, bundle_url="https://example.org/x.zip"), tmp_path) != first  # another request is another
    assert len(site.requests) == 2


def test_a_server_in_trouble_is_asked_again_with_the_same_key(site: Site, tmp_path: Path) -> None:
    site.routes["/submit"] = failing(2, b"{}")
    send(prepared(site), tmp_path)
    assert len({headers["Idempotency-Key"] for _, _, headers, _ in site.requests}) == 1 and len(site.requests) == 3


def stalls(handler: Handler) -> None:
    import time

    time.sleep(0.5)


@pytest.mark.parametrize(
    ("route", "error"),
    [
        (failing(99, b""), NetworkError),
        (failing(99, b"", status=400), NetworkError),
        (failing(99, b"", status=401), NetworkError),
        (cutting, NetworkError),
        (stalls, NetworkError),
        (redirecting("http://example.org/steal", 307), NetworkError),
        (redirecting("https://example.org/steal", 308), NetworkError),
        (b"x" * 6000, NetworkError),
        (b'{"pith_number":"pith:2026:IV7VH3NCTL2M6JAD44FIMISHCY"}', InvalidError),
    ],
)
def test_what_is_no_receipt(site: Site, tmp_path: Path, route: Any, error: type[Exception]) -> None:
    site.routes["/submit"] = route
    with pytest.raises(error):
        send(prepared(site), tmp_path, read_timeout=0.1 if route is stalls else 5, tries=2)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_receipt_is_none(site: Site, tmp_path: Path) -> None:
    site.routes["/submit"] = b"{}"
    send(prepared(site), tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"half a rec")
    send(prepared(site), tmp_path)
    assert len(site.requests) == 2


def test_addresses(tmp_path: Path) -> None:
    for to in ("http://example.org/", "ftp://x", "example.org"):
        with pytest.raises(UsageError):
            prepared(to=to)
    with pytest.raises(UsageError):
        prepared(bundle_url="/home/x/run.zip")
