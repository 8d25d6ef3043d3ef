"""Configuration as data: floats as decimal strings, and strict decoding."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from records import canonical
from records.errors import MalformedError
from repro.config import decimal_string, decode, encode
from repro.model import ModelConfig
from repro.train import Segment, TrainConfig


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_decimal_string_gives_the_float_back_without_an_exponent(value):
    text = decimal_string(value)
    assert float(text) == value
    assert "e" not in text.lower()
    assert text != "-0.0"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_has_no_decimal_string(value):
    with pytest.raises(ValueError, match="finite"):
        decimal_string(value)


def _segment() -> Segment:
    return Segment(
        model=ModelConfig(d_model=16, num_layers=1, num_heads=2, context=8, d_expert=8, num_experts=4, top_k=2),
        train=TrainConfig(steps=10, batch=2, context=8, lr=1e-5),
        corpus="synthetic",
        mechanism={"k_train": 2, "lambda_hr": 0.1},
    )


def test_a_segment_survives_canonical_json():
    data = canonical.loads(canonical.dumps(encode(_segment())))
    assert data["train"]["lr"] == "0.00001"
    back = decode(Segment, data)
    assert encode(back) == encode(_segment())
    assert back.train == _segment().train


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": "ten"}, r"train\.steps: expected int"),
        ({"speed": 3}, r"unknown fields \['speed'\]"),
        ({"lr": "fast"}, r"train\.lr: expected a decimal string"),
        ({"lr": "NaN"}, r"train\.lr: expected a decimal string"),
        ({"lr": "-Infinity"}, r"train\.lr: expected a decimal string"),
        ({"lr": "1e400"}, r"train\.lr: expected a decimal string"),
        ({"schedule": "steep"}, r"train\.schedule"),
        ({"steps": 0}, "steps: expected at least 1"),
        ({"steps": True}, r"train\.steps: expected int"),
    ],
)
def test_a_field_that_does_not_fit_is_named(change, message):
    data = encode(_segment())
    data["train"] |= change
    with pytest.raises(MalformedError, match=message):
        decode(Segment, data)


def test_a_missing_field_is_named():
    data = encode(_segment())
    del data["train"]["lr"]
    with pytest.raises(MalformedError, match=r"missing fields \['lr'\]"):
        decode(Segment, data)


def test_an_optional_field_may_be_null():
    @dataclass(frozen=True, kw_only=True)
    class Pair:
        left: int
        right: float | None = None

    assert decode(Pair, {"left": 1, "right": None}) == Pair(left=1)
    assert decode(Pair, {"left": 1, "right": "0.5"}) == Pair(left=1, right=0.5)
