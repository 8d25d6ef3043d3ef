"""Statistics of small paired samples, on scipy.

- `paired`: the difference of two arms over the same seeds, with its t-test, interval and effect size
- `half_interval`: Student's, of a mean
- `gap_closure`: how much of a gap a method closes, with a bootstrap interval over seeds
- `bootstrap`, `nearer`: the interval of a mean, and of how much nearer to 0 one mean is than another
- `slope`, `vertex`, `optimum`, `parabola`: fits against log2 x
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """A paired difference left − right over n seeds, in the unit of the metric.

    sd is the sample standard deviation of the differences (the σ of every criterion here), interval the two-sided
    95% Student interval of the mean, p the two-sided p-value of a paired t-test, d_z = mean / sd.
    """

    n: int
    mean: float
    sd: float
    low: float
    high: float
    p: float
    d_z: float


def paired(left: Sequence[float], right: Sequence[float]) -> Paired:
    """Paired comparison of two equally long samples of at least two values.

    Differences that are all equal have no spread to test against: p is 1 where they are 0 and 0 elsewhere, which is the
    limit of the t-test as sd goes to 0; d_z is then 0 or infinite.

    Raises:
        ValueError: fewer than two pairs, or samples of different length.
    """
    from scipy import special

    if len(left) != len(right) or len(left) < 2:
        raise ValueError(f"expected two samples of the same length of at least 2, found {len(left)} and {len(right)}")
    differences = [a - b for a, b in zip(left, right, strict=True)]
    n = len(differences)
    mean = math.fsum(differences) / n
    sd = math.sqrt(math.fsum((x - mean) ** 2 for x in differences) / (n - 1))
    if sd == 0:
        return Paired(
            n=n,
            mean=mean,
            sd=0.0,
            low=mean,
            high=mean,
            p=float(mean == 0),
            d_z=math.copysign(math.inf, mean) if mean else 0.0,
        )
    t = mean / (sd / math.sqrt(n))
    half = half_interval(differences)
    return Paired(
        n=n,
        mean=mean,
        sd=sd,
        low=mean - half,
        high=mean + half,
        p=float(2 * special.stdtr(n - 1, -abs(t))),
        d_z=mean / sd,
    )


def half_interval(values: Sequence[float]) -> float:
    """Half the 95% Student interval of the mean; 0 for a single value, which has none."""
    from scipy import special  # a tenth of the start-up time of scipy.stats

    n = len(values)
    if n < 2:
        return 0.0
    mean = math.fsum(values) / n
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return float(special.stdtrit(n - 1, 0.975)) * sd / math.sqrt(n)


@dataclass(frozen=True, slots=True, kw_only=True)
class GapClosure:
    """η = Σ(base − method) / Σ(base − target) over n seeds, with its 95% percentile bootstrap interval."""

    n: int
    eta: float
    low: float
    high: float


_ENUMERATE_UP_TO = 6  # seeds: 6⁶ = 46,656 resamples are all of them
_RESAMPLES = 10_000


def gap_closure(base: Sequence[float], method: Sequence[float], target: Sequence[float]) -> GapClosure | None:
    """Share of the gap from `base` to `target` that `method` closes: 0 at the base, 1 at the target.

    Seeds are resampled with replacement, all three values of a seed together: every resample there is up to six seeds,
    10,000 from a fixed generator beyond. None where the gap is not positive in each of them: there is nothing to close.

    Raises:
        ValueError: fewer than two seeds, or samples of different length.
    """
    n = len(base)
    if not n == len(method) == len(target) or n < 2:
        raise ValueError(
            f"expected three samples of the same length of at least 2, found {n}, {len(method)}, {len(target)}"
        )
    closed = [b - m for b, m in zip(base, method, strict=True)]
    gap = [b - t for b, t in zip(base, target, strict=True)]
    ratios = []
    for picked in _resamples(n):
        width = math.fsum(gap[i] for i in picked)
        if width <= 0:
            return None
        ratios.append(math.fsum(closed[i] for i in picked) / width)
    ratios.sort()
    return GapClosure(
        n=n, eta=math.fsum(closed) / math.fsum(gap), low=_percentile(ratios, 0.025), high=_percentile(ratios, 0.975)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean over n seeds, or a function of means, and its 95% percentile bootstrap interval over seeds."""

    n: int
    mean: float
    low: float
    high: float


def bootstrap(values: Sequence[float]) -> Interval:
    """Interval of the mean; resampled as in `gap_closure`."""
    return _bootstrap(len(values), lambda picked: math.fsum(values[i] for i in picked) / len(picked))


def nearer(left: Sequence[float], right: Sequence[float]) -> Interval:
    """Interval of |mean left| − |mean right|, both of a seed resampled together; below 0 where left is nearer to 0.

    Raises:
        ValueError: samples of different length.
    """
    if len(left) != len(right):
        raise ValueError(f"expected two samples of the same length, found {len(left)} and {len(right)}")
    return _bootstrap(
        len(left),
        lambda picked: (
            (abs(math.fsum(left[i] for i in picked)) - abs(math.fsum(right[i] for i in picked))) / len(picked)
        ),
    )


def _bootstrap(n: int, statistic: Callable[[Sequence[int]], float]) -> Interval:
    found = sorted(statistic(picked) for picked in _resamples(n))
    return Interval(n=n, mean=statistic(range(n)), low=_percentile(found, 0.025), high=_percentile(found, 0.975))


class FitError(Exception):
    """The points allow no fit; the message says why."""


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares slope of log2 y against log2 x: the exponent of a power law.

    Raises:
        FitError: a y that is not above 0.
    """
    if min(y) <= 0:
        raise FitError(f"expected values above 0, found {min(y):g}")
    u, v = [math.log2(value) for value in x], [math.log2(value) for value in y]
    u_mean, v_mean = math.fsum(u) / len(u), math.fsum(v) / len(v)
    across = math.fsum((a - u_mean) * (b - v_mean) for a, b in zip(u, v, strict=True))
    return across / math.fsum((a - u_mean) ** 2 for a in u)


def vertex(x: Sequence[float], y: Sequence[float], *, reach: int = 1) -> float:
    """log2 x of the minimum of the least-squares parabola through the lowest y and `reach` finite neighbours a side.

    Args:
        x: above 0 and rising.
        y: infinite where there is no value to speak of (a diverged run).

    Raises:
        FitError: the lowest point has no finite neighbour on one side, or the parabola has no minimum among its points.
    """
    lowest = min(range(len(y)), key=lambda i: y[i])
    first = last = lowest
    while first > 0 and lowest - first < reach and math.isfinite(y[first - 1]):
        first -= 1
    while last < len(y) - 1 and last - lowest < reach and math.isfinite(y[last + 1]):
        last += 1
    if first == lowest or last == lowest:
        side = "below" if first == lowest else "above"
        raise FitError(f"the lowest value is at x = {x[lowest]:g}, with no finite one {side} it")
    centre = math.log2(x[lowest])
    u = [math.log2(value) - centre for value in x[first : last + 1]]
    linear, quadratic = _parabola(u, y[first : last + 1])
    if quadratic <= 0:
        raise FitError(f"the parabola around x = {x[lowest]:g} has no minimum")
    found = centre - linear / (2 * quadratic)
    if not math.log2(x[first]) <= found <= math.log2(x[last]):
        raise FitError(f"the parabola around x = {x[lowest]:g} has its minimum beyond its points")
    return found


def optimum(x: Sequence[float], y: Sequence[float]) -> float:
    """log2 x, between the first and the last, where the least-squares parabola through all points is lowest.

    Where the parabola falls or rises over the whole range, that is its end: the true optimum lies there or beyond.

    Args:
        x: above 0 and rising.
    """
    first, last = math.log2(x[0]), math.log2(x[-1])
    centre = (first + last) / 2
    linear, quadratic = _parabola([math.log2(value) - centre for value in x], y)
    places = [first, last]
    if quadratic > 0 and first < (place := centre - linear / (2 * quadratic)) < last:
        places.append(place)
    return min(places, key=lambda at: linear * (at - centre) + quadratic * (at - centre) ** 2)


def parabola(x: Sequence[float], y: Sequence[float], at: Sequence[float]) -> list[float]:
    """Values at the places `at` of the least-squares parabola in log2 x through all points; all x are above 0."""
    u = [math.log2(value) for value in x]
    linear, quadratic = _parabola(u, y)
    level = math.fsum(v - linear * a - quadratic * a**2 for a, v in zip(u, y, strict=True)) / len(u)
    return [level + linear * math.log2(value) + quadratic * math.log2(value) ** 2 for value in at]


def _parabola(u: Sequence[float], v: Sequence[float]) -> tuple[float, float]:
    """c1 and c2 of the least-squares parabola c0 + c1·u + c2·u² through at least three points."""
    # Normal equations by Cramer's rule on the centred columns u and u².
    square = _centred([value**2 for value in u])
    u, v = _centred(u), _centred(v)
    uu, us, ss = _dot(u, u), _dot(u, square), _dot(square, square)
    uv, sv = _dot(u, v), _dot(square, v)
    determinant = uu * ss - us**2
    return (uv * ss - sv * us) / determinant, (sv * uu - uv * us) / determinant


def _centred(values: Sequence[float]) -> list[float]:
    mean = math.fsum(values) / len(values)
    return [value - mean for value in values]


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return math.fsum(a * b for a, b in zip(left, right, strict=True))


def _resamples(n: int) -> Iterator[tuple[int, ...]]:
    if n <= _ENUMERATE_UP_TO:
        yield from itertools.product(range(n), repeat=n)
        return
    generator = random.Random(0)  # noqa: S311 (statistics, no secret)
    for _ in range(_RESAMPLES):
        yield tuple(int(generator.random() * n) for _ in range(n))


def _percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of the ordered values lie, interpolated between neighbours."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
