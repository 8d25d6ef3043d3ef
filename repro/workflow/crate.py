"""The bundle described as an RO-Crate 1.1, so that other tools can read what its files are."""

import json
from collections.abc import Mapping
from typing import Any

RO_CRATE = "ro-crate-metadata.json"

_KINDS = {
    "plan.json": "The plan, fixed before the first step: claims, criteria, arms, seeds, data, code, environment",
    "outcome.json": "Verdicts with effect sizes and intervals, as judged from the evidence",
    "run.json": "When, and from which checkout, the plan was executed",
    "report.html": "The report for people",
    "paper.json": "The paper that the replication is of",
    "pith-record.json": "The Pith record of the paper that the replication is of",
}
_TYPES = {"html": "text/html", "json": "application/json", "jsonl": "application/jsonl"}


def ro_crate(plan: Mapping[str, Any], files: Mapping[str, bytes], *, finished_at: str) -> bytes:
    """Contents of ro-crate-metadata.json for the bundle's `files`, the same bytes for the same input."""
    paper = plan["paper"]
    identifier = f"https://arxiv.org/abs/{paper['arxiv']}"
    parts = [
        {
            "@id": name,
            "@type": "File",
            "contentSize": str(len(data)),
            "encodingFormat": _TYPES.get(name.rsplit(".", 1)[-1], "application/octet-stream"),
            "name": _KINDS.get(name, "Hash-chained evidence" if name.endswith(".jsonl") else name),
        }
        for name, data in sorted(files.items())
    ]
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
            "name": f"Replication of “{paper['title']}” at the scale {plan['scale']}",
            "description": "Plan, evidence and verdicts of a replication, each bound to the others by SHA-256.",
            "datePublished": finished_at,
            "license": {"@id": "https://www.apache.org/licenses/LICENSE-2.0"},
            "hasPart": [{"@id": part["@id"]} for part in parts],
            "about": {"@id": identifier},
        },
        {"@id": identifier, "@type": "ScholarlyArticle", "name": paper["title"]},
        {
            "@id": "https://www.apache.org/licenses/LICENSE-2.0",
            "@type": "CreativeWork",
            "name": "Apache License 2.0",
        },
        *parts,
    ]
    document = {"@context": "https://w3id.org/ro/crate/1.1/context", "@graph": graph}
    return (json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
