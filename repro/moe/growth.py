"""Growing the expert pool of a trained model: every choice is data, so that a recipe is a config.

- `Growth`: which experts are copied and how often, what new experts, router rows and selection biases start as
- `allocate`: how many copies each expert gets, evenly or by utility
- `utility`: the scores by which experts can be ranked
- `grow`: fills a freshly initialised larger model from the smaller one and says where each expert comes from
- `grow_state`: the same for a per-weight optimizer state

The old experts keep their places 0 … E−1; new ones follow, copies in the order of their sources.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from repro.moe.errors import RoutingError
from repro.moe.layer import MoE

Score = Literal["grad2", "weight_grad", "weight", "grad2_per_curvature", "least_grad2"]

NEW = -1  # in a lineage: the expert was not copied from another


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """How a pool is grown; the new size is that of the larger model's config.

    experts      new experts: `copy` of old ones, or `random` as the larger model's own initialisation draws them
    router       new router rows: those of the experts' sources, or `random` likewise
    allocation   copies an expert: the same for all, or more for the useful (`score`; at most `max_copies` more each)
    weight_noise std of the Gaussian noise on copies, relative to the std of the copied tensor (0: none)
    bias_noise   δ of the U(−δ, δ) added to the selection biases of new experts alone (needs a selection bias)
    reset_bias   set all selection biases to 0 first
    """

    experts: Literal["copy", "random"] = "copy"
    router: Literal["copy", "random"] = "copy"
    allocation: Literal["uniform", "utility"] = "uniform"
    score: Score = "grad2"
    max_copies: int = 3
    weight_noise: float = 0.0
    bias_noise: float = 0.0
    reset_bias: bool = False

    def __post_init__(self) -> None:
        if self.router == "copy" and self.experts == "random":
            raise RoutingError(
                "growth: a random expert has no source whose router row it could copy; use router='random'"
            )
        if self.max_copies < 1 or self.weight_noise < 0 or self.bias_noise < 0:
            raise RoutingError("growth: expected max_copies of at least 1 and noise of at least 0")


def allocate(growth: Growth, num_experts: int, new_experts: int, score_E: Tensor | None = None) -> list[int]:
    """Copies that each of `num_experts` experts gets, `new_experts` in all, itself not counted.

    `uniform` gives every expert the same. `utility` is greedy: the most useful expert gets `max_copies`, then the
    next, until none are left (arXiv 2604.19835, section 3: at E = 32 → 64 that is 3 copies for ten experts, 2 for
    one, 0 for 21). Ties go to the lower index.

    Raises:
        RoutingError: a number that cannot be dealt out so, or no scores for `utility`.
    """
    if growth.allocation == "uniform":
        if new_experts % num_experts:
            raise RoutingError(
                f"growth: expected a multiple of {num_experts} experts to copy each equally often, found "
                f"{num_experts + new_experts}; use allocation='utility'"
            )
        return [new_experts // num_experts] * num_experts
    if score_E is None or score_E.shape != (num_experts,):
        raise RoutingError(f"growth: expected a utility for each of {num_experts} experts")
    if new_experts > growth.max_copies * num_experts:
        raise RoutingError(
            f"growth: {num_experts} experts with at most {growth.max_copies} copies each give no {new_experts} new ones"
        )
    copies, left = [0] * num_experts, new_experts
    for expert in torch.sort(score_E, descending=True, stable=True).indices.tolist():
        copies[expert] = min(growth.max_copies, left)
        left -= copies[expert]
    return copies


def utility(layer: MoE, gradients: Sequence[Mapping[str, Tensor]], score: Score) -> Tensor:
    """Utility (E,) of a layer's experts, from the gradients of several batches, `w_up_EDF` and `w_down_EFD` in each.

    The gradient g of an expert is the mean over the batches. `grad2` ‖g‖², `weight_grad` ‖w‖·‖g‖, `weight` ‖w‖,
    `grad2_per_curvature` Σ g²/H over its weights, with H the mean of the batches' squared gradients (the diagonal of the
    empirical Fisher matrix; what the paper takes for its H is not known), `least_grad2` the reverse of `grad2`.
    """
    names = ("w_up_EDF", "w_down_EFD")
    E = layer.w_up_EDF.shape[0]
    means = [torch.stack([batch[name] for batch in gradients]).mean(0) for name in names] if gradients else []
    grad2_E = sum((mean.square().view(E, -1).sum(1) for mean in means), torch.zeros(E))
    weights = [getattr(layer, name).detach().cpu() for name in names]
    weight2_E = sum((weight.square().view(E, -1).sum(1) for weight in weights), torch.zeros(E))
    if score == "weight":
        return weight2_E.sqrt()
    if not gradients:
        raise RoutingError(f"growth: the utility {score} needs gradients of at least one batch")
    if score == "weight_grad":
        return (weight2_E * grad2_E).sqrt()
    if score == "grad2_per_curvature":
        curvatures = [torch.stack([batch[name] for batch in gradients]).square().mean(0) for name in names]
        # where every batch's gradient is 0, so is the mean
        ratios = [
            mean.square() / h.clamp_min(torch.finfo(h.dtype).tiny) for mean, h in zip(means, curvatures, strict=True)
        ]
        return sum((ratio.view(E, -1).sum(1) for ratio in ratios), torch.zeros(E))
    return grad2_E if score == "grad2" else -grad2_E


@torch.no_grad()
def grow(
    old: nn.Module,
    new: nn.Module,
    growth: Growth,
    *,
    scores: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Fills `new`, freshly initialised, from `old`; returns each MoE layer's lineage (E_new,) by the layer's name.

    A lineage holds each expert's index in the old layer, `NEW` for one that is random. All weights that do not depend
    on the number of experts are taken over as they are. `scores` are utilities by layer name; `generator` draws the
    noise.

    Raises:
        RoutingError: models that differ in more than their number of experts, a pool that would shrink, or a growth
            that the layers cannot have.
    """
    old_layers = {name: module for name, module in old.named_modules() if isinstance(module, MoE)}
    lineages: dict[str, Tensor] = {}
    pooled: set[str] = set()
    for name, layer in new.named_modules():
        if not isinstance(layer, MoE):
            continue
        if name not in old_layers:
            raise RoutingError(f"growth: the smaller model has no MoE layer {name}")
        lineages[name] = _grow_layer(old_layers[name], layer, growth, (scores or {}).get(name), generator)
        pooled |= {f"{name}.{leaf}" for leaf in (*_POOLED, "bias_E")}
    state, target = old.state_dict(), new.state_dict()
    if state.keys() != target.keys():
        raise RoutingError("growth: the two models differ in more than their number of experts")
    for name in state.keys() - pooled:
        if state[name].shape != target[name].shape:
            raise RoutingError(
                f"growth: {name} is {tuple(state[name].shape)} in one model, {tuple(target[name].shape)} in the other"
            )
        target[name].copy_(state[name])
    return lineages


_POOLED = ("router_ED", "w_up_EDF", "w_down_EFD")


def _grow_layer(
    old: MoE, new: MoE, growth: Growth, score_E: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    before, after = old.router_ED.shape[0], new.router_ED.shape[0]
    if after < before:
        raise RoutingError(f"growth: a pool of {before} experts cannot shrink to {after}")
    if growth.experts == "copy":
        copies = allocate(growth, before, after - before, score_E)
        sources = [expert for expert, count in enumerate(copies) for _ in range(count)]
    else:
        sources = [NEW] * (after - before)
    lineage_E = torch.tensor([*range(before), *sources])
    copied_E = (lineage_E >= 0).nonzero().squeeze(1)
    for leaf in _POOLED:
        to, source = getattr(new, leaf), getattr(old, leaf)
        if to.shape[1:] != source.shape[1:]:
            raise RoutingError(
                f"growth: the experts differ in shape: {tuple(source.shape[1:])} and {tuple(to.shape[1:])}"
            )
        kept = copied_E[copied_E < before] if leaf == "router_ED" and growth.router == "random" else copied_E
        to[kept] = source[lineage_E[kept]]
        if growth.weight_noise and leaf != "router_ED":
            fresh = kept[kept >= before]
            # Drawn on the CPU, by its generator, so that every device gets the same.
            noise = torch.empty(to[fresh].shape, dtype=to.dtype).normal_(generator=generator)
            to[fresh] += growth.weight_noise * source.std() * noise.to(to.device)
    if new.bias_E is None or old.bias_E is None:
        if growth.bias_noise or growth.reset_bias:
            raise RoutingError("growth: bias_noise and reset_bias need a model with a selection bias")
        return lineage_E
    new.bias_E.zero_()
    if not growth.reset_bias:
        new.bias_E[copied_E] = old.bias_E[lineage_E[copied_E]]
    noise = torch.empty(after - before).uniform_(-1, 1, generator=generator)
    new.bias_E[before:] += growth.bias_noise * noise.to(new.bias_E.device)
    return lineage_E


def grow_state(name: str, value: Tensor, lineages: Mapping[str, Tensor]) -> Tensor:
    """State of the parameter `name` of the grown model, from `value`, that of the smaller model.

    A copy gets its source's state, a random expert zeros; the state of a weight outside the pools stays as it is.
    """
    layer, _, leaf = name.rpartition(".")
    if leaf not in _POOLED or layer not in lineages or value.dim() == 0:
        return value
    lineage_E = lineages[layer]
    grown = value.new_zeros(lineage_E.numel(), *value.shape[1:])
    known_E = (lineage_E >= 0).nonzero().squeeze(1)
    grown[known_E] = value[lineage_E[known_E]]
    return grown
