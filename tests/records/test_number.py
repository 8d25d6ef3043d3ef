"""Pith numbers: derivation, forms, and names that are none."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from records.errors import UsageError
from records.number import Reference, arxiv_key, number_of, parse_reference, suffix_of

DIGEST = bytes.fromhex("457f53eda29af4cf2403e70a86224716237debbe07672b45d6b1ba5d65ccea01")
FULL = "pith:2026:IV7VH3NCTL2M6JAD44FIMISHCY"


def test_the_whole_digest_is_encoded() -> None:
    assert number_of(DIGEST, "2026-05-13T09:31:09Z") == FULL
    # Character 26 holds bits 126 to 130, past the first 16 bytes.
    assert suffix_of(DIGEST[:16] + bytes(16))[:25] == suffix_of(DIGEST)[:25]
    assert suffix_of(DIGEST[:16] + b"\xff" * 16) != suffix_of(DIGEST)


@given(st.binary(min_size=32, max_size=32), st.sampled_from([8, 12, 16, 26]), st.booleans(), st.booleans())
def test_every_form_in_any_case(digest: bytes, length: int, lower: bool, prefix: bool) -> None:
    value = suffix_of(digest)[:length]
    typed = ("pith:" if prefix else "") + (value.lower() if lower else value)
    assert parse_reference(typed) == Reference(kind="pith", value=value)


def test_names() -> None:
    assert parse_reference(FULL) == Reference(kind="pith", value=FULL[10:], year="2026")
    assert parse_reference("arXiv:2506.12119v2") == Reference(kind="arxiv", value="2506.12119", version=2)
    assert parse_reference("doi:10.48550/arXiv.2506.12119") == Reference(kind="arxiv", value="2506.12119")
    assert parse_reference("arxiv:hep-lat/0305021") == Reference(kind="arxiv", value="hep-lat/0305021")
    assert parse_reference("doi:10.1000/xyz").kind == "doi"
    assert arxiv_key("math.CA/0101001") == arxiv_key("math/0101001")
    assert str(parse_reference(FULL)) == FULL


@pytest.mark.parametrize(
    "text",
    [
        "", "pith:", "pith:ABC", "pith:2026:IV7VH3NCTL2M6JAD44FIMISHC1", "pith:26:IV7VH3NC", FULL + "A", "pith:IV7VH3N\u0421",
        "arxiv:2506.1", "arxiv:2506.12119v0", "arxiv:../../etc/passwd", "doi:hello", "pith:IV7VH3NC\x1b[31m", "pith:../../..",
        "pith:ıv7vh3nc", "arxiv:２506.12119",
    ],
)  # fmt: skip
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(UsageError, match="expected") as caught:
        parse_reference(text)
    assert str(caught.value).isprintable()


def test_short_numbers_collide_and_so_are_no_identity() -> None:
    """Two digests that share 40 bits have one short form and two full ones."""
    one = hashlib.sha256(b"a").digest()
    other = one[:5] + bytes(27)
    assert suffix_of(one)[:8] == suffix_of(other)[:8]
    assert suffix_of(one) != suffix_of(other)
