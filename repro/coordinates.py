"""The coordinate check: how large each term of an MoE layer is, before and during training, on one batch.

With up weights U, down weights W, hidden h and the gates φ of the current model, an MoE layer's output splits into

    Σ φ·W_t·h_t  =  Σ φ·W_0·h_0 (init)  +  Σ φ·W_0·(h_t − h_0) (propagating)  +  Σ φ·(W_t − W_0)·h_t (effective)

- `coordinates`: RMS of these three, of the router's logits and of the gradient at the layer's input, and the backward
  ratio RMS(W_0ᵀδ) / RMS((W_t − W_0)ᵀδ) over the assignments, δ the gradient at the layer's output

In a parameterization that is stable in scale, none of these depends on the width. Gradients are in natural units: of one
token's loss, times the width, since a coordinate of a Θ(1) feature moves the loss by Θ(1/N), over the residual multiplier.
Source: arXiv 2605.14200.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from repro.model import Transformer
from repro.moe import MoE, RouterOutput, RoutingRule


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinates:
    """One MoE layer's: `backward` is None where no weight has moved yet."""

    init: float
    propagating: float
    effective: float
    router: float
    gradient: float
    backward: float | None


@dataclass(slots=True)
class _Passed:
    """What went through an MoE layer in one forward pass."""

    x_TD: Tensor
    y_TD: Tensor
    router: RouterOutput


def coordinates(first: Transformer, now: Transformer, tokens_BS: Tensor, targets_BS: Tensor) -> list[Coordinates]:
    """Of each MoE layer in order; `first` is the model as drawn, `now` the same one trained."""
    with torch.no_grad(), _watched(first) as before:
        first(tokens_BS)
    for parameter in now.parameters():
        parameter.grad = None
    with torch.enable_grad(), _watched(now) as after:
        logits_BSV = now(tokens_BS).logits_BSV
        targets_T = targets_BS[:, -logits_BSV.shape[1] :].flatten()
        torch.nn.functional.cross_entropy(logits_BSV.float().flatten(0, 1), targets_T, reduction="sum").backward()  # type: ignore[no-untyped-call]
    for parameter in now.parameters():
        parameter.grad = None
    layers = zip(_layers(first), _layers(now), before, after, strict=True)
    return [_layer(*layer, now.config.residual_scale) for layer in layers]


@torch.no_grad()
def _layer(first: MoE, now: MoE, before: _Passed, after: _Passed, residual: float) -> Coordinates:
    routing = after.router.routing
    init_TD = now.experts(before.x_TD, routing, first.w_up_EDF, first.w_down_EFD, now.backend)
    carried_TD = now.experts(after.x_TD, routing, now.w_up_EDF, first.w_down_EFD, now.backend)
    moved_EFD = now.w_down_EFD - first.w_down_EFD
    gradient_TD, delta_TD = after.x_TD.grad, after.y_TD.grad
    assert gradient_TD is not None
    assert delta_TD is not None
    start, moved = 0.0, 0.0
    bounds = routing.by_expert.tolist()
    for expert, (low, high) in enumerate(itertools.pairwise(bounds)):
        token_N = routing.token_N[routing.order_N[low:high]]
        delta_ND = delta_TD[token_N].double()
        start += float((delta_ND @ first.w_down_EFD[expert].t().double()).square().sum())
        moved += float((delta_ND @ moved_EFD[expert].t().double()).square().sum())
    return Coordinates(
        init=_rms(init_TD),
        propagating=_rms(carried_TD - init_TD),
        effective=_rms(now.experts(after.x_TD, routing, now.w_up_EDF, moved_EFD, now.backend)),
        router=_rms(after.router.logits_TE),
        gradient=_rms(gradient_TD) * gradient_TD.shape[1] / residual,
        backward=(start / moved) ** 0.5 if moved else None,
    )


def _rms(z: Tensor) -> float:
    return float(z.double().square().mean().sqrt())


def _layers(model: Transformer) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


@contextmanager
def _watched(model: Transformer) -> Iterator[list[_Passed]]:
    """Collects what passes through the model's MoE layers while the context lasts, in order."""
    passed: list[_Passed] = []

    def watch(
        forward: Callable[[Tensor, RoutingRule | None], tuple[Tensor, RouterOutput]],
    ) -> Callable[[Tensor, RoutingRule | None], tuple[Tensor, RouterOutput]]:
        def watching(x: Tensor, rule: RoutingRule | None = None) -> tuple[Tensor, RouterOutput]:
            x_TD = x.reshape(-1, x.shape[-1])
            y_TD, router = forward(x_TD, rule)
            for z in (x_TD, y_TD):
                if z.requires_grad:
                    z.retain_grad()
            passed.append(_Passed(x_TD, y_TD, router))
            return y_TD.view(x.shape), router

        return watching

    layers = _layers(model)
    for layer in layers:
        setattr(layer, "forward_with_router", watch(layer.forward_with_router))  # noqa: B010 (to shadow a method)
    try:
        yield passed
    finally:
        for layer in layers:
            del layer.forward_with_router
