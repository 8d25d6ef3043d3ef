"""The mirror: built from what holds, the same bytes each time, and verified as the registry's documents are."""

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from record_cases import STORE, bundle_of, failed, own_record
from test_replication import FILES, KEY, MINE, TRUSTED, build

from records import canonical, document, keys, merge, schema
from records.errors import InvalidError, MalformedError, UsageError
from records.mirror import Page, build_site
from records.replication import side_by_side

SUFFIX = "X72AYRLPIFP2UVYVUQLNZSTJUW"
NUMBER = f"pith:2025:{SUFFIX}"
SIGNED: dict[str, Any] = json.loads((STORE / f"{SUFFIX}.json").read_bytes())


def site(*pages: Page, **options: Any) -> dict[str, bytes]:
    given = {"key": MINE, "trusted": TRUSTED, "base_url": "https://mirror.example/", "name": "a mirror",
             "generated_at": "2026-11-21T00:00:00Z"}  # fmt: skip
    return build_site(pages or [Page(document=SIGNED)], **{**given, **options})


def replication(
    verdict: str = "replicated", scale: str = "nano", key: keys.PrivateKey | None = KEY
) -> dict[str, bytes]:
    record = (STORE / f"{SUFFIX}.json").read_bytes()
    verdicts = [{"claim": "A1", "verdict": verdict}, {"claim": "A2", "verdict": "not_tested"}]
    subject = {"subject_name": NUMBER, "subject_sha256": SIGNED["canonical_sha256"]}
    return build(FILES | {"pith-record.json": record}, key, **subject, verdicts=verdicts, scale=scale)


def test_every_document_of_the_site_verifies() -> None:
    built = site()
    assert set(built) == {
        "index.html", "pith-mirrors.json", "pith-signing-key.json", f"pith/{SUFFIX}.json", f"pith/{SUFFIX}/bundle.json",
        f"pith/{SUFFIX}/state.json", f"pith/{SUFFIX}/index.html", f".well-known/pith/{SUFFIX}/bundle.json",
    }  # fmt: skip
    states = {}
    for name, data in built.items():
        if name.endswith(".json"):
            found = document.verify_document(data, target=name, trusted=keys.pinned())
            assert not failed(found), (name, found)
            states[name] = found.state
    assert states[f"pith/{SUFFIX}.json"] == states[f"pith/{SUFFIX}/bundle.json"] == "trusted"
    assert states[f"pith/{SUFFIX}/state.json"] == "valid"
    manifest = json.loads(built["pith-mirrors.json"])
    assert schema.faults("mirrors", manifest) == []
    assert manifest["mirrors"][0]["bundle_pattern"] == "https://mirror.example/pith/{suffix}/bundle.json"
    merged = merge.merge_bundles([json.loads(built[f"pith/{SUFFIX}/bundle.json"])])
    assert merge.compare_with_served(merged, json.loads(built[f"pith/{SUFFIX}/state.json"])) == []


def test_the_same_input_gives_the_same_bytes() -> None:
    assert site() == site()


def test_a_bundle_keeps_the_registrys_order_of_fields() -> None:
    assert list(json.loads(site()[f"pith/{SUFFIX}/bundle.json"])) == [
        "bundle_type", "bundle_version", "pith_number", "short_pith_number", "canonical_record", "canonical_sha256", "source",
        "source_aliases", "events",
    ]  # fmt: skip
    bundle = bundle_of(SIGNED)
    assert json.loads(site(Page(document=bundle))[f"pith/{SUFFIX}/bundle.json"]) == bundle


def test_what_does_not_hold_is_not_spread() -> None:
    bad = {**SIGNED, "short_pith_number": "pith:AAAAAAAA"}
    with pytest.raises(InvalidError, match="does not hold"):
        site(Page(document=bad))
    with pytest.raises(UsageError, match="holds one"):
        site(Page(document=SIGNED), Page(document=bundle_of(SIGNED)))
    with pytest.raises(UsageError, match="at least one"):
        build_site(
            [], key=MINE, trusted=TRUSTED, base_url="https://m.example", name="m", generated_at="2026-01-01T00:00:00Z"
        )
    with pytest.raises(UsageError, match="https"):
        site(base_url="http://mirror.example")


class Links(HTMLParser):
    """Every tag and every address of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src")]


def test_pages_escape_what_documents_say_and_load_nothing() -> None:
    evil = '<script>alert(1)</script>"\x1b[31m\u202e'
    record, key = own_record(title=evil)
    record["pith_number"] = canonical_number(record)
    record["paper"] = {"title": record.pop("title")}
    mine = keys.PublicKey(key_id=key.key_id, raw=key.public.raw, source="file")
    built = site(Page(document=record), trusted=keys.KeySet(keys=(mine,)), name=evil)
    pages = [built[name].decode() for name in built if name.endswith(".html")]
    assert any("&lt;script&gt;alert(1)&lt;/script&gt;" in text for text in pages)
    for text in pages:
        page = Links()
        page.feed(text)
        assert "script" not in page.tags and "img" not in page.tags
        assert all(re.fullmatch(r"[A-Za-z0-9./-]+", address) for address in page.addresses), page.addresses
        assert all(character.isprintable() or character == "\n" for character in text)
        assert "default-src 'none'" in text


def canonical_number(record: dict[str, Any]) -> str:
    from records.number import number_of

    return number_of(bytes.fromhex(record["canonical_sha256"]), "2026")


def test_replications_side_by_side_keep_conflicts() -> None:
    other = keys.private_key(bytes(32))
    trusted = TRUSTED.with_keys([keys.PublicKey(key_id=other.key_id, raw=other.public.raw, source="file")])
    yes, no = replication(), replication("not_replicated", key=other)
    small = replication("not_replicated", scale="small", key=None)
    compared = side_by_side([yes, no, small, yes], trusted=trusted)
    assert side_by_side([small, yes, no], trusted=trusted) == compared
    assert compared.count == 3
    first, second = compared.claims
    assert first.conflict and first.summary() == "1 of 3 replicated, in conflict"
    assert {entry.signer for entry in first.verdicts} == {KEY.key_id, other.key_id, "unsigned"}
    assert second.summary() == "0 of 0 replicated"
    assert not side_by_side([yes, small], trusted=trusted).claims[0].conflict  # scales differ: that is no conflict
    built = site(Page(document=SIGNED, compared=compared, replications={"a.repro.zip": b"zip"}))
    assert "in conflict" in built[f"pith/{SUFFIX}/index.html"].decode()
    assert json.loads(built[f"pith/{SUFFIX}/replications.json"])["claims"][0]["conflict"] is True
    assert built[f"pith/{SUFFIX}/replications/a.repro.zip"] == b"zip"


def test_replications_that_do_not_belong_together() -> None:
    with pytest.raises(InvalidError, match="one paper"):
        side_by_side([replication(), build()], trusted=TRUSTED)
    with pytest.raises(InvalidError, match="does not hold"):
        side_by_side([replication() | {"extra": b""}], trusted=TRUSTED)
    with pytest.raises(MalformedError, match="at least one"):
        side_by_side([], trusted=TRUSTED)
    assert canonical.dumps(side_by_side([replication()], trusted=TRUSTED).to_json())
