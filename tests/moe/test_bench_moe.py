"""The benchmark as data: what it holds, and that it leaves the process as it found it."""

import importlib.util
import json
import os
import re
from typing import Any

import pytest
import torch

from records.errors import UsageError
from repro.bench import moe as bench
from repro.bench import peers
from repro.moe import Routing, apply_experts

TINY = bench.Shape(tokens=32, d_model=16, d_expert=8, num_experts=4, top_k=2, goal=1e9)


@pytest.mark.parametrize("load", ["balanced", "zipf", "one", "mixed"])
def test_every_contestant_is_measured_against_the_dense_floor(load: bench.Load) -> None:
    shape = bench.Shape(tokens=32, d_model=16, d_expert=8, num_experts=4, top_k=2, load=load, goal=1e9)
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    report = bench.measure(shapes=[shape], rounds=3)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)

    assert json.loads(json.dumps(report)) == report
    (result,) = report["shapes"]
    theirs = (
        {"transformers", "transformers-eager"}
        if importlib.util.find_spec("transformers") and load != "mixed"
        else set()
    )
    assert set(result["ratio_to_dense"]) == theirs | {"dense", "layer", "gemms", "cpu", "grouped", "torch", "reference"}
    assert result["ratio_to_dense"]["dense"] == {"median": 1, "low": 1, "high": 1}
    assert result["goal"] == {"layer_ratio": 1e9, "met": True}
    assert result["failed"] == {}
    assert theirs.isdisjoint(result["absent"])
    assert theirs | set(result["absent"]) == set(peers.NAMES)
    assert theirs | {"cpu", "grouped", "torch"} == set(result["difference"])
    assert max(result["difference"].values()) < 1e-5
    assert report["shapes_left"] == 0
    for name, spread in result["total_ms"].items():
        assert 0 < result["forward_ms"][name]["median"] < spread["median"]
        assert spread["low"] <= spread["median"] <= spread["high"]


def test_loads_are_what_they_say() -> None:
    def drawn(load: bench.Load) -> torch.Tensor:
        shape = bench.Shape(tokens=4000, d_model=4, d_expert=4, num_experts=8, top_k=2, load=load)
        return bench.slots(shape, torch.device("cpu"))

    assert (drawn("balanced")[:, 0] == 0).float().mean().item() == pytest.approx(1 / 8, abs=0.03)
    assert (drawn("one")[:, 0] == 0).float().mean().item() == pytest.approx(0.6, abs=0.03)
    assert (torch.bincount(drawn("zipf").flatten(), minlength=8).diff() < 0).all()
    assert (drawn("mixed") >= 0).sum(1).float().mean().item() == pytest.approx(1.5, abs=0.03)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_experts_compute_what_ours_do() -> None:
    x_TD, expert_TK = torch.randn(32, 16), bench.slots(TINY, torch.device("cpu"))
    gate_TK = torch.rand(32, 2)
    routing = Routing.from_slots(expert_TK, gate_TK, 4)
    up, down = torch.randn(4, 16, 16), torch.randn(4, 8, 16)
    inputs = peers.Inputs(
        x_TD=x_TD, routing=routing, slots_TK=expert_TK, gate_TK=gate_TK, w_up_EDF=up, w_down_EFD=down, even=True
    )
    theirs = peers.transformers_experts(inputs, "grouped_mm")
    torch.testing.assert_close(theirs(x_TD, expert_TK, gate_TK), apply_experts(x_TD, routing, up, down))


def test_who_fails_or_computes_something_else_is_named_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def found(inputs: peers.Inputs) -> tuple[dict[str, Any], dict[str, str]]:
        def broken() -> torch.Tensor:
            raise RuntimeError("no such kernel\nand a long story")

        def tires() -> torch.Tensor:
            if torch.is_grad_enabled():
                raise torch.OutOfMemoryError("out of memory")
            return apply_experts(inputs.x_TD, inputs.routing, inputs.w_up_EDF, inputs.w_down_EFD)

        runs = {"liger": broken, "sonic": lambda: inputs.x_TD * 1.0, "transformers": tires}
        return {name: (run, (inputs.x_TD,)) for name, run in runs.items()}, {"transformers-eager": "is away"}

    monkeypatch.setattr(peers, "peers", found)
    (result,) = bench.measure(shapes=[TINY], rounds=3)["shapes"]
    assert set(result["failed"]) == {"liger", "sonic", "transformers"}
    assert result["failed"]["liger"] == "RuntimeError: no such kernel"
    assert re.match("expected the loop's result to 0.0001, found a difference of", result["failed"]["sonic"])
    assert result["failed"]["transformers"] == "OutOfMemoryError: out of memory"
    assert result["absent"] == {"transformers-eager": "is away"}
    assert set(result["total_ms"]) == {"dense", "layer", "gemms", "cpu", "grouped", "torch", "reference"}


def test_a_shape_that_cannot_be_measured_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SwiGLU", lambda *_: torch.empty(1 << 60))
    report = bench.measure(shapes=[TINY, TINY], rounds=2)
    assert [list(result["failed"]) for result in report["shapes"]] == [["shape"], ["shape"]]
    assert report["shapes"][0]["d_expert"] == 8


def test_no_shape_begins_once_the_budget_is_spent() -> None:
    report = bench.measure(shapes=[TINY, TINY], rounds=2, budget=-1)
    assert report["shapes"] == []
    assert report["shapes_left"] == 2


def test_foreign_code_that_cannot_be_imported_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = peers.Inputs(
        x_TD=torch.ones(2, 4),
        routing=Routing.from_slots(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), 1),
        slots_TK=torch.zeros(2, 1, dtype=torch.int64),
        gate_TK=torch.ones(2, 1),
        w_up_EDF=torch.ones(1, 4, 8),
        w_down_EFD=torch.ones(1, 4, 4),
        even=False,
    )
    monkeypatch.setattr(peers, "_sonic", lambda _: 1 / 0)
    found, absent = peers.peers(inputs)
    assert found == {}
    assert absent["sonic"] == "ZeroDivisionError: division by zero"
    assert absent["liger"] == "needs a GPU"
    assert set(absent) == set(peers.NAMES)


def test_flops_are_six_a_weight_and_assignment() -> None:
    assert TINY.flops == 6 * 32 * 2 * (16 * 16 + 8 * 16)


def test_requests_that_cannot_be_measured() -> None:
    with pytest.raises(UsageError, match="at least 2 rounds"):
        bench.measure(rounds=1)
    with pytest.raises(UsageError, match="found 'tpu'"):
        bench.measure(device="tpu")


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")  # in the interpreter
@pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="Liger is not installed, or not interpreted",
)
def test_ligers_experts_compute_what_ours_do() -> None:
    expert_TK, gate_TK = bench.slots(TINY, torch.device("cpu")), torch.rand(32, 2, requires_grad=True)
    x_TD, dy_TD = torch.randn(32, 16, requires_grad=True), torch.randn(32, 16)
    up, down = torch.randn(4, 16, 16, requires_grad=True), torch.randn(4, 8, 16, requires_grad=True)
    routing = Routing.from_slots(expert_TK, gate_TK, 4)
    inputs = peers.Inputs(
        x_TD=x_TD, routing=routing, slots_TK=expert_TK, gate_TK=gate_TK, w_up_EDF=up, w_down_EFD=down, even=True
    )
    run, leaves = peers.liger_experts(inputs)
    y_TD = run()
    ours_TD = apply_experts(x_TD, routing, up, down)
    torch.testing.assert_close(y_TD, ours_TD)
    theirs = torch.autograd.grad(y_TD, leaves, dy_TD)
    ours = torch.autograd.grad(ours_TD, (x_TD, gate_TK, up, down), dy_TD)
    by_layout = (theirs[0], theirs[1], theirs[2].transpose(1, 2), theirs[3].transpose(1, 2))
    for one, other in zip(by_layout, ours, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
