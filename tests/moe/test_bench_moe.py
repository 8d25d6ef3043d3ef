"""The benchmark as data: what it holds, and that it leaves the process as it found it."""

import importlib.util
import json

import pytest
import torch

from records.errors import UsageError
from repro.bench import moe as bench
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
    theirs = bench._transformers(TINY, "grouped_mm")
    up, down = (parameter.transpose(1, 2) for parameter in theirs.parameters())
    routing = Routing.from_slots(expert_TK, gate_TK, 4)
    torch.testing.assert_close(theirs(x_TD, expert_TK, gate_TK), apply_experts(x_TD, routing, up, down))


def test_flops_are_six_a_weight_and_assignment() -> None:
    assert TINY.flops == 6 * 32 * 2 * (16 * 16 + 8 * 16)


def test_requests_that_cannot_be_measured() -> None:
    with pytest.raises(UsageError, match="at least 2 rounds"):
        bench.measure(rounds=1)
    with pytest.raises(UsageError, match="found 'tpu'"):
        bench.measure(device="tpu")
