"""SwiGLU experts on a routing, and the choice of the backend that computes them.

y_t = Σ over the assignments (t, e, s) of s · (silu(x_t·G_e) ⊙ (x_t·U_e))·D_e, with `w_up_EDF` (E, D, 2F) = [G_e |
U_e] in one tensor, so that one GEMM computes both halves, and `w_down_EFD` (E, F, D) = D_e. Both are stored
input-major: the forward GEMMs then read them as they lie. (On the CPU the three orders of a GEMM cost the same to 5%;
input-major is also what `grouped_mm` takes with no transposition.)
"""

import os

import torch
from torch import Tensor

from repro.moe import cpu, grouped, reference, triton
from repro.moe.errors import MoEMemoryError, RoutingError
from repro.moe.routing import Routing

_COMPUTE = {"reference": reference.apply, "cpu": cpu.apply, "grouped": grouped.apply, "triton": triton.apply}
BACKENDS = ("auto", *_COMPUTE)


def apply_experts(
    x_TD: Tensor, routing: Routing, w_up_EDF: Tensor, w_down_EFD: Tensor, backend: str = "auto"
) -> Tensor:
    """Weighted sum (T, D) of each token's experts; a token with no expert gets zero.

    Differentiable in x, the routing's weights, `w_up_EDF` (E, D, 2F) and `w_down_EFD` (E, F, D); a gradient that
    nobody needs is not computed. `auto` takes the fastest backend for the device and dtype. All backends agree to
    rounding.

    Raises `RoutingError` if the shapes disagree or the backend is unknown, and `MoEMemoryError`, which says what
    would fit, if the forward pass runs out of memory.
    """
    T, D = x_TD.shape
    E, F = w_down_EFD.shape[:2]
    if w_up_EDF.shape != (E, D, 2 * F) or w_down_EFD.shape != (E, F, D):
        raise RoutingError(
            f"expected experts of shape (E, {D}, 2F) and (E, F, {D}), found {tuple(w_up_EDF.shape)} and "
            f"{tuple(w_down_EFD.shape)}"
        )
    if routing.num_experts != E or routing.num_tokens != T:
        raise RoutingError(
            f"expected a routing of {T} tokens to {E} experts, found one of {routing.num_tokens} to "
            f"{routing.num_experts}"
        )
    check_backend(backend)
    if routing.token_N.numel() == 0:
        # Nothing to compute; every input stays in the graph (by no element), so its gradient is zero rather than missing.
        nothing = [z[:0].sum().to(x_TD.dtype) for z in (x_TD, routing.weight_N, w_up_EDF, w_down_EFD)]
        return x_TD.new_zeros(T, D) + torch.stack(nothing).sum()
    device = x_TD.device.type
    if torch.is_autocast_enabled(device):
        x_TD, w_up_EDF, w_down_EFD = (z.to(torch.get_autocast_dtype(device)) for z in (x_TD, w_up_EDF, w_down_EFD))
    if backend == "auto":
        # Triton's kernels are chosen by name until they have been measured on a GPU.
        backend = "cpu" if device == "cpu" else "grouped" if grouped.supports(x_TD, w_down_EFD) else "reference"
    try:
        return _COMPUTE[backend](x_TD, routing, w_up_EDF, w_down_EFD)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        # x, the two halves of the pre-activation, the activation and the output of each of a token's assignments.
        token_bytes = routing.token_N.numel() * (2 * D + 3 * F) * x_TD.element_size() // T
        raise MoEMemoryError(T, token_bytes, _free_bytes(x_TD.device)) from error


def check_backend(backend: str) -> None:
    """Raise `RoutingError` unless `backend` is one that `apply_experts` knows."""
    if backend not in BACKENDS:
        raise RoutingError(f"expected a backend of {', '.join(BACKENDS)}, found {backend!r}")


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def swiglu(h_TF: Tensor) -> Tensor:
    """silu(gate) ⊙ up of the two halves of the last axis, gate first."""
    gate, up = h_TF.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
