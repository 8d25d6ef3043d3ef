"""Do duplicates specialise? What the referee asks of an expert and its copies (claim U9).

Twins are experts with a common origin (`Transformer.lineages`); every other pair of a layer is a pair of strangers.

- `likeness`: of a pool's twins and strangers: cosine of their weights, of their gradients, and overlap of their tokens
- `averaged`: the model with each expert replaced by the mean of its twins
- `tie`: what keeps twins equal all along, for the control; `diagnose`: all of it, measured
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repro.evals.held_out import held_out_loss
from repro.evals.load import gini
from repro.model import Transformer
from repro.moe import MoE, Routing

_WEIGHTS = ("w_up_EDF", "w_down_EFD")


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """Mean over pairs of twins and median over pairs of strangers, both averaged over layers."""

    twins: float
    strangers: float


def grown_layers(model: Transformer) -> dict[str, tuple[MoE, Tensor]]:
    """MoE layers with their lineages, of a model whose pool was grown by copying some of at least two experts.

    With a single origin all experts are twins, and there are no strangers to compare them with.
    """
    found = {}
    for name, lineage_E in model.lineages.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, MoE)
        if bool((lineage_E >= 0).all()) and 1 < int(lineage_E.max()) + 1 < len(lineage_E):
            found[name] = (layer, lineage_E)
    return found


def likeness(pair_EE: Tensor, lineage_E: Tensor) -> tuple[float, float]:
    """Mean of the symmetric `pair_EE` over pairs of twins, and its median over the pairs of strangers."""
    twins_EE = lineage_E[:, None] == lineage_E[None, :]
    above_EE = torch.ones_like(twins_EE).triu(1)
    return float(pair_EE[twins_EE & above_EE].mean()), float(pair_EE[~twins_EE & above_EE].median())


def mean_likeness(pairs: Sequence[tuple[float, float]]) -> Likeness:
    """Average over layers (or batches)."""
    twins, strangers = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    return Likeness(twins=twins, strangers=strangers)


def cosine(tensors: Sequence[Tensor]) -> Tensor:
    """Cosine (E, E) of experts' weights or gradients, given as tensors (E, …); 0 where an expert's is 0."""
    flat_EN = torch.cat([tensor.detach().flatten(1).double() for tensor in tensors], dim=1)
    unit_EN = flat_EN / flat_EN.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    cosine_EE: Tensor = unit_EN @ unit_EN.t()
    return cosine_EE


def weight_cosine(layer: MoE) -> Tensor:
    """Cosine (E, E) of the experts' weights."""
    return cosine([getattr(layer, leaf) for leaf in _WEIGHTS])


def gradient_cosine(layer: MoE) -> Tensor:
    """Cosine (E, E) of the experts' gradients."""
    return cosine([getattr(layer, leaf).grad for leaf in _WEIGHTS])


def chosen_together(routing: Routing) -> Tensor:
    """Counts (E, E) of the tokens for which both experts were chosen; on the diagonal the tokens of each."""
    chosen_TE = torch.zeros(routing.num_tokens, routing.num_experts, device=routing.token_N.device)
    chosen_TE[routing.token_N, routing.expert_N] = 1
    return (chosen_TE.t() @ chosen_TE).double()


def overlap(together_EE: Tensor) -> Tensor:
    """Co-activation overlap (E, E): tokens for which both were chosen over those for which either was (Jaccard)."""
    load_E = together_EE.diagonal()
    either_EE = load_E[:, None] + load_E[None, :] - together_EE
    return together_EE / either_EE.clamp_min(1)


@torch.no_grad()
def averaged(model: Transformer) -> Transformer:
    """A copy of `model` whose experts are the mean of their twins; router and biases stay."""
    made = copy.deepcopy(model)
    made.lineages = dict(model.lineages)
    for layer, lineage_E in grown_layers(made).values():
        for leaf in _WEIGHTS:
            weight = getattr(layer, leaf)
            weight.copy_(_means(weight, lineage_E.to(weight.device)))
    return made


@torch.no_grad()
def tie(model: Transformer) -> None:
    """Gives all twins the mean of their gradients: under the same optimizer they stay equal bit for bit."""
    for layer, lineage_E in grown_layers(model).values():
        for leaf in _WEIGHTS:
            gradient = getattr(layer, leaf).grad
            gradient.copy_(_means(gradient, lineage_E.to(gradient.device)))


def _means(value: Tensor, lineage_E: Tensor) -> Tensor:
    """`value` (E, …) with each row replaced by the mean over the rows of the same lineage."""
    rows = lineage_E.max().item() + 1
    sums = value.new_zeros(int(rows), *value.shape[1:]).index_add_(0, lineage_E, value)
    counts = torch.bincount(lineage_E, minlength=int(rows)).clamp_min(1).to(value.dtype)
    return (sums / counts.view(-1, *[1] * (value.dim() - 1)))[lineage_E]


def weight_likeness(model: Transformer) -> Likeness:
    """Likeness of the weights over the grown layers."""
    return mean_likeness([likeness(weight_cosine(layer), origin) for layer, origin in grown_layers(model).values()])


def gradient_likeness(model: Transformer) -> Likeness:
    """Likeness of the gradients that `model` holds, over the grown layers."""
    return mean_likeness([likeness(gradient_cosine(layer), origin) for layer, origin in grown_layers(model).values()])


def overlap_likeness(model: Transformer, together: Mapping[str, Tensor]) -> Likeness:
    """Likeness of the tokens, from counts (E, E) by layer name (`chosen_together`)."""
    return mean_likeness(
        [likeness(overlap(together[name]).cpu(), origin) for name, (_, origin) in grown_layers(model).items()]
    )


def flat(**found: Likeness) -> dict[str, float]:
    """`twins/NAME` and `strangers/NAME` for each likeness NAME."""
    return {f"{part}/{name}": getattr(like, part) for name, like in found.items() for part in ("twins", "strangers")}


_BATCHES, _WINDOWS = 8, 16  # of held-out text, for gradients


def diagnose(model: Transformer, tokens_WS: Tensor, targets_WS: Tensor) -> dict[str, float]:
    """Likeness of twins and strangers on held-out text, `loss/averaged`, and the load's Gini coefficient `load/gini`.

    A gradient's cosine is that on one batch, averaged over batches: the mean gradient of a trained model is small.
    """
    device = model.embedding_VD.device
    names = list(model.lineages)
    together: dict[str, Tensor] = {}
    with torch.no_grad():
        for first in range(0, len(tokens_WS), 2 * _WINDOWS):
            tokens_BS = tokens_WS[first : first + 2 * _WINDOWS].to(device)
            for name, router in zip(names, model(tokens_BS).routers, strict=True):
                counts_EE = chosen_together(router.routing)
                together[name] = counts_EE + together.get(name, torch.zeros_like(counts_EE))
    gradients: list[tuple[float, float]] = []
    for first in range(0, min(_BATCHES * _WINDOWS, len(tokens_WS)), _WINDOWS):
        tokens_BS, targets_BS = tokens_WS[first : first + _WINDOWS], targets_WS[first : first + _WINDOWS]
        model.zero_grad(set_to_none=True)
        logits_BSV = model(tokens_BS.to(device)).logits_BSV
        loss = torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.to(device).flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        like = gradient_likeness(model)
        gradients.append((like.twins, like.strangers))
    model.zero_grad(set_to_none=True)
    loads = [together[name].diagonal().cpu() for name in names]
    return flat(
        cosine=weight_likeness(model),
        gradient=mean_likeness(gradients),
        overlap=overlap_likeness(model, together),
    ) | {
        "loss/averaged": held_out_loss(averaged(model), tokens_WS, targets_WS),
        "load/gini": sum(map(gini, loads)) / len(loads),
    }
