"""A drawn figure made fit for a page: small, its ids its own, its colours those of the reader's theme.

- `fit`: metadata, unused ids, font lists and digits beyond a hundredth of a point go; known colours become the page's
- `PALETTE`: the figures' colours and the style variable that stands for each, which base.html sets for light and dark
"""

import re

PALETTE = {
    "#0072b2": "c1", "#d55e00": "c2", "#009e73": "c3", "#cc79a7": "c4", "#56b4e9": "c5", "#e69f00": "c6",
    "#000000": "ink", "#ffffff": "card",
}  # fmt: skip

_TAG = re.compile(r"<[^>]*>")  # text holds no bare < or >, and matplotlib escapes both in attributes
_COLOUR = re.compile(r"#[0-9a-fA-F]{6}\b")
_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_REFERENCE = re.compile(r'url\(#([^)"]+)\)|xlink:href="#([^"]+)"')
_GEOMETRY = re.compile(r' (?:d|x|y|width|height|points|transform)="[^"]*"')


def fit(svg: str, *, prefix: str) -> tuple[str, bool]:
    """The SVG for a page, and whether its colours follow the theme; one with a colour of its own keeps all of them.

    Args:
        svg: what `repro.report.figures.draw` gives.
        prefix: of the ids, so that two figures on one page share none.
    """
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    tags = _TAG.findall(svg)
    colours = {colour.lower() for tag in tags for colour in _COLOUR.findall(tag)}
    themed = "<image" not in svg and all(colour in PALETTE or _is_grey(colour) for colour in colours)
    used = {name for tag in tags for pair in _REFERENCE.findall(tag) for name in pair if name}

    def tag(match: re.Match[str]) -> str:
        text = _GEOMETRY.sub(_rounded, match[0])
        text = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", text)
        text = re.sub(r"url\(#", f"url(#{prefix}", text).replace('xlink:href="#', f'xlink:href="#{prefix}')
        text = re.sub(r"; font-family: [^;\"]*|font-family: [^;\"]*; ", "", text)
        return _COLOUR.sub(lambda m: f"var(--{_variable(m[0].lower())})", text) if themed else text

    svg = _TAG.sub(tag, svg)
    return re.sub(r">\s*\n\s*<", ">\n<", svg).replace("<defs>\n</defs>\n", ""), themed


def _rounded(attribute: re.Match[str]) -> str:
    text = " ".join(attribute[0].split())
    return " " + _NUMBER.sub(lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), text).replace(' "', '"')


def _is_grey(colour: str) -> bool:
    return colour[1:3] == colour[3:5] == colour[5:7]


def _variable(colour: str) -> str:
    return PALETTE.get(colour, "grey")
