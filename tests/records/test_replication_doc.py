"""docs/replication-record.md is normative: its worked example is recomputed here, every byte of it."""

import base64
import json
import re
from pathlib import Path

from records import canonical, keys, package, replication, statement

DOC = Path(__file__).parents[2] / "docs" / "replication-record.md"


def test_the_worked_example() -> None:
    text = DOC.read_text(encoding="utf-8")
    blocks = {
        match[1]: match[2]
        for match in re.finditer(r"^```(?:json|text) (\S+)\n(.*?)\n```$", text, re.DOTALL | re.MULTILINE)
    }
    files = {name: content.encode() for name, content in json.loads(blocks["files"]).items()}
    key = keys.private_key(bytes(range(32)))
    bundle = replication.build_replication(
        files,
        subject_name="arxiv:2509.21892",
        subject_sha256=canonical.sha256_hex(files["paper.json"]),
        predicate=json.loads(blocks["predicate"]),
        key=key,
    )
    for block, name in (
        ("signing-key", "signing-key.json"),
        ("manifest", "manifest.json"),
        ("statement", "statement.dsse.json"),
    ):
        assert bundle[name].decode() == blocks[block]
    payload = blocks["payload"].encode()
    assert base64.b64decode(json.loads(blocks["statement"])["payload"]) == payload
    assert f"The payload, {len(payload)} bytes" in text
    # By the words of section 4, not by our own function.
    kind = b"application/vnd.in-toto+json"
    encoding = b" ".join([b"DSSEv1", str(len(kind)).encode(), kind, str(len(payload)).encode(), payload])
    assert encoding == statement.pae(payload)
    assert canonical.sha256_hex(encoding) == blocks["pae-sha256"]
    assert base64.b64encode(key.sign(encoding)).decode() == blocks["signature"]
    assert canonical.sha256_hex(bundle["manifest.json"]) in text
    assert canonical.sha256_hex(package.zip_bytes(bundle)) == blocks["zip-sha256"]
