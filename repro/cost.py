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
    layer: float  # seconds a step and layer, whatever the size: dispatch of the operations
    expert: float  # seconds a step, layer and expert


# CPU: fitted to `repro bench train` (d 64 and 128, E 4 to 64, one thread); GPU: a guess until one was at hand.
_CPU = _Rates(flops=71e9, layer=4e-3, expert=4e-5)
_GPU = _Rates(flops=250e12, layer=1.5e-3, expert=0.0)
TASK_SECONDS = 0.4  # a worker's start, its corpus and its checks
_PROCESS_BYTES = 450 * 2**20  # the interpreter with torch loaded


def _rates(device: str) -> _Rates:
    return _CPU if device == "cpu" else _GPU


def step_seconds(model: ModelConfig, tokens: int, device: str) -> float:
    """Seconds of one training step on `tokens` tokens."""
    rates = _rates(device)
    overhead = model.num_layers * rates.layer + model.moe_layers * model.num_experts * rates.expert
    return overhead + accounting(model).flops_training * tokens / rates.flops


def measure_seconds(model: ModelConfig, tokens: int, device: str) -> float:
    """Seconds of running `tokens` tokens forward, in batches large enough for the overhead not to matter."""
    return accounting(model).flops_forward * tokens / (_rates(device).flops / 3)


def peak_memory(model: ModelConfig, tokens: int, device: str) -> int:
    """Bytes that a training process holds at its peak: weights, gradients and two moments in float32, and activations."""
    parameters = 16 * accounting(model).total
    width = 12 * model.d_model + 6 * max(1, model.top_k) * model.d_expert + 2 * model.num_experts
    activations = 4 * tokens * (model.num_layers * width + 3 * model.vocab_size)
    return parameters + activations + (_PROCESS_BYTES if device == "cpu" else 2 * _PROCESS_BYTES)
