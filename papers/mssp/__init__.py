"""MSSP: How to Scale Mixture-of-Experts, from muP to the Maximally Scale-Stable Parameterization (arXiv 2605.14200v1).

The paper: where the number of active experts grows with the width, muP lets what the experts contribute at their start average
out, as K^-½; MSSP mends it, by a larger initial variance of the down projections where the experts' width is fixed (regime II)
and by starting all experts equal where everything grows (regime III). It is said to restore learning-rate transfer and
improvement with scale.

What is new here is a parameterization, which is data (`repro.parameterization`); a segment's model config holds its factors, so
there is no mechanism. Coordinates are measured on the model before, after 2 and after 5 steps (`repro.coordinates`).

Arms, by parameterization (`mup`, `mssp`, `sp`, and the two wrong fixes `tied` in II and `boosted` in III), regime and width:
`check-*` (Adam, 5 steps, the classifier), `text-*` (the same, the transformer), `sgd-*` (the classifier for some 200 steps at a
fixed base learning rate), `base-*` (all parameterizations at the base width), `sweep-*` (the transformer, by learning rate),
`mlp-*` (the classifier, likewise), `deep-*` (by depth, with CompleteP, or without: `plain`). `x4` is four times the base width.
See README.md for deviations.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from papers.mssp.figures import figures
from papers.mssp.settings import AT, CONTROLS, REGIMES, SETTINGS, SGD_CONTROL, SWEPT, Setting, Sweep, grown, times
from records.errors import UsageError
from repro.coordinates import Coordinates, coordinates
from repro.data.batches import evaluation_windows
from repro.data.corpus import Bytes
from repro.evals.held_out import held_out_loss
from repro.experiment import Arm, Design
from repro.model import ModelConfig, Transformer
from repro.parameterization import Regime, Rule, parameterize
from repro.parameterization import text as table  # noqa: F401 (what `repro claims mssp --table` prints)
from repro.train import Mechanism, Segment, TrainConfig


def mechanism(config: Mapping[str, Any]) -> Mechanism:
    """None: a parameterization lies in the model's config."""
    return Mechanism()


def design(scale: str) -> Design:
    """Arms and figures at `scale`.

    Raises:
        UsageError: a scale that is not set up for this paper.
    """
    if scale not in SETTINGS:
        raise UsageError(f"mssp at scale {scale!r} is not set up: expected one of {', '.join(SETTINGS)}")
    setting = SETTINGS[scale]
    arms: list[Arm] = []
    for regime in REGIMES:
        for rule in ("mup", "mssp", *CONTROLS[regime]):
            models = {width: grown(setting.mlp[regime], regime, width) for width in setting.widths[regime]}
            arms += [
                _check(f"check-{rule}-{regime}-{times(setting.mlp[regime], width)}", setting, model, rule, regime)
                for width, model in models.items()
            ]
        for width in setting.widths[regime]:
            arms += [_sgd(setting, regime, "mssp", width, rate) for rate in setting.rates]
            arms.append(_sgd(setting, regime, SGD_CONTROL[regime], width, setting.rates[0]))
        for rule in ("sp", "mup", "mssp"):
            arms.append(_base(setting, regime, rule))
    arms.append(_base(setting, "II", "mssp", anchor=setting.mlp["II"].d_model // 2))
    for regime in setting.text:
        rules: tuple[Rule, ...] = ("mup", "mssp")
        for rule in rules:
            for width in setting.text_widths:
                model = grown(setting.text[regime], regime, width)
                arms.append(
                    _check(f"text-{rule}-{regime}-{times(setting.text[regime], width)}", setting, model, rule, regime)
                )
    arms += _sweep_arms(setting.sweep, setting)
    return Design(seeds=setting.seeds, arms=tuple(arms), figures=tuple(figures(setting)))


def _arm(name: str, segments: Sequence[Segment], setting: Setting, *, tokens: int, course: bool = False) -> Arm:
    return Arm(
        id=name,
        label=name,
        segments=tuple(segments),
        measure={"tokens": tokens, "course": course},
        measure_tokens=tokens * (4 if course else 1),
    )


def _check(name: str, setting: Setting, model: ModelConfig, rule: Rule, regime: Regime) -> Arm:
    """5 steps with Adam, in two segments, so that the model after the first 2 is at hand too."""
    mlp = model.kind == "mlp"
    base = setting.mlp[regime] if mlp else setting.text[regime]
    train = setting.check if mlp else setting.text_check
    scaled = parameterize(model, rule, regime=regime, base=base)
    corpus = "classification" if mlp else setting.text_corpus
    early = Segment(model=scaled, train=replace(train, steps=AT[0]), corpus=corpus)
    late = Segment(
        model=scaled, train=replace(train, steps=AT[1] - AT[0], first_step=AT[0]), corpus=corpus, inherit="all"
    )
    return _arm(name, (early, late), setting, tokens=setting.eval_tokens // 8, course=True)


def _sgd(setting: Setting, regime: Regime, rule: Rule, width: int, rate: int) -> Arm:
    model = grown(setting.mlp[regime], regime, width)
    scaled = parameterize(model, rule, regime=regime, optimizer="sgd", base=setting.mlp[regime])
    segment = Segment(model=scaled, train=replace(setting.sgd, lr=2.0**rate), corpus="classification")
    return _arm(
        f"sgd-{rule}-{regime}-{times(setting.mlp[regime], width)}-lr{rate}",
        (segment,),
        setting,
        tokens=setting.eval_tokens,
    )


def _base(setting: Setting, regime: Regime, rule: Rule, anchor: int | None = None) -> Arm:
    """A few steps at the base width, with a readout that is not zero; `anchor`: as if another width were the base."""
    model = setting.mlp[regime]
    base = model if anchor is None else grown(model, regime, anchor)
    scaled = parameterize(model, rule, regime=regime, base=base, zero_readout=False)
    segment = Segment(model=scaled, train=replace(setting.check, steps=20), corpus="classification")
    name = f"base-{rule}-{regime}" + ("" if anchor is None else "-elsewhere")
    return _arm(name, (segment,), setting, tokens=setting.eval_tokens)


def _sweep_arms(sweep: Sweep, setting: Setting) -> Iterator[Arm]:
    def arm(name: str, model: ModelConfig, train: TrainConfig, corpus: str, tokens: int, rate: int) -> Arm:
        segment = Segment(model=model, train=replace(train, lr=2.0**rate), corpus=corpus)
        return _arm(f"{name}-lr{rate}", (segment,), setting, tokens=tokens)

    text = (sweep.train, sweep.corpus, sweep.eval_tokens)
    kinds = [("sweep", sweep.base, sweep.rates, text)]
    if sweep.mlp_train:
        kinds.append(("mlp", sweep.mlp, sweep.mlp_rates, (sweep.mlp_train, "classification", setting.eval_tokens)))
    for kind, bases, rates, how in kinds:
        for regime, base in bases.items():
            for rule in SWEPT:
                for width in sweep.widths_of(rule):
                    size = base.d_model * width // sweep.widths[0]
                    model = parameterize(
                        grown(base, regime, size), rule, regime=regime, base=base, zero_readout=sweep.zero_readout
                    )
                    name = f"{kind}-{rule}-{regime}-{times(base, size)}"
                    yield from (arm(name, model, *how, rate) for rate in rates)
    base = replace(sweep.base["III"], num_layers=sweep.layers[0])
    for layers in sweep.layers:
        model = replace(base, num_layers=layers)
        for name, anchor in (("mssp", base), ("plain", model)):
            scaled = parameterize(model, "mssp", regime="III", base=anchor, zero_readout=sweep.zero_readout)
            checked = replace(
                setting, text={"III": anchor}, text_check=replace(setting.text_check, batch=4, context=base.context)
            )
            yield _check(f"deep-check-{name}-{layers}", checked, model, "mssp", "III")
            if not sweep.swept_layers or (name == "mssp" and layers in sweep.swept_layers):
                yield from (arm(f"deep-{name}-{layers}", scaled, *text, rate) for rate in sweep.rates)


def measure(model: Transformer, config: Mapping[str, Any], held_out: Bytes) -> Iterator[tuple[str, float]]:
    """`loss` on held-out text in nats/byte, or on held-out records in nats."""
    windows = evaluation_windows(held_out, tokens=config["tokens"], context=model.config.context)
    yield "loss", held_out_loss(model, *windows)


def measure_course(
    models: Sequence[Transformer], config: Mapping[str, Any], held_out: Bytes
) -> Iterator[tuple[str, float]]:
    """Where asked for, `tT/TERM` of `repro.coordinates` at the start and after each segment: the root of the mean square
    over MoE layers, and, where there are several, `tT/TERM/LAYER` of each.

    A term that is zero for want of any update (the first readout is zero) is left out.
    """
    if not config["course"]:
        return
    device = next(models[0].parameters()).device
    windows = evaluation_windows(held_out, tokens=config["tokens"], context=models[0].config.context)
    tokens_BS, targets_BS = (window.to(device) for window in windows)
    for step, model in zip((0, *AT), models, strict=True):
        layers = coordinates(models[0], model, tokens_BS, targets_BS)
        for field in dataclasses.fields(Coordinates):
            values = [getattr(layer, field.name) for layer in layers]
            if all(values):
                yield f"t{step}/{field.name}", (sum(value**2 for value in values) / len(values)) ** 0.5
                if len(values) > 1:
                    yield from ((f"t{step}/{field.name}/{layer}", value) for layer, value in enumerate(values))
