"""Where the learning rate is best, by parameterization and size, and how far it drifts: what the sweeps measured.

- `optima`: of every swept model the fitted optimum, as the claims fit it, with its bootstrap interval over seeds
- `drifts`: from each size to the next, and from the first to the last
- `tables`: both as Markdown tables

No verdict comes from here: those of M4 and M6 are in the outcome. See "Learning rates" in README.md.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from papers.mssp.figures import sweeps
from papers.mssp.settings import Sweep
from repro.experiment import Quantity
from repro.judge import Evidence, seed_values
from repro.stats import Interval, bootstrap


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimum:
    """Of the model `stem`-`size` (sweep-mssp-II, x4): log2 of the best base learning rate with each seed.

    None where no parabola fits: the lowest loss is at an end of the rates, or beside one that diverged. `diverged` counts
    the cells, rates and seeds together, that did.
    """

    stem: str
    size: str
    values: tuple[float | None, ...]
    diverged: int

    @property
    def interval(self) -> Interval | None:
        """Mean over seeds and its 95% bootstrap interval; None where a seed has no value."""
        return _interval(self.values)


def optima(sweep: Sweep, evidence: Evidence, seeds: Sequence[int]) -> Mapping[str, tuple[Optimum, ...]]:
    """By stem, in the order of sizes; models that were not run are left out."""
    found: dict[str, tuple[Optimum, ...]] = {}
    for stem, sizes, rates in sweeps(sweep):
        row = []
        for size, _ in sizes:
            arms = tuple(f"{stem}-{size}-lr{rate}" for rate in rates)
            cells = [evidence.get((arm, seed)) for arm in arms for seed in seeds]
            if not all(cells):
                continue
            x = tuple(2.0**rate for rate in rates)
            fitted = Quantity(fit="vertex", metric="loss", arms=arms, x=x, reach=sweep.reach)
            values = seed_values(fitted, seeds=seeds, evidence=evidence, chosen={})
            lost = sum(cell is not None and cell.status == "diverged" for cell in cells)
            row.append(Optimum(stem=stem, size=size, values=tuple(values), diverged=lost))
        if row:
            found[stem] = tuple(row)
    return found


def drifts(row: Sequence[Optimum]) -> Iterator[tuple[str, Interval | None]]:
    """In octaves, paired by seed: (`x1 to x2`, its mean and interval), of neighbours and, of more than two, of the ends."""
    pairs = list(itertools.pairwise(row))
    if len(row) > 2:
        pairs.append((row[0], row[-1]))
    for before, after in pairs:
        both = zip(before.values, after.values, strict=True)
        values = [None if a is None or b is None else b - a for a, b in both]
        yield f"{before.size} to {after.size}", _interval(values)


def tables(found: Mapping[str, Sequence[Optimum]]) -> str:
    """Two Markdown tables: log2 of the best base learning rate, and drifts in octaves."""
    head = "| sweep | size | best log2 learning rate (95% interval) | with each seed | diverged cells |"
    lines = [head, "|---|---|---|---|---|"]
    for row in found.values():
        for one in row:
            seeds = ", ".join("none" if value is None else f"{value:.2f}" for value in one.values)
            lines.append(f"| {one.stem} | {one.size} | {_shown(one.interval)} | {seeds} | {one.diverged} |")
    lines += ["", "| sweep | drift, octaves (95% interval) |", "|---|---|"]
    for stem, row in found.items():
        each = "; ".join(f"{name}: {_shown(interval, sign='+')}" for name, interval in drifts(row))
        if each:
            lines.append(f"| {stem} | {each} |")
    return "\n".join(lines)


def _interval(values: Sequence[float | None]) -> Interval | None:
    known = [value for value in values if value is not None]
    return bootstrap(known) if known and len(known) == len(values) else None


def _shown(interval: Interval | None, sign: str = "") -> str:
    if interval is None:
        return "none"
    return "{:{s}.2f} ({:{s}.2f} to {:{s}.2f})".format(interval.mean, interval.low, interval.high, s=sign)
