"""The spread of a load over experts."""

import pytest
import torch

from repro.evals.load import gini


def test_gini_is_0_when_even_and_rises_to_1_with_what_one_expert_takes():
    assert gini(torch.tensor([5, 5, 5, 5])) == pytest.approx(0)
    assert gini(torch.tensor([0, 0, 0, 7])) == pytest.approx(3 / 4)
    assert gini(torch.tensor([1.0, 2.0, 3.0, 4.0])) == pytest.approx(0.25)
