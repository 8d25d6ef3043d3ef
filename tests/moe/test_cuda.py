"""The backends on a GPU, in bfloat16, against float64, and training there: run where torch sees one."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from repro.checkpoint import weights_digest
from repro.data.batches import Batches
from repro.data.corpus import load
from repro.environment import set_deterministic
from repro.inherit import Parent
from repro.model import ModelConfig, Transformer
from repro.moe import MoE, Routing, TopK, apply_experts, triton
from repro.moe.growth import Growth
from repro.moe.triton import supports
from repro.trace import genesis
from repro.train import Mechanism, Segment, TrainConfig, make_optimizer, train_segment, training_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")

# T, D, F, E, K: tails in every axis, a fine-grained shape, more experts than tokens.
SHAPES = [(300, 136, 72, 5, 2), (4096, 768, 256, 128, 8), (40, 256, 256, 64, 4), (1, 64, 64, 8, 8)]


BACKENDS = ["auto", "triton"]


def need(backend: str) -> None:
    if backend == "triton" and not supports(torch.zeros(1, 1, device="cuda", dtype=torch.bfloat16)):
        pytest.skip("triton is not installed")


def result(backend: str, dtype: torch.dtype, inputs: list[Tensor], expert_TK: Tensor, E: int) -> list[Tensor]:
    x_TD, gate_TK, up, down, dy_TD = (z.to(dtype).requires_grad_() for z in inputs)
    routing = Routing.from_slots(expert_TK, gate_TK.float() if dtype != torch.float64 else gate_TK, E, all_filled=True)
    y_TD = apply_experts(x_TD, routing, up, down, backend)
    return [y_TD.detach(), *torch.autograd.grad(y_TD, (x_TD, gate_TK, up, down), dy_TD)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["grouped", "triton"])
def test_bfloat16_against_float64_and_forty_equal_repeats(backend: str, shape: tuple[int, int, int, int, int]) -> None:
    need(backend)
    T, D, F, E, K = shape
    scales = [(T, D, 1.0), (T, K, 1.0), (E, D, 2 * F, D**-0.5), (E, F, D, F**-0.5), (T, D, 1.0)]
    inputs = [torch.randn(*size, device="cuda").mul(std).bfloat16() for *size, std in scales]
    expert_TK = TopK(K)(torch.rand(T, E, device="cuda"))[0]
    exact = result("reference", torch.float64, inputs, expert_TK, E)
    first = result(backend, torch.bfloat16, inputs, expert_TK, E)
    for name, found, expected in zip(("y", "dx", "dgate", "dup", "ddown"), first, exact, strict=True):
        assert (found.double() - expected).norm() / expected.norm() < 1e-2, name
    for _ in range(39):
        assert all(map(torch.equal, first, result(backend, torch.bfloat16, inputs, expert_TK, E)))


@contextlib.contextmanager
def nothing_may_wait() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_layer_routes_without_waiting_for_the_device(backend: str, deterministic: bool) -> None:
    need(backend)
    if deterministic:
        set_deterministic()
    moe = MoE(d_model=64, d_expert=64, num_experts=16, top_k=2, backend=backend).to("cuda", torch.bfloat16)
    x_TD = torch.randn(128, 64, device="cuda", dtype=torch.bfloat16)
    moe(x_TD).sum().backward()
    with nothing_may_wait():
        moe(x_TD).sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_routing_made_there_is_that_of_the_cpu(backend: str) -> None:
    need(backend)
    scores_TE = torch.rand(500, 40)
    for rule in (TopK(4), TopK(13), TopK(torch.randint(0, 9, (500,)))):
        cpu_k = rule.k.cuda() if isinstance(rule.k, Tensor) else rule.k
        here, there = rule(scores_TE), TopK(cpu_k)(scores_TE.cuda())
        assert torch.equal(here[0], there[0].cpu())
        on_cpu = Routing.from_slots(*here, 40)
        on_gpu = Routing.from_slots(*there, 40, kernels=backend == "triton")
        for name in ("token_N", "expert_N", "order_N", "by_token", "by_expert"):
            assert torch.equal(getattr(on_cpu, name), getattr(on_gpu, name).cpu()), name


@pytest.mark.parametrize("shape", SHAPES)
def test_each_tile_of_the_plan_starts_where_the_definition_says(shape: tuple[int, int, int, int, int]) -> None:
    need("triton")
    T, _, _, E, K = shape
    routing = Routing.from_slots(TopK(K)(torch.rand(T, E, device="cuda"))[0], torch.ones(T, K, device="cuda"), E)
    expert, first = (z.tolist() for z in triton.plan(routing).tiles_of(64))
    bounds = routing.by_expert.tolist()
    expected = [(e, start) for e in range(E) for start in range(bounds[e], bounds[e + 1], 64)]
    assert list(zip(expert, first, strict=True))[: len(expected)] == expected
    assert set(expert[len(expected) :]) <= {-1}


def test_a_rows_result_does_not_depend_on_the_rest_of_the_batch() -> None:
    need("triton")
    moe = MoE(d_model=256, d_expert=128, num_experts=8, top_k=2, backend="triton").to("cuda", torch.bfloat16)
    x_TD = torch.randn(700, 256, device="cuda", dtype=torch.bfloat16)
    expert_TK, gate_TK = TopK(2)(torch.rand(700, 8, device="cuda"))

    def of(tokens: slice) -> Tensor:
        routing = Routing.from_slots(expert_TK[tokens], gate_TK[tokens], 8, all_filled=True)
        return apply_experts(x_TD[tokens], routing, moe.w_up_EDF, moe.w_down_EFD, "triton").detach()

    assert torch.equal(of(slice(0, 700))[200:311], of(slice(200, 311)))


MODEL = ModelConfig(
    d_model=64, num_layers=2, num_heads=2, context=32, d_expert=32, num_experts=8, top_k=2, d_shared=32,
    selection_bias=True,
)  # fmt: skip
TRAIN = TrainConfig(
    steps=12, batch=8, context=32, lr=1e-2, warmup=2, precision="bfloat16", bias_rate=1e-3, trace_every=3,
    hash_every=6, checkpoint_every=6,
)  # fmt: skip
START = genesis("11" * 32, "22" * 32)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_training_step_waits_for_nothing_under_deterministic_flags(
    backend: str, precision: Literal["bfloat16", "float32"]
) -> None:
    need(backend)
    if (backend, precision) == ("auto", "float32"):
        pytest.skip("the loop over experts reads their loads")
    set_deterministic()
    model = Transformer(replace(MODEL, backend=backend)).to("cuda")
    train = replace(TRAIN, precision=precision)
    optimizer = make_optimizer(model, train)
    tokens_BS = torch.randint(0, 256, (8, 33)).to("cuda")

    def step(number: int) -> Tensor:
        inputs = (tokens_BS[:, :-1].contiguous(), tokens_BS[:, 1:].contiguous())
        return training_step(model, optimizer, train, *inputs, Mechanism(), number, 0)[0]

    first = step(0)
    with nothing_may_wait():
        for number in range(1, 12):
            last = step(number)
    assert float(last) < float(first)


def train_there(
    folder: Path,
    model: ModelConfig,
    *,
    stop_at: int | None = None,
    parent: Path | None = None,
    growth: Growth | None = None,
) -> str:
    def stop(steps: int, _: int) -> None:
        if steps == stop_at:
            raise KeyboardInterrupt

    set_deterministic()
    segment = Segment(
        model=model, train=TRAIN, corpus="synthetic", inherit="all" if parent else "nothing", growth=growth
    )
    trained = train_segment(
        segment,
        batches=Batches(data=load("synthetic").train, batch=TRAIN.batch, context=TRAIN.context, seed=0),
        mechanism=Mechanism(),
        seed=0,
        folder=folder,
        genesis=START,
        device="cuda",
        progress=stop,
        parent=Parent(folder=parent, model=replace(model, num_experts=8), genesis=START) if parent else None,
    )
    return weights_digest(trained)


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_repeats_resumes_and_grows_to_the_same_bits(backend: str, tmp_path: Path) -> None:
    need(backend)
    model = replace(MODEL, backend=backend)
    whole = train_there(tmp_path / "whole", model)
    assert train_there(tmp_path / "again", model) == whole
    with pytest.raises(KeyboardInterrupt):
        train_there(tmp_path / "stopped", model, stop_at=9)
    assert (tmp_path / "stopped" / "checkpoint.safetensors").exists()
    assert train_there(tmp_path / "stopped", model) == whole
    growth = Growth(allocation="utility", weight_noise=0.01, bias_noise=0.01)
    larger = replace(model, num_experts=12)
    grown = [
        train_there(tmp_path / name, larger, parent=tmp_path / "whole", growth=growth)
        for name in ("more", "again more")
    ]
    assert grown[0] == grown[1]
