"""The CPU backend: one custom autograd Function around torch's grouped GEMM.

Rows are gathered once in expert-major order, each expert's rows go through one GEMM, and the results are summed per
token in slot order, so the sum never depends on timing. Saved for the backward: x, the pre-activation and the
routing; the activation is computed again. With A = silu(g)⊙u, s the weight of an assignment and dO the gradient of
its (unweighted) output:

    dA' = dO·Wdᵀ    ds = ⟨dA', A⟩    dA = s·dA'    dWd = (s·A)ᵀ·dO    dWu = xᵀ·dH    dx = Σ over slots of dH·Wuᵀ
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from repro.moe.routing import Routing


def apply(x_TD: Tensor, routing: Routing, w_up_EDF: Tensor, w_down_EFD: Tensor) -> Tensor:
    """Weighted sum (T, D) of each token's experts; see `repro.moe.experts`."""
    y_TD: Tensor = _Experts.apply(  # type: ignore[no-untyped-call]
        x_TD,
        routing.weight_N,
        w_up_EDF,
        w_down_EFD,
        routing.token_N,
        routing.order_N,
        routing.by_token,
        routing.by_expert,
    )
    return y_TD


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_N: Tensor,
        w_up_EDF: Tensor,
        w_down_EFD: Tensor,
        token_N: Tensor,
        order_N: Tensor,
        by_token: Tensor,
        by_expert: Tensor,
    ) -> Tensor:
        rows_N = token_N[order_N]
        place_N = torch.empty_like(order_N)
        place_N[order_N] = torch.arange(order_N.numel())
        ends_E = by_expert[1:].to(torch.int32)
        s_N1 = weight_N.detach()[order_N].to(x_TD.dtype)[:, None]
        h_NF = _rows(x_TD.index_select(0, rows_N), w_up_EDF, ends_E)
        gate, up = h_NF.chunk(2, dim=1)
        a_NF = nnf.silu(gate).mul_(up).mul_(s_N1)
        out_ND = _rows(a_NF, w_down_EFD, ends_E)
        ctx.save_for_backward(x_TD, h_NF, s_N1, w_up_EDF, w_down_EFD, rows_N, order_N, place_N, by_token, ends_E)
        ctx.weight_dtype = weight_N.dtype
        return _sum_slots(out_ND, place_N, by_token)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TD,) = grads
        x_TD, h_NF, s_N1, w_up_EDF, w_down_EFD, rows_N, order_N, place_N, by_token, ends_E = ctx.saved_tensors
        need_x, need_s, need_up, need_down = ctx.needs_input_grad[:4]
        dx_TD = dweight_N = dw_up_EDF = dw_down_EFD = None
        gate, up = h_NF.chunk(2, dim=1)
        silu_NF = nnf.silu(gate)
        do_ND = dy_TD.index_select(0, rows_N)
        if need_down:
            dw_down_EFD = _per_expert((silu_NF * up).mul_(s_N1), do_ND, ends_E)
        if need_x or need_s or need_up:
            da_NF = _rows(do_ND, w_down_EFD.transpose(1, 2), ends_E)
            if need_s:
                ds_N = (da_NF * silu_NF).mul_(up).sum(1)
                dweight_N = torch.empty_like(ds_N).index_copy_(0, order_N, ds_N).to(ctx.weight_dtype)
            if need_x or need_up:
                da_NF.mul_(s_N1)
                dh_NF = torch.empty_like(h_NF)
                dgate, dup = dh_NF.chunk(2, dim=1)
                torch.mul(da_NF, silu_NF, out=dup)
                dgate.copy_(torch.ops.aten.silu_backward(da_NF.mul_(up), gate))
                if need_up:
                    dw_up_EDF = _per_expert(x_TD.index_select(0, rows_N), dh_NF, ends_E)
                if need_x:
                    dx_TD = _sum_slots(_rows(dh_NF, w_up_EDF.transpose(1, 2), ends_E), place_N, by_token)
        return dx_TD, dweight_N, dw_up_EDF, dw_down_EFD, None, None, None, None


def _sum_slots(rows_ND: Tensor, place_N: Tensor, by_token: Tensor) -> Tensor:
    """Sum of each token's rows (T, D), in slot order; `place_N` says where in expert-major order an assignment lies."""
    return nnf.embedding_bag(place_N, rows_ND, by_token, mode="sum", include_last_offset=True)


def _rows(a_NI: Tensor, w_EIJ: Tensor, ends_E: Tensor) -> Tensor:
    """Each expert's rows times its matrix, (N, J)."""
    if _has_grouped_mm(a_NI, w_EIJ):
        return nnf.grouped_mm(a_NI, w_EIJ, offs=ends_E)
    out_NJ = a_NI.new_empty(a_NI.shape[0], w_EIJ.shape[2])
    start = 0
    for w_IJ, end in zip(w_EIJ.unbind(), ends_E.tolist(), strict=True):
        torch.mm(a_NI[start:end], w_IJ, out=out_NJ[start:end])
        start = end
    return out_NJ


def _per_expert(a_NI: Tensor, b_NJ: Tensor, ends_E: Tensor) -> Tensor:
    """aᵀ·b over each expert's rows, (E, I, J); zero for an expert with none."""
    if _has_grouped_mm(a_NI, b_NJ):
        return nnf.grouped_mm(a_NI.t(), b_NJ, offs=ends_E)
    out_EIJ = a_NI.new_empty(ends_E.numel(), a_NI.shape[1], b_NJ.shape[1])
    start = 0
    for out_IJ, end in zip(out_EIJ.unbind(), ends_E.tolist(), strict=True):
        torch.mm(a_NI[start:end].t(), b_NJ[start:end], out=out_IJ)
        start = end
    return out_EIJ


def _has_grouped_mm(a: Tensor, b: Tensor) -> bool:
    """torch's grouped GEMM wants float32 (or less) and rows that start at multiples of 16 bytes."""
    sixteen = 16 // a.element_size()
    return a.dtype != torch.float64 and all(n % sixteen == 0 for n in (a.shape[-1], b.shape[-1], b.shape[-2]))
