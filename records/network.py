"""HTTP as this project uses it: one place that opens sockets, and refuses to under `--offline`.

- https only; plain http only to this machine's own loopback, for a mirror under test. Redirects lead to https or
  nowhere.
- Every answer has a size limit, every wait a timeout, the whole exchange a deadline.
- Connection faults, timeouts, 429 and 5xx are tried again, with waits that double; other answers are final.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from urllib.parse import urljoin, urlsplit

from records.canonical import MAX_BYTES
from records.errors import NetworkError, UsageError

if TYPE_CHECKING:
    import requests

USER_AGENT: Final = "pith-repro"
MAX_REDIRECTS: Final = 5
_LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})
_RETRIED: Final = frozenset({429, 500, 502, 503, 504})


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A whole HTTP answer: the status, the body and the address that gave it."""

    status: int
    body: bytes
    url: str
    content_type: str = ""


def check_url(url: str) -> str:
    """Return `url` where this project may ask it; UsageError otherwise."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
        _ = parts.port
    except ValueError:
        raise UsageError(f"expected an https:// address, found {url[:80]!a}") from None
    if not url.isascii() or not url.isprintable() or " " in url or host is None or parts.username is not None:
        raise UsageError(f"expected a plain https:// address without credentials, found {url[:80]!a}")
    if parts.scheme != "https" and not (parts.scheme == "http" and host in _LOOPBACK):
        raise UsageError(f"expected https:// (http:// only for this machine's loopback), found {url[:80]!a}")
    return url


@dataclass(frozen=True, kw_only=True, slots=True)
class Client:
    """How to ask: times in seconds, sizes in bytes. `sleep` and `clock` are there for tests."""

    offline: bool = False
    connect_timeout: float = 5.0
    read_timeout: float = 15.0
    deadline: float = 60.0
    tries: int = 4
    backoff: float = 0.5
    max_bytes: int = MAX_BYTES
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)

    def get(self, url: str, *, accept: str = "application/json") -> Answer:
        """GET `url`; raises NetworkError unless an answer came that is final (see `request`)."""
        return self.request("GET", url, headers={"Accept": accept})

    def request(
        self, method: str, url: str, *, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> Answer:
        """One exchange, tried again where that can help. Answers of 2xx and 4xx (but 429) come back as they are.

        Raises NetworkError where no such answer came, UsageError for an address that may not be asked.
        """
        check_url(url)
        if self.offline:
            raise NetworkError(f"--offline: {urlsplit(url).hostname} was not asked; leave --offline out to ask it")
        import random

        until = self.clock() + self.deadline
        wait, last = self.backoff, "no try was made"
        for number in range(self.tries):
            if number:
                # Jitter, so that parallel processes that failed together do not come back together.
                pause = wait * (0.5 + random.random() / 2)  # noqa: S311 - no secret hangs on it
                if self.clock() + pause >= until:
                    break
                self.sleep(pause)
                wait *= 2
            try:
                answer = self._once(method, url, dict(headers or {}), body, until)
            except _Temporary as error:
                last = str(error)
                continue
            if answer.status not in _RETRIED:
                return answer
            last = f"HTTP {answer.status}"
        raise NetworkError(
            f"no answer from {url[:200]}: {last}; check the connection, or use --offline with a local copy"
        )

    def _once(self, method: str, url: str, headers: dict[str, str], body: bytes | None, until: float) -> Answer:
        import requests

        with requests.Session() as session, _as_temporary():
            session.auth = _no_credentials  # without one, requests would send what ~/.netrc holds for the host
            headers = {"User-Agent": USER_AGENT, **headers}
            for _ in range(MAX_REDIRECTS + 1):
                with session.request(
                    method, url, headers=headers, data=body, stream=True, allow_redirects=False,
                    timeout=(self.connect_timeout, self.read_timeout),
                ) as response:  # fmt: skip
                    if response.status_code in (301, 302, 303, 307, 308):
                        url = self._redirected(method, url, response.headers.get("Location", ""))
                        continue
                    return Answer(
                        status=response.status_code,
                        body=b"".join(self._chunks(response, url, until)),
                        url=url,
                        content_type=response.headers.get("Content-Type", "")[:200],
                    )
        raise NetworkError(f"{url[:200]} redirects more than {MAX_REDIRECTS} times")

    def _redirected(self, method: str, url: str, location: str) -> str:
        target = urljoin(url, location)
        if method != "GET":
            raise NetworkError(f"{url[:200]} redirects what was to be sent to {target[:200]!a}; send it there yourself")
        if urlsplit(target).scheme != "https":
            raise NetworkError(f"{url[:200]} redirects to {target[:200]!a}; expected https")
        return check_url(target)

    def _chunks(self, response: "requests.Response", url: str, until: float) -> Iterator[bytes]:
        total = 0
        for chunk in response.iter_content(64 * 1024):  # decoded bytes: a compressed bomb counts at full size
            total += len(chunk)
            if total > self.max_bytes:
                raise NetworkError(f"{url[:200]} answers with more than {self.max_bytes} bytes; raise --max-bytes")
            if self.clock() > until:
                raise NetworkError(f"{url[:200]} did not finish its answer in {self.deadline:g} s")
            yield chunk
        stated = response.headers.get("Content-Length", "")
        # urllib3 from 2.0 on finds this itself, 1.26 does not.
        plain = "Content-Encoding" not in response.headers
        if plain and stated.isdigit() and int(stated) != total:
            raise _Temporary(f"the connection was cut after {total} of {stated} bytes")


class _Temporary(Exception):  # noqa: N818 - never leaves this module
    """A fault that another try may mend."""


@contextmanager
def _as_temporary() -> Iterator[None]:
    import requests
    import urllib3

    try:
        yield
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidHeader) as error:
        raise NetworkError(f"an address that cannot be asked: {type(error).__name__}") from None
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        raise _Temporary(_plain(error)) from None


def _plain(error: Exception) -> str:
    """One short reason: the exceptions of requests quote whole object representations."""
    for name, reason in (
        ("ConnectTimeout", "timed out while connecting"),
        ("ReadTimeout", "timed out while waiting for the answer"),
        ("SSLError", "the TLS certificate does not hold"),
        ("ChunkedEncodingError", "the connection was cut"),
        ("ContentDecodingError", "the answer's compression is broken"),
        ("ConnectionError", "cannot connect, or the connection was cut"),
    ):
        if any(kind.__name__ == name for kind in type(error).__mro__):
            return reason
    return type(error).__name__


def _no_credentials(request: "requests.PreparedRequest") -> "requests.PreparedRequest":
    return request
