"""The CPU backend: one custom autograd Function that takes the experts in blocks small enough for the cache.

A block's rows are gathered, go up through one GEMM an expert, through SwiGLU, down through another, and are added to
their tokens in the order of the experts. What happens between GEMMs is `repro.moe.cpu_rows`, or in float32, where numba
is installed, the same compiled. Nothing the size of all assignments is allocated: at the sizes that matter the page
faults of a fresh buffer cost as much as the GEMM that fills it. Where all assignments fit the cache at once, the calls
would cost more than the arithmetic, and `repro.moe.grouped`, with its few large steps, takes over. Which way, and the
size of a block, follow from the shapes alone, so equal inputs take equal paths: no result depends on timing.

A weight's gradient goes to the memory of its last one, once nobody holds that any more: with fresh memory each step, a
seventh of the time at 64 experts of width 512 went to page faults.

Saved for the backward: x, the pre-activation and the routing; the activation is computed again. With A = silu(g)⊙u, s
the weight of an assignment, and dO the gradient of its unweighted output (its token's dy):

    dA' = dO·Wdᵀ    ds = ⟨dA', A⟩    dA = s·dA'    dWd = (s·A)ᵀ·dO    dWu = xᵀ·dH    dx = Σ over its assignments of
    dH·Wuᵀ
"""

import functools
import importlib
import importlib.util
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from repro.moe import cpu_rows, grouped
from repro.moe.errors import RoutingError
from repro.moe.routing import Routing

# Bytes of rows (x, pre-activation and activation together) in a block, and those up to which all rows go at once, the latter
# with torch's steps and with compiled ones: measured on a core with 2 MiB of second-level cache.
_BLOCK_BYTES = 2 << 20
_ALL_BYTES = 12 << 20
_ALL_BYTES_COMPILED = 6 << 20


def apply(x_TD: Tensor, routing: Routing, w_up_EDF: Tensor, w_down_EFD: Tensor) -> Tensor:
    """Weighted sum (T, D) of each token's experts; see `repro.moe.experts`. Raises `RoutingError` off the CPU."""
    if x_TD.device.type != "cpu":
        raise RoutingError(
            f"backend cpu: expected tensors on the CPU, found them on {x_TD.device}; use the backend auto"
        )
    F, D = w_down_EFD.shape[1:]
    row_bytes = x_TD.element_size() * (D + 3 * F)
    all_bytes = _ALL_BYTES_COMPILED if _compiles(x_TD.dtype) else _ALL_BYTES
    if routing.token_N.numel() * row_bytes <= all_bytes and grouped.supports(x_TD, w_down_EFD):
        return grouped.apply(x_TD, routing, w_up_EDF, w_down_EFD)
    blocks = _blocks(routing.by_expert.tolist(), _BLOCK_BYTES // row_bytes)
    y_TD: Tensor = _Experts.apply(  # type: ignore[no-untyped-call]
        x_TD, routing.weight_N, w_up_EDF, w_down_EFD, routing, blocks
    )
    return y_TD


@dataclass(frozen=True, slots=True)
class _Block:
    """A run of experts: its rows `start:stop` in expert-major order, and each busy expert's number and row count."""

    start: int
    stop: int
    experts: list[int]
    counts: list[int]


def _blocks(bounds: list[int], rows: int) -> list[_Block]:
    """Runs of as many experts as would fill `rows` rows at even load; experts with no rows are in none."""
    E, N = len(bounds) - 1, bounds[-1]
    size = max(1, E * rows // N)
    blocks = []
    for first in range(0, E, size):
        run = range(first, min(first + size, E))
        busy = [expert for expert in run if bounds[expert + 1] > bounds[expert]]
        if busy:
            counts = [bounds[expert + 1] - bounds[expert] for expert in busy]
            blocks.append(_Block(bounds[run.start], bounds[run.stop], busy, counts))
    return blocks


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_N: Tensor,
        w_up_EDF: Tensor,
        w_down_EFD: Tensor,
        routing: Routing,
        blocks: list[_Block],
    ) -> Tensor:
        F, D = w_down_EFD.shape[1:]
        steps, view = steps_for(x_TD.dtype)
        x_TD = x_TD.contiguous()
        rows_N = routing.token_N[routing.order_N]
        s_N = weight_N[routing.order_N].to(x_TD.dtype)
        ups, downs = w_up_EDF.unbind(), w_down_EFD.unbind()
        x_buffer, a_buffer, out_buffer = _buffers(x_TD, blocks, (D, F, D))
        y_TD = torch.zeros_like(x_TD)
        x, token, s, y = map(view, (x_TD, rows_N, s_N, y_TD))
        saved_h = []
        for block in blocks:
            n = block.stop - block.start
            here = slice(block.start, block.stop)
            x_ND, a_NF, out_ND, h_NF = x_buffer[:n], a_buffer[:n], out_buffer[:n], x_TD.new_empty(n, 2 * F)
            steps.gather(x, token[here], view(x_ND))
            _times(x_ND, ups, block, h_NF)
            steps.forward(view(h_NF), s[here], view(a_NF))
            _times(a_NF, downs, block, out_ND)
            # Every token is at most once among an expert's rows, so this adds in the order of the experts.
            steps.scatter_add(y, token[here], view(out_ND))
            saved_h.append(h_NF)
        ctx.save_for_backward(x_TD, s_N, w_up_EDF, w_down_EFD, rows_N, routing.order_N, *saved_h)
        ctx.blocks, ctx.weight_dtype = blocks, weight_N.dtype
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TD,) = grads
        x_TD, s_N, w_up_EDF, w_down_EFD, rows_N, order_N, *saved_h = ctx.saved_tensors
        need_x, need_s, need_up, need_down = ctx.needs_input_grad[:4]
        blocks: list[_Block] = ctx.blocks
        F, D = w_down_EFD.shape[1:]
        steps, view = steps_for(x_TD.dtype)
        ups = w_up_EDF.transpose(1, 2).unbind()
        downs = w_down_EFD.transpose(1, 2).unbind()
        x_buffer, dh_buffer, a_buffer, da_buffer, do_buffer = _buffers(x_TD, blocks, (D, 2 * F, F, F, D))
        dx_TD = torch.zeros_like(x_TD) if need_x else x_TD[:0]
        ds_N = torch.empty_like(s_N if need_s else s_N[:0])
        dw_up_EDF = _gradient_like(w_up_EDF, blocks) if need_up else None
        dw_down_EFD = _gradient_like(w_down_EFD, blocks) if need_down else None
        dups = dw_up_EDF.unbind() if dw_up_EDF is not None else ()
        ddowns = dw_down_EFD.unbind() if dw_down_EFD is not None else ()
        x, dy, token, s, dx, ds = map(view, (x_TD, dy_TD.contiguous(), rows_N, s_N, dx_TD, ds_N))
        for block, h_NF in zip(blocks, saved_h, strict=True):
            n = block.stop - block.start
            here = slice(block.start, block.stop)
            x_ND, dh_NF, a_NF, da_NF, do_ND = (z[:n] for z in (x_buffer, dh_buffer, a_buffer, da_buffer, do_buffer))
            steps.gather(dy, token[here], view(do_ND))
            if need_x or need_s or need_up:
                _times(do_ND, downs, block, da_NF)
                steps.backward(view(h_NF), s[here], view(da_NF), view(a_NF), view(dh_NF), ds[here])
            else:
                steps.forward(view(h_NF), s[here], view(a_NF))
            if need_down:
                _gradient(a_NF, do_ND, block, ddowns)
            if need_up:
                steps.gather(x, token[here], view(x_ND))
                _gradient(x_ND, dh_NF, block, dups)
            if need_x:
                steps.scatter_add(dx, token[here], view(_times(dh_NF, ups, block, x_ND)))
        dweight_N = torch.empty_like(ds_N).index_copy_(0, order_N, ds_N).to(ctx.weight_dtype) if need_s else None
        return dx_TD if need_x else None, dweight_N, dw_up_EDF, dw_down_EFD, None, None


@functools.cache
def compiled() -> bool:
    """Whether numba is installed, so that float32 takes `repro.moe.cpu_rows_compiled`."""
    return importlib.util.find_spec("numba") is not None


def _compiles(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and compiled()


def steps_for(dtype: torch.dtype) -> tuple[Any, Callable[[Tensor], Any]]:
    """What is done to rows between GEMMs (`repro.moe.cpu_rows`), compiled if it is, and how that sees a tensor."""
    if _compiles(dtype):
        return importlib.import_module("repro.moe.cpu_rows_compiled"), lambda z: z.detach().numpy()
    return cpu_rows, lambda z: z


def _buffers(like: Tensor, blocks: list[_Block], widths: Sequence[int]) -> list[Tensor]:
    """Memory for the rows of any one block, at each width; every block uses it again."""
    most = max(block.stop - block.start for block in blocks)
    return [like.new_empty(most, width) for width in widths]


def _times(a_NI: Tensor, matrices: Sequence[Tensor], block: _Block, out_NJ: Tensor) -> Tensor:
    """out = each expert's rows times its matrix."""
    for expert, rows, out in zip(
        block.experts, torch.split(a_NI, block.counts), torch.split(out_NJ, block.counts), strict=True
    ):
        torch.mm(rows, matrices[expert], out=out)
    return out_NJ


def _gradient(a_NI: Tensor, b_NJ: Tensor, block: _Block, out: Sequence[Tensor]) -> None:
    """out[e] = aᵀ·b over each expert's rows."""
    for expert, a, b in zip(
        block.experts, torch.split(a_NI, block.counts), torch.split(b_NJ, block.counts), strict=True
    ):
        torch.mm(a.t(), b, out=out[expert])


def _gradient_like(w_EIJ: Tensor, blocks: list[_Block]) -> Tensor:
    """Memory for a weight's gradient; only experts with no rows, which nothing will write, are set to zero."""
    out_EIJ = _gradient_memory(w_EIJ)
    busy = {expert for block in blocks for expert in block.experts}
    for expert in range(len(w_EIJ)):
        if expert not in busy:
            out_EIJ[expert].zero_()
    return out_EIJ


@dataclass(frozen=True, slots=True)
class _Memory:
    """Bytes for gradients of one weight; `lease` is dead once the last tensor that lay in them is."""

    data: np.ndarray[Any, np.dtype[np.uint8]]
    lease: weakref.ref[np.ndarray[Any, np.dtype[np.uint8]]]


_memories: dict[int, _Memory] = {}  # by id of the weight, as long as the weight lives


def _gradient_memory(w: Tensor) -> Tensor:
    """A tensor like the weight `w`, in the memory of `w`'s last gradient if no tensor uses that any more.

    A tensor made from an array holds that very array until its storage is freed, so each gradient gets a view of its own,
    and whether the view still lives says whether the gradient does.
    """
    if not w.is_leaf:
        return torch.empty_like(w)  # a copy that autocast made: it has no next step
    kept = _memories.get(id(w))
    size = w.numel() * w.element_size()
    if kept is None:
        weakref.finalize(w, _memories.pop, id(w), None)
    if kept is None or kept.data.size != size or kept.lease() is not None:
        data = torch.empty(size, dtype=torch.uint8).numpy()
    else:
        data = kept.data
    lease = data.view()
    _memories[id(w)] = _Memory(data, weakref.ref(lease))
    return torch.from_numpy(lease).view(w.dtype).view(w.shape)
