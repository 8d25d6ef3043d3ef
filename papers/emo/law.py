"""The joint MoE scaling law of Ludziejewski et al. (arXiv 2502.05172), and the token budgets that EMO may derive from it.

    L(E, N, D) = a·Ê^δ·N^(α + γ ln Ê) + b·Ê^ω·D^(β + ζ ln Ê) + c
    1/Ê = 1/(E − 1 + (1/E_s − 1/E_m)^-1) + 1/E_m

with N active parameters, D tokens, E experts and L in nats/token. The law was fitted for E ≤ 32 with coarse experts; what
lies beyond is extrapolation, and `warnings` says so in plan and report.

EMO's own coefficients, and how it gets budgets from a law, are not known. Two readings are computed here, both from D*(E),
the tokens at which the two falling terms shrink at the same rate for a model of E experts:

- H1: a stage's own tokens are in proportion to D*(E of the stage)
- H2: the tokens at the end of a stage are
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from records.errors import UsageError

A, ALPHA, DELTA, GAMMA = 35.91, -0.1889, -0.2285, 0.0098
B, BETA, OMEGA, ZETA = 35.98, -0.1775, 0.5529, -0.0259
E_START, E_MAX, C = 2.0732, 290.4521, 1.3637
FITTED_UP_TO = 32  # experts

PRINTED_SHARES = (0.235, 0.095, 0.165, 0.218, 0.286)  # EMO's stages E = 8, 16, 32, 64, 128, as a summary gives them


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficients:
    """L = m·N^μ + n·D^ν + c at a fixed number of experts."""

    m: float
    mu: float
    n: float
    nu: float


def effective_experts(num_experts: int) -> float:
    """Ê, the law's saturating measure of the number of experts."""
    return 1 / (1 / (num_experts - 1 + 1 / (1 / E_START - 1 / E_MAX)) + 1 / E_MAX)


def in_range(num_experts: int) -> bool:
    """Whether the law was fitted for so many experts."""
    return 1 <= num_experts <= FITTED_UP_TO


def coefficients(num_experts: int) -> Coefficients:
    """The law at `num_experts` (Table 4 of its paper)."""
    effective = effective_experts(num_experts)
    log = math.log(effective)
    return Coefficients(m=A * effective**DELTA, mu=ALPHA + GAMMA * log, n=B * effective**OMEGA, nu=BETA + ZETA * log)


def loss(num_experts: int, active: float, tokens: float) -> float:
    """The law's loss in nats/token for `active` parameters and `tokens` tokens."""
    at = coefficients(num_experts)
    return float(at.m * active**at.mu + at.n * tokens**at.nu + C)


def balanced_tokens(num_experts: int, active: float) -> float:
    """D*(E): tokens at which d/d ln N and d/d ln D of the law are equal: [νn/(μm)]^(1/|ν|)·N^(μ/ν)."""
    at = coefficients(num_experts)
    return float(((at.nu * at.n) / (at.mu * at.m)) ** (-1 / at.nu) * active ** (at.mu / at.nu))


def shares_by_stage(stages: Sequence[int], active: float) -> tuple[float, ...]:
    """H1: each stage's share of the tokens, in proportion to D*(E)."""
    tokens = [balanced_tokens(experts, active) for experts in stages]
    return tuple(value / math.fsum(tokens) for value in tokens)


def shares_by_total(stages: Sequence[int], active: float) -> tuple[float, ...]:
    """H2: shares of the tokens such that their running sum is in proportion to D*(E)."""
    tokens = [balanced_tokens(experts, active) for experts in stages]
    return tuple((value - before) / tokens[-1] for before, value in zip((0.0, *tokens), tokens, strict=False))


def printed(stages: int) -> tuple[float, ...]:
    """EMO's printed shares of its last so many stages, made to sum to 1."""
    shares = PRINTED_SHARES[-stages:]
    return tuple(share / math.fsum(shares) for share in shares)


def warnings(stages: Sequence[int], *, d_model: int, d_expert: int) -> tuple[str, ...]:
    """What must be said of budgets that the law gives for these models: where it was not fitted, it extrapolates."""
    found = []
    if beyond := [experts for experts in stages if not in_range(experts)]:
        found.append(f"for {', '.join(map(str, beyond))} experts, where it was fitted up to {FITTED_UP_TO}")
    if 3 * d_expert < 8 * d_model:
        found.append(
            f"for experts of width {d_expert}, where it was fitted on coarse ones, of width {8 * d_model // 3} here"
        )
    if not found:
        return ()
    return (f"the scaling law behind the budgets of h1 and h2 is asked outside its fitted range: {'; '.join(found)}",)


def check_shares(shares: Sequence[float]) -> None:
    """Checks that a schedule's shares of the tokens are above 0 and sum to 1.

    Raises:
        UsageError: they do not.
    """
    total = math.fsum(shares)
    if not shares or min(shares) <= 0 or not math.isclose(total, 1, abs_tol=1e-6):
        listed = ", ".join(f"{share:g}" for share in shares)
        raise UsageError(
            f"EMO's schedule: expected shares of the tokens above 0 that sum to 1, found {listed} with the sum {total:g}; "
            "divide each by the sum"
        )


def steps(shares: Sequence[float], total: int, *, multiple: int) -> tuple[int, ...]:
    """Steps of each stage, multiples of `multiple` that add up to `total`; the shares must sum to 1.

    Raises:
        UsageError: shares that do not sum to 1, or a stage that would get no step.
    """
    check_shares(shares)
    ends = [round(total * math.fsum(shares[: index + 1]) / multiple) * multiple for index in range(len(shares))]
    ends[-1] = total
    counts = tuple(end - begin for begin, end in zip((0, *ends), ends, strict=False))
    if min(counts) < 1:
        raise UsageError(
            f"EMO's schedule: expected a step at least in each stage, found {counts} of {total} steps; give each stage more"
        )
    return counts
