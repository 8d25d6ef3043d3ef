"""The worked example of docs/evidence.md, recomputed with nothing but the standard library."""

import hashlib
import json
import re

from command_line import ROOT

from repro.trace import check_chain, genesis


def test_the_example_recomputes():
    page = (ROOT / "docs/evidence.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"```text (\w+)\n(.*?)\n```", page, flags=re.DOTALL))
    head = hashlib.sha256(b"repro.trace/v1\0" + bytes.fromhex("11" * 32) + bytes.fromhex("22" * 32)).digest()
    assert head.hex() == blocks["genesis"] == genesis("11" * 32, "22" * 32)
    for line in blocks["trace"].splitlines():
        item = json.loads(line)
        entry = json.dumps(item["entry"], sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        head = hashlib.sha256(head + entry).digest()
        assert item["chain"] == head.hex()
    assert check_chain(blocks["trace"].encode() + b"\n", blocks["genesis"])[1] == head.hex()
