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
the same sweep at a quarter and half of C (`lean-`, `half-`) and at another N (`other-`), and the first comparison
at several times C (`rich-`). Controls: `frozen` (`moe200`
with a random router that never learns), `starved` (`moe200` on a 64th of the dense model's text), `dense-again` (`dense` with
other random draws). See README.md for deviations.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from papers.equal_resource.settings import SETTINGS, Setting, Size
from papers.equal_resource.solver import (
    Backbone,
    Resource,
    Schedule,
    Shape,
    moe_shape,
    repeated,
    schedule,
    solve,
    step_law_batch,
    step_law_lr,
)
from records.errors import UsageError
from repro.data import corpus
from repro.data.batches import evaluation_windows
from repro.data.corpus import Bytes
from repro.evals.held_out import held_out_loss
from repro.experiment import Arm, Curve, Design, Figure, Group
from repro.model import ModelConfig, Transformer
from repro.train import Mechanism, Segment

RATES = (0.125, 0.2, 0.275, 0.44, 0.58)  # the last three are those that the paper reached with 8 experts
BEST = 0.2
COARSE_EXPERTS = 8
SHARES = {"": 1.0, "half-": 0.5, "lean-": 0.25}  # of the compute, by the beginning of an arm's name


def mechanism(config: Mapping[str, Any]) -> Mechanism:
    """None: the routing is the model's own."""
    return Mechanism()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One arm before its learning rate: shape, schedule, what its text is, and what is broken about it."""

    shape: Shape
    spent: Schedule
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

    def spend(name: str, shape: Shape, compute: float) -> None:
        found[name] = Plan(shape=shape, spent=schedule(shape, compute))

    def sweep(prefix: str, size: Size, compute: float) -> None:
        solved = solve(
            Resource(parameters=size.parameters, compute=compute), context, backbone=size.backbone, rates=RATES,
            d_experts=(size.d_expert,), rate_tolerance=setting.rate_tolerance, **size.dense,
        )  # fmt: skip
        for rate, (shape, spent) in solved.items():
            if rate < 1:
                found[f"{prefix}{_moe(rate)}"] = Plan(shape=shape, spent=spent)
            elif not prefix:
                found["dense"] = Plan(shape=shape, spent=spent)

    def moe(rate: float, backbone: Backbone, **more: Any) -> Shape:
        more = {"d_experts": (setting.main.d_expert,)} | more
        tolerance = setting.rate_tolerance
        return moe_shape(setting.main.parameters, rate, context, backbone=backbone, rate_tolerance=tolerance, **more)

    main, backbone = setting.main, setting.main.backbone
    for prefix, share in SHARES.items():
        sweep(prefix, main, share * main.compute)
    sweep("other-", setting.other, setting.other.compute)
    dense, best = found["dense"], found[_moe(BEST)]
    spend("dense-2c", dense.shape, 2 * main.compute)
    spend("rich-dense", dense.shape, setting.rich * main.compute)
    spend(f"rich-{_moe(BEST)}", best.shape, setting.rich * main.compute)
    found["rich-frozen"] = replace(found[f"rich-{_moe(BEST)}"], freeze=("router_ED",))
    found["dense-again"] = replace(dense, reseed=1_000)
    found["frozen"] = replace(best, freeze=("router_ED",))
    for name, tokens in (
        ("strict", dense.spent.tokens),
        ("loose", best.spent.tokens // 2),
        ("starved", max(dense.spent.tokens // 64, best.spent.batch * context)),
    ):
        found[name] = replace(best, unique=tokens // context * context)
    step = max(1, main.d_expert // 8)
    for rate in RATES[2:]:
        shape = moe(rate, backbone, d_experts=range(step, 4 * backbone.d_dense, step), experts=COARSE_EXPERTS)
        spend(f"coarse{_thousandths(rate)}", shape, main.compute)
    for name, blocks in (("interleaved", tuple(range(0, backbone.num_layers, 2))), ("all-moe", ())):
        spend(name, moe(BEST, replace(backbone, dense_blocks=blocks)), main.compute)
    return found


def _thousandths(rate: float) -> str:
    return f"{1000 * rate:03.0f}"


def _moe(rate: float) -> str:
    return f"moe{_thousandths(rate)}"


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
    return Design(
        seeds=setting.seeds,
        first_seed=setting.first_seed,
        arms=tuple(arms),
        groups=tuple(groups),
        figures=_figures(scale),
    )


def _learning_rates(setting: Setting, plan: Plan) -> tuple[float, ...]:
    law = step_law_lr(plan.shape.parameters, plan.spent.tokens)
    return tuple(float(f"{rate * law:.3g}") if setting.law else rate for rate in setting.learning_rates)


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
    text = f"{spent.tokens:,} tokens"
    if plan.unique:
        text += f" in {_epochs(plan):.2f} epochs (worth {repeated(spent.tokens, plan.unique):,.0f} new ones: arXiv 2305.16264)"
    return Arm(
        id=f"{name}-lr{lr:g}",
        label=f"{name}: {shape}, {text}, learning rate {lr:g} (Step Law {law['lr']:.2g})",
        segments=(Segment(model=model, train=train, corpus=setting.corpus, freeze=plan.freeze, reseed=plan.reseed),),
        measure={"tokens": setting.eval_tokens, "corpus": setting.corpus, "step_law": law},
        measure_tokens=2 * setting.eval_tokens,
    )


def _figures(scale: str) -> tuple[Figure, ...]:
    plans = shapes(scale)

    def line(label: str, arms: Iterable[str]) -> Curve:
        names = tuple(arms)
        return Curve(arm=label, arms=names, metrics=("bpc",) * len(names))

    def sweep(prefix: str, label: str) -> Curve:
        return line(label, (f"{prefix}{_moe(rate)}" for rate in RATES))

    def flat(arm: str, points: int) -> Curve:
        return Curve(arm=arm, metrics=("bpc",) * points)

    across: dict[str, Any] = {"x_label": "activation rate r_a, %", "y_label": "bits per character"}
    x = tuple(100 * rate for rate in RATES)
    levels = [
        sweep(
            prefix,
            f"D/N of the dense model {share * plans['dense'].spent.tokens / plans['dense'].shape.parameters:.3g}",
        )
        for prefix, share in SHARES.items()
    ]
    sizes = [sweep(p, f"N = {plans[f'{p}{_moe(BEST)}'].shape.parameters:,}") for p in ("", "other-")]
    epochs = sorted((_epochs(plans[name]), name) for name in (_moe(BEST), "loose", "strict"))
    coarse = [f"coarse{_thousandths(rate)}" for rate in RATES[2:]]
    return (
        Figure(title="Equal N and C: bits per character against the activation rate", x=x, fit=True,
               curves=(sweep("", "MoE"), flat("dense", len(x)), flat("dense-2c", len(x))), **across),
        Figure(title="Reuse: bits per character against epochs over the unique tokens, r_a = 20%", x_label="epochs",
               y_label="bits per character", x=tuple(round(epoch, 2) for epoch, _ in epochs),
               curves=(line("MoE on repeated text", (name for _, name in epochs)), flat("dense", 3))),
        Figure(title="Activation rate by tokens a parameter", x=x, fit=True, curves=tuple(levels), **across),
        Figure(title="Activation rate by size", x=x, fit=True, curves=tuple(sizes), **across),
        Figure(title="One granularity against 8 experts", x=x[2:], **across,
               curves=(line("one granularity", map(_moe, RATES[2:])), line("8 experts", coarse))),
    )  # fmt: skip


def _epochs(plan: Plan) -> float:
    return plan.spent.tokens / plan.unique if plan.unique else 1.0


def measure(model: Transformer, config: Mapping[str, Any], held_out: Bytes) -> Iterator[tuple[str, float]]:
    """`tuning/bpc` on one half of the held-out windows; `bpb` and `bpc` on the other: bits a byte and a character.

    Bytes and characters a token are those of the whole held-out text. Learning rates are chosen on the first half, claims
    are judged on the second.
    """
    text = corpus.load(config["corpus"])
    tokens_WS, targets_WS = evaluation_windows(held_out, tokens=2 * config["tokens"], context=model.config.context)
    tuning, bits = (held_out_loss(model, tokens_WS[part::2], targets_WS[part::2]) / math.log(2) for part in (0, 1))
    yield "tuning/bpc", tuning / text.characters_per_token
    yield "bpb", bits / text.bytes_per_token
    yield "bpc", bits / text.characters_per_token
