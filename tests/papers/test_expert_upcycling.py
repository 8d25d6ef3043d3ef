"""Expert Upcycling's operator at the transition, its stages as segments, twins, the contest's table, and what is refused."""

from dataclasses import replace

import pytest
import torch

import papers.expert_upcycling as upcycling
from papers.expert_upcycling import contest, twins
from papers.expert_upcycling.arms import Family
from papers.expert_upcycling.recipes import DELTA, RANDOM, UPCYCLING, UTILITY
from papers.expert_upcycling.scales import SETTINGS
from records.errors import UsageError
from repro.experiment import Arm, load_claims
from repro.model import ModelConfig, Transformer
from repro.moe.growth import grow
from repro.train import Segment, TrainConfig, make_optimizer, training_step
from repro.workflow.jobs import jobs
from repro.workflow.plan import make_plan

SMALL = ModelConfig(
    d_model=16, num_layers=2, num_heads=2, context=16, d_expert=8, num_experts=4, top_k=1, score="sigmoid",
    selection_bias=True,
)  # fmt: skip
TOKENS = torch.arange(64).view(4, 16) * 7 % 256


def grown(top_k: int = 2, growth=UPCYCLING) -> Transformer:
    small, large = (Transformer(replace(SMALL, num_experts=count, top_k=top_k)) for count in (4, 8))
    large.lineages = grow(small, large, growth, generator=torch.Generator().manual_seed(0))
    return large


def test_the_operator_is_that_of_definition_3_1():
    """Copied experts and router rows; noise of at most δ on the replicas' router biases, and nothing else changed."""
    small = Transformer(SMALL)
    biases = {name: buffer.copy_(torch.rand(4)) for name, buffer in small.named_buffers() if name.endswith("bias_E")}
    large = Transformer(replace(SMALL, num_experts=8))
    grow(small, large, UPCYCLING, generator=torch.Generator().manual_seed(0))
    before, after = small.state_dict(), large.state_dict()
    for name, value in after.items():
        if name in biases:
            assert torch.equal(value[:4], before[name])
            noise = value[4:] - before[name]
            assert 0 < float(noise.abs().max()) <= DELTA == 1e-3
        else:
            copied = value.shape != before[name].shape
            assert torch.equal(value, torch.cat((before[name], before[name])) if copied else before[name]), name


def test_with_one_active_expert_a_copied_pool_is_the_same_function():
    small = Transformer(SMALL)
    large = Transformer(replace(SMALL, num_experts=8))
    grow(small, large, UPCYCLING, generator=torch.Generator().manual_seed(0))
    assert torch.equal(large(TOKENS).logits_BSV, small(TOKENS).logits_BSV)


def test_one_expert_with_a_renormalised_gate_is_a_dense_model():
    """What the sparse-upcycling arm starts from, and that it stays the same function when its expert is copied."""
    one = Transformer(replace(SMALL, num_experts=1))
    dense = Transformer(replace(SMALL, num_experts=0, top_k=0, selection_bias=False))
    state = one.state_dict()
    for name, tensor in dense.state_dict().items():
        source = {"w_up_DF": "w_up_EDF", "w_down_FD": "w_down_EFD"}.get(name.rpartition(".")[2])
        tensor.copy_(state[f"{name.rpartition('.')[0]}.{source}"][0] if source else state[name])
    torch.testing.assert_close(one(TOKENS).logits_BSV, dense(TOKENS).logits_BSV)
    many = Transformer(replace(SMALL, num_experts=8, top_k=2))
    grow(one, many, replace(UPCYCLING, router="random"), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(many(TOKENS).logits_BSV, one(TOKENS).logits_BSV)


@pytest.mark.parametrize("scale", SETTINGS)
def test_each_stage_anneals_and_all_arms_of_a_transition_have_its_rates(scale):
    setting = SETTINGS[scale]
    for arm in upcycling.design(scale).arms:
        place, drops = 0, []
        for segment in arm.segments:
            train = segment.train
            assert train.first_step == place, arm.id
            place += train.steps
            if train.schedule == "wsd":
                drops.append(place)
        grows = [segment for segment in arm.segments if segment.growth]
        if arm.id.startswith("c-"):
            assert drops == [place], arm.id
            assert place == setting.contest_steps
        elif not arm.id.endswith(("before", "start")):
            assert drops[0] in {setting.part(share) for share in (*upcycling.TRANSITIONS.values(), 0.5)}, arm.id
            assert len(drops) == 2, arm.id
            assert len(grows) == (0 if "fixed" in arm.id else 1), arm.id
        assert all(segment.inherit == "weights" for segment in grows if not arm.id.startswith("c-")), arm.id
        assert all(segment.train.balance == 0 and segment.model.selection_bias for segment in arm.segments)


def test_no_text_is_seen_twice():
    """The plan of a corpus that is too small for its arms is refused (`epochs`), so PT and CPT are disjoint."""
    for scale in SETTINGS:
        assert all(segment.train.epochs == 1 for arm in upcycling.design(scale).arms for segment in arm.segments)
    assert make_plan("expert-upcycling", scale="small", seeds=1)["corpora"].keys() == {"stdlib"}
    assert make_plan("expert-upcycling", scale="base", seeds=1, dry=True)["corpora"].keys() == {"data:pretraining"}


def test_the_transition_alone_changes_no_weight_and_takes_no_step():
    arms = {arm.id: arm for arm in upcycling.design("nano").arms}
    assert arms["start"].segments[:-1] == arms["before"].segments == arms["up"].segments[:6]
    train = arms["start"].segments[-1].train
    assert (train.steps, train.lr, train.bias_rate) == (1, 0.0, 0.0)
    model = grown()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = make_optimizer(model, replace(train, lr=1.0))
    for group in optimizer.param_groups:
        group["lr"] = train.lr
    training_step(model, optimizer, train, TOKENS, TOKENS, upcycling.mechanism({}), 0, 0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_prefixes_are_shared_as_far_as_they_go():
    plan = make_plan("expert-upcycling", scale="nano", seeds=1, claims="all")
    by_arm = {job.arm: [segment.digest for segment in job.segments] for job in jobs(plan)}
    whole = by_arm["fixed-e"]
    assert by_arm["up"][:6] == by_arm["random"][:6] == by_arm["fixed-e"][:6] == by_arm["before"]
    assert by_arm["up-25"][:-1] == by_arm["up"][:8]
    assert by_arm["last"][:-1] == whole
    assert by_arm["at25"][:2] == whole[:2]
    assert by_arm["pool2-up"][-1] != by_arm["up"][-1]  # cut elsewhere
    copy, random = (by_arm[f"c-{name}-sigmoid-alone-25-kept-biaszeroed"] for name in ("copy", "random"))
    assert copy[:2] == random[:2] == by_arm["c-fixed-e-sigmoid-alone"][:2]
    assert copy[0] == by_arm["c-copy-sigmoid-alone-50-reset-biascarried"][0]


def test_the_contest_has_every_condition_once_and_each_differs_in_what_its_name_says():
    assert len(contest.CONDITIONS) == 32
    arms = {arm.id: arm for arm in contest.arms(SETTINGS["nano"])}
    assert len(arms) == 2 * 32 + 2 * 4
    for condition in contest.CONDITIONS:
        for name in ("copy", "random"):
            *before, last = arms[f"c-{name}-{condition}"].segments
            assert last.growth.experts == last.growth.router == name
            assert last.growth.reset_bias is condition.endswith("biaszeroed")
            assert last.inherit == ("all" if "-kept-" in condition else "weights")
            assert last.model.score == condition.split("-")[0] == before[0].model.score
            assert bool(last.model.d_shared) is ("-shared-" in condition)
            assert sum(segment.train.steps for segment in before) == (300 if "-50-" in condition else 450)
    (figure,) = contest.figures()
    assert figure.arms == set(arms)


def test_the_contest_and_the_sweeps_run_where_they_are_named():
    def arms(claims: str | None) -> set[str]:
        return {arm["id"] for arm in make_plan("expert-upcycling", scale="nano", seeds=1, claims=claims)["arms"]}

    everything = {arm.id for arm in upcycling.design("nano").arms}
    assert arms("all") == everything
    assert arms("contest") == {name for name in everything if name.startswith("c-")}
    assert not any(name.startswith(("c-", "pool", "at")) for name in arms(None))
    assert {"sparse", "weight-grad-25", "fixed-e-200"} <= arms(None)
    sweeps = {name for name in everything if name.startswith(("at", "pool"))}
    assert sweeps <= arms("sweeps")
    own = ",".join(claim.id for claim in load_claims("expert-upcycling").claim if "nano" not in claim.only_named)
    # with all of the scale's own claims come the arms that no claim speaks of
    assert arms(f"{own},sweeps") == arms(None) | sweeps
    assert "sparse" not in arms("U1,sweeps")


@pytest.mark.parametrize("scale", SETTINGS)
def test_every_claim_and_figure_finds_its_arms_in_the_design(scale):
    design = upcycling.design(scale)
    arms = {arm.id for arm in design.arms}
    assert len(arms) == len(design.arms)
    for claim in load_claims("expert-upcycling").claim:
        assert claim.arms <= arms, claim.id
    for figure in design.figures:
        assert figure.arms <= arms, figure.title


def test_twins_and_strangers():
    lineage_E = torch.tensor([0, 1, 2, 0, 1, 1])
    pair_EE = torch.zeros(6, 6)
    for a, b, value in ((0, 3, 0.9), (1, 4, 0.6), (1, 5, 0.3), (4, 5, 0.6), (0, 1, 0.5), (2, 3, 0.1)):
        pair_EE[a, b] = pair_EE[b, a] = value
    mean, median = twins.likeness(pair_EE, lineage_E)
    assert mean == pytest.approx((0.9 + 0.6 + 0.3 + 0.6) / 4)
    assert median == 0.0


def test_overlap_counts_the_tokens_that_two_experts_share():
    model = grown()
    routing = model(TOKENS).routers[0].routing
    together_EE = twins.chosen_together(routing)
    assert together_EE.diagonal().tolist() == routing.load_E.tolist()
    slots = routing.expert_N.view(-1, 2).tolist()
    overlap_EE = twins.overlap(together_EE)
    for a, b in ((0, 4), (1, 2)):
        both = sum({a, b} == set(pair) for pair in slots)
        either = sum(bool({a, b} & set(pair)) for pair in slots)
        assert together_EE[a, b] == both
        assert float(overlap_EE[a, b]) == pytest.approx(both / max(1, either))


@pytest.mark.parametrize("growth", [UPCYCLING, UTILITY])
def test_fresh_twins_are_alike_and_averaging_them_changes_nothing(growth):
    small, large = Transformer(replace(SMALL, top_k=2)), Transformer(replace(SMALL, num_experts=8, top_k=2))
    scores = {f"blocks.{layer}.ffn": torch.arange(4.0) for layer in range(2)}
    large.lineages = grow(small, large, growth, scores=scores, generator=torch.Generator().manual_seed(0))
    found = twins.diagnose(large, TOKENS, TOKENS.roll(1, 1))
    assert found["twins/cosine"] == pytest.approx(1)
    assert found["strangers/cosine"] < 0.5
    torch.testing.assert_close(twins.averaged(large)(TOKENS).logits_BSV, large(TOKENS).logits_BSV)
    with torch.no_grad():
        large.blocks[0].ffn.w_up_EDF.add_(torch.rand(large.blocks[0].ffn.w_up_EDF.shape))
    changed = twins.diagnose(large, TOKENS, TOKENS.roll(1, 1))
    assert changed["twins/cosine"] < 1 - 1e-3
    origin_E = large.lineages["blocks.0.ffn"]
    mean_EDF = twins.averaged(large).blocks[0].ffn.w_up_EDF
    group = (origin_E == 3).nonzero().squeeze(1)
    assert len(group) == (2 if growth is UPCYCLING else 4)
    torch.testing.assert_close(mean_EDF[group[-1]], large.blocks[0].ffn.w_up_EDF[group].mean(0))


def test_tied_twins_stay_equal_bit_for_bit_and_others_do_not():
    """With one active expert the twin of the higher bias takes all tokens; with two, both take the same ones, and stay equal."""
    train = TrainConfig(steps=5, batch=4, context=16, lr=1e-2)
    for tied in (True, False):
        model = grown(top_k=1)
        optimizer = make_optimizer(model, train)
        for step in range(3):
            training_step(model, optimizer, train, TOKENS, TOKENS, upcycling.mechanism({"tied": tied}), step, 0)
        w_EDF = model.blocks[0].ffn.w_up_EDF
        assert torch.equal(w_EDF[:4], w_EDF[4:]) is tied


def test_probes_speak_of_twins_only_where_there_are_some():
    watch = upcycling.mechanism({})
    model = grown(growth=RANDOM)
    assert watch.probe(model, model(TOKENS)) == {}
    model = Transformer(replace(SMALL, num_experts=8, top_k=2))  # copies of one expert: no pair of strangers
    model.lineages = grow(Transformer(replace(SMALL, num_experts=1)), model, replace(UPCYCLING, router="random"))
    assert watch.probe(model, model(TOKENS)) == {}
    model = grown()
    output = model(TOKENS)
    output.logits_BSV.sum().backward()
    found = watch.probe(model, output)
    parts = {f"{who}/{what}" for who in ("twins", "strangers") for what in ("cosine", "gradient", "overlap")}
    assert found.keys() == parts
    assert found["twins/cosine"] == pytest.approx(1)


def test_bad_settings_are_said_clearly():
    setting = SETTINGS["nano"]
    with pytest.raises(UsageError, match="more than 16 experts after the transition, found 16"):
        replace(setting, few=16)
    with pytest.raises(UsageError, match="top-k of at most the experts before the transition, found 32 of 16"):
        replace(setting, ks=(1, 32))
    with pytest.raises(UsageError, match="top_k of at most num_experts=4, found 8"):
        setting.models(Family(few=4, many=8, top_k=8))
    with pytest.raises(UsageError, match="expert-upcycling at scale 'huge' is not set up"):
        upcycling.design("huge")
    train = TrainConfig(steps=1, batch=1, context=16, lr=1e-3)
    large, small = (
        Segment(model=replace(SMALL, num_experts=count), train=train, corpus="synthetic") for count in (8, 4)
    )
    with pytest.raises(ValueError, match="arm x: a pool of 8 experts cannot shrink to 4"):
        Arm(id="x", label="x", segments=(large, replace(small, inherit="weights", growth=UPCYCLING)))
