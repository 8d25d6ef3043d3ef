"""MSSP's figures: terms against width (log-log, every seed), losses against width, losses against the learning rate by width."""

from collections.abc import Iterable, Iterator, Sequence

from papers.mssp.settings import CONTROLS, REGIMES, SGD_CONTROL, SWEPT, Setting, Sweep, times
from repro.experiment import Curve, Figure
from repro.model import ModelConfig

_TERMS = ("init", "propagating", "effective", "gradient", "backward")


def figures(setting: Setting) -> Iterator[Figure]:
    for regime in REGIMES:
        widths = setting.widths[regime]
        for term in (*_TERMS, "router") if regime == "I" else _TERMS:
            yield Figure(
                title=f"Regime {regime}: {term} of the classifier's MoE layer after 2 steps",
                x_label="width N",
                y_label=f"RMS, {term}" if term != "backward" else "RMS(W₀ᵀδ) / RMS(ΔWᵀδ)",
                x=tuple(map(float, widths)),
                curves=_curves(
                    f"check-{{}}-{regime}",
                    ("mup", "mssp", *CONTROLS[regime]),
                    setting.mlp[regime],
                    widths,
                    f"t2/{term}",
                ),
                log="xy",
            )
        yield Figure(
            title=f"Regime {regime}: held-out loss of the classifier with SGD against scale",
            x_label="width N",
            y_label="held-out loss, nats",
            x=tuple(map(float, widths)),
            curves=tuple(
                Curve(
                    arm=f"{rule}, learning rate 2^{rate}",
                    arms=tuple(f"sgd-{rule}-{regime}-{times(setting.mlp[regime], width)}-lr{rate}" for width in widths),
                    metrics=("loss",) * len(widths),
                )
                for rule, rate in (*(("mssp", rate) for rate in setting.rates), (SGD_CONTROL[regime], setting.rates[0]))
            ),
            log="x",
        )
    for regime in setting.text:
        for term in _TERMS:
            yield Figure(
                title=f"Regime {regime}: {term} of the transformer's MoE layers after 2 steps",
                x_label="width N",
                y_label=f"RMS, {term}",
                x=tuple(map(float, setting.text_widths)),
                curves=_curves(
                    f"text-{{}}-{regime}", ("mup", "mssp"), setting.text[regime], setting.text_widths, f"t2/{term}"
                ),
                log="xy",
            )
    yield from _sweep_figures(setting.sweep)


def _curves(
    stem: str, rules: Iterable[str], base: ModelConfig, widths: Sequence[int], metric: str
) -> tuple[Curve, ...]:
    return tuple(
        Curve(
            arm=rule,
            arms=tuple(f"{stem.format(rule)}-{times(base, width)}" for width in widths),
            metrics=(metric,) * len(widths),
        )
        for rule in rules
    )


def sweeps(sweep: Sweep) -> Iterator[tuple[str, list[tuple[str, int]], tuple[int, ...]]]:
    """What is swept: the beginning of the arms' names, the sizes (as the names say them, and in numbers), the rates."""
    for kind, bases, rates in (("sweep", sweep.base, sweep.rates), ("mlp", sweep.mlp, sweep.mlp_rates)):
        for regime, base in bases.items():
            for rule in SWEPT:
                widths = [base.d_model * width // sweep.widths[0] for width in sweep.widths_of(rule)]
                yield f"{kind}-{rule}-{regime}", [(times(base, width), width) for width in widths], rates
    for name in ("mssp",) if sweep.swept_layers else ("mssp", "plain"):
        yield f"deep-{name}", [(str(layers), layers) for layers in sweep.swept_layers or sweep.layers], sweep.rates


def _sweep_figures(sweep: Sweep) -> Iterator[Figure]:
    for stem, sizes, rates in sweeps(sweep):
        mlp, deep = stem.startswith("mlp"), stem.startswith("deep")
        yield Figure(
            title=f"{stem}: held-out loss of the {'classifier' if mlp else 'transformer'} against the learning rate",
            x_label="base learning rate",
            y_label="held-out loss, nats" if mlp else "held-out loss, nats/byte",
            x=tuple(2.0**rate for rate in rates),
            curves=tuple(
                Curve(
                    arm=f"{'layers' if deep else 'width'} {size}",
                    arms=tuple(f"{stem}-{name}-lr{rate}" for rate in rates),
                    metrics=("loss",) * len(rates),
                )
                for name, size in sizes
            ),
            log="x",
            reach=sweep.reach,
            suite=sweep.suite,
        )
