"""What a step and a measure cost before they are run, from FLOP accounting and rates measured once a device kind.

The rates are those of the scale's own hardware (one core of a 2024 server CPU with AVX-512; one H200). Another machine is
faster or slower by a factor that is the same for every arm.
"""

from dataclasses import dataclass

from repro.accounting import accounting
from repro.model import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rates:
    flops: float  # sustained FLOP/s of the model's GEMMs
    step: float  # seconds a step, whatever the size: dispatch of the operations
    assignment: float  # seconds for each (token, expert) of a layer: gathered, scattered, forward and backward
    logit: float  # seconds for each token and entry of the vocabulary: softmax, loss and their gradient
    parameter: float  # seconds a step and parameter: its gradient's memory and its update


# CPU: fitted to step times of 46 shapes: 36 timed in two processes beside each other, one thread each (equal resource's arms at
# nano, d 64 with E 4 to 256, d 128), and the 10 classifiers of MSSP's published run (d 64 to 512, E 8 to 128). It gives them
# within -29% and +19%, with an sd of 10%. GPU: a guess until one was at hand.
_CPU = _Rates(flops=89e9, step=1.66e-3, assignment=4.5e-7, logit=3.8e-8, parameter=1.9e-9)
_GPU = _Rates(flops=250e12, step=10e-3, assignment=0.0, logit=0.0, parameter=0.0)
TASK_SECONDS = 0.4  # a worker's start, its corpus and its checks
_PROCESS_BYTES = 450 * 2**20  # the interpreter with torch loaded


def _rates(device: str) -> _Rates:
    return _CPU if device == "cpu" else _GPU


def step_seconds(model: ModelConfig, tokens: int, device: str) -> float:
    """Seconds of one training step on `tokens` tokens."""
    rates, account = _rates(device), accounting(model)
    fixed = rates.step + rates.parameter * account.total
    if model.kind == "mlp":  # every expert is computed for every record, and a record has one row of logits
        return fixed + 6 * account.total * tokens / model.context / rates.flops
    memory = rates.assignment * model.moe_layers * model.top_k + rates.logit * model.vocab_size
    return fixed + (memory + account.flops_training / rates.flops) * tokens


def measure_seconds(model: ModelConfig, tokens: int, device: str) -> float:
    """Seconds of running `tokens` tokens forward, in batches large enough for the overhead not to matter."""
    return accounting(model).flops_forward * tokens / (_rates(device).flops / 3)


def peak_memory(model: ModelConfig, tokens: int, device: str) -> int:
    """Bytes that a training process holds at its peak: weights, gradients and two moments in float32, and activations."""
    parameters = 16 * accounting(model).total
    width = 12 * model.d_model + 6 * max(1, model.top_k) * model.d_expert + 2 * model.num_experts
    activations = 4 * tokens * (model.num_layers * width + 3 * model.vocab_size)
    return parameters + activations + (_PROCESS_BYTES if device == "cpu" else 2 * _PROCESS_BYTES)
