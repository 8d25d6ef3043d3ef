"""Loss on held-out bytes."""

import math

import torch
from torch import Tensor

from repro.model import Transformer
from repro.moe import RoutingRule

_WINDOWS_AT_ONCE = 32


@torch.no_grad()
def held_out_loss(model: Transformer, tokens_WS: Tensor, targets_WS: Tensor, rule: RoutingRule | None = None) -> float:
    """Mean cross-entropy of (windows, context) next bytes in nats/byte, under `rule` or the model's own top-k.

    For a classifier that of each window's class alone, in nats.

    Summed in float64 over batches of a fixed size, so that the value depends on nothing but model and windows.
    """
    model.eval()
    device = next(model.parameters()).device
    sums, count = [], 0
    for first in range(0, len(tokens_WS), _WINDOWS_AT_ONCE):
        part = slice(first, first + _WINDOWS_AT_ONCE)
        logits_BSV = model(tokens_WS[part].to(device), rule=rule).logits_BSV
        loss_N = torch.nn.functional.cross_entropy(
            logits_BSV.float().flatten(0, 1),
            targets_WS[part, -logits_BSV.shape[1] :].to(device).flatten(),
            reduction="none",
        )
        sums.append(float(loss_N.double().sum()))
        count += loss_N.numel()
    return math.fsum(sums) / count
