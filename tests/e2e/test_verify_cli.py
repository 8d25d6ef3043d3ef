"""`repro verify` and `repro keys` as a user types them: exit codes, one JSON object a target, one line an error."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from records import keys
from repro.cli import main

STORE = Path(keys.__file__).parent / "data" / "records"
SIGNED = STORE / "X72AYRLPIFP2UVYVUQLNZSTJUW.json"
CODES = {
    "strict_json", "schema", "canonical_hash", "pith_number", "year", "short_number", "aliases", "title_hash", "abstract_hash",
    "receipt_signature", "receipt_digest", "key_trust", "snapshot_hash", "merge", "envelope_signature", "manifest", "plan",
    "trace", "verdicts",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_sockets")
@pytest.mark.parametrize(
    ("target", "code", "state", "number"),
    [
        ("pith:2026:IV7VH3NCTL2M6JAD44FIMISHCY", 0, "valid", "pith:2026:IV7VH3NCTL2M6JAD44FIMISHCY"),
        ("pith:IV7VH3NC", 0, "valid", "pith:2026:IV7VH3NCTL2M6JAD44FIMISHCY"),
        ("PITH:iv7vh3nctl2m", 0, "valid", "pith:2026:IV7VH3NCTL2M6JAD44FIMISHCY"),
        ("pith:RS6XGWCWJNK7PNWC", 0, "valid", "pith:2026:RS6XGWCWJNK7PNWCHDEWVB4F5E"),
        ("x72ayrlp", 0, "trusted", "pith:2025:X72AYRLPIFP2UVYVUQLNZSTJUW"),
        ("arxiv:2506.12119", 0, "trusted", "pith:2025:X72AYRLPIFP2UVYVUQLNZSTJUW"),
        ("arxiv:2506.12119v2", 0, "trusted", "pith:2025:X72AYRLPIFP2UVYVUQLNZSTJUW"),
        ("doi:10.48550/arXiv.2506.12119", 0, "trusted", "pith:2025:X72AYRLPIFP2UVYVUQLNZSTJUW"),
        (str(SIGNED), 0, "trusted", "pith:2025:X72AYRLPIFP2UVYVUQLNZSTJUW"),
        ("pith:2024:IV7VH3NCTL2M6JAD44FIMISHCY", 1, "invalid", "pith:2026:IV7VH3NCTL2M6JAD44FIMISHCY"),
        ("arxiv:2506.12119v1", 4, "indeterminate", None),
        ("arxiv:2509.21892", 4, "indeterminate", None),
        ("arxiv:2604.19835", 4, "indeterminate", None),
        ("pith:AAAAAAAA", 4, "indeterminate", None),
    ],
)
def test_targets_offline(
    target: str, code: int, state: str, number: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", target, "--offline", "--json"]) == code
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()
    found = json.loads(line)
    assert list(found) == ["schema", "target", "kind", "state", "pith_number", "checks", "trust"]
    assert (found["schema"], found["target"], found["state"]) == ("repro.verify/v1", target, state)
    assert found["pith_number"] == number
    assert {check["code"] for check in found["checks"]} <= CODES
    assert {check["status"] for check in found["checks"]} <= {"pass", "fail", "skip"}
    assert set(found["trust"]) == {"key_id", "source"} and captured.err == ""


@pytest.mark.parametrize(
    "target", ["pith:XYZ", "no-number", "/no/such/file.json", "arxiv:x", "http://example.org/x", "https://"]
)
def test_usage(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", target, "--offline", "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("repro: error: ") and captured.err.count("\n") == 1


@pytest.mark.usefixtures("no_sockets")
def test_offline_with_an_address_opens_no_socket(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "https://example.org/pith/x.json", "--offline", "--json"]) == 5
    assert "--offline" in json.loads(capsys.readouterr().out)["checks"][0]["detail"]


@pytest.mark.parametrize("data", [os.urandom(3000), b"", b"{", b"PK\x03\x04junk", b"[]", b"\x1b[2J"])
def test_binary_junk_is_malformed(data: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "junk.bin"
    file.write_bytes(data)
    assert main(["verify", str(file), "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["state"] == "malformed"
    assert main(["verify", str(file)]) == 3
    assert "malformed" in capsys.readouterr().out


def test_a_folder_that_is_no_bundle_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "large").write_bytes(b"x" * 1000)
    assert main(["verify", str(tmp_path)]) == 3
    assert "no replication bundle" in capsys.readouterr().out


def test_an_unreadable_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert main(["verify", f"{tmp_path}/loop/x.json"]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_several_targets_give_the_worst_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            ["verify", "pith:IV7VH3NC", "pith:AAAAAAAA", "pith:2024:IV7VH3NCTL2M6JAD44FIMISHCY", "--offline", "--json"]
        )
        == 1
    )
    states = [json.loads(line)["state"] for line in capsys.readouterr().out.splitlines()]
    assert states == ["valid", "indeterminate", "invalid"]


def test_require_trusted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "pith:IV7VH3NC", "--offline", "--require", "trusted"]) == 4
    assert main(["verify", "pith:X72AYRLP", "--offline", "--require", "trusted"]) == 0
    assert "--require trusted" in capsys.readouterr().out


def test_batch(tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = SIGNED.read_bytes().strip(), b'{"canonical_record":1}'
    file = tmp_path / "many.jsonl"
    for lines, expected, code in (
        ([good, good], ["trusted", "trusted"], 0),
        ([good, b"", bad, b"\xff", good], ["trusted", "malformed", "malformed", "trusted"], 3),
        ([good, good.replace(b'"pith:X72AYRLP"', b'"pith:AAAAAAAA"')], ["trusted", "invalid"], 1),
        ([], [], 4),
    ):
        file.write_bytes(b"\n".join(lines))
        assert main(["verify", "--batch", str(file)]) == code
        captured = capsysbinary.readouterr()
        found = [json.loads(line) for line in captured.out.splitlines()]
        assert [entry["state"] for entry in found] == expected
        assert captured.err.count(b"\n") == 1 and b"%d targets" % len(expected) in captured.err
    unsigned = (STORE / "IV7VH3NCTL2M6JAD44FIMISHCY.json").read_bytes()
    file.write_bytes(unsigned)
    assert main(["verify", "--batch", str(file), "--require", "trusted"]) == 4
    assert main(["verify", "--batch", str(tmp_path / "none.jsonl")]) == 2
    assert main(["verify", "--batch", str(file), "--workers", "0"]) == 2
    command = [sys.executable, "-m", "repro", "verify", "--batch", "-"]
    done = subprocess.run(command, input=unsigned * 3, capture_output=True, timeout=60)
    assert done.returncode == 0 and [json.loads(line)["target"] for line in done.stdout.splitlines()] == [
        "-:1",
        "-:2",
        "-:3",
    ]


def test_colour_and_progress_only_on_a_terminal(tmp_path: Path) -> None:
    pty = pytest.importorskip("pty", reason="no terminals on this platform")
    command = [sys.executable, "-m", "repro", "verify", "pith:X72AYRLP", "--offline"]
    outer, inner = pty.openpty()
    done = subprocess.run(command, stdout=inner, stderr=inner, timeout=60)
    os.close(inner)
    text = os.read(outer, 65536)
    os.close(outer)
    assert done.returncode == 0 and b"\x1b[32mtrusted\x1b[0m" in text
    assert b"\x1b" not in subprocess.run(command, capture_output=True, timeout=60).stdout


def test_what_is_printed_says_what_was_not_proven(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "pith:IV7VH3NC", "--offline"]) == 0
    text = capsys.readouterr().out
    assert "not proven: " in text and "receipt_signature" in text and "\x1b" not in text


def test_control_characters_never_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(SIGNED.read_bytes())
    evil = "\x1b]0;owned\x07\u202e\r"
    record |= {"pith_number": evil, "short_pith_number": evil}
    record["receipt"]["key_id"] = evil
    file = tmp_path / "evil\x1b[31m.json"
    file.write_text(json.dumps(record))
    for extra in ([], ["--json"], ["-v"]):
        assert main(["verify", str(file), *extra]) == 3
        captured = capsys.readouterr()
        assert all(c.isprintable() or c == "\n" for c in captured.out + captured.err)


def test_max_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(SIGNED), "--max-bytes", "100"]) == 3
    assert "--max-bytes" in capsys.readouterr().out
    assert main(["verify", str(SIGNED), "--max-bytes", "0"]) == 2


def test_as_a_process_from_standard_input() -> None:
    command = [sys.executable, "-m", "repro", "verify", "-", "--offline", "--json"]
    done = subprocess.run(command, input=SIGNED.read_bytes(), capture_output=True, timeout=60)
    assert (done.returncode, json.loads(done.stdout)["state"], done.stderr) == (0, "trusted", b"")


def test_start_up_imports_nothing_heavy() -> None:
    code = (
        "import sys; from repro.cli import main; code = main(['verify', 'pith:IV7VH3NC', '--offline']);"
        "heavy = {'torch', 'numpy', 'scipy', 'jsonschema', 'requests', 'rich', 'socket'} & set(sys.modules);"
        "sys.exit(f'{code} {heavy}' if code or heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not os.environ.get("REPRO_TIMING"), reason="times a process: set REPRO_TIMING=1 on a quiet machine")
def test_start_up_is_within_three_times_a_bare_import_of_nacl() -> None:
    def seconds(*command: str) -> float:
        def once() -> float:
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            return time.perf_counter() - start

        return min(once() for _ in range(15))

    bare = seconds("-c", "import json, nacl.signing")
    assert seconds("-m", "repro", "verify", "pith:IV7VH3NC", "--offline") <= 3 * bare


def test_shutil_finds_the_script_where_the_package_is_installed() -> None:
    script = shutil.which("repro", path=str(Path(sys.executable).parent))
    if script is None:
        pytest.skip("the package is not installed here, only on the path")
    done = subprocess.run([script, "verify", "pith:IV7VH3NC", "--offline"], capture_output=True, timeout=60)
    assert done.returncode == 0
