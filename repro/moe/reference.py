"""The reference backend: the definition, one expert after the other, differentiated by autograd. Any device, float64
too."""

import torch
from torch import Tensor
from torch.nn import functional as nnf

from repro.moe.routing import Routing


def apply(x_TD: Tensor, routing: Routing, w_up_EDF: Tensor, w_down_EFD: Tensor) -> Tensor:
    """Weighted sum (T, D) of each token's experts; see `repro.moe.experts`."""
    bounds = routing.by_expert.tolist()
    y_TD = torch.zeros_like(x_TD)
    # unbind, not indexing: the backward of w[e] would fill a zero tensor of the size of all experts for every expert.
    for expert, (w_up_DF, w_down_FD) in enumerate(zip(w_up_EDF.unbind(), w_down_EFD.unbind(), strict=True)):
        mine = routing.order_N[bounds[expert] : bounds[expert + 1]]
        if mine.numel() == 0:
            continue
        tokens = routing.token_N[mine]
        gate, up = (x_TD[tokens] @ w_up_DF).chunk(2, dim=-1)
        out = (nnf.silu(gate) * up) @ w_down_FD
        # A token meets an expert at most once, so index_add never adds twice to one row: its order is the loop's.
        y_TD = y_TD.index_add(0, tokens, out * routing.weight_N[mine, None].to(out.dtype))
    return y_TD
