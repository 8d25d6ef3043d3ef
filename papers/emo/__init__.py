"""EMO: Frustratingly Easy Progressive Training of Extendable MoE (arXiv 2605.13247v2).

The paper's recipe: start with few experts, and at the end of each stage double the pool with randomly drawn experts; reset
the selection bias and the optimizer's state, warm the learning rate up again, go on with new data at the constant rate, and
let it decay only in the last stage. It says that this matches a model that had all experts from the start, in less time.

What is new here is the schedule, so the mechanism is all in the segments: each stage inherits the weights of the one before
and grows the pool (`repro.moe.growth`). Token budgets: the shares that a summary of the paper prints, equal shares, and two
readings of the scaling law (`law.py`). What a scale fixes is in `scales.py`.

Arms, at `nano` with 4 → 8 → 16 experts
- `full`, `half`: all 16 experts, and 8, from the start; `emo`; `equal`, `h1`, `h2`: other budgets
- `at25`, `at50`, `at75`: 4 → 16 in one go after that share of the tokens
- `copy`, `keep`, `bias`: `at50` with copied experts, with the optimizer's state kept, with the selection bias kept
- `emo-clock`, `full-clock`: the paper's own 8 → 128 experts, for their time alone
Controls, each broken so that it has to miss one claim's criterion
- `frozen`: `emo`, with the router frozen once grown (E1)
- `idle50`, `idle75`: grown by experts that are never routed to, and disturbed in nothing: what did not grow (E1, E3, E4, E6)
- `twins`: `copy` with nothing to tell a copy from its source, so that top-k picks both for the same tokens (E5)
- `restart`: at 50%, all that was learnt is thrown away (E6)
- `burst-clock`: nearly all tokens at 128 experts: there is nothing to save (E2)
See README.md for deviations.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from papers.emo import law
from papers.emo.scales import SETTINGS, Setting
from records.errors import UsageError
from repro.accounting import accounting
from repro.data.batches import evaluation_windows
from repro.data.corpus import Bytes
from repro.evals.held_out import held_out_loss
from repro.evals.load import gini
from repro.experiment import Arm, Curve, Design, Figure
from repro.model import ModelOutput, Transformer
from repro.moe import MoE, RouterOutput, RoutingRule, TopK, balance_loss
from repro.moe.growth import Growth
from repro.train import Mechanism, Segment

RECIPE = Growth(experts="random", router="random", reset_bias=True)
TWINS = replace(RECIPE, experts="copy", router="copy")
# 0.001 is what Expert Upcycling (arXiv 2604.19835) disturbs the biases of copies by; EMO's own copies are not described.
COPIES = replace(TWINS, bias_noise=1e-3)
IDLE = replace(RECIPE, reset_bias=False)


_LOAD_WINDOWS = 4  # the load is measured on one in so many held-out windows


@dataclass(frozen=True, slots=True)
class FirstExperts:
    """Top-k among the first `count` experts, renormalised: the control whose new experts are never routed to."""

    k: int
    count: int
    fills_all: ClassVar[bool] = True

    def __call__(self, scores_TE: Tensor, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
        """Experts (T, k), all below `count`, and weights that sum to 1."""
        rule = TopK(self.k)
        return rule(scores_TE[:, : self.count], None if bias_E is None else bias_E[: self.count])


class Unused(Mechanism):
    """Routes to the first experts alone, and balances these, by loss and by biases, as if there were no others."""

    def __init__(self, rule: FirstExperts, *, balance: float, bias_rate: float) -> None:
        self._rule, self._balance, self._bias_rate = rule, balance, bias_rate
        self._used: list[RouterOutput] = []

    def rule(self, step: int, seed: int) -> RoutingRule:
        return self._rule

    def loss(self, output: ModelOutput) -> Tensor:
        count = self._rule.count
        self._used = [
            RouterOutput(
                router.logits_TE[:, :count],
                router.scores_TE[:, :count],
                replace(router.routing, num_experts=count, by_expert=router.routing.by_expert[: count + 1]),
            )
            for router in output.routers
        ]
        return self._balance * torch.stack([balance_loss(router) for router in self._used]).mean()

    def gradients(self, model: Transformer) -> None:
        layers = [module for module in model.modules() if isinstance(module, MoE)]
        for layer, router in zip(layers, self._used, strict=True):
            assert layer.bias_E is not None
            load_E = router.routing.load_E.to(layer.bias_E.dtype)
            layer.bias_E[: len(load_E)] += self._bias_rate * torch.sign(load_E.mean() - load_E)


class Watched(Mechanism):
    """Changes nothing; looks at how far copies have moved away from their sources."""

    def probe(self, model: Transformer, output: ModelOutput) -> Mapping[str, Sequence[float]]:
        """`twins`: for each grown layer the mean cosine between the weights of a copy and of its source."""
        found = []
        for name, lineage_E in model.lineages.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, MoE)
            flat_EN = torch.cat([layer.w_up_EDF.flatten(1), layer.w_down_EFD.flatten(1)], dim=1).double()
            copies = (lineage_E != torch.arange(len(lineage_E))) & (lineage_E >= 0)
            source_EN = flat_EN[lineage_E[copies].to(flat_EN.device)]
            copy_EN = flat_EN[copies.to(flat_EN.device)]
            found.append(float(torch.cosine_similarity(copy_EN, source_EN).mean()))
        return {"twins": found}


def mechanism(config: Mapping[str, Any]) -> Mechanism:
    """From {"first", "k", "balance", "bias_rate"} for arms whose later experts are never used, {"watch"} for copies."""
    if "first" in config:
        rule = FirstExperts(k=config["k"], count=config["first"])
        return Unused(rule, balance=float(config["balance"]), bias_rate=float(config["bias_rate"]))
    return Watched() if "watch" in config else Mechanism()


def design(scale: str) -> Design:
    """Arms, figures and warnings at `scale`.

    Raises:
        UsageError: a scale that is not set up for this paper.
    """
    if scale not in SETTINGS:
        raise UsageError(f"emo at scale {scale!r} is not set up: expected one of {', '.join(SETTINGS)}")
    setting = SETTINGS[scale]
    stages, full = setting.stages, setting.stages[-1:]
    active = accounting(setting.model).active_non_vocab
    budgets = {
        "emo": setting.shares,
        "equal": (1 / len(stages),) * len(stages),
        "h1": law.shares_by_stage(stages, active),
        "h2": law.shares_by_total(stages, active),
    }
    few = setting.jump[0]
    balanced = {"balance": setting.train.balance, "bias_rate": setting.train.bias_rate}
    unused = {"first": few, "k": setting.model.top_k} | balanced
    idle: dict[str, Any] = {"mechanism": unused, "inherit": "all", "rewarm": 0, "balance": 0.0, "bias_rate": 0.0}
    watched = {"watch": "twins"}
    clock_stages = setting.clock_stages or stages
    clock = replace(
        setting,
        train=replace(setting.train, steps=setting.clock_steps or setting.train.steps),
        eval_tokens=setting.eval_tokens // 8,
    )
    arms = (
        _arm(setting, "half", stages[-2:-1], (1.0,)),
        _arm(setting, "full", full, (1.0,)),
        *(_arm(setting, name, stages, shares) for name, shares in budgets.items()),
        *(_arm(setting, f"at{at}", setting.jump, (at / 100, 1 - at / 100)) for at in (25, 50, 75)),
        _arm(setting, "copy", setting.jump, (0.5, 0.5), growth=COPIES, mechanism=watched),
        _arm(setting, "keep", setting.jump, (0.5, 0.5), inherit="all"),
        _arm(setting, "bias", setting.jump, (0.5, 0.5), growth=IDLE),
        _arm(setting, "frozen", stages, setting.shares, freeze=("router_ED",)),
        *(_arm(setting, f"idle{at}", setting.jump, (at / 100, 1 - at / 100), growth=IDLE, **idle) for at in (50, 75)),
        _arm(setting, "twins", setting.jump, (0.5, 0.5), growth=TWINS, mechanism=watched),
        _arm(setting, "restart", setting.jump, (0.5, 0.5), growth=None, inherit="nothing"),
        _arm(clock, "full-clock", clock_stages[-1:], (1.0,)),
        _arm(clock, "emo-clock", clock_stages, law.printed(len(clock_stages))),
        _arm(clock, "burst-clock", (clock_stages[0], clock_stages[-1]), (0.05, 0.95)),
    )
    return Design(
        seeds=setting.seeds,
        first_seed=setting.first_seed,
        arms=arms,
        figures=_figures(setting),
        warnings=law.warnings(stages, d_model=setting.model.d_model, d_expert=setting.model.d_expert),
    )


def _figures(setting: Setting) -> tuple[Figure, ...]:
    few, many = setting.jump
    when = Curve(arm=f"{few} → {many} experts", arms=("at25", "at50", "at75"), metrics=("loss",) * 3)
    later = Curve(arm=when.arm, arms=("at75", "at50", "at25"), metrics=("loss",) * 3)
    shown = tuple(Curve(arm=arm) for arm in ("half", "full", "emo", "at50"))
    loss = "training loss, nats/byte"
    return (
        Figure(
            title="Training loss against tokens", x_label="tokens", y_label=loss, curves=shown, kind="training",
        ),
        Figure(
            title="Training loss against measured time", x_label="seconds", y_label=loss, curves=shown, kind="time",
        ),
        Figure(
            title="Training loss against measured time where the paper's own numbers of experts are timed", x_label="seconds",
            y_label=loss, curves=tuple(Curve(arm=f"{arm}-clock") for arm in ("full", "emo", "burst")), kind="time",
        ),
        Figure(
            title=f"Held-out loss against the share of the tokens before growing from {few} to {many} experts",
            x_label="tokens before the growth, %", y_label="held-out loss, nats/byte", x=(25.0, 50.0, 75.0), curves=(when,),
        ),
        Figure(
            title=f"Share of the gap from {few} experts throughout (idle50) to all from the start that growth closes",
            x_label="tokens after the growth, %", y_label="η", x=(25.0, 50.0, 75.0), curves=(later,), kind="closure",
            base=Curve(arm="idle50", metrics=("loss",) * 3), target=Curve(arm="full", metrics=("loss",) * 3),
        ),
        Figure(
            title="Cosine between copied experts and their sources, mean over layers", x_label="tokens", y_label="cosine",
            curves=(Curve(arm="copy", metrics=("twins",)), Curve(arm="twins", metrics=("twins",))), kind="probe",
        ),
        Figure(
            title="Load of each expert along EMO's training", x_label="tokens", y_label="expert", curves=(Curve(arm="emo"),),
            kind="load",
        ),
    )  # fmt: skip


def _arm(
    setting: Setting,
    name: str,
    stages: Sequence[int],
    shares: Sequence[float],
    *,
    growth: Growth | None = RECIPE,
    inherit: str = "weights",
    rewarm: int | None = None,
    freeze: tuple[str, ...] = (),
    mechanism: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Arm:
    """An arm of stages with these shares of the tokens; only the last one's learning rate decays, over a share of all steps.

    What is given by name holds for the stages after the first, `changes` for their training. A first stage that others
    follow is cut at each quarter of the tokens, so that arms which grow later share the steps before.
    """
    total = setting.train.steps
    steps = law.steps(shares, total, multiple=setting.train.trace_every)
    quarter = total // 4
    segments: list[Segment] = []
    done = 0
    for number, (experts, count) in enumerate(zip(stages, steps, strict=True)):
        whole = number > 0 or len(stages) == 1
        pieces = [count] if whole else [quarter] * (count // quarter) + [count % quarter] * (count % quarter > 0)
        for piece in pieces:
            first, grows, last = not segments, number > 0, done + piece == total
            warmup = setting.train.warmup if first else 0
            if grows:
                warmup = setting.rewarm if rewarm is None else rewarm
            train = replace(
                replace(setting.train, **changes) if grows else setting.train,
                steps=piece,
                first_step=done,
                schedule="wsd" if last else "constant",
                warmup=min(warmup, piece),
                decay=setting.train.decay * total / piece if last else 0.0,
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
    rule = {name: value for name, value in (mechanism or {}).items() if name in ("first", "k")}
    return Arm(
        id=name,
        label=f"{name}: {' → '.join(map(str, stages))} experts, {' + '.join(map(str, steps))} steps",
        segments=tuple(segments),
        measure={"tokens": setting.eval_tokens, "few": stages[0], "rule": rule},
        measure_tokens=setting.eval_tokens + setting.eval_tokens // _LOAD_WINDOWS,
    )


def measure(model: Transformer, config: Mapping[str, Any], held_out: Bytes) -> Iterator[tuple[str, float]]:
    """`loss` in nats/byte on held-out text, and of the load there, over all layers' experts and one in four windows:

    `load/gini` (0 even, 1 all to one), `load/dead` (experts with no token), `load/new` (share that goes to experts beyond
    the first stage's).
    """
    rule = FirstExperts(k=config["rule"]["k"], count=config["rule"]["first"]) if config["rule"] else None
    tokens_WS, targets_WS = evaluation_windows(held_out, tokens=config["tokens"], context=model.config.context)
    yield "loss", held_out_loss(model, tokens_WS, targets_WS, rule)
    load_LE = torch.zeros(model.config.moe_layers, model.config.num_experts, dtype=torch.float64)
    with torch.no_grad():
        for tokens_BS in torch.split(tokens_WS[::_LOAD_WINDOWS].to(model.embedding_VD.device), 32):
            for layer, router in enumerate(model(tokens_BS, rule=rule).routers):
                load_LE[layer] += router.routing.load_E.double().cpu()
    yield "load/gini", sum(gini(load_E) for load_E in load_LE) / len(load_LE)
    yield "load/dead", float((load_LE == 0).sum())
    yield "load/new", float(load_LE[:, config["few"] :].sum() / load_LE.sum())
