"""What a plan, or a part of it, will take: tokens, FLOPs, time and memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from repro.config import decode
from repro.workflow.jobs import ArmJob, Stretch, jobs, stops
from repro.workflow.plan import device_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a plan will take: tokens trained (each shared segment once) and if the arms ran alone, floating-point
    operations, seconds with `workers` processes, and bytes of memory for all of them."""

    tokens: int
    tokens_alone: int
    flops: float
    seconds: float
    memory: int
    workers: int


def estimate(
    plan: Mapping[str, Any],
    *,
    workers: int,
    wanted: Sequence[ArmJob] | None = None,
    drawn: Sequence[Stretch] = (),
    device: str | None = None,
) -> Estimate:
    """Cost of a plan, or of the `wanted` arms and `drawn` stretches of it, from FLOP accounting and a measured rate.

    The rate is that of the scale's hardware; `device` asks about another, cpu or cuda, than the plan's own.
    """
    from repro.accounting import accounting
    from repro.cost import TASK_SECONDS, measure_seconds, peak_memory, step_seconds
    from repro.model import ModelConfig

    arms = jobs(plan) if wanted is None else wanted
    unique = stops(arms, drawn)
    measure_tokens = {arm["id"]: arm["measure_tokens"] for arm in plan["arms"]}
    device = device or device_of(plan)
    seconds, flops, memory, tokens = TASK_SECONDS * (len(unique) + len(arms)), 0.0, 0, 0
    for _, segment, steps in unique.values():
        model = decode(ModelConfig, segment.config["model"])
        train = segment.config["train"]
        trained = steps * train["batch"] * train["context"]
        tokens += trained
        flops += accounting(model).flops_training * trained
        seconds += step_seconds(model, train["batch"] * train["context"], device) * steps
        memory = max(memory, peak_memory(model, train["batch"] * train["context"], device))
    for arm in arms:
        model = decode(ModelConfig, arm.segments[-1].config["model"])
        seconds += measure_seconds(model, measure_tokens[arm.arm], device)
    return Estimate(
        tokens=tokens,
        tokens_alone=sum(segment.tokens for arm in arms for segment in arm.segments),
        flops=flops,
        seconds=seconds / workers,
        memory=memory * workers,
        workers=workers,
    )
