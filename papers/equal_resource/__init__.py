"""Mixture-of-Experts Can Surpass Dense LLMs Under Strictly Equal Resource (arXiv 2506.12119v2).

The paper holds three things equal between a dense model and an MoE: parameters N, training compute C and unique tokens. An
MoE runs a share r_a = N_a/N of its parameters a token, so the same C buys it about 1/r_a times the tokens; they are new text
(`unique`), or the dense model's own again (`strict`), or two epochs of half as many (`loose`). It says that the MoE then
wins, best at r_a ≈ 20% whatever the size.

Nothing of this is a new mechanism; the experiment is the accounting, which `solver.py` holds: every arm's shape and schedule
are solved for the same (N, C). The recipe is the paper's: first layer dense, the others MoE with a shared expert of width
K·De, softmax top-K gates that are not renormalised, Step Law's batch, cosine to 1e-5.

Arms: `dense`, `dense-2c` (twice the compute), `moe125` … `moe580` (r_a in thousandths, at one granularity), `strict`, `loose`
(`moe200` on repeated text), `coarse275` … `coarse580` (8 experts, as three of the paper's points), `interleaved`, `all-moe`,
and the same sweep at a quarter and half of C (`lean-`, `half-`) and at another N (`other-`). Controls: `frozen` (`moe200`
with a random router that never learns), `starved` (`moe200` on a 64th of the dense model's text), `dense-again` (`dense` with
other random draws). See README.md for deviations.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from papers.equal_resource.solver import (
    Backbone,
    Resource,
    Schedule,
    Shape,
    dense_shape,
    moe_shape,
    schedule,
    solve,
    step_law_batch,
    step_law_lr,
)
from records.errors import UsageError
from repro.data.batches import evaluation_windows
from repro.data.corpus import Bytes
from repro.evals.held_out import held_out_loss
from repro.experiment import Arm, Curve, Design, Figure, Group
from repro.model import ModelConfig, Transformer
from repro.train import Mechanism, Segment, TrainConfig

RATES = (0.125, 0.2, 0.275, 0.44, 0.58)  # the last three are those that the paper reached with 8 experts
BEST = 0.2
COARSE_EXPERTS = 8
RATE_TOLERANCE = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """One N: the dense model, and what its MoEs share.

    `dense` holds the search's settings (see `solver.dense_shape`), `ratio` the dense model's tokens a parameter, `d_expert`
    the granularity of the sweep.
    """

    parameters: int
    backbone: Backbone
    d_expert: int
    ratio: float
    dense: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a scale fixes. `learning_rates` by the beginning of `Plan.tuned`, the longest that fits; `head` is a head's width.

    With `law` = True they are multiples of Step Law's learning rate for each arm.
    """

    main: Size
    other: Size
    train: TrainConfig
    least_warmup: int
    warmup_share: float
    corpus: str
    seeds: int
    learning_rates: Mapping[str, tuple[float, ...]]
    eval_tokens: int
    head: int
    vocab: int = 256
    law: bool = False
    most_windows: int = 1 << 30


def _backbone(d_model: int, layers: int, d_dense: int) -> Backbone:
    return Backbone(d_model=d_model, num_layers=layers, d_dense=d_dense)


_BYTES = {"multiple": 8, "head": 8, "zeta": 16.0}
_TRAIN = TrainConfig(steps=1, batch=1, context=64, lr=1e-3, schedule="cosine", weight_decay=0.1, clip=1.0, balance=0.01)

SETTINGS = {
    "smoke": Setting(
        main=Size(parameters=76_500, backbone=_backbone(16, 3, 44), d_expert=8, ratio=0.1, dense=_BYTES),
        other=Size(parameters=47_500, backbone=_backbone(12, 3, 32), d_expert=6, ratio=0.1, dense=_BYTES | {"head": 4}),
        train=replace(_TRAIN, context=32, trace_every=5, hash_every=10, checkpoint_every=10),
        least_warmup=4, warmup_share=0.01, corpus="synthetic", seeds=2, head=4, eval_tokens=2_048,
        learning_rates={"": (0.01,)},
    ),
    "nano": Setting(
        main=Size(parameters=76_500, backbone=_backbone(16, 3, 44), d_expert=8, ratio=5.9, dense=_BYTES),
        other=Size(parameters=183_000, backbone=_backbone(24, 3, 66), d_expert=12, ratio=5.9, dense=_BYTES),
        train=_TRAIN,
        least_warmup=20, warmup_share=0.05, corpus="stdlib", seeds=3, head=8, eval_tokens=262_144,
        learning_rates={"dense": (0.008,), "moe": (0.024,)},
    ),
}  # fmt: skip


def mechanism(config: Mapping[str, Any]) -> Mechanism:
    """None: the routing is the model's own."""
    return Mechanism()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One arm before its learning rate: shape, schedule, what its text is, and what is broken about it.

    `tuned` is the name by which its learning rates are looked up.
    """

    shape: Shape
    spent: Schedule
    tuned: str
    unique: int = 0
    freeze: tuple[str, ...] = ()
    reseed: int = 0


@functools.cache
def shapes(scale: str) -> dict[str, Plan]:
    """Every arm of a scale by its name, solved.

    Raises:
        UsageError: an unknown scale, or an (N, C, r_a) that cannot be.
    """
    if scale not in SETTINGS:
        raise UsageError(f"equal-resource at scale {scale!r}: expected one of {', '.join(SETTINGS)}")
    setting = SETTINGS[scale]
    context = setting.train.context
    found: dict[str, Plan] = {}

    def spend(name: str, shape: Shape, compute: float, *, tuned: str) -> None:
        found[name] = Plan(shape=shape, spent=schedule(shape, compute, most=setting.most_windows), tuned=tuned)

    def sweep(prefix: str, size: Size, share: float) -> float:
        dense = dense_shape(size.parameters, context, **size.dense)
        compute = share * size.ratio * dense.parameters * dense.flops
        solved = solve(
            Resource(parameters=size.parameters, compute=compute), context, backbone=size.backbone, rates=RATES,
            d_experts=(size.d_expert,), rate_tolerance=RATE_TOLERANCE, most=setting.most_windows, **size.dense,
        )  # fmt: skip
        for rate, (shape, spent) in solved.items():
            name = "dense" if rate == 1 else f"moe{_thousandths(rate)}"
            found[f"{prefix}{name}"] = Plan(shape=shape, spent=spent, tuned=name)
        return compute

    compute = sweep("", setting.main, 1.0)
    dense, best = found["dense"], found[f"moe{_thousandths(BEST)}"]
    spend("dense-2c", dense.shape, 2 * compute, tuned="dense-2c")
    found["dense-again"] = replace(dense, reseed=1_000)
    found["frozen"] = replace(best, freeze=("router_ED",))
    window = context * 4  # a whole number of windows, whatever the batch
    found["strict"] = replace(best, unique=dense.spent.tokens // window * window)
    found["loose"] = replace(best, unique=best.spent.tokens // 2 // window * window)
    found["starved"] = replace(
        best, unique=max(dense.spent.tokens // 64, best.spent.batch * context) // context * context
    )
    for rate in RATES[2:]:
        spend(
            f"coarse{_thousandths(rate)}",
            _moe(setting.main, context, rate, coarse=True),
            compute,
            tuned=f"moe{_thousandths(rate)}",
        )
    layers = setting.main.backbone.num_layers
    for name, blocks in (("interleaved", tuple(range(0, layers, 2))), ("all-moe", ())):
        size = replace(setting.main, backbone=replace(setting.main.backbone, dense_blocks=blocks))
        spend(name, _moe(size, context, BEST), compute, tuned=best.tuned)
    sweep("half-", setting.main, 0.5)
    sweep("lean-", setting.main, 0.25)
    sweep("other-", setting.other, 1.0)
    return found


def _thousandths(rate: float) -> str:
    return f"{1000 * rate:03.0f}"


def _moe(size: Size, context: int, rate: float, *, coarse: bool = False) -> Shape:
    """The MoE of a size at `rate`; a `coarse` one has 8 experts, as wide as it takes."""
    step = max(1, size.d_expert // 8)
    widths = range(step, 4 * size.backbone.d_dense, step) if coarse else (size.d_expert,)
    return moe_shape(
        size.parameters, rate, context, backbone=size.backbone, d_experts=widths,
        experts=COARSE_EXPERTS if coarse else None, rate_tolerance=RATE_TOLERANCE,
    )  # fmt: skip


def design(scale: str) -> Design:
    """Arms, groups and figures at `scale`.

    Raises:
        UsageError: an unknown scale, or an (N, C, r_a) that cannot be.
    """
    setting = SETTINGS.get(scale)
    arms: list[Arm] = []
    groups: list[Group] = []
    for name, plan in shapes(scale).items():
        assert setting
        rates = _learning_rates(setting, plan)
        among = tuple(_arm(setting, name, plan, lr) for lr in rates)
        arms += among
        groups.append(Group(id=name, label=f"{name}: {plan.shape}", among=tuple(a.id for a in among), by="tuning/bpc"))
    assert setting
    return Design(seeds=setting.seeds, arms=tuple(arms), groups=tuple(groups), figures=_figures(scale))


def _learning_rates(setting: Setting, plan: Plan) -> tuple[float, ...]:
    key = max((key for key in setting.learning_rates if plan.tuned.startswith(key)), key=len)
    law = step_law_lr(plan.shape.parameters, plan.spent.tokens)
    return tuple(float(f"{rate * law:.3g}") if setting.law else rate for rate in setting.learning_rates[key])


def _arm(setting: Setting, name: str, plan: Plan, lr: float) -> Arm:
    shape, spent = plan.shape, plan.spent
    warmup = min(max(round(setting.warmup_share * spent.steps), setting.least_warmup), 2_000, spent.steps)
    train = replace(
        setting.train, steps=spent.steps, batch=spent.batch, lr=lr, warmup=warmup, final_lr=1e-5 / lr, unique=plan.unique,
        epochs=0 if plan.unique else 1,
    )  # fmt: skip
    model = ModelConfig(
        vocab_size=setting.vocab, d_model=shape.d_model, num_layers=shape.num_layers, num_heads=shape.d_model // setting.head,
        context=shape.context, d_expert=shape.d_expert or shape.d_dense, num_experts=shape.num_experts, top_k=shape.top_k,
        renormalize=False, d_shared=shape.top_k * shape.d_expert, dense_blocks=shape.dense_blocks if shape.num_experts else (),
        d_dense=shape.d_dense if shape.num_experts else 0,
    )  # fmt: skip
    law = {
        "lr": float(f"{step_law_lr(shape.parameters, spent.tokens):.4g}"),
        "batch_tokens": round(step_law_batch(spent.tokens)),
    }
    return Arm(
        id=f"{name}-lr{lr:g}",
        label=f"{name}: {shape}, {spent.tokens:,} tokens, learning rate {lr:g} (Step Law {law['lr']:.2g})",
        segments=(Segment(model=model, train=train, corpus=setting.corpus, freeze=plan.freeze, reseed=plan.reseed),),
        measure={"tokens": setting.eval_tokens, "step_law": law},
        measure_tokens=2 * setting.eval_tokens,
    )


def _figures(scale: str) -> tuple[Figure, ...]:
    plans = shapes(scale)
    names = [_thousandths(rate) for rate in RATES]
    best = f"moe{_thousandths(BEST)}"

    def sweep(prefix: str, label: str) -> Curve:
        return Curve(arm=label, arms=tuple(f"{prefix}moe{name}" for name in names), metrics=("bpc",) * len(names))

    def level(prefix: str) -> str:
        dense = plans[f"{prefix}dense"]
        return f"dense D/N = {dense.spent.tokens / dense.shape.parameters:.3g}"

    across: dict[str, Any] = {"x_label": "activation rate r_a, %", "y_label": "bits per character", "kind": "metrics"}
    x = tuple(100 * rate for rate in RATES)
    dense = Curve(arm="dense", metrics=("bpc",) * len(x))
    epochs = sorted(
        (round(plan.spent.tokens / plan.unique if plan.unique else 1.0, 2), name)
        for name in (best, "loose", "strict")
        for plan in (plans[name],)
    )
    return (
        Figure(title="Equal N and C: bits per character against the activation rate", x=x, fit=True,
               curves=(sweep("", "MoE"), dense), **across),
        Figure(title="The sweep at four, two and one times less compute", x=x, fit=True,
               curves=tuple(sweep(prefix, level(prefix)) for prefix in ("lean-", "half-", "")), **across),
        Figure(title="The sweep at two sizes", x=x, fit=True,
               curves=tuple(sweep(p, f"N = {plans[f'{p}dense'].shape.parameters:,}") for p in ("", "other-")), **across),
        Figure(title="One granularity against 8 experts", x=x[2:], curves=(
            replace(sweep("", "one granularity"), arms=tuple(f"moe{n}" for n in names[2:]), metrics=("bpc",) * 3),
            Curve(arm="8 experts", arms=tuple(f"coarse{n}" for n in names[2:]), metrics=("bpc",) * 3),
        ), **across),
        Figure(
            title=f"Reuse at r_a = {BEST:.0%}: bits per character against epochs over the unique tokens",
            x_label="epochs", y_label="bits per character", x=tuple(e for e, _ in epochs),
            curves=(
                Curve(arm="MoE on repeated text", arms=tuple(n for _, n in epochs), metrics=("bpc",) * 3),
                Curve(arm="dense", metrics=("bpc",) * 3),
            ),
        ),
    )  # fmt: skip


def measure(model: Transformer, config: Mapping[str, Any], held_out: Bytes) -> Iterator[tuple[str, float]]:
    """`tuning/bpc` on one half of the held-out windows; `bpb` and `bpc` on the other: bits a byte and a character.

    Text is UTF-8, where a character is a byte and the bytes 10xxxxxx that follow it. Learning rates are chosen on the
    first half, claims are judged on the second.
    """
    tokens_WS, targets_WS = evaluation_windows(held_out, tokens=2 * config["tokens"], context=model.config.context)
    for name, part in (("tuning/", slice(0, None, 2)), ("", slice(1, None, 2))):
        targets = targets_WS[part]
        bits = held_out_loss(model, tokens_WS[part], targets) / math.log(2)
        if not name:
            yield "bpb", bits
        yield f"{name}bpc", bits * targets.numel() / int(((targets & 0xC0) != 0x80).sum())
