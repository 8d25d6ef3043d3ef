"""Routing as data, the top-k rule, the balance loss, and what a bad routing says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from records.errors import UsageError
from repro.moe import RouterOutput, Routing, RoutingError, TopK, balance_loss
from repro.moe.routing import _Chosen, by_sorting, inverse, scores_of, sorted_on_device, stable_top_k


def router(scores_TE: torch.Tensor, k: int, renormalize: bool = True) -> RouterOutput:
    expert_TK, weight_TK = TopK(k, renormalize)(scores_TE)
    return RouterOutput(scores_TE.log(), scores_TE, Routing.from_slots(expert_TK, weight_TK, scores_TE.shape[1]))


@settings(deadline=None, max_examples=60)
@given(T=st.integers(0, 9), E=st.integers(1, 7), K=st.integers(0, 5), data=st.data())
def test_both_orders_hold_the_slots_that_are_filled(T: int, E: int, K: int, data: st.DataObject) -> None:
    slots = data.draw(st.lists(st.lists(st.integers(-1, E - 1), min_size=K, max_size=K), min_size=T, max_size=T))
    expert_TK = torch.tensor(slots, dtype=torch.int64).reshape(T, K)
    routing = Routing.from_slots(expert_TK, torch.rand(T, K), E)

    triples = [(t, e) for t, row in enumerate(slots) for e in row if e >= 0]
    assert list(zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True)) == triples
    order = routing.order_N.tolist()
    assert order == sorted(range(len(triples)), key=lambda n: triples[n][1]), "stable within an expert"
    assert routing.by_token.tolist() == [sum(t < token for t, _ in triples) for token in range(T + 1)]
    assert routing.by_expert.tolist() == [sum(e < expert for _, e in triples) for expert in range(E + 1)]
    assert routing.load_E.tolist() == [sum(e == expert for _, e in triples) for expert in range(E)]
    assert (routing.num_tokens, routing.num_experts) == (T, E)


def test_weights_stay_differentiable_past_empty_slots() -> None:
    weight_TK = torch.rand(2, 2, requires_grad=True)
    routing = Routing.from_slots(torch.tensor([[1, -1], [0, 2]]), weight_TK, 3)
    routing.weight_N.sum().backward()
    assert weight_TK.grad is not None
    assert weight_TK.grad.tolist() == [[1, 0], [1, 1]]


@pytest.mark.parametrize("k", [1, 2, 5, 11, 12, 16])
def test_ties_go_to_the_lowest_expert(k: int) -> None:
    scores_TE = torch.randint(0, 3, (50, 16)) / 4
    rows = scores_TE.tolist()
    expected = [sorted(range(16), key=lambda e: (-row[e], e))[:k] for row in rows]
    assert stable_top_k(scores_TE, k).tolist() == expected


def test_the_bias_sways_the_choice_and_not_the_weight() -> None:
    scores_TE = torch.tensor([[0.5, 0.3, 0.2]])
    expert_TK, weight_TK = TopK(1, renormalize=False)(scores_TE, torch.tensor([0.0, 0.0, 1.0]))
    assert (expert_TK.tolist(), weight_TK.tolist()) == ([[2]], [[pytest.approx(0.2)]])


@pytest.mark.parametrize("renormalize", [True, False])
def test_k_may_differ_by_token(renormalize: bool) -> None:
    scores_TE = torch.rand(6, 8).softmax(1)
    k_T = torch.tensor([0, 1, 2, 3, 8, 1])
    expert_TK, weight_TK = TopK(k_T, renormalize)(scores_TE)
    for token, k in enumerate(k_T.tolist()):
        alone, weights = TopK(k, renormalize)(scores_TE[token : token + 1])
        assert expert_TK[token].tolist() == alone[0].tolist() + [-1] * (8 - k)
        torch.testing.assert_close(weight_TK[token, :k], weights[0])
        assert not weight_TK[token, k:].any()


def test_weights_sum_to_one_even_where_all_scores_underflow() -> None:
    weight_TK = TopK(2)(torch.tensor([[0.0, 0.0, 0.0], [1e-30, 3e-30, 0.0]]))[1]
    assert weight_TK.isfinite().all()
    torch.testing.assert_close(weight_TK[1], torch.tensor([0.75, 0.25]))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_balance_loss_is_one_when_balanced_and_rises_to_e(k: int) -> None:
    E = 4
    balanced_TE = torch.eye(E) * 0.4 + 0.15
    if k < E:
        # Each expert is chosen equally often: rotate a falling row.
        falling = torch.tensor([0.4, 0.3, 0.2, 0.1])
        balanced_TE = torch.stack([falling.roll(shift) for shift in range(E)])
    assert balance_loss(router(balanced_TE, k)).item() == pytest.approx(1)
    one_TE = torch.tensor([[1.0, 0, 0, 0]]).repeat(8, 1)
    assert balance_loss(router(one_TE, 1)).item() == pytest.approx(E)


def test_balance_loss_pushes_the_busiest_expert_down_for_sigmoid_scores_too() -> None:
    logits_TE = (torch.randn(64, 8) + torch.tensor([2.0] + [0] * 7)).requires_grad_()
    scores_TE = logits_TE.sigmoid()
    balance_loss(router(scores_TE, 2)).backward()
    assert logits_TE.grad is not None
    assert logits_TE.grad[:, 0].mean() > 0
    assert logits_TE.grad[:, 0].mean() > logits_TE.grad[:, 1:].mean()


def test_balance_loss_of_nothing_is_zero() -> None:
    assert balance_loss(router(torch.ones(0, 4), 2)).item() == 0


def test_bad_routings_say_what_was_found() -> None:
    with pytest.raises(RoutingError, match=r"k in 0\.\.4.*found 5"):
        TopK(5)(torch.rand(2, 4))
    with pytest.raises(RoutingError, match=r"k in 0\.\.4.*found -1"):
        TopK(torch.tensor([1, -1]))(torch.rand(2, 4))
    with pytest.raises(RoutingError, match="each of 2 tokens"):
        TopK(torch.tensor([1]))(torch.rand(2, 4))
    with pytest.raises(RoutingError, match="one shape"):
        Routing.from_slots(torch.zeros(2, 1, dtype=torch.int64), torch.rand(2, 2), 4)
    with pytest.raises(RoutingError, match=r"experts in 0\.\.3.*found 4"):
        Routing.from_slots(torch.tensor([[4]]), torch.rand(1, 1), 4)
    with pytest.raises(RoutingError, match="found -2"):
        Routing.from_slots(torch.tensor([[-2]]), torch.rand(1, 1), 4, all_filled=True)
    assert issubclass(RoutingError, UsageError)


@pytest.mark.parametrize(("N", "E"), [(0, 4), (1, 1), (60, 7), (60, 40_000)])
def test_sorting_for_a_device_gives_the_order_and_offsets_of_the_cpu(N: int, E: int) -> None:
    expert_N = torch.randint(0, min(E, 9), (N,))
    expert_N[: N // 3] = E - 1
    order_N, by_expert = by_sorting(expert_N, E)
    for keys in (expert_N, expert_N.to(torch.int16) if E < 2**15 else expert_N):
        found_N, bounds = sorted_on_device(keys, E)
        assert torch.equal(found_N, order_N)
        assert torch.equal(bounds, by_expert)
        assert (found_N.dtype, bounds.dtype) == (torch.int64, torch.int64)


def test_the_inverse_of_a_permutation() -> None:
    order_N = torch.randperm(50)
    assert torch.equal(inverse(order_N)[order_N], torch.arange(50))
    assert torch.equal(order_N.to(torch.int32).argsort(), inverse(order_N)), "what other devices do"


@pytest.mark.parametrize("k", [0, 1, 3])
def test_scores_of_the_chosen_are_a_gather_forward_and_backward(k: int) -> None:
    scores_TE = torch.rand(20, 6, requires_grad=True)
    expert_TK = stable_top_k(torch.rand(20, 6), k)
    dchosen_TK = torch.randn(20, k)
    expected = torch.autograd.grad(scores_TE.gather(1, expert_TK), scores_TE, dchosen_TK)[0]
    chosen_TK = _Chosen.apply(scores_TE, expert_TK)  # type: ignore[no-untyped-call]
    assert torch.equal(chosen_TK, scores_TE.gather(1, expert_TK))
    assert torch.equal(torch.autograd.grad(chosen_TK, scores_TE, dchosen_TK)[0], expected)
    assert torch.equal(scores_of(scores_TE, expert_TK), chosen_TK)
