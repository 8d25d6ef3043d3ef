"""The mirror's pages in a real browser: headless chromium renders them, and nothing on them runs or loads."""

import functools
import http.server
import os
import shutil
import struct
import subprocess
import threading
import zlib
from pathlib import Path

import pytest

from records import canonical, keys
from records.mirror import Page, build_site

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
STORE = Path(keys.__file__).parent / "data" / "records"
SUFFIX = "X72AYRLPIFP2UVYVUQLNZSTJUW"


def browse(home: Path, *arguments: str) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={home}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(home)})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")
def test_pages_in_a_browser(tmp_path: Path) -> None:
    key = keys.generate()
    documents = [canonical.loads(path.read_bytes()) for path in sorted(STORE.glob("*.json"))]
    site = build_site(
        [Page(document=document) for document in documents],
        key=keys.PublicKey(key_id=key.key_id, raw=key.public.raw, source="file"),
        trusted=keys.pinned(), base_url="https://mirror.example", name="a mirror", generated_at="2026-11-21T00:00:00Z",
    )  # fmt: skip
    folder = tmp_path / "www"
    for name, data in site.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}"
            shown = browse(tmp_path / "home", "--dump-dom", f"{url}/pith/{SUFFIX}/")
            assert "Mixture-of-Experts Can Surpass Dense LLMs" in shown and "trusted" in shown
            picture = tmp_path / "page.png"
            browse(tmp_path / "home", f"--screenshot={picture}", "--window-size=900,1400", f"{url}/pith/{SUFFIX}/")
        finally:
            server.shutdown()
            thread.join()
    # The page loads itself, and at most a browser's own icon: no script, font or picture from anywhere.
    assert set(asked) <= {f"/pith/{SUFFIX}/", "/favicon.ico"}
    width, height, colours = _png(picture)
    assert (width, height) == (900, 1400) and colours > 20  # text was drawn: a blank page has one colour
    keep = os.environ.get("REPRO_SCREENSHOT")
    if keep:
        shutil.copy(picture, keep)


def _png(path: Path) -> tuple[int, int, int]:
    """Width, height and the number of different bytes in the picture's rows."""
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    parts, at = b"", 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        if data[at + 4 : at + 8] == b"IDAT":
            parts += data[at + 8 : at + 8 + size]
        at += size + 12
    return width, height, len(set(zlib.decompress(parts)))
