"""Imported by the fork server alone: loads torch, and all that the deterministic mode pulls in, once for every worker."""

from repro.environment import set_deterministic
from repro.workflow import worker  # noqa: F401

set_deterministic()
