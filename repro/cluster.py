"""One model's training over the processes that torchrun started, as the training loop sees it.

- `Layout`: how the model lies on them, which a plan records: another layout sums in another order and gives other bits
- `Cluster`: this process and the others; spreads a model and its optimizer, cuts batches, sums what belongs together, and
  gathers whole weights

Checkpoints and weight hashes are of the whole model, so a segment that another segment inherits from, or that an audit
compares, is the same kind of file whatever the layout. The first process alone writes.
"""

import datetime
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from records.errors import UsageError
from repro.moe import MoE
from repro.moe.parallel import parallelize

Parallel = Literal["ddp", "fsdp", "ddp+experts", "fsdp+experts"]
PARALLEL = get_args(Parallel)
# The others wait while the first process measures an arm.
_PATIENCE = datetime.timedelta(hours=6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """`ddp` copies the model to every process, `fsdp` shards it; `+experts` gives each process its own experts."""

    processes: int
    parallel: Parallel

    def __str__(self) -> str:
        return f"{self.processes} processes, {self.parallel}"


def layout(parallel: str | None) -> Layout | None:
    """The layout of this run: None for a process of its own, else as many processes as torchrun started.

    Raises:
        UsageError: `parallel` outside torchrun, or not one of `PARALLEL`.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if parallel is not None and parallel not in PARALLEL:
        raise UsageError(f"--parallel: expected one of {', '.join(PARALLEL)}, found {parallel!r}")
    if "RANK" not in os.environ or size == 1:
        if parallel is not None:
            raise UsageError(
                f"--parallel {parallel} spreads a model over processes, found one: start it as "
                "torchrun --nproc-per-node 8 -m repro run …"
            )
        return None
    return Layout(processes=size, parallel=parallel or "ddp")  # type: ignore[arg-type]


class Cluster:
    """This process among those of a torchrun; a context manager, which leaves the process group at its end."""

    def __init__(self, layout: Layout, device: str) -> None:
        """Joins the others, on `device` (cpu or cuda; a GPU is the one of this process' local rank)."""
        self.layout = layout
        self.device = device
        if device == "cuda":
            self.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
            torch.cuda.set_device(self.device)
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=_PATIENCE)
        self._mesh = init_device_mesh(device, (layout.processes,))
        self.group = self._mesh.get_group()
        self.rank = dist.get_rank()

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        dist.destroy_process_group()

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Returns when every process is here."""
        dist.barrier()

    def told(self, value: Any) -> Any:
        """The first process' `value`, which has to survive pickling."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def share(self, rows_BS: Tensor) -> Tensor:
        """This process' rows of a batch.

        Raises:
            UsageError: the batch cannot be shared out equally.
        """
        B, size = len(rows_BS), self.layout.processes
        if B % size:
            raise UsageError(f"batch: expected a multiple of the {size} processes, found {B}; start another number")
        return rows_BS.chunk(size)[self.rank]

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the processes, of equal parts of a batch that of the whole."""
        total = value.clone()
        dist.all_reduce(total, group=self.group)
        return total / self.layout.processes

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the processes."""
        total = value.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def spread(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, make: Callable[[], torch.optim.Optimizer]
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The module to call in `model`'s place, and an optimizer from `make` with `optimizer`'s state.

        `model` itself, changed in place, goes on naming the weights. Every process calls this with equal weights and states.
        """
        states = {name: optimizer.state.get(weight, {}) for name, weight in model.named_parameters()}
        data, _, experts = self.layout.parallel.partition("+")
        called = parallelize(model, self._mesh, data=data, experts=bool(experts))  # type: ignore[arg-type]
        for module in model.modules():
            if isinstance(module, MoE):
                module.checks_logits = False  # one process alone would stop, and the others wait for it
        mine = make()
        for name, weight in model.named_parameters():
            if states[name]:
                mine.state[weight] = {
                    key: value.clone() if value.ndim == 0 else self._own(name, value, weight)
                    for key, value in states[name].items()
                }
        # An optimizer's kernels take either kind of tensor, not both at once.
        mine.param_groups[:] = [
            {**group, "params": weights}
            for group in mine.param_groups
            for sharded in (True, False)
            if (weights := [w for w in group["params"] if isinstance(w, DTensor) == sharded])
        ]
        return called, mine

    def _shared_out(self, name: str) -> bool:
        return self.layout.parallel.endswith("+experts") and name.endswith(("w_up_EDF", "w_down_EFD"))

    def _own(self, name: str, whole: Tensor, like: Tensor) -> Tensor:
        if isinstance(like, DTensor):
            return distribute_tensor(whole, like.device_mesh, like.placements)
        return (whole.chunk(self.layout.processes)[self.rank] if self._shared_out(name) else whole).clone()

    @torch.no_grad()
    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors by name, of this process' weights or of what belongs to them; every process calls this."""
        return {name: self._whole(name, tensor.detach()) for name, tensor in tensors.items()}

    def _whole(self, name: str, part: Tensor) -> Tensor:
        if isinstance(part, DTensor):
            whole: Tensor = part.full_tensor()
            return whole
        if not self._shared_out(name) or part.ndim == 0:
            return part
        parts = [torch.empty_like(part) for _ in range(self.layout.processes)]
        dist.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts)

    @torch.no_grad()
    def clip(self, model: nn.Module, bound: float) -> Tensor:
        """Norm of the whole model's gradient, which is scaled down to `bound` where it is above (0: no bound)."""
        copies = parts = torch.zeros((), device=self.device)
        grads = []
        for name, weight in model.named_parameters():
            if weight.grad is None:
                continue
            sharded = isinstance(weight.grad, DTensor)
            grad = weight.grad.to_local() if isinstance(weight.grad, DTensor) else weight.grad
            grads.append(grad)
            square = grad.float().square().sum()
            if sharded or self._shared_out(name):
                parts = parts + square
            else:
                copies = copies + square
        norm = (copies + self.sum(parts)).sqrt()
        if bound:
            scale = (bound / (norm + 1e-6)).clamp(max=1.0)
            for grad in grads:
                grad.mul_(scale)
        return norm

    @property
    def copies(self) -> bool:
        """Whether every process holds the whole model."""
        return self.layout.parallel == "ddp"
