"""Verdicts: each of the four reached for its own reason, and never a pass for want of evidence."""

import pytest

from repro.config import decode, encode
from repro.experiment import Claim, Group, Quantity, Test
from repro.judge import ArmEvidence, exit_code, judge, same_outcome

SEEDS = (0, 1, 2)


def quantity(arm, metric="loss"):
    return Quantity(arm=arm, metric=metric)


def claim(**changes):
    settings = {
        "id": "X1",
        "title": "a is above b",
        "statement": "…",
        "source": "…",
        "metric": "loss",
        "scales": ("nano",),
        "min_seeds": 3,
        "passes": (Test(left=quantity("a"), right=quantity("b"), relation=">", sigmas=2, alpha=0.05),),
        "fails": (Test(left=quantity("a"), right=quantity("b"), relation="<="),),
        "controls": (Test(left=quantity("c"), right=quantity("b"), relation="identical"),),
    }
    return Claim(**(settings | changes))


def plan(*claims, arms=("a", "b", "c"), scale="nano", seeds=SEEDS, groups=(), left_out=()):
    return encode(
        {
            "claims": claims or (claim(),),
            "claims_left_out": left_out,
            "arms": [{"id": arm} for arm in arms],
            "groups": groups,
            "seeds": seeds,
            "scale": scale,
        }
    )


def evidence(status="complete", **arms):
    """Values of the metric `loss` an arm, one a seed; the weights' digest is the arm's values."""
    return {
        (arm, seed): ArmEvidence(status=status, weights=str(values), metrics={"loss": str(value)})
        for arm, values in arms.items()
        for seed, value in enumerate(values)
    }


B = (1.0, 1.1, 1.2)
CLEARLY_ABOVE = (1.30, 1.41, 1.50)
NOISILY_ABOVE = (1.01, 1.20, 1.21)


def verdict(*arguments):
    (found,) = judge(*arguments)["verdicts"]
    return found


def test_replicated_with_its_numbers():
    found = verdict(plan(), evidence(a=CLEARLY_ABOVE, b=B, c=B))
    assert found["verdict"] == "replicated"
    first = found["tests"][0]
    assert (first["effect"], first["n"], first["result"]) == ("0.303333", 3, "holds")
    assert float(first["interval"][0]) < 0.3033 < float(first["interval"][1])
    assert found["seeds"] == 3
    assert found["scale"] == "nano"


def test_not_replicated():
    assert verdict(plan(), evidence(a=B, b=CLEARLY_ABOVE, c=CLEARLY_ABOVE))["verdict"] == "not_replicated"


def test_neither_way_is_inconclusive():
    found = verdict(plan(), evidence(a=NOISILY_ABOVE, b=B, c=B))
    assert (found["verdict"], found["reason"]) == ("inconclusive", "neither the pass nor the fail criterion holds")
    meant = claim(undecided="b moves as much")
    found = verdict(plan(meant), evidence(a=NOISILY_ABOVE, b=B, c=B))
    assert found["reason"] == "neither the pass nor the fail criterion holds: b moves as much"
    assert "moves" not in verdict(plan(meant), evidence(a=CLEARLY_ABOVE, b=B, c=B))["reason"]


def test_a_control_that_fails_spoils_the_claim():
    found = verdict(plan(), evidence(a=CLEARLY_ABOVE, b=B, c=NOISILY_ABOVE))
    assert (found["verdict"], found["reason"]) == ("inconclusive", "a control did not come out as foretold")


def test_a_negative_control_has_to_fail():
    control = Test(left=quantity("c"), right=quantity("b"), relation=">", alpha=0.05, expect="fails")
    checked = claim(controls=(control,))
    assert verdict(plan(checked), evidence(a=CLEARLY_ABOVE, b=B, c=B))["verdict"] == "replicated"
    assert verdict(plan(checked), evidence(a=CLEARLY_ABOVE, b=B, c=CLEARLY_ABOVE))["verdict"] == "inconclusive"


@pytest.mark.parametrize("absent", ["a", "b", "c"])
def test_a_missing_arm_is_never_a_pass(absent):
    arms = {"a": CLEARLY_ABOVE, "b": B, "c": B}
    del arms[absent]
    found = verdict(plan(), evidence(**arms))
    assert found["verdict"] == "inconclusive"
    assert found["reason"] == f"arm {absent} seed 0 is missing"


def test_one_missing_seed_is_never_a_pass():
    some = evidence(a=CLEARLY_ABOVE, b=B, c=B)
    del some["a", 2]
    assert verdict(plan(), some)["reason"] == "arm a seed 2 is missing"


@pytest.mark.parametrize("status", ["diverged", "incomplete"])
def test_a_diverged_or_incomplete_arm_is_never_a_pass(status):
    some = evidence(a=CLEARLY_ABOVE, b=B, c=B) | {("a", 1): ArmEvidence(status=status, weights="", metrics={})}
    found = verdict(plan(), some)
    assert (found["verdict"], found["reason"]) == ("inconclusive", f"arm a seed 1 {status}")


def test_a_missing_metric_is_never_a_pass():
    some = evidence(a=CLEARLY_ABOVE, b=B, c=B) | {("a", 1): ArmEvidence(status="complete", weights="", metrics={})}
    assert verdict(plan(), some)["reason"] == "arm a seed 1 has no loss"


def test_too_few_seeds_and_a_scale_that_cannot_decide():
    some = evidence(a=CLEARLY_ABOVE, b=B, c=B)
    assert "at least 3 are needed" in verdict(plan(seeds=(0, 1)), some)["reason"]
    assert verdict(plan(seeds=(0,)), some)["verdict"] == "inconclusive"
    assert "the scale smoke cannot decide" in verdict(plan(scale="smoke"), some)["reason"]


def test_arms_that_are_not_in_the_plan_leave_the_claim_untested():
    found = verdict(plan(arms=("d",)), {})
    assert found["verdict"] == "not_tested"
    outcome = judge(plan(left_out=("X2",)), evidence(a=CLEARLY_ABOVE, b=B, c=B))
    assert outcome["verdicts"][1] == {
        "claim": "X2", "verdict": "not_tested", "reason": "not asked for in this run", "tests": [],
    }  # fmt: skip


def test_identical_means_weights_and_every_common_metric():
    same = verdict(plan(), evidence(a=CLEARLY_ABOVE, b=B, c=B))
    assert same["tests"][2]["result"] == "holds"
    other_weights = evidence(a=CLEARLY_ABOVE, b=B, c=B)
    other_weights["c", 0] = ArmEvidence(status="complete", weights="other", metrics={"loss": "1.0"})
    assert verdict(plan(), other_weights)["tests"][2]["result"] == "fails"


def test_a_group_stands_for_its_best_tuned_arm():
    group = Group(id="a", label="a", among=("a1", "a2"), by="tuning")
    values = {
        (arm, seed): ArmEvidence(
            status="complete", weights=arm, metrics={"loss": str(loss + seed / 10), "tuning": tuning}
        )
        for arm, loss, tuning in (("a1", 1.3, "2.0"), ("a2", 0.5, "1.0"), ("b", 1.0, "0"), ("c", 1.0, "0"))
        for seed in SEEDS
    } | {
        ("c", seed): ArmEvidence(status="complete", weights="b", metrics={"loss": str(1 + seed / 10)}) for seed in SEEDS
    }
    wanted = plan(arms=("a1", "a2", "b", "c"), groups=(group,))
    outcome = judge(wanted, values)
    assert outcome["groups"] == {"a": "a2"}
    assert outcome["verdicts"][0]["verdict"] == "not_replicated"
    values["a2", 1] = ArmEvidence(status="diverged", weights="", metrics={})
    assert judge(wanted, values)["groups"] == {"a": "a1"}
    assert judge(wanted, values)["verdicts"][0]["verdict"] != "not_replicated"
    values["a1", 1] = ArmEvidence(status="diverged", weights="", metrics={})
    outcome = judge(wanted, values)
    assert outcome["groups"] == {}
    assert outcome["verdicts"][0]["reason"] == "no arm of the group a is complete"


@pytest.mark.parametrize("left", [None, ArmEvidence(status="incomplete", weights="", metrics={})])
def test_dropping_the_best_arm_of_a_group_gains_nothing(left):
    """Without b's best arm a would be clearly above what is left of b, and replicate."""
    group = Group(id="b", label="b", among=("b1", "b2"), by="tuning")
    told = claim(controls=(Test(left=quantity("c"), right=quantity("b1"), relation="identical"),))
    wanted = plan(told, arms=("a", "b1", "b2", "c"), groups=(group,))
    losses = {"a": CLEARLY_ABOVE, "b1": B, "b2": tuple(2 * value for value in CLEARLY_ABOVE), "c": B}
    tuning = {"b1": "2.0", "b2": "1.0"}
    values = {
        (arm, seed): ArmEvidence(
            status="complete", weights="b1" if arm == "c" else arm,
            metrics={"loss": str(losses[arm][seed])} | ({"tuning": tuning[arm]} if arm in tuning else {}),
        )
        for arm in losses for seed in SEEDS
    }  # fmt: skip
    assert verdict(wanted, values)["verdict"] == "not_replicated"
    dropped = {key: found for key, found in values.items() if key != ("b2", 1)} | ({("b2", 1): left} if left else {})
    outcome = judge(wanted, dropped)
    assert outcome["groups"] == {}
    assert outcome["verdicts"][0]["verdict"] == "inconclusive"
    assert outcome["verdicts"][0]["reason"].startswith("arm b2 seed 1 ")


def test_the_least_of_several_metrics_is_taken_a_seed():
    least = Quantity(arm="a", least_of=("x", "y"))
    some = {
        (arm, seed): ArmEvidence(status="complete", weights="w", metrics={"x": x, "y": y, "loss": "1.0"})
        for arm, rows in (("a", (("1.0", "3.0"), ("3.0", "1.1"), ("1.2", "2.0"))), ("b", (("1", "1"),) * 3))
        for seed, (x, y) in enumerate(rows)
    }
    test = Test(left=least, right=Quantity(arm="b", metric="loss"), relation=">", margin=0.05)
    found = verdict(plan(claim(passes=(test,), controls=(test,)), arms=("a", "b")), some)
    assert found["tests"][0]["effect"] == "0.1"  # (0.0 + 0.1 + 0.2) / 3


@pytest.mark.parametrize(
    ("relation", "margin", "sigmas", "holds"),
    [
        (">", 0.1, 0, True),
        (">", 0.3, 0, False),
        (">", 0.0, 3, False),
        ("<", 0.0, 0, False),
        ("<=", 0.3, 0, True),
        ("<=", 0.1, 0, False),
        ("<=", 0.0, 3, True),
        (">=", 0.0, 0, True),
        ("within", 0.21, 0, True),
        ("within", 0.19, 0, False),
        ("within", 0.15, 1, True),
        ("outside", 0.21, 0, False),
        ("outside", 0.19, 0, True),
        ("covers", 0.0, 0, False),
        ("covers", 0.13, 0, True),
        ("misses", 0.0, 0, True),
        ("misses", 0.13, 0, False),
    ],
)
def test_relations(relation, margin, sigmas, holds):
    # differences 0.1, 0.2, 0.3: mean 0.2, σ 0.1
    test = Test(left=quantity("a"), right=quantity("b"), relation=relation, margin=margin, sigmas=sigmas)
    some = evidence(a=(1.1, 1.2, 1.3), b=(1.0, 1.0, 1.0), c=(1.0, 1.0, 1.0))
    found = verdict(plan(claim(passes=(test,))), some)
    assert found["tests"][0]["result"] == ("holds" if holds else "fails")


def test_exit_codes():
    def outcome(*verdicts):
        return {"verdicts": [{"verdict": item} for item in verdicts]}

    assert exit_code(outcome("replicated", "not_tested")) == 0
    assert exit_code(outcome("replicated", "not_replicated", "inconclusive")) == 1
    assert exit_code(outcome("replicated", "inconclusive")) == 4
    assert exit_code(outcome("not_tested")) == 4


def test_outcomes_are_the_same_up_to_the_last_digits_of_their_numbers():
    outcome = judge(plan(), evidence(a=CLEARLY_ABOVE, b=B, c=B))
    near = judge(plan(), evidence(a=CLEARLY_ABOVE, b=B, c=B))
    near["verdicts"][0]["tests"][0]["p"] = str(float(outcome["verdicts"][0]["tests"][0]["p"]) * 1.00001)
    assert same_outcome(outcome, near)
    near["verdicts"][0]["tests"][0]["p"] = str(float(outcome["verdicts"][0]["tests"][0]["p"]) * 1.001)
    assert not same_outcome(outcome, near)
    near = judge(plan(), evidence(a=CLEARLY_ABOVE, b=B, c=B))
    near["verdicts"][0]["verdict"] = "not_replicated"
    assert not same_outcome(outcome, near)
    assert not same_outcome(outcome, {"groups": {}})


@pytest.mark.parametrize(
    ("at_least", "bound", "holds"),
    [(0.5, "mean", True), (0.7, "mean", False), (0.55, "lower", False), (0.4, "lower", True)],
)
def test_closing_a_gap(at_least, bound, holds):
    # gaps of 1, closed by .5, .6, .7: η = .6, and from .5 to .7 over the resamples
    test = Test(
        left=quantity("a"), right=quantity("b"), base=quantity("c"), relation="closes", at_least=at_least, bound=bound
    )
    some = evidence(a=(1.5, 1.4, 1.3), b=(1.0, 1.0, 1.0), c=(2.0, 2.0, 2.0))
    found = verdict(plan(claim(passes=(test,), controls=(test,))), some)["tests"][0]
    assert found["result"] == ("holds" if holds else "fails")
    assert found["effect"] == "0.6"
    none = verdict(plan(claim(passes=(test,))), some | evidence(c=(1.0, 1.0, 1.0)))
    assert none["verdict"] == "inconclusive"
    assert "no gap to close" in none["reason"]


@pytest.mark.parametrize(("at_least", "holds"), [(0.5, False), (0.55, False), (0.9, True)])
def test_falling_short_of_closing_a_gap(at_least, holds):
    # half of the gap from 2 to 1 is closed, give or take .01 by seed
    test = Test(
        left=quantity("a"), right=quantity("b"), base=quantity("c"), relation="short_of", at_least=at_least, sigmas=8
    )
    some = evidence(a=(1.49, 1.50, 1.51), b=(1.0, 1.0, 1.0), c=(2.0, 2.0, 2.0))
    found = verdict(plan(claim(passes=(test,), controls=(test,))), some)["tests"][0]
    assert found["result"] == ("holds" if holds else "fails")
    assert float(found["effect"]) == pytest.approx(at_least - 0.5)
    assert "is closed + 8σ" in str(test)


def test_a_quantity_may_be_scaled():
    test = Test(left=quantity("a"), right=Quantity(arm="b", metric="loss", times=0.9), relation="<")
    assert str(test) == "a loss < b loss × 0.9"
    some = evidence(a=(0.8, 0.9, 0.85), b=(1.0, 1.05, 1.0), c=(1.0, 1.0, 1.0))
    assert verdict(plan(claim(passes=(test,))), some)["tests"][0]["result"] == "holds"


def test_a_base_belongs_to_closes_alone():
    for relation, base in (("closes", None), ("short_of", None), ("<", quantity("c"))):
        with pytest.raises(ValueError, match="`closes` and `short_of` need a base"):
            Test(left=quantity("a"), right=quantity("b"), relation=relation, base=base)


@pytest.mark.parametrize(("errors", "holds"), [(3, True), (4, False)])
def test_standard_errors(errors, holds):
    # differences 0.1, 0.2, 0.3: mean 0.2 is √12 standard errors above 0
    test = Test(left=quantity("a"), right=quantity("b"), relation=">", errors=errors)
    some = evidence(a=(1.1, 1.2, 1.3), b=(1.0, 1.0, 1.0), c=(1.0, 1.0, 1.0))
    assert verdict(plan(claim(passes=(test,))), some)["tests"][0]["result"] == ("holds" if holds else "fails")
    assert str(test) == f"a loss > b loss + {errors}SE"


LADDER = ("a", "b", "c", "d")


def fit(kind, arms=LADDER[:3], x=(1, 2, 4), **changes):
    return Quantity(fit=kind, arms=arms, x=x, metric="loss", **changes)


def one_test(test, some):
    found = verdict(plan(claim(passes=(test,), fails=(test,), controls=(test,)), arms=LADDER), some)
    return found["tests"][0]


def test_a_slope_over_arms_is_fitted_seed_by_seed():
    some = evidence(a=(1.0, 2.0, 1.0), b=(2.0, 4.0, 1.0), c=(4.0, 8.0, 1.0), d=(1.0, 1.0, 1.0))
    flat = Test(left=fit("slope"), right=Quantity(value=0.0), relation="within", margin=0.1)
    found = one_test(flat, some)
    assert (found["effect"], found["result"]) == ("0.666667", "fails")  # slopes 1, 1 and 0
    assert found["test"] == "slope(loss over a … c) within 0 ± 0.1"
    less = Test(left=fit("slope", minus=Quantity(value=0.6)), right=Quantity(value=0.0), relation="within", margin=0.1)
    assert one_test(less, some)["result"] == "holds"


def test_the_interval_of_a_vertex_and_its_drift():
    some = evidence(a=(2.0, 2.1, 2.0), b=(1.0, 1.0, 1.0), c=(2.0, 2.0, 2.1), d=(5.0, 4.0, 4.5))
    at_two = Test(left=fit("vertex"), right=Quantity(value=1.0), relation="covers")
    assert one_test(at_two, some)["result"] == "holds"
    assert one_test(Test(left=fit("vertex"), right=Quantity(value=1.2), relation="covers"), some)["result"] == "fails"
    other = fit("vertex", arms=("d", "b", "c"))
    steady = fit("vertex", minus=fit("vertex"))
    moved = Test(
        left=steady,
        right=Quantity(fit="vertex", arms=("d", "b", "c"), x=(1, 2, 4), metric="loss", minus=fit("vertex")),
        relation="nearer",
        margin=0.05,
    )
    assert one_test(moved, some)["result"] == "holds"
    assert moved.left.all_arms | other.all_arms == set(LADDER)
    assert claim(passes=(moved,)).arms == set(LADDER)


def test_the_optimum_over_all_arms_may_lie_at_an_end_of_the_range():
    some = evidence(a=(1.0, 1.0, 1.0), b=(2.0, 2.0, 2.0), c=(4.0, 4.1, 4.2), d=(7.0, 7.0, 7.1))
    left = fit("optimum", LADDER, (0.125, 0.25, 0.5, 1))
    found = one_test(Test(left=left, right=Quantity(value=-3.0), relation="covers"), some)
    assert (found["effect"], found["result"]) == ("0.0", "holds")
    assert found["test"] == "95% interval of optimum(loss over a … d) covers -3"
    assert (
        one_test(Test(left=left, right=Quantity(value=-2.5), relation="misses", margin=0.3), some)["result"] == "holds"
    )
    with pytest.raises(ValueError, match="at least 3"):
        fit("optimum", LADDER[:2], (1, 2))


def test_a_diverged_cell_is_infinitely_high_for_a_vertex_and_no_number_for_a_slope():
    some = evidence(a=(2.0, 2.1, 2.0), b=(1.0, 1.0, 1.0), c=(2.0, 2.0, 2.1), d=(9.0, 9.0, 9.0))
    some["d", 1] = ArmEvidence(status="diverged", weights="", metrics={})
    found = one_test(Test(left=fit("vertex", LADDER, (1, 2, 4, 8)), right=Quantity(value=1.0), relation="covers"), some)
    assert found["result"] == "holds"
    some["c", 1] = ArmEvidence(status="diverged", weights="", metrics={})
    found = one_test(Test(left=fit("vertex"), right=Quantity(value=1.0), relation="covers"), some)
    assert found["result"] == "not_computed"
    assert "seed 1: the lowest value is at x = 2, with no finite one above it" in found["reason"]
    found = one_test(Test(left=fit("slope"), right=Quantity(value=1.0), relation="covers"), some)
    assert found["reason"] == "arm c seed 1 diverged"


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"arm": "a"}, "either metric or least_of"),
        ({}, "expected an arm, a value, or a fit"),
        ({"value": 1.0, "arm": "a"}, "neither arms nor metrics"),
        ({"fit": "slope", "arms": ("a", "b"), "x": (1.0, 2.0)}, "expected arms, x and metric"),
        ({"fit": "slope", "arms": ("a", "b"), "x": (1.0,), "metric": "loss"}, "an x for each"),
        ({"fit": "vertex", "arms": ("a", "b"), "x": (1.0, 2.0), "metric": "loss"}, "at least 3"),
        ({"fit": "slope", "arms": ("a", "b"), "x": (0.0, 2.0), "metric": "loss"}, "above 0 and rising"),
        ({"fit": "slope", "arms": ("a", "b"), "x": (2.0, 1.0), "metric": "loss"}, "above 0 and rising"),
        ({"arm": "a", "metric": "loss", "arms": ("b",)}, "expected an arm, a value, or a fit"),
    ],
)
def test_a_quantity_is_one_thing(fields, why):
    with pytest.raises(ValueError, match=why):
        Quantity(**fields)


def test_fits_survive_the_plan():
    test = Test(
        left=fit("vertex", reach=2, minus=fit("slope")), right=Quantity(value=0.5), relation="covers", margin=0.25
    )
    assert decode(Test, encode(test)) == test
    with pytest.raises(ValueError, match="leave sigmas and errors out"):
        Test(left=fit("slope"), right=Quantity(value=0.0), relation="covers", errors=2)
    with pytest.raises(ValueError, match="an arm on each side"):
        Test(left=fit("slope"), right=quantity("a"), relation="identical")
