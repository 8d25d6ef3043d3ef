"""The grouped backend: the experts as four grouped GEMMs of torch, with the backward of `repro.moe.cpu` and no host
sync.

For devices where torch has a fast `grouped_mm`: bfloat16 on CUDA; on the CPU it runs in float32 and bfloat16. All N
assignments go through each step at once. Sums over a token's assignments run in slot order, so repeats are bitwise
equal.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from repro.moe.errors import RoutingError
from repro.moe.routing import Routing, inverse

_CUDA_GROUPS = 1024  # torch's kernel prepares all groups in one block of threads


def supports(x_TD: Tensor, w_down_EFD: Tensor) -> bool:
    """Whether torch's grouped GEMM takes these: a dtype it knows, rows that are multiples of 16 bytes long, fewer than 1024
    experts on a GPU."""
    aligned = all(size * x_TD.element_size() % 16 == 0 for size in w_down_EFD.shape[1:])
    few = not x_TD.is_cuda or w_down_EFD.shape[0] < _CUDA_GROUPS
    return aligned and few and _groups(x_TD.device.type, x_TD.dtype)


@functools.cache
def _groups(device: str, dtype: torch.dtype) -> bool:
    """Which dtypes torch groups differs by device, its capability and torch's version: try it once."""
    if device == "cuda" and dtype != torch.bfloat16:
        return False  # torch falls back to a loop there that waits for the device
    rows, matrices = (torch.ones(shape, device=device, dtype=dtype) for shape in ((8, 8), (1, 8, 8)))
    try:
        nnf.grouped_mm(rows, matrices, offs=torch.tensor([8], device=device, dtype=torch.int32))
    except (AttributeError, RuntimeError):
        return False
    return True


def apply(x_TD: Tensor, routing: Routing, w_up_EDF: Tensor, w_down_EFD: Tensor) -> Tensor:
    """Weighted sum (T, D) of each token's experts; see `repro.moe.experts`."""
    if not supports(x_TD, w_down_EFD):
        F, D = w_down_EFD.shape[1:]
        raise RoutingError(
            f"backend grouped: expected {'bfloat16' if x_TD.is_cuda else 'float32 or bfloat16'} and widths that fill whole "
            f"16 bytes, found {x_TD.dtype} with d_model={D}, d_expert={F}; use the backend auto, or reference"
        )
    y_TD: Tensor = _Experts.apply(  # type: ignore[no-untyped-call]
        x_TD, routing.weight_N, w_up_EDF, w_down_EFD, routing
    )
    return y_TD


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_N: Tensor, w_up_EDF: Tensor, w_down_EFD: Tensor, routing: Routing
    ) -> Tensor:
        order_N = routing.order_N
        rows_N = routing.token_N[order_N]
        place_N = inverse(order_N)
        ends_E = routing.by_expert[1:].to(torch.int32)
        s_N1 = weight_N[order_N].to(x_TD.dtype)[:, None]
        h_NF = nnf.grouped_mm(x_TD.index_select(0, rows_N), w_up_EDF, offs=ends_E)
        gate, up = h_NF.chunk(2, dim=1)
        out_ND = nnf.grouped_mm(nnf.silu(gate).mul_(up).mul_(s_N1), w_down_EFD, offs=ends_E)
        ctx.save_for_backward(x_TD, h_NF, s_N1, w_up_EDF, w_down_EFD, rows_N, place_N, routing.by_token, ends_E)
        ctx.weight_dtype = weight_N.dtype
        return _sum_slots(out_ND, place_N, routing.by_token)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TD,) = grads
        x_TD, h_NF, s_N1, w_up_EDF, w_down_EFD, rows_N, place_N, by_token, ends_E = ctx.saved_tensors
        need_x, need_s, need_up, need_down = ctx.needs_input_grad[:4]
        dx_TD = dweight_N = dw_up_EDF = dw_down_EFD = None
        gate, up = h_NF.chunk(2, dim=1)
        silu_NF = nnf.silu(gate)
        a_NF = silu_NF * up
        do_ND = dy_TD.index_select(0, rows_N)
        if need_x or need_s or need_up:
            da_NF = nnf.grouped_mm(do_ND, w_down_EFD.transpose(1, 2), offs=ends_E)
        if need_s:
            dweight_N = (da_NF * a_NF).sum(1, dtype=ctx.weight_dtype).index_select(0, place_N)
        if need_down:
            dw_down_EFD = nnf.grouped_mm(a_NF.mul_(s_N1).t(), do_ND, offs=ends_E)
        if need_x or need_up:
            dh_NF = torch.empty_like(h_NF)
            dgate, dup = dh_NF.chunk(2, dim=1)
            torch.mul(da_NF.mul_(s_N1), silu_NF, out=dup)
            torch.ops.aten.silu_backward.grad_input(da_NF.mul_(up), gate, grad_input=dgate)
            if need_up:
                dw_up_EDF = nnf.grouped_mm(x_TD.index_select(0, rows_N).t(), dh_NF, offs=ends_E)
            if need_x:
                dx_ND = nnf.grouped_mm(dh_NF, w_up_EDF.transpose(1, 2), offs=ends_E)
                dx_TD = _sum_slots(dx_ND, place_N, by_token)
        return dx_TD, dweight_N, dw_up_EDF, dw_down_EFD, None


def _sum_slots(rows_ND: Tensor, place_N: Tensor, by_token: Tensor) -> Tensor:
    """Sum of each token's rows (T, D), in slot order; `place_N` says where in expert-major order an assignment lies."""
    return nnf.embedding_bag(place_N, rows_ND, by_token, mode="sum", include_last_offset=True)
