"""Statistics of small paired samples, on scipy.

- `paired`: the difference of two arms over the same seeds, with its t-test, interval and effect size
"""

import math
from collections.abc import Sequence
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
