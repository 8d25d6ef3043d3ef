"""Fixtures of the records tests."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from loopback import Site, serving
from record_cases import SIGNED, STORE

from records import keys
from records.document import verify_document
from records.report import Verification


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A site on this machine, whose answers the test sets."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as running:
        yield running


@pytest.fixture
def signed() -> dict[str, Any]:
    """The whole, signed record document of the package."""
    return json.loads((STORE / f"{SIGNED}.json").read_bytes())


@pytest.fixture
def verify() -> Callable[..., Verification]:
    """Verify a document given as bytes or as a value, with the pinned keys unless others are given."""

    def run(document: Any, **options: Any) -> Verification:
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        return verify_document(data, **{"target": "test", "trusted": keys.pinned(), **options})

    return run
