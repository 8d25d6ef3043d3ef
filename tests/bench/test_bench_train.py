"""`repro bench train` in its smallest form: that it measures what it says, not how fast this machine is."""

import pytest
import torch

from records.errors import UsageError
from repro.bench import train
from repro.model import ModelConfig, Transformer


def test_every_figure_is_there_and_the_fewest_experts_are_the_unit(monkeypatch):
    tiny = ModelConfig(d_model=16, d_expert=8, num_layers=1, num_heads=2, num_experts=4, top_k=2, context=16)
    monkeypatch.setitem(train._SIZES, "cpu", {"tiny": (tiny, 2)})
    monkeypatch.setitem(train._CURVE, "cpu", (tiny, 2, (2, 4)))
    result = train.measure(rounds=2, steps=1)
    (size,) = result["sizes"]
    assert size["tokens_a_step"] == 32
    assert size["tokens_per_second"] == pytest.approx(32 / size["seconds_a_step"]["median"])
    assert size["optimizer_share"] > 0
    assert 0.1 < size["cost_of_determinism"]["median"] < 10
    assert torch.are_deterministic_algorithms_enabled()
    assert 0 < size["flops_utilisation"] < 1
    assert [row["num_experts"] for row in result["experts"]] == [2, 4]
    assert result["experts"][0]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    for row in result["experts"]:
        assert set(row["parts"]) == {"data", "forward_backward", "optimizer", "expert_gemms"}
        assert all(seconds > 0 for seconds in row["parts"].values())
        assert row["parts"]["forward_backward"] > row["parts"]["expert_gemms"]


def test_a_device_that_is_not_there():
    with pytest.raises(UsageError, match="found 'tpu'"):
        train.measure(device="tpu")


def test_weights_drawn_on_a_device_have_the_spread_of_those_of_a_run():
    config = ModelConfig(d_model=64, d_expert=32, num_layers=1, num_heads=2, num_experts=4, top_k=2, context=16)
    made, drawn = Transformer(config), train.drawn_on("cpu", config)
    for (name, expected), found in zip(made.state_dict().items(), drawn.state_dict().values(), strict=True):
        assert found.shape == expected.shape
        if expected.numel() > 64:
            assert float(found.std() / expected.std()) == pytest.approx(1, abs=0.1), name
        else:
            assert (found == expected).all(), name
