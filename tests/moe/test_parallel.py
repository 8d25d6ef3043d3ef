"""Two gloo processes give the losses and the weights of one: DDP, FSDP2, and experts spread over both."""

import os
import socket
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from records.errors import UsageError
from repro.model import ModelConfig, Transformer
from repro.moe import balance_loss
from repro.moe.parallel import parallelize

CONFIG = ModelConfig(
    vocab_size=32, d_model=16, num_layers=2, num_heads=2, context=8, d_expert=8, num_experts=6, top_k=2, d_shared=4
)
STEPS, BATCH, SIZE = 3, 4, 2
MODES: list[tuple[Literal["ddp", "fsdp"], bool]] = [("ddp", False), ("fsdp", False), ("ddp", True), ("fsdp", True)]


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, CONFIG.vocab_size, (BATCH, CONFIG.context + 1), generator=generator)


def train(model: nn.Module, rank: int, size: int) -> list[float]:
    """Losses over all processes, step by step; each process sees its own part of the batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step in range(STEPS):
        tokens = batch(step).chunk(size)[rank]
        output = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(output.logits_BSV.flatten(0, 1), tokens[:, 1:].flatten())
        group = dist.group.WORLD if size > 1 else None
        loss = loss + 0.1 * torch.stack([balance_loss(router, group) for router in output.routers]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach() / size
        if size > 1:
            dist.all_reduce(total)
        losses.append(float(total))
    return losses


def full(parameter: Tensor) -> Tensor:
    """A parameter, gathered if it is sharded."""
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach()


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(SIZE), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (SIZE,))
    results = {}
    for data, experts in MODES:
        model = parallelize(Transformer(CONFIG), mesh, data=data, experts=experts)
        losses = train(model, rank, SIZE)
        weights = {name.removeprefix("module."): full(p) for name, p in model.named_parameters()}
        results[data, experts] = (losses, weights)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_training_of_one(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    mp.spawn(worker, (port, str(tmp_path)), nprocs=SIZE)
    alone = Transformer(CONFIG)
    expected = train(alone, 0, 1)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(SIZE)]
    for data, experts in MODES:
        for losses, _ in (results[data, experts] for results in ranks):
            assert losses == pytest.approx(expected, rel=1e-6), (data, experts)
        for name, parameter in alone.named_parameters():
            parts = [results[data, experts][1][name] for results in ranks]
            shared = experts and name.endswith(("_EDF", "_EFD"))
            found = torch.cat(parts) if shared else parts[0]
            error = (found - parameter.detach()).norm() / parameter.detach().norm()
            assert error < 1e-5, (data, experts, name)
            assert shared or torch.equal(parts[0], parts[1])


def test_experts_that_cannot_be_shared_out() -> None:
    class Three:
        ndim = 1

        def size(self) -> int:
            return 4

    with pytest.raises(UsageError, match=r"blocks\.0\.ffn: .*multiple of 4 processes, found 6"):
        parallelize(Transformer(CONFIG), Three(), data="ddp", experts=True)  # type: ignore[arg-type]
