"""Which tiles are fastest for the Triton backend on this GPU: a few a launch, for each pair of widths, into a table.

- `CANDIDATES`: the tiles that are tried beside those in use. All of them compile for an H200 without spilling a register
  (tests/moe/test_triton_compiles.py, with REPRO_ALL_TILES=1)
- `measure`: for each pair of widths of `repro bench moe`, at its largest even shape, each launch by each of its tiles

Before they are timed all kernels are compiled, by as many threads as there are cores. A tile that does not run, or whose result
is not that of the tile in use to rounding, is refused and named. The tile in use stays unless another takes less than `_GAIN`
of its time. What was chosen is then held against the loop, forward and backward, before it enters the table.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from records.errors import UsageError
from repro.bench.moe import CLOSE, CUDA_SHAPES, Shape, apart, slots
from repro.bench.peers import first_line
from repro.moe import Routing, apply_experts, triton
from repro.moe.tiles import LAUNCHES, Table, Tile, Tiles, use
from repro.moe.tiles import table as table_in_use

# The gathers of a weight's gradient go through an index that is itself loaded, and Triton spends two stages a buffer on it: 5
# stages give it three buffers, where the others have three from 3.
_ROWS = (
    Tile(128, 128, 64, 8, 3),
    Tile(128, 128, 64, 8, 3, 2),
    Tile(128, 128, 64, 8, 4),
    Tile(128, 128, 128, 8, 2),
    Tile(128, 128, 64, 4, 3, 2),
    Tile(128, 256, 64, 8, 3),
    Tile(128, 256, 64, 8, 4),
    Tile(256, 128, 64, 8, 3),
    # Two or three programs a multiprocessor, one of which writes while another multiplies: where experts are narrow, so is
    # the sum, and a tile spends as long on its ends as on its middle.
    Tile(128, 128, 64, 8, 2, 2),
    Tile(64, 128, 64, 4, 4, 2),
    Tile(64, 128, 64, 4, 3, 3),
)
_WEIGHTS = (
    Tile(128, 128, 64, 8, 3),
    Tile(128, 128, 64, 8, 5),
    Tile(128, 128, 64, 8, 5, 2),
    Tile(128, 128, 64, 4, 5, 2),
    Tile(128, 128, 128, 8, 3),
    Tile(128, 256, 64, 8, 5),
    Tile(256, 128, 64, 8, 5),
    Tile(64, 128, 64, 4, 5, 3),
)
CANDIDATES: Mapping[str, Sequence[Tile]] = {
    "up": (
        Tile(128, 128, 64, 8, 3),
        Tile(128, 128, 64, 8, 4),
        Tile(128, 128, 128, 8, 2),
        Tile(128, 64, 64, 8, 3, 2),
        Tile(128, 64, 64, 4, 3, 2),
        Tile(256, 64, 64, 8, 3),
        Tile(64, 128, 64, 4, 2, 2),
        Tile(64, 64, 64, 4, 3, 3),
    ),
    "down": _ROWS,
    "combine": (
        Tile(1, 256, 1, 1, 1),
        Tile(1, 256, 1, 4, 1),
        Tile(1, 512, 1, 2, 1),
        Tile(1, 512, 1, 4, 1),
        Tile(1, 1024, 1, 4, 1),
        Tile(1, 2048, 1, 8, 1),
    ),
    "d_hidden": (
        Tile(128, 64, 64, 8, 3),
        Tile(128, 64, 64, 8, 4),
        Tile(128, 128, 64, 8, 3),
        Tile(128, 128, 64, 8, 4),
        Tile(64, 128, 64, 4, 3, 2),
        Tile(64, 128, 64, 8, 3, 2),
        Tile(64, 64, 64, 4, 3, 2),
    ),
    "dx": _ROWS,
    "dw_up": _WEIGHTS,
    "dw_down": _WEIGHTS,
}
_GAIN = 0.98  # a smaller difference is the noise of a short measurement

Run = Callable[[Tile], tuple[Tensor, ...]]
"""A launch by a tile: its results."""


def measure(
    *,
    device: str = "cuda",
    budget: float | None = None,
    start: Table | None = None,
    shapes: Sequence[Shape] | None = None,
    candidates: Mapping[str, Sequence[Tile]] = CANDIDATES,
    done: Callable[[Table], object] = lambda _: None,
) -> tuple[dict[str, Any], Table]:
    """What was measured, as data for `repro bench tune`, and `start` (else the table in use) with what was found.

    Widths that `start` holds are left alone, and none are begun when `budget` minutes have passed. `done` is given the table
    after each pair. In bfloat16 on CUDA; on the CPU, which only an interpreted Triton runs on, in float32. Raises `UsageError`
    where Triton does not run on the device.
    """
    began = time.monotonic()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    there = device != "cuda" or torch.cuda.device_count() > 0
    if not there or not triton.supports(torch.empty(0, device=device, dtype=dtype)):
        missing = "no triton for it" if there else "no GPU"
        raise UsageError(f"bench tune: expected triton, and a GPU that torch sees, found {missing} (device {device})")
    table = start or table_in_use()
    place = _place(device)
    results, left = [], 0
    for shape in _widest(shapes or CUDA_SHAPES):
        key = (shape.d_model, shape.d_expert, str(dtype).removeprefix("torch."))
        if key in table.measured:
            continue
        if budget is not None and time.monotonic() - began > 60 * budget:
            left += 1
            continue
        result: dict[str, Any] = dict(zip(("d_model", "d_expert", "dtype"), key, strict=True))
        result |= {"tokens": shape.tokens, "num_experts": shape.num_experts, "top_k": shape.top_k, "kept": False}
        results.append(result)
        try:
            grown, found = _tune(shape, device, dtype, replace(table, places={**table.places, key: place}), candidates)
        except Exception as error:  # Triton's have no root in common
            result["failed"] = first_line(error)
            continue
        finally:
            if device == "cuda":
                torch.cuda.empty_cache()
        result |= found
        if all(value <= CLOSE[dtype] for value in found["difference"].values()):
            result["kept"], table = True, grown
            done(table)
    return {
        "schema": "repro.bench.tune/v1",
        "place": place,
        "minutes": round((time.monotonic() - began) / 60, 2),
        "widths": results,
        "widths_left": left,
    }, table


def _tune(
    shape: Shape, device: str, dtype: torch.dtype, table: Table, candidates: Mapping[str, Sequence[Tile]]
) -> tuple[Table, dict[str, Any]]:
    """The table with the tiles chosen for the widths of `shape`, and what was measured."""
    key = (shape.d_model, shape.d_expert, str(dtype).removeprefix("torch."))
    torch.manual_seed(0)
    now = table.find(*key)
    case = _Case(shape, torch.device(device), dtype, now)
    launches, chosen = _choose(case, now, candidates)
    grown = replace(table, measured={**table.measured, key: chosen})
    with use(grown):
        return grown, {"launches": launches, "difference": case.difference()}


def _place(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else "interpreter"
    import triton as library  # only ever imported where `supports` has found it

    return (
        f"{name}, torch {torch.__version__}, triton {library.__version__}, {time.strftime('%Y-%m-%d', time.gmtime())}"
    )


def _widest(shapes: Sequence[Shape]) -> list[Shape]:
    """The even shape of most tokens for each pair of widths, in the order in which the pairs come."""
    found: dict[tuple[int, int], Shape] = {}
    for shape in shapes:
        pair = (shape.d_model, shape.d_expert)
        if shape.load == "balanced" and shape.tokens > (found[pair].tokens if pair in found else 0):
            found[pair] = shape
    return list(found.values())


@dataclass(slots=True, init=False)
class _Case:
    """The tensors of one shape, and each launch on them."""

    runs: dict[str, Run]
    _inputs: tuple[Tensor, Routing, Tensor, Tensor]
    _dy_TD: Tensor

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, tiles: Tiles) -> None:
        T, D, F, E = shape.tokens, shape.d_model, shape.d_expert, shape.num_experts
        x_TD, dy_TD = (torch.randn(T, D, device=device, dtype=dtype) for _ in range(2))
        up = torch.randn(E, D, 2 * F, device=device, dtype=dtype).mul_(D**-0.5)
        down = torch.randn(E, F, D, device=device, dtype=dtype).mul_(F**-0.5)
        expert_TK = slots(shape, device)
        weight_TK = torch.rand(expert_TK.shape, device=device)
        routing = Routing.from_slots(expert_TK, weight_TK, E, all_filled=True)
        plan = triton.plan(routing)
        s_N = routing.weight_N[routing.order_N]
        # What each launch reads is made by the tiles in use, so that any one of them can be changed alone.
        h_NF, a_NF = triton.up(plan, tiles.up, x_TD, up, s_N)
        out_ND = triton.down(plan, tiles.down, a_NF, down)
        dh_NF, scaled_NF, _ = triton.d_hidden(plan, tiles.d_hidden, dy_TD, down, h_NF, s_N)
        self._inputs, self._dy_TD = (x_TD, routing, up, down), dy_TD
        self.runs = {
            "up": lambda tile: triton.up(plan, tile, x_TD, up, s_N),
            "down": lambda tile: (triton.down(plan, tile, a_NF, down),),
            "combine": lambda tile: (triton.combine(plan, tile, out_ND),),
            "d_hidden": lambda tile: triton.d_hidden(plan, tile, dy_TD, down, h_NF, s_N),
            "dx": lambda tile: (triton.dx(plan, tile, dh_NF, up),),
            "dw_up": lambda tile: (triton.dw_up(plan, tile, x_TD, dh_NF, up),),
            "dw_down": lambda tile: (triton.dw_down(plan, tile, scaled_NF, dy_TD, down),),
        }

    def difference(self) -> dict[str, float]:
        """How far the backend is from the loop with the table in use: the output and its four gradients, as shares."""
        x_TD, routing, up, down = self._inputs
        leaves = [z.detach().requires_grad_() for z in (x_TD, routing.weight_N, up, down)]
        routing = replace(routing, weight_N=leaves[1])

        def results(backend: str) -> list[Tensor]:
            y_TD = apply_experts(leaves[0], routing, leaves[2], leaves[3], backend)
            return [y_TD.detach(), *torch.autograd.grad(y_TD, leaves, self._dy_TD)]

        names = ("y", "dx", "dweight", "dup", "ddown")
        return {
            name: apart(found, expected)
            for name, found, expected in zip(names, results("triton"), results("reference"), strict=True)
        }


def _choose(
    case: _Case, now: Tiles, candidates: Mapping[str, Sequence[Tile]]
) -> tuple[dict[str, dict[str, Any]], Tiles]:
    tried = {
        launch: [getattr(now, launch), *(tile for tile in candidates[launch] if tile != getattr(now, launch))]
        for launch in LAUNCHES
    }
    _compile([(case.runs[launch], tile) for launch in LAUNCHES for tile in tried[launch]], case)
    report, chosen = {}, {}
    for launch in LAUNCHES:
        run, first = case.runs[launch], tried[launch][0]
        expected = run(first)
        milliseconds = {first: _time(run, first, expected[0].device)}
        refused: dict[str, str] = {}
        for tile in tried[launch][1:]:
            try:
                worst = max(apart(found, wanted) for found, wanted in zip(run(tile), expected, strict=True))
                if not worst <= CLOSE[expected[0].dtype]:
                    refused[_name(tile)] = f"differs from {_name(first)} by {worst:.2g}"
                    continue
                milliseconds[tile] = _time(run, tile, expected[0].device)
            except Exception as error:  # what does not compile, or asks for more shared memory than there is
                refused[_name(tile)] = first_line(error)
        fastest = min(milliseconds, key=lambda tile: milliseconds[tile])
        chosen[launch] = fastest if milliseconds[fastest] < _GAIN * milliseconds[first] else first
        report[launch] = {
            "tile": list(astuple(chosen[launch])),
            "before": round(milliseconds[first], 4),
            "after": round(milliseconds[chosen[launch]], 4),
            "milliseconds": {_name(tile): round(value, 4) for tile, value in milliseconds.items()},
            "refused": refused,
        }
        del expected
    return report, Tiles(**chosen)


def _compile(jobs: Sequence[tuple[Run, Tile]], case: _Case) -> None:
    """Have each run once, so that it is compiled; what fails does so again when its turn comes, and is named then."""
    if case._dy_TD.device.type != "cuda":
        return

    def attempt(job: tuple[Run, Tile]) -> None:
        run, tile = job
        try:
            run(tile)
        except Exception:
            return

    # A few at a time: each holds its results, which may be gigabytes.
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        list(pool.map(attempt, jobs))
    torch.cuda.synchronize()


def _time(run: Run, tile: Tile, device: torch.device) -> float:
    """Milliseconds of a launch, the median of several; on a GPU with cold caches."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(lambda: run(tile), warmup=5, rep=30, return_mode="median"))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run(tile)
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def _name(tile: Tile) -> str:
    return " ".join(map(str, astuple(tile)))
