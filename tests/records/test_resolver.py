"""Resolution: local first, then mirrors, then the registry; nothing served is believed; nothing is forgotten or rolled back."""

import json
import multiprocessing
import socket
from pathlib import Path
from typing import Any

import pytest
from loopback import Site, cutting, failing
from record_cases import STORE, bundle_of, failed, own_record

from records import canonical, keys
from records.errors import IndeterminateError, NetworkError
from records.network import Client
from records.number import SUFFIX_LENGTH, number_of, parse_reference
from records.report import Verification
from records.resolver import Cache, Candidate, PackageStore, Resolver


def made_up(identifier: str = "2601.00001") -> dict[str, Any]:
    record, _ = own_record(identifier)
    record["pith_number"] = number_of(bytes.fromhex(record["canonical_sha256"]), "2026")
    return record


def suffix(record: dict[str, Any]) -> str:
    return str(record["pith_number"])[-SUFFIX_LENGTH:]


def resolver(tmp_path: Path, url: str = "https://registry.invalid", **options: Any) -> Resolver:
    client = Client(offline=options.pop("offline", False), backoff=0.001, read_timeout=5, tries=options.pop("tries", 2))
    return Resolver(client=client, trusted=keys.pinned(), cache=Cache(tmp_path / "c"), registry=url, **options)


def ask(found: Resolver, name: str) -> Verification:
    return found.verify(parse_reference(name), target=name)


def test_the_package_answers_without_a_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("a socket was opened"))
    for name in ("pith:X72AYRLP", "arxiv:2506.12119", "doi:10.48550/arxiv.2506.12119v2"):
        assert ask(resolver(tmp_path), name).state == "trusted"


def test_the_registry_answers_and_the_cache_remembers(tmp_path: Path, site: Site) -> None:
    record = made_up()
    site.routes[f"/pith/{suffix(record)}.json"] = json.dumps(record).encode()
    online = resolver(tmp_path, site.url)
    assert ask(online, record["pith_number"]).state == "valid"
    asked = len(site.requests)
    for name in (record["pith_number"], f"pith:{suffix(record)[:8]}", "arxiv:2601.00001", "arxiv:2601.00001v1"):
        assert ask(online, name).pith_number == record["pith_number"]
        assert ask(resolver(tmp_path, offline=True), name).pith_number == record["pith_number"]
    assert len(site.requests) == asked
    with pytest.raises(IndeterminateError):
        ask(resolver(tmp_path, offline=True), "arxiv:2601.00001v2")
    assert ask(resolver(tmp_path, site.url, refresh=True), record["pith_number"]).state == "valid"
    assert len(site.requests) > asked


def test_aliases_are_resolved_by_the_registry_and_checked(tmp_path: Path, site: Site) -> None:
    record, other = made_up(), made_up("2601.00002")
    site.routes[f"/pith/{suffix(record)}.json"] = json.dumps(record).encode()
    site.routes["/api/pith-number/resolve?arxiv=2601.00001&json=true"] = json.dumps(
        {"results": [{"pith_number": record["pith_number"]}]}
    ).encode()
    assert ask(resolver(tmp_path, site.url), "arxiv:2601.00001").pith_number == record["pith_number"]
    # The registry's word is no proof: another paper's record under this alias fails.
    site.routes["/api/pith-number/resolve?arxiv=2601.00009&json=true"] = json.dumps(
        {"pith_number": other["pith_number"]}
    ).encode()
    site.routes[f"/pith/{suffix(other)}.json"] = json.dumps(other).encode()
    assert failed(ask(resolver(tmp_path, site.url), "arxiv:2601.00009")) == {"aliases"}
    site.routes["/api/pith-number/resolve?arxiv=2601.00003&json=true"] = b"<html>"
    with pytest.raises(NetworkError, match="strict JSON"):
        ask(resolver(tmp_path, site.url), "arxiv:2601.00003")


def test_a_publishers_doi_is_the_registrys_word(tmp_path: Path, site: Site) -> None:
    record = made_up()
    number = record["pith_number"]
    path = "/api/pith-number/resolve?doi=10.1000/a%26b&json=true"
    site.routes[path] = json.dumps({"pith_number": number}).encode()
    site.routes[f"/pith/{suffix(record)}.json"] = json.dumps(record).encode()
    assert failed(ask(resolver(tmp_path, site.url), "doi:10.1000/a&b")) == {"aliases"}
    record["aliases"] = [{"alias_kind": "doi", "alias_value": "10.1000/A&B"}]
    site.routes[f"/pith/{suffix(record)}.json"] = json.dumps(record).encode()
    assert ask(resolver(tmp_path, site.url), "doi:10.1000/a&b").state == "valid"
    assert path in site.asked()


def test_ambiguous_names(tmp_path: Path, site: Site) -> None:
    """Two versions of one paper have two numbers; a short number may have two as well: neither is guessed."""
    one, two = made_up(), made_up("2601.00002")
    numbers = [{"pith_number": one["pith_number"]}, {"pith_number": two["pith_number"]}]
    site.routes["/api/pith-number/resolve?arxiv=2601.00001&json=true"] = json.dumps(numbers).encode()
    site.routes["/pith/AAAAAAAA.json"] = json.dumps(numbers).encode()
    for name in ("arxiv:2601.00001", "pith:AAAAAAAA"):
        with pytest.raises(IndeterminateError, match="ambiguous"):
            ask(resolver(tmp_path, site.url), name)


def test_a_short_number_shared_by_two_records_in_the_cache_is_ambiguous(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c")
    for end in ("A", "B"):
        path = tmp_path / "c" / "refs" / "AB" / ("AB" + "C" * 23 + end)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(canonical.dumps({"sha256": "0" * 64, "url": "", "valid_events": 0}))
    assert len(cache.suffixes(parse_reference("pith:ABCCCCCC"))) == 2
    with pytest.raises(IndeterminateError, match="ambiguous"):
        ask(resolver(tmp_path, offline=True), "pith:ABCCCCCC")


def test_a_document_of_another_number_is_not_taken(tmp_path: Path, site: Site) -> None:
    record, other = made_up(), made_up("2601.00002")
    site.routes[f"/pith/{suffix(record)}.json"] = json.dumps(other).encode()
    found = ask(resolver(tmp_path, site.url), record["pith_number"])
    assert found.state == "invalid" and failed(found) == {"pith_number"}
    with pytest.raises(IndeterminateError):  # and it was not remembered
        ask(resolver(tmp_path, offline=True), record["pith_number"])


def test_mirrors_come_before_the_registry_and_a_bad_one_does_no_harm(tmp_path: Path, site: Site) -> None:
    record = made_up()
    number = suffix(record)
    patterns = ["/bad/{suffix}.json", "/cut/{suffix}.json", "/good/{suffix}.json"]
    mirrors = [
        {"name": "m", "mirror_type": "https", "base_url": site.url, "bundle_pattern": site.url + pattern}
        for pattern in patterns
    ]
    mirrors.insert(0, {"name": "x", "base_url": "x", "bundle_pattern": "http://example.org/{suffix}"})
    site.routes["/pith-mirrors.json"] = json.dumps(
        {"manifest_type": "pith_mirror_manifest", "manifest_version": "1.0", "mirrors": mirrors}
    ).encode()
    site.routes[f"/bad/{number}.json"] = json.dumps(made_up("2601.00002")).encode()
    site.routes[f"/cut/{number}.json"] = cutting
    site.routes[f"/good/{number}.json"] = json.dumps(record).encode()
    registry = resolver(tmp_path, f"{site.url}/registry", tries=1)
    site.routes["/registry/pith-mirrors.json"] = site.routes.pop("/pith-mirrors.json")
    assert ask(registry, record["pith_number"]).state == "valid"
    assert [path.split("/")[1] for path in site.asked()] == ["registry", "bad", "cut", "good"]


def test_a_network_that_fails_is_not_a_number_that_is_unknown(tmp_path: Path, site: Site) -> None:
    number = made_up()["pith_number"]
    with pytest.raises(IndeterminateError, match="no record"):
        ask(resolver(tmp_path, site.url), number)
    for path in (f"/pith/{number[-26:]}.json", f"/pith/{number[-26:]}/bundle.json"):
        site.routes[path] = failing(99, b"")
    with pytest.raises(NetworkError):
        ask(resolver(tmp_path, site.url), number)


def test_a_changed_cache_file_is_as_good_as_none(tmp_path: Path, site: Site) -> None:
    record = made_up()
    site.routes[f"/pith/{suffix(record)}.json"] = json.dumps(record).encode()
    ask(resolver(tmp_path, site.url), record["pith_number"])
    (stored,) = [path for path in (tmp_path / "c" / "objects").rglob("*") if path.is_file()]
    stored.write_bytes(stored.read_bytes() + b" ")
    with pytest.raises(IndeterminateError):
        ask(resolver(tmp_path, offline=True), record["pith_number"])
    for path in (tmp_path / "c" / "refs").rglob("*"):
        if path.is_file():
            path.write_bytes(b'{"sha256":"../../../../etc/passwd","valid_events":0,"url":""}')
    assert Cache(tmp_path / "c").get(suffix(record)) is None


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, site: Site) -> None:
    record = made_up()
    site.routes[f"/pith/{suffix(record)}.json"] = json.dumps(record).encode()
    (tmp_path / "c").write_text("a file where the folder should be")
    assert ask(resolver(tmp_path, site.url), record["pith_number"]).state == "valid"


def _write_often(folder: str, number: int) -> None:
    record = made_up()
    for turn in range(40):
        data = json.dumps(record, indent=(number + turn) % 5).encode()
        Cache(Path(folder)).remember(Candidate(data=data, origin="test"), suffix(record), valid_events=turn)
        found = Cache(Path(folder)).get(suffix(record))
        assert found is None or json.loads(found.data) == record


def test_parallel_processes_never_see_half_a_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write_often, args=(str(tmp_path), number)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert Cache(tmp_path).get(suffix(made_up())) is not None
    assert not list(tmp_path.rglob("*.part"))


def test_rollback(tmp_path: Path, site: Site) -> None:
    signed = json.loads((STORE / "X72AYRLPIFP2UVYVUQLNZSTJUW.json").read_bytes())
    bundle = bundle_of(signed)
    online = resolver(tmp_path, site.url, refresh=True)
    site.routes[f"/pith/{suffix(signed)}/bundle.json"] = json.dumps(bundle).encode()
    assert ask(online, signed["pith_number"]).kind == "pith_bundle"
    del bundle["events"][1]
    older = Candidate(data=json.dumps(bundle).encode(), origin="file")
    found = online.check(older, asked=None, target="t")
    assert found.state == "invalid" and "rolled back" in found.checks[-1].detail
    allowed = resolver(tmp_path, site.url, allow_rollback=True)
    assert allowed.check(older, asked=None, target="t").state == "trusted"
    # What was seen stays seen: a record fetched since does not lower the count.
    online.check(Candidate(data=json.dumps(signed).encode(), origin="x", from_network=True), asked=None, target="t")
    assert online.check(older, asked=None, target="t").state == "invalid"


def test_the_store_falls_back_to_the_schema_when_a_file_was_changed(tmp_path: Path) -> None:
    import shutil

    shutil.copytree(STORE.parent, tmp_path / "data")
    path = tmp_path / "data" / "records" / "IV7VH3NCTL2M6JAD44FIMISHCY.json"
    path.write_bytes(path.read_bytes().replace(b'"paper":{"title":"EMO', b'"paper":{"title":"XMO'))
    candidate = PackageStore(tmp_path / "data").get("IV7VH3NCTL2M6JAD44FIMISHCY")
    assert candidate is not None and candidate.schema_known is None
    found = resolver(tmp_path, offline=True, store=PackageStore(tmp_path / "data"))
    assert failed(ask(found, "pith:IV7VH3NC")) == {"title_hash"}


def test_papers_without_a_number(tmp_path: Path) -> None:
    for name, title in (("arxiv:2509.21892", "Elastic MoE"), ("arxiv:2604.19835v2", "Expert Upcycling")):
        with pytest.raises(IndeterminateError, match=f"{title}.*not known"):
            ask(resolver(tmp_path, offline=True), name)
