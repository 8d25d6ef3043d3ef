"""CITATION.cff, codemeta.json and pyproject.toml say the same of the project, and nothing that nobody knows."""

import json
import re
import tomllib

from command_line import ROOT

import repro

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
AUTHORS = [author["name"] for author in PROJECT["authors"]]


def test_codemeta_is_what_pyproject_says() -> None:
    meta = json.loads((ROOT / "codemeta.json").read_bytes())
    assert meta["@context"] == "https://w3id.org/codemeta/3.0"
    assert (meta["name"], meta["version"], meta["description"]) == (
        PROJECT["name"], PROJECT["version"], PROJECT["description"],
    )  # fmt: skip
    assert meta["license"] == f"https://spdx.org/licenses/{PROJECT['license']}"
    assert [author["name"] for author in meta["author"]] == AUTHORS
    assert meta["keywords"] == PROJECT["keywords"]
    assert f">={re.findall(r'[0-9.]+', meta['runtimePlatform'])[0]}" == PROJECT["requires-python"]


def test_the_citation_is_what_pyproject_says() -> None:
    """Read without a YAML library: what is written there is lines of `key: value` and lists of one kind."""
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    facts = dict(re.findall(r"^([a-z-]+): (.+)$", text, re.MULTILINE))
    assert (facts["cff-version"], facts["type"], facts["title"]) == ("1.2.0", "software", PROJECT["name"])
    assert facts["version"] == PROJECT["version"] == repro.__version__
    assert facts["license"] == PROJECT["license"]
    assert facts["abstract"].rstrip(".") == PROJECT["description"]
    assert re.findall(r"^  - name: (.+)$", text, re.MULTILINE) == AUTHORS
    assert re.findall(r"^  - ([a-z-]+)$", text, re.MULTILINE) == PROJECT["keywords"]


def test_nothing_is_claimed_that_nobody_gave() -> None:
    for name in ("CITATION.cff", "codemeta.json"):
        text = (ROOT / name).read_text(encoding="utf-8").lower()
        for word in ("orcid", "doi", "repository", "email", "date-released", "datepublished"):
            assert word not in text
