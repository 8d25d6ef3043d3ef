"""The report's HTML from plan, outcome and evidence; escaped throughout, since a plan may be foreign."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from records import canonical
from repro.config import decode
from repro.experiment import Claim, Figure
from repro.judge import Evidence
from repro.report.figures import READING, Courses, draw


def render(
    plan: Mapping[str, Any],
    outcome: Mapping[str, Any],
    run: Mapping[str, Any],
    evidence: Evidence,
    courses: Courses,
    files: Mapping[str, bytes],
) -> str:
    """The page; the same text for the same arguments.

    Args:
        plan, outcome, run: the contents of plan.json, outcome.json and run.json.
        evidence, courses: what the run's files prove.
        files: the evidence files by name, for their measured times.
    """
    groups = {group["id"]: group for group in plan["groups"]}
    labels = {item["id"]: item["label"] for item in (*plan["arms"], *plan["groups"])}
    figures = [decode(Figure, figure) for figure in plan["figures"]]
    verdicts = {verdict["claim"]: verdict for verdict in outcome["verdicts"]}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["short"] = _short
    return environment.get_template("page.html").render(
        plan=plan,
        plan_sha256=canonical.digest(plan),
        outcome=outcome,
        run=run,
        claims=[(decode(Claim, claim), verdicts[claim["id"]]) for claim in plan["claims"]],
        groups=groups,
        figures=[
            (
                figure,
                Markup(draw(figure, evidence, courses, seeds=plan["seeds"], chosen=outcome["groups"], labels=labels)),  # noqa: S704
            )
            for figure in figures
        ],
        reading=READING,
        rows=_rows(plan, evidence),
        cost=_cost(plan, files),
        slug=plan["paper"]["slug"].replace("_", "-"),
    )


def _rows(plan: Mapping[str, Any], evidence: Evidence) -> list[dict[str, Any]]:
    """Every arm and seed, with its metrics in the order in which they were measured."""
    rows = []
    for arm in plan["arms"]:
        for seed in plan["seeds"]:
            result = evidence.get((arm["id"], seed))
            status = result.status if result else "not run"
            metrics = dict(result.metrics) if result else {}
            rows.append({"arm": arm["id"], "seed": seed, "status": status, "metrics": metrics})
    return rows


def _cost(plan: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, Any]:
    """Measured training time and tokens over all segments; steps that were done twice after a kill count twice."""
    seconds = 0.0
    for name, data in files.items():
        if name.endswith("/timing.jsonl"):
            seconds += sum(json.loads(line)["seconds"] for line in data.splitlines())
    tokens = {
        name: next((json_entry["tokens"] for json_entry in _entries(data)), 0)
        for name, data in files.items()
        if name.endswith("/trace.jsonl")
    }
    total = sum(tokens.values())
    alone = sum(
        train["steps"] * train["batch"] * train["context"]
        for arm in plan["arms"]
        for train in (segment["train"] for segment in arm["segments"])
    )
    return {
        "alone": alone * len(plan["seeds"]),
        "minutes": seconds / 60,
        "tokens": total,
        "rate": total / seconds if seconds else 0.0,
        "segments": len(tokens),
    }


def _entries(data: bytes) -> list[dict[str, Any]]:
    """Step entries of a trace, the last first."""
    entries = [json.loads(line)["entry"] for line in reversed(data.splitlines())]
    return [entry for entry in entries if entry.get("type") == "step"]


def _short(text: str) -> str:
    """A decimal string to five digits after the point, for reading; the full one is in the evidence."""
    try:
        return f"{float(text):.5g}"
    except ValueError:
        return text
