"""How fast the MoE layer is, against the dense feed-forward of the same FLOPs and against torch's own pieces.

For each shape and way of routing, in turn, over several rounds whose order alternates, forward and backward:
- `dense`: a SwiGLU of width k·d_expert on the same tokens, the floor: the same GEMM FLOPs with nothing to route
- `layer`: `repro.moe.MoE` as a user calls it, router included, with the backend `auto`
- one of each backend that runs there: the experts alone, on a routing made beforehand
- `torch`: `grouped_mm` composed by hand and differentiated by autograd, as torch's documentation would have one do

A ratio is taken within a round, so that a busy machine slows both of its sides; it is given as the median and the
quartiles over rounds. On the CPU the clock is the process's own time on one thread, so other processes' turns do not
count.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as nnf

from records.errors import UsageError
from repro.moe import MoE, Routing, SwiGLU, TopK, apply_experts, triton
from repro.moe.grouped import supports

Load = Literal["balanced", "zipf", "one"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What is measured. `load`: even; Zipf's law with exponent 1; or 60% of the first choices to one expert.

    `goal` bounds the ratio of `layer` to `dense` that the project set itself; None where it set none.
    """

    tokens: int
    d_model: int
    d_expert: int
    num_experts: int
    top_k: int
    load: Load = "balanced"
    goal: float | None = None

    @property
    def flops(self) -> int:
        """GEMM FLOPs of the experts, forward and backward: 6 a weight an assignment."""
        return 6 * self.tokens * self.top_k * 3 * self.d_model * self.d_expert


CPU_SHAPES = (
    Shape(tokens=4096, d_model=256, d_expert=256, num_experts=32, top_k=4, goal=1.10),
    Shape(tokens=4096, d_model=256, d_expert=128, num_experts=64, top_k=8, goal=1.30),
    Shape(tokens=4096, d_model=512, d_expert=256, num_experts=64, top_k=4, goal=1.30),
    Shape(tokens=512, d_model=256, d_expert=256, num_experts=32, top_k=4, goal=1.30),
    Shape(tokens=4096, d_model=256, d_expert=256, num_experts=32, top_k=4, load="zipf"),
    Shape(tokens=4096, d_model=256, d_expert=256, num_experts=32, top_k=4, load="one"),
    Shape(tokens=1024, d_model=64, d_expert=32, num_experts=16, top_k=2),
)
CUDA_SHAPES = tuple(
    Shape(tokens=T, d_model=D, d_expert=F, num_experts=E, top_k=K)
    for T, D, F, E, K in (
        (40_960, 768, 256, 128, 8),
        (24_576, 1536, 256, 128, 8),
        (32_768, 4096, 256, 256, 16),
        (32_768, 4096, 1024, 64, 4),
        (32_768, 4096, 2048, 64, 4),
        (8192, 2048, 768, 128, 8),
        (32_768, 2048, 768, 128, 8),
        (8192, 2048, 1024, 64, 8),
        (8192, 4096, 14_336, 8, 2),
        (8192, 256, 128, 32, 4),
        (8192, 768, 384, 128, 8),
    )
)


def measure(
    *, device: str = "cpu", shapes: Sequence[Shape] | None = None, rounds: int = 8, seed: int = 0
) -> dict[str, Any]:
    """Milliseconds and ratios for each shape, as data for `repro bench moe`.

    On the CPU in float32 on one thread; on CUDA in bfloat16. The first round only warms up. Raises `UsageError` for a
    device that is not there or fewer than 2 rounds.
    """
    if rounds < 2:
        raise UsageError(f"bench moe: expected at least 2 rounds, to see a spread, found {rounds}")
    if device not in ("cpu", "cuda") or (device == "cuda" and torch.cuda.device_count() == 0):
        raise UsageError(f"bench moe: expected cpu, or cuda where torch sees a GPU, found {device!r}")
    threads = torch.get_num_threads()
    state = torch.random.get_rng_state()
    try:
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        chosen = shapes or (CPU_SHAPES if device == "cpu" else CUDA_SHAPES)
        results = [_measure_shape(shape, torch.device(device), rounds) for shape in chosen]
    finally:
        torch.set_num_threads(threads)
        torch.random.set_rng_state(state)
    name = torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "schema": "repro.bench.moe/v1",
        "torch": str(torch.__version__),
        "device": device,
        "capability": name,
        "dtype": "float32" if device == "cpu" else "bfloat16",
        "rounds": rounds,
        "shapes": results,
    }


Forward = Callable[[], Tensor]


def _measure_shape(shape: Shape, device: torch.device, rounds: int) -> dict[str, Any]:
    contestants = _contestants(shape, device)
    clock = _cuda_clock if device.type == "cuda" else time.process_time
    forward: dict[str, list[float]] = {name: [] for name in contestants}
    total: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    dy_TD = torch.randn_like(contestants["dense"][1][0])
    for turn in range(rounds + 1):
        for name in names if turn % 2 else reversed(names):
            run, leaves = contestants[name]
            start = clock()
            y_TD = run()
            middle = clock()
            torch.autograd.grad(y_TD, leaves, dy_TD)
            end = clock()
            if turn:
                forward[name].append(middle - start)
                total[name].append(end - start)
    ratios = {
        name: _spread([mine / floor for mine, floor in zip(total[name], total["dense"], strict=True)]) for name in names
    }
    result: dict[str, Any] = {
        "tokens": shape.tokens,
        "d_model": shape.d_model,
        "d_expert": shape.d_expert,
        "num_experts": shape.num_experts,
        "top_k": shape.top_k,
        "load": shape.load,
        "forward_ms": {name: _spread([1e3 * value for value in forward[name]]) for name in names},
        "total_ms": {name: _spread([1e3 * value for value in total[name]]) for name in names},
        "gflop_per_s": {name: round(shape.flops / statistics.median(total[name]) / 1e9, 1) for name in names},
        "ratio_to_dense": ratios,
    }
    if shape.goal is not None:
        result["goal"] = {"layer_ratio": shape.goal, "met": ratios["layer"]["median"] <= shape.goal}
    return result


def _contestants(shape: Shape, device: torch.device) -> dict[str, tuple[Forward, list[Tensor]]]:
    """Each way to compute it: a forward, and the leaves whose gradients belong to it."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    T, D, E, K = shape.tokens, shape.d_model, shape.num_experts, shape.top_k
    x_TD = torch.randn(T, D, device=device, dtype=dtype, requires_grad=True)
    dense = SwiGLU(D, K * shape.d_expert).to(device, dtype)
    moe = MoE(d_model=D, d_expert=shape.d_expert, num_experts=E, top_k=K).to(device, dtype)
    rule = _Loaded(slots(shape, device))
    slots_TK, gate_TK = rule(torch.rand(T, E, device=device), None)
    gate_TK.requires_grad_()
    routing = Routing.from_slots(slots_TK, gate_TK, E, all_filled=True)
    up, down = moe.w_up_EDF, moe.w_down_EFD
    experts: list[Tensor] = [x_TD, gate_TK, up, down]

    def torchs() -> Tensor:
        rows_N = routing.token_N[routing.order_N]
        ends_E = routing.by_expert[1:].to(torch.int32)
        gate, lift = nnf.grouped_mm(x_TD[rows_N], up, offs=ends_E).chunk(2, dim=1)
        out_ND = nnf.grouped_mm(nnf.silu(gate) * lift, down, offs=ends_E)
        weighted_ND = out_ND * routing.weight_N[routing.order_N, None].to(dtype)
        return torch.zeros_like(x_TD).index_add(0, rows_N, weighted_ND)

    def on(backend: str) -> Forward:
        return lambda: apply_experts(x_TD, routing, up, down, backend)

    contestants: dict[str, tuple[Forward, list[Tensor]]] = {
        "dense": (lambda: dense(x_TD), [x_TD, *dense.parameters()]),
        "layer": (lambda: moe(x_TD, rule), [x_TD, *moe.parameters()]),
    }
    if device.type == "cpu":
        contestants["cpu"] = (on("cpu"), experts)
    if supports(x_TD, down):
        contestants["grouped"] = (on("grouped"), experts)
        contestants["torch"] = (torchs, experts)
    if device.type == "cuda" and triton.supports(x_TD):
        contestants["triton"] = (on("triton"), experts)
    contestants["reference"] = (on("reference"), experts)
    return contestants


@dataclass(frozen=True, slots=True)
class _Loaded:
    """Top-k as it costs, and then the prepared choice in place of its own: the router does not set the load."""

    expert_TK: Tensor

    def __call__(self, scores_TE: Tensor, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
        TopK(self.expert_TK.shape[1])(scores_TE, bias_E)
        weight_TK = scores_TE.gather(1, self.expert_TK)
        return self.expert_TK, weight_TK / weight_TK.sum(1, keepdim=True)


def slots(shape: Shape, device: torch.device) -> Tensor:
    """Experts (T, K) drawn without replacement by the load's popularity: Gumbel noise on its logarithm, then top-k."""
    rank_E = torch.arange(1, shape.num_experts + 1, device=device, dtype=torch.float32)
    share_E = torch.ones_like(rank_E)
    if shape.load == "zipf":
        share_E = 1 / rank_E
    if shape.load == "one":
        # 60% of the first choices, and then of what is left after them.
        share_E[0] = 1.5 * (shape.num_experts - 1)
    noise_TE = -torch.log(-torch.log(torch.rand(shape.tokens, shape.num_experts, device=device).clamp(1e-9, 1 - 1e-7)))
    return TopK(shape.top_k)(noise_TE + share_E.log())[0]


def _spread(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(median, 4), "low": round(low, 4), "high": round(high, 4)}


def _cuda_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()
