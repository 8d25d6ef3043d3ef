"""Evidence to verdicts: a pure function of the plan and the measured values, with no torch and no clock.

- a claim's `passes` all hold: `replicated`; any of its `fails` holds: `not_replicated`; neither: `inconclusive`
- a control that does not come out as foretold, too few seeds, a scale that cannot decide, or an arm that is missing,
  incomplete or diverged: `inconclusive`, with the reason; a claim none of whose arms was in the plan: `not_tested`
- a group stands for the arm that its tuning metric chooses among all that did not diverge; one of them missing, for none
- every number is given as a decimal string of six significant digits
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from repro.config import decimal_string, decode
from repro.experiment import Claim, Group, Quantity, Test
from repro.stats import (
    FitError,
    GapClosure,
    Interval,
    Paired,
    bootstrap,
    gap_closure,
    nearer,
    optimum,
    paired,
    slope,
    vertex,
)

OUTCOME_SCHEMA = "repro.outcome/v1"
REPLICATED, NOT_REPLICATED, INCONCLUSIVE, NOT_TESTED = "replicated", "not_replicated", "inconclusive", "not_tested"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmEvidence:
    """What one arm gave with one seed: `complete` or `diverged`, its final weights' digest, its metrics' values."""

    status: str
    weights: str
    metrics: Mapping[str, str]


Evidence = Mapping[tuple[str, int], ArmEvidence]
"""Evidence by (arm id, seed)."""


class _LacksEvidenceError(Exception):
    """A test cannot be computed; the message says what is lacking."""


def judge(plan: Mapping[str, Any], evidence: Evidence) -> dict[str, Any]:
    """Outcome of a plan: `{"schema", "groups": {group: chosen arm}, "verdicts": [...]}`, the same for the same input.

    Args:
        plan: the contents of plan.json.
        evidence: by (arm id, seed); an absent key is an arm that was not run.
    """
    seeds = [int(seed) for seed in plan["seeds"]]
    groups = [decode(Group, group) for group in plan["groups"]]
    chosen: dict[str, str | None] = {}
    undecided: dict[str, str] = {}
    for group in groups:
        try:
            chosen[group.id] = _choose(group, seeds, evidence)
        except _LacksEvidenceError as error:
            chosen[group.id] = None
            undecided[group.id] = str(error)
    bench = _Bench(seeds=seeds, evidence=evidence, chosen=chosen, undecided=undecided)
    in_plan = {arm["id"] for arm in plan["arms"]} | set(chosen)
    verdicts = [_verdict(decode(Claim, claim), plan["scale"], bench, in_plan) for claim in plan["claims"]]
    verdicts += [
        {"claim": claim_id, "verdict": NOT_TESTED, "reason": "not asked for in this run", "tests": []}
        for claim_id in plan["claims_left_out"]
    ]
    return {
        "schema": OUTCOME_SCHEMA,
        "groups": {key: arm for key, arm in chosen.items() if arm},
        "verdicts": verdicts,
    }


def seed_values(
    quantity: Quantity, *, seeds: Sequence[int], evidence: Evidence, chosen: Mapping[str, str]
) -> list[float | None]:
    """Value of `quantity` with each seed, as the judge reads it; None where the evidence does not give one.

    `chosen` names the arm that stands for a group: the outcome's `groups`.
    """
    bench = _Bench(seeds=seeds, evidence=evidence, chosen=chosen)
    values: list[float | None] = []
    for seed in seeds:
        try:
            values.append(bench.value(quantity, seed))
        except _LacksEvidenceError:
            values.append(None)
    return values


def exit_code(outcome: Mapping[str, Any]) -> int:
    """0 where every judged claim replicated, 1 where one did not, 4 where one is inconclusive or nothing was judged."""
    verdicts = {item["verdict"] for item in outcome["verdicts"]} - {NOT_TESTED}
    if NOT_REPLICATED in verdicts:
        return 1
    return 0 if verdicts == {REPLICATED} else 4


def same_outcome(left: Any, right: Any) -> bool:
    """Whether two outcomes agree: all but the tests' numbers exactly, those to 1 part in 10,000.

    Special functions differ in their last digits between versions of scipy; a verdict must not hang on that.
    """
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(same_outcome(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(same_outcome(a, b) for a, b in zip(left, right, strict=True))
    if left != right and isinstance(left, str) and isinstance(right, str):
        try:
            return math.isclose(float(left), float(right), rel_tol=1e-4)
        except ValueError:
            return False
    return bool(left == right)


def _choose(group: Group, seeds: Sequence[int], evidence: Evidence) -> str:
    """Arm with the lowest mean of the tuning metric; a diverged one is no candidate.

    Raises `_LacksEvidenceError` where one is missing or incomplete: who drops a rival's best arm must not gain by it.
    """
    means = {}
    for arm in group.among:
        results = {seed: evidence.get((arm, seed)) for seed in seeds}
        if any(result and result.status == "diverged" for result in results.values()):
            continue
        total = []
        for seed, result in results.items():
            if result is None or result.status != "complete" or group.by not in result.metrics:
                what = "is missing" if result is None else f"{result.status}, without {group.by}"
                raise _LacksEvidenceError(
                    f"arm {arm} seed {seed} {what}; the group {group.id} chooses among all its arms"
                )
            total.append(float(result.metrics[group.by]))
        means[arm] = math.fsum(total) / len(seeds)
    if not means:
        raise _LacksEvidenceError(f"no arm of the group {group.id} is complete")
    return min(means, key=lambda arm: (means[arm], arm))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bench:
    seeds: Sequence[int]
    evidence: Evidence
    chosen: Mapping[str, str | None]
    undecided: Mapping[str, str] = field(default_factory=dict)

    def arm(self, name: str) -> str:
        arm = self.chosen.get(name, name)
        if arm is None:
            raise _LacksEvidenceError(self.undecided[name])
        return arm

    def result(self, name: str, seed: int) -> ArmEvidence:
        arm = self.arm(name)
        result = self.evidence.get((arm, seed))
        if result is None:
            raise _LacksEvidenceError(f"arm {arm} seed {seed} is missing")
        if result.status != "complete":
            raise _LacksEvidenceError(f"arm {arm} seed {seed} {result.status}")
        return result

    def values(self, quantity: Quantity) -> list[float]:
        return [self.value(quantity, seed) for seed in self.seeds]

    def value(self, quantity: Quantity, seed: int) -> float:
        if quantity.value is not None:
            value = quantity.value
        elif quantity.fit:
            value = self._fit(quantity, seed)
        else:
            names: Iterable[str] = quantity.least_of or (quantity.metric or "",)
            value = min(self._metric(quantity.arm, name, seed) for name in names)
        value *= quantity.times
        return value - self.value(quantity.minus, seed) if quantity.minus else value

    def _metric(self, arm: str, name: str, seed: int) -> float:
        metrics = self.result(arm, seed).metrics
        if name not in metrics:
            raise _LacksEvidenceError(f"arm {arm} seed {seed} has no {name}")
        return float(metrics[name])

    def _fit(self, quantity: Quantity, seed: int) -> float:
        y = []
        for arm in quantity.arms:
            result = self.evidence.get((self.arm(arm), seed))
            if quantity.fit == "vertex" and result is not None and result.status == "diverged":
                y.append(math.inf)
            else:
                y.append(self._metric(arm, quantity.metric or "", seed))
        try:
            if quantity.fit == "vertex":
                return vertex(quantity.x, y, reach=quantity.reach)
            if quantity.fit == "optimum":
                return optimum(quantity.x, y)
            return slope(quantity.x, y)
        except FitError as error:
            raise _LacksEvidenceError(f"{quantity}, seed {seed}: {error}") from error

    def test(self, test: Test) -> tuple[bool, Paired | GapClosure | Interval | None]:
        if test.relation == "identical":
            return self._identical(test.left.arm, test.right.arm), None
        if len(self.seeds) < 2:
            raise _LacksEvidenceError("a paired test needs at least 2 seeds")
        if test.base and test.relation == "closes":
            closure = gap_closure(self.values(test.base), self.values(test.left), self.values(test.right))
            if closure is None:
                raise _LacksEvidenceError(f"there is no gap to close between {test.base} and {test.right}")
            return (closure.eta if test.bound == "mean" else closure.low) >= test.at_least, closure
        right = self.values(test.right)
        if test.base:
            right = [b - test.at_least * (b - r) for b, r in zip(self.values(test.base), right, strict=True)]
        left = self.values(test.left)
        if test.relation == "nearer":
            interval = nearer(left, right)
            return interval.high < -test.margin, interval
        if test.relation in ("covers", "misses"):
            interval = bootstrap([a - b for a, b in zip(left, right, strict=True)])
            covers = interval.low <= test.margin and interval.high >= -test.margin
            return covers == (test.relation == "covers"), interval
        difference = paired(left, right)
        bound = test.margin + test.sigmas * difference.sd + test.errors * difference.sd / math.sqrt(difference.n)
        holds = {
            ">": difference.mean > bound,
            "short_of": difference.mean > bound,
            "<": difference.mean < -bound,
            "<=": difference.mean <= bound,
            ">=": difference.mean >= -bound,
            "within": abs(difference.mean) <= bound,
            "outside": abs(difference.mean) > bound,
        }[test.relation]
        return holds and (test.alpha is None or difference.p < test.alpha), difference

    def _identical(self, left: str, right: str) -> bool:
        for seed in self.seeds:
            a, b = self.result(left, seed), self.result(right, seed)
            common = {name for name in set(a.metrics) & set(b.metrics) if not name.startswith("time/")}
            if a.weights != b.weights or not common or any(a.metrics[name] != b.metrics[name] for name in common):
                return False
        return True


def _verdict(claim: Claim, scale: str, bench: _Bench, in_plan: set[str]) -> dict[str, Any]:
    verdict: dict[str, Any] = {"claim": claim.id, "scale": scale, "seeds": len(bench.seeds)}
    if not claim.arms & in_plan:
        return verdict | {"verdict": NOT_TESTED, "reason": "none of its arms is in the plan", "tests": []}
    tests: list[dict[str, Any]] = []
    holds: dict[str, list[bool]] = {"pass": [], "fail": [], "control": []}
    lacking: list[str] = []
    for role, group in (("pass", claim.passes), ("fail", claim.fails), ("control", claim.controls)):
        for test in group:
            try:
                result, difference = bench.test(test)
            except _LacksEvidenceError as error:
                lacking.append(str(error))
                tests.append({"role": role, "test": str(test), "result": "not_computed", "reason": str(error)})
                continue
            # `expect` is part of the test's text: a negative control comes out as foretold where its test fails
            result = result if test.expect == "holds" else not result
            holds[role].append(result)
            tests.append(
                {"role": role, "test": str(test), "result": "holds" if result else "fails", **_numbers(difference)}
            )
    return verdict | {**_decide(claim, scale, bench, holds, lacking), "tests": tests}


def _decide(
    claim: Claim, scale: str, bench: _Bench, holds: Mapping[str, list[bool]], lacking: Sequence[str]
) -> dict[str, str]:
    if scale not in claim.scales:
        return {"verdict": INCONCLUSIVE, "reason": f"the scale {scale} cannot decide this claim"}
    if len(bench.seeds) < claim.min_seeds:
        return {"verdict": INCONCLUSIVE, "reason": f"{len(bench.seeds)} seeds, at least {claim.min_seeds} are needed"}
    if lacking:
        return {"verdict": INCONCLUSIVE, "reason": lacking[0]}
    if not all(holds["control"]):
        return {"verdict": INCONCLUSIVE, "reason": "a control did not come out as foretold"}
    if all(holds["pass"]) and any(holds["fail"]):
        return {"verdict": INCONCLUSIVE, "reason": "the pass and the fail criterion both hold"}
    if all(holds["pass"]):
        return {"verdict": REPLICATED, "reason": "every pass criterion holds"}
    if any(holds["fail"]):
        return {"verdict": NOT_REPLICATED, "reason": "a fail criterion holds"}
    meaning = f": {claim.undecided}" if claim.undecided else ""
    return {"verdict": INCONCLUSIVE, "reason": f"neither the pass nor the fail criterion holds{meaning}"}


def _numbers(difference: Paired | GapClosure | Interval | None) -> dict[str, Any]:
    if difference is None:
        return {}
    if isinstance(difference, GapClosure | Interval):
        effect = difference.eta if isinstance(difference, GapClosure) else difference.mean
        return {
            "effect": _six(effect),
            "interval": [_six(difference.low), _six(difference.high)],
            "n": difference.n,
        }
    return {
        "effect": _six(difference.mean),
        "interval": [_six(difference.low), _six(difference.high)],
        "sd": _six(difference.sd),
        "p": _six(difference.p),
        "d_z": _six(difference.d_z) if math.isfinite(difference.d_z) else "infinite",
        "n": difference.n,
    }


def _six(value: float) -> str:
    return decimal_string(float(f"{value:.5e}"))
