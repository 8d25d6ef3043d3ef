"""What an experiment is made of, as data: claims with criteria fixed before the run, arms, groups of arms, figures.

- `Claim`: what the paper says, the tests that decide it, the control that must behave as foretold
- `Arm`: a sequence of training segments and what is measured at the end
- `Group`: arms that differ in a tuned setting only; the one with the lowest tuning metric stands for all
- `Design`: the arms, groups and figures of one paper at one scale
- `load_claims`: a paper's claims.toml, checked

No torch here: judging and `repro claims` work without it.
"""

import itertools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import repro
from records import canonical
from records.errors import MalformedError, UsageError
from repro.config import decode, encode

if TYPE_CHECKING:
    from repro.train import Segment

SCALES = ("smoke", "nano", "small", "base", "paper")
SLUGS = ("emo", "emoe", "mssp", "expert_upcycling", "equal_resource")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """A number a seed, multiplied by `times`, less `minus` if given. It is one of:

    `metric` of `arm` (an arm or a group), or the least of its `least_of`; a constant `value`; or a `fit` through `metric`
    of several `arms`, each at its `x` above 0, rising: `slope` is the least-squares slope of log2 metric against log2 x,
    `vertex` the log2 x at which a parabola in log2 x has its minimum, fitted to the lowest point and `reach` neighbours
    on each side, `optimum` the log2 x within the range of x at which a parabola through all points is lowest (an end of
    the range, where it has no minimum between). A diverged arm of a `vertex` counts as infinitely high. No fit is made
    where a slope's metric is not above 0, or a vertex's lowest point has no finite neighbour on a side.
    """

    arm: str = ""
    metric: str | None = None
    least_of: tuple[str, ...] = ()
    times: float = 1.0
    value: float | None = None
    fit: Literal["slope", "vertex", "optimum"] | None = None
    arms: tuple[str, ...] = ()
    x: tuple[float, ...] = ()
    reach: int = 1
    minus: "Quantity | None" = None

    def __post_init__(self) -> None:
        if self.value is not None:
            if self.arm or self.metric or self.least_of or self.fit or self.arms or self.x:
                raise ValueError(f"quantity of value {self.value:g}: expected neither arms nor metrics beside it")
        elif self.fit:
            if self.arm or not self.metric or self.least_of:
                raise ValueError(
                    f"{self.fit} of arms {self.arms}: expected arms, x and metric, and neither arm nor least_of"
                )
            least = 2 if self.fit == "slope" else 3
            if len(self.arms) < least or len(self.x) != len(self.arms) or self.reach < 1:
                raise ValueError(
                    f"{self.fit} of arms {self.arms}: expected at least {least}, an x for each, and reach ≥ 1"
                )
            if self.x[0] <= 0 or any(a >= b for a, b in itertools.pairwise(self.x)):
                raise ValueError(f"{self.fit} of arms {self.arms}: expected x above 0 and rising, found {self.x}")
        elif not self.arm or self.arms or self.x:
            raise ValueError(f"quantity of arm {self.arm!r}: expected an arm, a value, or a fit of arms")
        elif (self.metric is None) == (not self.least_of):
            raise ValueError(f"quantity of arm {self.arm!r}: expected either metric or least_of")

    @property
    def all_arms(self) -> set[str]:
        """Arms and groups that the quantity is made of."""
        return {name for name in (self.arm, *self.arms) if name} | (self.minus.all_arms if self.minus else set())

    def __str__(self) -> str:
        if self.value is not None:
            text = f"{self.value:g}"
        elif self.fit:
            text = f"{self.fit}({self.metric} over {self.arms[0]} … {self.arms[-1]})"
        elif self.metric:
            text = f"{self.arm} {self.metric}"
        else:
            text = f"{self.arm} min({self.least_of[0]} … {self.least_of[-1]})"
        if self.times != 1 and not self.least_of:
            text += f" × {self.times:g}"
        if self.minus and self.minus.value is not None and self.minus.value < 0:
            return f"({text} + {-self.minus.value:g})"
        return f"({text} − {self.minus})" if self.minus else text


@dataclass(frozen=True, slots=True, kw_only=True)
class Test:
    """A statement about the paired differences left − right over the seeds, with mean m and sample sd σ.

    With b = margin + sigmas·σ + errors·σ/√n over n seeds: `>` holds where m > b and, if `alpha` is given, the paired
    t-test has p < alpha; `<` where m < −b, likewise; `<=` where m ≤ b; `>=` where m ≥ −b; `within` where |m| ≤ b and
    `outside` where |m| > b.
    `covers` holds where the 95% bootstrap interval of m over seeds and [−margin, margin] have a point in common, `misses`
    where they have none. `nearer` holds where left is nearer to 0 than right: the 95% bootstrap interval, over seeds, of
    |mean left| − |mean right| lies below −margin.
    `identical` asks for equal final weights and equal values of every metric that both arms have, bit for bit.
    `closes` asks that left closes the gap from `base` to right: η = Σ(base − left) / Σ(base − right) ≥ `at_least`, or
    with `bound` = `lower` that the lower end of η's 95% bootstrap interval over seeds is; where the gap itself is not
    above 0 in every resample, there is nothing to close and the test cannot be computed.
    `short_of` asks, as `>` does, whether left is above the point at which that share `at_least` would be closed,
    base − at_least·(base − right), seed by seed; it needs no gap.
    In a control, `expect` says whether the test has to hold there or has to fail.
    """

    __test__ = False  # not a test class, whatever pytest makes of its name

    left: Quantity
    right: Quantity
    relation: Literal[
        ">", "<", "<=", ">=", "within", "outside", "covers", "misses", "nearer", "identical", "closes", "short_of"
    ]
    margin: float = 0.0
    sigmas: float = 0.0
    errors: float = 0.0
    alpha: float | None = None
    expect: Literal["holds", "fails"] = "holds"
    base: Quantity | None = None
    at_least: float = 0.0
    bound: Literal["mean", "lower"] = "mean"

    def __post_init__(self) -> None:
        if (self.base is None) != (self.relation not in ("closes", "short_of")):
            raise ValueError(
                f"relation {self.relation!r}: `closes` and `short_of` need a base, and nothing else has one"
            )
        if self.alpha is not None and self.relation not in ("<", ">", "short_of"):
            raise ValueError(f"relation {self.relation!r} has no significance level: leave alpha out")
        if (self.sigmas or self.errors) and self.relation in ("covers", "misses", "nearer"):
            raise ValueError(f"relation {self.relation!r} has an interval of its own: leave sigmas and errors out")
        if self.relation == "identical" and not (self.left.arm and self.right.arm):
            raise ValueError("relation 'identical': expected an arm on each side")

    def __str__(self) -> str:
        if self.relation == "identical":
            text = f"{self.left.arm} is bitwise {self.right.arm}"
        elif self.relation == "closes":
            eta = "η" if self.bound == "mean" else "lower 95% bound of η"
            text = f"{eta} of {self.left} from {self.base} to {self.right} ≥ {self.at_least:g}"
        elif self.relation in ("covers", "misses"):
            around = f" ± {self.margin:g}" if self.margin else ""
            text = f"95% interval of {self.left} {self.relation} {self.right}{around}"
        elif self.relation == "nearer":
            extra = f" − {self.margin:g}" if self.margin else ""
            text = f"|{self.left}| < |{self.right}|{extra} in the 95% interval"
        else:
            sign = {"<": "−", ">=": "−", "within": "±", "outside": "±"}.get(self.relation, "+")
            extra = f" {sign} {self.margin:g}" if self.margin else ""
            extra += f" {sign} {self.sigmas:g}σ" if self.sigmas else ""
            extra += f" {sign} {self.errors:g}SE" if self.errors else ""
            text = f"{self.left} {self.relation} {self.right}{extra}"
            if self.relation == "short_of":
                point = f"where {self.at_least:g} of the gap from {self.base} to {self.right} is closed"
                text = f"{self.left} > {point}{extra}"
            text += f", p < {self.alpha:g}" if self.alpha is not None else ""
        return text if self.expect == "holds" else f"not ({text})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One claim of a paper. `passes`: all must hold for `replicated`; `fails`: any one gives `not_replicated`.

    `controls`: all must come out as expected, else the verdict is `inconclusive` whatever the tests say.
    `only_named`: scales at which a run leaves the claim out unless `--claims` names it, or the `suite` it belongs to.
    `undecided`: what it means where neither passes nor fails hold, which the verdict's reason then adds.
    """

    id: str
    title: str
    statement: str
    source: str
    metric: str
    scales: tuple[str, ...]
    min_seeds: int
    passes: tuple[Test, ...]
    fails: tuple[Test, ...]
    controls: tuple[Test, ...]
    note: str = ""
    only_named: tuple[str, ...] = ()
    suite: str | None = None
    undecided: str = ""

    def __post_init__(self) -> None:
        if set(self.only_named) - set(SCALES):
            raise ValueError(f"claim {self.id}: only_named holds some of {SCALES}, found {self.only_named}")
        unknown = set(self.scales) - set(SCALES)
        if unknown or "smoke" in self.scales:
            raise ValueError(f"claim {self.id}: scales are some of {SCALES[1:]}, found {self.scales}")
        if not (self.passes and self.fails and self.controls):
            raise ValueError(f"claim {self.id}: expected at least one test each in passes, fails and controls")
        if self.min_seeds < 2:
            raise ValueError(f"claim {self.id}: a paired test needs at least 2 seeds, found min_seeds {self.min_seeds}")

    @property
    def arms(self) -> set[str]:
        """Arms and groups that the claim's tests speak of."""
        tests = (*self.passes, *self.fails, *self.controls)
        quantities = (quantity for test in tests for quantity in (test.left, test.right, test.base) if quantity)
        return set().union(*(quantity.all_arms for quantity in quantities))


@dataclass(frozen=True, slots=True, kw_only=True)
class Deviation:
    """Where the experiment here differs from the paper's, or the paper leaves a choice open."""

    what: str
    paper: str
    here: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperInfo:
    """A paper's identity; `arxiv` with its version (2509.21892v2), `pith_number` in full or None where not known."""

    slug: str
    title: str
    arxiv: str
    pith_number: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """The contents of a claims.toml."""

    paper: PaperInfo
    claim: tuple[Claim, ...]
    deviation: tuple[Deviation, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """Segments trained one after the other, and what is measured on the last one's model.

    `measure` is data for the paper's `measure` function, which runs about `measure_tokens` tokens forward. Arms that
    share their first segments share their training.
    """

    id: str
    label: str
    segments: tuple["Segment", ...]
    measure: Mapping[str, Any] = field(default_factory=dict)
    measure_tokens: int = 0

    def __post_init__(self) -> None:
        for before, after in itertools.pairwise(self.segments):
            if after.model.num_experts < before.model.num_experts:
                raise ValueError(
                    f"arm {self.id}: a pool of {before.model.num_experts} experts cannot shrink to "
                    f"{after.model.num_experts}; expected each segment to have as many as the one before, or more"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Arms among which one is chosen by the lowest mean over seeds of `by`, a metric that no claim is judged on."""

    id: str
    label: str
    among: tuple[str, ...]
    by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A line of a figure: `arm` (or group) through `metrics`, one for each of the figure's x values.

    With `arms`, each x value has its own arm instead, and `arm` only names the line.
    """

    arm: str
    metrics: tuple[str, ...] = ()
    arms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A figure: every seed, the mean, and its 95% interval.

    `metrics` draws the curves' metrics against `x`; `closure` the share of the gap from `base` to `target` that they close,
    η, likewise (base and target have a metric, and perhaps an arm, for each x value too). With `fit`, `metrics` adds to each
    curve of several arms the parabola in log x and where it is lowest (`optimum`), with their intervals; with `reach`, where
    the parabola through its lowest point and so many neighbours a side is (`vertex`), with its interval alone. `cells` draws
    a row for each of `names`: how far the curves' metrics lie above the base's, each curve having a metric and an arm for
    each row.
    `training` draws the traced loss of the curves' arms against tokens, `time` against measured seconds, `probe` the
    probed measure that a curve's one metric names (a list's mean) against tokens: a line each seed, with a mark wherever
    the pool grew or another part of the training began. `load` draws what the probes say of each expert's load, a map
    for each curve's arm, seed and layer.
    `log` makes the x axis, or both, logarithmic; then a diverged arm of `metrics` leaves a gap and a mark at the top.
    A figure of a `suite` needs all its arms run where all claims of that suite are asked for, and none otherwise.
    """

    title: str
    x_label: str
    y_label: str
    x: tuple[float, ...] = ()
    curves: tuple[Curve, ...]
    kind: Literal["metrics", "closure", "cells", "training", "time", "probe", "load"] = "metrics"
    base: Curve | None = None
    target: Curve | None = None
    fit: bool = False
    reach: int = 0
    names: tuple[str, ...] = ()
    suite: str | None = None
    log: Literal["", "x", "xy"] = ""

    def __post_init__(self) -> None:
        if self.fit and (self.kind != "metrics" or len(self.x) < 3 or min(self.x) <= 0):
            raise ValueError(f"figure {self.title!r}: a fit needs metrics over at least 3 x values, all above 0")
        if self.reach and (self.fit or self.kind != "metrics" or len(self.x) < 3 or min(self.x) <= 0 or self.reach < 0):
            raise ValueError(
                f"figure {self.title!r}: a reach needs metrics over at least 3 x values, all above 0, and no fit beside it"
            )
        if (self.kind == "closure") != (self.target is not None) or (self.kind in ("closure", "cells")) != (
            self.base is not None
        ):
            raise ValueError(
                f"figure {self.title!r}: `closure` needs a base and a target, `cells` a base, and nothing else has them"
            )
        if (self.kind == "cells") != bool(self.names):
            raise ValueError(f"figure {self.title!r}: `cells` needs names, and nothing else has them")
        for curve in filter(None, (*self.curves, self.base, self.target)):
            if self.over_x and not len(curve.metrics) == len(self.x) == len(curve.arms or self.x):
                raise ValueError(f"figure {self.title!r}: expected a metric for each of {len(self.x)} x values")
            if self.kind == "cells" and not len(curve.metrics) == len(self.names) == len(curve.arms):
                raise ValueError(
                    f"figure {self.title!r}: expected a metric and an arm for each of {len(self.names)} names"
                )
            if self.kind == "probe" and len(curve.metrics) != 1:
                raise ValueError(
                    f"figure {self.title!r}: expected the name of one probed measure as the curve's metrics"
                )

    @property
    def over_x(self) -> bool:
        """Whether the figure has x values of its own, not tokens or seconds."""
        return self.kind in ("metrics", "closure")

    @property
    def arms(self) -> set[str]:
        """Arms and groups that the figure draws."""
        return {
            arm for curve in filter(None, (*self.curves, self.base, self.target)) for arm in curve.arms or (curve.arm,)
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """All arms of a paper at one scale; `seeds` is the default count, and the first of them is `first_seed`.

    A first seed above 0 keeps a new plan's seeds apart from those of a run that is published already. `warnings` are lines
    that whoever plans or reads the run must see, such as a law that is asked outside its fitted range.
    """

    seeds: int
    first_seed: int = 0
    arms: tuple[Arm, ...]
    groups: tuple[Group, ...] = ()
    figures: tuple[Figure, ...] = ()
    warnings: tuple[str, ...] = ()


def segment_digest(segment: Any, *, seed: int, corpus_sha256: str, parent: str | None) -> str:
    """Identity of a segment's result: SHA-256 over its config, the seed, the corpus' digest and the segment before it.

    Args:
        segment: a `repro.train.Segment`, or what `encode` made of one.
    """
    return canonical.digest(
        {
            "schema": "repro.segment/v1",
            "segment": encode(segment),
            "seed": seed,
            "corpus_sha256": corpus_sha256,
            "parent": parent,
        }
    )


def slug_of(name: str) -> str:
    """Slug of a paper given with `-` or `_`, in any case.

    Raises:
        UsageError: no such paper.
    """
    slug = name.lower().replace("-", "_")
    if slug not in SLUGS:
        raise UsageError(f"unknown paper {name!r}: expected one of {', '.join(s.replace('_', '-') for s in SLUGS)}")
    return slug


def load_claims(name: str) -> Claims:
    """Claims of the paper `name`.

    Raises:
        UsageError: no such paper.
        MalformedError: its claims.toml breaks a rule, named in the message.
    """
    slug = slug_of(name)
    path = Path(repro.__file__).parents[1] / "papers" / slug / "claims.toml"
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise MalformedError(f"papers/{slug}/claims.toml: {error}") from error
    claims = decode(Claims, encode(data), where=f"papers/{slug}/claims.toml")
    if len({claim.id for claim in claims.claim}) < len(claims.claim):
        raise MalformedError(f"papers/{slug}/claims.toml: two claims with the same id")
    names = {claim.id.lower() for claim in claims.claim} | {"all"}
    if clash := sorted({claim.suite for claim in claims.claim if claim.suite and claim.suite.lower() in names}):
        raise MalformedError(f"papers/{slug}/claims.toml: a suite and a claim (or `all`) are called {clash[0]!r}")
    return claims


def select_claims(claims: Claims, names: str | None, scale: str) -> tuple[Claim, ...]:
    """Claims whose id or suite is among the comma-separated `names` (any case; `all` for all of them).

    Without names, those that a run at `scale` is not to leave out.

    Raises:
        UsageError: a name that the paper does not have, or nothing left at this scale.
    """
    suites = {claim.suite.lower(): claim.suite for claim in claims.claim if claim.suite}
    known = [claim.id for claim in claims.claim] + sorted(suites.values()) + ["all"]
    if names is None:
        selected = tuple(claim for claim in claims.claim if scale not in claim.only_named)
        if not selected:
            raise UsageError(
                f"no claim is judged at {scale} unless named: expected --claims with some of {', '.join(known)}"
            )
        return selected
    asked = {part.strip().lower(): part.strip() for part in names.split(",") if part.strip()}
    wanted = set(asked)
    unknown = sorted(asked[name] for name in wanted - {name.lower() for name in known})
    if unknown or not wanted:
        raise UsageError(f"unknown claim {', '.join(unknown) or names!r}: expected some of {', '.join(known)}")
    if "all" in wanted:
        return claims.claim
    return tuple(claim for claim in claims.claim if {claim.id.lower(), (claim.suite or claim.id).lower()} & wanted)
