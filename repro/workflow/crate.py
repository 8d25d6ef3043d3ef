"""The bundle described as an RO-Crate 1.1 with the Process Run Crate profile 0.5, so that other tools can read what it is.

The run is a CreateAction: its instrument is this package, its object the plan, its result what the run wrote.
"""

import json
from collections.abc import Mapping
from typing import Any

from records.package import MANIFEST, STATEMENT
from records.replication import PUBLIC_KEY

RO_CRATE = "ro-crate-metadata.json"

_KINDS = {
    "plan.json": "The plan, fixed before the first step: claims, criteria, arms, seeds, data, code, environment",
    "signed-plan.dsse.json": "The plan as it was signed before the run",
    "signed-plan.dsse.json.ots": "OpenTimestamps proof of the signed plan",
    "outcome.json": "Verdicts with effect sizes and intervals, as judged from the evidence",
    "run.json": "When, and from which checkout, the plan was executed",
    "report.html": "The report for people",
    "paper.json": "The paper that the replication is of",
    "pith-record.json": "The Pith record of the paper that the replication is of",
    MANIFEST: "SHA-256 and size of every file of the bundle",
    STATEMENT: "The in-toto statement that binds paper, plan, evidence and verdicts, in a DSSE envelope",
    PUBLIC_KEY: "The public key that the statement is signed with",
}
_TYPES = {"html": "text/html", "json": "application/json", "jsonl": "application/jsonl"}
_LICENCE = "https://www.apache.org/licenses/LICENSE-2.0"
_PROFILE = "https://w3id.org/ro/wfrun/process/0.5"
#: What was there before the run, or says what was there: no result of it.
_GIVEN = ("plan.json", "paper.json", "pith-record.json")


def ro_crate(plan: Mapping[str, Any], run: Mapping[str, Any], files: Mapping[str, bytes], *, signed: bool) -> bytes:
    """Contents of ro-crate-metadata.json for the bundle's `files`, the same bytes for the same input.

    Args:
        plan, run: the contents of plan.json and run.json, of a run that is finished.
        files: without those that bind the bundle together and are made after this one, which are named here too.
        signed: whether a public key will come along.
    """
    paper = plan["paper"]
    article = f"https://arxiv.org/abs/{paper['arxiv']}"
    binding = [MANIFEST, STATEMENT, *([PUBLIC_KEY] if signed else [])]
    sizes: dict[str, int | None] = {name: len(data) for name, data in files.items()} | dict.fromkeys(binding)
    parts = [_file(name, size) for name, size in sorted(sizes.items())]
    code = run["code"]
    version = f"{code['version']}+{code['commit'] or 'no-commit'}{'.dirty' if code['dirty'] else ''}"
    application = f"urn:pith-repro:code:{code['sha256']}"
    sessions = run["sessions"]
    title = f"Replication of “{paper['title']}” at the scale {plan['scale']}"
    graph: list[dict[str, Any]] = [
        {
            "@id": RO_CRATE,
            "@type": "CreativeWork",
            "about": {"@id": "./"},
            "conformsTo": {"@id": "https://w3id.org/ro/crate/1.1"},
        },
        {
            "@id": "./",
            "@type": "Dataset",
            "name": title,
            "description": "Plan, evidence and verdicts of a replication, each bound to the others by SHA-256.",
            "conformsTo": {"@id": _PROFILE},
            "datePublished": sessions[-1]["finished_at"],
            "license": {"@id": _LICENCE},
            "hasPart": [{"@id": part["@id"]} for part in parts],
            "about": {"@id": article},
            "mentions": {"@id": "#run"},
        },
        {
            "@id": "#run",
            "@type": "CreateAction",
            "name": f"repro run {paper['slug'].replace('_', '-')} --scale {plan['scale']}",
            "description": "Trained and measured the plan's arms, judged its claims and wrote the report.",
            "instrument": {"@id": application},
            "object": {"@id": "plan.json"},
            "result": [{"@id": name} for name in sorted(files) if name not in _GIVEN],
            "actionStatus": "http://schema.org/CompletedActionStatus",
            "startTime": _iso(sessions[0]["started_at"]),
            "endTime": _iso(sessions[-1]["finished_at"]),
        },
        {
            "@id": application,
            "@type": "SoftwareApplication",
            "name": "pith-repro",
            "description": "A verifiable reproduction package for Mixture-of-Experts papers, tied to their Pith records",
            "softwareVersion": version,
        },
        {"@id": _PROFILE, "@type": "CreativeWork", "name": "Process Run Crate", "version": "0.5"},
        {"@id": article, "@type": "ScholarlyArticle", "name": paper["title"]},
        {"@id": _LICENCE, "@type": "CreativeWork", "name": "Apache License 2.0"},
        *parts,
    ]
    document = {"@context": "https://w3id.org/ro/crate/1.1/context", "@graph": graph}
    return (json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _iso(time: str) -> str:
    """`Z` spelt out: the profile asks for an offset."""
    return time.removesuffix("Z") + "+00:00" if time.endswith("Z") else time


def _file(name: str, size: int | None) -> dict[str, Any]:
    entity: dict[str, Any] = {
        "@id": name,
        "@type": "File",
        "encodingFormat": _TYPES.get(name.rsplit(".", 1)[-1], "application/octet-stream"),
        "name": _KINDS.get(name, "Hash-chained evidence" if name.endswith(".jsonl") else name),
    }
    return entity if size is None else entity | {"contentSize": str(size)}
