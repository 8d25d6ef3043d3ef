"""How evenly the tokens are spread over the experts."""

import torch
from torch import Tensor


def gini(load_E: Tensor) -> float:
    """Gini coefficient of a load, 0 for an even one: Σ_i (2i − n − 1)·x_i / (n·Σx) over the n loads in rising order."""
    ordered = load_E.double().sort().values
    n = len(ordered)
    weights = 2 * torch.arange(1, n + 1, dtype=torch.float64) - n - 1
    return float((weights * ordered).sum() / (n * ordered.sum()))
