"""The one training loop: deterministic, traced, resumable.

- `TrainConfig`, `Segment`: everything that a piece of training depends on, as data
- `Mechanism`: where a paper puts what is new in it (a routing rule a step, a loss, gradients, measures of the live model)
- `training_step`: one update
- `learning_rate`: warm-up, then constant, WSD or cosine; `make_optimizer`: AdamW or SGD, with the factors of the model's config
- `train_segment`: trains one segment with one seed in a folder, goes on from its last checkpoint, and writes the trace,
  the measured times beside it, and the final weights

A checkpoint (`repro.checkpoint`) is whole or not there, and says how many lines of the trace it stands on: after a kill at
any moment the next start cuts the trace there and computes the same lines, and weights, again.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from records.errors import UsageError
from repro.checkpoint import load_checkpoint, save_checkpoint, weights_digest
from repro.config import decimal_string
from repro.data.batches import Batches, prefetch
from repro.inherit import Parent, inherit
from repro.mlp import make_model
from repro.model import ModelConfig, ModelOutput, Transformer
from repro.moe import MoE, NonFiniteError, RoutingRule, balance_loss
from repro.moe.growth import Growth
from repro.pretrained import expect
from repro.pretrained import load as load_pretrained
from repro.seeds import derive
from repro.trace import TraceWriter

if TYPE_CHECKING:  # brings torch's distributed parts, half a second that a process of its own has no use for
    from repro.cluster import Cluster

Progress = Callable[[int, int], None]
"""Called with (steps done, tokens done) of the segment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How a segment is trained. `batch` windows of `context` tokens a step; `lr` is the peak learning rate.

    `warmup` steps rise linearly from 0; `wsd` then holds the peak and falls linearly to `final_lr` × peak over the last
    `decay` share of the steps, `cosine` falls along a half cosine from the end of the warm-up, `constant` stays.
    `clip` bounds the gradient's norm (0: no bound); `balance` weighs the load-balance loss, averaged over layers.
    `bias_rate` moves each expert's selection bias by so much a step against its load (loss-free balancing, arXiv
    2408.15664; the model needs a selection bias). `first_step` is the step of the corpus that the segment starts at, so
    that a later segment sees new text.
    `unique` > 0 trains on that many tokens of the corpus alone, which every seed draws by itself, as often as it takes, in
    a new order each time; `epochs` > 0 is how often any text may be seen: a plan that would need more is refused.
    `optimizer` sgd has no momentum and no use for betas and eps; its weight decay is added to the gradient.
    With `bfloat16` the matrix products are in that precision and accumulate in float32; weights stay float32.
    `probe_every` steps, at the segment's first step and at its last the trace gets a probe: the load that the step's own
    routing gave each expert, and what the mechanism measures (0: none).
    """

    steps: int
    batch: int
    context: int
    lr: float
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup: int = 0
    decay: float = 0.2
    final_lr: float = 0.0
    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    balance: float = 0.01
    bias_rate: float = 0.0
    first_step: int = 0
    unique: int = 0
    epochs: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    optimizer: Literal["adamw", "sgd"] = "adamw"
    trace_every: int = 10
    hash_every: int = 200
    checkpoint_every: int = 200
    probe_every: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "context", "trace_every", "hash_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if not 0 <= self.warmup <= self.steps or not 0 <= self.decay <= 1:
            raise ValueError(
                f"expected warmup within {self.steps} steps and decay in [0, 1], found {self.warmup}, {self.decay}"
            )
        if self.hash_every % self.trace_every or self.checkpoint_every % self.trace_every:
            raise ValueError("hash_every and checkpoint_every must be multiples of trace_every")
        if self.probe_every < 0 or self.probe_every % self.trace_every:
            raise ValueError(
                f"probe_every: expected 0 or a multiple of trace_every = {self.trace_every}, found {self.probe_every}"
            )
        if self.unique < 0 or self.epochs < 0:
            raise ValueError(f"unique, epochs: expected at least 0, found {self.unique}, {self.epochs}")
        if len(self.betas) != 2:
            raise ValueError(f"betas: expected 2 numbers, found {len(self.betas)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A piece of training: model, corpus, training and the paper's mechanism (data for its `mechanism` function).

    `inherit` says what comes from the segment before: `nothing`, `weights`, or `all` (weights and optimizer state).
    `growth`, if given, makes this segment's larger expert pool out of the inherited one. `freeze` names weights by the
    last part of their name (`router_ED`), which then keep what they start with. `checkpoint` is the digest of a public
    checkpoint (`repro.pretrained`) whose weights the segment starts from; its folder is told to the run, not to the plan.
    `reseed` is added to the run's seed: a control that differs from another arm in its random draws alone.
    """

    model: ModelConfig
    train: TrainConfig
    corpus: str
    mechanism: Mapping[str, Any] = field(default_factory=dict)
    inherit: Literal["nothing", "weights", "all"] = "nothing"
    growth: Growth | None = None
    freeze: tuple[str, ...] = ()
    checkpoint: str | None = None
    reseed: int = 0

    def __post_init__(self) -> None:
        if self.checkpoint is not None and self.inherit != "nothing":
            raise ValueError(
                "checkpoint: a segment starts from a checkpoint or from the segment before it, not from both"
            )
        if self.growth and self.inherit == "nothing":
            raise ValueError("growth: nothing to grow; inherit weights, or all")
        if self.train.bias_rate and not self.model.selection_bias:
            raise ValueError("bias_rate: expected a model with a selection bias")


class Mechanism:
    """What a paper adds to training; this one adds nothing: top-k as the model's config says."""

    def rule(self, step: int, seed: int) -> RoutingRule | None:
        """Routing rule of this step's forward pass; None for the model's own top-k."""
        return None

    def loss(self, output: ModelOutput) -> Tensor | None:
        """A scalar to be added to the loss, in nats/token; None for nothing."""
        return None

    def gradients(self, model: Transformer) -> None:
        """May change the gradients of `model` in place, before they are clipped and used; this one leaves them."""

    def probe(self, model: Transformer, output: ModelOutput) -> Mapping[str, float | Sequence[float]]:
        """Small measures of the live model for the trace, by name; called every `probe_every` steps without autograd.

        `output` is the step's own, `model` holds the weights that gave it and their gradients (clipped), before the update.
        Must change nothing and draw no random numbers.
        """
        return {}


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of `step` (from 0)."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    floor = config.lr * config.final_lr
    if config.schedule == "cosine":
        done = (step - config.warmup) / max(1, config.steps - config.warmup)
        return floor + (config.lr - floor) * (1 + math.cos(math.pi * done)) / 2
    decay_steps = round(config.decay * config.steps)
    left = config.steps - step
    return config.lr if left >= decay_steps else floor + (config.lr - floor) * left / decay_steps


def make_optimizer(model: Transformer, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (or SGD) with decay on matrices only, as is the custom: gains and biases are left alone.

    Where the model's config gives factors for its weights, the groups hold them; `lr_scale` is that of the learning rate.
    """
    found: dict[tuple[float, float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            weight = model.config.weight(name)
            decay = config.weight_decay * weight.decay if parameter.ndim >= 2 else 0.0
            found.setdefault((weight.lr, config.eps * weight.eps, decay), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": parameters, "lr": config.lr * lr, "lr_scale": lr, "eps": eps, "weight_decay": decay}
        for (lr, eps, decay), parameters in found.items()
    ]
    if config.optimizer == "sgd":
        for group in groups:
            del group["eps"]
        return torch.optim.SGD(groups, lr=config.lr)
    beta1, beta2 = config.betas
    return torch.optim.AdamW(groups, lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=True)


def train_segment(
    segment: Segment,
    *,
    batches: Batches,
    mechanism: Mechanism,
    seed: int,
    folder: Path,
    genesis: str,
    device: str = "cpu",
    parent: Parent | None = None,
    checkpoint_folder: Path | None = None,
    progress: Progress | None = None,
    cluster: "Cluster | None" = None,
) -> Transformer:
    """Trains `segment` in `folder`, from its last checkpoint if there is one, and returns the trained model.

    `checkpoint_folder` is where the segment's `checkpoint` lies, if it starts from one.
    Writes trace.jsonl, timing.jsonl and final.safetensors. A loss or gradient norm that is not finite ends the segment
    as diverged: the trace's last entry says so, and nothing is measured on it. With a `cluster`, every process of it calls
    this, and the first one writes; the model returned is then this process' part.

    Raises:
        InvalidError: what the folder holds does not belong to this segment.
        UsageError: the folder cannot be written, or the batch or the mechanism cannot be spread over the cluster.
    """
    config = segment.train
    model = make_model(segment.model, None if segment.checkpoint else seed).to(device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[2] not in segment.freeze)
    optimizer = make_optimizer(model, config)
    start, lines = 0, 0
    checkpoint = folder / "checkpoint.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if checkpoint.exists():
            start, lines, _ = load_checkpoint(checkpoint, model, optimizer, genesis=genesis)
        elif segment.checkpoint:
            load_pretrained(expect(segment.checkpoint, checkpoint_folder), model)
        elif segment.inherit != "nothing":
            if parent is None:
                raise UsageError(f"a segment that inherits {segment.inherit} needs one before it")
            carried = optimizer if segment.inherit == "all" else None
            inherit(parent, model, carried, segment.growth, batches=batches, first_step=config.first_step, seed=seed)
        run: torch.nn.Module = model
        if cluster:
            _check_spread(mechanism, cluster)
            cluster.wait()  # all have read what there was, before the first one writes
            run, spread = cluster.spread(model, optimizer, lambda: make_optimizer(model, config))
            assert isinstance(spread, torch.optim.AdamW)
            optimizer = spread
        leads = cluster is None or cluster.leads
        timing_mode = "a" if start else "w"
        with (
            TraceWriter(folder / "trace.jsonl", genesis, keep=lines) if leads else _Silent() as trace,
            (folder / "timing.jsonl" if leads else Path(os.devnull)).open(timing_mode) as timing,
        ):
            reached, layer = _steps(
                segment, model, run, optimizer, batches, mechanism, seed, start, trace, timing, checkpoint, genesis,
                progress, cluster,
            )  # fmt: skip
            outcome = "end" if reached == config.steps else "diverged"
            where = {"layer": layer} if layer else {}
            trace.append({"type": outcome, "steps": reached, **where, "weights": weights_digest(model, cluster)})
            trace.sync()
        final = folder / "final.safetensors"
        save_checkpoint(final, model, optimizer, cluster, step=reached, lines=trace.count, genesis=genesis)
        if leads:
            checkpoint.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot write {error.filename or folder}: {error.strerror}; free space or choose another --out"
        ) from error
    return model


def training_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    tokens_BS: Tensor,
    targets_BS: Tensor,
    mechanism: Mechanism,
    step: int,
    seed: int,
    look: Callable[[ModelOutput], None] | None = None,
    *,
    run: torch.nn.Module | None = None,
    cluster: "Cluster | None" = None,
) -> tuple[Tensor, Tensor]:
    """One update of the weights; returns the loss (nats/token, without auxiliary terms) and the gradient's norm.

    Both stay on the device: the step waits for nothing. `look` is shown the output before the weights change. With a
    `cluster`, `tokens_BS` are this process' own, `run` is what to call in the model's place, and both results are those of
    all processes.
    """
    group = cluster.group if cluster else None
    with torch.autocast(tokens_BS.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        output = (run or model)(tokens_BS, rule=mechanism.rule(step, seed))
    loss = cross_entropy = torch.nn.functional.cross_entropy(
        output.logits_BSV.float().flatten(0, 1), targets_BS[:, -output.logits_BSV.shape[1] :].flatten()
    )
    if config.balance and output.routers:
        loss = loss + config.balance * torch.stack([balance_loss(router, group) for router in output.routers]).mean()
    extra = mechanism.loss(output)
    if extra is not None:
        loss = loss + extra
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    mechanism.gradients(model)
    if cluster:
        norm = cluster.clip(model, config.clip)
    else:
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf, foreach=True)
    if look is not None:
        look(output)
    optimizer.step()
    if config.bias_rate:
        _balance_biases(model, output, config.bias_rate, cluster)
    loss = cross_entropy.detach()
    return cluster.mean(loss) if cluster else loss, norm


@torch.no_grad()
def _balance_biases(model: Transformer, output: ModelOutput, rate: float, cluster: "Cluster | None") -> None:
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    for layer, router in zip(layers, output.routers, strict=True):
        assert layer.bias_E is not None
        load_E = router.routing.load_E.to(layer.bias_E.dtype)
        if cluster:
            load_E = cluster.sum(load_E)
        layer.bias_E += rate * torch.sign(load_E.mean() - load_E)


def _steps(
    segment: Segment,
    model: Transformer,
    run: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    mechanism: Mechanism,
    seed: int,
    start: int,
    trace: "TraceWriter | _Silent",
    timing: Any,
    checkpoint: Path,
    genesis: str,
    progress: Progress | None,
    cluster: "Cluster | None",
) -> tuple[int, str | None]:
    """Steps from `start` to the end, or to where a loss or norm is no longer finite.

    Returns the steps done, and the layer whose router saw it first where one did.
    """
    config = segment.train
    device = next(model.parameters()).device
    tokens_a_step = config.batch * config.context
    losses: list[Tensor] = []
    clock = _clocks(device)
    run.train()
    # Each process draws for its own tokens; the first one as it would alone.
    seed = derive(seed, "process", cluster.rank) if cluster and not cluster.leads else seed
    for place, (tokens_BS, targets_BS) in prefetch(
        batches, range(config.first_step + start, config.first_step + config.steps), device
    ):
        step = place - config.first_step
        for group in optimizer.param_groups:
            group["lr"] = group["lr_scale"] * learning_rate(config, step)
        probes: list[dict[str, Any]] = []
        look = partial(_probe, model, mechanism, step, probes, cluster) if probe_due(config, step) else None
        if cluster:
            tokens_BS, targets_BS = cluster.share(tokens_BS), cluster.share(targets_BS)
        try:
            loss, norm = training_step(
                model, optimizer, config, tokens_BS, targets_BS, mechanism, step, seed, look, run=run, cluster=cluster
            )
        except NonFiniteError as error:
            return step, error.layer
        losses.append(loss)
        for probe in probes:
            trace.append(probe)

        done = step + 1
        if done % config.trace_every and done < config.steps:
            continue
        # one transfer a group of steps: the loop is otherwise free of synchronisation with the device
        mean, grad_norm = (float(value) for value in (torch.stack(losses).double().mean(), norm))
        losses.clear()
        if not (math.isfinite(mean) and math.isfinite(grad_norm)):
            return done - 1, None
        entry: dict[str, Any] = {
            "type": "step",
            "step": done,
            "tokens": done * tokens_a_step,
            "loss": decimal_string(mean),
            "grad_norm": decimal_string(grad_norm),
        }
        if done % config.hash_every == 0 and done < config.steps:
            entry["weights"] = weights_digest(model, cluster)
        trace.append(entry)
        now = _clocks(device)
        timing.write(json.dumps({"step": done} | {name: round(now[name] - clock[name], 6) for name in now}) + "\n")
        clock = now
        if done % config.checkpoint_every == 0 and done < config.steps:
            trace.sync()
            timing.flush()
            save_checkpoint(checkpoint, model, optimizer, cluster, step=done, lines=trace.count, genesis=genesis)
        if progress:
            progress(done, done * tokens_a_step)
    return config.steps, None


def _clocks(device: torch.device) -> dict[str, float]:
    """Clocks of a segment's times: on a CPU also the process's own, which stands still while others have the core."""
    clocks = {"seconds": time.perf_counter()}
    return clocks | {"cpu_seconds": time.process_time()} if device.type == "cpu" else clocks


def probe_due(config: TrainConfig, step: int) -> bool:
    """Whether `step` (from 0) is probed."""
    return bool(config.probe_every) and (step % config.probe_every == 0 or step == config.steps - 1)


@torch.no_grad()
def _probe(
    model: Transformer,
    mechanism: Mechanism,
    step: int,
    probes: list[dict[str, Any]],
    cluster: "Cluster | None",
    output: ModelOutput,
) -> None:
    """Adds the trace's entry of what can be seen at `step` to `probes`."""
    values = mechanism.probe(model, output)
    numbers = {name: [value] if isinstance(value, int | float) else list(value) for name, value in values.items()}
    for name, found in numbers.items():
        if not all(math.isfinite(value) for value in found):
            raise NonFiniteError(f"probe {name}", f"found {found}")
    loads = [router.routing.load_E for router in output.routers]
    probes.append(
        {
            "type": "probe",
            "step": step,
            "load": [(cluster.sum(load_E) if cluster else load_E).tolist() for load_E in loads],
            "values": {name: [decimal_string(float(value)) for value in found] for name, found in numbers.items()},
        }
    )


class _Silent:
    """The trace of a process that does not write."""

    count = 0

    def __enter__(self) -> "_Silent":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def append(self, entry: Mapping[str, Any]) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""


def _check_spread(mechanism: Mechanism, cluster: "Cluster") -> None:
    """A mechanism that looks at weights or gradients has to find all of them."""
    for name in ("gradients", "probe"):
        if not cluster.copies and getattr(type(mechanism), name) is not getattr(Mechanism, name):
            raise UsageError(
                f"--parallel {cluster.layout.parallel}: this arm's mechanism ({name}) needs the whole model in each process; "
                "use --parallel ddp"
            )
