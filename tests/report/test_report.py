"""Figures, page and table from data made for the purpose; a foreign plan must not reach the reader as markup."""

from pathlib import PurePosixPath

import pytest

from records.errors import MalformedError
from repro.experiment import Curve, Figure
from repro.judge import ArmEvidence
from repro.report.figures import draw
from repro.report.table import BEGIN, END, markdown, replace_table

FIGURE = Figure(title="t", x_label="k", y_label="loss", x=(1.0, 2.0), curves=(Curve(arm="a", metrics=("l1", "l2")),))


def evidence(values):
    return {
        ("a", seed): ArmEvidence(status="complete", weights="", metrics={"l1": str(x), "l2": str(y)})
        for seed, (x, y) in enumerate(values)
    }


def svg(values, **more):
    return draw(FIGURE, evidence(values), {}, seeds=[0, 1, 2], chosen={}, labels={"a": "arm <a>"}, **more)


def test_a_figure_is_the_same_bytes_every_time_and_draws_every_seed():
    values = [(1.0, 2.0), (1.1, 2.2), (0.9, 1.9)]
    assert svg(values) == svg(values)
    assert "(3 seeds)" in svg(values)
    assert "(2 seeds)" in svg(values[:2])
    assert svg(values) != svg([(1.0, 2.0), (1.1, 2.2), (0.9, 1.8)])


def test_a_curve_without_evidence_is_named_and_text_is_escaped():
    page = svg([])
    assert "not measured" in page
    assert "<a>" not in page
    assert "&lt;a&gt;" in page
    assert page.startswith("<svg")


def test_training_curves_and_figures_over_arms():
    training = Figure(title="t", x_label="tokens", y_label="loss", curves=(Curve(arm="a"),), kind="training")
    losses = {("a", 0): [[(10, 3.0), (20, 2.5)], [(30, 2.7), (40, 2.2)]]}
    page = draw(training, {}, losses, seeds=[0, 1], chosen={}, labels={})
    assert "a (1 seeds)" in page
    over = Figure(
        title="t",
        x_label="x",
        y_label="y",
        x=(1.0, 2.0),
        curves=(Curve(arm="line", arms=("a", "b"), metrics=("l1", "l1")),),
    )
    some = evidence([(1.0, 2.0)]) | {("b", 0): ArmEvidence(status="complete", weights="", metrics={"l1": "3"})}
    assert "line (1 seeds)" in draw(over, some, {}, seeds=[0], chosen={}, labels={})
    assert "line: not measured" in draw(over, evidence([(1.0, 2.0)]), {}, seeds=[0], chosen={}, labels={})
    with pytest.raises(ValueError, match="a metric for each of 2"):
        Figure(title="t", x_label="x", y_label="y", x=(1.0, 2.0), curves=(Curve(arm="a", metrics=("l",)),))


PLAN = {
    "paper": {"slug": "equal_resource"},
    "claims": [{"id": "X1", "title": "a is <b> | c"}],
    "scale": "nano",
    "seeds": [0, 1, 2],
}
OUTCOME = {
    "verdicts": [
        {
            "claim": "X1",
            "verdict": "not_replicated",
            "tests": [
                {"role": "pass", "result": "holds", "test": "b > c", "effect": "0.1", "interval": ["0.1", "0.1"]},
                {"role": "fail", "result": "fails", "test": "d > c", "effect": "0.2", "interval": ["0.1", "0.1"]},
                {"role": "fail", "result": "holds", "test": "a < b", "effect": "0.5", "interval": ["0.25", "0.75"]},
            ],
        },
        {"claim": "X2", "verdict": "not_tested", "tests": []},
    ]
}


def test_the_tables_row():
    table = markdown([(PurePosixPath("papers/x/replications/n.repro.zip"), PLAN, OUTCOME)])
    assert table.splitlines()[2:] == [
        "| equal-resource | X1 a is &lt;b> \\| c | **not replicated** | nano, 3 seeds | "
        "+0.5000 (+0.2500 to +0.7500): a &lt; b | [n.repro.zip](papers/x/replications/n.repro.zip) |"
    ]


def test_the_test_that_decides_stands_for_the_verdict():
    def row(verdict, *results):
        tests = [
            {"role": "pass", "result": result, "test": f"t{i}", "effect": "0.1", "interval": ["0.1", "0.1"]}
            for i, result in enumerate(results)
        ]
        outcome = {"verdicts": [{"claim": "X1", "verdict": verdict, "tests": tests}]}
        return markdown([(PurePosixPath("n.zip"), PLAN, outcome)])

    assert ": t0 |" in row("replicated", "holds", "holds")
    assert ": t1 |" in row("inconclusive", "holds", "fails")
    assert "nano, 3 seeds |  |" in row("inconclusive")


def test_the_table_goes_between_its_marks():
    readme = f"before\n{BEGIN}\nold\n{END}\nafter"
    assert replace_table(readme, "new") == f"before\n{BEGIN}\nnew\n{END}\nafter"
    assert replace_table(replace_table(readme, "new"), "new") == replace_table(readme, "new")
    with pytest.raises(MalformedError, match="expected the marks"):
        replace_table("no marks", "new")
