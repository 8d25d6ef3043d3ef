"""Plans: what decides a run is in them, and what cannot be run is refused with its reason."""

from dataclasses import replace

import pytest

from records import canonical
from records.errors import UsageError
from repro.experiment import load_claims, select_claims
from repro.workflow.jobs import jobs
from repro.workflow.plan import make_plan, parse_plan, plan_digest


def test_the_plan_is_the_same_every_time_and_changes_with_what_decides_the_run():
    plan = make_plan("emoe", scale="smoke")
    assert plan_digest(plan) == plan_digest(make_plan("EMoE", scale="smoke"))
    assert plan_digest(plan) != plan_digest(make_plan("emoe", scale="smoke", seeds=3))
    assert plan_digest(plan) != plan_digest(make_plan("emoe", scale="smoke", claims="A1"))
    assert parse_plan(canonical.dumps(plan), name="plan") == plan


def test_claims_choose_the_arms_that_they_need():
    plan = make_plan("emoe", scale="smoke", claims="a1")
    assert [arm["id"] for arm in plan["arms"]] == ["topk-lr0.003", "control-lr0.003"]
    assert [claim["id"] for claim in plan["claims"]] == ["A1"]
    assert plan["claims_left_out"] == [claim.id for claim in load_claims("emoe").claim if claim.id != "A1"]
    assert len({job.segments[0].digest for job in jobs(plan)}) == 4


def test_a_claim_that_must_be_named_is_left_out_with_the_arms_that_only_it_needs(monkeypatch):
    info = load_claims("emoe")
    claims = tuple(
        replace(claim, only_named=("smoke",), suite="raw")
        if claim.id.endswith("-raw")
        else replace(claim, only_named=())
        for claim in info.claim
        if claim.id.removesuffix("-raw") in ("A1", "A2", "A3")
    )
    monkeypatch.setattr("repro.workflow.plan.load_claims", lambda _: replace(info, claim=claims))

    def arms(names: str | None, scale: str = "smoke") -> set[str]:
        return {arm["id"] for arm in make_plan("emoe", scale=scale, claims=names)["arms"]}

    plan = make_plan("emoe", scale="smoke")
    assert [claim["id"] for claim in plan["claims"]] == ["A1", "A2", "A3"]
    assert plan["claims_left_out"] == ["A1-raw", "A2-raw", "A3-raw"]
    raw = {name for name in arms("all") if "-raw" in name}
    assert raw
    assert arms(None) >= arms("all") - raw
    assert not arms(None) & raw
    assert arms("RAW") == arms("A1-raw,A2-raw,A3-raw") <= arms("all")
    assert arms(None, "nano") >= arms("all", "nano")
    with pytest.raises(UsageError, match="no claim is judged at smoke unless named: expected --claims with some of A1"):
        select_claims(replace(info, claim=claims[3:]), None, "smoke")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"paper": "bert", "scale": "smoke"}, "unknown paper 'bert'"),
        ({"paper": "emoe", "scale": "huge"}, "unknown scale 'huge'"),
        ({"paper": "emoe", "scale": "smoke", "seeds": 0}, "at least 1, found 0"),
        ({"paper": "emoe", "scale": "smoke", "claims": "Z9"}, "unknown claim 'Z9'"),
        ({"paper": "emoe", "scale": "smoke", "device": "tpu"}, "unknown device 'tpu'"),
    ],
)
def test_an_impossible_plan_is_said_clearly(arguments, message):
    with pytest.raises(UsageError, match=message):
        make_plan(arguments.pop("paper"), **arguments)
