"""The README's table of published replications: claim, verdict, scale, evidence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from records.errors import MalformedError

BEGIN, END = "<!-- replications: begin -->", "<!-- replications: end -->"


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A bundle by its path, its plan and outcome, and the paths of the audit statements beside it."""

    path: PurePosixPath
    plan: Mapping[str, Any]
    outcome: Mapping[str, Any]
    audits: Sequence[PurePosixPath] = ()


def markdown(published: Sequence[Published]) -> str:
    """The table's Markdown, in the order given."""
    lines = ["| paper | claim | verdict | scale | effect (95% interval) | evidence |", "|---|---|---|---|---|---|"]
    for item in published:
        plan, outcome = item.plan, item.outcome
        evidence = f"[{item.path.name}]({item.path})" + "".join(f", [audit]({audit})" for audit in item.audits)
        titles = {claim["id"]: claim["title"] for claim in plan["claims"]}
        slug = plan["paper"]["slug"].replace("_", "-")
        for verdict in outcome["verdicts"]:
            if verdict["claim"] not in titles:
                continue
            effect = ""
            if test := deciding(verdict):
                numbers = (test["effect"], *test["interval"])
                effect = "{} ({} to {}): {}".format(*(f"{float(n):+.4f}" for n in numbers), _escape(test["test"]))
            lines.append(
                f"| {slug} | {verdict['claim']} {_escape(titles[verdict['claim']])} | **{verdict['verdict'].replace('_', ' ')}** "
                f"| {plan['scale']}, {len(plan['seeds'])} seeds | {effect} | {evidence} |"
            )
    return "\n".join(lines)


def deciding(verdict: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The test that stands for a verdict: the first fail criterion that holds, the first pass criterion that does not,
    or, where all hold, the first of them."""
    tests = [test for test in verdict["tests"] if "effect" in test]
    if verdict["verdict"] == "not_replicated":
        wanted = [test for test in tests if test["role"] == "fail" and test["result"] == "holds"]
    else:
        passes = [test for test in tests if test["role"] == "pass"]
        wanted = [test for test in passes if test["result"] == "fails"] or passes
    return wanted[0] if wanted else None


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def replace_table(readme: str, table: str) -> str:
    """`readme` with `table` between the two marks.

    Raises:
        MalformedError: the marks are not there, in order.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise MalformedError(f"README: expected the marks {BEGIN} and {END}, in this order")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"
