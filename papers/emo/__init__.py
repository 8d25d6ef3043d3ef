"""EMO: Frustratingly Easy Progressive Training of Extendable MoE (arXiv 2605.13247v2).

The paper's recipe: start with few experts, and at the end of each stage double the pool with randomly drawn experts; reset
the selection bias and the optimizer's state, warm the learning rate up again, go on with new data at the constant rate, and
let it decay only in the last stage. It says that this matches a model that had all experts from the start, in less time.

What is new here is the schedule, so the mechanism is all in the segments: each stage inherits the weights of the one before
and grows the pool (`repro.moe.growth`). Token budgets: the shares that a summary of the paper prints, equal shares, and two
readings of the scaling law (`law.py`).

Arms: `fixed8`, `fixed16` (all experts from the start), `emo` (4 → 8 → 16), `equal`, `h1`, `h2` (other budgets), `at25`, `at50`,
`at75` (4 → 16 in one go after that share of the tokens), `copy`, `keep`, `bias` (`at50` with copied experts, with the
optimizer's state kept, with the selection bias kept), and two controls: `frozen` (router frozen once grown) and `unused` (the
new experts are never routed to). See README.md for deviations.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from papers.emo import law
from records.errors import UsageError
from repro.data.batches import evaluation_windows
from repro.data.corpus import Bytes
from repro.evals.held_out import held_out_loss
from repro.experiment import Arm, Curve, Design, Figure
from repro.model import ModelConfig, Transformer, accounting
from repro.moe import RoutingRule, TopK
from repro.moe.growth import Growth
from repro.train import Mechanism, Segment, TrainConfig

RECIPE = Growth(experts="random", router="random", reset_bias=True)


@dataclass(frozen=True, slots=True)
class FirstExperts:
    """Top-k among the first `count` experts, renormalised: the control whose new experts are never routed to."""

    k: int
    count: int

    def __call__(self, scores_TE: Tensor, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
        """Experts (T, k), all below `count`, and weights that sum to 1."""
        rule = TopK(self.k)
        return rule(scores_TE[:, : self.count], None if bias_E is None else bias_E[: self.count])


class Unused(Mechanism):
    """Routes to the first experts alone."""

    def __init__(self, rule: FirstExperts) -> None:
        self._rule = rule

    def rule(self, step: int, seed: int) -> RoutingRule:
        return self._rule


def mechanism(config: Mapping[str, Any]) -> Mechanism:
    """None for all arms but the control `unused`."""
    return Unused(FirstExperts(**config)) if config else Mechanism()


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a scale fixes for all arms; `stages` are the numbers of experts, `shares` EMO's printed ones for them."""

    model: ModelConfig
    train: TrainConfig
    stages: tuple[int, ...]
    shares: tuple[float, ...]
    rewarm: int
    corpus: str
    seeds: int
    eval_tokens: int


_LAST_THREE = tuple(share / math.fsum(law.PRINTED_SHARES[2:]) for share in law.PRINTED_SHARES[2:])

SETTINGS = {
    "smoke": Setting(
        model=ModelConfig(
            d_model=16, d_expert=8, num_layers=1, num_heads=2, num_experts=16, top_k=2, context=32, score="sigmoid",
            selection_bias=True, d_shared=8,
        ),
        train=TrainConfig(
            steps=40, batch=4, context=32, lr=3e-3, warmup=2, decay=0.1, bias_rate=1e-3, trace_every=2, hash_every=10,
            checkpoint_every=10,
        ),
        stages=(4, 8, 16), shares=_LAST_THREE, rewarm=2, corpus="synthetic", seeds=2, eval_tokens=2_048,
    ),
    "nano": Setting(
        model=ModelConfig(
            d_model=64, d_expert=32, num_layers=2, num_heads=4, num_experts=16, top_k=2, context=128, score="sigmoid",
            selection_bias=True, d_shared=32,
        ),
        train=TrainConfig(
            steps=1_200, batch=8, context=128, lr=3e-3, warmup=40, decay=0.1, bias_rate=1e-3
        ),
        stages=(4, 8, 16), shares=_LAST_THREE, rewarm=20, corpus="stdlib", seeds=3, eval_tokens=131_072,
    ),
}  # fmt: skip


def design(scale: str) -> Design:
    """Arms and figure at `scale`.

    Raises:
        UsageError: a scale that is not set up for this paper.
    """
    if scale not in SETTINGS:
        raise UsageError(f"emo at scale {scale!r} is not set up yet: expected one of {', '.join(SETTINGS)}")
    setting = SETTINGS[scale]
    few, half, full = setting.stages
    active = accounting(setting.model).active_non_vocab
    total, every = setting.train.steps, setting.train.trace_every
    paper = law.steps(setting.shares, total, multiple=every)
    quarters = {share: law.steps((share / 100, 1 - share / 100), total, multiple=every) for share in (25, 50, 75)}
    jump = (few, full)
    control: dict[str, Any] = {"k": setting.model.top_k, "count": few}
    arms = (
        _arm(setting, f"fixed{half}", (half,), (total,)),
        _arm(setting, f"fixed{full}", (full,), (total,)),
        _arm(setting, "emo", setting.stages, paper),
        _arm(setting, "equal", setting.stages, law.steps((1 / 3,) * 3, total, multiple=every)),
        _arm(
            setting, "h1", setting.stages, law.steps(law.shares_by_stage(setting.stages, active), total, multiple=every)
        ),
        _arm(
            setting, "h2", setting.stages, law.steps(law.shares_by_total(setting.stages, active), total, multiple=every)
        ),
        _arm(setting, "at25", jump, quarters[25]),
        _arm(setting, "at50", jump, quarters[50]),
        _arm(setting, "at75", jump, quarters[75]),
        _arm(setting, "copy", jump, quarters[50], growth=replace(RECIPE, experts="copy", router="copy")),
        _arm(setting, "keep", jump, quarters[50], inherit="all"),
        _arm(setting, "bias", jump, quarters[50], growth=replace(RECIPE, reset_bias=False)),
        _arm(setting, "frozen", setting.stages, paper, freeze=("router_ED",)),
        _arm(setting, "unused", setting.stages, paper, mechanism=control),
    )
    shown = ("at25", "at50", "at75")
    figures = (
        Figure(
            title="Training loss against tokens; marks show where a stage begins",
            x_label="tokens",
            y_label="training loss, nats/byte",
            curves=tuple(Curve(arm=arm) for arm in (f"fixed{half}", f"fixed{full}", "emo", "at50")),
            kind="training",
        ),
        Figure(
            title=f"Held-out loss against the share of the tokens before growing from {few} to {full} experts",
            x_label="tokens before the growth, %",
            y_label="held-out loss, nats/byte",
            x=(25.0, 50.0, 75.0),
            curves=(Curve(arm=f"{few} → {full} experts", arms=shown, metrics=("loss",) * 3),),
        ),
    )
    return Design(seeds=setting.seeds, arms=arms, figures=figures)


def _arm(
    setting: Setting,
    name: str,
    stages: Sequence[int],
    steps: Sequence[int],
    *,
    growth: Growth = RECIPE,
    inherit: str = "weights",
    freeze: tuple[str, ...] = (),
    mechanism: Mapping[str, Any] | None = None,
) -> Arm:
    """An arm of stages of so many steps; only the last one's learning rate decays, over a fixed share of all steps.

    A long first stage of 4 experts is cut at each quarter, so that arms which grow later share the steps before.
    """
    quarter = setting.train.steps // 4
    segments: list[Segment] = []
    done = 0
    for number, (experts, count) in enumerate(zip(stages, steps, strict=True)):
        pieces = [quarter] * (count // quarter) if number == 0 and len(stages) == 2 else [count]
        for piece in pieces:
            first = not segments
            grows = number > 0
            last = done + piece == setting.train.steps
            decay = setting.train.decay * setting.train.steps / piece if last else 0.0
            train = replace(
                setting.train,
                steps=piece,
                first_step=done,
                schedule="wsd" if last else "constant",
                warmup=setting.train.warmup if first else setting.rewarm if grows else 0,
                decay=decay,
            )
            segments.append(
                Segment(
                    model=replace(setting.model, num_experts=experts),
                    train=train,
                    corpus=setting.corpus,
                    mechanism=(mechanism or {}) if grows else {},
                    inherit="nothing" if first else inherit if grows else "all",  # type: ignore[arg-type]
                    growth=growth if grows else None,
                    freeze=freeze if grows else (),
                )
            )
            done += piece
    return Arm(
        id=name,
        label=f"{name}: {' → '.join(map(str, stages))} experts, {' + '.join(map(str, steps))} steps",
        segments=tuple(segments),
        measure={"tokens": setting.eval_tokens, "few": setting.stages[0], "rule": dict(mechanism or {})},
        measure_tokens=2 * setting.eval_tokens,
    )


def measure(model: Transformer, config: Mapping[str, Any], held_out: Bytes) -> Iterator[tuple[str, float]]:
    """`loss` in nats/byte on held-out text, and of the load there, over all layers' experts:

    `load/gini` (0 even, 1 all to one), `load/dead` (experts with no token), `load/new` (share that goes to experts beyond
    the first stage's).
    """
    rule = FirstExperts(**config["rule"]) if config["rule"] else None
    tokens_WS, targets_WS = evaluation_windows(held_out, tokens=config["tokens"], context=model.config.context)
    yield "loss", held_out_loss(model, tokens_WS, targets_WS, rule)
    load_LE = torch.zeros(model.config.moe_layers, model.config.num_experts, dtype=torch.float64)
    with torch.no_grad():
        for first in range(0, len(tokens_WS), 32):
            tokens_BS = tokens_WS[first : first + 32].to(model.embedding_VD.device)
            for layer, router in enumerate(model(tokens_BS, rule=rule).routers):
                load_LE[layer] += router.routing.load_E.double().cpu()
    yield "load/gini", sum(gini(load_E) for load_E in load_LE) / len(load_LE)
    yield "load/dead", float((load_LE == 0).sum())
    yield "load/new", float(load_LE[:, config["few"] :].sum() / load_LE.sum())


def gini(load_E: Tensor) -> float:
    """Gini coefficient of a load: Σ_i (2i − n − 1)·x_i / (n·Σx) over the loads in rising order."""
    ordered = load_E.double().sort().values
    n = len(ordered)
    weights = 2 * torch.arange(1, n + 1, dtype=torch.float64) - n - 1
    return float((weights * ordered).sum() / (n * ordered.sum()))
