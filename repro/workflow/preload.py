"""Imported by the fork server alone: loads torch, all that the deterministic mode pulls in and what is compiled, once for every
worker."""

import torch

from repro.environment import set_deterministic
from repro.moe import cpu
from repro.workflow import worker  # noqa: F401

set_deterministic()
cpu.steps_for(torch.float32)
