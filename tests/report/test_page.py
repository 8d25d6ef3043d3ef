"""The HTML report: verdict first, every part a reviewer asks for, usable without eyes or mouse, safe whatever a plan holds."""

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT
from page_reader import faults, read

from records import canonical
from records.errors import MalformedError
from records.package import read_bundle
from repro.config import decode
from repro.experiment import Claim, Claims, PaperInfo, Quantity, Test
from repro.judge import ArmEvidence
from repro.report.claims import _strip
from repro.report.figures import Courses
from repro.report.page import _commands, render, short, summary
from repro.report.svg import PALETTE, fit
from repro.workflow.evidence import load
from repro.workflow.plan import parse_plan

BUNDLES = sorted((ROOT / "tests/fixtures/formats/v1").glob("*.repro.zip"))


def parts(path: Path) -> dict[str, Any]:
    files = read_bundle(path)
    plan = parse_plan(files["plan.json"], name="plan.json")
    loaded = load(plan, files)
    return {
        "plan": plan,
        "outcome": canonical.loads(files["outcome.json"]),
        "run": canonical.loads(files["run.json"]),
        "evidence": loaded.evidence,
        "courses": Courses(losses=loaded.losses, timed=loaded.timed, probes=loaded.probes),
        "files": files,
    }


@pytest.fixture(scope="module")
def emoe() -> dict[str, Any]:
    return parts(BUNDLES[1])


@pytest.fixture(scope="module")
def page(emoe: dict[str, Any]) -> str:
    return render(**emoe)


@pytest.mark.parametrize("path", BUNDLES, ids=lambda path: path.name)
def test_the_page_keeps_the_rules_and_is_the_same_bytes_again(path: Path) -> None:
    given = parts(path)
    page = render(**given)
    assert faults(page) == []
    assert render(**parts(path)) == page


def test_the_verdict_comes_first_and_each_part_is_there(emoe: dict[str, Any], page: str) -> None:
    reader = read(page)
    headings = [element.text for element in reader.named("h2")]
    assert headings == ["Verdicts", "Claims", "Tuning", "Deviations from the paper", "Cost, as measured", "Run it again",
                        "Provenance, digests and trust", "Every arm and seed"]  # fmt: skip
    articles = reader.named("article")
    plan, outcome = emoe["plan"], emoe["outcome"]
    assert len(articles) == len(plan["claims"]) == 6
    for article, claim, verdict in zip(articles, plan["claims"], outcome["verdicts"], strict=True):
        text = " ".join(article.text.split())
        assert f"“{claim['statement']}”" in text and claim["source"] in text
        assert verdict["verdict"].replace("_", " ") in text
        for test in verdict["tests"]:
            assert test["test"] in text
        assert "Replicated if all" in text and "Controls: all must" in text
        for seed in plan["seeds"]:
            assert f"seed {seed}" in text
    whole = " ".join(reader.elements[0].text.split())
    value = emoe["evidence"]["topk-lr0.003", 0].metrics["loss/k=4"]
    assert short(value) in whole
    for digest in (canonical.digest(plan), canonical.digest(outcome), plan["code"]["sha256"], *plan["corpora"].values(),
                   emoe["run"]["code"]["commit"], emoe["evidence"]["topk-lr0.003", 1].weights):  # fmt: skip
        assert digest in whole
    for deviation in plan["deviations"]:
        assert deviation["here"] in whole
    assert f"{sum(name.endswith('/trace.jsonl') for name in emoe['files'])} segments" in whole


def test_cost_counts_shared_segments_once_and_alone_each_time() -> None:
    """EMO's arms share their first segments, so that what was trained is less than the arms' sum."""
    given = parts(BUNDLES[0])
    steps = {"trained": 0, "alone": 0}
    for name, data in given["files"].items():
        if name.endswith("/trace.jsonl"):
            entries = [canonical.loads(line)["entry"] for line in data.splitlines()]
            steps["trained"] += max(entry.get("tokens", 0) for entry in entries)
    for arm in given["plan"]["arms"]:
        for segment in arm["segments"]:
            train = segment["train"]
            steps["alone"] += train["steps"] * train["batch"] * train["context"] * len(given["plan"]["seeds"])
    text = read(render(**given)).named("main")[0].text
    assert 0 < steps["trained"] < steps["alone"]
    assert f"{steps['trained']:,} in" in text
    assert f"{steps['alone']:,} tokens, {steps['alone'] / steps['trained']:.2f} times as many" in text


def test_how_to_run_it_again(emoe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plan, run = emoe["plan"], emoe["run"]
    paper = Claims(
        paper=decode(PaperInfo, plan["paper"]), claim=tuple(decode(Claim, claim) for claim in plan["claims"])
    )
    monkeypatch.setattr("repro.report.page.load_claims", lambda slug: paper if slug == "emoe" else None)
    lines = _commands(plan, run)
    assert lines[0] == f"git checkout {run['code']['commit']}"
    assert ".venv/bin/repro run emoe --scale smoke --seeds 2 --out runs/emoe-smoke" in lines
    fewer = {**plan, "claims": plan["claims"][:2], "claims_left_out": ["A3"]}
    assert ".venv/bin/repro plan emoe --scale smoke --seeds 2 --claims A1,A2" in _commands(fewer, run)
    gpu = {**plan, "environment": plan["environment"] | {"device": "NVIDIA H200"}}
    assert ".venv/bin/repro plan emoe --scale smoke --seeds 2 --device cuda" in _commands(gpu, run)
    foreign = {**plan, "scale": "x; rm -rf ~"}
    assert all("; rm" not in line.replace("'x; rm -rf ~'", "").replace("'runs/emoe-x; rm -rf ~'", "")
               for line in _commands(foreign, run))  # fmt: skip


HOSTILE = "</title></style><script>x()</script><img src=x onerror=x()>\" ' onload=x() {{ 7*7 }} \u202eevil\x07"


def poisoned(given: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The same run with `text` at the end of everything that is shown and refers to nothing."""
    changed = copy.deepcopy({name: given[name] for name in ("plan", "outcome", "run")})
    plan, outcome, run = changed["plan"], changed["outcome"], changed["run"]
    for name in ("title", "arxiv"):
        plan["paper"][name] += text
    plan["paper"]["pith_number"] = text
    plan["scale"] += text
    for claim, verdict in zip(plan["claims"], outcome["verdicts"], strict=True):
        claim["id"] = verdict["claim"] = claim["id"] + text
        for name in ("title", "statement", "source", "metric", "note"):
            claim[name] += text
        verdict["reason"] += text
        for test in verdict["tests"]:
            test["test"] += text
    for item in (*plan["arms"], *plan["groups"]):
        item["label"] += text
    for figure in plan["figures"]:
        for name in ("title", "x_label", "y_label"):
            figure[name] += text
    for deviation in plan["deviations"]:
        for name in deviation:
            deviation[name] += text
    for part in (plan["environment"], plan["corpora"], plan["code"], plan["tolerance"]):
        for name in list(part):
            if isinstance(part[name], str):
                part[name] += text
    plan["claims_left_out"] = [text]
    run["python"] += text
    run["code"]["commit"] += text
    evidence = {
        key: ArmEvidence(status=e.status + text, weights=e.weights + text, metrics={**e.metrics, f"m{text}": "1"})
        for key, e in given["evidence"].items()
    }
    return {**given, **changed, "evidence": evidence}


def test_nothing_in_a_plan_reaches_the_page_as_markup(emoe: dict[str, Any]) -> None:
    tame, hostile = (render(**poisoned(emoe, text)) for text in ("tame", HOSTILE))
    assert faults(hostile) == []

    def shape(page: str) -> list[tuple[str, ...]]:
        """Every element but what is within a drawing, which depends on how long its labels are."""
        return [(e.name, *sorted(e.attributes)) for e in read(page).elements if "svg" not in e.around]

    assert shape(hostile) == shape(tame)
    assert "\u202e" not in hostile and "\x07" not in hostile
    assert "{{ 7*7 }}" in hostile


def test_no_style_of_a_texts_own(emoe: dict[str, Any]) -> None:
    """A verdict is a class name on the page; the judge knows four."""
    page = render(**poisoned(emoe, HOSTILE))
    classes = {name for e in read(page).elements for name in e.attributes.get("class", "").split()}
    known = {"test", "interval", *re.findall(r"\.([a-z_]+)", read(page).named("style")[0].text)}
    assert classes <= known


@pytest.mark.parametrize(
    "change",
    [
        {"sessions": []},
        {"sessions": [{"started_at": "yesterday", "finished_at": "2026-01-01T00:00:00Z"}]},
        {"code": {}},
        {"python": None},
        {"code": {"sha256": "0", "commit": 3, "dirty": True}},
    ],
)
def test_a_run_json_that_is_none_is_malformed(emoe: dict[str, Any], change: dict[str, Any]) -> None:
    with pytest.raises(MalformedError, match="the record of a run"):
        render(**{**emoe, "run": emoe["run"] | change})


def test_the_summary() -> None:
    def of(*verdicts: str) -> str:
        return summary({"verdicts": [{"verdict": verdict} for verdict in verdicts]})

    assert of("replicated", "not_replicated", "not_tested") == "1 of 2 claims replicated, 1 not replicated"
    assert of("inconclusive") == "0 of 1 claims replicated, 1 inconclusive"


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    r, g, b = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_in_light_and_dark(page: str) -> None:
    """WCAG 2.2: 4.5 to 1 for text on either background, 3 to 1 for what a figure is made of."""
    themes = [
        dict(re.findall(r"--([\w]+): (#[0-9a-f]{6});", block)) for block in re.findall(r":root \{(.*?)\}", page, re.S)
    ]
    assert len(themes) == 2 and themes[0].keys() == themes[1].keys()
    for theme in themes:
        for name in ("ink", "soft", "link", "good", "bad", "open"):
            assert min(contrast(theme[name], theme[under]) for under in ("page", "card")) >= 4.5, name
        for name in ("c1", "c2", "c3", "c4", "c5", "c6", "grey"):
            assert contrast(theme[name], theme["card"]) >= 3, name
        assert contrast(theme["c1"], theme["zone"]) >= 3 and contrast(theme["c2"], theme["zone"]) >= 2.5


SVG = """<svg xmlns:xlink="x" width="10pt"><metadata>m</metadata><defs><style type="text/css">*{}</style></defs>
<g id="unused"><path id="m1" d="M 1.23456 2.999999 \nL 3 4 \nz\n" style="stroke: #0072B2"/></g>
<use xlink:href="#m1" x="0.123456" style="fill: #b0b0b0"/>
<text style="font-size: 10px; font-family: 'A', b">#0072b2 1.23456</text></svg>"""


def test_a_drawing_made_fit() -> None:
    text, themed = fit(SVG, prefix="f1-")
    assert themed
    assert 'id="f1-m1" d="M 1.23 3 L 3 4 z" style="stroke: var(--c1)"' in text
    assert '<use xlink:href="#f1-m1" x="0.12" style="fill: var(--grey)"/>' in text
    assert '<text style="font-size: 10px">#0072b2 1.23456</text>' in text  # what is text stays
    assert "metadata" not in text and "unused" not in text and "<style" not in text
    other, themed = fit(SVG.replace("#b0b0b0", "#123456"), prefix="f1-")
    assert not themed and "#0072B2" in other and "var(" not in other
    assert not fit(SVG.replace("<use", '<image xlink:href="data:image/png;base64,"/><use'), prefix="f1-")[1]


def test_the_palette_is_the_figures() -> None:
    from repro.report.figures import _COLOURS

    assert {colour.lower() for colour in _COLOURS} <= PALETTE.keys()


def quantity(name: str) -> Quantity:
    return Quantity(arm=name, metric="loss")


@pytest.mark.parametrize(
    ("relation", "expect", "zones"),
    [
        (">", "holds", 1), ("<=", "holds", 1), ("<", "holds", 1), (">=", "holds", 1), ("within", "holds", 1),
        ("outside", "holds", 2), ("covers", "holds", 0), (">", "fails", 1), ("within", "fails", 2), ("outside", "fails", 1),
    ],
)  # fmt: skip
def test_a_strip_shades_where_the_test_holds(relation: Any, expect: Any, zones: int) -> None:
    test = Test(left=quantity("a"), right=quantity("b"), relation=relation, margin=0.5, expect=expect)
    result = {"effect": "0.75", "interval": ["0.5", "1.0"], "sd": "0.1"}
    strip = _strip(test, result, [3, 4], [0.7, 0.8])
    assert len(strip.zones) == zones
    inside = any(float(x) < float(strip.mean) < float(x) + float(width) for x, width in strip.zones)
    holds = {">": True, "<=": False, "<": False, ">=": True, "within": False, "outside": True, "covers": False}[
        relation
    ]
    assert inside == (holds if expect == "holds" else not holds)
    assert strip.label == "Differences: seed 3 +0.7, seed 4 +0.8; mean +0.75, 95% interval +0.5 to +1"
    places = [float(x) for x in (*strip.seeds, strip.mean, strip.zero, *strip.interval)]
    assert all(0 <= place <= 300 for place in places)
