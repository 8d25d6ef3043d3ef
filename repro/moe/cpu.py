"""The CPU backend: one custom autograd Function that takes the experts in blocks small enough for the cache.

A block's rows are gathered, go up through one GEMM an expert, through SwiGLU, down through another, and are added to their
tokens in the order of the experts; at sizes where the calls themselves would cost more than the arithmetic, all experts are
one block. The size of a block follows from the shapes alone, so equal inputs take equal paths: no result depends on timing.

Saved for the backward: x, the pre-activation and the routing; the activation is computed again. With A = silu(g)⊙u, s the
weight of an assignment, and dO the gradient of its unweighted output (its token's dy):

    dA' = dO·Wdᵀ    ds = ⟨dA', A⟩    dA = s·dA'    dWd = (s·A)ᵀ·dO    dWu = xᵀ·dH    dx = Σ over its assignments of dH·Wuᵀ
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from repro.moe.routing import Routing

# Bytes of rows (x, pre-activation, activation) in a block: what a core's second-level cache holds beside the weights.
_BLOCK_BYTES = 3 << 19


def apply(x_TD: Tensor, routing: Routing, w_up_EDF: Tensor, w_down_EFD: Tensor) -> Tensor:
    """Weighted sum (T, D) of each token's experts; see `repro.moe.experts`."""
    y_TD: Tensor = _Experts.apply(  # type: ignore[no-untyped-call]
        x_TD, routing.weight_N, w_up_EDF, w_down_EFD, routing
    )
    return y_TD


@dataclass(frozen=True, slots=True)
class _Block:
    """Experts `first:last`, and where each one's rows end; `start:stop` are the block's rows in expert-major order."""

    first: int
    last: int
    start: int
    stop: int
    ends: list[int]
    ends_E: Tensor | None  # the same for torch's grouped GEMM, where that is the better way


def _blocks(routing: Routing, row_bytes: int, grouped: bool) -> list[_Block]:
    """Equal runs of experts, sized for even loads; runs with no rows are left out."""
    bounds = routing.by_expert.tolist()
    E, N = routing.num_experts, bounds[-1]
    size = max(1, min(E, E * _BLOCK_BYTES // max(1, N * row_bytes)))
    blocks = []
    for first in range(0, E, size):
        last = min(first + size, E)
        if bounds[last] > bounds[first]:
            ends = [end - bounds[first] for end in bounds[first + 1 : last + 1]]
            ends_E = routing.by_expert[1:].to(torch.int32) if grouped and size == E else None
            blocks.append(_Block(first, last, bounds[first], bounds[last], ends, ends_E))
    return blocks


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_N: Tensor, w_up_EDF: Tensor, w_down_EFD: Tensor, routing: Routing
    ) -> Tensor:
        D, F = w_up_EDF.shape[1], w_down_EFD.shape[1]
        # The grouped GEMM wants rows that start at multiples of 16 bytes, and knows no float64.
        grouped = x_TD.dtype == torch.float32 and D % 4 == F % 4 == 0
        blocks = _blocks(routing, x_TD.element_size() * (D + 3 * F), grouped)
        rows_N = routing.token_N[routing.order_N]
        s_N1 = weight_N[routing.order_N].to(x_TD.dtype)[:, None]
        widest = max(block.stop - block.start for block in blocks)
        x_buffer, a_buffer, out_buffer = (x_TD.new_empty(widest, width) for width in (D, F, D))
        sums = _TokenSums(x_TD, routing, len(blocks) == 1)
        saved_h = []
        for block in blocks:
            n = block.stop - block.start
            rows = rows_N[block.start : block.stop]
            x_ND = torch.index_select(x_TD, 0, rows, out=x_buffer[:n])
            h_NF = _times(x_ND, w_up_EDF, block, None)
            gate, up = h_NF.chunk(2, dim=1)
            a_NF = torch.ops.aten.silu.out(gate, out=a_buffer[:n]).mul_(up).mul_(s_N1[block.start : block.stop])
            sums.add(_times(a_NF, w_down_EFD, block, out_buffer[:n]), rows)
            saved_h.append(h_NF)
        ctx.save_for_backward(x_TD, s_N1, w_up_EDF, w_down_EFD, rows_N, *saved_h)
        ctx.routing, ctx.blocks, ctx.weight_dtype = routing, blocks, weight_N.dtype
        return sums.y_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TD,) = grads
        x_TD, s_N1, w_up_EDF, w_down_EFD, rows_N, *saved_h = ctx.saved_tensors
        need_x, need_s, need_up, need_down = ctx.needs_input_grad[:4]
        blocks: list[_Block] = ctx.blocks
        D, F = w_up_EDF.shape[1], w_down_EFD.shape[1]
        widest = max(block.stop - block.start for block in blocks)
        row_buffer, dh_buffer, silu_buffer, a_buffer, da_buffer, do_buffer = (
            x_TD.new_empty(widest, width) for width in (D, 2 * F, F, F, F, D)
        )
        dw_up_EDF = _gradient_like(w_up_EDF, blocks) if need_up else None
        dw_down_EFD = _gradient_like(w_down_EFD, blocks) if need_down else None
        ds_N = torch.empty_like(s_N1[:, 0]) if need_s else None
        dx_sums = _TokenSums(x_TD, ctx.routing, len(blocks) == 1) if need_x else None
        w_down_EDF, w_up_EFD = w_down_EFD.transpose(1, 2), w_up_EDF.transpose(1, 2)
        for block, h_NF in zip(blocks, saved_h, strict=True):
            n = block.stop - block.start
            rows, s_n1 = rows_N[block.start : block.stop], s_N1[block.start : block.stop]
            gate, up = h_NF.chunk(2, dim=1)
            do_ND = torch.index_select(dy_TD, 0, rows, out=do_buffer[:n])
            silu_NF = torch.ops.aten.silu.out(gate, out=silu_buffer[:n])
            a_NF = torch.mul(silu_NF, up, out=a_buffer[:n])
            if need_x or need_s or need_up:
                da_NF = _times(do_ND, w_down_EDF, block, da_buffer[:n])
            if ds_N is not None:
                torch.linalg.vecdot(da_NF, a_NF, out=ds_N[block.start : block.stop])
            if dw_down_EFD is not None:
                dw_down_EFD = _gradient(a_NF.mul_(s_n1), do_ND, block, dw_down_EFD)
            if need_x or need_up:
                dh_NF = dh_buffer[:n]
                dgate, dup = dh_NF.chunk(2, dim=1)
                torch.mul(da_NF.mul_(s_n1), silu_NF, out=dup)
                torch.ops.aten.silu_backward.grad_input(da_NF.mul_(up), gate, grad_input=dgate)
            if dw_up_EDF is not None:
                x_ND = torch.index_select(x_TD, 0, rows, out=row_buffer[:n])
                dw_up_EDF = _gradient(x_ND, dh_NF, block, dw_up_EDF)
            if dx_sums is not None:
                dx_sums.add(_times(dh_NF, w_up_EFD, block, row_buffer[:n]), rows)
        dweight_N = None
        if ds_N is not None:
            dweight_N = torch.empty_like(ds_N).index_copy_(0, ctx.routing.order_N, ds_N).to(ctx.weight_dtype)
        dx_TD = dx_sums.y_TD if dx_sums else None
        return dx_TD, dweight_N, dw_up_EDF, dw_down_EFD, None


class _TokenSums:
    """Sums each token's rows: in slot order if all rows come at once, else expert after expert."""

    def __init__(self, x_TD: Tensor, routing: Routing, at_once: bool) -> None:
        self.routing = routing
        self.at_once = at_once
        if not at_once:
            self.y_TD = torch.zeros_like(x_TD)

    def add(self, rows_ND: Tensor, tokens_N: Tensor) -> None:
        if not self.at_once:
            self.y_TD.index_add_(0, tokens_N, rows_ND)
            return
        order_N = self.routing.order_N
        place_N = torch.empty_like(order_N)
        place_N[order_N] = torch.arange(order_N.numel())
        self.y_TD = nnf.embedding_bag(place_N, rows_ND, self.routing.by_token, mode="sum", include_last_offset=True)


def _times(a_NI: Tensor, w_EIJ: Tensor, block: _Block, out_NJ: Tensor | None) -> Tensor:
    """Each expert's rows times its matrix, in `out_NJ` if given and useful."""
    if block.ends_E is not None:
        return nnf.grouped_mm(a_NI, w_EIJ, offs=block.ends_E)
    if out_NJ is None:
        out_NJ = a_NI.new_empty(a_NI.shape[0], w_EIJ.shape[2])
    start = 0
    for expert, end in enumerate(block.ends, block.first):
        if end > start:
            torch.mm(a_NI[start:end], w_EIJ[expert], out=out_NJ[start:end])
        start = end
    return out_NJ


def _gradient(a_NI: Tensor, b_NJ: Tensor, block: _Block, out_EIJ: Tensor) -> Tensor:
    """`out_EIJ` with aᵀ·b over each expert's rows written into it."""
    if block.ends_E is not None:
        return nnf.grouped_mm(a_NI.t(), b_NJ, offs=block.ends_E)
    start = 0
    for expert, end in enumerate(block.ends, block.first):
        if end > start:
            torch.mm(a_NI[start:end].t(), b_NJ[start:end], out=out_EIJ[expert])
        start = end
    return out_EIJ


def _gradient_like(w_EIJ: Tensor, blocks: list[_Block]) -> Tensor:
    """Memory for a weight's gradient; only experts with no rows, which nothing will write, are set to zero."""
    out_EIJ = torch.empty_like(w_EIJ)
    done = 0
    for block in blocks:
        out_EIJ[done : block.first].zero_()
        start = 0
        for expert, end in enumerate(block.ends, block.first):
            if end == start:
                out_EIJ[expert].zero_()
            start = end
        done = block.last
    out_EIJ[done:].zero_()
    return out_EIJ
