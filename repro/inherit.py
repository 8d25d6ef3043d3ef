"""What a segment takes over from the one before it: weights, optimizer state, and a pool of experts to be grown.

- `Parent`: the segment before
- `inherit`: puts what it left into the new segment's model and optimizer
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from repro.checkpoint import load_finished
from repro.data.batches import Batches
from repro.mlp import make_model
from repro.model import ModelConfig, Transformer
from repro.moe import MoE
from repro.moe.growth import Growth, grow, grow_state, utility
from repro.seeds import derive

_UTILITY_BATCHES = 10  # arXiv 2604.19835: gradients are averaged over 10 batches at the transition


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """The finished segment before: its folder, its model's config, and where its trace's chain starts."""

    folder: Path
    model: ModelConfig
    genesis: str


def inherit(
    parent: Parent,
    model: Transformer,
    optimizer: torch.optim.Optimizer | None,
    growth: Growth | None,
    *,
    batches: Batches,
    first_step: int,
    seed: int,
) -> None:
    """Puts the parent's weights into `model`, and its state into `optimizer` if given, growing its expert pool on the way.

    Where growth allots copies by utility, that is measured on the `batches` from `first_step` on.

    Raises:
        InvalidError: the parent's folder does not hold what its trace says.
    """
    if growth is None:
        load_finished(parent.folder, model, optimizer, genesis=parent.genesis)
        return
    old = make_model(parent.model).to(next(model.parameters()).device)
    tensors, _ = load_finished(parent.folder, old, None, genesis=parent.genesis)
    scores = _utilities(old, growth, batches, first_step) if growth.allocation == "utility" else None
    generator = torch.Generator().manual_seed(derive(seed, "growth"))
    model.lineages = lineages = grow(old, model, growth, scores=scores, generator=generator)
    if isinstance(optimizer, torch.optim.AdamW):
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            optimizer.state[parameter] = {
                key: grow_state(name, tensors[f"optimizer.{key}.{name}"], lineages).to(parameter.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }


def _utilities(old: Transformer, growth: Growth, batches: Batches, first_step: int) -> dict[str, Tensor]:
    """Utility of every expert by layer name, on the first batches of the segment."""
    layers = {name: module for name, module in old.named_modules() if isinstance(module, MoE)}
    gradients: dict[str, list[dict[str, Tensor]]] = {name: [] for name in layers}
    for step in range(_UTILITY_BATCHES):
        tokens_BS, targets_BS = batches.at(first_step + step)
        logits_BSV = old(tokens_BS.to(next(old.parameters()).device)).logits_BSV
        loss = torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.to(logits_BSV.device).flatten())
        old.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for name, layer in layers.items():
            pair = {"w_up_EDF": layer.w_up_EDF.grad, "w_down_EFD": layer.w_down_EFD.grad}
            gradients[name].append({leaf: grad.cpu() for leaf, grad in pair.items() if grad is not None})
    return {name: utility(layer, gradients[name], growth.score) for name, layer in layers.items()}
