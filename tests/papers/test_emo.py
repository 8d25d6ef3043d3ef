"""EMO's budgets against the law's own table, its stages as segments, and the load measures."""

from dataclasses import replace

import pytest
import torch
from command_line import repro

import papers.emo as emo
from papers.emo import law
from records.errors import UsageError
from repro.accounting import accounting
from repro.config import encode
from repro.data import corpus
from repro.data.batches import Batches
from repro.environment import set_deterministic
from repro.experiment import load_claims
from repro.inherit import Parent
from repro.model import Transformer
from repro.moe import TopK
from repro.trace import check_chain, genesis
from repro.train import make_optimizer, train_segment, training_step
from repro.workflow.estimate import estimate
from repro.workflow.jobs import jobs
from repro.workflow.plan import at_hand, make_plan

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
    assert sum(law.steps(law.printed(3), 1000, multiple=10)) == 1000
    with pytest.raises(UsageError, match=r"sum to 1, found 0\.5, 0\.4 with the sum 0\.9; divide each"):
        law.steps((0.5, 0.4), 100, multiple=1)
    with pytest.raises(UsageError, match="a step at least in each stage"):
        law.steps((0.999, 0.001), 100, multiple=10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"shares": (0.2, 0.3, 0.4)},
            "shares of the tokens above 0 that sum to 1, found 0.2, 0.3, 0.4 with the sum 0.9",
        ),
        ({"shares": (0.6, 0.6, -0.2)}, "above 0 that sum to 1"),
        ({"shares": (0.5, 0.5)}, "a share for each of 3 stages, found 2"),
        ({"stages": (8, 4, 16)}, "rising numbers of experts"),
        ({"jump": (16, 4)}, "rising numbers of experts"),
        ({"stages": (1, 4, 16)}, "at least top_k = 2 experts from the start, found 1"),
        ({"stages": (4, 8, 32)}, "the last to have the model's 16 experts, found 32"),
    ],
)
def test_an_impossible_schedule_is_said_clearly(change, message):
    with pytest.raises(UsageError, match=message):
        replace(emo.SETTINGS["nano"], **change)


def test_a_law_asked_outside_its_range_is_a_warning_in_the_plan():
    assert law.warnings((8, 32), d_model=64, d_expert=256) == ()
    (beyond,) = law.warnings((32, 64, 128), d_model=64, d_expert=256)
    assert "for 64, 128 experts, where it was fitted up to 32" in beyond
    (fine,) = emo.design("nano").warnings
    assert "experts of width 32, where it was fitted on coarse ones, of width 170" in fine
    done = repro("plan", "emo", "--scale", "small")
    assert done.returncode == 0
    found = done.stdout.decode()
    assert (
        "warning   the scaling law behind the budgets of h1 and h2 is asked outside its fitted range: for 64, 128"
        in found
    )


@pytest.mark.parametrize("scale", emo.SETTINGS)
def test_every_arm_trains_on_the_same_tokens_and_ends_with_a_decay(scale):
    setting = emo.SETTINGS[scale]
    for arm in emo.design(scale).arms:
        total = setting.clock_steps or setting.train.steps if arm.id.endswith("-clock") else setting.train.steps
        place = 0
        for number, segment in enumerate(arm.segments):
            assert segment.train.first_step == place
            place += segment.train.steps
            last = number == len(arm.segments) - 1
            assert (segment.train.schedule == "wsd") is last
            if last:
                assert segment.train.decay * segment.train.steps == pytest.approx(setting.train.decay * total)
            else:
                assert segment.train.schedule == "constant"
        assert place == total
        experts = [segment.model.num_experts for segment in arm.segments]
        assert experts == sorted(experts)


def test_the_papers_own_scale_is_the_papers():
    arms = {arm.id: arm for arm in emo.design("paper").arms}
    segments = arms["emo"].segments
    assert [s.model.num_experts for s in segments if s.growth or s.inherit == "nothing"] == list(STAGES)
    cost = accounting(arms["full"].segments[0].model)
    assert cost.total_non_vocab == pytest.approx(9.6e9 + 1.1e9 * 0.33, rel=0.05)  # experts, and what is not an expert
    train = segments[0].train
    assert 240_000 * train.batch * train.context == pytest.approx(1.92e12, rel=0.05)
    shares = [sum(s.train.steps for s in segments if s.model.num_experts == e) / 240_000 for e in STAGES]
    assert shares == pytest.approx([0.235, 0.095, 0.165, 0.218, 0.286], abs=1e-3)
    assert [s.train.warmup for s in segments if s.growth] == [500] * 4
    grown = [s.model.num_experts for s in arms["at50"].segments]
    assert (grown[0], grown[-1]) == (16, 32)


def test_only_the_growing_segments_reset_warm_up_and_grow():
    arms = {arm.id: arm for arm in emo.design("nano").arms}
    first, second, third = arms["emo"].segments
    assert [s.model.num_experts for s in (first, second, third)] == [4, 8, 16]
    assert [s.train.steps for s in (first, second, third)] == [250, 320, 430]
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
    assert arms["copy"].segments[-1].growth == replace(arms["twins"].segments[-1].growth, bias_noise=1e-3)
    assert arms["restart"].segments[-1].inherit == "nothing"
    idle = arms["idle50"].segments[-1]
    assert (idle.inherit, idle.train.warmup, idle.growth.reset_bias) == ("all", 0, False)
    assert [s.model.num_experts for s in arms["emo-clock"].segments] == list(STAGES)


def test_shared_prefixes_are_trained_once():
    plan = make_plan("emo", scale="nano", seeds=1)
    assert plan["seeds"] == [3]  # seeds 0 to 2 were published before the criteria were mended
    alone = [segment for job in jobs(plan) for segment in job.segments]
    unique = {segment.digest: segment for segment in alone}
    assert sum(segment.tokens for segment in unique.values()) < 0.75 * sum(segment.tokens for segment in alone)
    by_arm = {job.arm: [segment.digest for segment in job.segments] for job in jobs(plan)}
    for arm in ("at25", "at75", "emo", "frozen", "equal"):
        assert by_arm["at50"][0] == by_arm[arm][0]
    for arm in ("copy", "keep", "bias", "twins", "restart", "idle50", "at75"):
        assert by_arm["at50"][:2] == by_arm[arm][:2]
    assert by_arm["at75"][:3] == by_arm["idle75"][:3]
    assert len({digests[-1] for digests in by_arm.values()}) == len(by_arm)


def test_an_idle_model_trains_as_the_one_that_never_grew():
    """Same text, same weights in the experts that are used: 20 steps end at the same weights and biases."""
    setting = emo.SETTINGS["smoke"]
    idle = {arm.id: arm for arm in emo.design("smoke").arms}["idle50"].segments[-1]
    text = corpus.load("synthetic").train
    batches = Batches(data=text, batch=setting.train.batch, context=setting.train.context, seed=0)
    ended = []
    for experts, train, mechanism in (
        (4, setting.train, emo.Mechanism()),
        (16, idle.train, emo.mechanism(encode(idle.mechanism))),
    ):
        model = Transformer(replace(setting.model, num_experts=experts))
        model.init_weights(0)
        optimizer = make_optimizer(model, train)
        for step in range(20):
            training_step(model, optimizer, train, *batches.at(step), mechanism, step, seed=0)
        layer = model.blocks[0].ffn
        ended.append((layer.router_ED[:4], layer.w_up_EDF[:4], layer.bias_E[:4], model.unembedding_VD))
    for small, large in zip(*ended, strict=True):
        torch.testing.assert_close(small, large)
    assert ended[0][2].abs().max() > 0


def test_every_claim_finds_its_arms_in_the_design():
    arms = {arm.id for arm in emo.design("nano").arms}
    for claim in load_claims("emo").claim:
        assert claim.arms <= arms, claim.id


def test_the_control_routes_to_the_first_experts_alone():
    scores_TE = torch.rand(50, 8, generator=torch.Generator().manual_seed(0))
    expert_TK, weight_TK = emo.FirstExperts(k=2, count=4)(scores_TE, torch.tensor([0.0] * 4 + [9.0] * 4))
    assert int(expert_TK.max()) < 4
    expected = TopK(2)(scores_TE[:, :4], None)
    assert torch.equal(expert_TK, expected[0])
    assert torch.equal(weight_TK, expected[1])


def test_a_scale_that_is_not_set_up():
    with pytest.raises(UsageError, match="emo at scale 'huge' is not set up"):
        emo.design("huge")


def test_copies_are_watched_and_idle_experts_get_nothing(tmp_path):
    """Real segments at smoke: twins start as copies; experts that are never routed to have no load in any probe."""
    set_deterministic()
    arms = {arm.id: arm for arm in emo.design("smoke").arms}
    for name in ("copy", "idle50"):
        before, entries = None, []
        for number, segment in enumerate(arms[name].segments):
            folder = tmp_path / name / str(number)
            start = genesis("11" * 32, f"{number:064x}")
            train = segment.train
            text = corpus.load(segment.corpus).train
            train_segment(
                segment,
                batches=Batches(data=text, batch=train.batch, context=train.context, seed=0),
                mechanism=emo.mechanism(segment.mechanism),
                seed=0,
                folder=folder,
                genesis=start,
                parent=before,
            )
            before = Parent(folder=folder, model=segment.model, genesis=start)
            entries = check_chain((folder / "trace.jsonl").read_bytes(), start)[0]
        probes = [entry for entry in entries if entry["type"] == "probe"]
        assert probes[0]["step"] == 0
        if name == "copy":
            cosines = [float(probe["values"]["twins"][0]) for probe in probes]
            assert cosines[0] == pytest.approx(1)
            assert cosines[-1] < 0.9999
        else:
            assert all(sum(probe["load"][0][4:]) == 0 and sum(probe["load"][0][:4]) > 0 for probe in probes)


@pytest.mark.parametrize("scale", ["small", "base", "paper"])
def test_large_scales_are_planned_with_their_cost_and_no_text(scale, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = make_plan("emo", scale=scale, dry=True)
    assert at_hand(plan) is (scale == "small")
    cost = estimate(plan, workers=1, device="cuda")
    assert cost.tokens < 0.75 * cost.tokens_alone
    segments = [segment for arm in plan["arms"] for segment in arm["segments"]]
    assert {segment["model"]["num_experts"] for segment in segments} == set(STAGES)
    if scale != "small":
        with pytest.raises(UsageError, match="corpus file:text: cannot read text"):
            make_plan("emo", scale=scale)
