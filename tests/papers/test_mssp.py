"""MSSP's arms: sizes by regime, what a plan's claims need, base equality as data, and coordinates of trained models."""

import dataclasses
import math
from pathlib import Path

import pytest
from command_line import ROOT

import papers.mssp as mssp
from papers.mssp.optima import drifts, optima, tables
from papers.mssp.settings import SETTINGS, grown
from papers.mssp.slopes import after, depth_slopes, slopes
from records import canonical
from records.errors import UsageError
from records.package import read_bundle
from repro.cli import main
from repro.data import corpus
from repro.data.batches import Batches
from repro.environment import set_deterministic
from repro.experiment import SCALES, Curve, Figure, load_claims, segment_digest
from repro.inherit import Parent
from repro.judge import ArmEvidence
from repro.mlp import make_model
from repro.parameterization import scales, sizes_of
from repro.report.figures import Courses, draw
from repro.stats import slope
from repro.train import Mechanism, train_segment
from repro.workflow.evidence import load
from repro.workflow.plan import make_plan

START = "11" * 32


@pytest.fixture(scope="module")
def arms():
    return {arm.id: arm for arm in mssp.design("smoke").arms}


def test_sizes_grow_as_the_regime_says():
    base = SETTINGS["nano"].mlp
    assert [sizes_of(grown(base[regime], regime, 256)) for regime in ("I", "II", "III")] == [
        scales(
            "mup", regime=regime, sizes=sizes_of(grown(base[regime], regime, 256)), base=sizes_of(base[regime])
        ).sizes
        for regime in ("I", "II", "III")
    ]  # `scales` refuses sizes that do not
    large = grown(base["III"], "III", 256)
    assert (large.d_expert, large.num_experts, large.top_k) == (128, 32, 16)
    wide = SETTINGS["small"].sweep.base["II"]
    assert grown(wide, "II", 512).num_heads == 8
    with pytest.raises(UsageError, match="multiple of the base's head size 64, found 200"):
        grown(wide, "II", 200)


@pytest.mark.parametrize("scale", ["smoke", "nano", "small", "base", "paper"])
def test_every_claim_finds_its_arms(scale):
    design = mssp.design(scale)
    names = {arm.id for arm in design.arms}
    assert len(names) == len(design.arms)
    for claim in load_claims("mssp").claim:
        if scale in claim.scales or (scale == "smoke" and "nano" in claim.scales):
            assert claim.arms <= names, claim.id
    for figure in design.figures:
        assert figure.arms <= names
    with pytest.raises(UsageError, match="not set up"):
        mssp.design("tiny")


def test_claims_cover_the_wrong_fixes_and_leave_sweeps_to_those_who_ask():
    claims = {claim.id: claim for claim in load_claims("mssp").claim}
    assert [name for name, claim in claims.items() if "nano" not in claim.scales] == ["M4", "M6"]
    sweep = [name for name, claim in claims.items() if claim.suite == "sweep"]
    assert sweep == ["M4-II", "M4-III", "M4-mlp-II", "M4-mlp-III", "M6-check", "M6-rate"]
    assert all(claims[name].scales == ("nano",) and set(claims[name].only_named) == set(SCALES) for name in sweep)
    assert claims["M4"].only_named == claims["M6"].only_named == ("smoke", "nano")
    assert len(claims["M1-II"].passes) == len(claims["M1-II"].fails) == 9
    assert {"check-tied-II-x1", "check-sp-II-x8"} < claims["M1-II"].arms
    assert "check-boosted-III-x4" in claims["M1-III"].arms


@pytest.mark.parametrize("scale", ["nano", "small"])
def test_a_sweep_is_planned_with_the_sizes_between_and_no_run_pays_for_it_unasked(scale):
    def arms(names=None):
        return {arm["id"] for arm in make_plan("mssp", scale=scale, claims=names, dry=True)["arms"]}

    swept = {name for name in arms("all") if name.startswith(("sweep", "deep", "mlp"))}
    if scale == "nano":
        assert arms("sweep") == swept
        assert not arms() & swept
        assert {"sweep-mup-II-x2-lr-7", "mlp-mssp-III-x2-lr-7", "deep-check-plain-8"} < swept
        assert not any(name.startswith(("sweep-sp-II-x2", "deep-mssp-8", "deep-plain")) for name in swept)
    else:
        assert {"sweep-mssp-II-x8-lr-10", "sweep-sp-III-x2-lr-7", "deep-plain-8-lr-5"} < swept < arms()


def test_the_claims_of_a_sweep_fit_what_it_runs():
    """Claims, figures and the table of optima speak of the same rates, and every fit has one for each."""
    sweep = SETTINGS["nano"].sweep
    for claim in load_claims("mssp").claim:
        if claim.suite == "sweep":
            rates = sweep.mlp_rates if "mlp" in claim.id else sweep.rates
            x = tuple(2.0**rate for rate in rates)
            fits = [side for test in (*claim.passes, *claim.fails) for side in (test.left, test.right) if side.fit]
            for fit in [part for side in fits for part in (side, side.minus) if part and part.fit == "vertex"]:
                assert (fit.x, fit.reach) == (x, sweep.reach)
                assert [arm.rpartition("-lr")[2] for arm in fit.arms] == [str(rate) for rate in rates]


def test_at_the_base_width_of_a_sweep_rules_differ_in_the_tie_alone(arms):
    nano = {arm.id: arm for arm in mssp.design("nano").arms}
    for regime, same in (("II", True), ("III", False)):
        for kind in ("sweep", "mlp"):
            mup, sp, tied = (digest(nano[f"{kind}-{rule}-{regime}-x1-lr-7"]) for rule in ("mup", "sp", "mssp"))
            assert mup == sp
            assert (tied == mup) is same
    assert digest(nano["deep-check-mssp-4"]) == digest(nano["deep-check-plain-4"])
    assert digest(nano["deep-check-mssp-16"]) != digest(nano["deep-check-plain-16"])


def digest(arm):
    return segment_digest(arm.segments[0], seed=0, corpus_sha256=START, parent=None)


def test_at_the_base_factors_are_one_so_that_plans_show_equality(arms):
    for regime in ("I", "II", "III"):
        assert digest(arms[f"base-sp-{regime}"]) == digest(arms[f"base-mup-{regime}"])
        same = digest(arms[f"base-mssp-{regime}"]) == digest(arms[f"base-mup-{regime}"])
        assert same is (regime == "II")
    assert digest(arms["base-mssp-II"]) != digest(arms["base-mssp-II-elsewhere"])


def course(arm, folder: Path, seed=0):
    """The arm trained and measured as a worker does."""
    set_deterministic()
    models = [make_model(arm.segments[0].model, seed)]
    parent = None
    text = corpus.load(arm.segments[0].corpus)
    for number, segment in enumerate(arm.segments):
        batches = Batches(data=text.train, batch=segment.train.batch, context=segment.train.context, seed=seed)
        models.append(
            train_segment(
                segment, batches=batches, mechanism=Mechanism(), seed=seed, folder=folder / str(number), genesis=START,
                parent=parent,
            )
        )  # fmt: skip
        parent = Parent(folder=folder / str(number), model=segment.model, genesis=START)
    found = dict(mssp.measure(models[-1], arm.measure, text.held_out))
    return found | dict(mssp.measure_course(models, arm.measure, text.held_out))


@pytest.mark.parametrize("name", ["check-mssp-II-x2", "text-mssp-III-x2", "deep-check-mssp-8"])
def test_coordinates_of_a_trained_arm(arms, tmp_path, name):
    found = course(arms[name], tmp_path)
    assert all(math.isfinite(value) and value > 0 for value in found.values())
    # the readout is zero at first: no gradient and no update before the first step
    start = {metric for metric in found if metric.startswith("t0/") and metric.count("/") == 1}
    assert start == {"t0/init", "t0/router"}
    for step in (2, 5):
        assert {
            f"t{step}/{term}" for term in ("init", "propagating", "effective", "router", "gradient", "backward")
        } <= set(found)
    assert found["t5/effective"] > found["t2/effective"]


def test_slopes_are_of_what_the_arms_measure(arms, tmp_path):
    smoke = SETTINGS["smoke"]
    found = course(arms["check-tied-II-x2"], tmp_path)
    terms = after(2, "tied", "II", 16, 0, setting=smoke)
    assert terms == {term: found[f"t2/{term}"] for term in terms}
    assert len(terms) == 6
    assert set(after(0, "tied", "II", 16, 0, setting=smoke)) == {"init", "router"}  # the readout is zero
    wider = {"d_expert": 8, "widths": (8, 16), "setting": smoke}
    three = slopes("mup", "III", seeds=(0, 1, 2), **wider)["effective"]
    alone = [slopes("mup", "III", seeds=(seed,), **wider)["effective"] for seed in range(3)]
    assert three.mean == pytest.approx(sum(one.mean for one in alone) / 3)
    assert three.error == pytest.approx(sum((one.mean - three.mean) ** 2 for one in alone) ** 0.5 / 6**0.5)
    assert all(math.isnan(one.sd) for one in alone)
    base = dataclasses.replace(smoke.mlp["III"], d_expert=8)
    values = [after(2, "mup", "III", width, 0, setting=smoke, base=base)["effective"] for width in (8, 16)]
    assert alone[0].mean == pytest.approx(slope((8, 16), values))
    assert alone[0].mean != slopes("mup", "III", seeds=(0,), widths=(8, 16), setting=smoke)["effective"].mean


def test_slopes_against_depth_are_of_what_the_arms_measure(arms, tmp_path):
    smoke = SETTINGS["smoke"]
    depths = smoke.sweep.layers
    for name, completep in (("mssp", True), ("plain", False)):
        found = [course(arms[f"deep-check-{name}-{depth}"], tmp_path / f"{name}{depth}") for depth in depths]
        here = depth_slopes(setting=smoke, seeds=(0,), completep=completep)
        assert {term: value.mean for term, value in here.items()} == {
            term: pytest.approx(slope(depths, [values[f"t2/{term}"] for values in found])) for term in here
        }
        assert {"init", "effective", "gradient"} <= set(here)
    judged = depth_slopes(setting=smoke, seeds=(0,))["gradient"].mean
    assert depth_slopes(setting=smoke, seeds=(0,), embedding=50)["gradient"].mean != judged
    assert depth_slopes(setting=smoke, seeds=(0,), layer=0)["gradient"].mean != judged


def test_arms_without_a_course_give_a_loss_alone(arms, tmp_path):
    for name in ("sgd-mssp-I-x2-lr-3", "sweep-mssp-III-x2-lr-7", "mlp-sp-II-x4-lr-7", "deep-mssp-16-lr-7"):
        assert set(course(arms[name], tmp_path / name)) == {"loss"}


def test_a_diverged_cell_is_drawn_as_diverged():
    complete = {
        (arm, seed): ArmEvidence(status="complete", weights="", metrics={"loss": str(0.5 + 0.1 * number + 0.05 * seed)})
        for number, arm in enumerate("abc")
        for seed in (0, 1)
    }
    figure = Figure(
        title="t", x_label="x", y_label="y", x=(0.125, 0.25, 0.5), log="x",
        curves=(Curve(arm="mssp", arms=("a", "b", "c"), metrics=("loss",) * 3),),
    )  # fmt: skip

    def drawn(evidence):
        return draw(figure, evidence, Courses(), seeds=(0, 1), chosen={}, labels={})

    assert "mssp: diverged" not in drawn(complete)
    lost = drawn(complete | {("c", 1): ArmEvidence(status="diverged", weights="", metrics={})})
    assert "mssp: diverged" in lost
    assert "mssp (2 seeds)" in lost  # the seed's other cells are kept


def swept(sweep, best, lost=()):
    """Evidence of a sweep over transformers of regime II: parabolas with their lowest point at `best` of (size, seed)."""
    return {
        (f"sweep-mup-II-{size}-lr{rate}", seed): ArmEvidence(status="diverged", weights="", metrics={})
        if (size, rate, seed) in lost
        else ArmEvidence(status="complete", weights="", metrics={"loss": str(2 + 0.05 * (rate - place) ** 2)})
        for (size, seed), place in best.items()
        for rate in sweep.rates
    }


def test_optima_and_drifts_are_those_that_were_put_in():
    sweep = SETTINGS["nano"].sweep
    middle = sum(sweep.rates[2:4]) / 2
    offsets = {("x1", 0): 0.0, ("x1", 1): 0.2, ("x2", 0): 0.1, ("x2", 1): 0.3, ("x4", 0): 0.3, ("x4", 1): 0.7}
    best = {key: middle + offset for key, offset in offsets.items()}
    lost = {("x4", sweep.rates[-1], 1)}
    (row,) = optima(sweep, swept(sweep, best, lost), (0, 1)).values()
    assert [one.size for one in row] == ["x1", "x2", "x4"]
    assert [one.values for one in row] == [
        (pytest.approx(best[size, 0]), pytest.approx(best[size, 1])) for size in ("x1", "x2", "x4")
    ]
    assert [one.diverged for one in row] == [0, 0, 1]
    found = dict(drifts(row))
    assert list(found) == ["x1 to x2", "x2 to x4", "x1 to x4"]
    assert found["x1 to x4"].mean == pytest.approx(0.4)
    assert (found["x1 to x4"].low, found["x1 to x4"].high) == (
        pytest.approx(0.3, abs=0.02),
        pytest.approx(0.5, abs=0.02),
    )
    printed = tables({"sweep-mup-II": row})
    assert f"| sweep-mup-II | x1 | {middle + 0.1:.2f} (" in printed
    assert "x1 to x2: +0.10 (+0.10 to +0.10)" in printed


def test_a_lowest_loss_at_an_end_of_the_rates_has_no_optimum_and_no_drift():
    sweep = SETTINGS["nano"].sweep
    best = {
        ("x1", 0): sweep.rates[2],
        ("x1", 1): sweep.rates[2],
        ("x4", 0): sweep.rates[2],
        ("x4", 1): sweep.rates[0] - 1,
    }
    (row,) = optima(sweep, swept(sweep, best), (0, 1)).values()
    assert row[1].values[1] is None
    assert row[1].interval is None
    assert [interval for _, interval in drifts(row)] == [None]
    assert "x1 to x4: none" in tables({"sweep-mup-II": row})
    assert optima(sweep, {}, (0, 1)) == {}


def test_the_readmes_optima_are_the_bundles():
    files = read_bundle(ROOT / "papers/mssp/replications/mssp-sweep-nano.repro.zip")
    plan = canonical.loads(files["plan.json"])
    found = optima(SETTINGS["nano"].sweep, load(plan, files).evidence, plan["seeds"])
    assert tables(found) in (ROOT / "papers/mssp/README.md").read_text(encoding="utf-8")


def test_the_table_is_printed(capsys):
    assert main(["claims", "mssp", "--table"]) == 0
    printed = capsys.readouterr().out
    assert "regime III, sgd" in printed
    assert "tied" in printed
    assert main(["claims", "emoe", "--table"]) == 2
    assert "has no table" in capsys.readouterr().err
