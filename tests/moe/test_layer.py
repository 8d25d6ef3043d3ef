"""The layer as a researcher uses it."""

import pytest
import torch
from torch import Tensor

from repro.moe import MoE, NonFiniteError, RoutingError, TopK


def make(**changes: object) -> MoE:
    sizes: dict[str, object] = {"d_model": 16, "d_expert": 8, "num_experts": 6, "top_k": 2}
    return MoE(**(sizes | changes))  # type: ignore[arg-type]


def test_shape_in_is_shape_out_and_the_router_comes_beside() -> None:
    moe = make()
    x = torch.randn(3, 5, 16)
    y, router = moe.forward_with_router(x)
    assert y.shape == x.shape
    assert torch.equal(y, moe(x))
    assert router.logits_TE.shape == router.scores_TE.shape == (15, 6)
    assert router.routing.load_E.sum() == 30


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_the_layer_is_the_sum_of_its_chosen_experts(score: str, renormalize: bool) -> None:
    moe = make(score=score, renormalize=renormalize, d_shared=4)
    x_TD = torch.randn(10, 16)
    y_TD = moe(x_TD)
    assert moe.shared is not None
    for token in range(10):
        scores = torch.softmax(moe.router_ED @ x_TD[token], 0)
        if score == "sigmoid":
            scores = torch.sigmoid(moe.router_ED @ x_TD[token])
        best = scores.topk(2)
        gates = best.values / best.values.sum() if renormalize else best.values
        expected: Tensor = moe.shared(x_TD[token])
        for gate, expert in zip(gates, best.indices.tolist(), strict=True):
            g, u = (x_TD[token] @ moe.w_up_EDF[expert]).chunk(2)
            expected = expected + gate * ((torch.nn.functional.silu(g) * u) @ moe.w_down_EFD[expert])
        torch.testing.assert_close(y_TD[token], expected, rtol=1e-4, atol=1e-5)


def test_a_rule_replaces_the_top_k_for_one_call() -> None:
    moe = make()
    x = torch.randn(4, 16)
    before = moe(x)
    k_T = torch.tensor([1, 6, 2, 3])
    _, router = moe.forward_with_router(x, TopK(k_T))
    assert router.routing.by_token.diff().tolist() == k_T.tolist()
    assert torch.equal(moe(x), before)


def test_the_selection_bias_is_a_buffer_that_selects() -> None:
    moe = make(selection_bias=True, top_k=1)
    assert moe.bias_E is not None
    moe.bias_E[3] = 100
    _, router = moe.forward_with_router(torch.randn(7, 16))
    assert router.routing.load_E.tolist() == [0, 0, 0, 7, 0, 0]
    assert "bias_E" in moe.state_dict()
    assert "bias_E" not in make().state_dict()


def test_a_frozen_router_and_frozen_experts() -> None:
    moe = make()
    moe.router_ED.requires_grad_(False)
    moe(torch.randn(4, 16)).sum().backward()
    assert moe.router_ED.grad is None
    assert moe.w_up_EDF.grad is not None
    moe = make()
    moe.w_up_EDF.requires_grad_(False)
    moe.w_down_EFD.requires_grad_(False)
    moe(torch.randn(4, 16)).sum().backward()
    assert moe.router_ED.grad is not None
    assert moe.w_up_EDF.grad is None


def test_the_router_works_in_float32_under_autocast() -> None:
    moe = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, router = moe.forward_with_router(torch.randn(5, 16))
    assert router.logits_TE.dtype == router.scores_TE.dtype == torch.float32
    assert y.isfinite().all()


def test_bfloat16_and_float64_layers() -> None:
    x = torch.randn(20, 16)
    moe = make()
    torch.testing.assert_close(moe.double()(x.double()).float(), moe.float()(x))
    half = moe.bfloat16()
    y = half(x.bfloat16())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()


def test_no_tokens() -> None:
    x = torch.randn(0, 16, requires_grad=True)
    moe = make(d_shared=4)
    moe(x).sum().backward()
    assert moe.w_up_EDF.grad is not None
    assert not moe.w_up_EDF.grad.any()


def test_nan_logits_name_the_layer() -> None:
    moe = make()
    moe.name = "blocks.3.ffn"
    x = torch.randn(4, 16)
    x[2, 1] = torch.nan
    with pytest.raises(NonFiniteError, match=r"blocks\.3\.ffn: .*6 of 24") as raised:
        moe(x)
    assert raised.value.layer == "blocks.3.ffn"


def test_huge_finite_logits_are_no_error() -> None:
    moe = make()
    with torch.no_grad():
        moe.router_ED.fill_(1e37)
    assert moe(torch.ones(40, 16)).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 7}, "top_k of at most num_experts=6, found 7"),
        ({"top_k": 0}, "top_k of at least 1"),
        ({"num_experts": 0}, "num_experts of at least 1"),
        ({"d_model": 0}, "d_model of at least 1"),
        ({"d_shared": -1}, "d_shared of at least 0"),
        ({"score": "relu"}, "softmax or sigmoid, found 'relu'"),
        ({"backend": "gpu"}, "found 'gpu'"),
    ],
)
def test_sizes_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RoutingError, match=message):
        make(**changes)
