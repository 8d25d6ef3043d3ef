"""`repro keys` as a user types it."""

import json
from pathlib import Path

import pytest

from repro.cli import main


def test_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "my.key"
    assert main(["keys", "new", str(path)]) == 0
    assert main(["keys", "new", str(path)]) == 2
    assert main(["keys", "show", str(path)]) == 0
    assert main(["keys", "show", f"{path}.pub.json"]) == 0
    assert main(["keys", "list"]) == 0
    assert main(["keys", "list", "--trusted-keys", f"{path}.pub.json", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(path.read_bytes())["seed_b64"] not in printed.out + printed.err
    assert "pith-v1-2026-05" in printed.out and "never overwritten" in printed.err
