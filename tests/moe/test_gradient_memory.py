"""The CPU backend writes a weight's gradient over the last one only when nobody holds that any more."""

import gc

import pytest
import torch

from repro.moe import Routing, TopK, apply_experts, cpu

T, D, F, E, K = 64, 32, 16, 8, 2


@pytest.fixture(autouse=True)
def in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_ALL_BYTES", 0)
    monkeypatch.setattr(cpu, "_ALL_BYTES_COMPILED", 0)
    monkeypatch.setattr(cpu, "_BLOCK_BYTES", 16 << 10)


def weights() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(E, D, 2 * F, requires_grad=True), torch.randn(E, F, D, requires_grad=True)


def gradients(up: torch.Tensor, down: torch.Tensor, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(T, D, generator=generator)
    expert_TK, weight_TK = TopK(K)(torch.rand(T, E, generator=generator))
    y_TD = apply_experts(x_TD, Routing.from_slots(expert_TK, weight_TK, E), up, down, "cpu")
    return torch.autograd.grad(y_TD.square().sum(), (up, down))


def test_a_gradient_that_is_held_is_never_written_over() -> None:
    up, down = weights()
    first = gradients(up, down, 1)
    copies = [gradient.clone() for gradient in first]
    part = first[0][2, 3]  # a view holds it too
    second = gradients(up, down, 2)
    assert {g.data_ptr() for g in first}.isdisjoint(g.data_ptr() for g in second)
    assert all(map(torch.equal, first, copies))
    del first
    third = gradients(up, down, 3)
    assert torch.equal(part, copies[0][2, 3])
    assert not any(map(torch.equal, second, third))


def test_memory_that_is_free_is_used_again_and_its_old_contents_do_not_show() -> None:
    up, down = weights()
    place = [gradient.data_ptr() for gradient in gradients(up, down, 1)]
    again = gradients(up, down, 2)
    assert [gradient.data_ptr() for gradient in again] == place
    fresh = gradients(up.detach().clone().requires_grad_(), down.detach().clone().requires_grad_(), 2)
    assert all(map(torch.equal, again, fresh))


def test_experts_with_no_rows_get_zero_in_memory_that_is_used_again() -> None:
    up, down = weights()
    gradients(up, down, 1)
    routing = Routing.from_slots(torch.zeros(T, 1, dtype=torch.int64), torch.ones(T, 1), E)
    y_TD = apply_experts(torch.randn(T, D), routing, up, down, "cpu")
    for gradient in torch.autograd.grad(y_TD.sum(), (up, down)):
        assert gradient[0].any()
        assert not gradient[1:].any()


def test_gradients_add_up_over_backward_passes() -> None:
    up, down = weights()
    expected = [a + b + c for a, b, c in zip(*(gradients(up, down, seed) for seed in (1, 2, 3)), strict=True)]
    for seed in (1, 2, 3):
        generator = torch.Generator().manual_seed(seed)
        x_TD = torch.randn(T, D, generator=generator)
        expert_TK, weight_TK = TopK(K)(torch.rand(T, E, generator=generator))
        apply_experts(x_TD, Routing.from_slots(expert_TK, weight_TK, E), up, down, "cpu").square().sum().backward()
    assert all(torch.equal(w.grad, e) for w, e in zip((up, down), expected, strict=True) if w.grad is not None)
    assert up.grad is not None
    assert down.grad is not None


def test_the_memory_goes_with_the_weight() -> None:
    before = len(cpu._memories)
    up, down = weights()
    gradients(up, down, 1)
    assert len(cpu._memories) == before + 2
    del up, down
    gc.collect()
    assert len(cpu._memories) == before
