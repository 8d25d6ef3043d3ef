"""The MoE layer: a linear router in float32, a routing rule, the experts, and an optional shared expert.

Frozen parts cost nothing: with `requires_grad_(False)` on the router or on the experts, their gradients are not
computed.
"""

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn import functional as nnf

from repro.moe import triton
from repro.moe.errors import NonFiniteError, RoutingError
from repro.moe.experts import apply_experts, check_backend, swiglu
from repro.moe.routing import RouterOutput, Routing, RoutingRule, TopK

Score = Literal["softmax", "sigmoid"]


class SwiGLU(nn.Module):
    """A dense feed-forward (silu(x·G) ⊙ x·U)·D of width `d_hidden`: the shared expert, or a dense layer's."""

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.w_up_DF = nn.Parameter(torch.empty(d_model, 2 * d_hidden))
        self.w_down_FD = nn.Parameter(torch.empty(d_hidden, d_model))
        nn.init.normal_(self.w_up_DF, std=d_model**-0.5)
        nn.init.normal_(self.w_down_FD, std=d_hidden**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x @ self.w_up_DF) @ self.w_down_FD


class MoE(nn.Module):
    """Dropless token-choice Mixture of SwiGLU experts, (…, d_model) to the same shape.

    d_model, d_expert   widths of the model and of one expert
    num_experts, top_k  experts held, and used by a token
    score               softmax over the experts, or a sigmoid each
    renormalize         make a token's weights sum to 1
    gate_scale          multiplies every weight, after that
    selection_bias      hold `bias_E`, a buffer that sways selection and never the weights (loss-free balancing sets it)
    d_shared            width of an expert that every token uses, unweighted; 0 for none
    backend             one of `repro.moe.BACKENDS`

    A rule given to `forward` replaces `TopK(top_k, renormalize)` for that call, and may give each token its own k.
    Nothing of a call stays on the module. Weights are drawn with std fan_in^-1/2 from torch's global generator.

    Raises `RoutingError` for sizes that cannot be, `NonFiniteError` (naming `self.name`) for NaN or infinite router
    logits; that check is made on the CPU only, where it does not wait for a device, and while `checks_logits` is set.
    """

    def __init__(
        self,
        *,
        d_model: int,
        d_expert: int,
        num_experts: int,
        top_k: int,
        score: Score = "softmax",
        renormalize: bool = True,
        gate_scale: float = 1.0,
        selection_bias: bool = False,
        d_shared: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_sizes(d_model=d_model, d_expert=d_expert, num_experts=num_experts, top_k=top_k, d_shared=d_shared)
        check_score(score)
        check_backend(backend)
        self.name = "moe"
        self.score = score
        self.gate_scale = gate_scale
        self.backend = backend
        self.checks_logits = True
        self.rule: RoutingRule = TopK(top_k, renormalize)
        # Replaced where the experts live on several processes (`repro.moe.parallel`).
        self.experts: Callable[[Tensor, Routing, Tensor, Tensor, str], Tensor] = apply_experts
        self.router_ED = nn.Parameter(torch.empty(num_experts, d_model))
        self.w_up_EDF = nn.Parameter(torch.empty(num_experts, d_model, 2 * d_expert))
        self.w_down_EFD = nn.Parameter(torch.empty(num_experts, d_expert, d_model))
        self.bias_E: Tensor | None
        self.register_buffer("bias_E", torch.zeros(num_experts) if selection_bias else None)
        self.shared = SwiGLU(d_model, d_shared) if d_shared else None
        nn.init.normal_(self.router_ED, std=d_model**-0.5)
        nn.init.normal_(self.w_up_EDF, std=d_model**-0.5)
        nn.init.normal_(self.w_down_EFD, std=d_expert**-0.5)

    def forward(self, x: Tensor, rule: RoutingRule | None = None) -> Tensor:
        return self.forward_with_router(x, rule)[0]

    def forward_with_router(self, x: Tensor, rule: RoutingRule | None = None) -> tuple[Tensor, RouterOutput]:
        """The output, shaped like x, and what the router said about the T = x.numel() / d_model tokens."""
        if torch.compiler.is_dynamo_compiling():
            return _uncompiled(self, x, rule)
        return self._forward(x, rule)

    def _forward(self, x: Tensor, rule: RoutingRule | None) -> tuple[Tensor, RouterOutput]:
        x_TD = x.reshape(-1, x.shape[-1])
        router = self.route(x_TD, rule)
        y_TD = self.experts(x_TD, router.routing, self.w_up_EDF, self.w_down_EFD, self.backend)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD.view(x.shape), router

    def route(self, x_TD: Tensor, rule: RoutingRule | None = None) -> RouterOutput:
        """Logits, scores and routing of tokens (T, D), with no expert run."""
        rule = rule or self.rule
        with torch.autocast(x_TD.device.type, enabled=False):
            # Float32 at the least: near-ties between experts are decided by bits that bfloat16 does not have.
            dtype = torch.promote_types(x_TD.dtype, torch.float32)
            logits_TE = nnf.linear(x_TD.to(dtype), self.router_ED.to(dtype))
            if (
                self.checks_logits
                and logits_TE.device.type == "cpu"
                and not math.isfinite(logits_TE.detach().sum().item())
            ):
                self._check_finite(logits_TE)
            scores_TE = logits_TE.softmax(1) if self.score == "softmax" else logits_TE.sigmoid()
            expert_TK, weight_TK = rule(scores_TE, self.bias_E)
            if self.gate_scale != 1:
                weight_TK = weight_TK * self.gate_scale
        routing = Routing.from_slots(
            expert_TK,
            weight_TK,
            self.router_ED.shape[0],
            all_filled=getattr(rule, "fills_all", None),
            kernels=self.backend == "triton" and triton.supports(x_TD),
        )
        return RouterOutput(logits_TE, scores_TE, routing)

    def _check_finite(self, logits_TE: Tensor) -> None:
        """Name what is not finite; a sum may also overflow with every logit finite, which is no error."""
        bad = int((~logits_TE.isfinite()).sum())
        if bad:
            raise NonFiniteError(self.name, f"{bad} of {logits_TE.numel()} NaN or infinite")


# Experts differ in their number of rows from call to call, which a compiler cannot specialise on: torch.compile compiles
# what surrounds the layer. This form of `torch.compiler.disable` loads the compiler (1.7 s) only when it is in use.
@_disable_dynamo
def _uncompiled(moe: MoE, x: Tensor, rule: RoutingRule | None) -> tuple[Tensor, RouterOutput]:
    return moe._forward(x, rule)


def check_score(score: str) -> None:
    """Raise `RoutingError` unless `score` is a way to turn logits into scores."""
    if score not in get_args(Score):
        raise RoutingError(f"expected score to be softmax or sigmoid, found {score!r}")


def check_sizes(*, d_model: int, d_expert: int, num_experts: int, top_k: int, d_shared: int) -> None:
    """Raise `RoutingError` unless an MoE layer of these sizes can be."""
    for name, value, least in (
        ("d_model", d_model, 1),
        ("d_expert", d_expert, 1),
        ("num_experts", num_experts, 1),
        ("top_k", top_k, 1),
        ("d_shared", d_shared, 0),
    ):
        if value < least:
            raise RoutingError(f"expected {name} of at least {least}, found {value}")
    if top_k > num_experts:
        raise RoutingError(f"expected top_k of at most num_experts={num_experts}, found {top_k}")
