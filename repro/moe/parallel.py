"""Training over several processes: DDP or FSDP2 for the model, and experts spread over the same processes.

Every process sees its own tokens. With `experts=True` each owns an equal run of the experts: assignments travel to
the owner and their outputs back, by two all-to-alls, and all else is as on one device. The loss of R processes with
equal batches, and every weight's gradient, is that of one process with all the tokens, to rounding (`balance_loss`
needs the `group`).

Under `torchrun --nproc-per-node 8`:

    mesh = init_device_mesh("cuda", (8,))
    model = parallelize(model, mesh, data="fsdp", experts=True)
"""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as nnf
from torch.nn.parallel import DistributedDataParallel

from records.errors import UsageError
from repro.moe.experts import apply_experts
from repro.moe.layer import MoE
from repro.moe.routing import Routing, inverse


def parallelize(
    model: nn.Module, mesh: DeviceMesh, *, data: Literal["ddp", "fsdp"], experts: bool = False
) -> nn.Module:
    """The model, spread over a mesh of one dimension; every process calls this with equal weights.

    `ddp` copies all weights to every process, `fsdp` shards them (block by block, where the model has `blocks`);
    `experts` gives each process its own experts instead, which then belong to neither. Raises `UsageError` where the
    experts can't be shared out equally.
    """
    if mesh.ndim != 1:
        raise UsageError(f"parallelize: expected a mesh of one dimension, found {mesh.ndim}")
    owned: set[nn.Parameter] = set()
    if experts:
        for module in model.modules():
            if isinstance(module, MoE):
                owned |= _keep_own_experts(module, mesh)
    if data == "ddp":
        names = [name for name, parameter in model.named_parameters() if parameter in owned]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
            model, names
        )
        return DistributedDataParallel(model, process_group=mesh.get_group())
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh, ignored_params=owned)
    fully_shard(model, mesh=mesh, ignored_params=owned)
    return model


def _keep_own_experts(moe: MoE, mesh: DeviceMesh) -> set[nn.Parameter]:
    """Leave this process its run of the experts, and route through an exchange from now on."""
    E, size = len(moe.w_up_EDF), mesh.size()
    if E % size:
        raise UsageError(f"{moe.name}: expected the number of experts to be a multiple of {size} processes, found {E}")
    mine = slice(mesh.get_local_rank() * E // size, (mesh.get_local_rank() + 1) * E // size)
    moe.w_up_EDF = nn.Parameter(moe.w_up_EDF.detach()[mine].clone(), requires_grad=moe.w_up_EDF.requires_grad)
    moe.w_down_EFD = nn.Parameter(moe.w_down_EFD.detach()[mine].clone(), requires_grad=moe.w_down_EFD.requires_grad)
    moe.experts = ExpertExchange(mesh.get_group())
    for parameter in (moe.w_up_EDF, moe.w_down_EFD):
        if parameter.requires_grad:
            # An expert meets the tokens of all processes, so its gradient is a sum of theirs; all others are averaged.
            parameter.register_hook(lambda gradient: gradient / size)  # type: ignore[no-untyped-call]
    return {moe.w_up_EDF, moe.w_down_EFD}


class ExpertExchange:
    """`apply_experts` where this process holds only its run of the routing's experts."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(
        self, x_TD: Tensor, routing: Routing, w_up_EDF: Tensor, w_down_EFD: Tensor, backend: str = "auto"
    ) -> Tensor:
        size, E = dist.get_world_size(self.group), w_up_EDF.shape[0]
        # How many rows go to each expert, and come for each of mine: [process, its expert].
        sent_RE = routing.load_E.view(size, E)
        came_RE = torch.empty_like(sent_RE)
        dist.all_to_all_single(came_RE, sent_RE, group=self.group)
        sent, came = sent_RE.sum(1).tolist(), came_RE.sum(1).tolist()

        rows_N = routing.token_N[routing.order_N]
        x_MD = _exchange(x_TD.index_select(0, rows_N), sent, came, self.group)
        expert_M = torch.arange(E, device=x_TD.device).repeat(size).repeat_interleave(came_RE.flatten())
        here = Routing.from_slots(expert_M[:, None], x_MD.new_ones(len(expert_M), 1), E, all_filled=True)
        out_ND = _exchange(apply_experts(x_MD, here, w_up_EDF, w_down_EFD, backend), came, sent, self.group)
        weighted_ND = out_ND * routing.weight_N[routing.order_N, None].to(out_ND.dtype)
        y_TD: Tensor = _SumByToken.apply(weighted_ND, routing)  # type: ignore[no-untyped-call]
        return y_TD


def _exchange(rows_ND: Tensor, sent: list[int], came: list[int], group: dist.ProcessGroup) -> Tensor:
    """Rows to and from every process: `sent[p]` of mine go to p, `came[p]` come from it."""
    out: Tensor = _AllToAll.apply(rows_ND, sent, came, group)  # type: ignore[no-untyped-call]
    return out


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, sent: list[int], came: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.came, ctx.group = sent, came, group
        out_MD = rows_ND.new_empty(sum(came), rows_ND.shape[1])
        dist.all_to_all_single(out_MD, rows_ND.contiguous(), came, sent, group=group)
        return out_MD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(grads[0], ctx.came, ctx.sent, ctx.group), None, None, None


class _SumByToken(torch.autograd.Function):
    """Sum (T, D) of each token's rows, which lie in expert-major order; in slot order, so that repeats are equal."""

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return nnf.embedding_bag(
            inverse(routing.order_N), rows_ND, routing.by_token, mode="sum", include_last_offset=True
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].index_select(0, ctx.routing.token_N[ctx.routing.order_N]), None
