"""What the report shows of one claim: its tests with their outcome in words, every seed's values, a strip for each test.

- `Tested`: one criterion or control, as fixed in the plan, with what came of it
- `Strip`: the paired differences of a test, seed by seed, their mean and interval, and where the test would hold
- `view`: a claim and its verdict to all of that
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from repro.experiment import Claim, Quantity, Test
from repro.judge import Evidence, seed_values
from repro.report.table import deciding

_WIDTH, _MARGIN = 300.0, 12.0

#: What a result means, by role: the words, and whether it speaks for the claim.
_WORDS = {
    ("pass", "holds"): ("holds", "good"),
    ("pass", "fails"): ("does not hold", "bad"),
    ("fail", "holds"): ("holds, which speaks against the claim", "bad"),
    ("fail", "fails"): ("does not hold", "good"),
    ("control", "holds"): ("came out as foretold", "good"),
    ("control", "fails"): ("did not come out as foretold", "bad"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Strip:
    """Positions along a line of 300 units: of each seed's difference, their mean and interval, of 0, of where it holds."""

    seeds: tuple[str, ...]
    mean: str
    interval: tuple[str, str]
    zero: str
    zones: tuple[tuple[str, str], ...]
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tested:
    """A test of a claim: its text, its result in words with `tone` good, bad or open, its numbers as the outcome has them."""

    text: str
    words: str
    tone: str
    reason: str
    unit: str
    numbers: Mapping[str, Any]
    strip: Strip | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimView:
    """A claim for the page; `number` counts from 1, `values` are rows of (quantity, its value with each seed)."""

    number: int
    claim: Claim
    verdict: Mapping[str, Any]
    deciding: Mapping[str, Any] | None
    groups: Sequence[tuple[str, Sequence[Tested]]]
    values: Sequence[tuple[str, Sequence[float | None]]]


def view(
    number: int,
    claim: Claim,
    verdict: Mapping[str, Any],
    *,
    seeds: Sequence[int],
    evidence: Evidence,
    chosen: Mapping[str, str],
) -> ClaimView:
    """The claim with the verdict that the outcome gives it; `chosen` names the arm that stands for a group."""
    planned = [*claim.passes, *claim.fails, *claim.controls]
    results = verdict["tests"]
    by_role: dict[str, list[Tested]] = {"pass": [], "fail": [], "control": []}
    roles = ["pass"] * len(claim.passes) + ["fail"] * len(claim.fails) + ["control"] * len(claim.controls)
    for at, (role, test) in enumerate(zip(roles, planned, strict=True)):
        result = results[at] if len(results) == len(planned) else {}
        differences = _differences(test, seeds, evidence, chosen) if "effect" in result else None
        by_role[role].append(_tested(role, test, result, seeds, differences))
    return ClaimView(
        number=number,
        claim=claim,
        verdict=verdict,
        deciding=deciding(verdict),
        groups=(
            ("Replicated if all of these hold", by_role["pass"]),
            ("Not replicated if any of these holds", by_role["fail"]),
            ("Controls: all must come out as foretold, else the verdict is inconclusive", by_role["control"]),
        ),
        values=[
            (text, seed_values(quantity, seeds=seeds, evidence=evidence, chosen=chosen))
            for text, quantity in _quantities(planned).items()
        ],
    )


def _tested(
    role: str, test: Test, result: Mapping[str, Any], seeds: Sequence[int], differences: Sequence[float] | None
) -> Tested:
    words, tone = _WORDS.get((role, result.get("result", "")), ("not computed", "open"))
    units = {"closes": "share of the gap closed (η)", "nearer": "|left| − |right|"}
    return Tested(
        text=str(test),
        words=words,
        tone=tone,
        reason=result.get("reason", ""),
        unit=units.get(test.relation, "left − right"),
        numbers=result if "effect" in result else {},
        strip=_strip(test, result, seeds, differences) if differences else None,
    )


def _quantities(tests: Sequence[Test]) -> dict[str, Quantity]:
    """What the tests compare, each once; constants are in the tests' text already."""
    found: dict[str, Quantity] = {}
    for test in tests:
        for quantity in (test.left, test.right, test.base):
            if quantity is not None and quantity.value is None and not (quantity.metric is None and quantity.arm == ""):
                found.setdefault(str(quantity), quantity)
    return found


def _differences(test: Test, seeds: Sequence[int], evidence: Evidence, chosen: Mapping[str, str]) -> list[float] | None:
    """left − right with each seed; None where the test is not about them, or a value is lacking."""
    if test.relation in ("closes", "nearer", "identical"):
        return None
    left, right = (
        seed_values(quantity, seeds=seeds, evidence=evidence, chosen=chosen) for quantity in (test.left, test.right)
    )
    if test.base is not None:
        base = seed_values(test.base, seeds=seeds, evidence=evidence, chosen=chosen)
        right = [
            None if b is None or r is None else b - test.at_least * (b - r) for b, r in zip(base, right, strict=True)
        ]
    found = [a - b for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    return found if len(found) == len(seeds) and all(map(math.isfinite, found)) else None


def _strip(test: Test, result: Mapping[str, Any], seeds: Sequence[int], differences: Sequence[float]) -> Strip:
    low, high = (float(end) for end in result["interval"])
    mean, sd = float(result["effect"]), float(result.get("sd", "0"))
    bound = test.margin + test.sigmas * sd + test.errors * sd / math.sqrt(len(differences))
    least, most = min(0.0, low, -bound, *differences), max(0.0, high, bound, *differences)
    if test.relation in (">", "<=", "short_of"):
        least = min(0.0, low, *differences)
    elif test.relation in ("<", ">="):
        most = max(0.0, high, *differences)
    scale = (_WIDTH - 2 * _MARGIN) / ((most - least) or 1.0)

    def at(value: float) -> float:
        return _MARGIN + (value - least) * scale

    # where the mean has to lie for the test to hold; its interval decides `covers` and `misses`, which get no zone
    outer = (0.0, _WIDTH)
    zones = {
        ">": [(at(bound), outer[1])],
        "short_of": [(at(bound), outer[1])],
        "<=": [(outer[0], at(bound))],
        "<": [(outer[0], at(-bound))],
        ">=": [(at(-bound), outer[1])],
        "within": [(at(-bound), at(bound))],
        "outside": [(outer[0], at(-bound)), (at(bound), outer[1])],
    }.get(test.relation, [])
    if zones and test.expect == "fails":  # the control holds where its test does not
        ends = [outer[0], *(end for zone in zones for end in zone), outer[1]]
        zones = [(a, b) for a, b in zip(ends[::2], ends[1::2], strict=True) if b > a]
    each = ", ".join(f"seed {seed} {value:+.4g}" for seed, value in zip(seeds, differences, strict=True))
    return Strip(
        seeds=tuple(_place(at(value)) for value in differences),
        mean=_place(at(mean)),
        interval=(_place(at(low)), _place(at(high))),
        zero=_place(at(0.0)),
        zones=tuple((_place(start), _place(max(end - start, 0.0))) for start, end in zones),
        label=f"Differences: {each}; mean {mean:+.4g}, 95% interval {low:+.4g} to {high:+.4g}",
    )


def _place(value: float) -> str:
    return f"{value:.1f}"
