"""The contest between this paper and EMO: are random new experts harmless (EMO's E5) or worse than not growing (U5)?

Every combination of random or copied experts, optimizer reset or kept, router biases reset or kept, softmax or sigmoid scores, a
shared expert or none, and half or a quarter of the budget left, at equal tokens. All have one constant learning rate up to the
transition, a re-warm-up after it, and one anneal at the end of the budget: EMO's schedule, whose first stage has no anneal, and
which lets arms that fork at either transition share what they have in common.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace

from papers.expert_upcycling.arms import Setting
from papers.expert_upcycling.recipes import RANDOM, UPCYCLING
from repro.experiment import Arm, Curve, Figure
from repro.model import ModelConfig
from repro.train import Segment

SCORES = ("sigmoid", "softmax")
SHARED = ("alone", "shared")
LEFT = {"50": 0.5, "25": 0.25}
OPTIMIZER = {"reset": "weights", "kept": "all"}
BIASES = {"zeroed": True, "carried": False}
EXPERTS = {"copy": UPCYCLING, "random": RANDOM}
FAMILIES = tuple(f"{score}-{shared}" for score, shared in itertools.product(SCORES, SHARED))
CONDITIONS = tuple(
    "-".join(parts) for parts in itertools.product(SCORES, SHARED, LEFT, OPTIMIZER, (f"bias{name}" for name in BIASES))
)
"""As in an arm's name, after `c-copy-` or `c-random-`."""


def arms(setting: Setting) -> Iterator[Arm]:
    """`c-fixed-e-…` and `c-fixed-me-…` of each family, `c-copy-…` and `c-random-…` under each condition."""
    for family in FAMILIES:
        small, large = _models(setting, family)
        for name, model in (("fixed-e", small), ("fixed-me", large)):
            trunk = _trunk(setting, model)
            yield setting.arm(f"c-{name}-{family}", f"{name}, {family}", [*trunk, _rest(setting, model, 0.25)])
    for condition in CONDITIONS:
        score, shared, left, optimizer, bias = condition.split("-")
        small, large = _models(setting, f"{score}-{shared}")
        trunk = _trunk(setting, small)
        for name, growth in EXPERTS.items():
            grown = replace(
                _rest(setting, large, LEFT[left]),
                inherit=OPTIMIZER[optimizer],  # type: ignore[arg-type]
                growth=replace(growth, reset_bias=BIASES[bias.removeprefix("bias")]),
            )
            grown = replace(grown, train=replace(grown.train, warmup=min(setting.rewarm, grown.train.steps)))
            before = trunk[:1] if left == "50" else trunk
            yield setting.arm(f"c-{name}-{condition}", f"{name}, {condition}", [*before, grown])


def _models(setting: Setting, family: str) -> tuple[ModelConfig, ModelConfig]:
    score, shared = family.split("-")
    width = setting.model.d_expert if shared == "shared" else 0
    small, large = (replace(model, score=score, d_shared=width) for model in setting.models())  # type: ignore[arg-type]
    return small, large


def _part(setting: Setting, share: float) -> int:
    every = setting.train.trace_every
    return round(share * setting.contest_steps / every) * every


def _trunk(setting: Setting, model: ModelConfig) -> list[Segment]:
    """The first three quarters at the constant rate, cut at the half."""
    half, late = _part(setting, 0.5), _part(setting, 0.75)
    train = replace(setting.train, steps=half, schedule="constant", decay=0.0)
    later = replace(train, steps=late - half, first_step=half, warmup=0)
    first = Segment(model=model, train=replace(train, warmup=min(half, train.warmup)), corpus=setting.corpus)
    return [first, Segment(model=model, train=later, corpus=setting.corpus, inherit="all")]


def _rest(setting: Setting, model: ModelConfig, share: float) -> Segment:
    """The last `share` of the steps, with the anneal of the whole budget at their end."""
    total = setting.contest_steps
    begin = _part(setting, 1 - share)
    train = replace(
        setting.train, steps=total - begin, first_step=begin, schedule="wsd", warmup=0,
        decay=setting.train.decay * total / (total - begin),
    )  # fmt: skip
    return Segment(model=model, train=train, corpus=setting.corpus, inherit="all")


def figures() -> Iterator[Figure]:
    """The table: what copied and random experts end above or below the model that did not grow, under each condition."""
    families = tuple("-".join(condition.split("-")[:2]) for condition in CONDITIONS)

    def cells(name: str, arms: tuple[str, ...]) -> Curve:
        return Curve(arm=name, arms=arms, metrics=("loss",) * len(arms))

    yield Figure(
        title="Loss above the model that did not grow, with copied and with random experts, under each condition",
        x_label="held-out loss − that of E experts throughout, nats/byte",
        y_label="scores, shared expert, budget left (%), optimizer, router biases",
        names=CONDITIONS,
        kind="cells",
        base=cells("E throughout", tuple(f"c-fixed-e-{family}" for family in families)),
        curves=(
            cells("copied experts", tuple(f"c-copy-{condition}" for condition in CONDITIONS)),
            cells("random experts", tuple(f"c-random-{condition}" for condition in CONDITIONS)),
            cells("mE throughout", tuple(f"c-fixed-me-{family}" for family in families)),
        ),
        suite="contest",
    )
