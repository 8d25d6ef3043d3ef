"""What a GPU would be asked to do, seen on torch's device without data: nothing that waits for it, nothing that scatters.

Under deterministic algorithms torch's CUDA scatters (index_put, scatter_add, index_add, index_copy and the backward of gather)
sort, and read the indices' bounds from the host.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from repro.model import ModelConfig, Transformer
from repro.moe import MoE, RoutingRule, TopK
from repro.train import Mechanism, TrainConfig, make_optimizer, training_step

SCATTERS = ("index_put", "scatter_add", "scatter.src", "scatter_.src", "index_add", "index_copy", "scatter_reduce")
WAITS = ("_local_scalar_dense", "nonzero", "bincount", "unique", "masked_select")


class Asked(TorchDispatchMode):
    """Names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func).removeprefix("aten."))
        return func(*args, **(kwargs or {}))

    def like(self, parts: tuple[str, ...]) -> set[str]:
        return {name for name in self.names if any(part in name for part in parts)}


@pytest.fixture(autouse=True)
def what_the_device_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none for this device, nor operations on lists of tensors; the weights are bfloat16 instead."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *inputs, foreach: clip(*inputs, foreach=False))


@contextlib.contextmanager
def asked() -> Iterator[Asked]:
    with Asked() as mode:
        yield mode


@pytest.mark.parametrize("k", [2, 12])
def test_a_layer_neither_waits_nor_scatters(k: int) -> None:
    moe = MoE(d_model=16, d_expert=8, num_experts=16, top_k=k, selection_bias=True, d_shared=8).to(
        "meta", torch.bfloat16
    )
    x_TD = torch.empty(32, 16, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with asked() as mode:
        moe(x_TD).sum().backward()
    assert mode.like(("_grouped_mm",))
    assert mode.like(("embedding_bag",))
    assert mode.like(SCATTERS + WAITS) == set()


class Sloppy:
    """Top-k by torch's own gather, with no promise that it fills all slots."""

    def __call__(self, scores_TE: Tensor, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
        expert_TK = TopK(2)(scores_TE)[0]
        return expert_TK, scores_TE.gather(1, expert_TK)


def test_the_watch_sees_what_scatters_and_what_waits() -> None:
    rule: RoutingRule = Sloppy()
    moe = MoE(d_model=16, d_expert=8, num_experts=16, top_k=2).to("meta", torch.bfloat16)
    x_TD = torch.empty(32, 16, device="meta", dtype=torch.bfloat16)
    with asked() as mode, pytest.raises((NotImplementedError, RuntimeError)):
        moe(x_TD, rule)
    assert mode.like(WAITS)
    rule.fills_all = True  # type: ignore[attr-defined]
    with asked() as mode:
        moe(x_TD, rule).sum().backward()
    assert mode.like(SCATTERS)


def test_a_training_step_neither_waits_nor_scatters() -> None:
    config = ModelConfig(
        vocab_size=32, d_model=16, num_layers=2, num_heads=2, context=8, d_expert=8, num_experts=4, top_k=2,
        d_shared=8, selection_bias=True,
    )  # fmt: skip
    train = TrainConfig(steps=1, batch=4, context=8, lr=0.1, optimizer="sgd", bias_rate=1e-3)
    model = Transformer(config, None).to("meta", torch.bfloat16)
    optimizer = make_optimizer(model, train)
    tokens_BS = torch.empty(4, 8, dtype=torch.int64, device="meta")
    with asked() as mode:
        loss, norm = training_step(model, optimizer, train, tokens_BS, tokens_BS, Mechanism(), 0, 0)
    assert loss.device.type == norm.device.type == "meta"
    assert mode.like(("_grouped_mm",))
    assert mode.like(SCATTERS + WAITS) == set()
