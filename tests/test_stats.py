"""Paired statistics against scipy's own test and against numbers worked out by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from repro.stats import gap_closure, paired

number = st.integers(-10_000, 10_000).map(lambda n: n / 100)  # of one size: scipy overflows on a mean of 1e-308
values = st.lists(number, min_size=3, max_size=8)


@given(values, st.data())
def test_agrees_with_scipy(left, data):
    right = data.draw(st.lists(number, min_size=len(left), max_size=len(left)))
    differences = [a - b for a, b in zip(left, right, strict=True)]
    found = paired(left, right)
    if found.sd < 1e-6 * max(1.0, max(map(abs, differences))):
        return  # scipy loses its digits there, and says so
    expected = scipy_stats.ttest_1samp(differences, 0)
    interval = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-6, abs=1e-9)


def test_by_hand():
    found = paired([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])  # differences 1, 2, 3: mean 2, sd 1, t = 2·√3
    assert (found.n, found.mean, found.sd, found.d_z) == (3, 2.0, 1.0, 2.0)
    assert found.p == pytest.approx(0.0741799, rel=1e-5)
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), rel=1e-6)


def test_equal_differences_are_the_limit():
    assert paired([1.0, 2.0], [1.0, 2.0]).p == 1.0
    assert paired([2.0, 3.0], [1.0, 2.0]).p == 0.0
    assert paired([2.0, 3.0], [1.0, 2.0]).d_z == math.inf


@pytest.mark.parametrize(("left", "right"), [([1.0], [2.0]), ([1.0, 2.0], [1.0])])
def test_too_few_or_unpaired_values_are_refused(left, right):
    with pytest.raises(ValueError, match="same length of at least 2"):
        paired(left, right)


def test_gap_closure_by_hand():
    found = gap_closure([3.0, 4.0], [2.0, 3.5], [1.0, 2.0])
    assert found.eta == pytest.approx(1.5 / 4)
    # the resamples (0,0) (0,1) (1,0) (1,1) give 1/2, 3/8, 3/8, 1/4
    assert (found.low, found.high) == pytest.approx((0.25 + 0.125 * 0.075, 0.5 - 0.125 * 0.075))
    assert gap_closure([3.0] * 3, [3.0] * 3, [1.0] * 3).eta == 0
    assert gap_closure([3.0] * 3, [1.0] * 3, [1.0] * 3).low == 1


def test_without_a_gap_there_is_nothing_to_close():
    assert gap_closure([1.0, 2.0], [1.0, 1.0], [1.0, 2.0]) is None
    assert gap_closure([1.0, 2.0, 2.0], [1.0] * 3, [1.5, 1.0, 1.0]) is None  # no gap in a resample of seed 0 alone


def test_many_seeds_are_resampled_the_same_way_each_time():
    base, method, target = ([x + i % 3 / 10 for i in range(9)] for x in (3.0, 2.0, 1.0))
    assert gap_closure(base, method, target) == gap_closure(base, method, target)
    assert gap_closure(base, method, target).eta == pytest.approx(0.5)


@pytest.mark.parametrize("samples", [([1.0], [1.0], [1.0]), ([1.0, 2.0], [1.0, 2.0], [1.0])])
def test_gap_closure_refuses_samples_that_do_not_match(samples):
    with pytest.raises(ValueError, match="three samples"):
        gap_closure(*samples)
