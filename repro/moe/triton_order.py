"""The stable order of assignments by expert in four Triton kernels: a counting sort that never waits for the device.

- `_count`         how many of each block of assignments go to each expert
- `_scan_blocks`   for each expert, how many of its assignments lie in the blocks before; and its load
- `_scan_experts`  where each expert begins
- `_scatter`       each assignment to its expert's beginning + those in earlier blocks + those earlier in its block

Every place is computed, none is claimed by an atomic: equal inputs give equal orders. The number of experts is a plain
argument.
"""

import importlib

import torch
from torch import Tensor

_BLOCK = 128  # assignments; the last kernel compares all pairs of a block
_EXPERTS = 32
_BLOCKS = 64


def order_by_expert(expert_N: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Stable permutation (N, int64) that sorts `expert_N` (int64, each in 0..num_experts−1), and the experts' CSR offsets."""
    kernels = importlib.import_module("repro.moe.triton_kernels")
    N, device = expert_N.numel(), expert_N.device
    blocks = -(-N // _BLOCK)
    counts = torch.empty(blocks, num_experts, dtype=torch.int32, device=device)
    loads_E = torch.empty(num_experts, dtype=torch.int32, device=device)
    by_expert = torch.empty(num_experts + 1, dtype=torch.int64, device=device)
    order_N = torch.empty_like(expert_N)
    experts_grid = (-(-num_experts // _EXPERTS),)
    if N:
        kernels._count[(blocks,)](expert_N, counts, N, num_experts, BN=_BLOCK, BE=_EXPERTS)
    kernels._scan_blocks[experts_grid](counts, loads_E, blocks, num_experts, BB=_BLOCKS, BE=_EXPERTS)
    kernels._scan_experts[(1,)](loads_E, by_expert, num_experts, BE=1024)
    if N:
        kernels._scatter[(blocks,)](expert_N, counts, by_expert, order_N, N, num_experts, BN=_BLOCK)
    return order_N, by_expert
