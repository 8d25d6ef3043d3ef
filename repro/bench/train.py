"""How fast training is, by size of the model, and how little a step slows as experts are added.

- for each size: tokens/s, model FLOPs utilisation, peak memory, the share of a step that the optimizer takes, and a step's time
  under torch's deterministic flags, as all training is, over its time without; on a GPU `small` by torch's grouped GEMMs
  (`auto`) and by our Triton kernels
- for each number of experts at fixed k: the step's time against that of the fewest experts, side by side, and what it is
  made of: data, forward and backward (the experts' GEMMs alone beside it), optimizer

Model FLOPs are those of `repro.accounting`; utilisation is their rate over the rate of one large square GEMM in the
same precision, measured in the same run. Ratios are taken within a round, whose order alternates, and given as the median
with the quartiles over rounds.
"""

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch

from records.errors import UsageError
from repro.accounting import accounting
from repro.data.batches import Batches
from repro.data.corpus import load
from repro.environment import set_deterministic
from repro.model import ModelConfig, ModelOutput, Transformer, init_std
from repro.moe import triton
from repro.train import Mechanism, TrainConfig, make_optimizer, training_step

_NANO = ModelConfig(d_model=64, d_expert=32, num_layers=2, num_heads=4, num_experts=16, top_k=2, context=128)
_MICRO = ModelConfig(d_model=128, d_expert=64, num_layers=4, num_heads=4, num_experts=16, top_k=2, context=128)
# About 150M parameters in all and 30M active: what one GPU trains at the scale `small`.
_SMALL = ModelConfig(d_model=512, d_expert=512, num_layers=6, num_heads=8, num_experts=32, top_k=4, context=1024)

_SIZES: dict[str, dict[str, tuple[ModelConfig, int]]] = {
    "cpu": {"nano": (_NANO, 8), "micro": (_MICRO, 16)},
    "cuda": {"nano": (_NANO, 8), "small": (_SMALL, 32)},
}
_COUNTS = (8, 16, 32, 64, 128, 256)
_CURVE = {"cpu": (_NANO, 8, _COUNTS), "cuda": (_SMALL, 32, _COUNTS)}


def measure(*, device: str = "cpu", rounds: int = 5, steps: int = 10) -> dict[str, Any]:
    """Everything above, as data that `repro bench train` prints.

    Args:
        device: cpu (one thread, float32) or cuda (bfloat16).
        rounds: how often each size is measured, in alternating order.
        steps: training steps a round.

    Raises:
        UsageError: no such device here.
    """
    if device not in _SIZES or (device == "cuda" and not torch.cuda.device_count()):
        raise UsageError(f"bench train: expected the device cpu, or cuda on a machine with a GPU, found {device!r}")
    set_deterministic()
    configs = dict(_SIZES[device])
    if device == "cuda" and triton.supports(torch.empty(0, device=device, dtype=torch.bfloat16)):
        configs["small-triton"] = (replace(_SMALL, backend="triton"), _SIZES[device]["small"][1])
    sizes = {name: _Trainer(model, batch, device) for name, (model, batch) in configs.items()}
    ceiling = _gemm_rate(device)
    results = []
    for name, trainer in sizes.items():
        seconds = [trainer.seconds(steps) for _ in range(rounds)]
        step = statistics.median(seconds)
        cost = accounting(trainer.model.config)
        results.append(
            {
                "size": name,
                "parameters": cost.total,
                "active": cost.active,
                "tokens_a_step": trainer.tokens,
                "tokens_per_second": trainer.tokens / step,
                "seconds_a_step": _spread(seconds),
                "flops_utilisation": cost.flops_training * trainer.tokens / step / ceiling,
                "optimizer_share": trainer.optimizer_seconds(steps) / step,
                "cost_of_determinism": _spread([trainer.cost_of_determinism(steps) for _ in range(rounds)]),
                "peak_bytes": _peak_bytes(device),
            }
        )
    return {
        "schema": "repro.bench-train/v1",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu, one thread",
        "torch": torch.__version__,
        "gemm_flops": ceiling,
        "sizes": results,
        "experts": _expert_curve(device, rounds, steps),
    }


def _expert_curve(device: str, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Step time against the number of experts at fixed k, relative to the fewest, within each round; and its parts."""
    config, batch, counts = _CURVE[device]
    trainers = {count: _Trainer(replace(config, num_experts=count), batch, device) for count in counts}
    times: dict[int, list[float]] = {count: [] for count in counts}
    parts: dict[int, list[dict[str, float]]] = {count: [] for count in counts}
    for number in range(rounds):
        for count in counts if number % 2 else reversed(counts):
            times[count].append(trainers[count].seconds(steps))
            parts[count].append(trainers[count].parts(steps))
    first = times[counts[0]]
    return [
        {
            "num_experts": count,
            "seconds_a_step": _spread(times[count]),
            "ratio": _spread([a / b for a, b in zip(times[count], first, strict=True)]),
            "parts": {name: statistics.median(part[name] for part in parts[count]) for name in parts[count][0]},
            "parameters": accounting(trainers[count].model.config).total,
        }
        for count in counts
    ]


class _Trainer:
    """A model, its optimizer and real batches, ready to be stepped and timed."""

    def __init__(self, config: ModelConfig, batch: int, device: str) -> None:
        precision: Literal["bfloat16", "float32"] = "bfloat16" if device == "cuda" else "float32"
        self.train = TrainConfig(steps=1, batch=batch, context=config.context, lr=1e-3, precision=precision)
        self.model = Transformer(config) if device == "cpu" else drawn_on(device, config)
        self.optimizer = make_optimizer(self.model, self.train)
        self.tokens = batch * config.context
        self._batches = Batches(data=load("stdlib").train, batch=batch, context=config.context, seed=0)
        self._device, self._step = device, 0
        self._operands: dict[tuple[int, ...], torch.Tensor] = {}
        self.seconds(3)  # allocations, and on a GPU compilation, happen here

    def seconds(self, steps: int) -> float:
        """Seconds a step, batches included."""
        return _timed(self._device, lambda: self._train(steps)) / steps

    def cost_of_determinism(self, steps: int) -> float:
        """A step's time under the deterministic flags over one without, one after the other."""
        flagged = self.seconds(steps)
        torch.use_deterministic_algorithms(False)
        try:
            return flagged / self.seconds(steps)
        finally:
            torch.use_deterministic_algorithms(True)

    def parts(self, steps: int) -> dict[str, float]:
        """Seconds a step of making the batch, of forward and backward, of the update, and of the experts' GEMMs alone."""
        spent = dict.fromkeys(("data", "forward_backward", "optimizer"), 0.0)
        for _ in range(steps):
            marks = [_now(self._device)]
            tokens_BS, targets_BS = self._batch()
            marks.append(_now(self._device))
            self._update(tokens_BS, targets_BS, look=partial(self._mark, marks))
            marks.append(_now(self._device))
            for name, begin, end in zip(spent, marks, marks[1:], strict=False):
                spent[name] += (end - begin) / steps
        gemms = _timed(self._device, lambda: self._expert_gemms(steps)) / steps
        return spent | {"expert_gemms": gemms}

    def _mark(self, marks: list[float], _: ModelOutput) -> None:
        marks.append(_now(self._device))

    def _expert_gemms(self, steps: int) -> None:
        """The six products of each layer's experts, forward and backward, at an even load and with nothing around them."""
        config = self.model.config
        rows = max(1, self.tokens * config.top_k // config.num_experts)
        shapes = ((config.d_model, 2 * config.d_expert), (config.d_expert, config.d_model))
        for _ in range(steps * config.moe_layers):
            for fan_in, fan_out in shapes:
                x_ENI, w_EIO, dy_ENO = (
                    self._operand(config.num_experts, *shape)
                    for shape in ((rows, fan_in), (fan_in, fan_out), (rows, fan_out))
                )
                torch.bmm(x_ENI, w_EIO)
                torch.bmm(dy_ENO, w_EIO.transpose(1, 2))
                torch.bmm(x_ENI.transpose(1, 2), dy_ENO)

    def _operand(self, *shape: int) -> torch.Tensor:
        if shape not in self._operands:
            dtype = torch.bfloat16 if self._device == "cuda" else torch.float32
            self._operands[shape] = torch.randn(shape, dtype=dtype, device=self._device)
        return self._operands[shape]

    def optimizer_seconds(self, steps: int) -> float:
        """Seconds of the optimizer's part of a step, on the gradients at hand."""
        return _timed(self._device, lambda: [self.optimizer.step() for _ in range(steps)]) / steps

    def _train(self, steps: int) -> None:
        for _ in range(steps):
            self._update(*self._batch())

    def _batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        tokens_BS, targets_BS = self._batches.at(self._step)
        if self._device == "cpu":
            return tokens_BS, targets_BS
        # From pinned memory, as the training loop does: from any other the host would wait for the step before.
        pinned = (part.pin_memory() for part in (tokens_BS, targets_BS))
        tokens_BS, targets_BS = (part.to(self._device, non_blocking=True) for part in pinned)
        return tokens_BS, targets_BS

    def _update(
        self, tokens_BS: torch.Tensor, targets_BS: torch.Tensor, look: Callable[[ModelOutput], None] | None = None
    ) -> None:
        training_step(
            self.model, self.optimizer, self.train, tokens_BS, targets_BS, Mechanism(), self._step, seed=0, look=look
        )
        self._step += 1


@torch.no_grad()
def drawn_on(device: str, config: ModelConfig) -> Transformer:
    """A model whose weights are drawn on `device`: of the right size, no more. A billion of them take a CPU a minute."""
    with torch.device(device):
        model = Transformer(config, None)
    for name, parameter in model.named_parameters():
        std = init_std(name, config)
        if std is None:
            parameter.fill_(1)
        else:
            parameter.normal_(0, std)
    return model


def _now(device: str) -> float:
    """The clock that `_timed` reads."""
    if device == "cpu":
        return time.thread_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _timed(device: str, work: Callable[[], object]) -> float:
    """Seconds that `work` takes: of this thread on a CPU, so that other processes' turns do not count."""
    began = _now(device)
    work()
    return _now(device) - began


def _gemm_rate(device: str) -> float:
    """FLOP/s of one large GEMM in the precision that training uses."""
    size, dtype = (1024, torch.float32) if device == "cpu" else (8192, torch.bfloat16)
    a = torch.randn(size, size, dtype=dtype, device=device)
    a @ a
    seconds = [_timed(device, lambda: [a @ a for _ in range(5)]) / 5 for _ in range(5)]
    return 2 * size**3 / statistics.median(seconds)


def _peak_bytes(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}
