"""EMoE's mechanism: the sampling's distribution, the router loss's gradient, and the control, bit for bit."""

import itertools
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy import stats

import papers.emoe as emoe
from papers.emoe.inference import Anchored, ScaledTail, calibration, leave_one_out, oracle_losses, rank_correlation
from records import canonical
from records.errors import UsageError
from repro.accounting import accounting
from repro.config import encode
from repro.data.corpus import load
from repro.evals.held_out import held_out_loss
from repro.experiment import load_claims, select_claims
from repro.model import ModelConfig, Transformer
from repro.moe import MoE, RouterOutput, TopK
from repro.pretrained import NOT_AT_HAND, Pretrained
from repro.workflow.estimate import estimate
from repro.workflow.plan import make_plan


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tiny tensors: threads that wait for one another would take twenty times as long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def pool_sizes(draw: str, step: int = 0, tokens: int = 300) -> torch.Tensor:
    """The largest rank that tokens of one step use in two layers, +1: at most the size of the pool that was drawn."""
    data = {"k_train": 2, "k_ideal": 8, "renormalize": True, "lambda_hr": "0.0", "draw": draw}
    rule = emoe.mechanism(data).rule(step, 0)
    scores_TE = torch.arange(16, 0, -1.0).softmax(0).expand(tokens, 16)
    return torch.stack([rule(scores_TE, None)[0].max(1).values + 1 for _ in range(2)])


def test_the_pool_is_drawn_a_token_a_layer_a_step_or_never():
    steps = {draw: [pool_sizes(draw, step).max(1).values.tolist() for step in range(30)] for draw in ("layer", "step")}
    assert {size for layers in steps["step"] for size in layers} == set(range(2, 9))
    assert all(first == second for first, second in steps["step"])
    assert {size for layers in steps["layer"] for size in layers} <= set(range(2, 9))
    assert any(first != second for first, second in steps["layer"])
    assert pool_sizes("never").max(1).values.tolist() == [8, 8]
    # with the largest pool both of a pair lie among the first two ranks once in 28
    assert float((pool_sizes("never", tokens=40_000) == 2).double().mean()) == pytest.approx(1 / 28, abs=0.003)
    assert torch.equal(pool_sizes("token"), pool_sizes("token"))


def test_random_k_takes_every_k_up_to_the_largest_and_repeats():
    mechanism = emoe.mechanism({"k_most": 8, "renormalize": True})
    ks = [mechanism.rule(step, 0).k for step in range(80)]
    assert set(ks) == set(range(1, 9))
    assert ks == [mechanism.rule(step, 0).k for step in range(80)]
    assert ks != [mechanism.rule(step, 1).k for step in range(80)]


def test_scaling_the_extra_ranks_by_one_is_top_k_and_by_nothing_is_the_training_k():
    scores_TE = scores(200, 16)
    for renormalize in (True, False):
        plain = TopK(4, renormalize)(scores_TE)
        same = ScaledTail(k=4, k_train=2, alpha=1.0, renormalize=renormalize)(scores_TE, None)
        assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))
        expert_TK, weight_TK = ScaledTail(k=4, k_train=2, alpha=0.0, renormalize=renormalize)(scores_TE, None)
        two = TopK(2, renormalize)(scores_TE)
        assert torch.equal(expert_TK[:, :2], two[0])
        assert torch.allclose(weight_TK, torch.cat([two[1], torch.zeros_like(two[1])], dim=1))
    quarter = ScaledTail(k=2, k_train=1, alpha=0.25, renormalize=True)(torch.tensor([[0.6, 0.3, 0.1]]), None)[1]
    assert quarter.tolist() == [pytest.approx([0.6 / 0.675, 0.075 / 0.675])]


def test_an_anchored_denominator_leaves_the_weights_of_the_training_k_alone():
    scores_TE = scores(200, 16)
    expert_TK, weight_TK = Anchored(k=4, k_train=2, renormalize=True)(scores_TE, None)
    two = TopK(2)(scores_TE)
    assert torch.equal(weight_TK[:, :2], two[1])
    assert (weight_TK[:, 2:] > 0).all()
    score_TK = scores_TE.gather(1, expert_TK)
    assert torch.allclose(weight_TK / weight_TK[:, :1], score_TK / score_TK[:, :1])
    assert torch.equal(Anchored(k=4, k_train=2, renormalize=False)(scores_TE, None)[1], TopK(4, False)(scores_TE)[1])


TINY = ModelConfig(
    vocab_size=16, d_model=16, d_expert=8, num_layers=2, num_heads=2, num_experts=6, top_k=2, context=8
)  # fmt: skip


def tiny() -> tuple[Transformer, torch.Tensor, torch.Tensor]:
    model = Transformer(TINY)
    for block in model.blocks:  # experts that matter
        torch.nn.init.normal_(block.ffn.w_down_EFD, generator=generator())
    tokens_WS = torch.randint(0, 16, (3, 9), generator=generator())
    return model, tokens_WS[:, :-1].contiguous(), tokens_WS[:, 1:].contiguous()


def test_utility_is_the_rise_of_the_loss_without_the_expert():
    """In the last layer nothing else changes: the same as masking that expert by hand for the token alone."""
    model, tokens_WS, targets_WS = tiny()
    score_NLK, utility_NLK = leave_one_out(model, tokens_WS, targets_WS, k=3, stride=4)
    assert score_NLK.shape == utility_NLK.shape == (6, 2, 3)
    assert (score_NLK.diff(dim=2) < 0).all()
    layers = itertools.count()

    def without(scores_TE, bias_E):
        expert_TK, weight_TK = TopK(3, renormalize=False)(scores_TE, bias_E)
        if next(layers) == 1:
            weight_TK = weight_TK.clone()
            weight_TK[4, 1] = 0.0  # the fifth token of the first window, its second expert
        return expert_TK, weight_TK / weight_TK.sum(1, keepdim=True)

    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(
                model(tokens_WS, rule=rule).logits_BSV.flatten(0, 1), targets_WS.flatten(), reduction="none"
            )
            for rule in (without, TopK(3))
        ]
    # changed are the places (0, 0), (0, 4), (1, 3), (1, 7), …: window and position sum to a multiple of 4
    assert utility_NLK[1, 1, 1].item() == pytest.approx(float(losses[0][4] - losses[1][4]), abs=1e-5)
    assert abs(utility_NLK[1, 1, 1].item()) > 1e-4


def test_calibration_is_one_where_scores_foretell_utilities_and_nothing_where_shuffled():
    score_NLK = torch.rand(4_000, 2, 4, generator=generator()).sort(dim=2, descending=True).values
    metrics = dict(calibration(score_NLK, score_NLK.exp() - 1.5))
    assert metrics["calibration/token"] == pytest.approx(1.0)
    assert metrics["calibration/pooled"] == pytest.approx(1.0)
    assert abs(metrics["calibration/shuffled"]) < 0.03
    assert dict(calibration(score_NLK, -score_NLK))["calibration/token"] == pytest.approx(-1.0)
    assert metrics["utility/harmful"] == pytest.approx(math.log(1.5), abs=0.02)


def test_rank_correlation_is_spearmans_with_ties():
    a, b = torch.tensor([[1.0, 2.0, 2.0, 4.0], [1.0, 1.0, 1.0, 1.0]]), torch.tensor([[4.0, 1.0, 3.0, 2.0]] * 2)
    found = rank_correlation(a, b)
    assert found[0].item() == pytest.approx(stats.spearmanr(a[0], b[0]).statistic)
    assert found[1].item() == 0.0


def test_hindsight_finds_the_best_expert_of_a_single_layer():
    """With one layer and k = 1 greedy choice is the best choice: the least over experts, token by token."""
    model, tokens_WS, targets_WS = tiny()
    model.blocks = model.blocks[:1]
    model.config = replace(TINY, num_layers=1)
    found = oracle_losses(model, tokens_WS, targets_WS, k=1, pool=6)
    with torch.no_grad():
        each = torch.stack(
            [
                torch.nn.functional.cross_entropy(
                    model(
                        tokens_WS, rule=lambda s, b, e=e: (torch.full((len(s), 1), e), torch.ones(len(s), 1))
                    ).logits_BSV.flatten(0, 1),
                    targets_WS.flatten(),
                    reduction="none",
                )
                for e in range(6)
            ]
        )
    assert found == pytest.approx(float(each.min(0).values.mean()), abs=1e-5)
    assert oracle_losses(model, tokens_WS, targets_WS, k=3, pool=3) == pytest.approx(
        held_out_loss(model, tokens_WS, targets_WS, TopK(3)), abs=1e-5
    )


@pytest.mark.parametrize("scale", emoe.SETTINGS)
def test_every_claim_finds_its_arms_and_metrics_in_the_design(scale):
    design = emoe.design(scale)
    by_id = {arm.id: (arm,) for arm in design.arms}
    by_id |= {group.id: tuple(by_id[name][0] for name in group.among) for group in design.groups}
    for claim in load_claims("emoe").claim:
        if scale in claim.only_named and not claim.arms & by_id.keys():
            continue  # a scale that only post-trains has no arms from scratch
        for test in (*claim.passes, *claim.fails, *claim.controls):
            for quantity in filter(None, (test.left, test.right, test.base)):
                for part in filter(None, (quantity, quantity.minus)):
                    for arm in by_id[part.arm]:
                        assert {part.metric or part.least_of[0], *part.least_of} <= measured(arm), (claim.id, part)


def measured(arm) -> set[str]:
    ks = arm.measure["ks"]
    found = {"tuning/loss"} | {f"{what}/{k}" for what in ("loss", "flops") for k in ks}
    if "alphas" in arm.measure:
        found |= {"scaled/alpha"} | {f"{rule}/{k}" for rule in ("scaled", "anchored") for k in ks if ks[k] > ks["1k"]}
    if "calibrated" in arm.measure:
        found |= {"calibration/token", "calibration/shuffled", "oracle/1k", "oracle/2k"}
    return found


def test_what_is_measured_has_the_names_that_claims_rely_on():
    for kind in ("post-topk", "control"):
        arm = next(arm for arm in emoe.design("smoke").arms if arm.id.startswith(kind))
        model = Transformer(arm.segments[-1].model)
        held_out = load("synthetic:1").held_out
        found = dict(emoe.measure(model, encode(arm.measure), held_out))
        again = dict(emoe.measure(model, canonical.loads(canonical.dumps(encode(arm.measure))), held_out))
        assert list(again.items()) == list(found.items())  # also from the plan's file, whose keys are sorted
        assert measured(arm) <= found.keys()
        if "scaled/2k" in found:
            assert 0.0 < found["scaled/alpha"] <= 0.5
            assert found["oracle/1k"] < found["loss/1k"]
        assert found["flops/4k"] > found["flops/1k"]


@pytest.mark.parametrize("scale", ["base", "paper"])
def test_a_public_checkpoint_is_what_base_and_paper_train_further(scale):
    design = emoe.design(scale)
    assert all(arm.id.startswith("post-") and len(arm.segments) == 1 for arm in design.arms)
    assert {arm.segments[0].checkpoint for arm in design.arms} == {NOT_AT_HAND}
    total = accounting(design.arms[0].segments[0].model).total
    assert total == pytest.approx(6.92e9, rel=0.002)  # OLMoE-1B-7B: 6.9B parameters
    assert emoe.SETTINGS[scale].ks == {"0.5k": 4, "1k": 8, "1.5k": 12, "2k": 16, "3k": 24, "4k": 32}
    default = select_claims(load_claims("emoe"), None, scale)
    assert {claim.suite for claim in default} == {"post"}


def test_base_can_be_planned_for_its_cost_without_checkpoint_and_text(tmp_path, monkeypatch):
    monkeypatch.setenv("REPRO_DATA", str(tmp_path))
    load.cache_clear()
    plan = make_plan("emoe", scale="base", dry=True)
    assert set(plan["corpora"].values()) == {NOT_AT_HAND}
    assert estimate(plan, workers=1).flops > 1e18
    with pytest.raises(UsageError, match="say where it lies with --checkpoint DIR"):
        make_plan("emoe", scale="base")


def test_with_a_checkpoint_any_scale_trains_its_model_further():
    model = replace(emoe.SETTINGS["smoke"].model, num_experts=6, top_k=2, context=4_096, qk_norm="head")
    found = Pretrained(folder=Path(), digest="ab" * 32, files=(), architecture="", model=model)
    arms = emoe.design("smoke", checkpoint=found).arms
    segments = [segment for arm in arms for segment in arm.segments]
    assert len(segments) == len(arms)
    assert {segment.checkpoint for segment in segments} == {found.digest}
    assert {replace(segment.model, top_k=2) for segment in segments} == {replace(model, context=32)}
    assert {segment.mechanism.get("k_ideal", 2) for segment in segments} == {2, 6}


def test_arms_of_nano_see_the_same_tokens_and_cost_the_same():
    arms = {arm.id: arm for arm in emoe.design("nano").arms}
    scratch = [arm for name, arm in arms.items() if not name.startswith(("post-", "direct"))]
    post = [arm for name, arm in arms.items() if name.startswith("post-") and "direct" not in name]
    for some in (scratch, post):
        trainings = [replace(arm.segments[-1].train, lr=1.0) for arm in some]
        assert all(training == trainings[0] for training in trainings)
        models = [replace(arm.segments[-1].model, renormalize=True) for arm in some]
        assert all(model == models[0] for model in models)
    pretrained = arms["topk-lr0.006"].segments
    assert all(arm.segments[:-1] == pretrained for name, arm in arms.items() if name.startswith("post-"))
    assert all(arm.segments[-1].inherit == "weights" for arm in post)
    assert emoe.SETTINGS["nano"].ks == {"0.5k": 1, "1k": 2, "1.5k": 3, "2k": 4, "3k": 6, "4k": 8}


@pytest.mark.parametrize("kind", ["", "post-"])
def test_training_with_twice_the_experts_costs_no_more_flops_and_not_much_less(kind):
    arms = {arm.id: arm.segments[-1] for arm in emoe.design("nano").arms}

    def cost(name):
        segment = next(segment for arm, segment in arms.items() if arm.startswith(name))
        return segment.train.steps * accounting(segment.model).flops_training, segment.model.top_k

    (wanted, k), (spent, double) = cost(f"{kind}topk"), cost(f"{kind}direct")
    assert double == 2 * k
    assert 0.97 * wanted < spent <= wanted


def test_the_default_run_leaves_post_training_to_the_suite_that_names_it():
    plain, post = make_plan("emoe", scale="nano"), make_plan("emoe", scale="nano", claims="post")
    assert not any(arm["id"].startswith("post-") for arm in plain["arms"])
    assert all(arm["id"].startswith("post-") for arm in post["arms"])
    assert {"A1", "A4", "A7", "A9", "A1-raw"} <= {claim["id"] for claim in plain["claims"]}
    assert {"A5", "A6", "A8", "A4-post"} <= {claim["id"] for claim in post["claims"]}
    for plan in (plain, post):
        assert len(plan["figures"]) == 3
        # 42 arms of 28 s on one of two cores are ten minutes
        assert estimate(plan, workers=2).seconds < 600
