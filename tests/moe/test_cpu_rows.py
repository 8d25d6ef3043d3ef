"""The CPU backend's compiled steps against those of torch."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from repro.environment import numeric_environment
from repro.moe import Routing, TopK, apply_experts, cpu, cpu_rows

if importlib.util.find_spec("numba") is None:
    pytest.skip("numba is not installed", allow_module_level=True)
from repro.moe import cpu_rows_compiled


def arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.numpy() for tensor in tensors]


@pytest.mark.parametrize(("n", "D"), [(1, 1), (7, 5), (40, 64)])
def test_rows_are_moved_and_added_bit_for_bit(n: int, D: int) -> None:
    x_TD, z_ND, rows_N = torch.randn(50, D), torch.randn(n, D), torch.randperm(50)[:n]
    moved, added = torch.empty(2, n, D), torch.stack([x_TD, x_TD])
    cpu_rows.gather(x_TD, rows_N, moved[0])
    cpu_rows_compiled.gather(*arrays(x_TD, rows_N, moved[1]))
    cpu_rows.scatter_add(added[0], rows_N, z_ND)
    cpu_rows_compiled.scatter_add(*arrays(added[1], rows_N, z_ND))
    assert torch.equal(*moved)
    assert torch.equal(*added)
    assert not torch.equal(added[0], x_TD)


@pytest.mark.parametrize("wants_ds", [True, False])
@pytest.mark.parametrize(("n", "F"), [(1, 1), (5, 3), (33, 48), (8, 257)])
def test_swiglu_and_its_gradients_equal_those_in_float64(n: int, F: int, wants_ds: bool) -> None:
    h_NF, s_N, da_NF = 3 * torch.randn(n, 2 * F), torch.rand(n), torch.randn(n, F)
    a_NF, dh_NF, ds_N = torch.empty(n, F), torch.empty(n, 2 * F), torch.empty(n if wants_ds else 0)
    exact = [z.double() for z in (h_NF, s_N, da_NF, a_NF, dh_NF, ds_N)]
    cpu_rows.backward(*exact)
    forward_NF = torch.empty(n, F)
    cpu_rows_compiled.forward(*arrays(h_NF, s_N, forward_NF))
    cpu_rows_compiled.backward(*arrays(h_NF, s_N, da_NF.clone(), a_NF, dh_NF, ds_N))
    assert torch.equal(forward_NF, a_NF)
    for found, expected in zip((a_NF, dh_NF, ds_N), exact[3:], strict=True):
        assert float((found - expected).norm()) <= 5e-7 * float(expected.norm())


def test_silu_is_accurate_wherever_its_gate_lies() -> None:
    gate_F = torch.linspace(-87, 87, 100_001)
    a_NF = torch.empty(1, len(gate_F))
    cpu_rows_compiled.forward(*arrays(torch.cat([gate_F, torch.ones_like(gate_F)])[None], torch.ones(1), a_NF))
    exact_F = torch.nn.functional.silu(gate_F.double())
    spacing_F = torch.from_numpy(np.spacing(exact_F.abs().float().numpy()))
    assert float(((a_NF[0] - exact_F).abs() / spacing_F).max()) < 3
    far = torch.tensor([[-1e30, -200.0, 200.0, 1e30, torch.nan, 1, 1, 1, 1, 1]])
    found = torch.empty(1, 5)
    cpu_rows_compiled.forward(*arrays(far, torch.ones(1), found))
    assert found[0, 1].abs() < 1e-30
    assert found[0, 2:4].tolist() == far[0, 2:4].tolist()
    assert found[0, 4].isnan()


def test_the_layer_takes_them_for_float32_and_agrees_with_torchs_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_ALL_BYTES", 0)
    monkeypatch.setattr(cpu, "_ALL_BYTES_COMPILED", 0)
    x_TD, up, down = torch.randn(64, 16), torch.randn(7, 16, 24), torch.randn(7, 12, 16)
    leaves = [z.requires_grad_() for z in (x_TD, up, down)]
    expert_TK, weight_TK = TopK(3)(torch.rand(64, 7))
    routing = Routing.from_slots(expert_TK, weight_TK, 7)

    def run() -> tuple[Tensor, ...]:
        y_TD = apply_experts(x_TD, routing, up, down, "cpu")
        return (y_TD.detach(), *torch.autograd.grad(y_TD.sum(), leaves))  # a gradient with no memory of its own

    assert cpu.compiled()
    compiled = run()
    monkeypatch.setattr(cpu, "compiled", lambda: False)
    plain = run()
    assert not all(map(torch.equal, compiled, plain))  # it was another computation
    for found, expected in zip(compiled, plain, strict=True):
        assert float((found - expected).norm()) < 1e-6 * float(expected.norm())


def test_a_second_derivative_is_refused_rather_than_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_ALL_BYTES_COMPILED", 0)
    x_TD = torch.randn(8, 16, requires_grad=True)
    routing = Routing.from_slots(*TopK(2)(torch.rand(8, 4)), 4)
    y_TD = apply_experts(x_TD, routing, torch.randn(4, 16, 16), torch.randn(4, 8, 16), "cpu")
    (dx_TD,) = torch.autograd.grad(y_TD.square().sum(), x_TD, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx_TD.sum().backward()


def test_the_environment_tells_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert numeric_environment("cpu").compiled.startswith("numba 0.")
    monkeypatch.setattr(cpu, "compiled", lambda: False)
    assert numeric_environment("cpu").compiled == "nothing"


def test_bits_do_not_depend_on_how_wide_the_processors_vectors_are(tmp_path: Path) -> None:
    script = (
        "import hashlib, numpy as np; from repro.moe import cpu_rows_compiled as rows\n"
        "draw = np.random.default_rng(0).standard_normal\n"
        "h, s, da, a, dh, ds = (draw(shape, dtype=np.float32) for shape in ((9, 514), 9, (9, 257), (9, 257), (9, 514), 9))\n"
        "rows.backward(h, s, da, a, dh, ds); print(hashlib.sha256(b''.join(map(bytes, (a, dh, ds)))).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", script], env=os.environ | extra, capture_output=True, text=True, check=True
        ).stdout
        for extra in ({}, {"NUMBA_LOOP_VECTORIZE": "0", "NUMBA_CACHE_DIR": str(tmp_path)})  # the second: one at a time
    }
    assert len(found) == 1


def test_where_no_cache_can_be_written_they_are_compiled_each_time() -> None:
    script = (
        "from numba.core.caching import CacheImpl; CacheImpl._locator_classes = []\n"
        "from repro.moe import cpu_rows_compiled as rows; print(rows.gather.stats.cache_path)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"
