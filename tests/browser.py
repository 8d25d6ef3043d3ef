"""Headless chromium, where the machine has one: a page as a browser sees it, and nothing that it should not ask for."""

import functools
import http.server
import os
import shutil
import struct
import subprocess
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NO_CHROMIUM = "no chromium on this machine: apt-get install chromium"


def browse(home: Path, *arguments: str) -> str:
    """What headless chromium prints with `arguments`; its profile lies in `home`."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={home}"]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(home)}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serves `folder` on this machine; gives the address and the list of paths that were asked for."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join()


def picture(path: Path) -> tuple[int, int, int]:
    """Width, height and the number of different bytes in the rows of a PNG: a blank page has next to none."""
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    parts, at = b"", 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        if data[at + 4 : at + 8] == b"IDAT":
            parts += data[at + 8 : at + 8 + size]
        at += size + 12
    return width, height, len(set(zlib.decompress(parts)))


def keep(path: Path) -> None:
    """Copies a screenshot to the folder REPRO_SCREENSHOT, for a person to look at."""
    folder = os.environ.get("REPRO_SCREENSHOT")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
