"""The backends against the definition: values, gradients, repeats, and what must not leak."""

import importlib.metadata
import importlib.util
import itertools
import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from repro.moe import MoEMemoryError, Routing, RoutingError, TopK, apply_experts, cpu, experts, tiles, triton

FAST = ["cpu", "grouped"]
# Triton's interpreter runs the kernels without a GPU; up to 3.6 it cannot count with numpy 2.4's arrays.
if importlib.util.find_spec("triton") and (
    np.lib.NumpyVersion(np.__version__) < "2.4.0" or importlib.metadata.version("triton") >= "3.8"
):
    os.environ["TRITON_INTERPRET"] = "1"
    FAST.append("triton")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),  # of a sigmoid that is then 0
]

Case = tuple[Tensor, Routing, Tensor, Tensor]


def weights(E: int, D: int, F: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    up = torch.randn(E, D, 2 * F, dtype=dtype) * D**-0.5
    return up.requires_grad_(), (torch.randn(E, F, D, dtype=dtype) * F**-0.5).requires_grad_()


def case(
    expert_TK: Tensor, E: int, D: int, F: int, dtype: torch.dtype = torch.float32, scale: float = 1
) -> tuple[Case, Tensor]:
    """Random tokens, gates and experts on given slots; the gates' leaf comes beside."""
    T = expert_TK.shape[0]
    gate_TK = torch.rand(expert_TK.shape, dtype=dtype, requires_grad=True)
    x_TD = (torch.randn(T, D, dtype=dtype) * scale).requires_grad_()
    return (x_TD, Routing.from_slots(expert_TK, gate_TK, E), *weights(E, D, F, dtype)), gate_TK


def top_k_slots(T: int, E: int, k: int | Tensor) -> Tensor:
    return TopK(k)(torch.rand(T, E))[0]


def slots_of(kind: str, T: int, E: int) -> Tensor:
    if kind == "top-2":
        return top_k_slots(T, E, 2)
    if kind == "k by token":
        return top_k_slots(T, E, torch.randint(0, E + 1, (T,)))
    if kind == "one expert":
        return torch.full((T, 1), E - 1)
    if kind == "some experts idle":
        return torch.randint(0, 2, (T, 1)) * (E - 2)
    if kind == "some tokens idle":
        return torch.where(torch.rand(T, 2) < 0.5, -1, torch.tensor([0, 1]))
    raise AssertionError(kind)


KINDS = ["top-2", "k by token", "one expert", "some experts idle", "some tokens idle"]


def gradients(inputs: Case, gate_TK: Tensor, dy_TD: Tensor, backend: str) -> tuple[Tensor, ...]:
    x_TD, routing, up, down = inputs
    y_TD = apply_experts(x_TD, routing, up, down, backend)
    grads = torch.autograd.grad(y_TD, (x_TD, gate_TK, up, down), dy_TD, retain_graph=True)
    return (y_TD.detach(), *grads)


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


# T, D, F, E; torch's grouped GEMM wants rows of whole 16 bytes.
SIZES = [(33, 16, 8, 5), (7, 6, 3, 4), (200, 32, 24, 3), (64, 10, 12, 9)]
CASES = [
    (backend, size) for backend in FAST for size in SIZES if backend != "grouped" or size[1] % 4 == size[2] % 4 == 0
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("backend", "size"), CASES)
def test_fast_backends_equal_the_reference_to_rounding(
    backend: str, kind: str, size: tuple[int, int, int, int]
) -> None:
    T, D, F, E = size
    inputs, gate_TK = case(slots_of(kind, T, E), E, D, F)
    dy_TD = torch.randn(T, D)
    expected = gradients(inputs, gate_TK, dy_TD, "reference")
    for name, found, want in zip(
        ("y", "dx", "dgate", "dup", "ddown"), gradients(inputs, gate_TK, dy_TD, backend), expected, strict=True
    ):
        assert relative(found, want) < 2e-6, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck_in_float64(backend: str, kind: str) -> None:
    inputs, gate_TK = case(slots_of(kind, 6, 4), 4, 4, 3, torch.float64)
    x_TD, _, up, down = inputs
    expert_TK = slots_of(kind, 6, 4)

    def run(x_TD: Tensor, gate_TK: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return apply_experts(x_TD, Routing.from_slots(expert_TK, gate_TK, 4), up, down, backend)

    gate_TK = torch.rand(expert_TK.shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x_TD, gate_TK, up, down))


REPEATED = [
    (backend, size)
    for backend in ("reference", *FAST)
    # Triton's interpreter takes minutes for what the others do in a second.
    for size in ([(20, 16, 8, 3)] if backend == "triton" else [(48, 16, 8, 5), (640, 64, 32, 8)])
]


@pytest.mark.parametrize(("backend", "size"), REPEATED)
def test_forty_repeats_are_bitwise_equal(backend: str, size: tuple[int, int, int, int]) -> None:
    T, D, F, E = size
    inputs, gate_TK = case(slots_of("k by token", T, E), E, D, F)
    dy_TD = torch.randn(T, D)
    first = gradients(inputs, gate_TK, dy_TD, backend)
    for _ in range(39):
        assert all(map(torch.equal, first, gradients(inputs, gate_TK, dy_TD, backend)))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("block_bytes", [1, 4000, 1 << 30])
@pytest.mark.parametrize("kind", KINDS)
def test_cpu_blocks_of_any_size_agree_and_repeat(
    monkeypatch: pytest.MonkeyPatch, kind: str, block_bytes: int, compiled: bool
) -> None:
    if compiled and not cpu.compiled():
        pytest.skip("numba is not installed")
    monkeypatch.setattr(cpu, "compiled", lambda: compiled)
    monkeypatch.setattr(cpu, "_ALL_BYTES", 0)
    monkeypatch.setattr(cpu, "_ALL_BYTES_COMPILED", 0)
    monkeypatch.setattr(cpu, "_BLOCK_BYTES", block_bytes)
    inputs, gate_TK = case(slots_of(kind, 64, 7), 7, 16, 8)
    dy_TD = torch.randn(64, 16)
    first = gradients(inputs, gate_TK, dy_TD, "cpu")
    for found, expected in zip(first, gradients(inputs, gate_TK, dy_TD, "reference"), strict=True):
        assert relative(found, expected) < 2e-6
    for _ in range(39):
        assert all(map(torch.equal, first, gradients(inputs, gate_TK, dy_TD, "cpu")))


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_frozen_parts_get_no_gradient_and_change_no_other(backend: str) -> None:
    inputs, gate_TK = case(slots_of("top-2", 20, 4), 4, 8, 4)
    x_TD, routing, up, down = inputs
    dy_TD = torch.randn(20, 8)
    full = gradients(inputs, gate_TK, dy_TD, backend)[1:]
    leaves = (x_TD, gate_TK, up, down)
    for wanted in itertools.product([False, True], repeat=4):
        if not any(wanted):
            continue
        for leaf, want in zip(leaves, wanted, strict=True):
            leaf.requires_grad_(want)
        fresh = Routing.from_slots(routing.expert_N.view(20, 2), gate_TK, 4)
        y_TD = apply_experts(x_TD, fresh, up, down, backend)
        kept = [n for n in range(4) if wanted[n]]
        found = torch.autograd.grad(y_TD, [leaves[n] for n in kept], dy_TD)
        for n, grad in zip(kept, found, strict=True):
            assert relative(grad, full[n]) < 2e-6


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_a_poisoned_token_reaches_no_other(backend: str) -> None:
    expert_TK = top_k_slots(30, 4, 2)
    inputs, _ = case(expert_TK, 4, 8, 4)
    x_TD, routing, up, down = inputs
    clean = apply_experts(x_TD, routing, up, down, backend)
    poisoned = x_TD.detach().clone()
    poisoned[29] = torch.nan
    y_TD = apply_experts(poisoned, routing, up, down, backend)
    assert torch.equal(y_TD[:29], clean[:29])
    assert y_TD[29].isnan().all()


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_idle_experts_may_hold_anything(backend: str) -> None:
    inputs, gate_TK = case(torch.zeros(9, 1, dtype=torch.int64), 3, 8, 4)
    _, _, up, down = inputs
    with torch.no_grad():
        up[1:], down[1:] = torch.nan, torch.inf
    y_TD, dx_TD, _, dup, ddown = gradients(inputs, gate_TK, torch.randn(9, 8), backend)
    assert y_TD.isfinite().all()
    assert dx_TD.isfinite().all()
    assert not dup[1:].any()
    assert not ddown[1:].any()


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("shape", [(0, 2), (3, 0)])
def test_nothing_to_route_gives_zero_and_zero_gradients(backend: str, shape: tuple[int, int]) -> None:
    inputs, gate_TK = case(torch.full(shape, -1), 4, 8, 4)
    with torch.no_grad():
        inputs[2][:] = torch.nan
    y_TD, *grads = gradients(inputs, gate_TK, torch.ones(shape[0], 8), backend)
    assert y_TD.shape == (shape[0], 8)
    assert not y_TD.any()
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("scale", [1e-3, 1, 1e3])
@pytest.mark.parametrize("backend", FAST)
def test_against_float64_at_several_scales(backend: str, scale: float) -> None:
    inputs, gate_TK = case(slots_of("top-2", 50, 6), 6, 32, 16, scale=scale)
    x_TD, routing, up, down = inputs
    y_TD = apply_experts(x_TD, routing, up, down, backend)
    wide = Routing.from_slots(routing.expert_N.view(50, 2), gate_TK.double(), 6)
    exact = apply_experts(x_TD.double(), wide, up.double(), down.double(), "reference")
    assert relative(y_TD, exact) < 1e-6


def test_grouped_refuses_what_torch_cannot_group() -> None:
    for sizes, dtype in (((9, 6, 4), torch.float32), ((9, 8, 3), torch.float32), ((9, 8, 4), torch.float64)):
        T, D, F = sizes
        inputs, _ = case(slots_of("top-2", T, 4), 4, D, F, dtype)
        with pytest.raises(RoutingError, match=rf"backend grouped: .*found {dtype} with d_model={D}, d_expert={F}"):
            apply_experts(*inputs, backend="grouped")


# Not triton: its interpreter multiplies bfloat16 wrongly.
@pytest.mark.parametrize("backend", ["reference", "cpu", "grouped"])
def test_bfloat16_is_as_near_as_bfloat16_can_be(backend: str) -> None:
    inputs, gate_TK = case(slots_of("top-2", 64, 4), 4, 32, 16)
    x_TD, routing, up, down = inputs
    exact = apply_experts(x_TD, routing, up, down, "reference")
    half = apply_experts(x_TD.bfloat16(), routing, up.bfloat16(), down.bfloat16(), backend)
    assert half.dtype == torch.bfloat16
    assert relative(half, exact) < 1e-2
    half.float().sum().backward()  # type: ignore[no-untyped-call]
    assert gate_TK.grad is not None
    assert gate_TK.grad.dtype == torch.float32


@pytest.mark.skipif("triton" not in FAST, reason="triton is not there, or cannot be interpreted")
def test_triton_rows_do_not_depend_on_the_rest_of_the_batch() -> None:
    inputs, gate_TK = case(slots_of("top-2", 60, 5), 5, 24, 40)
    x_TD, routing, up, down = inputs
    whole = apply_experts(x_TD, routing, up, down, "triton")
    few = Routing.from_slots(routing.expert_N.view(60, 2)[20:31], gate_TK[20:31], 5)
    assert torch.equal(apply_experts(x_TD[20:31], few, up, down, "triton"), whole[20:31])


@pytest.mark.skipif("triton" not in FAST, reason="triton is not there, or cannot be interpreted")
@pytest.mark.parametrize(("T", "K", "E"), [(0, 2, 5), (1, 1, 1), (64, 2, 5), (300, 3, 70), (1000, 1, 1100)])
def test_triton_orders_assignments_as_the_stable_sort_does(T: int, K: int, E: int) -> None:
    expert_TK = torch.randint(0, E, (T, K)) if E > 2 else torch.zeros(T, K, dtype=torch.int64)
    expert_TK[::3] = E - 1  # long ties
    ours, torchs = (Routing.from_slots(expert_TK, torch.ones(T, K), E, kernels=kernels) for kernels in (True, False))
    assert torch.equal(ours.order_N, torchs.order_N)
    assert torch.equal(ours.by_expert, torchs.by_expert)
    assert ours.by_expert.dtype == torchs.by_expert.dtype


@pytest.mark.skipif("triton" not in FAST, reason="triton is not there, or cannot be interpreted")
def test_triton_orders_skip_empty_slots() -> None:
    expert_TK = torch.tensor([[2, -1], [-1, -1], [0, 2], [2, 1]])
    routing = Routing.from_slots(expert_TK, torch.ones(4, 2), 4, kernels=True)
    assert routing.token_N[routing.order_N].tolist() == [2, 3, 0, 2, 3]
    assert routing.by_expert.tolist() == [0, 1, 2, 5, 5]


@pytest.mark.skipif("triton" not in FAST, reason="triton is not there, or cannot be interpreted")
@pytest.mark.parametrize("size", [(20, 16, 136, 3), (33, 32, 64, 2)])
def test_triton_with_other_tiles(size: tuple[int, int, int, int]) -> None:
    # Wide enough for the hidden layer's gradients to be taken in halves; deep enough, and not, to fill every tile.
    T, D, F, E = size
    tile = tiles.Tile(16, 64, 32, 4, 1)
    both = dict.fromkeys(tiles.LAUNCHES, tile) | {"d_hidden": tiles.Tile(32, 128, 16, 4, 1)}
    table = tiles.Table(defaults=dict.fromkeys(tiles.packaged().defaults, tiles.Tiles(**both)), measured={}, places={})
    inputs, gate_TK = case(slots_of("top-2", T, E), E, D, F)
    dy_TD = torch.randn(T, D)
    expected = gradients(inputs, gate_TK, dy_TD, "reference")
    with tiles.use(table):
        found = gradients(inputs, gate_TK, dy_TD, "triton")
    for name, one, other in zip(("y", "dx", "dgate", "dup", "ddown"), found, expected, strict=True):
        assert relative(one, other) < 2e-6, name


@pytest.mark.skipif("triton" not in FAST, reason="triton is not there, or cannot be interpreted")
@pytest.mark.parametrize(
    ("loads", "rows"),
    [([0, 33, 16, 0, 1], 16), ([0, 33, 16, 0, 1], 32), ([0, 0], 16), ([5], 16), ([0] * 1020 + [70] + [2] * 9, 16)],
)
def test_triton_maps_tiles_to_experts(loads: list[int], rows: int) -> None:
    slots = [[expert] for expert, load in enumerate(loads) for _ in range(load)]
    expert_TK = torch.tensor(slots, dtype=torch.int64).view(-1, 1)
    plan = triton.plan(Routing.from_slots(expert_TK, torch.ones(len(slots), 1), len(loads)))
    expected = [
        (expert, sum(loads[:expert]) + start) for expert, load in enumerate(loads) for start in range(0, load, rows)
    ]
    expert, first = (z.tolist() for z in plan.tiles_of(rows))
    assert len(expert) == sum(loads) // rows + len(loads)
    assert list(zip(expert, first, strict=True))[: len(expected)] == expected
    assert set(expert[len(expected) :]) <= {-1}
    assert plan.tiles_of(rows) is plan.tiles_of(rows)


@pytest.mark.skipif(bool(importlib.util.find_spec("triton")), reason="triton is installed")
def test_triton_says_what_it_needs() -> None:
    inputs, _ = case(slots_of("top-2", 5, 4), 4, 8, 4)
    with pytest.raises(RoutingError, match="backend triton: expected triton installed"):
        apply_experts(*inputs, backend="triton")


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")],
)
def test_out_of_memory_says_what_would_fit(monkeypatch: pytest.MonkeyPatch, error: RuntimeError) -> None:
    def fail(*_: object) -> Tensor:
        raise error

    monkeypatch.setitem(experts._COMPUTE, "cpu", fail)
    monkeypatch.setattr(experts, "_free_bytes", lambda device: 10 * 2 * (2 * 8 + 3 * 4) * 4)
    inputs, _ = case(slots_of("top-2", 50, 4), 4, 8, 4)
    with pytest.raises(MoEMemoryError, match=r"50 tokens need about .* at most about 10 tokens"):
        apply_experts(*inputs)


def test_other_runtime_errors_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise RuntimeError("something else")

    monkeypatch.setitem(experts._COMPUTE, "cpu", fail)
    inputs, _ = case(slots_of("top-2", 50, 4), 4, 8, 4)
    with pytest.raises(RuntimeError, match="something else"):
        apply_experts(*inputs)


def test_bad_shapes_say_what_was_expected() -> None:
    inputs, _ = case(slots_of("top-2", 5, 4), 4, 8, 4)
    x_TD, routing, up, down = inputs
    calls: list[tuple[str, Callable[[], Tensor]]] = [
        ("experts of shape", lambda: apply_experts(x_TD, routing, up[:, :, :6], down)),
        ("experts of shape", lambda: apply_experts(x_TD[:, :4], routing, up, down)),
        ("routing of 4 tokens", lambda: apply_experts(x_TD[:4], routing, up, down)),
        ("to 3 experts", lambda: apply_experts(x_TD, routing, up[:3], down[:3])),
        ("found 'cuda'", lambda: apply_experts(x_TD, routing, up, down, "cuda")),
    ]
    for message, call in calls:
        with pytest.raises(RoutingError, match=message):
            call()
