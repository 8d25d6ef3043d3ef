"""Validates RO-Crates with roc-validator: `python tests/formats/crates.py BUNDLE…`, in the environment of `nox -s formats`.

Each bundle is checked twice: its crate as it was published against the profile that it says it has, and the crate that this
version makes of its files against Process Run Crate. The JSON-LD context comes from the package rocrate, so that no network is
needed. Exit code 1 where a requirement of the level `required` fails; what is recommended and not met is printed.
"""

import email.message
import io
import json
import sys
import tempfile
import urllib.request
import urllib.response
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import requests
import rocrate
import urllib3
from rocrate_validator import models, services

from records import canonical
from records.package import MANIFEST, STATEMENT, read_bundle
from records.replication import PUBLIC_KEY
from repro.workflow.crate import RO_CRATE, ro_crate

CONTEXT_URL = "https://w3id.org/ro/crate/1.1/context"
CONTEXT = (Path(rocrate.__file__).parent / "data/ro-crate.jsonld").read_bytes()
PROCESS_RUN, PLAIN = "process-run-crate-0.5", "ro-crate-1.1"


class LocalContext(urllib.request.BaseHandler):
    """Answers for the one address that the validator needs, and for no other."""

    handler_order = 100

    def https_open(self, request: urllib.request.Request) -> Any:
        if request.full_url != CONTEXT_URL:
            raise OSError(f"not asked for: {request.full_url}")
        headers = email.message.Message()
        headers["Content-Type"] = "application/ld+json"
        answer = urllib.response.addinfourl(io.BytesIO(CONTEXT), headers, CONTEXT_URL, 200)
        answer.msg = "OK"  # type: ignore[attr-defined]
        return answer


def send(adapter: requests.adapters.HTTPAdapter, request: requests.PreparedRequest, **_: object) -> requests.Response:
    """The same for those parts of the validator that use requests."""
    known = request.url == CONTEXT_URL
    raw = urllib3.HTTPResponse(
        body=io.BytesIO(CONTEXT if known else b""), status=200 if known else 404, preload_content=False,
        headers={"Content-Type": "application/ld+json"}, request_url=request.url,
    )  # fmt: skip
    return adapter.build_response(request, raw)  # type: ignore[no-untyped-call,no-any-return]


def validate(files: Mapping[str, bytes], profile: str) -> tuple[bool, list[str]]:
    """Whether every required check passes, and each finding down to the recommended ones."""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        settings = services.ValidationSettings(
            rocrate_uri=folder,
            profile_identifier=profile,
            requirement_severity=models.Severity.RECOMMENDED,
            no_cache=True,
        )
        result = services.validate(settings)
        found = [f"{issue.severity.name} {issue.check.identifier}: {issue.message}" for issue in result.get_issues()]
        return bool(result.passed(models.Severity.REQUIRED)), found


def remade(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The bundle's files with the crate that this version makes of them."""
    inner = {name: data for name, data in files.items() if name not in (RO_CRATE, MANIFEST, STATEMENT, PUBLIC_KEY)}
    plan, run = (canonical.loads(files[name]) for name in ("plan.json", "run.json"))
    return {**files, RO_CRATE: ro_crate(plan, run, inner, signed=PUBLIC_KEY in files)}


def main(paths: list[str]) -> int:
    """Prints a line for each crate and what it lacks; 1 where a required check fails."""
    urllib.request.install_opener(urllib.request.build_opener(LocalContext))
    requests.adapters.HTTPAdapter.send = send  # type: ignore[assignment,method-assign]
    bad = 0
    for path in paths:
        files = read_bundle(Path(path))
        root = next(e for e in json.loads(files[RO_CRATE])["@graph"] if e["@id"] == "./")
        stated = PROCESS_RUN if "conformsTo" in root else PLAIN
        for what, some, profile in (("published", files, stated), ("made anew", remade(files), PROCESS_RUN)):
            passed, found = validate(some, profile)
            bad += not passed
            print(f"{path}, {what}, {profile}: {'conforms' if passed else 'DOES NOT CONFORM'}")
            print("".join(f"  {line}\n" for line in found), end="")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
