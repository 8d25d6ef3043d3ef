"""The report in headless chromium: at two widths, in light and dark, on paper; nothing runs, loads or runs over the edge."""

import json
import re
from pathlib import Path

import pytest
from browser import CHROMIUM, NO_CHROMIUM, browse, keep, picture, served
from test_page import BUNDLES, HOSTILE, parts, poisoned

from repro.report.page import render
from repro.workflow.publish import write_index

PAGES = ("report", "hostile", "index")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)

#: Looks into the two frames: how wide each page is, its colours, the least contrast of any text, what cannot be reached.
LOOK = r"""
const luminance = c => {
  const p = c.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * p[0] + 0.7152 * p[1] + 0.0722 * p[2];
};
const parse = text => {
  const m = text.match(/[\d.]+/g);
  return m && (m.length < 4 || +m[3] > 0) ? m.slice(0, 3).map(Number) : null;
};
const under = (e, w) => {
  for (; e; e = e.parentElement) {
    const found = parse(w.getComputedStyle(e).backgroundColor);
    if (found) return found;
  }
  return [255, 255, 255];
};
const look = frame => {
  const d = frame.contentDocument, w = frame.contentWindow, root = d.documentElement;
  let least = 99, where = '', over = [];
  for (const e of d.body.querySelectorAll('*')) {
    if (![...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim())) continue;
    const style = w.getComputedStyle(e), name = e.tagName + ': ' + e.textContent.slice(0, 40);
    const ink = parse(e.namespaceURI.endsWith('svg') ? style.fill : style.color);
    if (!ink) continue;
    const [a, b] = [luminance(ink), luminance(under(e, w))].sort((x, y) => x - y);
    if ((b + 0.05) / (a + 0.05) < least) { least = (b + 0.05) / (a + 0.05); where = name; }
    const box = e.getBoundingClientRect();
    if (box.right > root.clientWidth + 1 && box.left >= 0 && !e.closest('.scroll')) over.push(name);
  }
  const texts = [...d.querySelectorAll('p, td, th, li, dd, code')];
  return {
    width: root.clientWidth, scroll: root.scrollWidth, page: w.getComputedStyle(d.body).backgroundColor,
    least, where, over, small: Math.min(...texts.map(e => parseFloat(w.getComputedStyle(e).fontSize))),
    scripts: d.scripts.length, ran: String(w.ran), links: d.links.length,
  };
};
window.onload = () => { document.title = JSON.stringify([...document.querySelectorAll('iframe')].map(look)); };
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("www")
    given = parts(BUNDLES[0])
    (folder / "report.html").write_text(render(**given))
    (folder / "hostile.html").write_text(render(**poisoned(given, HOSTILE.replace("x()", "window.ran=1"))))
    write_index(BUNDLES, folder / "index.html", trusted_keys=None)
    frames = "".join(
        f'<iframe src="{name}.html" style="width:{width}px;height:900px;border:0"></iframe>'
        for name in PAGES
        for width in (360, 1100)
    )
    (folder / "frames.html").write_text(f"<!doctype html><title></title><script>{LOOK}</script>{frames}")
    (folder / "phone.html").write_text(
        '<body style="margin:0"><iframe src="report.html" style="width:360px;height:1600px;border:0"></iframe>'
    )
    return folder


def seen(dom: str) -> list[dict[str, object]]:
    found = re.search(r"<title>(.*?)</title>", dom)
    assert found, dom[:300]
    frames: list[dict[str, object]] = json.loads(found[1].replace("&quot;", '"').replace("&amp;", "&"))
    return frames


@pytest.mark.parametrize(("scheme", "page"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 23, 26)")])
def test_two_widths_and_two_themes(site: Path, tmp_path: Path, scheme: str, page: str) -> None:
    preferred = {"dark": 0, "light": 1}[scheme]
    with served(site) as (url, asked):
        dom = browse(tmp_path, f"--blink-settings=preferredColorScheme={preferred}", "--window-size=1600,1000",
                     "--virtual-time-budget=8000", "--dump-dom", f"{url}/frames.html")  # fmt: skip
    for frame, width in zip(seen(dom), (360, 1100) * len(PAGES), strict=True):
        assert (frame["width"], frame["scroll"], frame["over"]) == (width, width, [])  # the page never scrolls sideways
        assert frame["page"] == page
        assert float(str(frame["least"])) >= 4.5, frame["where"]
        assert float(str(frame["small"])) >= 11
        assert (frame["scripts"], frame["ran"]) == (0, "undefined")
        assert int(str(frame["links"])) > 5
    assert set(asked) <= {"/frames.html", "/favicon.ico", *(f"/{name}.html" for name in PAGES)}


def test_screenshots_and_paper(site: Path, tmp_path: Path) -> None:
    with served(site) as (url, _):
        browse(tmp_path, f"--screenshot={tmp_path / 'phone-dark.png'}", "--window-size=520,1600",
               "--blink-settings=preferredColorScheme=0", f"{url}/phone.html")  # fmt: skip
        browse(tmp_path, f"--screenshot={tmp_path / 'wide-light.png'}", "--window-size=1100,1600", f"{url}/report.html")
        browse(tmp_path, f"--print-to-pdf={tmp_path / 'report.pdf'}", "--no-pdf-header-footer",
               "--blink-settings=preferredColorScheme=0", f"{url}/report.html")  # fmt: skip
    for name, width in (("phone-dark.png", 520), ("wide-light.png", 1100)):
        assert picture(tmp_path / name)[:2] == (width, 1600)
        assert picture(tmp_path / name)[2] > 20
        keep(tmp_path / name)
    paper = (tmp_path / "report.pdf").read_bytes()
    assert paper.startswith(b"%PDF-")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", paper)) <= 40
    keep(tmp_path / "report.pdf")
