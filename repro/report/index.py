"""The index: one page over several papers and replications, each verified before it is listed.

- `Replication`: what the page says of one bundle
- `render_index`: replications, and their verdicts side by side, to HTML
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from records.replication import ComparedClaim, SideBySide
from repro.report.page import ARXIV, environment, summary
from repro.report.table import deciding


@dataclass(frozen=True, slots=True, kw_only=True)
class Replication:
    """A bundle that holds: its paper, its place as seen from the page, its plan, outcome and predicate, and who signed it."""

    subject: str
    name: str
    href: str
    plan: Mapping[str, Any]
    outcome: Mapping[str, Any]
    predicate: Mapping[str, Any]
    state: str
    signer: str | None

    @property
    def summary(self) -> str:
        """Its verdicts in one line."""
        return summary(self.outcome)

    @property
    def label(self) -> str:
        """What it is called in a table: scale and day."""
        return f"{self.plan['scale']}, {len(self.plan['seeds'])} seeds, {self.predicate['finished_at'][:10]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Paper:
    number: int
    title: str
    arxiv: str
    arxiv_url: str | None
    pith_number: str | None
    replications: Sequence[Replication]
    claims: Sequence[tuple[ComparedClaim, str, Sequence[Mapping[str, Any] | None]]]


def render_index(replications: Sequence[Replication], compared: Sequence[SideBySide]) -> str:
    """The page; the same text for the same replications in the same order.

    Args:
        replications: each once.
        compared: for every paper among them, its verdicts side by side.
    """
    papers = [
        _paper(number, side, [item for item in replications if item.subject == side.subject])
        for number, side in enumerate(compared, start=1)
    ]
    template = environment().get_template("index.html")
    return template.render(papers=papers, count=len(replications))


def _paper(number: int, side: SideBySide, replications: Sequence[Replication]) -> _Paper:
    paper = replications[0].plan["paper"]
    titles = {claim["id"]: claim["title"] for item in replications for claim in item.plan["claims"]}
    verdicts = [{verdict["claim"]: verdict for verdict in item.outcome["verdicts"]} for item in replications]
    claims: list[tuple[ComparedClaim, str, Sequence[Mapping[str, Any] | None]]] = []
    for claim in side.claims:
        cells = [
            {"verdict": found["verdict"], "test": deciding(found)} if (found := by_claim.get(claim.claim)) else None
            for by_claim in verdicts
        ]
        claims.append((claim, titles.get(claim.claim, ""), cells))
    return _Paper(
        number=number,
        title=paper["title"],
        arxiv=paper["arxiv"],
        arxiv_url=f"https://arxiv.org/abs/{paper['arxiv']}" if ARXIV.fullmatch(paper["arxiv"]) else None,
        pith_number=paper["pith_number"],
        replications=replications,
        claims=claims,
    )
