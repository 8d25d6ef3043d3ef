"""Paired statistics against scipy's own test and against numbers worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from repro.stats import FitError, bootstrap, gap_closure, nearer, optimum, paired, parabola, slope, vertex

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


def test_the_bootstrap_of_a_mean_by_hand():
    # of the 27 resamples of three seeds the lowest is (1, 1, 1), then three of (1, 1, 2): the 2.5% point lies between
    found = bootstrap([1.0, 2.0, 6.0])
    assert (found.n, found.mean) == (3, 3.0)
    assert found.low == pytest.approx(1 + 0.65 / 3)
    assert found.high == pytest.approx(6 - 0.65 * (6 - 14 / 3))


def test_nearer_to_zero_whatever_the_sign():
    assert nearer([-0.1, -0.2, -0.1], [0.9, 1.0, 1.1]).high < -0.6
    assert nearer([0.9, 1.0, 1.1], [-0.1, -0.2, -0.1]).low > 0.6
    torn = nearer([-1.0, 1.0, 0.0], [0.5, 0.5, 0.5])  # the mean is 0, but not of every resample
    assert torn.mean == -0.5
    assert torn.low < 0 < torn.high


@given(st.floats(-2, 2), st.floats(0.01, 100))
def test_the_slope_of_a_power_law_is_its_exponent(exponent, factor):
    x = [64, 128, 256, 512]
    assert slope(x, [factor * value**exponent for value in x]) == pytest.approx(exponent, abs=1e-9)


def test_no_slope_through_nothing():
    with pytest.raises(FitError, match="above 0, found 0"):
        slope([1, 2], [0.5, 0.0])


@given(st.floats(-0.99, 0.99), st.sampled_from([1, 2, 3]))
def test_the_vertex_of_a_parabola_is_found_exactly(place, reach):
    x = [2.0**power for power in (-4, -3, -2, -1)]
    y = [3 + 0.5 * (math.log2(value) + 2.5 - place / 2) ** 2 for value in x]
    assert vertex(x, y, reach=reach) == pytest.approx(-2.5 + place / 2)


@pytest.mark.parametrize(
    ("y", "why"),
    [
        ([1, 2, 3, 4], "lowest value is at x = 1, with no finite one below"),
        ([4, 3, 2, 1], "lowest value is at x = 8, with no finite one above"),
        ([4, 1, math.inf, 5], "lowest value is at x = 2, with no finite one above"),
        ([1, 1, 1, 1], "no finite one below"),
        ([math.inf] * 4, "no finite one below"),
    ],
)
def test_no_vertex_where_there_is_no_minimum_between_points(y, why):
    with pytest.raises(FitError, match=why):
        vertex([1, 2, 4, 8], y)


def test_points_beyond_a_diverged_one_do_not_count():
    assert vertex([1, 2, 4, 8, 16], [4, 3, 5, math.inf, 5], reach=3) == vertex([1, 2, 4], [4, 3, 5])


def test_a_wide_parabola_averages_noise():
    x = [2.0**power for power in range(-3, 4)]
    y = [value**2 for value in (-3, -2, -1, 0, 1, 2, 3)]
    noisy = [v + e for v, e in zip(y, (0, 0, 0.3, 0, -0.3, 0, 0), strict=True)]
    assert abs(vertex(x, noisy, reach=3)) < abs(vertex(x, noisy, reach=1))


def test_a_flat_or_lopsided_parabola_is_no_answer():
    with pytest.raises(FitError, match="has no minimum"):
        vertex([1, 2, 4, 8, 16], [0.0, 1.0, -0.01, 1.0, 0.0], reach=2)


@pytest.mark.parametrize("place", [0.3, 1.0, 2.9])
def test_the_optimum_of_a_parabola_is_found_exactly(place):
    x = [0.125, 0.2, 0.3, 0.45, 0.65]
    middle = math.log2(x[0]) + place / 3 * math.log2(x[-1] / x[0])
    assert optimum(x, [3 * (math.log2(value) - middle) ** 2 + 1.5 for value in x]) == pytest.approx(middle)


def test_the_optimum_lies_at_an_end_where_the_parabola_has_none_between():
    x = [1.0, 2.0, 4.0, 8.0]
    assert optimum(x, [(math.log2(value) + 1) ** 2 for value in x]) == 0
    assert optimum(x, [(math.log2(value) - 5) ** 2 for value in x]) == 3
    assert optimum(x, [-((math.log2(value) - 1) ** 2) for value in x]) == 3  # a hill: the farther, lower end
    assert optimum(x, [-((math.log2(value) - 2) ** 2) for value in x]) == 0


def test_the_optimum_agrees_with_numpy_on_noisy_points():
    random = np.random.default_rng(3)
    x = np.array([0.125, 0.2, 0.3, 0.45, 0.65])
    for _ in range(20):
        y = (np.log2(x) + 2) ** 2 + random.normal(0, 0.2, len(x))
        c2, c1, _ = np.polyfit(np.log2(x), y, 2)
        assert optimum(x.tolist(), y.tolist()) == pytest.approx(np.clip(-c1 / (2 * c2), np.log2(x[0]), np.log2(x[-1])))
        expected = np.polyval(np.polyfit(np.log2(x), y, 2), np.log2([0.15, 0.5]))
        assert parabola(x.tolist(), y.tolist(), [0.15, 0.5]) == pytest.approx(expected.tolist())
