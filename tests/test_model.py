"""The transformer: causality, routing hooks, weights from named streams, and what it counts against what is there."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from records.errors import UsageError
from repro.accounting import accounting
from repro.model import KeyValueCache, ModelConfig, Transformer, rotate, rotations
from repro.moe import MoE, RouterOutput, RoutingError, TopK

SMALL = ModelConfig(
    vocab_size=64, d_model=32, num_layers=2, num_heads=4, context=16, d_expert=16, num_experts=8, top_k=2, d_shared=8
)
DENSE = dataclasses.replace(SMALL, num_experts=0, top_k=0, d_shared=0)
MIXED = dataclasses.replace(SMALL, num_layers=3, dense_layers=1, d_dense=48, score="sigmoid", selection_bias=True)
TIED = dataclasses.replace(SMALL, tie_embeddings=True, d_shared=0)
GROUPED = dataclasses.replace(
    SMALL, num_layers=3, num_kv_heads=2, d_head=6, qk_norm="head", norm_eps=1e-6, dense_blocks=(1,), d_dense=24
)
WIDE_NORM = dataclasses.replace(SMALL, qk_norm="width", num_kv_heads=1)
ALL = [SMALL, DENSE, MIXED, TIED, GROUPED, WIDE_NORM]


def tokens(config: ModelConfig, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (batch, config.context))


@pytest.mark.parametrize("config", ALL)
def test_logits_and_one_router_for_each_moe_layer(config: ModelConfig) -> None:
    output = Transformer(config)(tokens(config))
    assert output.logits_BSV.shape == (2, config.context, config.vocab_size)
    assert len(output.routers) == config.moe_layers
    output.logits_BSV.sum().backward()


@pytest.mark.parametrize("config", [SMALL, DENSE])
def test_no_token_sees_the_future(config: ModelConfig) -> None:
    model = Transformer(config)
    before = tokens(config)
    after = before.clone()
    after[:, 9:] = (after[:, 9:] + 1) % config.vocab_size
    a, b = model(before).logits_BSV, model(after).logits_BSV
    torch.testing.assert_close(a[:, :9], b[:, :9])
    assert not torch.allclose(a[:, 9], b[:, 9])


@torch.no_grad()
@pytest.mark.parametrize("config", [MIXED, GROUPED, WIDE_NORM])
def test_a_cache_gives_what_the_whole_sequence_gives(config: ModelConfig) -> None:
    """Prompts of three lengths, right-padded, then token by token, with one row dropped on the way."""
    model, batch = Transformer(config), tokens(config, 3)
    expected = model(batch).logits_BSV
    lengths = torch.tensor([2, 7, 5])
    cache = KeyValueCache(config, 3, config.context, batch.device, torch.float32)
    prompt = batch[:, :7].masked_fill(torch.arange(7) >= lengths[:, None], 63)
    found = model(prompt, cache=cache).logits_BSV
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(found[row, :length], expected[row, :length])
    cache.length_B = lengths.clone()
    rows = torch.arange(3)
    for step in range(6):
        at = lengths[rows] + step
        found = model(batch[rows, at][:, None], cache=cache).logits_BSV
        torch.testing.assert_close(found[:, 0], expected[rows, at])
        if step == 2:
            rows = torch.tensor([0, 2])
            cache.keep(rows)
    with pytest.raises(UsageError, match="at most 16 tokens a sequence, found 19"):
        model(batch[rows, :8], cache=cache)


def test_a_rule_is_called_once_a_layer_in_order() -> None:
    calls = []

    def rule(scores_TE: torch.Tensor, bias_E: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append((tuple(scores_TE.shape), bias_E is not None))
        return TopK(len(calls))(scores_TE, bias_E)

    output = Transformer(MIXED)(tokens(MIXED), rule)
    assert calls == [((32, 8), True)] * 2
    assert [router.routing.token_N.numel() for router in output.routers] == [32, 64]


def test_the_default_rule_is_the_configs_top_k() -> None:
    model, batch = Transformer(SMALL), tokens(SMALL)
    assert torch.equal(model(batch).logits_BSV, model(batch, TopK(2, renormalize=True)).logits_BSV)


def test_rotation_keeps_lengths_and_depends_on_the_distance_alone() -> None:
    turn_SC = rotations(16, 8, 10_000.0)
    q, k = torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    turned_q, turned_k = (rotate(z.expand(1, 16, 8), turn_SC)[0] for z in (q, k))
    torch.testing.assert_close(turned_q.norm(dim=1), q.norm().expand(16))
    scores = turned_q @ turned_k.t()
    for distance in range(-3, 4):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(turned_q[0], q[0, 0])


@pytest.mark.parametrize("config", [SMALL, MIXED, GROUPED])
def test_gradcheck_of_the_whole_model_in_float64(config: ModelConfig) -> None:
    tiny = dataclasses.replace(config, vocab_size=5, d_model=8, num_heads=2, context=4, d_expert=4, num_experts=3)
    model, batch = Transformer(tiny).double(), tokens(tiny, 1)
    names = [name for name, _ in model.named_parameters()]

    def logits(*parameters: torch.Tensor) -> torch.Tensor:
        output = torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (batch,))
        return output.logits_BSV  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(logits, tuple(model.parameters()), fast_mode=True)


class Replay:
    """Chooses the experts that another pass chose: near-ties fall otherwise in another precision, and that is no error."""

    def __init__(self, routers: tuple[RouterOutput, ...]) -> None:
        self._routings = [router.routing for router in routers]

    def __call__(self, scores_TE: torch.Tensor, bias_E: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        expert_TK = self._routings.pop(0).expert_N.view(len(scores_TE), -1)
        weight_TK = scores_TE.gather(1, expert_TK)
        return expert_TK, weight_TK / weight_TK.sum(1, keepdim=True)


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.1), (torch.float64, 1e-5)])
def test_other_precisions_give_nearly_the_same_logits(dtype: torch.dtype, error: float) -> None:
    model, batch = Transformer(SMALL), tokens(SMALL)
    output = model(batch)
    expected = output.logits_BSV
    found = model.to(dtype)(batch, rule=Replay(output.routers)).logits_BSV
    assert found.dtype == dtype
    assert (found.float() - expected).norm() < error * expected.norm()


def test_backends_give_one_model() -> None:
    batch = tokens(SMALL)
    results = []
    for backend in ("reference", "cpu"):
        model = Transformer(dataclasses.replace(SMALL, backend=backend))
        logits = model(batch).logits_BSV
        logits.square().mean().backward()
        results.append([logits, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_weights_come_from_named_streams() -> None:
    model = Transformer(SMALL)
    first = {name: p.clone() for name, p in model.state_dict().items()}
    torch.manual_seed(1)
    again = Transformer(SMALL).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    model.init_weights(1)
    drawn = [name for name, p in model.named_parameters() if p.dim() > 1]
    assert not any(torch.equal(first[name], model.state_dict()[name]) for name in drawn)
    values = torch.cat([first[name].flatten() / first[name].std() for name in drawn])
    assert values.unique().numel() > 0.99 * values.numel(), "no two parameters share a stream"


def test_models_of_different_e_share_all_but_their_later_experts() -> None:
    small = dict(Transformer(SMALL).named_parameters())
    large = dict(Transformer(dataclasses.replace(SMALL, num_experts=32)).named_parameters())
    for name, parameter in small.items():
        if parameter.shape == large[name].shape:
            assert torch.equal(parameter, large[name])
        else:
            assert name.endswith(("router_ED", "w_up_EDF", "w_down_EFD"))
            assert torch.equal(parameter, large[name][:8])


def test_activations_start_near_one() -> None:
    config = dataclasses.replace(SMALL, d_model=128, num_layers=6, d_expert=64, d_shared=0, context=64)
    output = Transformer(config)(tokens(config, 8))
    assert 0.7 < output.logits_BSV.std() < 1.4
    for router in output.routers:
        assert 0.7 < router.logits_TE.std() < 1.4


@pytest.mark.parametrize("config", ALL)
def test_parameter_counts_are_those_of_the_tensors(config: ModelConfig) -> None:
    model, count = Transformer(config), accounting(config)
    parameters = dict(model.named_parameters())
    assert count.total == sum(p.numel() for p in parameters.values())
    assert count.total_non_vocab == sum(p.numel() for name, p in parameters.items() if "embedding" not in name)
    idle = sum(
        (config.num_experts - config.top_k) * (moe.w_up_EDF[0].numel() + moe.w_down_EFD[0].numel())
        for moe in model.modules()
        if isinstance(moe, MoE)
    )
    assert count.total - count.active == idle == count.total_non_vocab - count.active_non_vocab


@pytest.mark.parametrize("config", ALL)
def test_flops_are_those_that_torch_counts(config: ModelConfig) -> None:
    # torch's counter knows neither grouped_mm nor the CPU's attention kernel: count the plain GEMMs in their place.
    config = dataclasses.replace(config, backend="reference")
    model, batch = Transformer(config), tokens(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        loss = model(batch).logits_BSV.sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    count = accounting(config)
    assert forward.get_total_flops() == count.flops_forward * batch.numel()
    assert forward.get_total_flops() + backward.get_total_flops() == count.flops_training * batch.numel()


def test_accounting_gives_a_published_config() -> None:
    """arXiv 2506.12119's best 2B model, L16 D1408 dense 3904 E92 K7 expert 320, shared K·320."""
    config = ModelConfig(
        vocab_size=65_536,
        d_model=1408,
        num_layers=16,
        num_heads=11,
        context=2048,
        d_expert=320,
        num_experts=92,
        top_k=7,
        d_shared=7 * 320,
        dense_layers=1,
        d_dense=3904,
    )
    count = accounting(config)
    D, mu, beta, alpha = 1408, (7 * 320 + 92 * 320) / 1408, (2 * 7 * 320) / 1408, 3904 / 1408
    # N = (4 + 3μ)·D²·L_e + (4 + 3α)·D²·L_d leaves out routers and norms: under 0.2%.
    assert count.total_non_vocab == pytest.approx((4 + 3 * mu) * D**2 * 15 + (4 + 3 * alpha) * D**2, rel=2e-3)
    assert count.active_non_vocab == pytest.approx((4 + 3 * beta) * D**2 * 15 + (4 + 3 * alpha) * D**2, rel=6e-3)
    assert count.active_non_vocab / count.total_non_vocab == pytest.approx(0.1994, abs=2e-3)
    readout = 6 * config.vocab_size * D
    assert count.flops_training - readout == pytest.approx(6 * count.active_non_vocab + 12 * D * 2048 * 16, rel=1e-3)


@pytest.mark.filterwarnings("ignore")  # the compiler warns of its own doings
def test_compiling_the_model_leaves_the_experts_out_and_changes_nothing() -> None:
    config = dataclasses.replace(SMALL, num_layers=1, d_shared=0)
    model, batch = Transformer(config), tokens(config)
    expected = model(batch).logits_BSV
    compiled = torch.compile(model, backend="aot_eager")
    found = compiled(batch).logits_BSV
    torch.testing.assert_close(found, expected)
    names = [name for name, _ in model.named_parameters()]
    grads = [torch.autograd.grad(y.square().mean(), list(model.parameters())) for y in (found, expected)]
    for name, a, b in zip(names, *grads, strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"d_model": 36}, UsageError, r"multiple of 2·num_heads = 8"),
        ({"num_layers": 0}, UsageError, "num_layers of at least 1, found 0"),
        ({"top_k": 9}, RoutingError, "top_k of at most num_experts=8, found 9"),
        ({"num_experts": 0}, UsageError, "top_k=0 and d_shared=0"),
        ({"dense_layers": 3}, UsageError, r"dense_layers in 0\.\.2"),
        ({"dense_layers": 1}, UsageError, "d_dense of at least 1"),
        ({"backend": "gpu"}, RoutingError, "found 'gpu'"),
        ({"rope_theta": 0.0}, UsageError, "rope_theta above 0"),
        ({"norm_eps": 0.0}, UsageError, "norm_eps above 0"),
        ({"d_head": 5}, UsageError, "d_head to be even"),
        ({"num_kv_heads": 3}, UsageError, "num_kv_heads to divide num_heads = 4"),
        ({"qk_norm": "all"}, UsageError, "none, head or width, found 'all'"),
        ({"dense_blocks": (2,)}, UsageError, r"dense_blocks in 0\.\.1"),
        ({"dense_blocks": (1,)}, UsageError, "d_dense of at least 1"),
        ({"score": "relu"}, UsageError, "softmax or sigmoid"),
    ],
)
def test_configs_that_cannot_be(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dataclasses.replace(SMALL, **changes)  # type: ignore[arg-type]


def test_a_sequence_longer_than_the_context() -> None:
    with pytest.raises(UsageError, match=r"at most 16 tokens a sequence .*found 17"):
        Transformer(SMALL)(torch.zeros(1, 17, dtype=torch.int64))
