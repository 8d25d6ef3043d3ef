"""How fast the MoE layer is, against the dense feed-forward of the same FLOPs and against torch's own pieces.

For each shape and way of routing, in turn, over several rounds whose order alternates, forward and backward:
- `dense`: a SwiGLU of width k·d_expert on the same tokens, the floor: the same GEMM FLOPs with nothing to route
- `layer`: `repro.moe.MoE` as a user calls it, router included, with the backend `auto`
- one of each backend that runs there: the experts alone, on a routing made beforehand
- `torch`: `grouped_mm` composed by hand and differentiated by autograd, as torch's documentation would have one do
- the libraries of `repro.bench.peers` that are installed
- `gemms`: the six GEMMs an expert of this routing, on rows in place and into memory at hand, on a GPU in cuBLAS and replayed as a
  graph. What they cost beyond `dense` is the price of many weights (reading them, writing their gradients, smaller products),
  which no layer can avoid
- on a GPU `layer-triton`, the layer with that backend, and `deterministic` forms of both layers, under the flags of training

A ratio is taken within a round, so that a busy machine slows both of its sides; it is given as the median and the
quartiles over rounds. On the CPU the clock is the process's own time on one thread, so other processes' turns do not
count. On a GPU it is the device's: before each turn a buffer larger than its caches is overwritten, which leaves them cold and
gives the host a head start of about a millisecond; where the host is slower than the device beyond that, its time is counted.

Whoever computes the experts is first held against the loop (`difference`); who differs or fails is not timed, and named.
"""

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as nnf

from records.errors import UsageError
from repro.bench import peers
from repro.moe import MoE, Routing, SwiGLU, TopK, apply_experts, triton
from repro.moe.grouped import supports
from repro.moe.routing import scores_of

Load = Literal["balanced", "zipf", "one", "mixed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What is measured. `load`: even; Zipf's law with exponent 1; 60% of the first choices to one expert; or `mixed`, even with
    a k for each token, drawn from 1 to `top_k`, where `dense` is as wide as the mean k makes it.

    `goal` bounds the ratio of `layer` to `dense` that the project set itself, `share` the part of the rate of `gemms` that
    `triton` is to reach; None where it set none.
    """

    tokens: int
    d_model: int
    d_expert: int
    num_experts: int
    top_k: int
    load: Load = "balanced"
    goal: float | None = None
    share: float | None = None

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
    Shape(tokens=T, d_model=D, d_expert=F, num_experts=E, top_k=K, share=0.65 if F < 1024 else 0.80)
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
# How far two computations of the same experts may be apart, as a share of the result's norm.
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
_COLD_BYTES = 4 << 30


def measure(
    *, device: str = "cpu", shapes: Sequence[Shape] | None = None, rounds: int = 8, budget: float | None = None
) -> dict[str, Any]:
    """Milliseconds and ratios for each shape, as data for `repro bench moe`.

    On the CPU in float32 on one thread; on CUDA in bfloat16. The first round only warms up. No shape is begun when `budget`
    minutes have passed. Raises `UsageError` for a device that is not there or fewer than 2 rounds.
    """
    began = time.monotonic()
    if rounds < 2:
        raise UsageError(f"bench moe: expected at least 2 rounds, to see a spread, found {rounds}")
    if device not in ("cpu", "cuda") or (device == "cuda" and torch.cuda.device_count() == 0):
        raise UsageError(f"bench moe: expected cpu, or cuda where torch sees a GPU, found {device!r}")
    threads = torch.get_num_threads()
    state = torch.random.get_rng_state()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for the deterministic forms
    results: list[dict[str, Any]] = []
    try:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        chosen = shapes or (CPU_SHAPES if device == "cpu" else CUDA_SHAPES)
        for shape in chosen:
            if budget is not None and time.monotonic() - began > 60 * budget:
                break
            results.append(_measured(shape, torch.device(device), rounds))
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
        "peers": peers.versions(),
        "shapes": results,
        "shapes_left": len(chosen) - len(results),
    }


Forward = Callable[[], Tensor]
Backward = Callable[[Tensor], object]
Lap = Callable[[Forward, Backward], tuple[float, float]]
"""Seconds of a forward pass, and of it and the backward pass."""


def _measured(shape: Shape, device: torch.device, rounds: int) -> dict[str, Any]:
    """One shape's figures; where it cannot be measured at all, the reason, and the other shapes still are."""
    fields = {
        "tokens": shape.tokens,
        "d_model": shape.d_model,
        "d_expert": shape.d_expert,
        "num_experts": shape.num_experts,
        "top_k": shape.top_k,
        "load": shape.load,
    }
    try:
        return fields | _measure_shape(shape, device, rounds)
    except RuntimeError as error:
        return fields | {"failed": {"shape": peers.first_line(error)}}
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _measure_shape(shape: Shape, device: torch.device, rounds: int) -> dict[str, Any]:
    contestants, absent = _contestants(shape, device)
    difference, failed = _check(contestants, device)
    lap = _cuda_lap() if device.type == "cuda" else _cpu_lap
    forward: dict[str, list[float]] = {name: [] for name in contestants}
    total: dict[str, list[float]] = {name: [] for name in contestants}
    names = [name for name in contestants if name not in failed]
    for turn in range(rounds + 1):
        for name in names if turn % 2 else names[::-1]:
            if name in failed:
                continue
            try:
                forward_s, total_s = lap(*contestants[name])
            except Exception as error:  # of foreign code, or memory that ran out: the others are still measured
                failed[name] = peers.first_line(error)
                continue
            if turn:
                forward[name].append(forward_s)
                total[name].append(total_s)
    if "dense" in failed:
        raise RuntimeError(f"the dense layer: {failed['dense']}")
    names = [name for name in names if name not in failed]
    ratios = {name: _ratios(total[name], total["dense"]) for name in names}
    backward = {name: [b - a for a, b in zip(forward[name], total[name], strict=True)] for name in names}
    result: dict[str, Any] = {
        "forward_ms": {name: _spread([1e3 * value for value in forward[name]]) for name in names},
        "total_ms": {name: _spread([1e3 * value for value in total[name]]) for name in names},
        "gflop_per_s": {name: round(shape.flops / statistics.median(total[name]) / 1e9, 1) for name in names},
        "ratio_to_dense": ratios,
        "difference": difference,
        "absent": absent,
        "failed": failed,
    }
    if shape.goal is not None:
        result["goal"] = {"layer_ratio": shape.goal, "met": ratios["layer"]["median"] <= shape.goal}
    if device.type == "cuda":
        for part, seconds, flops in (("forward", forward, shape.flops / 3), ("backward", backward, shape.flops / 1.5)):
            result[f"{part}_tflop_per_s"] = {
                name: round(flops / statistics.median(seconds[name]) / 1e12, 1) for name in names
            }
            if "gemms" in names:
                result[f"{part}_share_of_gemms"] = {name: _ratios(seconds["gemms"], seconds[name]) for name in names}
        result["cost_of_determinism"] = {
            name: _ratios(total[f"{name}-deterministic"], total[name])
            for name in ("layer", "layer-triton")
            if name in names and f"{name}-deterministic" in names
        }
        if shape.share is not None and {"gemms", "triton"} <= set(names):
            reached = _ratios(total["gemms"], total["triton"])
            result["goal"] = {
                "share_of_gemms": shape.share,
                "reached": reached,
                "met": reached["median"] >= shape.share,
            }
    return result


def _check(
    contestants: dict[str, tuple[Forward, Backward]], device: torch.device
) -> tuple[dict[str, float], dict[str, str]]:
    """How far each one's experts are from the loop's, and who is too far or fails. The layers have gates of their own."""
    difference: dict[str, float] = {}
    failed: dict[str, str] = {}
    with torch.no_grad():
        expected_TD = contestants["reference"][0]()
        limit = CLOSE[expected_TD.dtype]
        for name, (forward, _) in contestants.items():
            if name in ("dense", "gemms", "reference") or name.startswith("layer"):
                continue
            try:
                found_TD = forward()
                difference[name] = apart(found_TD, expected_TD)
            except Exception as error:  # see above
                failed[name] = peers.first_line(error)
                continue
            if not difference[name] <= limit:
                failed[name] = f"expected the loop's result to {limit}, found a difference of {difference[name]:.2g}"
    return difference, failed


def _contestants(shape: Shape, device: torch.device) -> tuple[dict[str, tuple[Forward, Backward]], dict[str, str]]:
    """Each way to compute it; and why a peer is not among them."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    T, D, E, K = shape.tokens, shape.d_model, shape.num_experts, shape.top_k
    x_TD = torch.randn(T, D, device=device, dtype=dtype, requires_grad=True)
    dy_TD = torch.randn_like(x_TD)
    with device:  # a billion weights are drawn there
        dense = SwiGLU(D, shape.width).to(dtype)
        moe = MoE(d_model=D, d_expert=shape.d_expert, num_experts=E, top_k=K).to(dtype)
    even = shape.load != "mixed"
    rule = _Loaded(slots(shape, device), fills_all=True if even else None)
    slots_TK, gate_TK = rule(torch.rand(T, E, device=device), None)
    routing = Routing.from_slots(slots_TK, gate_TK, E, all_filled=even)
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

    def layer(backend: str) -> tuple[Forward, Backward]:
        def forward() -> Tensor:
            moe.backend = backend
            y_TD: Tensor = moe(x_TD, rule)
            return y_TD

        return differentiated(forward, x_TD, *moe.parameters())

    contestants = {"dense": differentiated(lambda: dense(x_TD), x_TD, *dense.parameters()), "layer": layer("auto")}
    contestants["gemms"] = _gemms(routing, up.detach(), down.detach())
    if device.type == "cpu":
        contestants["cpu"] = on("cpu")
    if supports(x_TD, down):
        contestants["grouped"] = on("grouped")
        contestants["torch"] = differentiated(torchs, x_TD, weight_N, up, down)
    if device.type == "cuda":
        contestants["layer-deterministic"] = _deterministic(*layer("auto"))
        if triton.supports(x_TD):
            contestants["triton"] = on("triton")
            contestants["layer-triton"] = layer("triton")
            contestants["layer-triton-deterministic"] = _deterministic(*layer("triton"))
    inputs = peers.Inputs(
        x_TD=x_TD, routing=routing, slots_TK=slots_TK, gate_TK=gate_TK, w_up_EDF=up, w_down_EFD=down, even=even
    )
    found, absent = peers.peers(inputs)
    contestants |= {name: differentiated(forward, *leaves) for name, (forward, leaves) in found.items()}
    contestants["reference"] = on("reference")
    return contestants, absent


def _deterministic(forward: Forward, backward: Backward) -> tuple[Forward, Backward]:
    """The same under the flags that training sets."""

    def flagged_forward() -> Tensor:
        with _flags():
            return forward()

    def flagged_backward(y_TD: Tensor) -> None:
        with _flags():
            backward(y_TD)

    return flagged_forward, flagged_backward


@contextlib.contextmanager
def _flags() -> Iterator[None]:
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def _gemms(routing: Routing, w_up_EDF: Tensor, w_down_EFD: Tensor) -> tuple[Forward, Backward]:
    """The six products of each expert's rows, which lie in expert-major order already, and nothing else."""
    F, D = w_down_EFD.shape[1:]
    loads = routing.load_E.tolist()
    x_ND, h_NF, a_NF, y_ND = (
        torch.randn(sum(loads), width, dtype=w_up_EDF.dtype, device=w_up_EDF.device) for width in (D, 2 * F, F, D)
    )
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

    if w_up_EDF.is_cuda:
        # As a graph, for launched one by one hundreds of small products would wait for the host.
        replay_forward, replay_backward = _replayed(forward), _replayed(lambda: backward(y_ND))

        def replayed() -> Tensor:
            replay_forward()
            return y_ND

        return replayed, lambda _: replay_backward()
    return forward, backward


def _replayed(work: Callable[[], object]) -> Callable[[], None]:
    """`work` as a CUDA graph, captured at the first call: each call replays its kernels."""
    graphs: list[torch.cuda.CUDAGraph] = []

    def replay() -> None:
        if not graphs:
            work()  # handles and workspaces are made outside of the capture
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                work()
            graphs.append(graph)
        graphs[0].replay()

    return replay


@dataclass(frozen=True, slots=True)
class _Loaded:
    """Top-k as it costs, and then the prepared choice in place of its own: the router does not set the load."""

    expert_TK: Tensor
    fills_all: bool | None = None

    def __call__(self, scores_TE: Tensor, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
        empty_TK = self.expert_TK < 0
        TopK(self.expert_TK.shape[1])(scores_TE, bias_E)
        if self.fills_all:
            weight_TK = scores_of(scores_TE, self.expert_TK)
        else:
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


def _ratios(mine: list[float], theirs: list[float]) -> dict[str, float]:
    return _spread([a / b for a, b in zip(mine, theirs, strict=True)])


def apart(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference of two tensors of one shape, as a share of the norm of what was expected."""
    norm = torch.linalg.vector_norm(expected, dtype=torch.float32).clamp_min(1e-30)
    return float(torch.linalg.vector_norm(found - expected, dtype=torch.float32) / norm)


def _cpu_lap(forward: Forward, backward: Backward) -> tuple[float, float]:
    start = time.process_time()
    y_TD = forward()
    middle = time.process_time()
    backward(y_TD)
    return middle - start, time.process_time() - start


def _cuda_lap() -> Lap:
    cold = torch.empty(_COLD_BYTES, dtype=torch.uint8, device="cuda")
    start, middle, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(3)
    )

    def lap(forward: Forward, backward: Backward) -> tuple[float, float]:
        cold.zero_()
        start.record()
        y_TD = forward()
        middle.record()
        backward(y_TD)
        end.record()
        end.synchronize()
        return start.elapsed_time(middle) / 1e3, start.elapsed_time(end) / 1e3

    return lap
