"""The backends on a GPU, in bfloat16, against float64: run where torch sees one."""

import pytest
import torch
from torch import Tensor

from repro.moe import MoE, Routing, TopK, apply_experts
from repro.moe.triton import supports

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")

# T, D, F, E, K: tails in every axis, a fine-grained shape, more experts than tokens.
SHAPES = [(300, 136, 72, 5, 2), (4096, 768, 256, 128, 8), (40, 256, 256, 64, 4), (1, 64, 64, 8, 8)]


def result(backend: str, dtype: torch.dtype, inputs: list[Tensor], expert_TK: Tensor, E: int) -> list[Tensor]:
    x_TD, gate_TK, up, down, dy_TD = (z.to(dtype).requires_grad_() for z in inputs)
    routing = Routing.from_slots(expert_TK, gate_TK.float() if dtype != torch.float64 else gate_TK, E, all_filled=True)
    y_TD = apply_experts(x_TD, routing, up, down, backend)
    return [y_TD.detach(), *torch.autograd.grad(y_TD, (x_TD, gate_TK, up, down), dy_TD)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["grouped", "triton"])
def test_bfloat16_against_float64_and_forty_equal_repeats(backend: str, shape: tuple[int, int, int, int, int]) -> None:
    T, D, F, E, K = shape
    if backend == "triton" and not supports(torch.zeros(1, 1, device="cuda", dtype=torch.bfloat16)):
        pytest.skip("triton is not installed")
    scales = [(T, D, 1.0), (T, K, 1.0), (E, D, 2 * F, D**-0.5), (E, F, D, F**-0.5), (T, D, 1.0)]
    inputs = [torch.randn(*size, device="cuda").mul(std).bfloat16() for *size, std in scales]
    expert_TK = TopK(K)(torch.rand(T, E, device="cuda"))[0]
    exact = result("reference", torch.float64, inputs, expert_TK, E)
    first = result(backend, torch.bfloat16, inputs, expert_TK, E)
    for name, found, expected in zip(("y", "dx", "dgate", "dup", "ddown"), first, exact, strict=True):
        assert (found.double() - expected).norm() / expected.norm() < 1e-2, name
    for _ in range(39):
        assert all(map(torch.equal, first, result(backend, torch.bfloat16, inputs, expert_TK, E)))


def test_the_layer_routes_without_waiting_for_the_device() -> None:
    moe = MoE(d_model=64, d_expert=64, num_experts=16, top_k=2).to("cuda", torch.bfloat16)
    x_TD = torch.randn(128, 64, device="cuda", dtype=torch.bfloat16)
    moe(x_TD)
    torch.cuda.set_sync_debug_mode("error")
    try:
        moe(x_TD).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
