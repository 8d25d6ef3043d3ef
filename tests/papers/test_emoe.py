"""EMoE's mechanism: the sampling's distribution, the router loss's gradient, and the control, bit for bit."""

import math
from collections import Counter

import pytest
import torch

import papers.emoe as emoe
from records.errors import UsageError
from repro.experiment import load_claims
from repro.moe import MoE, RouterOutput, TopK
from repro.workflow.plan import make_plan


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scores(tokens: int, experts: int) -> torch.Tensor:
    return torch.randn(tokens, experts, generator=generator()).softmax(1)


@pytest.mark.parametrize("renormalize", [True, False])
def test_with_k_ideal_at_k_train_the_routing_is_top_k_bit_for_bit(renormalize):
    scores_TE = scores(500, 16)
    rule = emoe.CoActivation(k_train=3, k_ideal=3, renormalize=renormalize, generator=generator())
    for found, expected in zip(rule(scores_TE), TopK(3, renormalize)(scores_TE, None), strict=True):
        assert torch.equal(found, expected)


def test_samples_lie_in_the_pool_without_repetition_in_falling_order():
    scores_TE = scores(2_000, 16)
    expert_TK, weight_TK = emoe.CoActivation(k_train=3, k_ideal=8, renormalize=True, generator=generator())(scores_TE)
    rank_TE = scores_TE.argsort(1, descending=True).argsort(1)
    rank_TK = rank_TE.gather(1, expert_TK)
    assert int(rank_TK.max()) == 7
    assert (rank_TK.diff(dim=1) > 0).all()
    assert torch.allclose(weight_TK.sum(1), torch.ones(2_000))


def test_the_distribution_over_pairs_is_the_papers():
    """k̃ uniform in 2…4, then a pair of the pool: P(ranks 0,1) = (1 + 1/3 + 1/6)/3, P(2,3) = (1/6)/3, and so on."""
    n = 60_000
    scores_TE = torch.tensor([[0.4, 0.3, 0.2, 0.05, 0.05]]).expand(n, 5)
    expert_TK, _ = emoe.CoActivation(k_train=2, k_ideal=4, renormalize=True, generator=generator())(scores_TE)
    counts = Counter(tuple(pair) for pair in expert_TK.tolist())
    expected = {(0, 1): 1.5 / 3, (0, 2): 0.5 / 3, (1, 2): 0.5 / 3, (0, 3): 1 / 18, (1, 3): 1 / 18, (2, 3): 1 / 18}
    assert set(counts) == set(expected)
    for pair, probability in expected.items():
        assert counts[pair] / n == pytest.approx(probability, abs=5 * math.sqrt(probability / n))


def test_a_pair_of_a_pool_of_eight_meets_with_probability_one_in_28():
    """The example of the paper's summary: N = 32, k_train = 2, k_ideal = 8, with the pool at its largest."""
    assert 1 / math.comb(8, 2) == pytest.approx(1 / 28)
    n = 50_000
    scores_TE = torch.arange(32, 0, -1.0).softmax(0).expand(n, 32)
    expert_TK, _ = emoe.CoActivation(k_train=2, k_ideal=8, renormalize=False, generator=generator())(scores_TE)
    # ranks 6 and 7 meet only in the pool of 8, drawn with probability 1/7
    share = float((expert_TK == torch.tensor([6, 7])).all(1).double().mean())
    assert share == pytest.approx(1 / 7 / 28, abs=5 * math.sqrt(1 / 7 / 28 / n))


def test_the_selection_bias_sways_the_pool_and_not_the_weights():
    scores_TE = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    bias_E = torch.tensor([0.0, 0.0, 0.0, 1.0])
    rule = emoe.CoActivation(k_train=1, k_ideal=1, renormalize=False, generator=generator())
    expert_TK, weight_TK = rule(scores_TE, bias_E)
    assert (expert_TK.item(), weight_TK.item()) == (3, pytest.approx(0.05))


def test_the_router_loss_is_minus_kl_from_uniform_and_its_gradient_is_the_formula():
    logits_TE = torch.randn(7, 6, dtype=torch.float64, generator=generator(), requires_grad=True)
    q_TE = logits_TE.softmax(1)
    moe = MoE(d_model=4, d_expert=4, num_experts=6, top_k=2)
    routing = moe.route(torch.randn(7, 4)).routing
    loss = emoe.hierarchical_router_loss(RouterOutput(logits_TE, q_TE, routing))
    kl = (q_TE * (q_TE * 6).log()).sum(1).mean()
    assert loss.item() == pytest.approx(-kl.item(), abs=1e-6)
    # dL/dq_i = −(log q_i + 1) up to a constant, pulled back through the softmax
    g_TE = -(q_TE.log() + 1).detach() / 7
    expected = q_TE * (g_TE - (q_TE * g_TE).sum(1, keepdim=True))
    (found,) = torch.autograd.grad(loss, logits_TE)
    assert torch.allclose(found, expected.detach(), atol=1e-7)


def test_the_router_loss_at_its_extremes():
    moe = MoE(d_model=4, d_expert=4, num_experts=6, top_k=2)
    routing = moe.route(torch.randn(3, 4)).routing
    uniform, certain = torch.zeros(3, 6), torch.tensor([[50.0, 0, 0, 0, 0, 0]] * 3)
    assert emoe.hierarchical_router_loss(RouterOutput(uniform, uniform.softmax(1), routing)).item() == pytest.approx(
        0, abs=1e-6
    )
    loss = emoe.hierarchical_router_loss(RouterOutput(certain, certain.softmax(1), routing))
    assert loss.item() == pytest.approx(-math.log(6), abs=1e-6)


def test_draws_differ_by_step_and_seed_and_repeat():
    mechanism = emoe.ElasticTraining(k_train=2, k_ideal=8, renormalize=True, lambda_hr=0.0)
    scores_TE = scores(100, 16)
    first = mechanism.rule(3, 0)(scores_TE, None)[0]
    assert torch.equal(first, mechanism.rule(3, 0)(scores_TE, None)[0])
    assert not torch.equal(first, mechanism.rule(4, 0)(scores_TE, None)[0])
    assert not torch.equal(first, mechanism.rule(3, 1)(scores_TE, None)[0])
    rule = mechanism.rule(3, 0)
    assert not torch.equal(rule(scores_TE, None)[0], rule(scores_TE, None)[0])  # the second layer draws anew


def test_an_impossible_pool_is_refused():
    with pytest.raises(UsageError, match="expected 1 ≤ k_train ≤ k_ideal, found 4, 2"):
        emoe.ElasticTraining(k_train=4, k_ideal=2, renormalize=True, lambda_hr=0.0)
    with pytest.raises(UsageError, match="emoe at scale 'paper' is not set up yet"):
        emoe.design("paper")


@pytest.mark.parametrize("scale", emoe.SETTINGS)
def test_every_claim_finds_its_arms_and_metrics_in_the_design(scale):
    design = emoe.design(scale)
    setting = emoe.SETTINGS[scale]
    arms = {arm.id for arm in design.arms} | {group.id for group in design.groups}
    metrics = {f"loss/k={k}" for k in setting.ks} | {"tuning/loss"}
    for claim in load_claims("emoe").claim:
        assert claim.arms <= arms, claim.id
        for test in (*claim.passes, *claim.fails, *claim.controls):
            for quantity in (test.left, test.right):
                assert {quantity.metric or quantity.least_of[0], *quantity.least_of} <= metrics


def test_all_arms_of_nano_see_the_same_tokens_and_cost_the_same():
    plan = make_plan("emoe", scale="nano")
    trainings = [arm["segments"][0]["train"] | {"lr": None} for arm in plan["arms"]]
    assert all(training == trainings[0] for training in trainings)
    models = [arm["segments"][0]["model"] | {"renormalize": None} for arm in plan["arms"]]
    assert all(model == models[0] for model in models)
    assert emoe.SETTINGS["nano"].ks == (1, 2, 3, 4, 6, 8)
