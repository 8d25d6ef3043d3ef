"""A real HTTP server on loopback that behaves as a test tells it to: it answers, fails, stalls, lies or hangs up."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Route = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Looks the path up in the server's routes; HTTP/1.0, so that every answer ends its connection."""

    server: "_Server"
    body: bytes = b""

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._serve()

    def _serve(self) -> None:
        self.server.site.requests.append((self.command, self.path, dict(self.headers), self.body))
        route = self.server.site.routes.get(self.path)
        if callable(route):
            route(self)
        elif route is not None:
            self.answer(200, route)
        else:
            self.answer(404, b"not here")

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Type": "application/json", "Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@dataclass(kw_only=True)
class Site:
    """What a server answers under each path, and what it was asked."""

    routes: dict[str, bytes | Route] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    url: str = ""

    def asked(self) -> list[str]:
        """The paths that were asked for, in order."""
        return [path for _, path, _, _ in self.requests]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    site: Site

    def handle_error(self, *_: object) -> None:
        pass  # a client that hangs up is part of the tests


@contextmanager
def serving() -> Iterator[Site]:
    """A running server; its routes may change while it runs."""
    with _Server(("127.0.0.1", 0), Handler) as server:
        server.site = Site(url=f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.site
        finally:
            server.shutdown()
            thread.join()


def failing(times: int, then: bytes, *, status: int = 503) -> Route:
    """A route that fails `times` times and answers then."""
    left = [times]

    def route(handler: Handler) -> None:
        left[0] -= 1
        handler.answer(status, b"busy") if left[0] >= 0 else handler.answer(200, then)

    return route


def cutting(handler: Handler) -> None:
    """Promises a thousand bytes and hangs up after ten."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"0123456789")


def redirecting(to: str, status: int = 302) -> Route:
    """A route that redirects to `to`."""
    return lambda handler: handler.answer(status, b"", Location=to)
