"""Figures, page and table from data made for the purpose; a foreign plan must not reach the reader as markup."""

import math
from dataclasses import replace
from pathlib import PurePosixPath

import pytest

from records.errors import MalformedError
from repro.experiment import Curve, Figure
from repro.judge import ArmEvidence
from repro.report.figures import Courses, _shares, differences, draw
from repro.report.table import BEGIN, END, Published, markdown, replace_table
from repro.trace import Probe

FIGURE = Figure(title="t", x_label="k", y_label="loss", x=(1.0, 2.0), curves=(Curve(arm="a", metrics=("l1", "l2")),))


def evidence(values):
    return {
        ("a", seed): ArmEvidence(status="complete", weights="", metrics={"l1": str(x), "l2": str(y)})
        for seed, (x, y) in enumerate(values)
    }


def svg(values, **more):
    return draw(FIGURE, evidence(values), Courses(), seeds=[0, 1, 2], chosen={}, labels={"a": "arm <a>"}, **more)


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


def test_a_fit_is_drawn_with_its_band_and_the_interval_of_its_optimum():
    arms = ("a", "b", "c")
    sweep = Figure(
        title="t", x_label="x", y_label="y", x=(1.0, 2.0, 4.0), curves=(Curve(arm="s", arms=arms, metrics=("m",) * 3),),
        fit=True,
    )  # fmt: skip
    values = {"a": (2.0, 2.2), "b": (1.0, 1.1), "c": (2.1, 1.9)}
    some = {
        (arm, seed): ArmEvidence(status="complete", weights="", metrics={"m": str(value)})
        for arm, pair in values.items()
        for seed, value in enumerate(pair)
    }

    def drawn(figure, seeds):
        return draw(figure, some, Courses(), seeds=seeds, chosen={}, labels={})

    with_fit, without = drawn(sweep, [0, 1]), drawn(replace(sweep, fit=False), [0, 1])
    assert with_fit == drawn(sweep, [0, 1])
    assert (with_fit.count("FillBetweenPolyCollection"), without.count("FillBetweenPolyCollection")) == (1, 0)
    assert drawn(sweep, [0]).count("FillBetweenPolyCollection") == 0  # one seed has no band
    assert drawn(sweep, [0]).count("stroke-dasharray") > drawn(replace(sweep, fit=False), [0]).count("stroke-dasharray")
    with pytest.raises(ValueError, match="at least 3 x values, all above 0"):
        replace(sweep, x=(0.0, 1.0, 2.0))


def test_a_vertex_is_drawn_where_every_seed_has_one():
    arms = ("a", "b", "c", "d")
    sweep = Figure(
        title="t", x_label="x", y_label="y", x=(1.0, 2.0, 4.0, 8.0), log="x", reach=1,
        curves=(Curve(arm="s", arms=arms, metrics=("m",) * 4),),
    )  # fmt: skip

    def drawn(figure, *rows):
        some = {
            (arm, seed): ArmEvidence(status="complete", weights="", metrics={"m": str(value)})
            if value is not None
            else ArmEvidence(status="diverged", weights="", metrics={})
            for seed, row in enumerate(rows)
            for arm, value in zip(arms, row, strict=True)
        }
        page = draw(figure, some, Courses(), seeds=range(len(rows)), chosen={}, labels={})
        return page.count("stroke-dasharray")

    plain = replace(sweep, reach=0)
    within, other = (2.0, 1.0, 1.2, 9.0), (2.0, 1.1, 1.0, 9.0)
    assert drawn(sweep, within, other) == drawn(plain, within, other) + 1
    assert drawn(sweep, within, (2.0, 1.1, 1.2, None)) == drawn(plain, within, (2.0, 1.1, 1.2, None)) + 1
    for lacking in ((1.0, 1.1, 2.0, 9.0), (2.0, 1.1, None, 9.0)):  # at the first x, and beside a diverged cell
        assert drawn(sweep, within, lacking) == drawn(plain, within, lacking)
    assert drawn(sweep, within) == drawn(plain, within)  # one seed has no interval
    for wrong in ({"reach": -1}, {"fit": True}, {"x": (0.0, 1.0, 2.0, 4.0)}):
        with pytest.raises(ValueError, match="a reach needs metrics over at least 3 x values"):
            replace(sweep, **wrong)


def test_training_curves_and_figures_over_arms():
    training = Figure(title="t", x_label="tokens", y_label="loss", curves=(Curve(arm="a"),), kind="training")
    losses = {("a", 0): [[(10, 3.0), (20, 2.5)], [(30, 2.7), (40, 2.2)]]}
    page = draw(training, {}, Courses(losses=losses), seeds=[0, 1], chosen={}, labels={})
    assert "a (1 seeds)" in page
    over = Figure(
        title="t",
        x_label="x",
        y_label="y",
        x=(1.0, 2.0),
        curves=(Curve(arm="line", arms=("a", "b"), metrics=("l1", "l1")),),
    )
    some = evidence([(1.0, 2.0)]) | {("b", 0): ArmEvidence(status="complete", weights="", metrics={"l1": "3"})}
    assert "line (1 seeds)" in draw(over, some, Courses(), seeds=[0], chosen={}, labels={})
    assert "line: not measured" in draw(over, evidence([(1.0, 2.0)]), Courses(), seeds=[0], chosen={}, labels={})
    with pytest.raises(ValueError, match="a metric for each of 2"):
        Figure(title="t", x_label="x", y_label="y", x=(1.0, 2.0), curves=(Curve(arm="a", metrics=("l",)),))


def test_cells_are_differences_from_the_base_seed_by_seed():
    figure = Figure(
        title="t", x_label="x", y_label="y", names=("one", "two"), kind="cells",
        base=Curve(arm="base", arms=("b", "b"), metrics=("l1", "l1")),
        curves=(Curve(arm="line", arms=("a", "c"), metrics=("l1", "l1")),),
    )  # fmt: skip
    found = evidence([(1.5, 0), (1.25, 0)]) | {
        ("b", seed): ArmEvidence(status="complete", weights="", metrics={"l1": "1.0"}) for seed in (0, 1)
    }
    assert differences(figure, found, seeds=[0, 1], chosen={}) == {"line": [[0.5, 0.25], []]}
    page = draw(figure, found, Courses(), seeds=[0, 1], chosen={}, labels={})
    assert "line (2 seeds)" in page
    assert ">two<" in page
    with pytest.raises(ValueError, match="`cells` needs names"):
        replace(figure, names=())
    with pytest.raises(ValueError, match="`cells` a base"):
        replace(figure, base=None)
    with pytest.raises(ValueError, match="a metric and an arm for each of 3 names"):
        replace(figure, names=("one", "two", "three"))


def lines_of(page: str) -> int:
    """Paths drawn by `plot` with a thin line."""
    return page.count("stroke-width: 0.7")


PROBES = {
    ("a", seed): [
        [(tokens, Probe(load=((3, 1), (2, 2)), values={"cosine": (0.5, 0.7)})) for tokens in (0, 10)],
        [(tokens, Probe(load=((1, 1, 1, 1), (4, 0, 0, 0)), values={"cosine": (1.0,)})) for tokens in (20, 30)],
    ]
    for seed in (0, 1)
}


def test_along_training_every_seed_is_drawn_and_growth_is_marked():
    timed = {("a", seed): [[(0.5, 3.0), (1.0, 2.5)], [(1.75, 2.7), (2.5, 2.2)]] for seed in (0, 1, 2)}
    time = Figure(title="t", x_label="s", y_label="loss", curves=(Curve(arm="a"), Curve(arm="b")), kind="time")
    page = draw(time, {}, Courses(timed=timed), seeds=[0, 1, 2], chosen={}, labels={})
    assert "a (3 seeds)" in page
    assert "b: not measured" in page
    assert lines_of(page) == 3
    curve = Curve(arm="group", metrics=("cosine",))
    probe = Figure(title="t", x_label="tokens", y_label="cosine", curves=(curve,), kind="probe")
    page = draw(probe, {}, Courses(probes=PROBES), seeds=[0, 1, 2], chosen={"group": "a"}, labels={})
    assert "group (2 seeds)" in page
    assert lines_of(page) == 2
    other = Figure(title="t", x_label="", y_label="", curves=(Curve(arm="a", metrics=("norm",)),), kind="probe")
    assert "a: not measured" in draw(other, {}, Courses(probes=PROBES), seeds=[0], chosen={}, labels={})
    with pytest.raises(ValueError, match="the name of one probed measure"):
        Figure(title="t", x_label="", y_label="", curves=(Curve(arm="a"),), kind="probe")


def test_load_maps_have_a_row_each_seed_and_a_column_each_layer():
    figure = Figure(title="t", x_label="tokens", y_label="expert", curves=(Curve(arm="a"), Curve(arm="b")), kind="load")
    page = draw(figure, {}, Courses(probes=PROBES), seeds=[0, 1], chosen={}, labels={})
    assert page == draw(figure, {}, Courses(probes=PROBES), seeds=[0, 1], chosen={}, labels={})
    for text in ("seed 0", "seed 1", "layer 1 of 2", "layer 2 of 2", "load, 1 is even"):
        assert text in page
    assert page.count("#d55e00") == 4  # where the pool grew, once a map
    other = PROBES | {("a", 1): PROBES["a", 1][:1]}
    assert page != draw(figure, {}, Courses(probes=other), seeds=[0, 1], chosen={}, labels={})
    assert "a, b: not measured" in draw(figure, {}, Courses(), seeds=[0], chosen={}, labels={})
    first, *_, last = _shares([(3, 1), (1, 1, 2, 0)], 4)
    assert first == [1.5, 1.0]
    assert math.isnan(last[0])
    assert last[1] == 0


def test_the_share_of_a_gap_is_that_of_the_judge():
    closing = Figure(
        title="t", x_label="x", y_label="η", x=(25.0, 50.0), kind="closure",
        curves=(Curve(arm="grown", arms=("g25", "g50"), metrics=("loss",) * 2),),
        base=Curve(arm="small", metrics=("loss",) * 2), target=Curve(arm="large", metrics=("loss",) * 2),
    )  # fmt: skip
    assert closing.arms == {"g25", "g50", "small", "large"}
    losses = {"small": (2.0, 2.1), "large": (1.0, 1.1), "g25": (1.25, 1.35), "g50": (1.5, 1.6)}
    found = {
        (arm, seed): ArmEvidence(status="complete", weights="", metrics={"loss": str(loss)})
        for arm, both in losses.items()
        for seed, loss in enumerate(both)
    }
    page = draw(closing, found, Courses(), seeds=[0, 1], chosen={}, labels={})
    assert "grown (2 seeds)" in page
    no_gap = found | {("large", 0): found["small", 1]}
    assert "grown: no gap measured" in draw(closing, no_gap, Courses(), seeds=[0, 1], chosen={}, labels={})
    with pytest.raises(ValueError, match="`closure` needs a base and a target"):
        replace(closing, base=None)
    with pytest.raises(ValueError, match="a metric for each of 2"):
        replace(closing, base=Curve(arm="small", metrics=("loss",)))


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
    folder = PurePosixPath("papers/x/replications")
    published = Published(path=folder / "n.repro.zip", plan=PLAN, outcome=OUTCOME, audits=[folder / "n.k-5.audit.json"])
    table = markdown([published])
    assert table.splitlines()[2:] == [
        "| equal-resource | X1 a is &lt;b> \\| c | **not replicated** | nano, 3 seeds | "
        "+0.5000 (+0.2500 to +0.7500): a &lt; b | [n.repro.zip](papers/x/replications/n.repro.zip), "
        "[audit](papers/x/replications/n.k-5.audit.json) |"
    ]


def test_the_test_that_decides_stands_for_the_verdict():
    def row(verdict, *results):
        tests = [
            {"role": "pass", "result": result, "test": f"t{i}", "effect": "0.1", "interval": ["0.1", "0.1"]}
            for i, result in enumerate(results)
        ]
        outcome = {"verdicts": [{"claim": "X1", "verdict": verdict, "tests": tests}]}
        return markdown([Published(path=PurePosixPath("n.zip"), plan=PLAN, outcome=outcome)])

    assert ": t0 |" in row("replicated", "holds", "holds")
    assert ": t1 |" in row("inconclusive", "holds", "fails")
    assert "nano, 3 seeds |  |" in row("inconclusive")


def test_the_table_goes_between_its_marks():
    readme = f"before\n{BEGIN}\nold\n{END}\nafter"
    assert replace_table(readme, "new") == f"before\n{BEGIN}\nnew\n{END}\nafter"
    assert replace_table(replace_table(readme, "new"), "new") == replace_table(readme, "new")
    with pytest.raises(MalformedError, match="expected the marks"):
        replace_table("no marks", "new")
