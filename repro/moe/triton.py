"""The Triton backend: the experts in six kernels, with the backward of `repro.moe.cpu` and nothing that waits for the device.

- `_up`       gathers x, multiplies by gate and up, applies SwiGLU and the weight; keeps the pre-activation for the backward
- `_rows`     multiplies each row by its expert's matrix and writes it to its place in token order (down, and dx)
- `_combine`  sums each token's rows in slot order
- `_d_hidden` dA', then dH, s·A and ds, the last as one partial sum a tile, added up in a fixed order
- `_weights`  the gradient of a weight: one program owns each tile and walks the expert's rows in order

No atomics, no split of a sum between programs: equal inputs give equal bits. A row of y or dx does not depend on the other
rows of the batch, because tile sizes follow from the widths and the dtype alone. The number of experts is a plain argument,
so a growing pool compiles nothing again. Products are summed in float32.

Run in float32 under TRITON_INTERPRET=1 by the tests (the interpreter's bfloat16 dot is wrong); tile sizes are not tuned yet.
"""

import functools
import importlib
import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repro.moe.errors import RoutingError
from repro.moe.routing import Routing


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on the CPU; to be set before the first of them is called."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def supports(x_TD: Tensor) -> bool:
    """Whether Triton is there and takes these: float32, or a half type on CUDA; float32 on the CPU if interpreted."""
    if importlib.util.find_spec("triton") is None:
        return False
    if x_TD.device.type == "cuda":
        return x_TD.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return interpreted() and x_TD.dtype == torch.float32


def apply(x_TD: Tensor, routing: Routing, w_up_EDF: Tensor, w_down_EFD: Tensor) -> Tensor:
    """Weighted sum (T, D) of each token's experts; see `repro.moe.experts`."""
    if not supports(x_TD):
        raise RoutingError(
            f"backend triton: expected triton installed and float32, bfloat16 or float16 on CUDA, found {x_TD.dtype} on "
            f"{x_TD.device}; use the backend auto"
        )
    y_TD: Tensor = _Experts.apply(  # type: ignore[no-untyped-call]
        x_TD.contiguous(), routing.weight_N, w_up_EDF.contiguous(), w_down_EFD.contiguous(), routing
    )
    return y_TD


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows, columns and depth of a tile, and how many warps and pipeline stages work on it."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


def tiles_for(d_model: int, d_expert: int, dtype: torch.dtype) -> Tiles:
    """The tile sizes for these widths: a frozen choice, so that a result never depends on what ran before it."""
    if interpreted():
        return Tiles(rows=16, cols=32, depth=16, warps=4, stages=1)
    if dtype == torch.float32:
        return Tiles(rows=64, cols=64, depth=32, warps=4, stages=2)
    if min(d_model, d_expert) < 128:
        return Tiles(rows=64, cols=64, depth=64, warps=4, stages=3)
    return Tiles(rows=128, cols=128, depth=64, warps=8, stages=3)


@dataclass(frozen=True, slots=True)
class _Plan:
    """Which rows each tile of rows holds, for any number of programs; made on the device, read by the kernels."""

    tiles: Tiles
    token_N: Tensor  # in expert-major order, like all rows below
    order_N: Tensor
    by_token: Tensor
    by_expert: Tensor
    tile_expert: Tensor  # -1 past the last tile
    tile_first: Tensor


def _plan(routing: Routing, tiles: Tiles) -> _Plan:
    """As many tiles as could be needed for any load, N/rows and one more an expert, so that nobody has to count them."""
    loads_E = routing.load_E
    tiles_E = (loads_E + (tiles.rows - 1)) // tiles.rows
    ends_E = tiles_E.cumsum(0)
    most = routing.token_N.numel() // tiles.rows + routing.num_experts
    tile = torch.arange(most, device=loads_E.device)
    expert = torch.searchsorted(ends_E, tile, right=True)
    inside = expert.clamp(max=routing.num_experts - 1)
    first = routing.by_expert[inside] + (tile - (ends_E - tiles_E)[inside]) * tiles.rows
    return _Plan(
        tiles=tiles,
        token_N=routing.token_N[routing.order_N],
        order_N=routing.order_N,
        by_token=routing.by_token,
        by_expert=routing.by_expert,
        tile_expert=torch.where(tile < ends_E[-1], expert, -1),
        tile_first=first,
    )


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_N: Tensor, w_up_EDF: Tensor, w_down_EFD: Tensor, routing: Routing
    ) -> Tensor:
        F, D = w_down_EFD.shape[1:]
        plan = _plan(routing, tiles_for(D, F, x_TD.dtype))
        s_N = weight_N[routing.order_N].float()
        N = s_N.numel()
        h_NF, a_NF = x_TD.new_empty(N, 2 * F), x_TD.new_empty(N, F)
        _launch(_kernels()._up, plan, F, plan.tiles.cols, x_TD, w_up_EDF, h_NF, a_NF, s_N, D=D, F=F)
        y_TD = _rows_to_tokens(plan, a_NF, w_down_EFD, D, transposed=False)
        ctx.save_for_backward(x_TD, h_NF, s_N, w_up_EDF, w_down_EFD)
        ctx.plan, ctx.weight_dtype = plan, weight_N.dtype
        return y_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy_TD = grads[0].contiguous()
        x_TD, h_NF, s_N, w_up_EDF, w_down_EFD = ctx.saved_tensors
        need_x, need_s, need_up, need_down = ctx.needs_input_grad[:4]
        plan: _Plan = ctx.plan
        F, D = w_down_EFD.shape[1:]
        N = s_N.numel()
        # The weights' gradients need dH and s·A; one kernel gives both, and ds.
        dh_NF, a_NF = torch.empty_like(h_NF), x_TD.new_empty(N, F)
        # Half as wide as the others' tiles: beside the sum it holds h, s·A and dH, which would not fit the registers.
        cols = plan.tiles.cols // 2
        partial_NP = s_N.new_empty(N, _ceil(F, cols))
        _launch(_kernels()._d_hidden, plan, F, cols, dy_TD, w_down_EFD, h_NF, s_N, dh_NF, a_NF, partial_NP, D=D, F=F)
        dx_TD = _rows_to_tokens(plan, dh_NF, w_up_EDF, D, transposed=True) if need_x else None
        dweight_N = partial_NP.sum(1).to(ctx.weight_dtype) if need_s else None
        dw_up_EDF = _weight_gradient(plan, x_TD, dh_NF, w_up_EDF, left_by_token=True) if need_up else None
        dw_down_EFD = _weight_gradient(plan, a_NF, dy_TD, w_down_EFD, left_by_token=False) if need_down else None
        return dx_TD, dweight_N, dw_up_EDF, dw_down_EFD, None


def _rows_to_tokens(plan: _Plan, rows_NI: Tensor, w: Tensor, D: int, transposed: bool) -> Tensor:
    """Each row times its expert's matrix, or the matrix transposed, summed by token: (T, D)."""
    N, inner = rows_NI.shape
    out_ND = rows_NI.new_empty(N, D)
    strides = {"STRIDE_IN": 1, "STRIDE_OUT": inner} if transposed else {"STRIDE_IN": D, "STRIDE_OUT": 1}
    _launch(_kernels()._rows, plan, D, plan.tiles.cols, rows_NI, w, out_ND, IN=inner, OUT=D, **strides)
    T = plan.by_token.numel() - 1
    y_TD = rows_NI.new_empty(T, D)
    width = 128
    _kernels()._combine[(T, _ceil(D, width))](out_ND, y_TD, plan.by_token, D=D, WIDTH=width, num_warps=4)
    return y_TD


def _weight_gradient(plan: _Plan, a: Tensor, b: Tensor, like_EIJ: Tensor, left_by_token: bool) -> Tensor:
    """Σ over each expert's rows of aᵀ·b; one of the two is read by token, the other by row."""
    out_EIJ = torch.empty_like(like_EIJ)
    E, inner, outer = out_EIJ.shape
    total = E * _ceil(inner, plan.tiles.rows) * _ceil(outer, plan.tiles.cols)
    _kernels()._weights[(_programs(a, total),)](
        a,
        b,
        out_EIJ,
        plan.token_N,
        plan.by_expert,
        total,
        ROWS=inner,
        COLS=outer,
        LEFT_BY_TOKEN=left_by_token,
        BI=plan.tiles.rows,
        BJ=plan.tiles.cols,
        BR=plan.tiles.depth,
        num_warps=plan.tiles.warps,
        num_stages=plan.tiles.stages,
    )
    return out_EIJ


def _launch(kernel: Any, plan: _Plan, width: int, cols: int, *tensors: Tensor, **sizes: int) -> None:
    """A persistent grid over tiles of rows times tiles of `cols` columns of a result of this width."""
    tiles = plan.tiles
    total = plan.tile_expert.numel() * _ceil(width, cols)
    kernel[(_programs(tensors[0], total),)](
        *tensors,
        plan.token_N,
        plan.order_N,
        plan.tile_expert,
        plan.tile_first,
        plan.by_expert,
        total,
        **sizes,
        BM=tiles.rows,
        BN=cols,
        BK=tiles.depth,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def _programs(tensor: Tensor, total: int) -> int:
    if tensor.device.type != "cuda":
        return min(total, 3)
    return min(total, torch.cuda.get_device_properties(tensor.device).multi_processor_count)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@functools.cache
def _kernels() -> Any:
    """The kernels, imported on first use: they need triton, which not every machine has."""
    return importlib.import_module("repro.moe.triton_kernels")
