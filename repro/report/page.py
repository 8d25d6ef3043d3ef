"""The report's HTML from plan, outcome and evidence; escaped throughout, since a plan may be foreign."""

import contextlib
import datetime
import json
import math
import re
import shlex
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from records import canonical
from records.errors import MalformedError, ReproError
from repro.config import decode
from repro.experiment import Claim, Figure, load_claims, select_claims
from repro.judge import Evidence
from repro.report.claims import view
from repro.report.figures import READING, Courses, draw
from repro.report.svg import fit

ARXIV = re.compile(r"[0-9]{4}\.[0-9]{4,5}(v[0-9]{1,3})?|[a-z-]+(\.[A-Z]{2})?/[0-9]{7}(v[0-9]{1,3})?")


def environment() -> Environment:
    """Where the pages' templates are: every text escaped, and without characters that would reorder the page around it."""
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=_shown,
    )  # fmt: skip
    found.filters["short"] = short
    return found


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

    Raises:
        MalformedError: run.json is no record of a run.
    """
    _check_run(run)
    verdicts = {verdict["claim"]: verdict for verdict in outcome["verdicts"]}
    chosen = outcome["groups"]
    claims = [decode(Claim, claim) for claim in plan["claims"]]
    arxiv = plan["paper"]["arxiv"]
    return environment().get_template("page.html").render(
        plan=plan,
        plan_sha256=canonical.digest(plan),
        outcome=outcome,
        outcome_sha256=canonical.digest(outcome),
        run=run,
        summary=summary(outcome),
        arxiv_url=f"https://arxiv.org/abs/{arxiv}" if ARXIV.fullmatch(arxiv) else None,
        claims=[
            view(number, claim, verdicts[claim.id], seeds=plan["seeds"], evidence=evidence, chosen=chosen)
            for number, claim in enumerate(claims, start=1)
        ],
        figures=_plots(plan, claims, evidence, courses, chosen),
        rows=_rows(plan, evidence),
        cost=_cost(plan, run, evidence, files),
        commands=_commands(plan, run),
    )  # fmt: skip


def summary(outcome: Mapping[str, Any]) -> str:
    """The verdicts in one line: `2 of 6 claims replicated, 4 not replicated`; those not tested are left out."""
    counts = Counter(verdict["verdict"] for verdict in outcome["verdicts"])
    total = counts.total() - counts["not_tested"]
    others = [f"{counts[name]} {name.replace('_', ' ')}" for name in ("not_replicated", "inconclusive") if counts[name]]
    return ", ".join([f"{counts['replicated']} of {total} claims replicated", *others])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plot:
    """A drawn figure: `home` is the number of the claim it stands with, `others` those of further claims it shows."""

    number: int
    title: str
    reading: str
    svg: Markup
    themed: bool
    home: int | None
    others: tuple[int, ...]
    x_label: str
    names: Sequence[str]
    rows: Sequence[tuple[float, Sequence[float | None]]]


def _plots(
    plan: Mapping[str, Any], claims: Sequence[Claim], evidence: Evidence, courses: Courses, chosen: Mapping[str, str]
) -> list[_Plot]:
    labels = {item["id"]: plain(item["label"]) for item in (*plan["arms"], *plan["groups"])}
    groups = {group["id"]: set(group["among"]) for group in plan["groups"]}
    plots = []
    for number, data in enumerate(plan["figures"], start=1):
        figure = decode(Figure, {**data, **{name: plain(data[name]) for name in ("title", "x_label", "y_label")}})
        with _as_text():
            drawn = draw(figure, evidence, courses, seeds=plan["seeds"], chosen=chosen, labels=labels)
        svg, themed = fit(drawn, prefix=f"f{number}-")
        names = [labels.get(curve.arm, curve.arm) for curve in figure.curves]
        label = f"{figure.title}. {figure.y_label} against {figure.x_label}: {', '.join(names)}."
        shown = [at for at, claim in enumerate(claims, start=1) if _shows(figure, claim, groups)]
        plots.append(
            _Plot(
                number=number,
                title=figure.title,
                reading=READING["fit" if figure.fit else "reach" if figure.reach else figure.kind],
                svg=Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)),  # noqa: S704
                themed=themed,
                home=shown[0] if shown else None,
                others=tuple(shown[1:]),
                x_label=figure.x_label,
                names=names,
                rows=_means(figure, evidence, plan["seeds"], chosen) if figure.kind == "metrics" else (),
            )
        )
    return plots


@contextlib.contextmanager
def _as_text() -> Iterator[None]:
    """Labels are drawn as they stand: a foreign plan's dollars are no formula, and its letters may have no glyph here."""
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from", category=UserWarning)
        yield


def _shows(figure: Figure, claim: Claim, groups: Mapping[str, set[str]]) -> bool:
    """Whether a figure is about what a claim's tests compare: some arm of theirs, and where it draws metrics one of those."""

    def expanded(names: set[str]) -> set[str]:
        return names.union(*(groups.get(name, set()) for name in names))

    arms = expanded({name for curve in figure.curves for name in (curve.arms or (curve.arm,))})
    tests = (*claim.passes, *claim.fails, *claim.controls)
    compared = [part for test in tests for part in (test.left, test.right, test.base) if part]
    metrics = {name for part in compared for name in (part.metric, *part.least_of) if name}
    drawn = {metric for curve in figure.curves for metric in curve.metrics}
    return bool(arms & expanded(claim.arms)) and (not drawn or bool(drawn & metrics))


def _means(
    figure: Figure, evidence: Evidence, seeds: Sequence[int], chosen: Mapping[str, str]
) -> list[tuple[float, list[float | None]]]:
    """For each x, the mean over the seeds of every curve's metric; None where a seed lacks it."""

    def mean(arm: str, metric: str) -> float | None:
        results = [evidence.get((chosen.get(arm, arm), seed)) for seed in seeds]
        values = [float(result.metrics[metric]) for result in results if result and metric in result.metrics]
        return math.fsum(values) / len(values) if len(values) == len(seeds) else None

    return [
        (x, [mean(curve.arms[at] if curve.arms else curve.arm, curve.metrics[at]) for curve in figure.curves])
        for at, x in enumerate(figure.x)
    ]


def _rows(plan: Mapping[str, Any], evidence: Evidence) -> list[dict[str, Any]]:
    """Every arm and seed, with its metrics in the order in which they were measured."""
    rows = []
    for arm in plan["arms"]:
        for seed in plan["seeds"]:
            result = evidence.get((arm["id"], seed))
            status, weights = (result.status, result.weights) if result else ("not run", "")
            metrics = dict(result.metrics) if result else {}
            rows.append({"arm": arm["id"], "seed": seed, "status": status, "metrics": metrics, "weights": weights})
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cost:
    """What the run took: minutes from start to end and of all processes' training, tokens trained and if no arm shared any."""

    wall_minutes: float
    minutes: float
    tokens: int
    tokens_alone: int
    segments: int
    arms: Sequence[tuple[str, str, int, float | None]]

    @property
    def rate(self) -> float:
        """Tokens a second and process."""
        return self.tokens / (60 * self.minutes) if self.minutes else 0.0


def _cost(plan: Mapping[str, Any], run: Mapping[str, Any], evidence: Evidence, files: Mapping[str, bytes]) -> _Cost:
    """Measured time and tokens over all segments; steps that were done twice after a kill count twice."""
    seconds = 0.0
    for name, data in files.items():
        if name.endswith("/timing.jsonl"):
            seconds += sum(json.loads(line)["seconds"] for line in data.splitlines())
    traced = [data for name, data in files.items() if name.endswith("/trace.jsonl")]
    arms = []
    for arm in plan["arms"]:
        tokens = sum(
            train["steps"] * train["batch"] * train["context"] for train in (s["train"] for s in arm["segments"])
        )
        results = [evidence.get((arm["id"], seed)) for seed in plan["seeds"]]
        times = [float(r.metrics["time/seconds"]) for r in results if r and "time/seconds" in r.metrics]
        arms.append((arm["id"], arm["label"], tokens, sum(times) / len(times) if times else None))
    return _Cost(
        wall_minutes=sum(map(_session_seconds, run["sessions"])) / 60,
        minutes=seconds / 60,
        tokens=sum(map(_last_tokens, traced)),
        tokens_alone=sum(tokens for _, _, tokens, _ in arms) * len(plan["seeds"]),
        segments=len(traced),
        arms=arms,
    )


def _last_tokens(trace: bytes) -> int:
    """Tokens at the last step entry of a segment's trace."""
    for line in reversed(trace.splitlines()):
        entry = json.loads(line)["entry"]
        if entry.get("type") == "step":
            return int(entry["tokens"])
    return 0


def _session_seconds(session: Mapping[str, str | None]) -> float:
    if not session["started_at"] or not session["finished_at"]:
        return 0.0
    started, finished = (datetime.datetime.fromisoformat(session[name] or "") for name in ("started_at", "finished_at"))
    return (finished - started).total_seconds()


def _check_run(run: Any) -> None:
    """Raises MalformedError where run.json lacks what the page says of it."""
    try:
        for session in run["sessions"]:
            _session_seconds(session)
        whole = bool(run["sessions"]) and isinstance(run["code"]["dirty"], bool)
        whole = whole and all(
            isinstance(value, str | int) for value in (run["python"], run["cores"], run["code"]["sha256"])
        )
        whole = whole and isinstance(run["code"]["commit"], str | None)
    except (KeyError, TypeError, ValueError, AttributeError):
        whole = False
    if not whole:
        raise MalformedError("run.json: expected the record of a run, with its sessions, code, python and cores")


def _commands(plan: Mapping[str, Any], run: Mapping[str, Any]) -> list[str]:
    """What to type to run the plan again, the checkout first."""
    slug, scale = plan["paper"]["slug"].replace("_", "-"), plan["scale"]
    options = ["--scale", scale, "--seeds", str(len(plan["seeds"])), *_claims_option(plan)]
    if plan["environment"]["device"] != "cpu":
        options += ["--device", "cuda"]
    if any(segment.get("checkpoint") for arm in plan["arms"] for segment in arm["segments"]):
        options += ["--checkpoint", "CHECKPOINT"]
    words = " ".join(shlex.quote(word) for word in (slug, *options))
    out = shlex.quote(f"runs/{slug}-{scale}")
    commit = run["code"]["commit"]
    return [
        *([f"git checkout {shlex.quote(commit)}"] if commit else []),
        "python3 -m venv .venv && .venv/bin/pip install --constraint constraints.txt '.[train,report]'",
        f".venv/bin/repro plan {words}",
        f".venv/bin/repro run {words} --out {out}",
        f".venv/bin/repro bundle {out} -o again.repro.zip",
        ".venv/bin/repro verify again.repro.zip",
    ]


def _claims_option(plan: Mapping[str, Any]) -> list[str]:
    """The --claims that gives the plan's claims again; none where the paper's default for the scale does."""
    ids = [claim["id"] for claim in plan["claims"]]
    try:
        default = [claim.id for claim in select_claims(load_claims(plan["paper"]["slug"]), None, plan["scale"])]
    except ReproError:
        default = None
    if ids == default:
        return []
    return ["--claims", ",".join(ids) if plan["claims_left_out"] else "all"]


def short(value: object, digits: int = 5) -> str:
    """A number to some significant digits, for reading; the full one is in the evidence. A dash for no number."""
    if value is None:
        return "–"
    try:
        return f"{float(str(value)):.{digits}g}"
    except ValueError:
        return str(value)


def plain(text: str) -> str:
    """`text` without control characters and those that reorder or hide what stands around them."""
    if text.isprintable():
        return text
    return "".join(
        c if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co") else "\ufffd" for c in text
    )


def _shown(value: object) -> object:
    return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value
