"""Equal resource: shapes that have the same parameters N, and the tokens that give them the same compute C.

With Dm the model's width, L layers of which L_d are dense and L_e MoE, S the context, and widths Dffn of a dense layer, De of
an expert, Dse = K·De of the shared one (arXiv 2506.12119, section 3):

    N   = (4 + 3μ)·Dm²·L_e + (4 + 3α)·Dm²·L_d      μ = (Dse + E·De)/Dm    α = Dffn/Dm
    N_a = the same with β = (Dse + K·De)/Dm for μ   M = 6·N_a + 12·Dm·S·L FLOPs a token     C = M·D

The paper's printed activation rates come out to the digit (19.94% and 20.07%) when the router's E·Dm weights a layer are
counted in both N_a and N, which its formulas leave out. At nano they are 2% of all: `parameters`, `active` and `flops`
count them, `paper_parameters` does not.

- `Shape`: an architecture and its accounting
- `dense_shape`, `moe_shape`: the nearest shape for N (and an activation rate)
- `Schedule`, `schedule`: batch and steps that spend C on a shape
- `Resource`, `solve`: all of them for one (N, C, unique tokens)
- `step_law_lr`, `step_law_batch`: arXiv 2503.04715
- `repeated`: what repeated tokens are worth (arXiv 2305.16264)
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from records.errors import UsageError

TOLERANCE = 0.01  # of N and C, relative
ALPHA, ZETA, MU = 2.77, 88.0, 22.0  # the paper's Dffn/Dm, Dm/L and (Dse + E·De)/Dm


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """An architecture; `num_experts` = 0 is a dense model, whose layers all have the width `d_dense`.

    In an MoE the layers that `dense_blocks` lists are dense.
    """

    d_model: int
    num_layers: int
    context: int
    d_dense: int
    dense_blocks: tuple[int, ...] = ()
    num_experts: int = 0
    top_k: int = 0
    d_expert: int = 0

    @property
    def moe_layers(self) -> int:
        """L_e, the number of layers that hold an MoE."""
        return self.num_layers - len(self.dense_blocks) if self.num_experts else 0

    def _matrices(self, experts: int) -> int:
        dense = self.num_layers - self.moe_layers
        width = dense * self.d_dense + self.moe_layers * (self.top_k + experts) * self.d_expert
        return self.d_model * (4 * self.d_model * self.num_layers + 3 * width)

    @property
    def router(self) -> int:
        """Weights of all routers."""
        return self.num_experts * self.d_model * self.moe_layers

    @property
    def paper_parameters(self) -> int:
        """N by the paper's formula: attention, feed-forwards and experts."""
        return self._matrices(self.num_experts)

    @property
    def parameters(self) -> int:
        """N with the routers: every matrix but embedding and readout."""
        return self._matrices(self.num_experts) + self.router

    @property
    def active(self) -> int:
        """N_a, likewise."""
        return self._matrices(self.top_k) + self.router

    @property
    def rate(self) -> float:
        """Activation rate r_a = N_a/N."""
        return self.active / self.parameters

    @property
    def flops(self) -> int:
        """M, training FLOPs a token."""
        return 6 * self.active + 12 * self.d_model * self.context * self.num_layers

    def __str__(self) -> str:
        text = f"L {self.num_layers}, Dm {self.d_model}, Dffn {self.d_dense}"
        if self.num_experts:
            text += f", E {self.num_experts}, K {self.top_k}, De {self.d_expert}"
        return f"{text}: N {self.parameters:,}, r_a {self.rate:.2%}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone:
    """What all MoE shapes of a sweep share."""

    d_model: int
    num_layers: int
    d_dense: int
    dense_blocks: tuple[int, ...] = (0,)

    def shape(self, context: int, *, experts: int = 0, top_k: int = 0, d_expert: int = 0) -> Shape:
        """The backbone with experts in it."""
        return Shape(
            d_model=self.d_model, num_layers=self.num_layers, context=context, d_dense=self.d_dense,
            dense_blocks=self.dense_blocks, num_experts=experts, top_k=top_k, d_expert=d_expert,
        )  # fmt: skip


def dense_shape(
    parameters: int, context: int, *, alpha: float = ALPHA, zeta: float = ZETA, multiple: int = 8, head: int = 128
) -> Shape:
    """The dense shape of N within 1% whose α and ζ are nearest to those given.

    Args:
        multiple: of which Dffn is one.
        head: of which Dm is one.

    Raises:
        UsageError: no such shape; says which N is the nearest possible.
    """

    def candidates() -> Iterator[Shape]:
        centre = (parameters * zeta / (4 + 3 * alpha)) ** (1 / 3)
        for d_model in range(head, int(2 * centre) + 2 * head, head):
            for layers in range(1, int(2 * d_model / zeta) + 3):
                room = parameters / (d_model * layers) - 4 * d_model
                d_dense = max(1, round(room / 3 / multiple)) * multiple
                yield Shape(d_model=d_model, num_layers=layers, context=context, d_dense=d_dense)

    def distance(shape: Shape) -> float:
        return math.hypot(
            math.log(shape.d_dense / shape.d_model / alpha), math.log(shape.d_model / shape.num_layers / zeta)
        )

    found = list(candidates())
    fitting = [shape for shape in found if _off(shape.parameters, parameters) <= TOLERANCE and distance(shape) < 1]
    if not fitting:
        nearest = min(found, key=lambda shape: (_off(shape.parameters, parameters), distance(shape)))
        raise UsageError(
            f"dense model: expected N = {parameters:,} within 1% with Dm a multiple of {head} and Dffn of {multiple}, "
            f"found none; the nearest possible is {nearest}"
        )
    return min(fitting, key=distance)


def moe_shape(
    parameters: int,
    rate: float,
    context: int,
    *,
    backbone: Backbone,
    d_experts: Iterable[int],
    experts: int | None = None,
    rate_tolerance: float = TOLERANCE,
) -> Shape:
    """The MoE on `backbone` with N within 1% whose activation rate is nearest to `rate`, and within `rate_tolerance` of it.

    Args:
        d_experts: expert widths to choose from; one alone fixes the granularity.
        experts: the number of experts, where it is given too.

    Raises:
        UsageError: no such MoE; says which is the nearest possible.
    """

    def off(shape: Shape) -> float:
        return abs(math.log(shape.rate / rate))

    if not 0 < rate < 1:
        raise UsageError(f"activation rate: expected above 0 and below 1, found {rate:g}")
    widths = tuple(d_experts)
    found = [shape for width in widths for shape in _moes(parameters, context, backbone, width, experts)]
    if not found:
        least = backbone.shape(context, experts=experts or 2, top_k=1, d_expert=min(widths))
        raise UsageError(
            f"MoE: expected N = {parameters:,} within 1% and r_a = {rate:.2%} on L {backbone.num_layers}, Dm "
            f"{backbone.d_model}, Dffn {backbone.d_dense}, found no number of experts that gives this N; the smallest "
            f"possible is {least}"
        )
    best = min(found, key=lambda shape: (round(off(shape), 4), _off(shape.parameters, parameters), shape.top_k))
    if off(best) > rate_tolerance:
        raise UsageError(
            f"MoE: expected N = {parameters:,} within 1% and r_a = {rate:.2%} within {rate_tolerance:.0%}, found none with "
            f"De of {', '.join(map(str, widths))}; the nearest possible is {best}"
        )
    return best


def _moes(parameters: int, context: int, backbone: Backbone, width: int, experts: int | None) -> Iterator[Shape]:
    """MoEs with experts of `width` and N within 1%: for each K as many experts as bring N nearest."""
    top_k = 0
    while True:
        top_k += 1
        empty = backbone.shape(context, experts=top_k, top_k=top_k, d_expert=width)
        an_expert = empty.moe_layers * empty.d_model * (3 * width + 1)
        count = experts or top_k + round((parameters - empty.parameters) / an_expert)
        if count < top_k or (experts is None and count <= top_k and top_k > 1):
            return
        shape = backbone.shape(context, experts=count, top_k=top_k, d_expert=width)
        if _off(shape.parameters, parameters) <= TOLERANCE and count > top_k:
            yield shape
        if experts is not None and shape.parameters > (1 + TOLERANCE) * parameters:
            return


def _off(found: float, wanted: float) -> float:
    return abs(found / wanted - 1)


def step_law_lr(parameters: int, tokens: float) -> float:
    """Step Law's peak learning rate, η = 1.79·N^−.713·D^.307."""
    return float(1.79 * parameters**-0.713 * tokens**0.307)


def step_law_batch(tokens: float) -> float:
    """Step Law's batch in tokens, .58·D^.571."""
    return float(0.58 * tokens**0.571)


def repeated(tokens: float, unique: float, *, half_life: float = 15.387756) -> float:
    """Unique tokens that `tokens` tokens out of `unique` are worth: D' = U + U·R*·(1 − e^(−R/R*)), R = D/U − 1."""
    repeats = max(0.0, tokens / unique - 1)
    return min(tokens, unique) + unique * half_life * -math.expm1(-repeats / half_life)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How a shape spends its compute: `steps` of `batch` windows of `context` tokens."""

    steps: int
    batch: int
    context: int

    @property
    def tokens(self) -> int:
        """D, the tokens trained on."""
        return self.steps * self.batch * self.context


def schedule(shape: Shape, compute: float, *, most: int = 1 << 30) -> Schedule:
    """The schedule that spends `compute` FLOPs within 1% on `shape`, with Step Law's batch.

    Args:
        most: windows that a batch holds at the most.

    Raises:
        UsageError: C is too small to be met by whole steps; says what comes nearest.
    """
    tokens, window = compute / shape.flops, shape.context
    wanted = min(most, max(1, round(step_law_batch(tokens) / window)))

    def spent(batch: int) -> Schedule:
        return Schedule(steps=max(1, round(tokens / (batch * window))), batch=batch, context=window)

    # Few steps of a large batch may miss C: take the batch nearest to Step Law's that does not.
    near = sorted(range(max(1, wanted * 3 // 4), min(most, wanted * 5 // 4) + 1), key=lambda batch: abs(batch - wanted))
    found = next((s for s in map(spent, near) if _off(s.tokens, tokens) <= TOLERANCE), spent(wanted))
    if _off(found.tokens, tokens) > TOLERANCE:
        raise UsageError(
            f"compute: expected C = {compute:.4g} FLOPs within 1% for {shape}, found that {found.steps} steps of {found.batch} "
            f"windows of {window} tokens come nearest, with C = {found.tokens * shape.flops:.4g}; raise C"
        )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """What is held equal: parameters N, compute C in FLOPs, and unique tokens (0: no bound)."""

    parameters: int
    compute: float
    unique: int = 0


def solve(
    resource: Resource,
    context: int,
    *,
    backbone: Backbone,
    d_experts: Iterable[int],
    rates: Iterable[float],
    rate_tolerance: float = TOLERANCE,
    epochs: float = math.inf,
    most: int = 1 << 30,
    alpha: float = ALPHA,
    zeta: float = ZETA,
    multiple: int = 8,
    head: int = 128,
) -> dict[float, tuple[Shape, Schedule]]:
    """Shapes and schedules of equal resource: the dense model at rate 1, and an MoE at each of `rates`.

    Args:
        epochs: how often a unique token may be seen.
        most: windows that a batch holds at the most.

    Raises:
        UsageError: an (N, C, r_a) that cannot be, with the nearest that can; or too few unique tokens, with the epochs
            that it would take.
    """
    widths = tuple(d_experts)
    shapes = {1.0: dense_shape(resource.parameters, context, alpha=alpha, zeta=zeta, multiple=multiple, head=head)}
    for rate in rates:
        shapes[rate] = moe_shape(
            resource.parameters, rate, context, backbone=backbone, d_experts=widths, rate_tolerance=rate_tolerance
        )
    found = {rate: (shape, schedule(shape, resource.compute, most=most)) for rate, shape in shapes.items()}
    for shape, spent in found.values():
        if resource.unique and spent.tokens > epochs * resource.unique:
            raise UsageError(
                f"unique tokens: expected {spent.tokens / epochs:,.0f} for {shape} at C = {resource.compute:.4g} with at most "
                f"{epochs:g} epochs, found {resource.unique:,}: it would take {spent.tokens / resource.unique:.2f} epochs"
            )
    return found
