"""Statistics of small paired samples, on scipy.

- `paired`: the difference of two arms over the same seeds, with its t-test, interval and effect size
- `gap_closure`: how much of a gap a method closes, with a bootstrap interval over seeds
"""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
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
    from scipy import special  # a tenth of the start-up time of scipy.stats

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
    half = float(special.stdtrit(n - 1, 0.975)) * sd / math.sqrt(n)
    return Paired(
        n=n,
        mean=mean,
        sd=sd,
        low=mean - half,
        high=mean + half,
        p=float(2 * special.stdtr(n - 1, -abs(t))),
        d_z=mean / sd,
    )


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
