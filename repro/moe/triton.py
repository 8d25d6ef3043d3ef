"""The Triton backend: the experts in seven launches, with the backward of `repro.moe.cpu` and nothing that waits for the device.

- `up`        gathers x, multiplies by gate and up, applies SwiGLU and the weight; keeps the pre-activation for the backward
- `down`, `dx`  multiply each row by its expert's matrix and write it to its place in token order
- `combine`   sums each token's rows in slot order
- `d_hidden`  dA', then dH, s·A and ds, the last as one partial sum a tile, added up in a fixed order
- `dw_up`, `dw_down`  the gradient of a weight: one program owns each tile and walks the expert's rows in order

No atomics, no split of a sum between programs: equal inputs give equal bits. A row of y or dx does not depend on the other
rows of the batch, because tile sizes (`repro.moe.tiles`) follow from the widths and the dtype alone. The number of experts is a
plain argument, so a growing pool compiles nothing again. Products are summed in float32.

Run in float32 under TRITON_INTERPRET=1 by the tests (the interpreter's bfloat16 dot is wrong); tile sizes are not tuned yet.
"""

import functools
import importlib
import importlib.util
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from repro.moe.errors import RoutingError
from repro.moe.routing import Routing
from repro.moe.tiles import Tile, Tiles, packaged, table, tiles_for


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


# Small, for the interpreter's time goes with the tile: rows and columns that differ find what a square would hide.
_SMALL = Tile(rows=16, cols=32, depth=16, warps=4, stages=1)
_INTERPRETED = Tiles(
    up=_SMALL,
    down=_SMALL,
    combine=Tile(rows=1, cols=128, depth=1, warps=4, stages=1),
    d_hidden=Tile(rows=16, cols=16, depth=16, warps=4, stages=1),
    dx=_SMALL,
    dw_up=_SMALL,
    dw_down=_SMALL,
)


@dataclass(frozen=True, slots=True)
class Plan:
    """A routing as the launches read it, all of it on the device."""

    token_N: Tensor  # in expert-major order, like all rows below
    order_N: Tensor
    by_token: Tensor
    by_expert: Tensor
    maps: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def tiles_of(self, rows: int) -> tuple[Tensor, Tensor]:
        """Expert (-1 past the last tile) and first row of each tile of `rows` rows; made once.

        As many tiles as could be needed for any load, N/rows and one more an expert, so that nobody has to count them.
        """
        if rows not in self.maps:
            E = self.by_expert.numel() - 1
            most = self.token_N.numel() // rows + E
            expert, first = (self.by_expert.new_empty(most) for _ in range(2))
            _kernels()._map[(E + 1,)](self.by_expert, expert, first, E, most, ROWS=rows, BE=1024, BT=128)
            self.maps[rows] = (expert, first)
        return self.maps[rows]


def plan(routing: Routing) -> Plan:
    """What the launches need of a routing."""
    return Plan(
        token_N=routing.token_N[routing.order_N],
        order_N=routing.order_N,
        by_token=routing.by_token,
        by_expert=routing.by_expert,
    )


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_N: Tensor, w_up_EDF: Tensor, w_down_EFD: Tensor, routing: Routing
    ) -> Tensor:
        F, D = w_down_EFD.shape[1:]
        # A table that somebody asked for goes before what suits the interpreter.
        small = interpreted() and table() is packaged()
        tiles = _INTERPRETED if small else tiles_for(D, F, x_TD.dtype)
        ours = plan(routing)
        s_N = weight_N[routing.order_N].float()
        h_NF, a_NF = up(ours, tiles.up, x_TD, w_up_EDF, s_N)
        y_TD = combine(ours, tiles.combine, down(ours, tiles.down, a_NF, w_down_EFD))
        ctx.save_for_backward(x_TD, h_NF, s_N, w_up_EDF, w_down_EFD)
        ctx.plan, ctx.tiles, ctx.weight_dtype = ours, tiles, weight_N.dtype
        return y_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy_TD = grads[0].contiguous()
        x_TD, h_NF, s_N, w_up_EDF, w_down_EFD = ctx.saved_tensors
        need_x, need_s, need_up, need_down = ctx.needs_input_grad[:4]
        ours: Plan = ctx.plan
        tiles: Tiles = ctx.tiles
        # The weights' gradients need dH and s·A; one kernel gives both, and ds.
        dh_NF, a_NF, ds_N = d_hidden(ours, tiles.d_hidden, dy_TD, w_down_EFD, h_NF, s_N)
        dx_TD = combine(ours, tiles.combine, dx(ours, tiles.dx, dh_NF, w_up_EDF)) if need_x else None
        dweight_N = ds_N.to(ctx.weight_dtype) if need_s else None
        dw_up_EDF = dw_up(ours, tiles.dw_up, x_TD, dh_NF, w_up_EDF) if need_up else None
        dw_down_EFD = dw_down(ours, tiles.dw_down, a_NF, dy_TD, w_down_EFD) if need_down else None
        return dx_TD, dweight_N, dw_up_EDF, dw_down_EFD, None


def up(plan: Plan, tile: Tile, x_TD: Tensor, w_up_EDF: Tensor, s_N: Tensor) -> tuple[Tensor, Tensor]:
    """The pre-activation (N, 2F) of each row, and its activation (N, F) times its weight."""
    N, D, F = s_N.numel(), x_TD.shape[1], w_up_EDF.shape[2] // 2
    h_NF, a_NF = x_TD.new_empty(N, 2 * F), x_TD.new_empty(N, F)
    _over_rows(_kernels()._up, plan, tile, F, x_TD, w_up_EDF, h_NF, a_NF, s_N, D=D, F=F)
    return h_NF, a_NF


def down(plan: Plan, tile: Tile, a_NF: Tensor, w_down_EFD: Tensor) -> Tensor:
    """Each row's output (N, D), in token order."""
    F, D = w_down_EFD.shape[1:]
    out_ND = a_NF.new_empty(a_NF.shape[0], D)
    strides = {"STRIDE_IN": D, "STRIDE_OUT": 1}
    _over_rows(_kernels()._rows, plan, tile, D, a_NF, w_down_EFD, out_ND, IN=F, OUT=D, **strides)
    return out_ND


def combine(plan: Plan, tile: Tile, out_ND: Tensor) -> Tensor:
    """Sum (T, D) of each token's rows, which lie in token order."""
    T, D = plan.by_token.numel() - 1, out_ND.shape[1]
    y_TD = out_ND.new_empty(T, D)
    grid = (T, _ceil(D, tile.cols))
    _kernels()._combine[grid](out_ND, y_TD, plan.by_token, D=D, WIDTH=tile.cols, num_warps=tile.warps)
    return y_TD


def d_hidden(
    plan: Plan, tile: Tile, dy_TD: Tensor, w_down_EFD: Tensor, h_NF: Tensor, s_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dH (N, 2F), s·A (N, F), and the gradient of the routing's weights (N) in token order and float32."""
    N, (F, D) = s_N.numel(), w_down_EFD.shape[1:]
    dh_NF, a_NF = torch.empty_like(h_NF), h_NF.new_empty(N, F)
    partial_NP = s_N.new_empty(N, _ceil(F, tile.cols))
    _over_rows(_kernels()._d_hidden, plan, tile, F, dy_TD, w_down_EFD, h_NF, s_N, dh_NF, a_NF, partial_NP, D=D, F=F)
    return dh_NF, a_NF, partial_NP.sum(1)


def dx(plan: Plan, tile: Tile, dh_NF: Tensor, w_up_EDF: Tensor) -> Tensor:
    """Each row's part (N, D) of its token's gradient, in token order."""
    D, twice_F = w_up_EDF.shape[1:]
    out_ND = dh_NF.new_empty(dh_NF.shape[0], D)
    strides = {"STRIDE_IN": 1, "STRIDE_OUT": twice_F}
    _over_rows(_kernels()._rows, plan, tile, D, dh_NF, w_up_EDF, out_ND, IN=twice_F, OUT=D, **strides)
    return out_ND


def dw_up(plan: Plan, tile: Tile, x_TD: Tensor, dh_NF: Tensor, w_up_EDF: Tensor) -> Tensor:
    """The gradient (E, D, 2F) of the first weights."""
    return _weight_gradient(plan, tile, x_TD, dh_NF, w_up_EDF, left_by_token=True)


def dw_down(plan: Plan, tile: Tile, a_NF: Tensor, dy_TD: Tensor, w_down_EFD: Tensor) -> Tensor:
    """The gradient (E, F, D) of the second weights."""
    return _weight_gradient(plan, tile, a_NF, dy_TD, w_down_EFD, left_by_token=False)


def _weight_gradient(plan: Plan, tile: Tile, a: Tensor, b: Tensor, like_EIJ: Tensor, left_by_token: bool) -> Tensor:
    """Σ over each expert's rows of aᵀ·b; one of the two is read by token, the other by row."""
    out_EIJ = torch.empty_like(like_EIJ)
    E, inner, outer = out_EIJ.shape
    total = E * _ceil(inner, tile.rows) * _ceil(outer, tile.cols)
    _kernels()._weights[(_programs(a, tile, total),)](
        a,
        b,
        out_EIJ,
        plan.token_N,
        plan.by_expert,
        total,
        ROWS=inner,
        COLS=outer,
        LEFT_BY_TOKEN=left_by_token,
        BI=tile.rows,
        BJ=tile.cols,
        BR=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out_EIJ


def _over_rows(kernel: Any, plan: Plan, tile: Tile, width: int, *tensors: Tensor, **sizes: int) -> None:
    """A persistent grid over tiles of rows times tiles of columns of a result of this width."""
    tile_expert, tile_first = plan.tiles_of(tile.rows)
    total = tile_expert.numel() * _ceil(width, tile.cols)
    kernel[(_programs(tensors[0], tile, total),)](
        *tensors,
        plan.token_N,
        plan.order_N,
        tile_expert,
        tile_first,
        plan.by_expert,
        total,
        **sizes,
        BM=tile.rows,
        BN=tile.cols,
        BK=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _programs(tensor: Tensor, tile: Tile, total: int) -> int:
    if tensor.device.type != "cuda":
        return min(total, 3)
    return min(total, tile.programs * torch.cuda.get_device_properties(tensor.device).multi_processor_count)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@functools.cache
def _kernels() -> Any:
    """The kernels, imported on first use: they need triton, which not every machine has."""
    return importlib.import_module("repro.moe.triton_kernels")
