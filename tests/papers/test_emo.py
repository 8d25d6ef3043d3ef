"""EMO's budgets against the law's own table, its stages as segments, and the load measures."""

import pytest
import torch

import papers.emo as emo
from papers.emo import law
from records.errors import UsageError
from repro.experiment import load_claims
from repro.moe import TopK
from repro.workflow.plan import jobs, make_plan

STAGES = (8, 16, 32, 64, 128)
ACTIVE = 1.1e9  # EMO's active parameters


@pytest.mark.parametrize(
    ("experts", "m", "mu", "n", "nu"),
    [(8, 21.833, -0.1676, 119.91, -0.2338), (32, 16.542, -0.1557, 234.67, -0.2652)],
)
def test_the_laws_table_4_is_recomputed_to_within_three_in_a_thousand(experts, m, mu, n, nu):
    found = law.coefficients(experts)
    assert (found.m, found.mu, found.n, found.nu) == pytest.approx((m, mu, n, nu), rel=3e-3)


def test_both_readings_of_the_budgets():
    h1, h2 = law.shares_by_stage(STAGES, ACTIVE), law.shares_by_total(STAGES, ACTIVE)
    assert [round(100 * share, 1) for share in h1] == [10.9, 15.0, 19.7, 24.8, 29.6]
    assert [round(100 * share, 1) for share in h2] == [36.7, 13.9, 16.0, 17.0, 16.3]
    assert h1[1] / (h1[1] + h1[2]) == pytest.approx(0.43, abs=0.005)  # the split at 16 to 32 experts
    assert sum(law.PRINTED_SHARES) == pytest.approx(0.999)


def test_balanced_tokens_balance_the_laws_two_slopes():
    for experts in STAGES:
        at, tokens = law.coefficients(experts), law.balanced_tokens(experts, ACTIVE)
        assert at.mu * at.m * ACTIVE**at.mu == pytest.approx(at.nu * at.n * tokens**at.nu)


def test_the_law_says_where_it_was_fitted_and_falls_with_size_data_and_experts():
    assert [law.in_range(experts) for experts in (1, 32, 33)] == [True, True, False]
    assert law.loss(8, 1e9, 1e10) > law.loss(8, 2e9, 1e10) > law.C
    assert law.loss(8, 1e9, 1e10) > law.loss(8, 1e9, 2e10)
    assert law.loss(8, 1e9, 1e11) > law.loss(32, 1e9, 1e11)


def test_steps_add_up_and_impossible_shares_are_refused():
    assert law.steps((0.25, 0.35, 0.4), 100, multiple=10) == (20, 40, 40)
    assert sum(law.steps(emo._LAST_THREE, 1200, multiple=10)) == 1200
    with pytest.raises(ValueError, match=r"sum to 1, found 0\.9"):
        law.steps((0.5, 0.4), 100, multiple=1)
    with pytest.raises(ValueError, match="a step at least in each stage"):
        law.steps((0.999, 0.001), 100, multiple=10)


@pytest.mark.parametrize("scale", emo.SETTINGS)
def test_every_arm_trains_on_the_same_tokens_and_ends_with_a_decay(scale):
    setting = emo.SETTINGS[scale]
    for arm in emo.design(scale).arms:
        place = 0
        for number, segment in enumerate(arm.segments):
            assert segment.train.first_step == place
            place += segment.train.steps
            last = number == len(arm.segments) - 1
            assert (segment.train.schedule == "wsd") is last
            if last:
                steps = segment.train.decay * segment.train.steps
                assert steps == pytest.approx(setting.train.decay * setting.train.steps)
            else:
                assert segment.train.schedule == "constant"
        assert place == setting.train.steps
        experts = [segment.model.num_experts for segment in arm.segments]
        assert experts == sorted(experts)


def test_only_the_growing_segments_reset_warm_up_and_grow():
    arms = {arm.id: arm for arm in emo.design("nano").arms}
    first, second, third = arms["emo"].segments
    assert [s.model.num_experts for s in (first, second, third)] == [4, 8, 16]
    assert [s.train.steps for s in (first, second, third)] == [300, 390, 510]
    assert (first.inherit, second.inherit, third.inherit) == ("nothing", "weights", "weights")
    assert (first.train.warmup, second.train.warmup) == (40, 20)
    assert second.growth == emo.RECIPE
    _, middle, grown = arms["at50"].segments
    assert (middle.inherit, middle.growth, middle.train.warmup) == ("all", None, 0)
    assert grown.growth == emo.RECIPE
    assert arms["keep"].segments[-1].inherit == "all"
    assert not arms["bias"].segments[-1].growth.reset_bias
    assert arms["frozen"].segments[0].freeze == ()
    assert arms["frozen"].segments[1].freeze == ("router_ED",)


def test_shared_prefixes_are_trained_once():
    plan = make_plan("emo", scale="nano", seeds=1)
    alone = [segment for job in jobs(plan) for segment in job.segments]
    unique = {segment.digest: segment for segment in alone}
    assert sum(segment.tokens for segment in unique.values()) < 0.8 * sum(segment.tokens for segment in alone)
    by_arm = {job.arm: [segment.digest for segment in job.segments] for job in jobs(plan)}
    assert by_arm["at25"][0] == by_arm["at50"][0] == by_arm["at75"][0]
    assert by_arm["at50"][:2] == by_arm["copy"][:2] == by_arm["keep"][:2] == by_arm["at75"][:2]
    assert by_arm["emo"][0] == by_arm["frozen"][0] == by_arm["unused"][0]
    assert len({digests[-1] for digests in by_arm.values()}) == len(by_arm)


def test_every_claim_finds_its_arms_in_the_design():
    arms = {arm.id for arm in emo.design("nano").arms}
    for claim in load_claims("emo").claim:
        assert claim.arms <= arms, claim.id


def test_gini():
    assert emo.gini(torch.tensor([5, 5, 5, 5])) == pytest.approx(0)
    assert emo.gini(torch.tensor([0, 0, 0, 7])) == pytest.approx(3 / 4)
    assert emo.gini(torch.tensor([1.0, 2.0, 3.0, 4.0])) == pytest.approx(0.25)


def test_the_control_routes_to_the_first_experts_alone():
    scores_TE = torch.rand(50, 8, generator=torch.Generator().manual_seed(0))
    expert_TK, weight_TK = emo.FirstExperts(k=2, count=4)(scores_TE, torch.tensor([0.0] * 4 + [9.0] * 4))
    assert int(expert_TK.max()) < 4
    expected = TopK(2)(scores_TE[:, :4], None)
    assert torch.equal(expert_TK, expected[0])
    assert torch.equal(weight_TK, expected[1])


def test_a_scale_that_is_not_set_up():
    with pytest.raises(UsageError, match="emo at scale 'base' is not set up yet"):
        emo.design("base")
