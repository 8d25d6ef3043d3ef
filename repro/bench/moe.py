"""How fast the MoE layer is, against the dense feed-forward of the same FLOPs and against torch's own pieces.

For each shape and way of routing, in turn, over several rounds whose order alternates, forward and backward:
- `dense`: a SwiGLU of width k·d_expert on the same tokens, the floor: the same GEMM FLOPs with nothing to route
- `layer`: `repro.moe.MoE` as a user calls it, router included, with the backend `auto`
- one of each backend that runs there: the experts alone, on a routing made beforehand
- `torch`: `grouped_mm` composed by hand and differentiated by autograd, as torch's documentation would have one do
- `transformers`, `transformers-eager`: that library's own experts on the same routing, by its grouped GEMMs and by its loop
- `gemms`, on the CPU: the six GEMMs an expert of this routing, on rows in place and into memory at hand. What they cost beyond
  `dense` is the price of many weights (reading them, writing their gradients, smaller products), which no layer can avoid

A ratio is taken within a round, so that a busy machine slows both of its sides; it is given as the median and the
quartiles over rounds. On the CPU the clock is the process's own time on one thread, so other processes' turns do not
count.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as nnf

from records.errors import UsageError
from repro.moe import MoE, Routing, SwiGLU, TopK, apply_experts, triton
from repro.moe.grouped import supports

Load = Literal["balanced", "zipf", "one", "mixed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What is measured. `load`: even; Zipf's law with exponent 1; 60% of the first choices to one expert; or `mixed`, even with
    a k for each token, drawn from 1 to `top_k`, where `dense` is as wide as the mean k makes it.

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
    def width(self) -> int:
        """Width of the dense layer of the same FLOPs."""
        return self.d_expert * (self.top_k + 1) // 2 if self.load == "mixed" else self.d_expert * self.top_k

    @property
    def flops(self) -> int:
        """GEMM FLOPs of the experts, forward and backward: 6 a weight an assignment."""
        return 6 * self.tokens * self.width * 3 * self.d_model


CPU_SHAPES = (
    Shape(tokens=4096, d_model=256, d_expert=256, num_experts=32, top_k=4, goal=1.10),
    Shape(tokens=4096, d_model=256, d_expert=128, num_experts=64, top_k=8, goal=1.30),
    Shape(tokens=4096, d_model=512, d_expert=256, num_experts=64, top_k=4, goal=1.30),
    Shape(tokens=512, d_model=256, d_expert=256, num_experts=32, top_k=4, goal=1.30),
    Shape(tokens=4096, d_model=256, d_expert=256, num_experts=32, top_k=4, load="zipf"),
    Shape(tokens=4096, d_model=256, d_expert=256, num_experts=32, top_k=4, load="one"),
    Shape(tokens=4096, d_model=256, d_expert=256, num_experts=32, top_k=8, load="mixed"),
    Shape(tokens=1024, d_model=64, d_expert=32, num_experts=16, top_k=2),
)
_UNEVEN: tuple[Load, ...] = ("zipf", "one", "mixed")
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
) + tuple(Shape(tokens=32_768, d_model=2048, d_expert=768, num_experts=128, top_k=8, load=load) for load in _UNEVEN)


def measure(*, device: str = "cpu", shapes: Sequence[Shape] | None = None, rounds: int = 8) -> dict[str, Any]:
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
        torch.manual_seed(0)
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
Backward = Callable[[Tensor], object]


def _measure_shape(shape: Shape, device: torch.device, rounds: int) -> dict[str, Any]:
    contestants = _contestants(shape, device)
    clock = _cuda_clock if device.type == "cuda" else time.process_time
    forward: dict[str, list[float]] = {name: [] for name in contestants}
    total: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(rounds + 1):
        for name in names if turn % 2 else reversed(names):
            forward_pass, backward_pass = contestants[name]
            start = clock()
            y_TD = forward_pass()
            middle = clock()
            backward_pass(y_TD)
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


def _contestants(shape: Shape, device: torch.device) -> dict[str, tuple[Forward, Backward]]:
    """Each way to compute it."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    T, D, E, K = shape.tokens, shape.d_model, shape.num_experts, shape.top_k
    x_TD = torch.randn(T, D, device=device, dtype=dtype, requires_grad=True)
    dy_TD = torch.randn_like(x_TD)
    dense = SwiGLU(D, shape.width).to(device, dtype)
    moe = MoE(d_model=D, d_expert=shape.d_expert, num_experts=E, top_k=K).to(device, dtype)
    rule = _Loaded(slots(shape, device))
    slots_TK, gate_TK = rule(torch.rand(T, E, device=device), None)
    routing = Routing.from_slots(slots_TK, gate_TK, E, all_filled=shape.load != "mixed")
    weight_N = routing.weight_N.requires_grad_()
    gate_TK = gate_TK.detach().to(dtype).requires_grad_()
    up, down = moe.w_up_EDF, moe.w_down_EFD

    def torchs() -> Tensor:
        rows_N = routing.token_N[routing.order_N]
        ends_E = routing.by_expert[1:].to(torch.int32)
        gate, lift = nnf.grouped_mm(x_TD[rows_N], up, offs=ends_E).chunk(2, dim=1)
        out_ND = nnf.grouped_mm(nnf.silu(gate) * lift, down, offs=ends_E)
        weighted_ND = out_ND * weight_N[routing.order_N, None].to(dtype)
        return torch.zeros_like(x_TD).index_add(0, rows_N, weighted_ND)

    def differentiated(forward: Forward, *leaves: Tensor) -> tuple[Forward, Backward]:
        return forward, lambda y_TD: torch.autograd.grad(y_TD, leaves, dy_TD)

    def on(backend: str) -> tuple[Forward, Backward]:
        return differentiated(lambda: apply_experts(x_TD, routing, up, down, backend), x_TD, weight_N, up, down)

    contestants = {
        "dense": differentiated(lambda: dense(x_TD), x_TD, *dense.parameters()),
        "layer": differentiated(lambda: moe(x_TD, rule), x_TD, *moe.parameters()),
    }
    if device.type == "cpu":
        contestants["gemms"] = _gemms(routing, up.detach(), down.detach())
        contestants["cpu"] = on("cpu")
    if supports(x_TD, down):
        contestants["grouped"] = on("grouped")
        contestants["torch"] = differentiated(torchs, x_TD, weight_N, up, down)
    if device.type == "cuda" and triton.supports(x_TD):
        contestants["triton"] = on("triton")
    if importlib.util.find_spec("transformers") is not None and shape.load != "mixed":
        for name, how in (("transformers", "grouped_mm"), ("transformers-eager", "eager")):
            theirs = _transformers(shape, how).to(device, dtype)
            run = partial(theirs, x_TD, slots_TK, gate_TK)
            contestants[name] = differentiated(run, x_TD, gate_TK, *theirs.parameters())
    contestants["reference"] = on("reference")
    return contestants


def _gemms(routing: Routing, w_up_EDF: Tensor, w_down_EFD: Tensor) -> tuple[Forward, Backward]:
    """The six products of each expert's rows, which lie in expert-major order already, and nothing else."""
    F, D = w_down_EFD.shape[1:]
    loads = routing.load_E.tolist()
    x_ND, h_NF, a_NF, y_ND = (torch.randn(sum(loads), width) for width in (D, 2 * F, F, D))
    rows = [torch.split(z, loads) for z in (x_ND, h_NF, a_NF, y_ND)]
    dup, ddown = torch.zeros_like(w_up_EDF), torch.zeros_like(w_down_EFD)

    def forward() -> Tensor:
        for x, h, a, y, up, down in zip(*rows, w_up_EDF, w_down_EFD, strict=True):
            torch.mm(x, up, out=h)
            torch.mm(a, down, out=y)
        return y_ND

    def backward(_: Tensor) -> None:
        for x, h, a, y, up, down, to_up, to_down in zip(*rows, w_up_EDF, w_down_EFD, dup, ddown, strict=True):
            torch.mm(a.t(), y, out=to_down)
            torch.mm(y, down.t(), out=a)
            torch.mm(x.t(), h, out=to_up)
            torch.mm(h, up.t(), out=y)

    return forward, backward


def _transformers(shape: Shape, how: str) -> torch.nn.Module:
    """The experts of transformers' Qwen3-MoE: (x (T, D), experts (T, K), weights (T, K)) to (T, D)."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=shape.d_model,
        moe_intermediate_size=shape.d_expert,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        experts_implementation=how,
    )
    experts: torch.nn.Module = Qwen3MoeExperts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=shape.d_model**-0.5)
    return experts


@dataclass(frozen=True, slots=True)
class _Loaded:
    """Top-k as it costs, and then the prepared choice in place of its own: the router does not set the load."""

    expert_TK: Tensor

    def __call__(self, scores_TE: Tensor, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
        empty_TK = self.expert_TK < 0
        TopK(self.expert_TK.shape[1])(scores_TE, bias_E)
        weight_TK = scores_TE.gather(1, self.expert_TK.clamp_min(0)).masked_fill(empty_TK, 0)
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
    k: int | Tensor = shape.top_k
    if shape.load == "mixed":
        k = torch.randint(1, shape.top_k + 1, (shape.tokens,), device=device)
    noise_TE = -torch.log(-torch.log(torch.rand(shape.tokens, shape.num_experts, device=device).clamp(1e-9, 1 - 1e-7)))
    return TopK(k)(noise_TE + share_E.log())[0]


def _spread(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(median, 4), "low": round(low, 4), "high": round(high, 4)}


def _cuda_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()
