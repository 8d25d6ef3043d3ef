"""The Mixture-of-Experts core: dropless, token-choice routing with the routing itself as data.

- `MoE` is the layer: (…, d_model) to the same shape.
- `Routing` says which token goes to which expert with which weight; a `RoutingRule` makes it from the router's
  scores, and is the one hook by which an experiment brings a selection or a gate of its own. `TopK` is the usual one.
- `apply_experts` runs the SwiGLU experts on a routing; its backends agree to rounding and each is deterministic.

Tensor names end in their axes, here and in all that builds on this package:

    T tokens (batch and sequence flattened)   B batch   S sequence   V vocabulary   L layers   H heads
    D model width      F expert width         E experts              K slots a token (the largest k of the batch)
    N assignments (token, expert), at most T·K

`weight_TK` is a (T, K) tensor; `order_N` has N entries. A trailing 2F is the gate half, then the up half.
"""

from repro.moe.errors import MoEMemoryError, NonFiniteError, RoutingError
from repro.moe.experts import BACKENDS, apply_experts
from repro.moe.layer import MoE, SwiGLU
from repro.moe.routing import RouterOutput, Routing, RoutingRule, TopK, balance_loss

__all__ = [
    "BACKENDS",
    "MoE",
    "MoEMemoryError",
    "NonFiniteError",
    "RouterOutput",
    "Routing",
    "RoutingError",
    "RoutingRule",
    "SwiGLU",
    "TopK",
    "apply_experts",
    "balance_loss",
]
