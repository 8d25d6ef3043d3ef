"""The one place that opens sockets, against a real server that misbehaves."""

import gzip
import time
from typing import Any

import pytest
from loopback import Handler, Site, cutting, failing, redirecting

from records.errors import NetworkError, UsageError
from records.network import Client, check_url


def client(**options: Any) -> Client:
    return Client(**{"backoff": 0.01, "read_timeout": 5, **options})


def test_an_answer(site: Site) -> None:
    site.routes["/x"] = b"{}"
    answer = client().get(f"{site.url}/x")
    assert (answer.status, answer.body, answer.content_type) == (200, b"{}", "application/json")
    assert client().get(f"{site.url}/none").status == 404
    assert len(site.requests) == 2  # a 404 is final


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_passing_faults_are_tried_again_with_growing_waits(site: Site, status: int) -> None:
    waits: list[float] = []
    site.routes["/x"] = failing(2, b"{}", status=status)
    assert client(backoff=1.0, sleep=waits.append).get(f"{site.url}/x").body == b"{}"
    assert len(site.requests) == 3 and 0.5 <= waits[0] <= 1 and 1 <= waits[1] <= 2
    site.routes["/x"] = failing(9, b"{}", status=status)
    with pytest.raises(NetworkError, match=f"HTTP {status}"):
        client().get(f"{site.url}/x")


def test_a_cut_connection_is_no_answer(site: Site) -> None:
    site.routes["/x"] = cutting
    with pytest.raises(NetworkError, match="cut"):
        client(tries=2).get(f"{site.url}/x")
    assert len(site.requests) == 2


def test_nobody_listens() -> None:
    with pytest.raises(NetworkError, match="cannot connect"):
        client(tries=1).get("http://127.0.0.1:1/x")


def test_timeouts(site: Site) -> None:
    def stalls(handler: Handler) -> None:
        time.sleep(0.6)

    site.routes["/x"] = stalls
    with pytest.raises(NetworkError, match="timed out"):
        client(tries=1, read_timeout=0.1).get(f"{site.url}/x")


def test_an_answer_that_trickles_meets_the_deadline(site: Site) -> None:
    def trickles(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(200):
            handler.wfile.write(b"x" * 65536)
            time.sleep(0.02)

    site.routes["/x"] = trickles
    start = time.monotonic()
    with pytest.raises(NetworkError, match="did not finish"):
        client(deadline=0.3).get(f"{site.url}/x")
    assert time.monotonic() - start < 2


def test_oversize_answers_are_cut_off_compressed_or_not(site: Site) -> None:
    site.routes["/plain"] = b"x" * 20_000
    site.routes["/bomb"] = lambda handler: handler.answer(
        200, gzip.compress(bytes(10_000_000)), Content_Encoding="gzip"
    )
    for path in ("/plain", "/bomb"):
        with pytest.raises(NetworkError, match="more than 10000 bytes"):
            client(max_bytes=10_000).get(site.url + path)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_lead_to_https_or_nowhere(site: Site, status: int) -> None:
    site.routes["/real"] = b"{}"
    for target in (f"{site.url}/real", "http://example.org/x", "/real", "file:///etc/passwd", "ftp://x/y", ""):
        site.routes["/x"] = redirecting(target, status)
        with pytest.raises(NetworkError, match="expected https"):
            client().get(f"{site.url}/x")
    assert "/real" not in site.asked()


def test_what_is_sent_is_not_sent_elsewhere(site: Site) -> None:
    site.routes["/x"] = redirecting("https://example.org/x", 307)
    with pytest.raises(NetworkError, match="send it there yourself"):
        client().request("POST", f"{site.url}/x", body=b"secret")
    assert len(site.requests) == 1


def test_netrc_is_not_sent(site: Site, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    site.routes["/x"] = b"{}"
    client().get(f"{site.url}/x")
    assert "Authorization" not in site.requests[0][2]


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/", "http://127.0.0.1.example.org/", "https://", "https://u:p@example.org/", "https://example.org:x/",
        "file:///etc/passwd", "https://example.org/\x1b[31m", "https://example.org/a b", "javascript:alert(1)",
        "https://exämple.org/", "https://[::1", "//example.org",
    ],
)  # fmt: skip
def test_addresses_that_are_not_asked(url: str) -> None:
    with pytest.raises(UsageError, match="expected") as caught:
        check_url(url)
    assert str(caught.value).isprintable()
    with pytest.raises(UsageError):
        Client().get(url)


def test_offline_opens_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("a socket was opened"))
    with pytest.raises(NetworkError, match="--offline"):
        Client(offline=True).get("https://pith.science/pith/x.json")
