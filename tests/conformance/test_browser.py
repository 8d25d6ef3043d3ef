"""The mirror's pages in a real browser: headless chromium renders them, and nothing on them runs or loads."""

from pathlib import Path

import pytest
from browser import CHROMIUM, NO_CHROMIUM, browse, keep, picture, served

from records import canonical, keys
from records.mirror import Page, build_site

STORE = Path(keys.__file__).parent / "data" / "records"
SUFFIX = "X72AYRLPIFP2UVYVUQLNZSTJUW"


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
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
    with served(folder) as (url, asked):
        shown = browse(tmp_path / "home", "--dump-dom", f"{url}/pith/{SUFFIX}/")
        assert "Mixture-of-Experts Can Surpass Dense LLMs" in shown and "trusted" in shown
        shot = tmp_path / "mirror.png"
        browse(tmp_path / "home", f"--screenshot={shot}", "--window-size=900,1400", f"{url}/pith/{SUFFIX}/")
    # The page loads itself, and at most a browser's own icon: no script, font or picture from anywhere.
    assert set(asked) <= {f"/pith/{SUFFIX}/", "/favicon.ico"}
    width, height, colours = picture(shot)
    assert (width, height) == (900, 1400) and colours > 20  # text was drawn: a blank page has one colour
    keep(shot)
