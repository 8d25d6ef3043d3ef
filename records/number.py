"""Pith numbers, and the other names that a paper answers to.

A full number is `pith:YYYY:SUFFIX26`: the year of `metadata.submitted_at`, and the first 26 characters (130 bits) of
the base32 of the whole 32-byte canonical hash. Forms of 8, 12 and 16 characters are prefixes: they look a record up,
and never identify one, for among 2.5 million records about 3 pairs share their first 8.
"""

import re
from base64 import b32encode
from dataclasses import dataclass
from typing import Final, Literal

from records.errors import UsageError

SUFFIX_LENGTH: Final = 26
SHORT_LENGTHS: Final = (8, 12, 16)
FULL_NUMBER: Final = re.compile(r"pith:[0-9]{4}:[A-Z2-7]{26}")

_PITH: Final = re.compile(r"(?:pith:)?(?:([0-9]{4}):)?([A-Z2-7]+)", re.IGNORECASE | re.ASCII)
#: Identifiers since 2007-04, and before; archives and subject classes are letters, `.` and `-`.
_ARXIV: Final = re.compile(
    r"([0-9]{4}\.[0-9]{4,5}|[a-z-]+(?:\.[a-z-]+)?/[0-9]{7})(?:v([1-9][0-9]{0,3}))?", re.IGNORECASE | re.ASCII
)
_DOI_OF_ARXIV: Final = "10.48550/arxiv."


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """What a user asked for, normalised.

    - kind `pith`: `value` is an upper-case suffix of 8, 12, 16 or 26 characters, `year` the asked-for year or None
    - kind `arxiv`: `value` is the identifier without version, `version` the asked-for one or None
    - kind `doi`: `value` is the lower-case DOI, for those that are not arXiv's own
    """

    kind: Literal["pith", "arxiv", "doi"]
    value: str
    year: str | None = None
    version: int | None = None

    def __str__(self) -> str:
        if self.kind == "pith":
            return f"pith:{self.year}:{self.value}" if self.year else f"pith:{self.value}"
        return f"{self.kind}:{self.value}" + (f"v{self.version}" if self.version else "")

    @property
    def is_full(self) -> bool:
        """Whether this names exactly one record by its hash."""
        return self.kind == "pith" and len(self.value) == SUFFIX_LENGTH


def suffix_of(digest: bytes) -> str:
    """The 26-character suffix of a record whose canonical hash is the 32 bytes `digest`."""
    return b32encode(digest)[:SUFFIX_LENGTH].decode("ascii")


def number_of(digest: bytes, submitted_at: str) -> str:
    """The full Pith number of a record; `submitted_at` starts with the year."""
    return f"pith:{submitted_at[:4]}:{suffix_of(digest)}"


def parse_reference(text: str) -> Reference:
    """Read a Pith number (any form, any case), `arxiv:ID[vN]` or `doi:…`; UsageError says what was expected."""
    shown = ascii(text[:60])
    scheme, _, rest = text.strip().partition(":")
    if scheme.lower() == "arxiv":
        match = _ARXIV.fullmatch(rest)
        if match is None:
            raise UsageError(f"expected arxiv:2506.12119, arxiv:2506.12119v2 or arxiv:hep-lat/0305021, found {shown}")
        return Reference(kind="arxiv", value=match[1].lower(), version=int(match[2]) if match[2] else None)
    if scheme.lower() == "doi":
        doi = rest.lower()
        if doi.startswith(_DOI_OF_ARXIV):
            return parse_reference("arxiv:" + doi.removeprefix(_DOI_OF_ARXIV))
        if not re.fullmatch(r"10\.[0-9]{4,9}/[!-~]{1,200}", doi):
            raise UsageError(f"expected a DOI like doi:10.48550/arxiv.2506.12119, found {shown}")
        return Reference(kind="doi", value=doi)
    match = _PITH.fullmatch(text.strip())
    if match is None or len(match[2]) not in (*SHORT_LENGTHS, SUFFIX_LENGTH):
        raise UsageError(
            f"expected a Pith number like pith:2026:IV7VH3NCTL2M6JAD44FIMISHCY or its first 8, 12 or 16 characters "
            f"(A to Z, 2 to 7), found {shown}"
        )
    return Reference(kind="pith", value=match[2].upper(), year=match[1])


def arxiv_key(identifier: str) -> str:
    """An arXiv identifier as it is compared: lower case, and `math.CA/0101001` as `math/0101001`, the same paper."""
    archive, slash, number = identifier.lower().partition("/")
    return f"{archive.partition('.')[0]}/{number}" if slash else archive


def derived_aliases(record: object, digest: str | None) -> dict[str, str]:
    """What each kind of alias has to be, from the record's source and canonical hash (hex), where they are there."""
    aliases: dict[str, str] = {}
    source = record.get("source") if isinstance(record, dict) else None
    if isinstance(source, dict) and isinstance(source.get("id"), str):
        identifier = source["id"]
        aliases |= {"arxiv": identifier, "doi": f"{_DOI_OF_ARXIV}{identifier}"}
        aliases["arxiv_version"] = f"{identifier}v{source.get('version')}"
    if digest is not None:
        suffix = suffix_of(bytes.fromhex(digest))
        aliases |= {f"pith_short_{length}": suffix[:length] for length in SHORT_LENGTHS}
    return aliases
