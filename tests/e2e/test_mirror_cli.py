"""`repro mirror build` and `repro submit` as a user types them, with the site hosted by a plain web server."""

import functools
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import repro.workflow
from records import canonical, keys, package, replication
from records.report import Check, Verification
from repro.cli import main

STORE = Path(keys.__file__).parent / "data" / "records"
SUFFIX = "X72AYRLPIFP2UVYVUQLNZSTJUW"


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("REPRO_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def verify_bundle(files: dict[str, bytes], *, target: str, trusted: keys.KeySet) -> Verification:
        found = replication.verify_replication(files, trusted=trusted, target=target)
        return found.with_checks(Check(code="verdicts", status="pass", detail="the workflow's own tests judge them"))

    monkeypatch.setattr(repro.workflow, "verify_bundle", verify_bundle)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    keys.save(keys.private_key(bytes(range(32))), tmp_path / "my.key")
    return tmp_path / "my.key"


@pytest.fixture
def bundle(tmp_path: Path, key: Path) -> Path:
    """A signed replication of a paper whose number is known."""
    record = (STORE / f"{SUFFIX}.json").read_bytes()
    files = {"plan.json": b"{}", "outcome.json": b"{}", "pith-record.json": record}
    predicate: dict[str, Any] = {
        "schema": "repro.replication/v1", "paper": {}, "scale": "nano", "environment": {},
        "plan_sha256": canonical.sha256_hex(b"{}"), "outcome_sha256": canonical.sha256_hex(b"{}"),
        "verdicts": [{"claim": "A1", "verdict": "inconclusive"}], "code": {"dirty": False},
        "finished_at": "2026-11-21T00:00:00Z",
    }  # fmt: skip
    sha = json.loads(record)["canonical_sha256"]
    built = replication.build_replication(
        files, subject_name=f"pith:2025:{SUFFIX}", subject_sha256=sha, predicate=predicate, key=keys.load(key)
    )
    package.write_bundle(tmp_path / "run.repro.zip", built)
    return tmp_path / "run.repro.zip"


class Quiet(http.server.SimpleHTTPRequestHandler):
    posts: list[bytes]

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        type(self).posts.append(self.rfile.read(int(self.headers["Content-Length"])))
        body = b'{"status":"held for moderation"}'
        self.send_response(202)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hosted(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server's address and the folder that it serves."""
    folder = tmp_path / "www"
    folder.mkdir()
    Quiet.posts = []
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", folder
        server.shutdown()
        thread.join()


def test_a_mirror_is_built_hosted_and_verified(
    hosted: tuple[str, Path],
    key: Path,
    bundle: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, folder = hosted
    build = ["mirror", "build", str(folder), "--base-url", url, "--key", str(key), "--replication", str(bundle)]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert main(build) == 0
    assert main(build) == 2  # never over what is there
    capsys.readouterr()
    for name, state in (("X72AYRLPIFP2UVYVUQLNZSTJUW", "trusted"), ("IV7VH3NCTL2M6JAD44FIMISHCY", "valid")):
        for path in (f"pith/{name}.json", f"pith/{name}/bundle.json", f".well-known/pith/{name}/bundle.json", f"pith/{name}/",
                     f"pith/{name}/index.html"):  # fmt: skip
            assert main(["verify", f"{url}/{path}", "--json"]) == 0, path
            assert json.loads(capsys.readouterr().out)["state"] == state
    assert main(["verify", f"{url}/pith-mirrors.json", "--json"]) == 4  # well-formed, but it proves nothing of a record
    replications = sorted((folder / "pith" / SUFFIX / "replications").iterdir())
    assert main(["verify", f"{url}/pith/{SUFFIX}/replications/{replications[0].name}", "--json"]) == 0
    capsys.readouterr()
    # A mirror whose folder serves another number's bundle is caught by the address alone.
    other = folder / "pith" / "IV7VH3NCTL2M6JAD44FIMISHCY" / "bundle.json"
    other.write_bytes((folder / "pith" / SUFFIX / "bundle.json").read_bytes())
    assert main(["verify", f"{url}/pith/IV7VH3NCTL2M6JAD44FIMISHCY/bundle.json", "--json"]) == 1
    assert main(["verify", f"{url}/nothing", "--json"]) == 5
    for path in folder.rglob("*"):
        assert not path.is_file() or keys.load(key).seed not in path.read_bytes()
        assert not path.is_file() or b"seed_b64" not in path.read_bytes()


def test_a_state_is_compared_with_the_merge_of_its_bundle(
    hosted: tuple[str, Path], key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, folder = hosted
    assert main(["mirror", "build", str(folder), "--base-url", url, "--key", str(key)]) == 0
    paths = folder / "pith" / SUFFIX
    command = ["verify", str(paths / "bundle.json"), "--offline", "--state", str(paths / "state.json")]
    assert main(command) == 0
    state = json.loads((paths / "state.json").read_bytes())
    (paths / "state.json").write_text(json.dumps(state | {"valid_event_count": 7}))
    assert main(command) == 1
    assert "valid_event_count: the served state says 7" in capsys.readouterr().err


def test_a_replication_of_a_paper_that_the_mirror_lacks(tmp_path: Path, key: Path, bundle: Path) -> None:
    document = STORE / "IV7VH3NCTL2M6JAD44FIMISHCY.json"
    command = ["mirror", "build", str(tmp_path / "m"), "--base-url", "https://m.example", "--key", str(key)]
    assert main([*command, "--document", str(document), "--replication", str(bundle)]) == 2
    assert not (tmp_path / "m").exists()


def test_submit_shows_first_and_sends_only_with_yes(
    hosted: tuple[str, Path], bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, _ = hosted
    assert main(["submit", str(bundle), "--to", f"{url}/submit"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"POST {url}/submit\n") and "replication_record" in captured.out
    assert "not documented" in captured.err and "nothing was sent" in captured.err and Quiet.posts == []
    assert main(["submit", str(bundle), "--to", f"{url}/submit", "--yes"]) == 0
    assert len(Quiet.posts) == 1 and Quiet.posts[0].decode() in captured.out
    assert "held for moderation" in next((tmp_path / "data" / "submissions").iterdir()).read_text()
    assert main(["submit", str(bundle), "--to", f"{url}/submit", "--yes"]) == 0
    assert len(Quiet.posts) == 1 and "sent before" in capsys.readouterr().out


def test_submit_refuses_what_does_not_hold(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = package.read_bundle(bundle) | {"extra": b"x"}
    package.write_bundle(tmp_path / "bad.zip", files)
    assert main(["submit", str(tmp_path / "bad.zip"), "--yes"]) == 1
    assert "was not submitted" in capsys.readouterr().err
