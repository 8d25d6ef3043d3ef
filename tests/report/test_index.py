"""The index over several papers and replications: what it lists, what it refuses, and that nothing foreign is markup in it."""

import copy
import shutil
from pathlib import Path

import pytest
from command_line import ROOT
from page_reader import faults, read
from test_page import BUNDLES, HOSTILE, poisoned

from records import canonical, keys
from records.errors import InvalidError, UsageError
from records.package import read_bundle, write_bundle
from records.replication import read_statement, side_by_side
from repro.report.index import Replication, render_index
from repro.workflow.publish import write_index

PUBLISHED = ROOT / "papers/emo/replications/emo-nano.repro.zip"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two replications of one paper and one of another, one of them twice."""
    for at, path in enumerate((PUBLISHED, *BUNDLES, BUNDLES[0])):
        (tmp_path / f"some #{at}").mkdir()
        shutil.copy(path, tmp_path / f"some #{at}" / path.name)
    return tmp_path


def test_papers_claims_and_bundles(folder: Path) -> None:
    (folder / "out").mkdir()
    assert write_index([folder], folder / "out/index.html", trusted_keys=None) == 3
    page = (folder / "out/index.html").read_text()
    hrefs = [f"../some%20%23{at}/{path.name}" for at, path in enumerate((PUBLISHED, *BUNDLES))]
    assert faults(page, links=frozenset(hrefs)) == []
    reader = read(page)
    assert [e.text for e in reader.named("h2")] == [
        "EMO: Frustratingly Easy Progressive Training of Extendable MoE",
        "Elastic MoE: Unlocking the Inference-Time Scalability of Mixture-of-Experts",
    ]
    links = [e.attributes["href"] for e in reader.named("a") if e.attributes["href"].startswith("..")]
    assert links == hrefs
    outcome = canonical.loads(read_bundle(PUBLISHED)["outcome.json"])
    verdict = next(item for item in outcome["verdicts"] if item["claim"] == "E1")["verdict"]
    first = [" ".join(e.text.split()) for e in reader.named("tr")][1]
    assert first.startswith("E1 Progressive training") and first.endswith("replicated")
    assert verdict.replace("_", " ") in first and "inconclusive" in first
    assert "not trusted" not in page and "a key that nobody here vouches for" in page
    for path in (PUBLISHED, *BUNDLES):
        assert read_statement(read_bundle(path)).statement["predicate"]["manifest_sha256"] in page


def test_the_same_bytes_again_and_trust_where_it_is_given(folder: Path, tmp_path: Path) -> None:
    public = tmp_path / "key.json"
    public.write_bytes(canonical.dumps(keys.private_key(bytes(range(32))).public.to_json()))
    for name in ("a.html", "b.html"):
        write_index([folder / "some #1", folder / "some #2" / BUNDLES[1].name], tmp_path / name, trusted_keys=public)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert (tmp_path / "a.html").read_text().count("trusted: signed by repro-56475aa75463474c") == 2


def test_what_does_not_hold_is_not_listed(folder: Path) -> None:
    files = read_bundle(BUNDLES[1])
    write_bundle(folder / "bad.repro.zip", files | {"report.html": b"another page"})
    with pytest.raises(InvalidError, match=r"bad\.repro\.zip: invalid: 'report.html' is not the file"):
        write_index([folder], folder / "index.html", trusted_keys=None)
    assert not (folder / "index.html").exists()
    (folder / "empty").mkdir()
    with pytest.raises(UsageError, match="found none"):
        write_index([folder / "empty"], folder / "index.html", trusted_keys=None)
    with pytest.raises(UsageError, match="found nothing"):
        write_index([folder / "nowhere"], folder / "index.html", trusted_keys=None)


def test_nothing_foreign_is_markup() -> None:
    files = read_bundle(BUNDLES[1])
    given = {name: canonical.loads(files[f"{name}.json"]) for name in ("plan", "outcome", "run")} | {"evidence": {}}

    def page(text: str) -> str:
        changed = poisoned(given, text)
        predicate = copy.deepcopy(read_statement(files).statement["predicate"])
        predicate["code"] = {"dirty": True, "commit": f"c{text}"}
        replication = Replication(
            subject="arxiv:2509.21892", name=f"n{text}.zip", href="n.zip", plan=changed["plan"], outcome=changed["outcome"],
            predicate=predicate, state="valid", signer=f"k{text}",
        )  # fmt: skip
        side = side_by_side([files], trusted=keys.pinned())
        return render_index([replication], [side])

    tame, hostile = page("tame"), page(HOSTILE)
    assert faults(hostile, links=frozenset({"n.zip"})) == []
    assert [(e.name, *sorted(e.attributes)) for e in read(hostile).elements] == [
        (e.name, *sorted(e.attributes)) for e in read(tame).elements
    ]
