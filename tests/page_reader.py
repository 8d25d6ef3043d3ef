"""A page as assistive technology and a suspicious reader see it: its elements, without a browser."""

import itertools
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "br", "link", "img", "input", "hr", "base", "embed", "source", "col", "area", "wbr", "track"}
#: What our pages are made of; anything else came in through a text.
ELEMENTS = frozenset(
    """html head meta title style body a header h1 h2 h3 h4 p b i code nav ul li main section article div figure
    figcaption blockquote table caption thead tbody tr th td dl dt dd pre details summary br span small
    svg g path use defs clippath rect circle text tspan image""".split()  # noqa: SIM905
)  # fmt: skip


@dataclass
class Element:
    """An element: its name, attributes, the names around it, and the text within it."""

    name: str
    attributes: dict[str, str]
    around: tuple[str, ...]
    text: str = ""


@dataclass
class Reader(HTMLParser):
    """Collects every element of a page, in order; `faults` are elements that are not closed in their turn."""

    elements: list[Element] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._open: list[Element] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if len({name for name, _ in attrs}) < len(attrs):
            self.faults.append(f"<{tag}> has an attribute twice")
        around = tuple(element.name for element in self._open)
        element = Element(tag, {name: value or "" for name, value in attrs}, around)
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open[-1].name != tag:
            self.faults.append(f"</{tag}> closes {self._open[-1].name if self._open else 'nothing'}")
            return
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.text += data

    def named(self, *names: str) -> list[Element]:
        """The elements of these names, in order."""
        return [element for element in self.elements if element.name in names]


def read(page: str) -> Reader:
    """The page's elements."""
    reader = Reader()
    reader.feed(page)
    reader.close()
    return reader


def faults(page: str, *, links: frozenset[str] = frozenset()) -> list[str]:
    """What a page gets wrong of the rules that hold for all of ours: safe, whole, and to be used without eyes or mouse.

    `links` are the places beside it that it may lead to.
    """
    reader = read(page)
    found = list(reader.faults)
    found += [f"<{e.name}> has no place here" for e in reader.elements if e.name not in ELEMENTS]
    found += [
        f"<{e.name}> has {name}={value!r}"
        for e in reader.elements
        for name, value in e.attributes.items()
        if name.startswith("on") or name in ("src", "srcset", "action", "formaction", "srcdoc", "ping", "background")
        or (name in ("href", "xlink:href") and value not in links and not value.startswith(("#", "https://arxiv.org/abs/"))
            and not (e.name == "image" and value.startswith("data:image/png;base64,")))
        or (name == "style" and "url(" in value and "url(#" not in value)
    ]  # fmt: skip
    policy = [e.attributes["content"] for e in reader.named("meta") if e.attributes.get("http-equiv")]
    if len(policy) != 1 or not policy[0].startswith("default-src 'none'; style-src 'unsafe-inline';"):
        found.append(f"the content security policy is {policy}")
    listed = [e.attributes["id"] for e in reader.elements if "id" in e.attributes]
    ids = frozenset(listed)
    found += [f"the id {name} occurs twice" for name in sorted(ids) if listed.count(name) > 1]
    for e in reader.elements:
        targets = [e.attributes.get("aria-labelledby"), e.attributes.get("href", "").removeprefix("#")]
        targets += [e.attributes.get("xlink:href", "").removeprefix("#")]
        found += [
            f"{name} is not on the page" for name in targets if name and "://" not in name and name not in ids | links
        ]
    levels = [int(e.name[1]) for e in reader.named("h1", "h2", "h3", "h4")]
    if levels[:1] != [1] or levels.count(1) != 1 or any(b > a + 1 for a, b in itertools.pairwise(levels)):
        found.append(f"the headings' levels are {levels}")
    found += [
        f"an empty {e.name}" for e in reader.named("h1", "h2", "h3", "h4", "title", "th", "a") if not e.text.strip()
    ]
    for landmark in ("header", "main"):
        if len(reader.named(landmark)) != 1:
            found.append(f"expected one {landmark}")
    found += ["a nav without a name" for e in reader.named("nav") if not e.attributes.get("aria-label")]
    if reader.named("html")[0].attributes.get("lang") != "en":
        found.append("no language")
    found += [
        "a header cell without scope" for e in reader.named("th") if e.attributes.get("scope") not in ("row", "col")
    ]
    found += ["a drawing without a name" for e in reader.named("svg")
              if e.attributes.get("role") != "img" or not e.attributes.get("aria-label")]  # fmt: skip
    for e in reader.elements:
        reached = e.attributes.get("tabindex") == "0" and e.attributes.get("aria-label")
        if e.attributes.get("class") == "scroll" and not reached:
            found.append("what scrolls cannot be reached or has no name")
    first = reader.named("a")[0]
    if first.attributes.get("class") != "skip":
        found.append("the first link is not the one that skips to the content")
    return found
