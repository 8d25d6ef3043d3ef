"""What the CPU backend does to the rows of some experts between its GEMMs, with torch's operations, in any dtype.

`repro.moe.cpu_rows_compiled` has the same four functions for float32 where numba is installed. n rows, D the model's width, F the
experts'; s weighs the assignments.
"""

import torch
from torch import Tensor


def gather(x_TD: Tensor, rows_N: Tensor, out_ND: Tensor) -> None:
    """out[n] = x[rows[n]]."""
    torch.index_select(x_TD, 0, rows_N, out=out_ND)


def scatter_add(y_TD: Tensor, rows_N: Tensor, z_ND: Tensor) -> None:
    """y[rows[n]] += z[n], in the order of n."""
    y_TD.index_add_(0, rows_N, z_ND)


def forward(h_NF: Tensor, s_N: Tensor, a_NF: Tensor) -> None:
    """a = s · silu(gate) ⊙ up, where h (n, 2F) holds gate and up beside each other."""
    gate, up = h_NF.chunk(2, dim=1)
    torch.ops.aten.silu.out(gate, out=a_NF).mul_(up).mul_(s_N[:, None])


def backward(h_NF: Tensor, s_N: Tensor, da_NF: Tensor, a_NF: Tensor, dh_NF: Tensor, ds_N: Tensor) -> None:
    """From the gradient of unweighted activations, dA', those of h and of s; a again as `forward` makes it.

    Writes over dA'. ds of length 0 is left out.
    """
    gate, up = h_NF.chunk(2, dim=1)
    dgate, dup = dh_NF.chunk(2, dim=1)
    s_N1 = s_N[:, None]
    silu = torch.ops.aten.silu.out(gate, out=dgate)  # its place until the gradient comes
    torch.mul(silu, up, out=a_NF)
    if ds_N.numel():
        torch.linalg.vecdot(da_NF, a_NF, out=ds_N)
    a_NF.mul_(s_N1)
    torch.mul(da_NF.mul_(s_N1), silu, out=dup)
    torch.ops.aten.silu_backward.grad_input(da_NF.mul_(up), gate, grad_input=dgate)
